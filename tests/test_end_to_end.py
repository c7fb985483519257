"""Test a whole sweep with the real programs: planned, trained, scored, reported, and killed."""

from __future__ import annotations

import random

import pytest

import stillhouse
from tests.kills import Place, differences, disturb


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Place:
    place = Place(tmp_path_factory.mktemp("undisturbed"))
    place.finish()
    return place


def test_a_sweep_ends_in_a_table_with_its_noise(undisturbed, capsys):
    from stillhouse import cli

    assert cli.main(["report", "small", "--runs", str(undisturbed.runs)]) == 0
    said = capsys.readouterr().out
    for row in ("teacher", "student", "ptq_int4", "lmbda = 0", "lmbda = 1"):
        assert row in said
    assert "(n = 2)" in said
    frame = stillhouse.load("small", str(undisturbed.runs))
    assert len(frame[frame["kind"] == "point"]) == 8, "4 points on 2 tasks"
    page = undisturbed.runs / "reports" / "small" / "report.html"
    assert "Does a sweep survive everything?" in page.read_text()


def test_a_second_run_has_nothing_left_to_do_and_touches_nothing(undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.runs.glob("*/adapter/*")}
    assert "nothing left to do" in undisturbed.finish()
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.runs.glob("*/adapter/*")}


def test_killed_at_random_moments_a_sweep_ends_as_if_undisturbed(tmp_path, undisturbed):
    place = Place(tmp_path)
    disturb(place, 2, random.Random(2))
    assert differences(undisturbed.outcome(), place.outcome()) == []
