"""Declare every knob of an experiment: its type, its range, and its reason.

Defaults are not here: they are data, in `conf/`. A spec is a composed config that has been checked.
It is frozen, and its identity depends on its content alone (`point_id`). Leaf names are unique over
the whole tree, so that `lmbda` on a command line can only mean one thing.

Reading order:
    values       types of values: numbers with a range, names, bins, schedules
    models       PairSpec, QuantSpec, LoraSpec: what is trained
    learning     MethodSpec, RescueSpec, LossSpec, ScoringSpec, DataSpec, RolloutSpec, OptimSpec,
                 TrainingSpec: what a step does
    running      MonitorSpec, WatchSpec, TrackingSpec, PlaceSpec, SiteSpec: what is measured, where
    train        TrainSpec: a point, and what its sections ask of one another
    evaluation   TaskSpec, SuiteSpec, EvaluationSpec, EvalSpec, EvalJobSpec

All that others import is imported from here.
"""

from __future__ import annotations

from stillhouse.spec.evaluation import REQUANTISED, EvalJobSpec, EvalSpec, SuiteSpec, TaskSpec
from stillhouse.spec.learning import DataSpec, MethodSpec, RescueSpec, RolloutSpec
from stillhouse.spec.models import LoraSpec, PairSpec, QuantSpec, template_fields
from stillhouse.spec.running import SiteSpec, WatchRule
from stillhouse.spec.train import (
    GAPS,
    TrainSpec,
    computed_in,
    is_capped,
    is_float32,
    rollout_gap_bound,
)
from stillhouse.spec.values import (
    ID_DIGITS,
    MAX_NAME,
    MISSING,
    NAME,
    Count,
    Dtype,
    Knots,
    NonNegative,
)
