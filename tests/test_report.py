"""Test the page of a sweep and its figures: the content, and that it needs no other files."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stillhouse.errors import ConfigError
from stillhouse.results import plots
from stillhouse.results.analyses import ANALYSES
from stillhouse.results.answer import answer
from stillhouse.results.curves import (
    Group,
    Run,
    grouped,
    jumps,
    line_name,
    over_steps,
    read_runs,
    score_key,
)
from stillhouse.results.figures import FIGURES
from stillhouse.results.format import as_csv, duration, interval, probability, signed
from stillhouse.results.report import _share, commands, cost_table, failure_table, write_report
from stillhouse.results.section import Evidence
from stillhouse.results.table import load
from stillhouse.rundir import Runs, read_json, write_json
from tests.builders.cliff_runs import SMALL
from tests.builders.sample_runs import CAUSE, Sample, write_sample

Report = Callable[[str], Path]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Outline(HTMLParser):
    """What a browser would see: open tags balanced, ids, text, and addresses of other things."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.points_to: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.points_to.add(value or "")
            self.points_to |= {f"#{used}" for used in re.findall(r"url\(#([^)]+)\)", value or "")}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return (report("sample") / "report.html").read_text()


def test_the_page_opens_with_the_question_and_its_answer(page: str) -> None:
    body = page[page.index("<body>") :]
    question = body.index("Does training on the student&#39;s own answers help?")
    assert question < body.index("against lmbda = 0: lmbda = 0.5 is") < body.index("<table")
    assert "<dt>weights quantized</dt><dd>100.0%</dd>" in body
    assert "<dt>weights adapted</dt><dd>93.8%</dd>" in body


def test_the_page_stands_alone(page: str) -> None:
    outline = Outline(page)
    assert outline.open == [], "every element is closed"
    assert "script" not in outline.tags and "link" not in outline.tags
    assert "http" not in page and "@import" not in page
    # Only fragments of this page are referred to, each is there, and no id stands twice.
    assert {target.removeprefix("#") for target in outline.points_to} <= set(outline.ids)
    assert all(target.startswith("#") for target in outline.points_to)
    assert len(outline.ids) == len(set(outline.ids))
    # The figures take the ink of the page.
    assert page.count("<svg") == 2
    assert "currentColor" in page and plots.INK not in page.split("</style>", 1)[1]


def test_tables_and_figures_lie_beside_the_page(report: Report) -> None:
    directory = report("sample")
    files = "report.html table.md table.csv points.csv comparisons.csv"
    files += " scores.svg scores.png training.svg training.png"
    assert {path.name for path in directory.iterdir()} == {*files.split()}
    assert len((directory / "points.csv").read_text().splitlines()) == 1 + 18 + 6
    assert len((directory / "table.csv").read_text().splitlines()) == 1 + 12
    # Two values against the baseline, three arms against each of two untrained students.
    assert len((directory / "comparisons.csv").read_text().splitlines()) == 1 + 2 + 6


def test_shares_are_told_by_quantiser_where_they_differ() -> None:
    kept = {"quant_type": ["int4", "int4", "none"], "adapted_share": [1.0, 1.0, 1.0]}
    points = pd.DataFrame(kept | {"quantised_share": [0.98, 1.0, 0.0], "old": [None] * 3})
    assert _share(points, "adapted_share") == "100.0%"
    assert _share(points, "quantised_share") == "98.0% or 100.0% under int4, 0.0% under none"
    assert _share(points, "old") == "", "runs of before counted nothing"


def test_a_report_written_twice_is_the_same_to_the_byte(finished: Path, report: Report) -> None:
    directory = report("sample")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    write_report("sample", finished)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_what_failed_and_why_is_on_the_page(finished: Path, report: Report) -> None:
    frame: Any = load("methods", finished)
    _, rows = failure_table(frame)
    directory = frame[frame["phase"] == "failed"].iloc[0]["directory"]
    assert rows == [[CAUSE, "diverged", "method = hybrid, seed 2", f"{directory}/log.txt"]]
    text = Outline((report("methods") / "report.html").read_text()).text
    assert CAUSE in text, "angle brackets are escaped, not lost"
    assert "2 of 12 points are not fully scored" in text
    assert "So far 10 of 12 points are scored" in text


def test_what_others_wrote_is_inert_in_every_file(tmp_path: Path) -> None:
    asked = ["=1+1 {question}", "+{question}", "@SUM {question} $\\frac$"]
    cause = "=bad\x1b]0;owned\x07 <img src=x> row"
    write_sample(tmp_path, Sample(
        axes={"prompt_template": asked}, ability=lambda _: 0.0, failed={0: cause}, compare=None,
        question="=1+1 \x1b[2J?", baselines=(), steps=4,
    ))  # fmt: skip
    page = write_report("sample", tmp_path)
    for file in (page, *page.parent.glob("*.csv"), page.parent / "table.md"):
        text = file.read_text()
        assert not [c for c in text if ord(c) < 32 and c not in "\n\t"], file.name
    assert "<img" not in page.read_text() and "&lt;img src=x&gt;" in page.read_text()
    for file in page.parent.glob("*.csv"):
        for row in csv.reader(file.read_text().splitlines()):
            assert not [cell for cell in row if cell.startswith(("=", "+", "@"))], file.name
    points = (page.parent / "points.csv").read_text()
    assert all(f"'{template}" in points for template in asked)


def test_text_that_begins_a_formula_gets_an_apostrophe_and_numbers_stay_numbers() -> None:
    begins = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]
    for text in begins:
        (_, row) = csv.reader(io.StringIO(as_csv([{"arm": text, "n": 1}]), newline=""))
        assert row[0].startswith("'") and row[1] == "1"
    numbers = {"a": -1, "b": -0.5, "c": 1e-7, "d": True, "e": None, "f": float("nan")}
    plain = pd.DataFrame([numbers, {"a": 2}])
    assert as_csv(plain) == plain.to_csv(index=False)
    assert as_csv([{"=x": 1}, {"=x": -2}]) == "'=x\n1\n-2\n"
    assert as_csv([{"arm": "a = -1"}]) == "arm\na = -1\n"


def test_points_with_one_cause_fail_in_one_row(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(failed={0: CAUSE, 1: CAUSE, 4: "OutOfMemory: step 3"}))
    two, one = failure_table(load("sample", tmp_path))[1]
    assert (two[2], one[2]) == ("lmbda = 0, seed 0; lmbda = 0, seed 1", "lmbda = 0.5, seed 1")


def test_the_cost_table_adds_up(finished: Path) -> None:
    frame: Any = load("methods", finished)
    header, rows = cost_table(frame)
    assert header[0] == "method_name"
    runs = "on_policy_gkd 3, hybrid 2, off_policy 3, reverse_curriculum 2, all 10"
    assert ", ".join(f"{row[0]} {row[1]}" for row in rows) == runs
    points = frame.drop_duplicates("id")
    # 0.75 dollars an hour, one device.
    assert points["price_usd"].sum() == pytest.approx(points["train_seconds"].sum() / 3600 * 0.75)
    assert rows[-1][6] == f"${points['price_usd'].sum():.2f}"
    assert rows[-1][4] == f"{10 * 600 * 60:,}"
    unpriced = cost_table(load("sample", finished))[1]
    assert {row[6] for row in unpriced} == {"not known"}, "a price is not guessed"


def test_the_page_says_how_to_make_it_again(finished: Path) -> None:
    frame: Any = load("sample", finished)
    again = ["stillhouse run sweeps/sample.yaml", "stillhouse report sample"]
    assert commands(frame, Path("runs")) == again
    assert commands(frame, Path("my runs"))[1] == "stillhouse report sample --runs 'my runs'"
    frame.attrs["sweep"] |= {"file": None, "words": ["pair=tiny", "lmbda=0,1"]}
    assert commands(frame, Path("runs"))[0] == "stillhouse run pair=tiny lmbda=0,1"
    frame.attrs["sweep"] |= {"words": None}
    assert commands(frame, Path("runs")) == ["stillhouse report sample"]


def test_a_sweep_that_has_not_begun_has_a_page_too(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(unstarted=range(9), baselines=(), question=None))
    text = Outline(write_report("sample", tmp_path).read_text()).text
    assert "There are no scores yet" in text and "9 of 9 points are not fully scored" in text
    assert "no question given" in text
    assert not list(Runs(tmp_path).report("sample").glob("*.svg"))


def test_a_sweep_that_is_trained_and_not_scored_shows_its_curves(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(baselines=()))
    for file in tmp_path.glob("*/eval/*.json"):
        file.unlink()
    text = Outline(write_report("sample", tmp_path).read_text()).text
    assert "9 of 9 points are not fully scored: 9 trained, not scored." in text
    assert [p.name for p in Runs(tmp_path).report("sample").glob("*.svg")] == ["training.svg"]
    # Nor is there anything to score where no suite is asked for.
    path = Runs(tmp_path).sweep_file("sample")
    write_json(path, (read_json(path) or {}) | {"suite": None})
    text = Outline(write_report("sample", tmp_path).read_text()).text
    assert "There are no scores yet" in text and "not fully scored" not in text


def test_an_unknown_sweep_writes_no_report(finished: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean"):
        write_report("samples", finished)
    assert not Runs(finished).report("samples").exists()


def names(sweep: str, runs: Path) -> list[str]:
    """The figures that a sweep's data can fill, those of its analyses apart."""
    frame: Any = load(sweep, runs)
    logged = read_runs(frame, Runs(runs))
    return [drawn[1] for figure in FIGURES if (drawn := figure(frame, logged)) is not None]


def all_figures(sweep: str, runs: Path) -> dict[str, plots.Draw]:
    """Every figure of a sweep's report by its name, laid out."""
    frame: Any = load(sweep, runs)
    seen = Evidence(frame, Runs(runs), answer(frame), read_runs(frame, Runs(runs)))
    makers = [partial(figure, frame, seen.curves) for figure in FIGURES]
    made: dict[str, plots.Draw] = {}
    with plots.style():
        for maker in [*makers, *(figure for a in ANALYSES for figure in a(seen).figures)]:
            if (drawn := maker()) is not None:
                made[drawn[1]] = drawn[0]
                drawn[0].draw_without_rendering()
    return made


def assert_readable(figure: plots.Draw, name: str) -> None:
    """Numbers are written out as they are, and nothing is cut off."""
    for axis in figure.axes:
        for along in (axis.xaxis, axis.yaxis):
            ticks = [text.get_text() for text in along.get_ticklabels(which="both")]
            assert not any("$" in text for text in ticks), (name, ticks)
            assert not along.get_offset_text().get_text(), name
            shown = [text for text in ticks if text]
            assert len(set(shown)) == len(shown), (name, shown)
        box, page = axis.get_tightbbox(), figure.bbox
        # The frame's own line is half outside of the limits that it is drawn at.
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < page.x1 + 1 and box.y1 < page.y1 + 1, name


def by_method(sweep: str, runs: Path) -> list[Group]:
    logged = read_runs(load(sweep, runs), Runs(runs))
    return grouped(logged, lambda run: line_name(run, "method_name"))


def test_the_figures_are_drawn_where_their_data_are(finished: Path, report: Report) -> None:
    assert names("sample", finished) == ["scores", "training"]
    drawn = names("methods", finished)
    assert drawn == ["scores", "method_comparison", "training", "distribution_cliff"]
    for name in drawn:
        assert (report("methods") / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<dc:date>" not in (report("methods") / f"{name}.svg").read_bytes()


@pytest.mark.parametrize("name", ["cliff", "methods", "overlap", "requantized"])
def test_ticks_are_plain_numbers_and_no_text_of_a_figure_is_cut_off(
    name: str, finished: Path
) -> None:
    for drawn, figure in all_figures(name, finished).items():
        assert_readable(figure, drawn)


def test_a_gap_that_is_all_rounding_is_drawn_in_plain_numbers_a_row_for_each_setting(
    tmp_path: Path,
) -> None:
    axes = {"beta": [0, 0.5, 1], "lmbda": [0.25, 0.5, 1]}
    write_sample(tmp_path, Sample(axes=axes, gaps=True, overlaps=True, steps=20))
    made = all_figures("sample", tmp_path)
    for name, panels in (("rollout_gap", 2), ("overlap", 4)):
        assert_readable(made[name], name)
        settings = [axis.get_ylabel() for axis in made[name].axes[::panels]]
        assert [label.partition("\n")[0] for label in settings] == [
            f"beta = {b}" for b in axes["beta"]
        ]
        assert all(a.get_subplotspec().is_first_col() for a in made[name].axes[::panels])
    gap, ess = made["rollout_gap"].axes[:2]
    assert gap.get_yscale() == "log" and ess.get_ylim()[0] == 0
    assert "1.0" in [text.get_text() for text in ess.get_yticklabels()]
    assert "3e\N{MINUS SIGN}06" in [text.get_text() for text in gap.get_yticklabels(which="both")]


def test_figures_of_two_losses_show_both_and_their_baseline(report: Report) -> None:
    for name in ("distribution_cliff", "method_comparison", "teacher_seeding"):
        text = (report("cliff") / f"{name}.svg").read_text()
        assert "<!-- loss = ce_pg -->" in text and "<!-- loss = jsd -->" in text
    cliff = (report("cliff") / "distribution_cliff.svg").read_text()
    assert all(f"<!-- {method} -->" in cliff for method in SMALL.methods)
    assert "<!-- switches to on-policy at step 50 -->" in cliff
    page = (report("cliff") / "report.html").read_text()
    assert page.count("95 % t intervals over seeds") == 3
    assert "Gray: on_policy_gkd, the same in every panel." in page
    assert "0.001, 0.005 (follows from loss)" in page
    assert "Collapsed (below the untrained student" in page[: page.index("</header>")]
    for title in ("Collapse and decline", "At equal compute"):
        assert f"<h2>{title}</h2>" in page
    assert (report("cliff") / "comparisons.csv").read_text().count("\nequal compute,") == 10
    assert len((report("cliff") / "arms.csv").read_text().splitlines()) == 1 + 12


def test_seeding_is_drawn_where_tokens_are_forced(tmp_path: Path) -> None:
    seeded = Sample(seed_tokens=lambda step: max(0, 20 - step), scores=True)
    write_sample(tmp_path, seeded)
    assert "teacher_seeding" in names("sample", tmp_path)


def test_many_arms_of_one_seed_and_a_schedule_as_an_axis_can_be_drawn(tmp_path: Path) -> None:
    axes = {"lmbda": [0, [[0, 0], [0.5, 0], [0.5, 1]]], "learning_rate": [1e-5, 2e-5, 5e-5, 1e-4]}
    compare = {"by": "learning_rate", "metric": "tiny_mc/acc", "baseline": 1e-5}
    sample = Sample(axes=axes, seeds=1, compare=compare, ability=lambda overrides: 0.2, steps=20)
    write_sample(tmp_path, sample)
    drawn = names("sample", tmp_path)
    assert drawn == ["scores", "training", "distribution_cliff"]


def test_a_curve_is_the_mean_of_its_runs_within_their_band(finished: Path) -> None:
    made = by_method("methods", finished)
    assert [group.name for group in made][:2] == ["on_policy_gkd", "hybrid"]
    # Two hybrid runs went to the end; the third failed half way, and counts as far as it came.
    hybrid = made[1]
    curve = over_steps(hybrid, "train/reverse_kl")
    assert curve is not None
    for step, present in ((10, 3), (50, 2)):
        logged = [run.metrics["train/reverse_kl"] for run in hybrid.runs]
        values = [series[step] for series in logged if step in series.index]
        assert len(values) == present
        assert curve["mean"][step] == pytest.approx(sum(values) / present)
        assert (curve["lowest"][step], curve["highest"][step]) == (min(values), max(values))
    assert over_steps(hybrid, "train/never_logged") is None


def test_smoothing_keeps_a_constant_and_the_number_of_steps(finished: Path) -> None:
    made = read_runs(load("sample", finished), Runs(finished))
    curve = over_steps(Group("all", made), "tokens/completion", window=7)
    assert curve is not None
    assert len(curve) == 60 and set(curve["mean"]) == {640.0}


def test_a_jump_of_the_schedule_is_found_and_a_ramp_is_none(finished: Path) -> None:
    made = by_method("methods", finished)
    found = {group.name: jumps(group.runs[0]) for group in made}
    assert found["hybrid"] == [(30.0, "to on-policy")]
    assert found["reverse_curriculum"] == [(42.0, "to off-policy")]
    assert found["off_policy"] == []
    ramp = dataclasses.replace(made[0].runs[0], schedule=[[0, 0], [1, 1]])
    assert jumps(ramp) == []


def logged(**columns: list[float]) -> Run:
    return Run({}, pd.DataFrame(columns, index=[10, 20]), 1.0, 20, None)


def test_an_interval_is_students_t_over_the_runs_of_a_step() -> None:
    runs = [logged(**{"eval/accuracy": [share, 0.5]}) for share in (0.1, 0.2, 0.3)]
    curve = over_steps(Group("three seeds", runs), "eval/accuracy")
    assert curve is not None
    # t(0.975, 2) = 4.302653 by the table, and the standard error is 0.1 / sqrt(3).
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert curve["mean"][10] == pytest.approx(0.2)
    assert curve["low"][10] == pytest.approx(0.2 - reach)
    assert curve["high"][10] == pytest.approx(0.2 + reach)
    alone = over_steps(Group("one seed", runs[:1]), "eval/accuracy")
    assert alone is not None and alone["low"].isna().all()


def test_being_right_counts_more_than_looking_like_the_teacher() -> None:
    similar = logged(**{"train/score": [0.5, 0.6], "train/reverse_kl": [1.0, 0.9]})
    assert score_key([similar]) == "train/score"
    assert score_key([similar, logged(**{"eval/accuracy": [0.1, 0.2]})]) == "eval/accuracy"
    assert score_key([logged(**{"train/loss": [1.0, 0.9]})]) is None


def test_numbers_are_written_for_people() -> None:
    shown = "3 s, 89 s, 1.5 min, 90.0 min, 1.5 h, 62.7 h"
    assert ", ".join(duration(s) for s in (3, 89, 90, 5399, 5400, 225720)) == shown
    assert (signed(0.5), signed(-0.5)) == ("+0.500", "−0.500")
    assert signed(0.1 + 0.2 - 0.3) == signed(0.3 - 0.2 - 0.1) == "0.000"  # off in the last bit
    assert interval(-0.1, 0.2) == "[−0.100, +0.200]"
    assert interval(float("nan"), float("nan")) == "–"
    assert [probability(p) for p in (0.2, 1e-9, float("nan"))] == ["0.200", "< 0.001", "–"]


def test_of_many_pairs_a_report_counts_what_it_cannot_name(tmp_path: Path) -> None:
    """Nine pair seeds: eighteen models that nobody trained, and warnings of nine arms."""
    sample = Sample(axes={"pair_seed": list(range(9))}, seeds=2, compare=None, baselines=())
    made = write_sample(tmp_path, sample)
    record = read_json(tmp_path / "sweeps" / "sample.json") or {}
    for seed in range(9):
        one = Sample(name=f"p{seed}", axes={}, base={"pair_seed": seed}, seeds=1, compare=None)
        one = dataclasses.replace(one, baselines=("teacher", "student"))
        write_sample(tmp_path, one)
        record["baselines"] += (read_json(tmp_path / "sweeps" / f"p{seed}.json") or {})["baselines"]
    write_json(tmp_path / "sweeps" / "sample.json", record)
    for run in made:
        run.update_status(warnings={"kl_runaway": "kl_runaway: 3"})
    page = write_report("sample", tmp_path)
    text = (page.parent / "table.md").read_text()
    assert "Against 9 untrained students (" in text and "For comparison: 9 teachers 0." in text
    assert "Watch rule kl_runaway warned in 18 of 18 runs: " in text
    assert "and 3 more arms." in text
    assert "Against the untrained student" not in text, "nine tables are folded, on the page alone"


def test_scores_are_drawn_by_setting_where_there_are_few(tmp_path: Path) -> None:
    axes = {"lmbda": [0, 1], "beta": [0, 1], "lora_r": [4, 8]}
    write_sample(tmp_path, Sample(axes=axes, seeds=2))
    svg = (write_report("sample", tmp_path).parent / "scores.svg").read_text()
    for beta, rank in itertools.product((0, 1), (4, 8)):
        assert f"<!-- beta = {beta}, lora_r = {rank} -->" in svg
