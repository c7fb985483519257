"""Test that a failing tracker is a warning and does not affect the run or its files."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from stillhouse.compose import compose, from_command_line
from stillhouse.distill.tracking import DELETED, Tracker
from stillhouse.rundir import Runs
from stillhouse.spec import TrainSpec


class Service(types.ModuleType):
    """Weights & Biases as it behaves when told what to refuse."""

    def __init__(self, refuses: str = "", taken: int = 0) -> None:
        super().__init__("wandb")
        self.refuses, self.taken, self.ids, self.steps = refuses, taken, list[str](), list[int]()
        self.group: str | None = None

    def init(self, id: str, group: str | None, **_: Any) -> Service:
        self.ids.append(id)
        self.group = group
        if len(self.ids) <= self.taken:
            raise RuntimeError(f"run {id} was {DELETED}; try a new run id")
        self._refuse("init")
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._refuse("log")
        self.steps.append(step)

    def finish(self) -> None:
        self._refuse("finish")

    def _refuse(self, what: str) -> None:
        if self.refuses == what:
            raise ConnectionError("no route\nto host \x1b[2J")


def tracked(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps in metrics.jsonl after two were tracked."""
    monkeypatch.setitem(sys.modules, "wandb", service)
    words = ["pair=tiny", f"runs={tmp_path}", "tracker=wandb", "sweep=lr"]
    spec = compose(from_command_line(words, TrainSpec), TrainSpec)
    run = Runs(tmp_path).of(spec)
    run.path.mkdir(parents=True)
    tracker = Tracker(spec, run, 0)
    for step in (0, 1):
        tracker.log({"step": step, "train/loss": 1.0})
    tracker.close()
    return [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()]


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_a_service_that_fails_is_a_warning_and_every_step_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
):
    assert tracked(tmp_path, Service(refuses=what), monkeypatch) == [0, 1]
    said = capsys.readouterr().out
    assert "warning: W&B did not" in said and "(ConnectionError: no route)" in said
    assert said.count("\n") == 1 and "\x1b" not in said


def test_an_id_that_was_deleted_there_gets_a_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    service = Service(taken=2)
    assert tracked(tmp_path, service, monkeypatch) == [0, 1]
    first, second, third = service.ids
    assert (second, third) == (f"{first}-2", f"{first}-3")
    assert service.steps == [0, 1] and service.group == "lr"
    assert capsys.readouterr().out == ""


def test_an_id_that_is_refused_for_ever_ends_in_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert tracked(tmp_path, Service(taken=99), monkeypatch) == [0, 1]
    assert DELETED in capsys.readouterr().out
