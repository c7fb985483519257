"""Follow the cluster part of docs/your-own.md on the fake API server, with every command of it."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from test_cluster_collect import kubelet
from test_cluster_guide import commands
from test_cluster_push import Lab

from stillhouse import transfer
from stillhouse.cli import main
from stillhouse.compose import _composed  # pyright: ignore[reportPrivateUsage]
from tests.builders.lab import SITE, furnish
from tests.fakes.fake_api import FakeApi

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "your-own.md").read_text()
LINES = commands(PAGE.split("## On a cluster")[1])
FILES = re.compile(r"^```(?:yaml|python)\n# (\S+)\n(.*?)^```", re.M | re.S)
VERBS = "push push push plan run preflight run status collect report"


def test_the_way_is_pushed_planned_run_and_collected():
    assert [shlex.split(line)[1] for line in LINES] == VERBS.split()


def test_followed_on_a_cluster_every_command_does_what_the_page_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "memory"))
    _composed.cache_clear()  # it holds what the environment said
    request.addfinalizer(_composed.cache_clear)
    for name, text in FILES.findall(PAGE):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("tasks/sums.jsonl").write_text('{"question": "2+3", "answer": "5"}\n')
    Path("rows.jsonl").write_text('{"prompt": "How much is 2+3?"}\n')

    def follow(line: str, code: int = 0) -> str:
        words = shlex.split(line)[1:]
        ended = main([*words, *([] if words[0] == "report" else SITE)])
        out, error = capsys.readouterr()
        assert ended == code, f"{line}\n{out}{error}"
        return out

    with FakeApi() as fake:
        furnish(fake)
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "kubeconfig")))
        lab = Lab(fake, tmp_path)
        (tmp_path / "models/large").mkdir()
        (tmp_path / "models/large/config.json").write_text("{}")

        def start(job: str) -> None:
            labels = (fake.get("jobs", job) or {})["metadata"]["labels"]
            holds = labels["stillhouse/kind"] in ("push", "collect")
            (fake.run_pod if holds else fake.complete)(job)

        def send(pod: str, command: list[str]) -> tuple[Iterable[bytes], bytes, int]:
            out = io.BytesIO()
            transfer.send(transfer.unpack(command[4]) | {"runs": str(tmp_path / "volume")}, out)
            return [out.getvalue()], b"", 0

        fake.execs = send
        with kubelet(fake, start):
            paths = [re.findall(r"/cache/pushed/\S+", follow(line))[0] for line in LINES[:3]]
            assert {path.removeprefix("/cache/pushed/") for path in paths[:2]} < {
                path.name for path in (lab.volume / "pushed").iterdir()
            }
            sweep, lines = Path("mine_there.yaml").read_text(), LINES
            for kind, path in zip(("small", "large", "rows"), paths, strict=True):
                sample = rf"/cache/pushed/{kind}-[0-9a-f]{{12}}(/rows.jsonl)?"
                assert re.search(sample, sweep)
                sweep = re.sub(sample, path, sweep)
                lines = [re.sub(sample, path, line) for line in lines]
            Path("mine_there.yaml").write_text(sweep)
            plan, dry_run, preflight, run, status, collect, report = lines[3:]
            assert "6 points: 6 new" in follow(plan)
            jobs = list(yaml.safe_load_all(follow(dry_run)))
            args = [job["spec"]["template"]["spec"]["containers"][0]["args"] for job in jobs]
            assert {json.loads(words[-1])["pair"]["student"] for words in args} == {paths[0]}
            assert yaml.safe_load(follow(preflight))["kind"] == "Job"
            assert "6 done" in follow(run)
            assert "6 done" in follow(status)
            assert "8 are not there yet" in follow(collect, code=1), "no pod of this test trains"
            follow(report)
