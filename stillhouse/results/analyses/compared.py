"""Show the comparisons behind the answer, with their uncertainty."""

from __future__ import annotations

from stillhouse.results.section import Evidence, Section, along_axis, comparison_exhibits

NOTE = (
    "Paired by seed: each difference is between runs of one seed, and its 95 % interval is"
    " Student's t over seeds, on these documents. “Over documents too” adds the variance of a"
    " finite test set (two-way random effects). p is adjusted for the number of comparisons in"
    " its table (Holm); “within noise” means p ≥ 0.05. “Detectable” is the true difference that"
    " these seeds detect with a power of 80 %, at the strictest step of that adjustment. “Gap"
    " recovered” is the difference as a share of the teacher's lead over the untrained student,"
    " shown where that lead is at least 10 points (arXiv:2604.13016)."
)


def analyze(evidence: Evidence) -> Section:
    """The main comparisons, those within settings, and those with untrained students."""
    found = evidence.answer
    exhibits = along_axis(found.main, found.settings)
    exhibits += comparison_exhibits(found.untrained, gaps=found.gaps)
    families = {"main": found.main, "settings": found.settings, "untrained": found.untrained}
    title = f"Comparisons on {found.task}/{found.metric}"
    return Section(title, "", exhibits, NOTE, families=families)
