"""Test that a damaged or odd file is one line of output, and everything else is still shown.

The line names the file and says what to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stillhouse
from stillhouse import cli
from stillhouse.errors import ContractError, visible
from stillhouse.results.report import write_report
from stillhouse.rundir import RunDir, link_path, sweep_leftovers, temporary_name, write_json
from stillhouse.sweep import registry
from tests.builders.sample_runs import Sample, write_sample

Said = Callable[..., tuple[int, str]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunDir]:
    """Two sweeps; the runs of the first."""
    monkeypatch.chdir(tmp_path)
    found = write_sample(Path("runs"), Sample(name="grid", seeds=1))
    write_sample(Path("runs"), Sample(name="other", seeds=1, axes={"lmbda": [0.25]}))
    return found


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def said(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main([*words])
        return code, "".join(capsys.readouterr())

    return said


def odd_files(run: RunDir) -> list[tuple[str, Path, bytes]]:
    """What is wrong, in which file of a run, and what the file then holds."""
    contract = json.loads((run.adapter / "stillhouse.json").read_bytes())
    score = json.loads(run.eval_file("tiny_gen").read_bytes())
    status = json.loads(run.status_file.read_bytes())
    record = json.loads(run.spec_file.read_bytes())

    def less(content: dict[str, Any], *names: str) -> bytes:
        return json.dumps({k: v for k, v in content.items() if k not in names}).encode()

    return [
        ("torn", run.status_file, b'{"pha'),
        ("a list", run.status_file, b"[]"),
        ("zero bytes", run.status_file, b"\0" * 64),
        ("empty", run.status_file, b""),
        ("deep", run.status_file, b"[" * 100_000),
        ("warnings in a list", run.status_file, json.dumps(status | {"warnings": []}).encode()),
        ("a step in words", run.status_file, json.dumps(status | {"step": "9"}).encode()),
        ("no versioned fields", run.spec_file, less(record, "versioned")),
        ("no code", run.spec_file, less(record, "code")),
        ("no number", run.spec_file,
         json.dumps(record | {"versioned": {"data": {"x": float("inf")}}}).encode()),
        ("a section of nothing", run.spec_file,
         json.dumps(record | {"spec": record["spec"] | {"rescue": None}}).encode()),
        ("another format", run.spec_file, json.dumps(record | {"format": 99}).encode()),
        ("no files", run.adapter / "stillhouse.json", less(contract, "files")),
        ("a file of no size", run.adapter / "stillhouse.json",
         json.dumps(contract | {"files": {"a": {}}}).encode()),
        ("a torn score", run.eval_file("tiny_gen"), b'{"key'),
        ("a score without a question", run.eval_file("tiny_gen"), less(score, "key")),
        ("a score in words", run.eval_file("tiny_gen"),
         json.dumps(score | {"value": "0.5"}).encode()),
    ]  # fmt: skip


def test_an_odd_file_is_named_by_every_verb_that_looks_and_hides_nothing_else(
    runs: list[RunDir], said: Said
) -> None:
    for what, file, content in odd_files(runs[0]):
        before = file.read_bytes()
        file.write_bytes(content)
        code, text = said("status", "grid")
        assert code == 42 and "grid: 3 points: 2 done, 1 unreadable" in text, (what, text)
        assert str(file) in text, (what, text)
        code, text = said("status", "grid", "--json")
        states = sorted(point["state"] for point in json.loads(text)["points"])
        assert states == ["done", "done", "unreadable"], what
        code, text = said("status")
        assert code == 42 and "other: 1 point: 1 done" in text and file.name in text, what
        assert said("status", "other")[0] == 0, what
        file.write_bytes(before)
    assert said("status")[0] == 0


def test_a_report_and_the_frame_have_the_other_points_and_say_which_is_missing(
    runs: list[RunDir],
) -> None:
    score = json.loads(runs[1].eval_file("tiny_gen").read_bytes())
    del score["samples"]
    runs[1].eval_file("tiny_gen").write_text(json.dumps(score))
    runs[0].eval_file("tiny_gen").write_bytes(b'{"key')
    frame: Any = stillhouse.load("grid")
    points = frame[frame["kind"] == "point"].drop_duplicates("id").set_index("id")
    assert points.loc[runs[0].id, "phase"] == "unreadable"
    assert "tiny_gen.json: not JSON" in points.loc[runs[0].id, "cause"]
    assert "samples: field required" in points.loc[runs[1].id, "cause"]
    assert points["phase"].tolist().count("done") == 1
    page = write_report("grid", Path("runs"))
    assert "tiny_gen.json: not JSON" in page.read_text()


def test_a_sweeps_record_that_is_odd_is_one_line_and_its_runs_are_found_by_id(
    runs: list[RunDir], said: Said
) -> None:
    record = Path("runs/sweeps/grid.json")
    whole = json.loads(record.read_bytes())
    for content in (b'{"format":1}', b"{", json.dumps(whole | {"points": [{}]}).encode(),
                    json.dumps(whole | {"suite": {"tasks": 5}}).encode(),
                    json.dumps(whole | {"cache_dir": []}).encode(),
                    json.dumps(whole | {"commits": ["a"]}).encode()):  # fmt: skip
        record.write_bytes(content)
        code, text = said("status")
        assert code == 42 and "other: 1 point: 1 done" in text and str(record) in text, content
        assert said("status", "grid")[0] == 42
        assert said("status", "other")[0] == 0
        code, text = said("status", runs[0].id)
        assert code == 0 and runs[0].id[:6] in text
        code, text = said("report", "grid")
        assert code == 42 and str(record) in text


def test_a_baseline_that_says_something_else_is_named_and_its_points_are_shown(
    runs: list[RunDir], said: Said
) -> None:
    teacher = next(Path("runs/baselines").glob("teacher-*/baseline.json"))
    whole = json.loads(teacher.read_bytes())
    for odd in (
        {"label": 1},
        whole | {"pair": {}},
        whole | {"pair": whole["pair"] | {"student": 5}},
    ):
        teacher.write_text(json.dumps(odd))
        for words in (("status", "grid"), ("status", "grid", "--json")):
            code, text = said(*words)
            assert code in (0, 1, 42) and "done" in text, odd
        code, text = said("report", "grid")
        assert code == 0 or str(teacher) in text, odd


def test_metrics_that_are_no_json_are_named_by_line(runs: list[RunDir]) -> None:
    file = runs[0].metrics_file
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + b"\0" * 40 + b"\n" + lines[2])
    with pytest.raises(ContractError, match=r"metrics\.jsonl, line 3: not JSON"):
        runs[0].metrics()
    file.write_bytes(b"".join(lines[:2]) + b'{"loss": 1}\n')
    with pytest.raises(ContractError, match="line 3: no object with a step"):
        runs[0].metrics()
    file.write_bytes(b"".join(lines[:2]) + b'{"step": 2, "lo')  # cut by a kill
    assert [one["step"] for one in runs[0].metrics()] == [0, 1]


# ------------------------------------------------------------------------- names and leftovers


def test_two_writers_of_one_name_never_share_a_temporary_file(tmp_path: Path) -> None:
    names = {temporary_name(tmp_path / "a.json") for _ in range(1000)}
    assert len(names) == 1000


def test_a_killed_writers_leftover_stops_nobody_and_is_swept_up_when_it_is_old(
    tmp_path: Path,
) -> None:
    old, new = tmp_path / ".a.json.17.tmp", temporary_name(tmp_path / "b.json")
    other = tmp_path / ".a.json.mine"
    (tmp_path / ".mine.17.tmp").symlink_to("nowhere")
    for file in (old, new, other):
        file.write_text("half")
    hours_ago = old.stat().st_mtime - 7200
    os.utime(old, (hours_ago, hours_ago))
    os.utime(tmp_path / ".mine.17.tmp", (hours_ago, hours_ago), follow_symlinks=False)
    run = RunDir(tmp_path / "x-0123456789")
    run.path.mkdir()
    link_path(tmp_path / "mine", run.path)
    write_json(tmp_path / "a.json", {})
    sweep_leftovers(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {new.name, other.name, "a.json", "mine", "x-0123456789"}


def make_old(path: Path) -> None:
    """As if nobody had written there for two hours."""
    for entry in (path, *path.rglob("*")):
        long_ago = entry.stat().st_mtime - 7200
        os.utime(entry, (long_ago, long_ago))


def test_a_directory_in_which_somebody_still_writes_is_nobodys_leftover(tmp_path: Path) -> None:
    dead, alive = temporary_name(tmp_path / "adapter"), temporary_name(tmp_path / "adapter")
    for home in (dead, alive):
        (home / "deep").mkdir(parents=True)
        (home / "deep/weights").write_text("half")
        make_old(home)
    (alive / "deep/weights").write_text("more")  # hours after its directories were made
    sweep_leftovers(tmp_path)
    assert [*tmp_path.iterdir()] == [alive]
    sweep_leftovers(tmp_path / "nowhere")


def test_leftovers_go_wherever_something_is_written_again(
    runs: list[RunDir], said: Said, tmp_path: Path
) -> None:
    from stillhouse.distill.cache import made_once

    places = [Path("runs/reports/grid"), Path("runs/sweeps"), Path("cache/pairs")]
    left = [temporary_name(place / "x") for place in places]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
        make_old(file)
    write_report("grid", Path("runs"))
    registry.write_record(Path("runs"), json.loads(Path("runs/sweeps/grid.json").read_bytes()))

    def make(into: Path) -> dict[str, Any]:
        (into / "rows").write_text("all")
        return {"rows": 3}

    assert made_once(Path("cache/pairs/tiny"), print, make) == {"rows": 3}
    assert not any(file.exists() for file in left)
    names: list[str] = []
    for home in ("cache/pairs/a", "cache/pairs/b"):  # nobody's else, and gone where making fails

        def breaks(into: Path) -> dict[str, Any]:
            names.append(into.name.split(".")[2])
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            made_once(Path(home), print, breaks)
    assert len({*names}) == 2
    assert not [*Path("cache/pairs").glob(".*")]


def test_what_a_terminal_would_act_on_is_spelt_out(runs: list[RunDir], said: Said) -> None:
    assert visible("a\x1b[2J\x07b\r\u202ec\td\n") == "a\\x1b[2J\\x07b\\r\\u202ec\td\n"
    runs[0].update_status(phase="failed", exit_code=42, cause="bad\x1b]0;owned\x07 row")
    (runs[0].adapter / "stillhouse.json").unlink()
    runs[0].log_file.write_text("10%\r20%\nstep \x1b[31m3\n")
    for verb, target in (("status", "grid"), ("plan", "pair=tiny"), ("logs", "grid")):
        text = said(verb, target)[1]
        assert not [c for c in text if ord(c) < 32 and c not in "\n\t"]
    assert "step \\x1b[31m3" in text and "10%\n20%\n" in text
