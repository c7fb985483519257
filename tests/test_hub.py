"""Test downloads of weights and rows from a hub: on request only, or an error that says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.distill.pairs import prepare
from stillhouse.spec import QuantSpec
from tests.builders.cheap import CACHE, cheap
from tests.fakes.fake_hub import Hub, Repository


def questions(plus: int) -> bytes:
    rows = [{"question": f"What is {n} + {plus}?", "answer": f"#### {n + plus}"} for n in range(40)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CARD = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
---
"""
PAIR = [
    "pair=qwen3_4b_self",
    "student=some/student",
    "teacher=some/teacher",
    "student_dtype=float32",
    "teacher_dtype=float32",
    "quant=none",
    "data=gsm8k",
    "held_out_rows=4",
]


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, bytes]]:
    """The files of a tiny student and of its teacher."""
    made = prepare(cheap(CACHE).pair, QuantSpec("none", None, False), CACHE)
    return {
        role: {file.name: file.read_bytes() for file in Path(getattr(made, role)).iterdir()}
        for role in ("student", "teacher")
    }


@pytest.fixture
def hub(weights: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub()
    for role, files in weights.items():
        old = {"pytorch_model.bin": b"the same again", "README.md": b""}
        hub.repositories[f"models/some/{role}"] = Repository({**files, **old})
    rows = {"main/train.jsonl": questions(1), "main/test.jsonl": questions(2)}
    hub.repositories["datasets/openai/gsm8k"] = Repository({"README.md": CARD, **rows})
    yield hub
    hub.close()


class Door:
    """Doors of this project as processes of a machine that has nothing of the hub's yet."""

    def __init__(self, home: Path, hub: Hub) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "STILLHOUSE_"))}
        self.home, self.exit_file = home, home / "exit"
        self.env = {
            **kept,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hf"),
            "STILLHOUSE_EXIT_FILE": str(self.exit_file),
        }

    def start(self, door: str, *words: str, **env: str) -> subprocess.Popen[str]:
        code = (
            f"import sys; from stillhouse.entrypoints import {door}; sys.exit({door}(sys.argv[1:]))"
        )
        places = [f"cache_dir={self.home / 'cache'}", f"runs={self.home / 'runs'}"]
        return subprocess.Popen(
            [sys.executable, "-c", code, *words, *places],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**self.env, **env},
        )  # fmt: skip

    def run(self, door: str, *words: str, **env: str) -> tuple[int, str, str]:
        process = self.start(door, *words, **env)
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err

    def cause(self) -> str:
        return json.loads(self.exit_file.read_text().splitlines()[-1])["cause"]


@pytest.fixture
def door(tmp_path: Path, hub: Hub) -> Door:
    return Door(tmp_path, hub)


def downloads(hub: Hub, name: str) -> int:
    return sum(line.startswith("GET") and line.endswith(name) for line in hub.asked)


@pytest.mark.parametrize(
    "scoring",
    [
        ["--no-scores"],
        pytest.param(["suite=gsm8k"], marks=pytest.mark.slow),  # lm-eval reads its 14,000 tasks
    ],
)
def test_prepare_fetches_once_what_training_and_scoring_need_and_then_needs_no_hub(
    hub: Hub, door: Door, scoring: list[str]
) -> None:
    line = [*PAIR, *scoring]
    code, _, err = door.run("prepare_main", *line)
    assert code == 42 and "`hf download some/student`" in err
    assert hub.asked == [], "nothing is looked up unless it is asked for"

    both = [door.start("prepare_main", "--fetch", *line) for _ in range(2)]
    ends = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert any("downloading some/student from http" in out for out, _ in ends)
    # One of the two downloaded.
    assert downloads(hub, "model.safetensors") == 2 and downloads(hub, "/main/test.jsonl") > 0
    assert downloads(hub, "pytorch_model.bin") == 0, "weights are wanted once"

    hub.asked.clear()
    code, _, err = door.run("prepare_main", *line, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert code == 0, err
    code, out, err = door.run("prepare_main", "--fetch", "--no-scores", *PAIR)
    assert code == 0 and "downloading" not in out
    assert hub.asked == [], "what is here is not looked up again"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["student=some/nothing"], "some/nothing: http"),
        (["student=some/gated"], "wants its licence accepted there and a token"),
        (["student_revision=v9"], "some/student at v9: http"),
        (["data_path=some/nothing"], "does not give us this dataset"),
    ],
)
def test_what_the_hub_does_not_give_is_a_mistake(
    hub: Hub, door: Door, words: list[str], said: str
) -> None:
    hub.repositories["models/some/gated"] = Repository({"config.json": b"{}"}, is_gated=True)
    code, _, err = door.run("prepare_main", "--fetch", "--no-scores", *PAIR, *words)
    assert code == 42, err
    assert said in err and "Traceback" not in err
    assert door.cause().startswith("ConfigError: ")


def test_a_hub_that_is_down_is_nobodys_mistake(hub: Hub, door: Door) -> None:
    hub.broken = 503
    code, _, err = door.run("prepare_main", "--fetch", "--no-scores", *PAIR)
    assert code == 1, err
    assert "ConnectionError: some/student" in door.cause() and "cannot be reached" in door.cause()
    hub.close()
    code, _, err = door.run("prepare_main", "--fetch", "--no-scores", *PAIR)
    assert code == 1, err
    assert "cannot be reached" in door.cause()


TASK = """task: {}
dataset_path: {}
test_split: test
doc_to_text: question
doc_to_target: answer
"""
LOAD = """
import sys
from pathlib import Path
from lm_eval.tasks import TaskManager
from stillhouse.errors import exit_code_of
from stillhouse.evals.suite import load_tasks
from stillhouse.spec import SuiteSpec, TaskSpec
ours = lambda: TaskManager(include_defaults=False, include_path=sys.argv[1])
for name in sys.argv[2:]:
    tasks = (TaskSpec(name, "exact_match", None, True),)
    load = lambda: len(load_tasks(SuiteSpec("s", tasks, False, None, 8), tasks, Path(), ours)) - 1
    print("code", exit_code_of(load))
"""


def loaded(door: Door, *names: str, **env: str) -> list[int]:
    """How loading each of these tasks ended, in a process of its own."""
    command = [sys.executable, "-c", LOAD, str(door.home / "tasks"), *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**door.env, **env})
    assert done.returncode == 0, done.stderr
    return [int(line[5:]) for line in done.stdout.splitlines() if line.startswith("code ")]


@pytest.fixture
def tasks(hub: Hub, door: Door) -> None:
    hub.repositories["datasets/some/rows"] = Repository({"test.jsonl": questions(1)})
    (door.home / "tasks").mkdir()
    for name in ("rows", "nothing"):
        (door.home / "tasks" / f"{name}.yaml").write_text(TASK.format(name, f"some/{name}"))


@pytest.mark.usefixtures("tasks")
def test_a_tasks_data_is_fetched_once_or_missing(hub: Hub, door: Door) -> None:
    assert loaded(door, "rows", "nothing") == [0, 42]
    hub.asked.clear()
    assert loaded(door, "rows", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1") == [0]
    assert hub.asked == []


@pytest.mark.slow  # datasets asks six times, over 23 seconds
@pytest.mark.usefixtures("tasks")
def test_a_tasks_data_that_a_broken_hub_has_is_nobodys_mistake(hub: Hub, door: Door) -> None:
    hub.broken = 503
    assert loaded(door, "rows") == [1]


def test_who_is_told_to_stay_offline_does(hub: Hub, door: Door) -> None:
    code, _, err = door.run("prepare_main", "--fetch", "--no-scores", *PAIR, HF_HUB_OFFLINE="1")
    assert code == 42 and "HF_HUB_OFFLINE" in err
    assert hub.asked == []


def test_a_job_that_may_fetch_does_so_before_it_trains_and_then_stays_offline(
    hub: Hub, door: Door
) -> None:
    line = [
        *PAIR, "quant=int4", "lmbda=0", "max_steps=1", "per_device_train_batch_size=2",
        "num_processes=1", "gradient_accumulation_steps=1", "mixed_precision=no", "threads=1",
        "max_length=128", "min_completion=2", "sanity_max_nll=20",
    ]  # fmt: skip
    code, _, err = door.run("train_main", *line)
    assert code == 42 and "not on this machine; get it with" in err
    code, out, err = door.run("train_main", *line, STILLHOUSE_FETCH="1")
    assert code == 0, err
    assert out.index("downloading some/teacher") < out.index("rows to train on")
    assert hub.asked[-1].startswith("GET /datasets/openai/gsm8k"), "rows are fetched last"
    hub.asked.clear()
    code, out, err = door.run("train_main", *line, STILLHOUSE_FETCH="1")
    assert code == 0 and "nothing to do" in out and hub.asked == []
