"""Test a sweep's files as a frame, the frame as a table, and the comparisons that it allows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stillhouse
from stillhouse.errors import ConfigError, ContractError
from stillhouse.results.answer import answer
from stillhouse.results.format import as_markdown, comparison_tables
from stillhouse.results.report import write_report
from stillhouse.results.summary import notes, summary, wide
from stillhouse.results.table import arm_name, format_value, is_unscored, load, points_of
from stillhouse.rundir import Runs, read_json, write_json
from tests.builders.sample_runs import DOCUMENTS, SUITE, Sample, write_sample


def change(file: Path, **fields: Any) -> None:
    write_json(file, (read_json(file) or {}) | fields)


def rows(frame: Any, **where: Any) -> Any:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame


def test_a_frame_has_a_row_per_point_and_task_and_per_baseline_and_task(finished: Path) -> None:
    frame = stillhouse.load("sample", runs=finished)
    assert len(rows(frame, kind="point")) == 3 * 3 * len(SUITE.tasks)
    counts = {"point": 18, "teacher": 2, "student": 2, "ptq": 2}
    assert frame["kind"].value_counts().to_dict() == counts
    assert sorted(rows(frame, kind="point")["lmbda"].unique()) == [0, 0.5, 1]
    assert rows(frame, kind="point")["seed"].unique().tolist() == [0, 1, 2]
    assert rows(frame, kind="ptq")["name"].unique().tolist() == ["ptq_int4"]
    assert points_of(frame)["trained"].all()


def test_a_value_is_the_one_in_its_eval_file(finished: Path) -> None:
    frame = load("sample", finished)
    for row in rows(frame, kind="point", task="tiny_gen").itertuples():
        file = read_json(finished / row.directory / "eval" / "tiny_gen.json")
        assert file is not None
        assert (row.value, row.metric, row.n_docs) == (file["value"], file["metric"], DOCUMENTS)
        assert row.higher_is_better and row.eval_version_lm_eval == "0.4.13"
        assert row.code_digest == "c0ffee0123456789" and row.version_torch == "2.13.0"


def test_a_frame_says_of_each_point_how_far_its_rollouts_were_from_what_was_trained(
    tmp_path: Path,
) -> None:
    directory = write_sample(tmp_path, Sample(gaps=True, seeds=1, steps=3))[2].path
    points = points_of(load("sample", tmp_path)).set_index("lmbda")
    # Steps 0, 1 and 2 of 3: the gap of a step is 2e-6 (1 + step / 3).
    assert points["rollout_gap_mean"][1] == pytest.approx(2e-6 * (1 + 1 / 3))
    assert points["rollout_gap_max"][1] == pytest.approx(9 * 2e-6 * (1 + 2 / 3))
    assert points["rollout_ess"][1] == pytest.approx(1 - 2e-6 * (1 + 2 / 3))
    assert math.isnan(points["rollout_gap_mean"][0]), "nothing was drawn"
    # A file that cannot be read is told of where curves are drawn; the point keeps its scores.
    (directory / "metrics.jsonl").write_text("[]\n")
    again = points_of(load("sample", tmp_path)).set_index("lmbda")
    assert math.isnan(again["rollout_ess"][1]) and again["value"][1] == points["value"][1]


def test_a_summary_is_the_mean_over_seeds_with_its_error(finished: Path) -> None:
    frame = load("sample", finished)
    values = rows(frame, arm="lmbda = 0.5", task="tiny_gen")["value"].to_numpy()
    row = rows(summary(frame), arm="lmbda = 0.5", task="tiny_gen").iloc[0]
    assert row["n"] == 3 and row["missing"] == 0
    assert row["mean"] == pytest.approx(values.mean())
    assert row["se"] == pytest.approx(values.std(ddof=1) / np.sqrt(3))
    assert row["shown"] == f"{values.mean():.3f} ± {row['se']:.3f} (n = 3)"


def test_a_baseline_shows_documents_and_no_seeds(finished: Path) -> None:
    row = rows(summary(load("sample", finished)), kind="teacher", task="tiny_gen").iloc[0]
    share = row["mean"]
    assert np.isnan(row["se"]) and row.isna()["n"]
    assert row["doc_se"] == pytest.approx(np.sqrt(share * (1 - share) / DOCUMENTS))
    assert row["shown"] == f"{share:.3f} (200 documents, binomial s.e. {row['doc_se']:.3f})"


def test_baselines_come_first_and_arms_in_the_order_of_the_sweep(finished: Path) -> None:
    header, body = wide(summary(load("sample", finished)))
    assert header == ["arm", "tiny_gen/exact_match ↑", "tiny_mc/acc ↑"]
    arms = ["teacher", "student", "ptq_int4", "lmbda = 0", "lmbda = 0.5", "lmbda = 1"]
    assert [row[0] for row in body] == arms


def test_one_seed_is_printed_as_such_and_makes_no_statement(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(seeds=1))
    table = summary(load("sample", tmp_path))
    shown = rows(table, kind="point", task="tiny_gen")["shown"]
    assert all(text.endswith("(one seed)") and "±" not in text for text in shown)
    found = answer(load("sample", tmp_path))
    assert {c.verdict.text for c in found.main} == {"one seed: no statement"}
    assert "lmbda = 1, one seed: no statement (" in found.text


def test_a_sweep_that_is_half_done_says_how_much_is_missing(finished: Path) -> None:
    frame = load("grid", finished)
    assert len(points_of(frame)) == 12
    assert points_of(frame[is_unscored(frame)])["phase"].isna().sum() == 1
    said = notes(frame)
    assert said[0] == "2 of 12 points are not fully scored: 1 not started, 1 failed."
    row = rows(summary(frame), arm="lmbda = 0, beta = 1", task="tiny_gen").iloc[0]
    assert (row["n"], row["missing"]) == (2, 1)


def test_a_sweep_that_has_not_begun_gives_a_table_without_numbers_and_says_nothing(
    tmp_path: Path,
) -> None:
    write_sample(tmp_path, Sample(unstarted=range(9), baselines=()))
    frame = load("sample", tmp_path)
    assert frame["value"].isna().all() and not frame["trained"].any()
    assert set(summary(frame)["shown"]) == {"not scored yet"}
    assert notes(frame) == ["9 of 9 points are not fully scored: 9 not started."]
    assert answer(frame).text == "There are no scores yet, so nothing can be said."


def test_mixed_code_and_versions_are_named(finished: Path, tmp_path: Path) -> None:
    assert any(
        note.startswith("Mixed code: 9 with c0ffee0123456789, 2 with 0ddc0de012345678")
        for note in notes(load("grid", finished))
    )
    assert notes(load("sample", finished)) == []
    made = write_sample(tmp_path)
    change(made[0].eval_file("tiny_mc"), versions={"lm_eval": "0.4.14"})
    said = notes(load("sample", tmp_path))
    assert len(said) == 1 and said[0].startswith("Mixed lm_eval in scoring: 11 with 0.4.13, 1 with")


def test_a_score_of_other_settings_is_left_out_and_said(tmp_path: Path) -> None:
    write_sample(tmp_path)
    file = Runs(tmp_path).sweep_file("sample")
    change(file, suite=(read_json(file) or {})["suite"] | {"limit": 9})
    frame = load("sample", tmp_path)
    assert frame["value"].isna().all() and frame["scored_otherwise"].all()
    assert any("24 scores were made with other settings" in said for said in notes(frame))


def test_a_sweep_without_comparison_or_suite_shows_what_was_scored(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(compare=None))
    found = answer(load("sample", tmp_path))
    assert found.main == [] and "names no comparison" in found.text and found.untrained
    change(Runs(tmp_path).sweep_file("sample"), suite=None)
    frame = load("sample", tmp_path)
    assert set(frame["task"]) == {"tiny_gen", "tiny_mc"} and frame["value"].notna().all()


def test_an_unknown_sweep_names_the_nearest_one(finished: Path) -> None:
    with pytest.raises(
        ConfigError, match='no sweep "sampel"; there are cliff, grid, .* Did you mean'
    ):
        load("sampel", finished)
    with pytest.raises(ConfigError, match="there are none"):
        load("sample", finished / "elsewhere")


def test_a_sweep_of_another_format_is_refused(tmp_path: Path) -> None:
    write_sample(tmp_path)
    change(Runs(tmp_path).sweep_file("sample"), format=2)
    with pytest.raises(ContractError, match="format 2"):
        load("sample", tmp_path)


def test_points_may_set_different_things(tmp_path: Path) -> None:
    made = write_sample(tmp_path, Sample(axes={"lmbda": [0, 1]}, seeds=1, compare=None))
    path = Runs(tmp_path).sweep_file("sample")
    points = (read_json(path) or {})["points"]
    points[0]["overrides"] = {"learning_rate": 5e-6, "seed": 0}
    points[1]["overrides"] = {"lmbda": [[0, 0], [1, 1]], "seed": 0}
    change(path, points=points)
    frame = load("sample", tmp_path)
    arms = points_of(frame)["arm"].tolist()
    assert arms == ["learning_rate = 5e-6", "lmbda = [[0, 0], [1, 1]]"]
    assert frame.attrs["fields"] == ["learning_rate", "lmbda"] and len(made) == 2
    assert len(rows(summary(frame), kind="point")) == 4


def test_perplexity_has_no_binomial_error_and_points_down(tmp_path: Path) -> None:
    made = write_sample(tmp_path, Sample(seeds=2))
    files = [run.eval_file("tiny_mc") for run in made]
    files += (tmp_path / "baselines").glob("*/eval/tiny_mc.json")
    for file in files:
        change(file, value=10.404, higher_is_better=False, samples=[])
    table = summary(load("sample", tmp_path))
    assert wide(table)[0][2] == "tiny_mc/acc ↓"
    assert rows(table, kind="teacher", task="tiny_mc")["shown"].item() == "10.40 (200 documents)"


def test_values_are_spelt_as_a_person_writes_them() -> None:
    spelt = [format_value(v) for v in (1, 1.0, 0.5, 1e-4, 5e-6, 1.5e-5, 0.001, "int4", True)]
    assert spelt == ["1", "1", "0.5", "1e-4", "5e-6", "1.5e-5", "0.001", "int4", "True"]
    assert arm_name({"seed": 3}) == "base"
    assert [format_value(v) for v in (None, math.nan)] == ["null", "null"], "NaN: not set"


def test_a_markdown_table_lines_up_and_escapes_bars() -> None:
    text = as_markdown((["arm", "x ↑"], [["a|b", "1"], ["c", "12345"]]))
    assert text.splitlines() == [
        "| arm  | x ↑   |",
        "| ---- | ----- |",
        "| a\\|b | 1     |",
        "| c    | 12345 |",
    ]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, stillhouse, stillhouse.results.report;"
        "heavy = ('torch', 'pandas', 'scipy', 'matplotlib', 'lm_eval');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_answer_pairs_arms_by_seed(finished: Path) -> None:
    frame = load("sample", finished)
    found = answer(frame)
    assert [(c.arm, c.reference) for c in found.main] == [
        ("lmbda = 0.5", "lmbda = 0"),
        ("lmbda = 1", "lmbda = 0"),
    ]
    scores = rows(frame, task="tiny_gen", kind="point").set_index(["lmbda", "seed"])["value"]
    by_hand = [scores[0.5, seed] - scores[0, seed] for seed in range(3)]
    comparison = found.main[0]
    assert comparison.paired.difference.mean == pytest.approx(np.mean(by_hand))
    assert comparison.crossed is not None
    assert comparison.crossed.mean == pytest.approx(np.mean(by_hand))
    assert comparison.crossed.se >= comparison.paired.difference.se
    assert comparison.p >= comparison.paired.p
    assert found.text.startswith("On tiny_gen/exact_match (higher is better), against lmbda = 0:")
    assert "(n = 3)" in found.text


def test_arms_are_compared_with_the_untrained_students(finished: Path) -> None:
    found = answer(load("sample", finished))
    assert [c.reference for c in found.untrained] == ["student"] * 3 + ["ptq_int4"] * 3
    assert "Against the untrained student (" in found.context
    assert "Against the untrained student in int4 (" in found.context
    assert found.context.endswith("For comparison: teacher 0.850.")


def test_the_share_of_the_teachers_lead_stands_beside_the_difference(finished: Path) -> None:
    found = answer(load("sample", finished))
    first = found.untrained[0]
    assert found.gaps["student"] == pytest.approx(0.85 - first.reference_mean)
    ((_, (header, rows)),) = comparison_tables(found.untrained[:1], found.gaps)
    share = first.paired.difference.mean / found.gaps["student"]
    assert dict(zip(header, rows[0], strict=True))["gap recovered"] == f"{share:.0%}"
    ((_, (header, _)),) = comparison_tables(found.main[:1], found.gaps)
    assert "gap recovered" not in header, "of the compared baseline it would mean nothing"


def test_a_teacher_with_hardly_a_lead_leaves_no_gap_to_recover(tmp_path: Path) -> None:
    write_sample(tmp_path)
    file = next((tmp_path / "baselines").glob("teacher-*/eval/tiny_gen.json"))
    student = answer(load("sample", tmp_path)).untrained[0].reference_mean
    change(file, value=student + 0.09)
    assert "student" not in answer(load("sample", tmp_path)).gaps


def test_other_axes_are_averaged_seed_by_seed_and_do_not_raise_n(finished: Path) -> None:
    frame = load("grid", finished)
    found = answer(frame)
    assert [c.setting for c in found.settings] == ["beta = 0", "beta = 1"]
    # Seed 2 of (0, 1) never started and seed 1 of (1, 0) failed: one seed has every setting.
    assert found.main[0].paired.difference.n == 1
    assert found.main[0].verdict.text == "one seed: no statement"
    scores = rows(frame, task="tiny_gen", kind="point").set_index(["lmbda", "beta", "seed"])[
        "value"
    ]
    by_hand = np.mean([scores[1, beta, 0] - scores[0, beta, 0] for beta in (0, 1)])
    assert found.main[0].paired.difference.mean == pytest.approx(by_hand)
    assert found.text.startswith("So far 10 of 12 points are scored. On tiny_gen/exact_match")


def test_arms_that_do_not_differ_are_called_within_noise(tmp_path: Path) -> None:
    write_sample(tmp_path, Sample(ability=lambda overrides: 0.5))
    found = answer(load("sample", tmp_path))
    assert {c.verdict.kind for c in found.main} == {"within noise"}
    assert "is within noise (" in found.text and "detectable at 80 % power" in found.text


def test_a_comparison_of_what_is_not_there_is_an_error(finished: Path) -> None:
    frame: Any = load("sample", finished)
    for change, said in (
        ({"metric": "tiny_gne/exact_match"}, "Did you mean"),
        ({"by": "lambda"}, "no point sets lambda"),
    ):
        asked = {"by": "lmbda", "metric": "tiny_gen/exact_match", "baseline": 0}
        frame.attrs["sweep"] |= {"compare": asked | change}
        with pytest.raises(ConfigError, match=said):
            answer(frame)


def test_documents_that_differ_between_arms_give_no_crossed_interval(tmp_path: Path) -> None:
    made = write_sample(tmp_path)
    file = made[0].eval_file("tiny_gen")
    change(file, samples=json.loads(file.read_text())["samples"][1:])
    found = answer(load("sample", tmp_path))
    assert all(c.crossed is None for c in found.main)
    assert all(c.paired.difference.n == 3 for c in found.main)


def test_many_values_are_counted_in_the_answer(tmp_path: Path) -> None:
    values = [1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 1e-4]
    compare = {"by": "learning_rate", "metric": "tiny_gen/exact_match", "baseline": 1e-5}
    write_sample(tmp_path, Sample(axes={"learning_rate": values}, compare=compare, seeds=2))
    found = answer(load("sample", tmp_path))
    assert "against learning_rate = 1e-5: of 5 other values, " in found.text


def test_a_null_is_a_value_like_any_other(tmp_path: Path) -> None:
    template = {"prompt_template": [None, "Sums. {question}"]}
    write_sample(tmp_path, Sample(axes=template, compare=None))
    frame = load("sample", tmp_path)
    points = frame[frame["kind"] == "point"]
    assert set(points["prompt_template"]) == {"null", "Sums. {question}"}
    page = write_report("sample", tmp_path).read_text()
    assert "prompt_template = null" in page and "prompt_template = Sums. {question}" in page


def test_arms_whose_conversations_are_written_otherwise_have_baselines_of_their_own(
    tmp_path: Path,
) -> None:
    off = {"enable_thinking": False}
    axis = {"chat_template_kwargs": [{}, off]}
    by = {"by": "chat_template_kwargs", "metric": "tiny_gen/exact_match", "baseline": off}
    write_sample(tmp_path, Sample(axes=axis, compare=by))
    frame = load("sample", tmp_path)
    keys = frame.groupby("kind")["pair_key"].agg(set)
    # The last point's baselines: those of `off`.
    assert keys["student"] < keys["point"] and len(keys["point"]) == 2
    said = '{"chat_template_kwargs": {"enable_thinking": false}, "template_date": "2026-01-01"}'
    assert set(frame[frame["kind"] == "student"]["name"]) == {f"student ({said})"}
    page = write_report("sample", tmp_path).read_text()
    assert 'chat_template_kwargs = {"enable_thinking": false}' in page.replace("&quot;", '"')
