"""Test that a place where nothing can be written is one sentence, in whatever command it is named.

The tests may run as root, whom no mode stops. But /proc takes no files from anybody, and nobody can
make a directory below a file, or where a link leads nowhere.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse import cli
from stillhouse.entrypoints import eval_main, train_main
from stillhouse.errors import MISTAKE, ConfigError, ContractError, NodeFault, Unwritable
from stillhouse.files import (
    check_directory,
    explained_writing,
    link_path,
    make_directory,
    read_json,
    write_json,
)
from stillhouse.results.report import write_report
from tests.builders.sample_runs import Sample, write_sample

PROC = ["/proc/x", "/proc"]
NO_DIRECTORIES = ["a_file", "a_file/below", "nowhere", "nowhere/below", "a" * 300]
GRID = ["pair=tiny", "seeds=1", "max_steps=2"]
TINY = ["--pair=tiny", "--max-steps=2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "away")
    return tmp_path


@pytest.mark.parametrize("place", [*PROC, *NO_DIRECTORIES])
@pytest.mark.parametrize(
    "write",
    [
        make_directory,
        lambda place: write_json(place / "x.json", {}),
        lambda place: link_path(place / "x", Path("runs/tiny-0123456789")),
    ],
    ids=["directory", "file", "link"],
)
def test_who_writes_names_the_place_the_reason_and_what_to_do(
    place: str, write: Callable[[Path], None]
) -> None:
    says = rf"^{place}.*cannot be written \(.+\); mend that, or name another place"
    with pytest.raises(Unwritable, match=says):
        write(Path(place))


def test_what_passes_by_itself_stays_what_it_is() -> None:
    for number in (errno.ENOSPC, errno.EIO, errno.ESTALE):
        with pytest.raises(OSError, match=os.strerror(number)), explained_writing(Path("x")):
            raise OSError(number, os.strerror(number))


def test_a_volume_that_its_node_made_read_only_may_be_written_from_another_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STILLHOUSE_IN_POD", "1")
    with pytest.raises(NodeFault, match="Read-only"), explained_writing(Path("x")):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_directory_is_made_with_those_above_it_and_keeps_nothing(here: Path) -> None:
    make_directory(here / "a" / "b")
    assert [*(here / "a").rglob("*")] == [here / "a" / "b"]


@pytest.mark.parametrize("path", ["a_file/x.json", "nowhere/x.json", "loop", "a" * 300])
def test_a_file_that_cannot_be_read_where_it_is_is_named_or_not_there(path: str) -> None:
    Path("loop").symlink_to("loop")
    try:
        assert read_json(Path(path)) is None
    except ContractError as error:
        assert str(error).startswith(f"{path}: cannot be read")


def test_a_null_character_in_a_path_is_refused_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["status", "--runs", "a\0b"]) == MISTAKE
    assert "--runs 'a\\x00b': embedded null byte" in capsys.readouterr().err
    with pytest.raises(Unwritable, match=r"'a\\x00b': no path has a null character"):
        make_directory(Path("a\0b"))


@pytest.mark.parametrize("place", NO_DIRECTORIES)
def test_no_directory_of_runs_is_a_file_or_a_link_that_leads_nowhere(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError):
        check_directory(Path(place), "--runs")
    for words in (
        ["plan", *GRID], ["run", *GRID], ["status"], ["status", *GRID], ["report", "mine"],
        ["logs", "mine"], ["retry", "mine"], ["cancel", "mine"], ["collect", "mine"],
    ):  # fmt: skip
        assert cli.main([*words, "--runs", place]) == MISTAKE
        assert f"--runs {place}: " in capsys.readouterr().err


def check_said(code: int, said: str, start: str) -> None:
    assert code == MISTAKE
    (line,) = [line for line in said.splitlines() if line.startswith(("Unwritable", "ConfigError"))]
    assert line.partition(": ")[2].startswith(start)
    assert "Traceback" not in said


STARTS: dict[str, Callable[..., int]] = {
    "run": lambda *words: cli.main(["run", *GRID, *words]),
    "train.py": lambda *words: train_main([*TINY, *words]),
    "eval.py": lambda *words: eval_main(["--pair=tiny", "--suite=tiny", *words]),
    "preflight": lambda *words: cli.main(["preflight", *TINY, *words]),
    "prepare": lambda *words: cli.main(["prepare", "--pair=tiny", "--no-scores", *words]),
}


@pytest.mark.parametrize("place", ["/proc/x", "a_file", "nowhere"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((name, "--runs") for name in STARTS if name != "prepare"),
        ("run", "--cache-dir"),
        ("prepare", "--cache-dir"),
    ],
)
def test_a_place_that_cannot_be_written_is_a_mistake_of_its_option(
    command: str, option: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = STARTS[command](f"{option}={place}")
    check_said(code, capsys.readouterr().err, f"{option} {place}: ")


@pytest.mark.parametrize("place", ["/proc/x", "a_file/x", "nowhere/x"])
def test_an_output_dir_that_cannot_be_written_is_said_before_anything_is_trained(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = STARTS["train.py"](f"--output-dir={place}")
    check_said(code, capsys.readouterr().err, f"{place}: cannot be written")


def test_a_report_that_cannot_be_written_names_its_directory(here: Path) -> None:
    write_sample(here / "runs", Sample(name="grid", seeds=1))
    (here / "runs" / "reports").write_text("")
    with pytest.raises(Unwritable, match="reports/grid: cannot be written"):
        write_report("grid", here / "runs")
