"""Test a pod's first process: what it passes on to its child, and what it reports.

The processes are real, and are really killed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from stillhouse import entrypoints, pod
from stillhouse.compose import as_json
from stillhouse.identity import point_id
from stillhouse.rundir import Runs, code_identity
from stillhouse.sweep.cluster.objects import last_words
from stillhouse.sweep.cluster.reasons import End
from tests.builders.cheap import cheap, words

REPOSITORY = Path(__file__).parent.parent
LISTEN = """
import signal, sys, time
def stop(number, frame):
    print("saved", flush=True)
    sys.exit(85)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


class Pod:
    """pod.py as a process, in a directory that stands for a container's root."""

    started: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(
        self,
        home: Path,
        *words: str,
        env: dict[str, str] | None = None,
        before: tuple[str, ...] = (),
    ) -> None:
        self.home, self.root = home, home / "root"
        self.file = home / "bundle/pod.py"
        self.file.parent.mkdir(exist_ok=True)
        shutil.copy(pod.__file__, self.file)
        for name in ("dev", "tmp", "sys/fs/cgroup"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.message_file = self.root / "dev/termination-log"
        self.message_file.touch()
        self.out = home / "stdout"
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [*before, sys.executable, str(self.file), *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=home,
                env={**os.environ, "STILLHOUSE_POD_ROOT": str(self.root), **(env or {})},
            )

        self.started.append(self.process)

    @property
    def printed(self) -> str:
        return self.out.read_text()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None or condition(), self.printed
            assert time.monotonic() < end, f"it never came: {self.printed}"
            time.sleep(0.005)

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.printed)

    def ended(self, seconds: float = 120) -> int:
        return self.process.wait(seconds)

    def message(self) -> Any:
        return json.loads(self.message_file.read_text())


@pytest.fixture(autouse=True)
def no_pod_is_left() -> Iterator[None]:
    yield
    for one in Pod.started:  # of a test that failed half way; it tells its children
        if one.poll() is None:
            one.terminate()
            one.wait(60)
    Pod.started.clear()


def pod_of(home: Path, script: str, *options: str, **more: Any) -> Pod:
    """A pod whose train.py is this script."""
    (home / "train.py").write_text(script)
    return Pod(home, *options, "train", "--", "lmbda=0", **more)


# ---------------------------------------------------------------- output and endings


def test_the_childs_code_its_cause_and_its_last_lines_are_left_behind(tmp_path: Path) -> None:
    script = "import sys; print('all is well'); sys.exit('ValueError: or is it')"
    log = tmp_path / "runs/new/log.txt"
    for attempt in (1, 2):
        one = pod_of(tmp_path, script, f"--log={log}")
        assert one.ended() == 1
        assert one.printed == "all is well\nValueError: or is it\n"
        assert one.message() == {
            "exit_code": 1,
            "cause": "ValueError: or is it",
            "tail": one.printed,
        }
        assert log.read_text() == one.printed * attempt


def test_a_child_that_ends_well_leaves_a_short_message(tmp_path: Path) -> None:
    one = pod_of(tmp_path, "import sys; print(sys.argv[1:])")
    assert one.ended() == 0
    assert one.printed == "['lmbda=0']\n" and one.message() == {"exit_code": 0}


def test_the_cause_is_the_one_that_a_door_told(tmp_path: Path) -> None:
    told = {"code": 42, "rank": 0, "cause": "ConfigError: no such knob"}
    script = f"""
import os, sys
open(os.environ["STILLHOUSE_EXIT_FILE"], "w").write({json.dumps(told)!r} + "\\n")
print("some library's farewell")
sys.exit(42)
"""
    one = pod_of(tmp_path, script)
    assert one.ended() == 42
    assert one.message()["cause"] == "ConfigError: no such knob"


def test_a_message_fits_whatever_was_printed(tmp_path: Path) -> None:
    script = "print('漢字\"' * 9000); print('\\\\' * 3000); raise SystemExit('x' * 5000)"
    one = pod_of(tmp_path, script)
    assert one.ended() == 1
    assert len(one.message_file.read_bytes()) <= 4096
    assert one.message()["cause"] == "x" * 1000
    assert one.message()["tail"].endswith("xxx\n")


def test_a_message_fits_whatever_the_cause_is_made_of() -> None:
    said = json.loads(pod.message(1, "\0" * 5000, b"\xff" * 5000))
    assert said["cause"] == "\0" * 500 and said["tail"] == ""


ROWS = [
    {"row": "a", "state": "begun"},
    {"row": "a", "state": "done"},
    {"row": "b", "state": "failed", "code": 42, "cause": "ContractError: NaN"},
    {"row": "c", "state": "begun"},
]


def test_a_message_says_what_became_of_the_rows_of_an_evaluation(tmp_path: Path) -> None:
    script = f"""
from stillhouse.pod import tell
for row in {ROWS!r}:
    tell(**row)
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""
    one = pod_of(tmp_path, script, env={"PYTHONPATH": str(REPOSITORY)})
    assert one.ended() == 137
    assert one.message()["done"] == "a"
    assert one.message()["failed"] == {
        "b": [42, "ContractError: NaN"],
        "c": [137, "killed by SIGKILL, while it was scored"],
    }


def test_who_was_at_work_when_somebody_asked_to_stop_is_not_to_blame() -> None:
    assert pod.rows_of(ROWS, 85, "stopped")["failed"].keys() == {"b"}


def test_a_message_names_rows_before_it_gives_causes() -> None:
    rows = {f"{number:010x}": [42, "ContractError: " + "é" * 300] for number in range(100)}
    done = ",".join(f"{number:010x}" for number in range(100, 160))
    encoded = pod.message(42, "c" * 500, b"t" * 3000, {"failed": rows, "done": done})
    said = json.loads(encoded)
    assert len(encoded) <= 4096
    assert said["failed"].keys() == rows.keys() and said["done"] == done
    many = {f"{number:010x}": [42, "no"] for number in range(1000)}
    encoded = pod.message(42, "c" * 500, b"", {"failed": many, "done": done})
    said = json.loads(encoded)
    assert len(encoded) <= 4096 and "done" not in said and said["cause"] == "c" * 500
    assert [*said["failed"]] == [*many][: len(said["failed"])] and len(said["failed"]) > 100


def test_a_row_that_a_message_has_no_room_for_has_neither_failed_nor_ended() -> None:
    many = {f"{number:010x}": [42, "no"] for number in range(1000)}
    done = f"{1000:010x}"
    said = last_words(pod.message(42, "c" * 500, b"", {"failed": many, "done": done}).decode())
    end = End(42, "c", None, said.done, said.failed)
    named = [row for row in many if end.of(row, [*many, done])]
    assert len(named) > 100 and end.of(done, [*many, done]) is None and not end.done
    assert end.of(f"{999:010x}", [*many, done]) is None


def test_a_log_that_cannot_be_written_is_said_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one = pod_of(tmp_path, "print('on')", f"--log={tmp_path / 'file' / 'log'}")
    assert one.ended() == 0
    assert "no log is kept" in one.printed and one.printed.endswith("on\n")


@pytest.mark.parametrize("line", [["trian", "--", "x"], ["--proceses=2", "train"], []])
def test_a_mistake_in_the_manifest_is_exit_42(tmp_path: Path, line: list[str]) -> None:
    one = Pod(tmp_path, *line)
    assert one.ended() == 42
    assert one.message()["cause"].startswith("pod.py: ")


# ---------------------------------------------------------------- signals


def test_sigterm_reaches_the_child_and_85_comes_back(tmp_path: Path) -> None:
    one = pod_of(tmp_path, LISTEN)
    one.wait_for("ready\n")
    one.process.send_signal(signal.SIGTERM)
    assert one.ended() == 85
    assert one.printed == "ready\nsaved\n"


def test_a_child_that_could_not_listen_yet_was_asked_to_stop(tmp_path: Path) -> None:
    one = pod_of(tmp_path, "import time; print('importing', flush=True); time.sleep(60)")
    one.wait_for("importing")
    one.process.send_signal(signal.SIGTERM)
    assert one.ended() == 85
    assert one.message()["cause"] == "asked to stop before it could listen; nothing is lost"


@pytest.mark.parametrize("delay", [0.03, 0.05, 0.07, 0.09, 0.12, 0.15])
def test_no_moment_of_the_start_loses_a_sigterm(tmp_path: Path, delay: float) -> None:
    one = pod_of(tmp_path, LISTEN)
    time.sleep(delay)  # the moment is the parameter: each of them must end well
    one.process.send_signal(signal.SIGTERM)
    # Before its first line runs, Python itself ends by the signal (as PID 1 it would not hear it).
    assert one.ended(20) in (85, -signal.SIGTERM)


@pytest.mark.parametrize("names", [("memory.events",), ("memory", "memory.oom_control")])
def test_a_kernel_oom_kill_is_exit_44(tmp_path: Path, names: tuple[str, ...]) -> None:
    events = tmp_path.joinpath("root/sys/fs/cgroup", *names)
    events.parent.mkdir(parents=True)
    events.write_text("low 0\noom 1\noom_kill 3\noom_group_kill 0\n")
    script = f"""
import os
text = open({str(events)!r}).read()
open({str(events)!r}, "w").write(text.replace("oom_kill 3", "oom_kill 4"))
os.kill(os.getpid(), 9)
"""
    one = pod_of(tmp_path, script)
    assert one.ended() == 44
    assert "memory limit" in one.message()["cause"]


def test_a_kill_without_a_count_of_the_kernels_is_infrastructure(tmp_path: Path) -> None:
    (tmp_path / "root/sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "root/sys/fs/cgroup/memory.events").write_text("oom_kill 3\n")
    one = pod_of(tmp_path, "import os; print('on'); os.kill(os.getpid(), 9)")
    assert one.ended() == 137
    assert one.message()["cause"] == "killed by SIGKILL"


LAUNCHER = """
import subprocess, sys, signal
command = [sys.executable, *sys.argv[sys.argv.index("train.py"):]]
rank = subprocess.Popen(command, start_new_session=True)
def stop(number, frame):
    raise InterruptedError(number)
signal.signal(signal.SIGTERM, stop)
try:
    rank.wait()
except InterruptedError:
    rank.send_signal(signal.SIGTERM)
    rank.wait()
    print("SignalException", flush=True)
sys.exit(1)
"""


def test_a_launcher_that_returns_1_does_not_hide_the_85_of_its_rank(tmp_path: Path) -> None:
    package = tmp_path / "accelerate"
    (package / "commands").mkdir(parents=True)
    for file in (package / "__init__.py", package / "commands/__init__.py"):
        file.touch()
    (package / "commands/launch.py").write_text(LAUNCHER)
    rank = LISTEN.replace(
        "    sys.exit(85)",
        '    import os; open(os.environ["STILLHOUSE_EXIT_FILE"], "w").write(\n'
        '        \'{"code": 85, "rank": 0, "cause": "Interrupted: saved"}\')\n    sys.exit(85)',
    )
    one = pod_of(tmp_path, rank, "--processes=2")
    one.wait_for("ready\n")
    one.process.send_signal(signal.SIGTERM)
    assert one.ended() == 85, one.printed
    assert one.message()["cause"] == "Interrupted: saved"
    assert one.printed == "ready\nsaved\nSignalException\n"


def said(*codes: int) -> list[dict[str, Any]]:
    return [{"code": c, "rank": rank, "cause": f"of {rank}"} for rank, c in enumerate(codes)]


@pytest.mark.parametrize(
    ("returned", "told", "is_asked", "is_oom", "expected"),
    [
        (0, said(0, 0), True, True, (0, "")),
        (1, said(85, 44), False, False, (44, "of 1")),  # rank 1 broke, rank 0 was told to end
        (1, said(43, 1), False, False, (43, "of 0")),  # rank 0 diverged, rank 1 lost its peer
        (1, said(85, 1), False, False, (1, "of 1")),  # somebody's network broke: try again
        (1, said(85, 85), True, False, (85, "of 0")),
        (1, said(85, 1), True, False, (85, "of 0")),  # rank 0 was gone first
        (1, said(1), True, False, (1, "of 0")),
        (1, said(85), False, True, (44, pod.verdict(1, [], False, True)[1])),
        (1, [], False, False, (1, "")),
        (-11, [], True, False, (139, "killed by SIGSEGV")),
        (-15, [], False, False, (143, "killed by SIGTERM")),  # by whom? not by Kubernetes
        (85, said(85), False, False, (85, "of 0")),  # a run that another process has now
    ],
)
def test_what_ranks_said_decides_what_a_pod_says(
    returned: int, told: Any, is_asked: bool, is_oom: bool, expected: tuple[int, str]
) -> None:
    assert pod.verdict(returned, told, is_asked, is_oom) == expected


# ---------------------------------------------------------------- PID 1

NEW_PIDS = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
ORPHANS = """
import os, sys, time
for _ in range(20):
    if os.fork() == 0:
        if os.fork():
            os._exit(0)   # so its child is PID 1's
        os._exit(3)
    os.wait()
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    states = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            states.append(open(f"/proc/{name}/stat").read().rpartition(") ")[2][0])
        except (FileNotFoundError, ProcessLookupError):
            pass
    if "Z" not in states:
        break
print("zombies:", states.count("Z"), "our parent:", os.getppid(), flush=True)
"""


def needs_new_pids() -> None:
    can = shutil.which("unshare") and subprocess.run([*NEW_PIDS, "true"], capture_output=True)
    if not can or can.returncode != 0:
        pytest.skip("this machine lets us make no PID namespace (unshare --user --pid)")


def test_as_pid_1_it_buries_orphans(tmp_path: Path) -> None:
    needs_new_pids()
    one = pod_of(tmp_path, ORPHANS, before=NEW_PIDS)
    assert one.ended() == 0, one.printed
    assert one.printed == "zombies: 0 our parent: 1\n"


def test_as_pid_1_it_passes_sigterm_on(tmp_path: Path) -> None:
    needs_new_pids()
    one = pod_of(tmp_path, LISTEN, before=NEW_PIDS)
    one.wait_for("ready\n")
    children = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children")
    os.kill(int(children.read_text()), signal.SIGTERM)
    assert one.ended() == 85
    assert one.printed == "ready\nsaved\n"


# ---------------------------------------------------------------- code


def bundle_of(home: Path, files: dict[str, bytes]) -> None:
    (home / "bundle").mkdir(exist_ok=True)
    with tarfile.open(home / "bundle/code.tar.gz", "w:gz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))


def test_a_bundle_is_unpacked_and_its_digest_is_the_launchers(tmp_path: Path) -> None:
    sources = {
        str(path.relative_to(REPOSITORY)): path.read_bytes()
        for path in (REPOSITORY / "stillhouse").rglob("*.py")
    }
    show = b"import os, sys, stillhouse; print(os.getcwd(), stillhouse.__file__, sys.argv[1:])"
    bundle_of(tmp_path, {**sources, "train.py": show, "conf/train.yaml": b""})
    one = Pod(tmp_path, f"--code={code_identity()['digest']}", "train", "--", "lmbda=0")
    assert one.ended() == 0, one.printed
    code = one.root / "tmp/code"
    assert one.printed == f"{code} {code}/stillhouse/__init__.py ['lmbda=0']\n"
    assert (code / "conf/train.yaml").is_file()


def test_another_bundle_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    bundle_of(tmp_path, {"stillhouse/a.py": b"a = 1\n", "train.py": b"print('ran')"})
    one = Pod(tmp_path, "--code=0123456789abcdef", "train", "--", "lmbda=0")
    assert one.ended() == 42
    assert "is to run code 0123456789abcdef" in one.message()["cause"]
    assert "ran" not in one.printed.split()


def test_an_image_without_train_py_says_so(tmp_path: Path) -> None:
    one = Pod(tmp_path, "train", "--", "lmbda=0")
    assert one.ended() == 42
    assert "no train.py" in one.message()["cause"]


# ---------------------------------------------------------------- the real door


def real(tmp_path: Path, *words: str, **more: Any) -> Pod:
    """A pod that runs this checkout: a train.py of the repository, its pair's cache, one thread."""
    script = tmp_path / "train.py"
    script.write_text((REPOSITORY / "train.py").read_text())
    env = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return Pod(tmp_path, *words, env=env, **more)


CACHE = f"cache_dir={REPOSITORY / '.cache/tests'}"


def test_words_that_mean_another_point_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    line = words(runs, CACHE)
    one = real(tmp_path, "--id=0123456789", "train", "--", *line)
    assert one.ended() == 42, one.printed
    found = point_id(cheap(runs))
    cause = one.message()["cause"]
    assert cause.startswith(
        f"ConfigError: this pod was made for 0123456789, its words mean {found}"
    )
    assert not runs.exists()


def test_a_run_that_is_done_ends_its_pod_without_torch(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    spec = cheap(runs, "max_steps=1", "lmbda=0")
    assert entrypoints.train(spec) == 0
    line = words(runs, "max_steps=1", "lmbda=0", CACHE)
    options = [f"--id={point_id(spec)}", f"--log={Runs(runs).of(spec).log_file}"]
    one = real(tmp_path, *options, "train", "--", *line, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert one.ended() == 0
    assert "nothing to do" in one.printed
    imported = {line.rpartition("|")[2].strip() for line in one.printed.splitlines()}
    assert "stillhouse.entrypoints" in imported and "torch" not in imported
    assert "nothing to do" in Runs(runs).of(spec).log_file.read_text()


def test_two_ranks_save_and_their_pod_says_85_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """The real `accelerate launch`: torchrun returns 1 on SIGTERM, whatever its ranks did."""
    runs = tmp_path / "runs"
    point = ["num_processes=2", "per_device_train_batch_size=2", "lmbda=0.5", "save_steps=1000"]
    run = Runs(runs).of(cheap(runs, *point, "max_steps=4000"))
    spec = as_json(cheap(runs, *point, "max_steps=4000", CACHE))
    line = ["--processes=2", "train", "--", "--spec", spec]
    one = real(tmp_path, *line)
    one.wait_until(lambda: len(run.metrics()) >= 3)
    one.process.send_signal(signal.SIGTERM)
    assert one.ended() == 85, one.printed
    assert one.message()["cause"].startswith("Interrupted: ")
    [saved] = run.checkpoints.iterdir()
    steps = len(run.metrics())
    assert saved.name == f"step-{steps}", "every completed step is saved"
    assert run.status()["phase"] == "waiting" and run.status()["exit_code"] == 85

    two = real(tmp_path, *line)
    two.wait_until(lambda: len(run.metrics()) > steps)
    assert f"going on from step {steps}" in two.printed
    two.process.send_signal(signal.SIGTERM)
    assert two.ended() == 85


def test_a_mistake_under_the_launcher_is_42_and_not_torchruns_1(tmp_path: Path) -> None:
    line = words(tmp_path / "runs", "num_processes=3", "data=local", "data_path=/nowhere", CACHE)
    one = real(tmp_path, "--processes=2", "train", "--", *line)
    assert one.ended() == 42, one.printed
    assert one.message()["cause"].split(":")[0] in ("ConfigError", "DataError")
