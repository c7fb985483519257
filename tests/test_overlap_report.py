"""What a report says of how student and teacher came to overlap."""

# pandas annotates its results as unions of everything it could return.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
from sample_runs import Sample, write_sample

from stillhouse.results.curves import Run, read
from stillhouse.results.overlaps import MEASURES, ArmOverlap, overlaps, table_of, told
from stillhouse.results.report import write_report
from stillhouse.results.table import load
from stillhouse.rundir import Runs, write_atomic

SAMPLE = Sample(overlaps=True, axes={"lmbda": [0, 1]})
STILL = dict.fromkeys(MEASURES, (0.5, 0.5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_sample(root, SAMPLE)
    return root


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    return write_report("sample", runs).read_text()


def run_of(arm: str, seed: int, **ends: tuple[float, float]) -> Run:
    """A run that was looked at twice; what is not said stays where it is."""
    columns = {f"overlap/{name}": list(pair) for name, pair in (STILL | ends).items()}
    columns |= {"overlap/positions": [100.0, 200.0], "overlap/empty": [50.0, 20.0]}
    point: Mapping[str, object] = {"arm": arm, "seed": seed}
    return Run(point, pd.DataFrame(columns, index=[1, 100]), 1.0, 100, 4)


def arm_of(name: str, **ends: tuple[float, float]) -> list[Run]:
    """An arm whose three seeds end a little apart, so that there is noise to judge by."""
    return [
        run_of(name, seed, **{k: (a, b + 0.01 * seed) for k, (a, b) in ends.items()})
        for seed in range(3)
    ]


def only(found: list[ArmOverlap]) -> ArmOverlap:
    (arm,) = found
    return arm


def test_a_change_is_by_seed_from_the_first_look_to_the_last() -> None:
    arm = only(overlaps(arm_of("a", ratio=(0.6, 0.8))))
    course = arm.courses["ratio"]
    assert course.first.mean == 0.6
    assert course.last.mean == pytest.approx(0.81)
    # 0.20, 0.21, 0.22: 0.21 ± 4.302653 × 0.01 / sqrt(3), by the t table.
    assert course.change.low == pytest.approx(0.21 - 4.302653 * 0.01 / 3**0.5)
    assert (arm.moved("ratio"), arm.moved("mass_teacher")) == (1, 0)
    assert arm.empty == pytest.approx(0.1)


def test_an_arm_that_was_looked_at_once_or_never_has_no_course() -> None:
    once = run_of("once", 0)
    once.metrics.loc[100] = float("nan")
    never = Run({"arm": "never"}, pd.DataFrame({"train/loss": [1.0]}, index=[1]), 0.0, 1, None)
    assert overlaps([once, never]) == []
    assert told([]) == ""


def test_one_seed_shows_no_movement() -> None:
    found = overlaps([run_of("a", 0, ratio=(0.1, 0.9)), *arm_of("b", ratio=(0.6, 0.4))])
    assert found[0].moved("ratio") == 0
    said = told(found)
    assert "failing runs look: the one arm." in said, "of b alone"
    assert said.endswith(
        "Of 1 arm with one run each it is not said whether they moved: at the end the shared part"
        " is larger in 1, the advantage on it closer to 0 in 0, the entropy gap smaller in 0."
    )


def test_runs_that_look_like_the_papers_successful_ones_are_said_to() -> None:
    ends = {"ratio": (0.6, 0.8), "advantage": (-0.2, -0.05), "entropy_gap": (0.5, 0.2)}
    said = told(overlaps(arm_of("a", **ends)))
    assert "Of the 4 likeliest tokens of either side, the shared part grew in the one arm" in said
    assert "(from 0.60 to 0.81; in the paper's successful runs from 0.72 to above 0.91)" in said
    assert "The entropy gap shrank in the one arm." in said
    assert said.endswith("That is how the paper's successful runs look.")


def test_an_arm_whose_overlap_stands_still_is_named_as_the_papers_failing_runs_look() -> None:
    grows, stands, shrinks = (
        arm_of("grows", ratio=(0.6, 0.8), advantage=(-0.2, -0.1)),
        arm_of("stands"),
        arm_of("shrinks", ratio=(0.6, 0.4), entropy_gap=(0.1, 0.3)),
    )
    said = told(overlaps([*grows, *stands, *shrinks]))
    assert "the shared part grew in 1 of 3 arms (grows) (from 0.60 to 0.81;" in said
    assert "and shrank in 1 of 3 arms (shrinks)." in said
    assert "The entropy gap shrank in none of 3 arms and grew in 1 of 3 arms (shrinks)." in said
    assert said.endswith("is how the paper's failing runs look: 2 of 3 arms (stands; shrinks).")


def test_an_arm_that_only_its_shared_part_speaks_against_is_told_as_torn() -> None:
    ends = {"advantage": (-0.2, -0.05), "entropy_gap": (0.5, 0.2)}
    said = told(overlaps(arm_of("a", **ends)))
    assert "the shared part grew in none of 1 arm." in said
    assert said.endswith(
        "By the shared part alone these would look like the paper's failing runs, by the other two"
        " like its successful ones: the one arm. In a small vocabulary the other two say more."
    )


def test_the_table_has_a_row_per_number_of_each_arm_that_wrote_rollouts(runs: Path) -> None:
    header, rows = table_of(overlaps(read(load("sample", runs), Runs(runs))))
    assert [row[:2] for row in rows] == [["lmbda = 1", title] for title, _ in MEASURES.values()]
    assert dict(zip(header, rows[0], strict=True))["moved"] == "up"
    assert dict(zip(header, rows[2], strict=True))["moved"] == "down"


def test_the_page_tells_shows_and_draws_it(runs: Path, page: str) -> None:
    assert "<h2>How student and teacher overlap</h2>" in page
    assert "the shared part grew in the one arm" in page
    directory = Runs(runs).report("sample")
    curves, mapped = ((directory / f"{n}.svg").read_text() for n in ("overlap", "overlap_map"))
    assert "<!-- advantage on shared tokens -->" in curves
    assert "<!-- 0–7 -->" in mapped and "<!-- 8– -->" in mapped
    assert (directory / "advantage_map.svg").exists()
    assert "## How student and teacher overlap" in (directory / "table.md").read_text()
    row = pd.read_csv(directory / "arms.csv").iloc[0]
    assert row["arm"] == "lmbda = 1" and row["overlap_empty"] == pytest.approx(0.025)


def test_a_bin_that_one_arms_rollouts_never_reach_is_blank_in_its_map(tmp_path: Path) -> None:
    sample = dataclasses.replace(SAMPLE, axes={"lmbda": [0.5, 1]})
    for run in write_sample(tmp_path, sample)[:3]:
        lines = [{k: v for k, v in m.items() if k != "overlap/ratio/8-"} for m in run.metrics()]
        write_atomic(run.metrics_file, "".join(json.dumps(m) + "\n" for m in lines).encode())
    write_report("sample", tmp_path)
    assert "<!-- 8– -->" in (Runs(tmp_path).report("sample") / "overlap_map.svg").read_text()


def test_a_sweep_that_was_not_looked_at_has_neither_section_nor_figure(tmp_path: Path) -> None:
    write_sample(tmp_path, dataclasses.replace(SAMPLE, overlaps=False))
    assert "overlap" not in write_report("sample", tmp_path).read_text()
    assert not list(Runs(tmp_path).report("sample").glob("overlap*"))
