"""Test a whole sweep with the real programs: planned, trained, scored, reported, and killed."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time

import pytest

import stillhouse
from stillhouse.rundir import Runs
from tests.kills import PATIENCE_S, Place, differences, disturb


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


def test_with_a_teacher_that_is_served_and_killed_a_sweep_ends_in_the_same_bits(
    tmp_path, undisturbed
):
    place = Place(tmp_path)
    lines = place.file.read_text().replace("  pair: tiny", "  teacher_at: server\n  pair: tiny")
    lines = lines.replace("seeds: 2", "seeds: 1")
    lines = "".join(x for x in lines.splitlines(True) if not x.startswith(("eval:", "compare:")))
    place.file.write_text(lines)
    log = Runs(place.runs).sweep_log("small")
    served = re.compile(r"teacher of pair tiny: process (\d+) at")
    with place.ended():
        launcher = place.start("run")
        while not (log.is_file() and (found := served.search(log.read_text()))):
            assert launcher.poll() is None
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(found[1]), signal.SIGKILL)
        assert launcher.wait(timeout=PATIENCE_S) == 0, log.read_text()
    served_too = [run.path.name for run in Runs(place.runs).all()]
    expected = {
        name: kept
        for name, kept in undisturbed.outcome().items()
        if name.split("/")[0] in served_too and "/eval/" not in name
    }
    assert len(served_too) == 2 and differences(expected, place.outcome()) == []


def test_killed_at_random_moments_a_sweep_ends_as_if_undisturbed(tmp_path, undisturbed):
    place = Place(tmp_path)
    disturb(place, 2, random.Random(2))
    assert differences(undisturbed.outcome(), place.outcome()) == []
