"""Test that states follow from files on disk, and actions from states, without running anything."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.compose import Overrides, compose
from stillhouse.identity import point_id, score_key, slug
from stillhouse.rundir import RunDir, Runs, eval_file, eval_note, new_record, write_json
from stillhouse.spec import EvalSpec, SuiteSpec, TrainSpec
from stillhouse.sweep.backend import Task
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.local.outcomes import Ending, forget_failures, write_ending
from stillhouse.sweep.plan import Action, Situation, actions
from stillhouse.sweep.points import Baseline, Point, Sweep, fixed_packs
from stillhouse.sweep.snapshot import Found, baselines_on_disk, look, observe, observed, unscored
from stillhouse.sweep.state import Observation

OURS, THEIRS = "aaaa", "bbbb"  # digests of code


def state(code: str | None = OURS, **found: Any) -> str:
    status = found.pop("status", {})
    return observed(Found(status=status, code=code, **found), OURS).state


# -------------------------------------------------------------------------------- judging


def test_nothing_on_disk_is_new() -> None:
    assert state(code=None) == "new"


def test_a_trained_point_is_done_only_when_every_task_is_scored() -> None:
    assert state(is_trained=True, unscored={"gsm8k": []}) == "waiting"
    assert state(is_trained=True, unscored={}) == "done"


@pytest.mark.parametrize("exit_code", [42, 43, 44])
def test_poison_is_failed_whatever_the_code_at_hand(exit_code: int) -> None:
    status = {"phase": "failed", "exit_code": exit_code, "cause": "ConfigError: no"}
    assert state(status=status) == "failed"
    assert state(status=status, code=THEIRS) == "failed"
    assert observed(Found(status, OURS), OURS).cause == "ConfigError: no"


def test_an_infrastructure_death_waits_until_it_was_given_up() -> None:
    status = {"phase": "waiting", "exit_code": 137, "cause": "killed by SIGKILL"}
    assert state(status=status) == "waiting"
    assert state(status={**status, "phase": "failed", "gave_up": True}) == "failed"


def test_a_crash_that_train_py_wrote_itself_waits_for_a_launcher_to_count_it() -> None:
    assert state(status={"phase": "failed", "exit_code": 1, "cause": "RuntimeError"}) == "waiting"


def test_a_watch_rule_stops_a_point_for_good() -> None:
    assert state(status={"phase": "failed", "exit_code": 46}) == "stopped"


def test_being_asked_to_stop_is_waiting_and_leaves_a_mark() -> None:
    seen = observed(Found({"phase": "waiting", "exit_code": 85, "finished": 7.0}, OURS), OURS)
    assert (seen.state, seen.stop_mark, seen.asked_to_stop) == ("waiting", 7.0, None)


@pytest.mark.parametrize("phase", ["starting", "training"])
def test_a_training_phase_without_a_lock_is_a_dead_process(phase: str) -> None:
    assert state(status={"phase": phase}, is_locked=True) == "running"
    seen = observed(Found({"phase": phase}, OURS), OURS)
    assert (seen.state, seen.cause) == ("waiting", "its process ended without a word")


def test_unfinished_work_of_other_code_has_drifted_and_done_work_has_not() -> None:
    assert state(status={"phase": "training"}, code=THEIRS) == "drifted"
    assert state(status={"phase": "training"}, code=THEIRS, is_locked=True) == "running"
    assert state(code=THEIRS, is_trained=True) == "done"
    assert state(code=THEIRS, is_trained=True, unscored={"gsm8k": []}) == "waiting"


def test_a_point_whose_adapter_was_lost_waits_to_be_trained_again() -> None:
    seen = observed(Found({"phase": "done", "exit_code": 0}, OURS), OURS)
    assert (seen.state, seen.is_trained) == ("waiting", False)
    assert seen.cause == "its adapter is gone, or not whole"


# ------------------------------------------------------------------------ reading and writing


def tiny(**values: Any) -> TrainSpec:
    return compose(Overrides({"pair": "tiny"}, values), TrainSpec)


def suite() -> SuiteSpec:
    return compose(Overrides({"suite": "tiny"}, {}), EvalSpec).suite


def a_run(root: Path) -> tuple[RunDir, Sweep]:
    spec = tiny()
    run = Runs(root).of(spec)
    write_json(run.spec_file, new_record(spec, {}))
    return run, Sweep("s", root, (Point(point_id(spec), slug(spec)),), suite())


def finish_training(run: RunDir) -> None:
    write_json(run.adapter / "stillhouse.json", {"id": run.id, "files": {}})


def test_a_score_counts_only_under_the_question_that_is_asked(tmp_path: Path) -> None:
    run, sweep = a_run(tmp_path)
    finish_training(run)
    tasks = suite().tasks
    for task in tasks:
        write_json(eval_file(run.path, task.task), {"key": score_key(suite(), task)})
    assert observe(sweep)[run.id].state == "done"
    other = replace(suite(), limit=5)
    assert unscored(run.path, other, None) == {task.task: [] for task in tasks}
    assert observe(replace(sweep, suite=other))[run.id].state == "waiting"


def test_a_held_lock_is_running_and_a_free_one_is_not(tmp_path: Path) -> None:
    run, sweep = a_run(tmp_path)
    run.update_status(phase="training", pid=1)
    with run.lock():
        assert observe(sweep)[run.id].state == "running"
    assert observe(sweep)[run.id].state == "waiting"


def task_of(run: RunDir, kind: Any = "train", baselines: tuple[Path, ...] = ()) -> Task:
    spec = compose(Overrides({"suite": "tiny"}, {}), EvalSpec)
    action = Action(kind, "g", (run.id,), baselines)
    return Task(action, (), (run,), spec if kind == "eval" else None, run.log_file)


def test_deaths_are_counted_and_the_one_too_many_fails_the_point(tmp_path: Path) -> None:
    run, sweep = a_run(tmp_path)
    states: list[str] = []
    for _ in range(3):
        write_ending(task_of(run), Ending(137, "killed by SIGKILL", 2, False))
        states.append(observe(sweep)[run.id].state)
    assert states == ["waiting", "waiting", "failed"]
    assert observe(sweep)[run.id].cause == "killed by SIGKILL (given up after 3 attempts)"


def test_what_ends_while_the_launcher_stops_is_nobodys_failure(tmp_path: Path) -> None:
    run, sweep = a_run(tmp_path)
    for _ in range(5):
        write_ending(task_of(run), Ending(137, "killed by SIGKILL", 2, True))
    assert observe(sweep)[run.id].state == "waiting"
    write_ending(task_of(run), Ending(43, "Diverged: NaN", 2, True))
    assert observe(sweep)[run.id].state == "failed"


@pytest.mark.parametrize(
    ("kind", "note", "code", "cause"),
    [
        ("error", {"code": 42, "cause": "ContractError: NaN"}, 42, "ContractError: NaN"),
        ("begun", {}, 137, "killed by SIGKILL, while it was scored (given up after 1 attempts)"),
    ],
)
def test_how_an_evaluation_ended_is_said_of_the_row_to_blame_or_of_all(
    tmp_path: Path, kind: Any, note: dict[str, Any], code: int, cause: str
) -> None:
    run, sweep = a_run(tmp_path)
    finish_training(run)
    teacher = tmp_path / "baselines" / "teacher-0"
    task, ending = task_of(run, "eval", (teacher,)), Ending(code, "killed by SIGKILL", 0, False, 7)
    write_json(eval_note(run.path, kind), {"pid": 7, **note})
    write_ending(task, ending)
    seen = look(run, suite(), sweep.beneath())
    assert (seen.state, seen.exit_code, seen.cause) == ("failed", code, cause)
    assert RunDir(teacher).status() == {}, "it is scored by the next evaluation"
    write_ending(task, replace(ending, pid=8))
    assert RunDir(teacher).status()["eval_gave_up"], "the notes are of another process"


def test_what_an_earlier_version_wanted_to_score_alone_waits_to_be_scored(tmp_path: Path) -> None:
    run, sweep = a_run(tmp_path)
    finish_training(run)
    run.update_status(eval_alone=True, eval_cause="ContractError: no", eval_exit_code=None)
    assert look(run, suite(), sweep.beneath()).state == "waiting"


def test_retry_forgets_failures_and_keeps_everything_else(tmp_path: Path) -> None:
    run, sweep = a_run(tmp_path)
    write_ending(task_of(run), Ending(43, "Diverged: NaN", 2, False))
    run.update_status(step=7, attempts_without_progress=3)
    forget_failures(run)
    seen = observe(sweep)[run.id]
    assert (seen.state, seen.step, seen.cause) == ("waiting", 7, "retry was asked for")
    assert run.status()["attempts_without_progress"] == 0


def test_one_row_per_label_pair_and_quantiser(tmp_path: Path) -> None:
    words = ["pair=tiny", "quant=none,int4,bnb_nf4", "lmbda=0,1"]
    sweep = load_sweep(None, words, tmp_path)
    assert sorted(set(sweep.groups.values())) == ["tiny/bnb_nf4", "tiny/int4", "tiny/none"]
    rows = {(b.label, tuple(sorted(b.groups))) for b in sweep.baselines}
    everyone = ("tiny/bnb_nf4", "tiny/int4", "tiny/none")
    assert rows == {
        ("teacher", everyone),
        ("student", everyone),
        ("ptq", ("tiny/int4",)),
        ("ptq", ("tiny/bnb_nf4",)),
    }
    assert baselines_on_disk(sweep) == sweep.baselines, "none is scored"


# ------------------------------------------------------------------------------- planning

NEW, TO_SCORE, DONE = Observation("new"), Observation("waiting", is_trained=True), "done"


def situation(observations: dict[str, Observation], **more: Any) -> Situation:
    groups = more.pop("groups", dict.fromkeys(observations, "g"))
    packs = more.pop("packs", groups)
    defaults: dict[str, Any] = {"baselines": (), "prepared": {"g": True}, "live": ()}
    defaults["since"] = 0.0
    return Situation(groups, packs, observations, **{**defaults, **more})


def test_a_groups_pair_is_prepared_once_before_its_first_point() -> None:
    points = {"a": NEW, "b": NEW}
    prepare = Action("prepare", "g")
    assert actions(situation(points, prepared={}), 4, 8) == [prepare]
    assert actions(situation(points, prepared={}, live=[prepare]), 4, 8) == []
    assert actions(situation(points, prepared={"g": False}), 4, 8) == []
    trainings = [Action("train", "g", ("a",)), Action("train", "g", ("b",))]
    assert actions(situation(points), 4, 8) == trainings
    assert actions(situation(points), 1, 8) == trainings[:1]


def test_full_packs_are_scored_at_once_and_the_rest_when_nothing_can_join_it() -> None:
    points = {"a": TO_SCORE, "b": TO_SCORE, "c": TO_SCORE, "d": NEW}
    assert actions(situation(points), 9, 2) == [
        Action("eval", "g", ("a", "b")),
        Action("train", "g", ("d",)),
    ]
    alone = {"a": TO_SCORE, "d": Observation("failed")}
    assert actions(situation(alone), 9, 2) == [Action("eval", "g", ("a",))]
    elsewhere = {"a": TO_SCORE, "d": Observation("running")}
    assert actions(situation(elsewhere), 9, 2) == []


def test_idle_slots_share_what_is_left_to_score() -> None:
    points = dict.fromkeys("abcd", TO_SCORE)
    packs = [action.points for action in actions(situation(points), 2, 8)]
    assert packs == [("a", "b"), ("c", "d")]


def test_fixed_packs_wait_for_their_own_and_are_never_cut_anew() -> None:
    points = {"a": TO_SCORE, "b": NEW, "c": TO_SCORE, "d": TO_SCORE, "e": TO_SCORE}
    groups = dict.fromkeys(points, "g")
    packs = fixed_packs(groups, 2)
    assert list(packs.values()) == ["g/0", "g/0", "g/1", "g/1", "g/2"]
    teacher = Baseline(Path("t"), "teacher", frozenset({"g"}))
    chosen = actions(situation(points, packs=packs, baselines=[teacher]), 9, 2)
    evals = [a for a in chosen if a.kind == "eval"]
    assert evals == [Action("eval", "g", ("c", "d")), Action("eval", "g", ("e",))]
    trained = points | {"b": TO_SCORE}
    first = actions(situation(trained, packs=packs, baselines=[teacher]), 1, 2)
    assert first == [Action("eval", "g", ("a", "b"), (Path("t"),))]
    gone = points | {"b": Observation("failed")}
    assert ("a",) in [a.points for a in actions(situation(gone, packs=packs), 9, 2)]


def test_baselines_ride_along_once_and_with_a_point_that_is_done_where_none_is_left() -> None:
    teacher = Baseline(Path("t"), "teacher", frozenset({"g"}))
    points = {"a": TO_SCORE, "b": TO_SCORE}
    first, second = actions(situation(points, baselines=[teacher]), 2, 1)
    assert (first.baselines, second.baselines) == ((Path("t"),), ())
    done = {"a": Observation("done", is_trained=True)}
    carried = [Action("eval", "g", ("a",), (Path("t"),))]
    assert actions(situation(done, baselines=[teacher]), 2, 1) == carried
    assert actions(situation(done, baselines=[replace(teacher, is_scored=True)]), 2, 1) == []
    assert actions(situation(done, baselines=[replace(teacher, cause="no")]), 2, 1) == []


def test_what_somebody_stopped_while_we_run_is_left_alone() -> None:
    stopped = {"a": Observation("waiting", asked_to_stop=5.0)}
    assert actions(situation(stopped, since=5.0), 1, 1) == []
    assert actions(situation(stopped, since=5.1), 1, 1) == [Action("train", "g", ("a",))]
    by_another_clock = {"a": Observation("waiting", stop_mark=9e12)}
    assert actions(situation(by_another_clock), 1, 1) == [Action("train", "g", ("a",))]


# --------------------------------------------------------------------- any course of events

END = st.sampled_from(["ok", "ok", "poison", "crash", "stopped"])
INFRA_RETRIES = 2


@dataclass
class World:
    """A sweep and what happens to it; the rules of `endings`, without files."""

    groups: dict[str, str]
    packs: dict[str, str]
    seen: dict[str, Observation]
    baselines: dict[str, Baseline]
    prepared: dict[str, bool] = field(default_factory=dict[str, bool])
    live: list[Action] = field(default_factory=list[Action])
    crashes: dict[str, int] = field(default_factory=dict[str, int])
    starts: list[Action] = field(default_factory=list[Action])

    def now(self) -> Situation:
        rows = tuple(self.baselines.values())
        return Situation(self.groups, self.packs, self.seen, rows, self.prepared, self.live, 0.0)

    def crash(self, who: str) -> bool:
        """Count an infrastructure death; true where it was one too many."""
        self.crashes[who] = self.crashes.get(who, 0) + 1
        return self.crashes[who] > INFRA_RETRIES

    def end(self, action: Action, how: str) -> None:
        self.live.remove(action)
        if action.kind == "prepare":
            if how == "ok":
                self.prepared[action.group] = True
            elif how == "poison" or (how == "crash" and self.crash(action.group)):
                self.prepared[action.group] = False
        elif action.kind == "train":
            id_ = action.points[0]
            self.seen[id_] = {
                "ok": TO_SCORE,
                "poison": Observation("failed"),
                "stopped": Observation("waiting", asked_to_stop=1.0),
                "crash": Observation("waiting"),
            }[how]
            if how == "crash" and self.crash(id_):
                self.seen[id_] = Observation("failed")
        else:
            self.end_eval(action, how)

    def end_eval(self, action: Action, how: str) -> None:
        points = [id_ for id_ in action.points if self.seen[id_].state != DONE]
        rows = [str(d) for d in action.baselines]
        blamed = [*points, *rows][-1]  # whose fault it is where it is one's
        for id_ in points:
            before, is_it = self.seen[id_], id_ == blamed
            given_up = how == "crash" and is_it and self.crash(f"eval {id_}")
            self.seen[id_] = {
                "ok": replace(before, state="done"),
                "poison": replace(before, state="failed" if is_it else "done"),
                "stopped": replace(before, asked_to_stop=1.0),
                "crash": replace(before, state="failed") if given_up else before,
            }[how]
        for name in rows:
            given_up = (how == "poison" and name == blamed) or (
                (how == "stopped" or (how == "crash" and name == blamed)) and self.crash(name)
            )
            self.baselines[name] = replace(
                self.baselines[name],
                is_scored=how == "ok" or (how == "poison" and name != blamed),
                cause="no" if given_up else None,
            )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_course_of_events_ends_with_nothing_started_twice(data: st.DataObject) -> None:
    ids = [f"p{i}" for i in range(data.draw(st.integers(1, 9), "points"))]
    groups = {id_: data.draw(st.sampled_from(["g", "h"])) for id_ in ids}
    kinds = st.sampled_from([NEW, TO_SCORE, Observation("done", is_trained=True)])
    rows = [
        Baseline(Path("t"), "teacher", frozenset("gh")),
        Baseline(Path("q"), "ptq", frozenset("g")),
    ]
    slots, pack = data.draw(st.integers(1, 4), "slots"), data.draw(st.integers(1, 4), "pack")
    packs = fixed_packs(groups, pack) if data.draw(st.booleans(), "fixed packs") else groups
    seen = {id_: data.draw(kinds) for id_ in ids}
    world = World(groups, packs, seen, {str(b.directory): b for b in rows})
    for _ in range(400):
        chosen = actions(world.now(), slots, pack)
        for action in chosen:
            check_start(world, action, pack)
            world.live.append(action)
            world.starts.append(action)
        assert len(world.live) <= slots
        if not world.live:
            break
        ended = data.draw(st.sampled_from(world.live))
        world.end(ended, data.draw(END))
    else:
        raise AssertionError("it never ends")
    check_end(world)


def check_start(world: World, action: Action, pack: int) -> None:
    busy = [id_ for live in world.live for id_ in live.points]
    at_work = [d for live in world.live for d in live.baselines]
    assert not set(action.baselines) & set(at_work)
    if action.kind == "prepare":
        assert action.group not in world.prepared
        assert action not in world.live
        return
    assert len(action.points) == len(set(action.points)) <= pack
    assert len({world.packs[id_] for id_ in action.points}) == 1
    for id_ in action.points:
        seen = world.seen[id_]
        assert world.groups[id_] == action.group
        assert seen.asked_to_stop is None, "somebody stopped it"
        if action.kind == "train":
            assert seen.state in ("new", "waiting")
            assert not seen.is_trained
            assert id_ not in busy
            assert world.prepared[action.group]
        elif seen.state == "done":
            assert action.baselines, "a point that is done is there to carry baselines"
        else:
            assert (seen.state, seen.is_trained) == ("waiting", True)
            assert id_ not in busy


def check_end(world: World) -> None:
    for id_, seen in world.seen.items():
        was_stopped = seen.asked_to_stop is not None
        is_blocked = not seen.is_trained and world.prepared.get(world.groups[id_]) is False
        assert seen.state in ("done", "failed") or was_stopped or is_blocked
    trainings = [a.points[0] for a in world.starts if a.kind == "train"]
    assert all(trainings.count(id_) <= 1 + INFRA_RETRIES for id_ in world.seen)
    done = {world.groups[id_] for id_, seen in world.seen.items() if seen.state == "done"}
    stuck = {
        world.groups[id_] for id_, s in world.seen.items() if s.state not in ("done", "failed")
    }
    for baseline in world.baselines.values():
        can_be_carried = done & baseline.groups and not stuck & baseline.groups
        assert baseline.is_scored or baseline.cause or not can_be_carried
