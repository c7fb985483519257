"""Run the published command lines on a real control plane, as their readers would.

Nothing is trained: the nodes are fake, and their pods report success.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.cli import main
from tests.builders.published import EVAL, TRAIN, lines
from tests.cluster.cluster import until
from tests.cluster.desk import AWAY, ROOT, SITE, Desk, end_of

pytestmark = pytest.mark.cluster

PUBLISHED = [line.split() for line in lines(TRAIN) + lines(EVAL) if line.startswith("k8s/")]
BY_SCRIPT = (0, 1, 10, 26)  # these go through the scripts; one of each is enough for the shell
Say = Callable[..., str]


@pytest.fixture
def say(ada: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """A line, with a site that works; what it printed. Most are typed in this very process: that
    saves a second for each."""
    monkeypatch.chdir(ada.folder)
    for name in ("USER", "KUBECONFIG"):
        monkeypatch.setenv(name, ada.env()[name])

    def send(line: list[str], by_script: bool = False) -> str:
        door, *words = line
        if by_script:
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            command = [str(ROOT / door), *words, *SITE]
            environment = {**os.environ, "PATH": path}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout
        capsys.readouterr()
        code = main([Path(door).stem, *words, *SITE])
        said = capsys.readouterr()
        assert code == 0, said.out + said.err
        return said.out

    return send


def test_27_lines_make_26_jobs_that_complete_and_a_second_time_none(ada: Desk, say: Say):
    assert len(PUBLISHED) == 27
    first = [say(line, by_script=nth in BY_SCRIPT) for nth, line in enumerate(PUBLISHED)]
    assert sum("sent: Job" in said for said in first) == 26
    (twin,) = [said for said in first if "nothing was sent" in said]
    assert "lmbda0_lr1e5 is the same configuration as lmbda_0_int4" in twin
    until("all of them are made", lambda: ada.seen.count() == 26)
    until("all of them are complete", lambda: set(map(end_of, ada.seen.jobs())) == {"Complete"})
    assert (ada.seen.count("train"), ada.seen.count("eval")) == (23, 3)

    before = ada.versions()
    second = [say(line, by_script=nth in BY_SCRIPT) for nth, line in enumerate(PUBLISHED)]
    assert all("nothing was sent" in said for said in second)
    assert all("done" in said for said in second)
    assert ada.versions() == before, "nothing was written"
    assert ada.seen.count() == 26

    # The Jobs are gone. A line has no ledger: its one Job finds on the volume that it is done.
    ada.delete_jobs()
    assert "sent: Job" in say(PUBLISHED[0], by_script=True)
    until("one more is made", lambda: ada.seen.count() == 27)
    assert ada.seen.made_twice() == [ada.seen.jobs()[-1]["metadata"]["name"]]


def test_a_sweep_that_is_done_sends_nothing_once_its_jobs_are_gone(ada: Desk):
    sweep = ada.sweep(
        "two",
        "base: {pair: tiny}",
        "grid: {lmbda: [0, 1]}",
        "eval: {suite: tiny}",
    )
    ada.say("run", sweep, *SITE, *AWAY)
    until("all is made", lambda: ada.seen.count() == 4)
    ada.delete_jobs()
    before = ada.versions()
    assert "nothing left to do" in ada.say("run", sweep, *SITE, *AWAY)
    assert ada.status("two")["totals"]["done"] == 2
    assert ada.seen.count() == 4
    same = {key: version for key, version in ada.versions().items() if "sweep" not in key[1]}
    assert same.items() <= before.items(), "nothing but the sweep itself was written down anew"
