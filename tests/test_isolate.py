"""Test what is charged to one row of an evaluation, and what ends all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import (
    ConfigError,
    ContractError,
    Interrupted,
    NodeFault,
    NotScored,
    OutOfMemory,
)
from stillhouse.evals.isolate import DEATHS, Isolation
from stillhouse.rundir import eval_note, read_eval_note


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "tiny-gkd-0123456789"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STILLHOUSE_EXIT_FILE", str(tmp_path / "exit"))
    return tmp_path / "exit"


def states(told: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    return [(line["row"], line["state"]) for line in lines]


def test_a_note_that_somebody_tore_says_nothing(home: Path) -> None:
    home.mkdir()
    for kind in ("begun", "error"):
        eval_note(home, kind).write_text("{")
        assert read_eval_note(home, kind) == {}
    assert not Isolation().is_suspect(home)


@pytest.mark.parametrize(
    ("error", "code", "raised"),
    [
        (ContractError("NaN"), 42, ContractError),
        (RuntimeError("shape"), 1, NotScored),
        (KeyError("x"), 1, NotScored),
    ],
)
def test_what_a_row_does_wrong_is_noted_and_raised_in_the_end(
    home: Path, told: Path, error: Exception, code: int, raised: type[Exception]
) -> None:
    isolation = Isolation()
    with isolation.scoring(home):
        raise error
    other = home.parent / "baselines" / "teacher-0123456789"
    with isolation.scoring(other):
        pass
    note = read_eval_note(home, "error")
    assert (note["code"], note["cause"]) == (code, f"{type(error).__name__}: {error}")
    assert bool(note["traceback"]) == (code == 1)
    assert not eval_note(home, "begun").exists()
    with pytest.raises(raised, match=r"1 row could not be scored, all others are: tiny-gkd-0123"):
        isolation.check()
    assert states(told) == [
        ("0123456789", "begun"),
        ("0123456789", "failed"),
        ("teacher-0123456789", "begun"),
        ("teacher-0123456789", "done"),
    ]
    isolation.forget(home)
    assert read_eval_note(home, "error") == {}


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("no such task"), OutOfMemory("x"), Interrupted("x"), NodeFault("x"),
        MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate"), KeyboardInterrupt(),
        ContractError("does not fit its base: CUDA error: out of memory"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_all_ends_all_and_blames_no_row(
    home: Path, told: Path, error: BaseException
) -> None:
    isolation = Isolation()
    with pytest.raises(type(error)), isolation.scoring(home):
        raise error
    assert isolation.failed == {} and not isolation.is_suspect(home)
    assert states(told)[-1] == ("0123456789", "open")


def test_an_error_after_which_nothing_is_computed_counts_as_a_death(home: Path, told: Path) -> None:
    isolation = Isolation()
    error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError), isolation.scoring(home):
        raise error
    assert isolation.is_suspect(home)
    assert states(told) == [("0123456789", "begun")]


DEAD: list[Any] = []  # contexts that nobody leaves: one that is collected is left


def die(home: Path, monkeypatch: pytest.MonkeyPatch, job: str | None) -> Isolation:
    """A process that dies at this row; what the next one finds."""
    if job is None:
        monkeypatch.delenv("STILLHOUSE_JOB", raising=False)
    else:
        monkeypatch.setenv("STILLHOUSE_JOB", job)
    scoring = Isolation().scoring(home)
    scoring.__enter__()
    DEAD.append(scoring)
    return Isolation()


def test_a_pod_gives_a_row_up_after_some_deaths_of_its_own_job(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die(home, monkeypatch, "another Job")
    for _ in range(DEATHS - 1):
        isolation = die(home, monkeypatch, "uid-1")
        assert isolation.is_suspect(home) and not isolation.failed
    isolation = die(home, monkeypatch, "uid-1")
    assert not isolation.is_suspect(home)
    ((code, cause),) = isolation.failed.values()
    assert code == 42 and cause.startswith(f"{DEATHS} processes in a row died while they scored it")
    assert not Isolation().is_suspect(home), "who wants it tried again has it tried afresh"


def test_on_a_machine_whose_launcher_counts_a_row_is_a_suspect_for_ever(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(DEATHS + 2):
        isolation = die(home, monkeypatch, None)
        assert isolation.is_suspect(home) and not isolation.failed
    with isolation.scoring(home):
        pass
    assert not isolation.is_suspect(home)


def test_a_row_whose_directory_takes_no_notes_fails_alone_and_in_words(
    tmp_path: Path, told: Path
) -> None:
    """/proc/self is a directory in which nobody can make a file, root included."""
    home, other = tmp_path / "tiny-gkd-0123456789", tmp_path / "tiny-gkd-9876543210"
    home.symlink_to("/proc/self")
    isolation = Isolation()
    with isolation.scoring(home):
        raise ContractError("NaN")
    with isolation.scoring(other):
        pass
    assert isolation.failed.keys() == {home}
    assert states(told)[-1] == ("9876543210", "done")
    with pytest.raises(ContractError, match="NaN"):
        isolation.check()


@pytest.mark.parametrize("kind", ["begun", "error"])
def test_a_note_that_cannot_be_replaced_fails_its_row(home: Path, kind: Any) -> None:
    (eval_note(home, kind) / "x").mkdir(parents=True)
    isolation = Isolation()
    isolation.forget(home)
    with isolation.scoring(home):
        pass
    ((code, cause),) = isolation.failed.values()
    assert code == 42 and cause.startswith("Unwritable: ") and "cannot be written" in cause


def test_what_several_rows_rest_on_fails_all_of_them_and_no_other(tmp_path: Path) -> None:
    homes = [tmp_path / f"tiny-gkd-{number:010}" for number in range(3)]
    isolation = Isolation()
    with isolation.guard(*homes[:2]):
        raise ContractError("their base cannot be loaded")
    assert isolation.failed.keys() == {*homes[:2]}
