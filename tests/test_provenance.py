"""Test that a table whose rows depend on two versions of one name says so, with the counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.identity import from_plain, point_id
from stillhouse.preflight_rules import key_of
from stillhouse.results.analyses import preflight
from stillhouse.results.answer import answer
from stillhouse.results.provenance import as_facts, mixtures
from stillhouse.results.report import write_report
from stillhouse.results.summary import notes
from stillhouse.results.table import load
from stillhouse.rundir import RunDir, Runs, read_json, write_json
from tests.builders.sample_runs import Sample, write_sample

OURS, THEIRS = "a" * 64, "b" * 64


def over(weights: str, **more: Any) -> dict[str, Any]:
    """Sources of which the student's weights have this digest."""
    student = {"what": "tiny", "kind": "model", "digest": weights}
    rows = {"what": "generated problems", "kind": "rows", "digest": "c" * 64}
    return {"student": student, "data": rows | more}


@pytest.fixture
def runs(tmp_path: Path) -> list[RunDir]:
    made = write_sample(tmp_path, Sample(axes={"lmbda": [0, 1]}, seeds=2))
    for run in made:
        rest(run, sources=over(OURS), cpu_capability="AVX512", processor="one", threads=1)
    for file in tmp_path.glob("baselines/student-*/eval/*.json"):
        write_json(file, (read_json(file) or {}) | {"sources": {"student": over(OURS)["student"]}})
    return made


def rest(run: RunDir, **more: Any) -> None:
    write_json(run.spec_file, (run.record() or {}) | more)


def test_what_rests_on_one_thing_is_said_once_and_called_no_mixture(runs: list[RunDir]) -> None:
    frame = load("sample", runs[0].path.parent)
    assert set(frame["source_student"].dropna()) == {"a" * 10}
    assert mixtures(frame) == []
    assert ("student weights", "a" * 10) in as_facts(frame)
    assert ("CPU capability", "AVX512") in as_facts(frame)
    assert answer(frame).untrained


def test_two_weights_under_one_name_are_said_with_their_counts(runs: list[RunDir]) -> None:
    rest(runs[0], sources=over(THEIRS))
    root = runs[0].path.parent
    (said,) = mixtures(load("sample", root))
    # Three points and the untrained student rest on the one, one point on the other.
    assert said == (
        "Mixed student weights: 4 with aaaaaaaaaa, 1 with bbbbbbbbbb. A difference between rows may"
        " come from that alone."
    )
    page = write_report("sample", root)
    assert f"- {said}" in (page.parent / "table.md").read_text()
    assert "mixed: aaaaaaaaaa (4 rows), bbbbbbbbbb (1 rows)" in page.read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"sources": over(OURS, digest="d" * 64)},
            "Mixed data: 3 with cccccccccc, 1 with dddddddddd",
        ),
        (
            {"cpu_capability": "AVX2"},
            "Mixed CPU capability in training: 3 with AVX512, 1 with AVX2",
        ),
        ({"threads": 4}, "Mixed threads in training: 3 with 1, 1 with 4"),
    ],
)
def test_two_data_or_two_processors_are_said(
    runs: list[RunDir], change: dict[str, Any], says: str
) -> None:
    rest(runs[1], **change)
    assert any(note.startswith(says) for note in notes(load("sample", runs[0].path.parent)))


def test_two_devices_are_said(runs: list[RunDir]) -> None:
    cost = read_json(runs[0].cost_file) or {}
    write_json(runs[0].cost_file, cost | {"device": "NVIDIA H200"})
    (said,) = mixtures(load("sample", runs[0].path.parent))
    assert said.startswith("Mixed device in training: 3 with cpu, 1 with NVIDIA H200")


def test_no_arm_is_compared_with_an_untrained_student_of_other_weights(runs: list[RunDir]) -> None:
    for run in runs:
        rest(run, sources=over(THEIRS))
    frame = load("sample", runs[0].path.parent)
    (said,) = mixtures(frame)
    assert said.startswith("Mixed student weights: 4 with bbbbbbbbbb, 1 with aaaaaaaaaa")
    assert {c.reference for c in answer(frame).untrained} == {"ptq_int4"}  # it says nothing of it


def test_a_preflight_of_other_weights_is_left_out_and_said(runs: list[RunDir]) -> None:
    root = runs[0].path.parent
    spec = from_plain((runs[3].record() or {})["spec"])
    assert point_id(spec) == runs[3].id
    file = Runs(root).verdict_file("tiny", key_of(spec))
    write_json(file, {"sources": over(OURS), "numbers": {}})
    frame = load("sample", root)
    assert preflight.excluded(frame, Runs(root)) == []
    write_json(file, {"sources": over(THEIRS), "numbers": {}})
    (said,) = preflight.excluded(frame, Runs(root))
    assert said.startswith("The preflights of 4 runs measured other weights or rows")
