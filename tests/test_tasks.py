"""Test user-defined tasks: found, identified by their content, and sent along with the code."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from stillhouse import tasks
from stillhouse.compose import as_json, compose, from_command_line, from_json
from stillhouse.errors import ConfigError
from stillhouse.identity import eval_id, score_key, suite_key
from stillhouse.spec import EvalSpec, SuiteSpec
from stillhouse.sweep.cluster import jobspec
from stillhouse.sweep.cluster.code_bundle import bundle
from stillhouse.sweep.cluster.submit_args import read as read_line
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from tests.builders import own_tasks

PAIR = ["student=models/small", "teacher=models/large"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return own_tasks.write(tmp_path / "tasks")


def suite(*words: str) -> SuiteSpec:
    return compose(from_command_line([*PAIR, *words], EvalSpec), EvalSpec).suite


def keys(folder: Path) -> dict[str, str]:
    own = suite(f"include_path={folder}")
    return {task.task: score_key(own, task) for task in own.tasks}


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(ConfigError) as error:
        suite(f"include_path={folder}", *words)
    return str(error.value)


# ---------------------------------------------------------------- what is asked


def test_a_directory_of_yaml_is_a_suite_scored_by_each_tasks_first_metric(folder: Path) -> None:
    own = suite(f"include_path={folder}")
    assert (own.suite_name, own.include_path, own.max_gen_toks) == ("local", str(folder), None)
    told = [(t.task, t.metric, t.num_fewshot, t.higher_is_better) for t in own.tasks]
    assert told == [("my_choice", "acc", None, True), ("my_sums", "digits", None, True)]
    assert all(t.content for t in own.tasks)
    assert own == suite("suite=local", f"include_path={folder}", "tasks=[my_choice,my_sums]")


def test_tasks_are_chosen_by_name_and_another_metric_in_full(folder: Path) -> None:
    one = suite(f"include_path={folder}", "tasks=[my_sums,my_sums@requantised]")
    assert [t.task for t in one.tasks] == ["my_sums", "my_sums@requantised"]
    assert one.tasks[0].content == one.tasks[1].content
    whole = "{task: my_sums, metric: exact_match, num_fewshot: 2, higher_is_better: true}"
    other = suite(f"include_path={folder}", f"tasks=[{whole}]").tasks[0]
    assert (other.metric, other.num_fewshot, other.content) == (
        "exact_match", 2, one.tasks[0].content,
    )  # fmt: skip
    named = suite(f"include_path={folder}", "tasks=[{task: my_sums, metric: exact_match}]").tasks[0]
    assert (named.metric, named.higher_is_better) == ("exact_match", True)
    assert "metric_list has no nothing (digits, exact_match)" in refused(
        folder, "tasks=[{task: my_sums, metric: nothing}]"
    )
    theirs = "{task: arc_easy, metric: acc, num_fewshot: null, higher_is_better: true}"
    mixed = suite(f"include_path={folder}", f"tasks=[my_sums,{theirs}]").tasks
    assert [(t.task, bool(t.content)) for t in mixed] == [("my_sums", True), ("arc_easy", False)]


def test_a_question_is_what_its_files_hold_and_no_other_file(folder: Path) -> None:
    before = keys(folder)
    changes = {
        "my_sums.yaml": {"my_sums"},
        "_base.yaml": {"my_sums", "my_choice"},
        "scoring.py": {"my_sums", "my_choice"},
        "data/rows.jsonl": {"my_sums", "my_choice"},
    }
    for file, touched in changes.items():
        kept = (folder / file).read_text()
        (folder / file).write_text(kept + "\n")
        after = keys(folder)
        assert {name for name in before if after[name] != before[name]} == touched, file
        (folder / file).write_text(kept)
        assert keys(folder) == before, "what is as it was is the same question"
    (folder / "notes.txt").write_text("nobody names this")
    (folder / "group.yaml").write_text("group: mine\ntask: [my_sums]\n")
    assert keys(folder) == before


def test_where_the_files_lie_is_no_part_of_a_question(folder: Path, tmp_path: Path) -> None:
    other = own_tasks.write(tmp_path / "elsewhere")
    one, two = (
        compose(from_command_line([*PAIR, f"include_path={f}"], EvalSpec), EvalSpec)
        for f in (folder, other)
    )
    assert one != two
    assert suite_key(one.suite) == suite_key(two.suite) and eval_id(one) == eval_id(two)


MISTAKES: dict[str, tuple[str, str, str]] = {  # what: file, its content, what is said
    "no yaml": ("my_sums.yaml", "task: [", "my_sums.yaml, line 1: not YAML"),
    "no mapping": ("my_sums.yaml", "- a\n- b\n", "not a mapping"),
    "unknown tag": ("my_sums.yaml", "task: !python x\n", "not YAML"),
    "no function": ("scoring.py", "def other(): pass\n", "scoring.py has no asked"),
    "no file": ("my_sums.yaml", "task: a\nx: !function nowhere.f\n", "no file"),
    "elsewhere": ("my_sums.yaml", "task: a\nx: !function os.path.join\n", "no file"),
    "include": ("my_sums.yaml", "task: a\ninclude: no.yaml\n", "include: no.yaml: no such file"),
    "itself": ("_base.yaml", "include: _base.yaml\n", "includes itself"),
    "no data": ("_base.yaml", own_tasks.BASE.replace("rows", "row"), "data file data/row.jsonl"),
    "name": ("my_sums.yaml", "task: ../up\n", "task '../up'"),
    "twice": ("my_sums.yaml", own_tasks.CHOICE, "two files describe the task my_choice"),
    "no metric": ("my_sums.yaml", "task: a\n", "metric_list does not name a metric"),
    "no direction": ("my_sums.yaml", "task: a\nmetric_list: [{metric: acc}]\n", "higher_is_better"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_cannot_be_a_task_is_said_with_its_file(what: str, folder: Path) -> None:
    file, content, says = MISTAKES[what]
    (folder / file).write_text(content)
    said = refused(folder)
    assert says in said and len(said.splitlines()) == 1


def test_a_name_that_is_no_task_and_a_directory_without_one_are_said(folder: Path) -> None:
    assert 'no task "my_sum"' in refused(folder, "tasks=[my_sum]")
    assert 'Did you mean "my_sums"?' in refused(folder, "tasks=[my_sum]")
    assert "no such directory" in refused(folder / "nowhere")
    assert "describes a task" in refused(folder / "data")
    assert "has none of the suite's tasks" in refused(folder, "suite=tiny")
    assert "listed twice" in refused(folder, "tasks=[my_sums,my_sums]")
    with pytest.raises(ConfigError, match="include_path=DIR says where"):
        suite("suite=local")
    with pytest.raises(ConfigError, match="include_path=DIR says where its YAML is"):
        suite("tasks=[my_sums]")


@pytest.mark.parametrize(
    "line",
    [
        "x: !function ../outside.f",
        "include: ../outside.yaml",
        "dataset_path: json\ndataset_kwargs: {data_files: ../outside.jsonl}",
    ],
)
def test_nothing_from_outside_of_include_path_is_part_of_a_task(line: str, folder: Path) -> None:
    for ending, content in ((".py", "def f(): pass\n"), (".yaml", "a: 1\n"), (".jsonl", "{}\n")):
        (folder.parent / f"outside{ending}").write_text(content)
    (folder / "my_sums.yaml").write_text(f"task: a\n{line}\n")
    said = refused(folder)
    assert "outside of include_path" in said or "no file" in said
    (folder / "linked.yaml").symlink_to(folder.parent / "outside.yaml")
    (folder / "my_sums.yaml").write_text("task: a\ninclude: linked.yaml\n")
    assert "outside of include_path" in refused(folder)


def test_reading_a_task_runs_none_of_its_code(folder: Path) -> None:
    kept = (folder / "scoring.py").read_text()
    (folder / "scoring.py").write_text("raise SystemExit('it ran')\n" + kept)
    assert suite(f"include_path={folder}").tasks


# ---------------------------------------------------------------- sweeps and pods


def sweep_beside(folder: Path, block: str, *words: str) -> Sweep:
    file = folder.parent / "mine.yaml"
    base = "{student: models/small, teacher: models/large}"
    file.write_text(f"base: {base}\ngrid: {{lmbda: [0, 1]}}\nseeds: 1\neval: {block}\n")
    return load_sweep(str(file), list(words), folder.parent / "runs")


def test_in_a_sweep_file_the_directory_is_beside_it(folder: Path, tmp_path: Path) -> None:
    sweep = sweep_beside(folder, "{include_path: tasks, tasks: [my_sums]}")
    assert sweep.suite is not None
    assert sweep.suite.include_path == str(folder)
    assert [t.task for t in sweep.suite.tasks] == ["my_sums"]
    for block in ("{suite: own, include_path: tasks}", "{suite: local, include_path: tasks}"):
        whole = sweep_beside(folder, block)
        assert whole.suite is not None and len(whole.suite.tasks) == 2
    typed = sweep_beside(folder, "{suite: null}", f"include_path={folder}", "tasks=my_sums")
    assert typed.suite == sweep.suite
    grid = load_sweep(None, [*PAIR, f"include_path={folder}", "lmbda=0,1"], Path("runs"))
    assert grid.suite is not None and grid.suite.suite_name == "local"


def unpacked(suite: SuiteSpec, into: Path) -> Path:
    packed = bundle(suite).manifest["binaryData"]["code.tar.gz"]
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed))) as archive:
        archive.extractall(into, filter="data")
    return into


def test_the_files_of_a_suites_tasks_travel_with_the_code_and_nothing_else_does(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "notes.txt").write_text("nobody names this")
    own = suite(f"include_path={folder}", "tasks=[my_sums]")
    assert bundle(own).digest == bundle().digest and bundle(own).key != bundle().key
    pod = unpacked(own, tmp_path / "pod")
    there = {str(f.relative_to(pod / "tasks")) for f in (pod / "tasks").rglob("*") if f.is_file()}
    assert there == {"my_sums.yaml", "_base.yaml", "scoring.py", "data/rows.jsonl"}


def test_the_spec_for_a_pod_asks_the_same_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_beside(folder, "{include_path: tasks, baselines: [teacher]}")
    assert sweep.suite is not None
    step = jobspec.eval_step(sweep.points, ["teacher-0123456789"], sweep)
    prepared = jobspec.prepare_step(sweep.points[0], sweep)
    line = read_line("eval", "mine", [*PAIR, f"include_path={folder}", "tasks=[my_sums]"])
    driver = jobspec.drive_step(sweep, b"")
    pod = unpacked(sweep.suite, tmp_path / "pod")
    monkeypatch.chdir(pod)
    for asked in (step, line.step):
        assert isinstance(asked.spec, EvalSpec)
        spec = from_json(as_json(asked.spec), EvalSpec)
        assert eval_id(spec) == asked.id and spec.suite.include_path == "tasks"
        assert set(tasks.chosen(spec.suite, "here")) == {t.asks for t in spec.suite.tasks}
    assert isinstance(prepared.spec, EvalSpec) and prepared.spec.suite.include_path == "tasks"
    assert "include_path=tasks" in driver.words
    # A driver in the pod reads the same sweep, and names the same Jobs and the same code.
    there = load_sweep(str(folder.parent / "mine.yaml"), ["include_path=tasks"], Path("runs"))
    assert there.suite is not None
    assert suite_key(there.suite) == suite_key(sweep.suite)
    assert bundle(there.suite).key == bundle(sweep.suite).key
    assert there.groups == sweep.groups


def test_files_that_change_or_hold_a_secret_or_too_much_are_not_sent(folder: Path) -> None:
    own = suite(f"include_path={folder}")
    secret = "hf_" + "AbCdEfGh" * 4
    kept = (folder / "scoring.py").read_text()
    (folder / "scoring.py").write_text(f"{kept}# {secret}\nTOKEN = '{secret}'\n")
    with pytest.raises(ConfigError, match="changed since it was asked for"):
        bundle(own)
    with pytest.raises(ConfigError, match=r"tasks/scoring.py, line \d+ looks like") as error:
        bundle(suite(f"include_path={folder}"))
    assert secret not in str(error.value)
    (folder / "scoring.py").write_text(kept)
    (folder / "data" / "rows.jsonl").write_bytes(os.urandom(2**21))
    with pytest.raises(ConfigError, match="tasks/data/rows.jsonl.*; a task's data may be a hub"):
        bundle(suite(f"include_path={folder}"))


def test_a_suite_without_own_tasks_is_the_question_that_it_was() -> None:
    plain: Any = suite("suite=tiny")
    assert plain.include_path is None and all(t.content is None for t in plain.tasks)
    told = dataclasses.replace(plain.tasks[0], content="0123456789")
    own = dataclasses.replace(plain, include_path="x", tasks=(told,))
    assert score_key(own, told) != score_key(plain, plain.tasks[0])
    with pytest.raises(ValueError, match="that is null"):
        dataclasses.replace(plain, tasks=(told,))
