"""Test the launcher's command line: what it accepts, what it refuses, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from stillhouse.cli import COMMANDS, VERBS, main
from stillhouse.entrypoints import train_main
from stillhouse.rundir import RunDir, Runs, code_identity
from stillhouse.sweep import verbs
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.progress import Board, Steps, display, steps_of
from stillhouse.sweep.show import counted, ways_on
from stillhouse.sweep.snapshot import observe
from stillhouse.sweep.state import Observation
from stillhouse.text import Pace, duration
from tests.fakes import behaving

GRID = ["pair=tiny", "lmbda=0,0.5", "beta=0,1", "seeds=2"]
HEAVY = "{'torch', 'transformers', 'hydra', 'pandas', 'rich', 'kubernetes', 'matplotlib'}"


def run(runs: Path, *words: str) -> int:
    """`stillhouse run` with work that behaves."""
    return verbs.run(verbs.Call(words=words, runs=runs), behaving.executor_for)


def done_sweep(runs: Path, *more: str, points: int = 2) -> Sweep:
    words = behaving.words(runs, *more, points=points)
    run(runs, *words)
    return load_sweep(None, [*words], runs)


# ------------------------------------------------------------------------------------ help


def test_help_names_every_verb_and_loads_nothing_heavy() -> None:
    program = (
        "import sys; from stillhouse.cli import main; code = main(['--help'])\n"
        f"print(sorted({HEAVY} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")
    assert all(f"  {verb} " in done.stdout for verb in VERBS | COMMANDS)


def test_planning_loads_no_torch() -> None:
    program = (
        f"import sys; from stillhouse.cli import main; code = main(['plan', *{GRID}])\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'rich', 'kubernetes'}\n"
        "print(sorted(heavy & {*sys.modules})); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")


def test_the_module_and_the_script_are_one_command() -> None:
    words = [sys.executable, "-m", "stillhouse", "statsu"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 42
    assert 'no verb "statsu"' in done.stderr and 'Did you mean "status"?' in done.stderr


def test_ctrl_c_after_the_end_leaves_the_exit_code_as_it_was() -> None:
    program = (
        "import atexit, os, signal, sys; from stillhouse.cli import main\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), print('taken down')))\n"
        "sys.argv = ['stillhouse', '--help']; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("taken down\n")


def test_version_names_the_package_and_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    said = f"stillhouse {metadata.version('stillhouse')}, code {code_identity()['digest']}\n"
    answers = (main, ["--version"]), (main, ["plan", "--version"]), (train_main, ["--version"])
    for answer, words in answers:
        assert answer(words) == 0
        assert capsys.readouterr().out == said


def test_a_mistake_is_mended_before_it_is_tried_again() -> None:
    failed = [Observation("failed", exit_code=code) for code in (42, 43)]
    said = ways_on(failed, "stillhouse logs x", "stillhouse retry x")
    assert "mend what ended with 42, or it ends so again; `stillhouse retry x`" in said
    assert "42" not in ways_on(failed[1:], "stillhouse logs x", "stillhouse retry x")


def test_the_help_of_run_has_the_option_that_its_refusal_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--sources=new" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_of_its_own(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: stillhouse {verb} [TARGET]" in capsys.readouterr().out


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan"], "nothing is asked"),
        (["plan", "sweeps/no_such.yaml"], "no such sweep file"),
        (["plan", "pair=tiny", "lmbd=0,1"], 'Did you mean "lmbda"'),
        (["run", "pair=tiny", "--backend", "cluster"], "no kubeconfig"),
        (["run", "pair=tiny", "--backend", "locl"], "there is local and cluster"),
        (["collect", "mine", "--backend", "local"], "say --backend cluster"),
        (["retry", "pair=tiny", "--cause", "om"], 'Did you mean "oom"'),
        (["retry", "pair=tiny", "--where", "lmbda > __import__('os')"], "KNOB COMPARISON VALUE"),
        (["run", "pair=tiny", "--code=old"], "--code"),
        (["plan", "pair=tiny", "--point"], "expected one argument"),
        (["plan", "pair=tiny", "lmbda=0,1", "--point", "zz"], "no point of tiny-lmbda"),
        (["plan", "pair=tiny", "seeds=2", "--point", "zz"], "with this name or id. There is "),
        (["plan", "one.yaml", "two.yaml"], "one.yaml and two.yaml: one target at a time"),
        (["run", "pair=tiny", "--detatch"], 'no option "--detatch". Did you mean "--detach"?'),
        (["status", "--al"], 'Did you mean "--all"'),
        (
            ["train", "x", "--dry-rum"],
            'train: no option "--dry-rum". Did you mean "--dry-run"',
        ),
        (["prepare", "--fech"], 'Did you mean "--fetch"'),
        (["preflight", "--pair=tiny", "--pilots=5"], 'Did you mean "--pilot"'),
        (["plan", "--learning-rat=1e-5"], 'Did you mean "learning_rate"'),
        (["eval", "--lora-paths", "x"], "k8s/eval.sh: a name comes first: k8s/eval.sh LABEL"),
        (["run", "pair=tiny", "--detach"], "this needs a cluster"),
        (["plan", "pair=tiny", "runs=a", "--runs", "b"], "two directories"),
        (["status", "nothing"], 'no sweep and no run "nothing"'),
        (
            ["status", "nothing", "--runs", "gone"],
            "there is no directory gone (a sweep file ends in",
        ),
        (["status", "nothing", "--runs", "gone"], "`stillhouse status --runs gone` lists"),
        (
            ["data", "benchmarks", "--lora-paths", "x"],
            "`stillhouse data benchmarks [cache_dir=DIR]`",
        ),
        (["logs"], "which sweep?"),
        (["retry", "nothing", "lmbda=0"], "words change a sweep file"),
        (["report", "nothing"], "nothing"),
    ],
)
def test_a_mistake_is_42_and_one_or_two_lines(
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "there is none"))
    here = [] if "--runs" in words else ["--runs", str(tmp_path)]
    assert main([words[0], *here, *words[1:]]) == 42
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("ConfigError: ") and error.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- plan


def test_plan_counts_states_by_axis_and_says_what_it_would_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *GRID, "--runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": 8 points: 8 new")
    assert lines[1].split() == ["points", "new", "to", "go"]
    # 4 points of 100 steps, at the rule's 0.15 s a step
    assert lines[2].split() == ["lmbda", "0", "4", "4", "60", "s"]
    assert lines[3].split() == ["0.5", "4", "4", "60", "s"]
    assert "8 points to train: about 60 s with 2 at once" in lines
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


def test_plan_takes_both_dialects_and_a_directory_in_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pair", "tiny", "--lmbda", "0,0.5", "--seeds=2", f"runs={tmp_path}", "--json"]
    assert main(["plan", *words]) == 0
    typed = json.loads(capsys.readouterr().out)
    assert main(["plan", "pair=tiny", "lmbda=0,0.5", "seeds=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == typed["points"]


def test_json_is_one_object_with_the_points_and_their_states(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "pair=tiny", "lmbda=0,0.5", "--json", "--runs", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    sweep = load_sweep(None, ["pair=tiny", "lmbda=0,0.5"], tmp_path)
    assert said["sweep"] == sweep.name
    assert {state: n for state, n in said["totals"].items() if n} == {"new": 2}
    assert said["points"][1] == {
        "id": sweep.points[1].id,
        "name": None,
        "overrides": {"lmbda": 0.5, "seed": 42},
        "state": "new",
        "cause": None,
        "warnings": [],
    }


# -------------------------------------------------------------------------------------- run


def test_run_writes_the_sweep_down_names_its_points_and_is_idle_the_second_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = behaving.words(tmp_path, "name=mine", points=1)
    assert run(tmp_path, *words) == 0
    sweep = load_sweep(None, [*words], tmp_path)
    record = json.loads(Runs(tmp_path).sweep_file(sweep.name).read_text())
    assert [point["id"] for point in record["points"]] == [sweep.points[0].id]
    assert {b["label"]: b["quant_type"] for b in record["baselines"]} == {
        "teacher": None, "student": None, "ptq": "int4",
    }  # fmt: skip
    assert (tmp_path / "names" / "mine" / "spec.json").is_file()
    out = capsys.readouterr().out
    assert "trained mine" in out and "\x1b" not in out
    begun = behaving.begun(tmp_path, "")
    assert run(tmp_path, *words) == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert behaving.begun(tmp_path, "") == begun


def test_run_with_json_prints_one_object_and_nothing_else_to_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = verbs.Call(words=behaving.words(tmp_path, points=1), runs=tmp_path, is_json=True)
    assert verbs.run(call, behaving.executor_for) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["done"] == 1


def test_run_takes_one_point_of_a_sweep_and_leaves_the_others_new(tmp_path: Path) -> None:
    words = behaving.words(tmp_path, points=3)
    chosen = load_sweep(None, [*words], tmp_path).points[1].id
    call = verbs.Call(words=words, runs=tmp_path, points=(chosen[:5],))
    assert verbs.run(call, behaving.executor_for) == 0
    sweep = load_sweep(None, [*words], tmp_path)
    seen = observe(sweep)
    assert [seen[point.id].state for point in sweep.points] == ["new", "done", "new"]


def test_failures_of_one_kind_are_one_line_and_retry_lets_them_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behaving.misbehave(tmp_path, exit="diverged", times=1)
    words = behaving.words(tmp_path, points=3)
    assert run(tmp_path, *words) == 1
    out = capsys.readouterr().out
    assert out.count("Diverged: as it was told to [") == 1
    name = load_sweep(None, [*words], tmp_path).name
    assert main(["status", name, "--runs", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"{name}: 3 points: 3 failed"
    assert run(tmp_path, *words) == 1, "poison is not tried again by itself"
    assert main(["retry", name, "--failed", "--runs", str(tmp_path)]) == 0
    assert main(["status", name, "--runs", str(tmp_path)]) == 0
    assert run(tmp_path, *words) == 0


# ------------------------------------------------------------------------------ looking at it


def test_a_sweep_a_name_and_the_start_of_an_id_lead_to_the_same_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = done_sweep(tmp_path, "name=mine", points=1)
    capsys.readouterr()
    for word in (sweep.name, "mine", sweep.points[0].id[:6]):
        assert main(["status", word, "--json", "--runs", str(tmp_path)]) == 0
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert (said["sweep"], said["totals"]["done"]) == (sweep.name, 1)
    assert main(["status", "--runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{sweep.name}: 1 point: 1 done\n"


def test_logs_show_one_log_whole_and_of_many_what_matters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    behaving.misbehave(tmp_path, exit="config", times=1)
    sweep = done_sweep(tmp_path)
    capsys.readouterr()
    id_ = sweep.points[0].id
    assert main(["logs", sweep.name, "--point", id_, "--runs", str(tmp_path)]) == 0
    log = capsys.readouterr().out
    assert log.startswith(f"training {id_}") and "ConfigError: as it was told to" in log
    assert main(["logs", sweep.name, "--runs", str(tmp_path)]) == 0
    many = capsys.readouterr().out
    assert many.count("==> ") == 2 and many.count("ConfigError") == 2


def test_logs_follow_until_the_points_have_ended(tmp_path: Path) -> None:
    behaving.misbehave(tmp_path, steps=30, step_s=0.05)
    words = behaving.words(tmp_path, points=1)
    launcher = behaving.start_launcher(tmp_path, *words)
    (point,) = behaving.at_work(tmp_path, 1)
    program = [sys.executable, "-m", "stillhouse", "logs", "-f", point.id, "--runs", str(tmp_path)]
    follower = subprocess.run(program, capture_output=True, text=True, timeout=40, check=True)
    assert f"training {point.id}" in follower.stdout
    assert launcher.wait(40) == 0


def test_report_prints_the_table_and_where_the_page_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.builders.sample_runs import Sample, write_sample

    write_sample(tmp_path)
    name = Sample().name
    assert main(["report", name, "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    page = Runs(tmp_path).report(name) / "report.html"
    assert out.endswith(f"the page: {page}\n") and page.is_file()
    assert out.startswith((page.parent / "table.md").read_text()[:40])


def test_a_reader_that_has_read_enough_is_no_error(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "stillhouse", "plan", *GRID, "--runs", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# ---------------------------------------------------------------------------------- progress


def test_steps_are_read_from_the_last_whole_line(tmp_path: Path) -> None:
    run_ = RunDir(tmp_path)
    assert steps_of(run_) == Steps(0, None)
    run_.update_status(max_steps=9)
    run_.metrics_file.write_text('{"step": 3}\n{"step": 4}\n{"step"')
    assert steps_of(run_) == Steps(5, 9)


def test_times_and_counts_are_said_as_people_say_them() -> None:
    said = [duration(s) for s in (0.44, 12.3, 99, 100, 3600, 3600 * 3 + 20 * 60)]
    assert said == ["0.4 s", "12 s", "99 s", "2 min", "60 min", "3 h 20 min"]
    assert counted({"new": 2, "done": 1, "failed": 0, "trained": 3}) == "1 done, 3 trained, 2 new"


def test_a_pace_says_the_time_that_is_left_once_it_saw_a_step() -> None:
    pace = Pace()
    said = [pace.told(done, 10, clock) for done, clock in ((4, 100.0), (4, 103.0), (6, 110.0))]
    assert said == ["step 4/10", "step 4/10", "step 6/10, about 20 s left"], "5 s a step, 4 to go"
    assert (pace.told(10, 10, 130.0), pace.told(7, None, 130.0)) == ("step 10/10", "step 7")


def test_lines_say_now_and_then_how_far_what_trains_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.sweep import progress
    from stillhouse.sweep.driver import Picture
    from stillhouse.sweep.plan import Action

    sweep = load_sweep(None, [*behaving.words(tmp_path, points=3)], tmp_path)
    said: list[str] = []
    first, second, third = (point.id for point in sweep.points)
    sweep.run(first).update_status(max_steps=10)
    sweep.run(first).metrics_file.write_text('{"step": 4}\n')
    seen = {id_: Observation("running") for id_ in (first, second, third)}
    live = [Action("train", "tiny/int4", (first,)), Action("eval", "tiny/int4", (second,))]
    lines = progress.Lines(sweep, said.append)
    lines.sees(Picture(sweep, seen, live, False))
    monkeypatch.setattr(progress, "STEPS_S", 0.0)
    lines.sees(Picture(sweep, seen, live, False))
    sweep.run(first).metrics_file.write_text('{"step": 5}\n')
    lines.sees(Picture(sweep, seen, live, False))
    about = f"trains lmbda=0 seed=42 ({first[:6]}): step"
    assert [line.split(" ", 1)[1] for line in said][0] == f"{about} 5/10"
    assert said[1].split(" ", 1)[1].startswith(f"{about} 6/10, about ")
    assert len(said) == 2


def test_of_a_cluster_lines_say_once_what_lasts_and_no_job_that_waits_is_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.sweep import progress
    from stillhouse.sweep.driver import Picture
    from stillhouse.sweep.plan import Action

    monkeypatch.setattr(progress, "LASTING_S", 0.0)
    sweep = load_sweep(None, [*behaving.words(tmp_path, points=3)], tmp_path)
    first, second, third = (point.id for point in sweep.points)
    waits = Observation("waiting", "no node has 1 free nvidia.com/gpu (3 nodes)")
    seen = {first: Observation("running"), second: waits, third: waits}
    live = [Action("train", "tiny/int4", (id_,)) for id_ in seen]
    said: list[str] = []
    lines = progress.Lines(sweep, said.append, False)
    for error in ("", "503 nobody is there", "503 nobody is there", ""):
        picture = Picture(sweep, seen, live, False, connection_error=error)
        lines.sees(picture)
    assert [line.split(" ", 1)[1] for line in said] == [
        f"2 wait: {waits.cause}", "requests are tried again: 503 nobody is there",
    ]  # fmt: skip
    assert progress.states_now(picture, has_files=False) == {"running": 1, "waiting": 2}


def test_what_no_point_says_and_what_runs_oddly_is_said_by_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.sweep import progress
    from stillhouse.sweep.driver import Picture
    from stillhouse.sweep.plan import Action

    monkeypatch.setattr(progress, "LASTING_S", 0.0)
    sweep = load_sweep(None, [*behaving.words(tmp_path, points=2)], tmp_path)
    first, second = (point.id for point in sweep.points)
    seen = {first: Observation("running", "pod x goes on"), second: Observation("new")}
    pair, quota = Action("prepare", "tiny/int4"), "quota: exceeded quota: few"
    packs = [Action("eval", "tiny/int4", (id_,)) for id_ in (first, second)]
    waits = {pair: "image not pulled: x"} | dict.fromkeys(packs, quota)
    said: list[str] = []
    lines = progress.Lines(sweep, said.append, False)
    for _ in range(2):
        lines.sees(Picture(sweep, seen, [*waits], False, waits))
    assert [line.split(" ", 1)[1] for line in said] == [
        "1 run: pod x goes on",
        "prepares the pair of tiny/int4, waits: image not pulled: x",
        f"2 Jobs wait: {quota}",
    ]


def test_a_file_gets_lines_and_a_terminal_gets_a_board_that_stays_put(tmp_path: Path) -> None:
    from rich.console import Console

    from stillhouse.sweep.driver import Picture
    from stillhouse.sweep.plan import Action
    from stillhouse.sweep.progress import Lines

    sweep = load_sweep(None, [*behaving.words(tmp_path, points=3)], tmp_path)
    assert isinstance(display(sweep), Lines), "pytest's stdout is no terminal"
    first, second, third = (point.id for point in sweep.points)
    sweep.run(first).update_status(max_steps=10)
    sweep.run(first).metrics_file.write_text('{"step": 4}\n')
    seen = {
        first: Observation("waiting"),
        second: Observation("waiting", is_trained=True),
        third: Observation("new"),
    }
    action = Action("train", "tiny/int4", (first,))
    picture = Picture(sweep, seen, [action], False)
    with (tmp_path / "screen").open("w+") as screen:
        console = Console(file=screen, force_terminal=True, width=80)
        with Board(sweep, console) as board:
            board.started(action)
            time.sleep(0.01)
            board.sees(picture)
        screen.seek(0)
        drawn = screen.read()
    assert "1 trained, 1 running, 1 new" in drawn
    assert f"trains  lmbda=0 seed=42 ({first[:6]})  step 5/10" in drawn
    seen[first] = Observation("waiting", cause="[/b] of \x1b[2J a registry")
    with (tmp_path / "screen").open("w+") as screen:
        console = Console(file=screen, force_terminal=True, width=80)
        with Board(sweep, console, has_files=False) as board:
            board.sees(picture)
        screen.seek(0)
        assert "[/b] of \\x1b[2J a" in screen.read(), "as it came, and inert"
