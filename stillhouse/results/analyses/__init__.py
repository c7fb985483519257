"""Analyze a sweep in sections, one file each, in the order of the report.

A new section is one file here with `analyze(evidence) -> Section`, and its line below.
"""

from stillhouse.results.analyses import (
    collapse,
    compared,
    equal_compute,
    overlap,
    preflight,
    requantised,
    rollout_gap,
)  # fmt: skip

ANALYSES = (
    preflight.analyze,  # verdicts before training, and outcomes
    compared.analyze,  # the comparisons behind the answer
    collapse.analyze,  # arms that collapsed or declined
    equal_compute.analyze,  # the same at equal tokens
    overlap.analyze,  # student and teacher distributions
    rollout_gap.analyze,  # rollouts against the trained function
    requantised.analyze,  # the cost of scoring another function
)
