"""Test the lines of k8s/train.sh and k8s/eval.sh: what they send, and what they say of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders.lab import CLUSTER, IMAGE, SITE, only, said, train
from tests.builders.published import EVAL, TRAIN, lines, name_of
from tests.fakes.fake_api import FakeApi

ROOT = Path(__file__).parent.parent
PUBLISHED = [line for line in lines(TRAIN) + lines(EVAL) if line.startswith("k8s/")]

pytestmark = pytest.mark.usefixtures("furnished")


def test_the_published_lines_make_26_jobs_and_a_second_time_none(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    words = [line.split() for line in PUBLISHED]
    first = [say(Path(door).stem, *rest, *SITE) for door, *rest in words]
    assert len(fake.names("jobs")) == 26 == sum(fake.created("jobs").values())
    (twin,) = [out for out in first if "nothing was sent" in out]
    assert "lmbda0_lr1e5 is the same configuration as lmbda_0_int4: now a name of it" in twin
    named = {name_of(line) for line in PUBLISHED if "train.sh" in line}
    known = fake.get("configmaps", "stillhouse-names")
    assert known and set(known["data"]) == named and len(set(known["data"].values())) == 23
    for door, *rest in words:
        assert "nothing was sent" in say(Path(door).stem, *rest, *SITE)
    assert sum(fake.created("jobs").values()) == 26
    assert fake.created("configmaps").most_common(1)[0][1] == 1, "the code travels once"


def test_a_dry_run_prints_the_object_that_is_sent(
    fake: FakeApi, say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(fake, "_route", _listening(fake._route, sent))
    for line in (PUBLISHED[5], PUBLISHED[-1]):
        door, *rest = line.split()
        printed = say(Path(door).stem, *rest, *SITE, "--dry-run")
        before = len(sent)
        say(Path(door).stem, *rest, *SITE)
        assert json.dumps(yaml.safe_load(printed), separators=(",", ":")).encode() in sent[before:]


def _listening(route: Any, sent: list[bytes]) -> Any:
    def listening(request: Any, reply: Any) -> None:
        sent.append(request.body)
        route(request, reply)

    return listening


def test_a_line_says_where_its_run_is_and_how_to_go_on(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    out = say(*train("mine", "--lmbda", "0"))
    job = only(fake)
    assert f"run directory: /runs/{job} of volume stillhouse-runs" in out
    for verb in ("logs mine -f", "status mine", "collect mine", "cancel mine"):
        assert f"stillhouse {verb} --backend cluster" in out
    told = say("status", "mine", *CLUSTER)
    assert told.splitlines()[0] == f"{job}: 1 point: 1 waiting"


def test_a_second_call_says_what_became_of_the_first(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    line = train("mine", "--lmbda", "0")
    say(*line)
    job = only(fake)
    fake.pending(job)
    assert "no node has 1 free nvidia.com/gpu" in say(*line)
    fake.run_pod(job)
    assert f"nothing was sent: {job} is there already, running" in say(*line)
    fake.fail(job, exit_code=43, message=said(43, "Diverged: NaN at step 7"))
    out = say(*line, code=1)
    assert "failed: Diverged: NaN at step 7" in out
    assert "`stillhouse retry mine --backend cluster`, then the same line" in out
    say("retry", "mine", *CLUSTER)
    assert fake.names("jobs") == []
    assert "sent: Job" in say(*line)
    fake.complete(job)
    assert "is there already, done" in say(*line)


def test_a_line_of_another_site_says_what_the_job_that_is_there_asks(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine", "--memory-gib", "9"))
    fake.pending(only(fake))
    out = say(*train("mine", "--memory-gib", "12"))
    assert (
        "sent from another site: memory_gib is 9.0 there and 12.0 here; `stillhouse cancel" in out
    )
    assert "another site" not in say(*train("mine", "--memory-gib", "9"))


def test_a_line_whose_job_is_gone_sends_it_again(fake: FakeApi, say: Callable[..., str]) -> None:
    line = train("mine", "--lmbda", "0")
    say(*line)
    job = only(fake)
    fake.complete(job)
    fake.remove("jobs", job)
    assert f"sent: Job {job}" in say(*line), "it will find itself done"


def test_a_name_that_means_another_configuration_is_refused_with_the_difference(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine", "--lmbda", "0"))
    (job,) = fake.names("jobs")
    error = say(*train("mine", "--lmbda", "0.5", "--learning-rate", "5e-6"), code=42)
    assert f'the name "mine" means {job} already' in error
    assert "learning_rate is not set there and 5e-06 here, lmbda is 0 there and 0.5 here" in error
    fake.remove("jobs", job)
    error = say(*train("mine", "--lmbda", "0.5"), code=42)
    assert "another configuration, whose Job is gone" in error
    assert fake.names("jobs") == []


def test_a_job_of_that_name_that_is_not_ours_is_left_alone(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    job = yaml.safe_load(say(*train("mine"), "--dry-run"))
    ours: dict[str, str] = job["metadata"]["labels"]
    for labels, how in (
        (ours | {"stillhouse/hash": "f" * 40}, "is there with another content"),
        ({"app": "another"}, "is there and is not ours"),
    ):
        job["metadata"]["labels"] = labels
        fake.put("jobs", job)
        assert how in say(*train("mine"), code=42)
        assert not fake.created("configmaps"), "neither the code nor a name"
        fake.remove("jobs", job["metadata"]["name"])


def test_an_evaluation_says_how_the_runs_stand_that_it_names(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("one", "--lmbda", "0"))
    fake.complete(only(fake))
    say(*train("two", "--lmbda", "1"))
    adapters = [
        word for name in ("one", "two", "three") for word in ("--lora-paths", f"dump/{name}")
    ]
    out = say("eval", "mine", "--pair", "tiny", *adapters, *SITE)
    told = {line.strip().split(":")[0]: line for line in out.splitlines() if "dump/" in line}
    assert "trained" in told["dump/one"] and "waiting" in told["dump/two"]
    assert "no run of that name is known" in told["dump/three"]
    job = only(fake, "eval")
    assert say("status", "mine", *CLUSTER).startswith("mine: 1 point: 1 waiting")
    fake.fail(job, exit_code=42, message=said(42, "ConfigError: dump/three: no such run"))
    assert "dump/three: no such run" in say("status", "mine", *CLUSTER, code=1)
    say("retry", job, *CLUSTER)
    assert job not in fake.names("jobs")


def test_a_line_with_json_prints_one_object(fake: FakeApi, say: Callable[..., str]) -> None:
    told = json.loads(say(*train("mine"), "--json"))
    assert told["sent"] is True and told["job"] == only(fake)
    assert [point["name"] for point in told["points"]] == ["mine"]
    assert json.loads(say(*train("mine"), "--json"))["sent"] is False


def test_a_pod_that_goes_on_without_its_job_is_seen_and_nothing_is_sent_beside_it(
    fake: FakeApi, say: Callable[..., str]
) -> None:
    say(*train("mine"))
    job = only(fake)
    pod = fake.run_pod(job)
    fake.let_go(job)
    out = say("status", "mine", *CLUSTER)
    assert "1 running" in out and f"pod {pod} goes on, its Job was deleted without it" in out
    assert "nothing was sent" in (out := say(*train("mine"))) and pod in out
    assert fake.names("jobs") == []


def test_a_run_that_still_saves_is_waited_for(fake: FakeApi, say: Callable[..., str]) -> None:
    fake.pods_linger = True
    say(*train("mine"))
    job = only(fake)
    fake.run_pod(job)
    assert "asked to save and stop: mine" in say("cancel", "mine", *CLUSTER)
    out = say(*train("mine"))
    assert "its Job is being deleted; the same line sends it again once it is gone" in out
    fake.end_pods(job, exit_code=85)
    assert "sent: Job" in say(*train("mine"))


def test_a_script_sends_its_line(fake: FakeApi, tmp_path: Path) -> None:
    words = [str(ROOT / "k8s" / "train.sh"), *PUBLISHED[0].split()[1:], "--image", IMAGE]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "run directory: /runs/" in done.stdout and len(fake.names("jobs")) == 1
