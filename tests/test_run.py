"""Test a run as a process: it ends, resumes after any kill, and reports how it ended."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillhouse import entrypoints
from stillhouse.errors import Diverged, StillhouseError
from stillhouse.rundir import RunDir, Runs
from stillhouse.stop import StopFlag
from tests.builders.cheap import Training, cheap, forked, words
from tests.builders.gradient import write_gradient

SLOW = pytest.mark.slow  # more of the same promise, with other seeds
STEPS = 30
POINT = [f"max_steps={STEPS}", "save_steps=3", "lmbda=0.5", "lora_dropout=0.1"]


def run_of(runs: Path, *more: str) -> RunDir:
    return Runs(runs).of(cheap(runs, *more))


def metrics_but_times(run: RunDir):
    return [{k: v for k, v in m.items() if not k.startswith("time/")} for m in run.metrics()]


def adapter_bytes(run: RunDir) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunDir:
    """The run that nothing happened to."""
    runs = tmp_path_factory.mktemp("undisturbed")
    assert entrypoints.train(cheap(runs, *POINT)) == 0
    return run_of(runs, *POINT)


def test_a_run_leaves_what_the_contract_says(undisturbed):
    run = undisturbed
    assert run.is_trained()
    record = run.record()
    assert record is not None and record["id"] == run.id
    contract = run.contract()
    assert contract is not None and contract["coverage"] == record["coverage"]
    assert record["coverage"]["adapted_share"] == 1, "all seven kinds of layer of a Llama"
    assert record["threads"] == 1 and torch.__version__.startswith(record["versions"]["torch"])
    assert run.status()["phase"] == "done" and run.status()["step"] == STEPS
    assert [m["step"] for m in run.metrics()] == list(range(STEPS))
    cost = json.loads(run.cost_file.read_text())
    assert cost["tokens"]["completion"] == sum(m["tokens/completion"] for m in run.metrics())
    phases = {k: v for k, v in cost["seconds"].items() if k != "total"}
    assert phases.keys() == {"load", "rollout", "teacher", "train", "save"}
    assert 0.5 * cost["seconds"]["total"] < sum(phases.values()) < cost["seconds"]["total"]
    assert cost["device"] == "cpu"
    assert not run.checkpoints.exists(), "a trained run needs no optimiser state"
    phases = {m["train/phase"] for m in run.metrics()}
    assert phases == {0.0, 1.0}, "this point visits both kinds of step"
    for metrics in run.metrics():
        assert metrics["train/jsd_half"] <= 0.6932 and metrics["train/forward_kl"] >= 0
        on_policy = metrics["train/phase"] == 1.0
        assert ("train/on_policy_loss" in metrics) is on_policy
        assert ("rollout/truncation_rate" in metrics) is on_policy


def test_a_run_that_finds_itself_done_exits_0_before_importing_torch(undisturbed):
    script = (
        "import sys; from stillhouse.entrypoints import train_main\n"
        "code = train_main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    )
    line = words(undisturbed.path.parent, *POINT)
    done = subprocess.run([sys.executable, "-c", script, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout and done.stdout.endswith("False\n")


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=SLOW) for n in (1, 2, 3))])
def test_kill_9_at_random_moments_and_the_same_line_again_gives_the_same_bits(
    tmp_path, undisturbed, seed
):
    rng = random.Random(seed)
    run, line = run_of(tmp_path, *POINT), words(tmp_path, *POINT)
    for attempt in range(3):
        training = Training(line, tmp_path / f"log{attempt}")
        steps = min(STEPS, len(run.metrics()) + rng.randrange(9))
        training.wait_until(lambda n=steps: len(run.metrics()) >= n or run.is_trained())
        time.sleep(rng.random() * 0.2)
        training.send(signal.SIGKILL)
        training.ended()
    last = Training(line, tmp_path / "log")
    assert last.ended() == 0, last.log.read_text()
    assert metrics_but_times(run) == metrics_but_times(undisturbed)
    assert adapter_bytes(run) == adapter_bytes(undisturbed)


def test_sigterm_saves_every_completed_step_and_exits_85_and_the_next_attempt_goes_on(
    tmp_path, undisturbed
):
    run, line = run_of(tmp_path, *POINT), words(tmp_path, *POINT, "save_steps=1000")
    training = Training(line, tmp_path / "log")
    training.wait_until(lambda: len(run.metrics()) >= 4)
    training.send(signal.SIGTERM)
    assert training.ended() == 85, training.log.read_text()
    said = training.log.read_text()
    assert "Traceback" not in said and "run the same line again" in said
    status = run.status()
    assert status["exit_code"] == 85 and status["phase"] == "waiting"
    assert status["attempts_without_progress"] == 0, "being asked to stop is no failure"
    [saved] = run.checkpoints.iterdir()
    assert saved.name == f"step-{len(run.metrics())}", "every completed step is saved"
    assert entrypoints.train(cheap(tmp_path, *POINT)) == 0
    assert metrics_but_times(run) == metrics_but_times(undisturbed)
    assert adapter_bytes(run) == adapter_bytes(undisturbed)


def test_a_stop_between_two_tokens_changes_no_parameter(tmp_path, undisturbed):
    """Deterministically in the middle of a rollout: the flag is set at the 30th token drawn."""
    from stillhouse.distill import run as room

    spec = cheap(tmp_path, *POINT, "lmbda=1")
    run = Runs(tmp_path).of(spec)
    stop = StopFlag()
    one = room.Run(spec, run, stop)
    drawn = []
    check = stop.check

    def count():
        drawn.append(1)
        if len(drawn) == 30:
            stop.is_set = True
        check()

    stop.check = count  # type: ignore[method-assign]
    with pytest.raises(StillhouseError) as stopped:
        one.train()
    assert stopped.value.exit_code == 85
    steps = [int(p.name.removeprefix("step-")) for p in run.checkpoints.iterdir()]
    assert max(steps) == len(run.metrics()) > 0
    assert entrypoints.train(spec) == 0
    other = tmp_path / "other"
    assert entrypoints.train(cheap(other, *POINT, "lmbda=1")) == 0
    assert adapter_bytes(run) == adapter_bytes(run_of(other, *POINT, "lmbda=1"))


def test_deaths_before_the_first_step_never_stop_whoever_starts_the_line_again(tmp_path):
    """What ends by a kill, its launcher counts (`endings`); three of them are no divergence."""
    spec = cheap(tmp_path, "max_steps=1", "lmbda=0")
    run = Runs(tmp_path).of(spec)
    run.path.mkdir()
    run.update_status(phase="starting", attempts_without_progress=3)  # as kill -9 leaves it
    assert entrypoints.train(spec) == 0
    assert run.status()["attempts_without_progress"] == 0


@pytest.mark.parametrize("lmbda", [0, 1])
def test_a_number_that_is_no_number_stops_the_run_with_its_batch_saved(tmp_path, lmbda):
    from stillhouse.distill import run as room

    spec = cheap(tmp_path, f"lmbda={lmbda}")
    run = Runs(tmp_path).of(spec)
    one = room.Run(spec, run, StopFlag())
    next(iter(one.loop.parameters)).data[0] = float("nan")
    with pytest.raises(Diverged, match="the loss is nan") as stopped:
        one.train()
    assert stopped.value.exit_code == 43
    saved = json.loads((run.path / "diverged.json").read_text())
    assert saved["step"] == 0 and len(saved["batch"]) == 4
    assert not run.is_trained()


def test_two_processes_never_train_one_run(tmp_path):
    point = [*POINT, "max_steps=100"]  # some seconds: the second waits one for the lock
    line, run = words(tmp_path, *point), run_of(tmp_path, *point)
    first = Training(line, tmp_path / "first")
    first.wait_until(run.is_locked)
    second = Training(line, tmp_path / "second")
    assert second.ended() == 42
    assert "another process trains this run now" in second.log.read_text()
    assert first.ended() == 0


def test_a_name_that_means_another_configuration_is_refused(tmp_path, undisturbed):
    runs = tmp_path / "runs"
    shutil.copytree(undisturbed.path.parent, runs, symlinks=True)
    assert (
        entrypoints.train(cheap(runs, *POINT, "name=mine", f"output_dir={tmp_path / 'out'}")) == 0
    )
    assert (tmp_path / "out").resolve() == run_of(runs, *POINT).path.resolve()
    assert Runs(runs).find("mine") == [run_of(runs, *POINT)]
    with pytest.raises(StillhouseError, match="already means"):
        entrypoints.train(cheap(runs, *POINT, "beta=0.5", "name=mine"))
    with pytest.raises(StillhouseError, match="already means"):
        entrypoints.train(cheap(runs, *POINT, "beta=0.5", f"output_dir={tmp_path / 'out'}"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StillhouseError, match="not a link to a run"):
        entrypoints.train(cheap(runs, *POINT, f"output_dir={tmp_path / 'file'}"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("edit", ["format", "content"])
def test_a_directory_of_another_version_or_content_is_refused_untouched(
    tmp_path, undisturbed, edit
):
    runs = tmp_path / "runs"
    shutil.copytree(undisturbed.path.parent, runs, symlinks=True)
    run = run_of(runs, *POINT)
    record = json.loads(run.spec_file.read_text())
    if edit == "format":
        record["format"] = 99
    else:
        record["versioned"]["loss"]["beta"] = 0.25
    run.spec_file.write_text(json.dumps(record))
    before = sorted((str(p), p.stat().st_mtime_ns) for p in run.path.rglob("*"))
    with pytest.raises(StillhouseError, match="format 99|is not the point") as refused:
        entrypoints.train(cheap(runs, *POINT))
    assert refused.value.exit_code == 42
    assert sorted((str(p), p.stat().st_mtime_ns) for p in run.path.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--lmba", "0"], 'no knob "lmba". Did you mean "lmbda"?'),
        (["--lmbda", "2"], "lie in [0, 1]"),
        (["--pair", "tinny"], 'Did you mean "tiny"?'),
        (["--data", "local", "--data-path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--pair", "qwen3_4b_self", "--min-new-tokens", "0"], "not on this machine; get it with"),
    ],
)
def test_a_users_mistake_is_exit_42_in_a_line_or_two(tmp_path, line, said):
    done = subprocess.run(
        [sys.executable, "train.py", *words(tmp_path), *line],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 42, done.stderr
    message = done.stderr.strip().splitlines()
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len([text for text in message if "kernels" not in text]) <= 2


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize(
    "method",
    [["lmbda=1"], ["method=replay_buffer", "loss=ce_pg", "replay_injection=1"]],
    ids=["rollouts", "replayed"],
)
def test_two_processes_give_the_gradient_of_one_with_the_double_batch(tmp_path, method):
    """Rollouts included, to 1e-6, at dropout 0; tests/test_pod.py has the real launcher."""
    common = words(tmp_path, *method, "lora_dropout=0")
    halves = [*common, "per_device_train_batch_size=2", "num_processes=2"]
    two, one = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        forked(write_gradient, two, 2, halves, {**job, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    processes.append(forked(write_gradient, one, 2, common))
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    a, b = load_file(two), load_file(one)
    assert a["processes"] == 2 and b["processes"] == 1
    half = len(a["tokens"])
    assert torch.equal(a["tokens"], b["tokens"][:half]), (
        "rank 0 wrote the first half of the rollouts"
    )
    assert b["gradient"].abs().max() > 1e-4
    assert (a["gradient"] - b["gradient"]).abs().max() < 1e-6
