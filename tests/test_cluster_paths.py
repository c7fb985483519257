"""Test that paths no pod has are refused on the laptop, and that planning needs no cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.rundir import write_json
from stillhouse.sweep.cluster import submit_args
from tests.builders.lab import SITE
from tests.builders.sample_runs import Sample, write_sample

PAIR = ("student=/cache/pushed/small-0123456789ab", "teacher=org/large")
CLUSTER = ("--backend", "cluster")
LINES = {  # words before and behind a pair's
    "plan": (("plan",), CLUSTER),
    "run": (("run",), CLUSTER),
    "dry-run": (("run",), (*CLUSTER, "--dry-run")),
    "train": (("train", "mine"), ("--dry-run",)),
    "preflight": (("preflight",), (*CLUSTER, "--dry-run")),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with weights and rows, and no kubeconfig."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "there is none"))
    monkeypatch.chdir(tmp_path)
    for name in ("models/small", "gpt2", "org/here"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


@pytest.mark.parametrize("verb", LINES)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("student=models/small", ("teacher=org/large",)),
        ("teacher=./models/large", ("student=org/small",)),
        ("student=/srv/ada/small", ("teacher=org/large",)),
        ("teacher=../large", ("student=org/small",)),
        ("data_path=rows.jsonl", (*PAIR, "data=local")),
        ("other_file=rows.jsonl", ("pair=tiny", "other_prompts=0.5")),
    ],
)
def test_a_path_that_no_pod_has_is_42_and_names_the_way(
    verb: str, bad: str, words: tuple[str, ...], say: Callable[..., str], here: Path
) -> None:
    before, behind = LINES[verb]
    there = sorted(here.iterdir())
    error = say(*before, *words, bad, *behind, *SITE, code=42)
    assert error.startswith(f"ConfigError: {bad}: no pod has this path")
    assert "stillhouse push " in error and bad.partition("=")[2] in error.partition("push ")[2]
    assert "OWNER/NAME" in error and error.count("\n") == 1
    assert sorted(here.iterdir()) == there


@pytest.mark.parametrize("verb", LINES)
def test_a_teacher_that_no_pod_has_is_42(verb: str, say: Callable[..., str], here: Path) -> None:
    before, behind = LINES[verb]
    error = say(*before, "pair=tiny", "teacher_at=server", *behind, *SITE, code=42)
    assert error.startswith("ConfigError: teacher_at server: ") and error.count("\n") == 1


@pytest.mark.parametrize("verb", LINES)
def test_what_was_pushed_and_what_is_on_the_hub_passes(verb: str, say: Callable[..., str]) -> None:
    rows = ("data=local", "data_path=/cache/pushed/rows-0123456789ab/rows.jsonl")
    before, behind = LINES[verb]
    code = 42 if verb == "run" else 0  # there is no cluster to run in
    said = say(*before, *PAIR, *rows, *behind, *SITE, code=code)
    assert "no pod has" not in said
    assert "no kubeconfig" in said if code else said


def test_this_machine_takes_any_path(say: Callable[..., str]) -> None:
    assert "1 new" in say("plan", "student=/srv/ada/small", "teacher=org/large")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/name", False), ("name", False), ("org/name-1.5B", False),
        ("/abs", True), ("~/x", True), ("./x", True), ("a/b/c", True), ("org/rows.jsonl", True),
        ("rows.json.gz", True), ("gpt2", True), ("org/here", True),
    ],
)  # fmt: skip
def test_a_name_is_a_path_by_its_form_or_because_it_is_here(name: str, is_one: bool) -> None:
    assert submit_args.is_path(name) is is_one


@pytest.mark.parametrize(
    ("path", "is_below"),
    [
        ("/cache/pushed/x", True), ("/runs/x/adapter", True), ("/cache", False),
        ("/cached/x", False), ("/cache/../etc", False), ("cache/x", False), ("/data/x", False),
        ("/cache/a/../b", True),
    ],
)  # fmt: skip
def test_only_what_is_below_a_volume_is_in_a_pod(path: str, is_below: bool) -> None:
    assert submit_args.is_mounted(path) is is_below


def test_adapters_of_a_line_are_runs_or_lie_on_a_volume(say: Callable[..., str]) -> None:
    line = ("eval", "scores", "--pair", "tiny", "--dry-run", *SITE, "--lora-paths")
    assert "kind: Job" in say(*line, "dump/mine")
    assert "kind: Job" in say(*line, "/cache/pushed/adapter-0123456789ab")
    assert "lora_paths=/srv/ada/adapter" in say(*line, "/srv/ada/adapter", code=42)


# ---------------------------------------------------------------------- without a cluster


def test_a_plan_needs_no_kubeconfig_and_says_that_nobody_was_asked(say: Callable[..., str]) -> None:
    words = ("pair=tiny", "lmbda=0,1", "seeds=2", "price_usd_per_hour=2")
    out = say("plan", *words, *CLUSTER, *SITE)
    assert "no cluster could be asked: no kubeconfig" in out
    assert "4 points: 4 new" in out
    assert "not known" in out and "scoring is not counted" in out
    told = json.loads(say("plan", *words, *CLUSTER, *SITE, "--json"))
    assert told["totals"]["new"] == 4 and told["unasked"].startswith("no kubeconfig")


def test_a_plan_without_a_cluster_knows_what_was_collected(
    say: Callable[..., str], here: Path
) -> None:
    sample = Sample(name="grid", axes={"lmbda": [0, 1]}, seeds=1)
    one, _ = write_sample(here / "runs", sample)
    words = ("pair=tiny", "lmbda=0,1", "max_steps=60", "seeds=1", "suite=null")
    assert "2 points: 2 new" in say("plan", *words, *CLUSTER, *SITE), "this machine's own work"
    write_json(one.collected_file, {"format": 1, "from": "a cluster", "at": 0.0, "state": ""})
    out = say("plan", *words, *CLUSTER, *SITE)
    assert "states are those of what was collected" in out
    assert "1 new" in out and "1 done" in out
    assert "measured" in out, "what it took tells what the other will"
