"""Test `collect`: results arrive complete and verified, and never overwrite other work."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse import transfer
from stillhouse.errors import ConfigError, Interrupted
from stillhouse.results.report import write_report
from stillhouse.results.table import load
from stillhouse.rundir import RunDir, Runs, read_json, write_atomic, write_json
from stillhouse.spec import SiteSpec
from stillhouse.sweep import registry
from stillhouse.sweep.cluster import collect as collecting
from stillhouse.sweep.cluster.collect import Collected, collect
from stillhouse.sweep.cluster.connect import Cluster, connect
from stillhouse.sweep.cluster.manifest import SELECTOR
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from stillhouse.sweep.snapshot import observe
from tests.builders.sample_runs import Sample, write_sample
from tests.fakes.fake_api import FakeApi

IMAGE = f"stillhouse@sha256:{'1' * 64}"
Answer = tuple[Iterable[bytes], bytes, int]


class Lab:
    """A cluster with a volume, and a laptop that does not mount it."""

    def __init__(self, fake: FakeApi, cluster: Cluster, place: Path) -> None:
        self.fake, self.cluster = fake, cluster
        self.volume, self.home = place / "volume", place / "home"
        self.said: list[str] = []
        self.asked: list[transfer.Json] = []
        self.spoil: Callable[[int, bytes], bytes] = lambda turn, stream: stream
        write_sample(self.volume, Sample(name="grid", seeds=2, unstarted=[5], failed={4: "NaN"}))
        fake.execs = self.answer

    def answer(self, pod: str, command: list[str]) -> Answer:
        """What `exec` does: the sender (tests/test_transfer.py has it as a process), with the
        volume where the pod would have it."""
        assert command[:4] == ["python", "/bundle/pod.py", "send", "--"]
        request = transfer.unpack(command[4])
        assert request["runs"] == "/runs"
        self.asked.append(request)
        out = io.BytesIO()
        code = transfer.send(request | {"runs": str(self.volume)}, out)
        stream = self.spoil(len(self.asked), out.getvalue())
        half = len(stream) // 2
        return [stream[:half], stream[half:]], b"", code

    @property
    def site(self) -> SiteSpec:
        sweep = load_sweep(None, ["pair=tiny", f"image={IMAGE}"], self.home, "cluster")
        return dataclasses.replace(sweep.site, patience_s=1)

    @property
    def sweep(self) -> Sweep:
        found = registry.read(self.volume, "grid")
        assert found is not None
        return dataclasses.replace(found, runs=self.home)

    def collect(self, adapters: bool = False, sweep: Sweep | None = None) -> Collected:
        return collect(
            self.cluster, self.site, sweep or self.sweep, self.home, adapters, self.said.append
        )

    def run(self, index: int, root: Path | None = None) -> RunDir:
        return RunDir((root or self.home) / self.sweep.points[index].directory)


@contextlib.contextmanager
def kubelet(fake: FakeApi, starts: Callable[[str], object]) -> Iterator[None]:
    """Calls `starts` with the name of each Job, as soon as it is there."""
    cluster = connect(None, None)
    version = next(iter(cluster.pages("jobs")))[1]

    def work() -> None:
        with contextlib.suppress(Interrupted):
            for seen in cluster.watch("jobs", SELECTOR, version, 60):
                if seen.kind == "ADDED":
                    starts(seen.object["metadata"]["name"])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        cluster.close()
        thread.join()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with FakeApi() as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "kubeconfig")))
        cluster = connect(None, None)
        cluster.first_delay_s = 0.001
        with kubelet(fake, fake.run_pod):
            yield Lab(fake, cluster, tmp_path)
        cluster.close()


def files(root: Path) -> dict[str, bytes]:
    """Everything below a directory of runs that a person sees, links as what they lead to."""
    found = {p.relative_to(root).as_posix(): p for p in root.rglob("*")}
    return {
        name: bytes(path.readlink()) if path.is_symlink() else path.read_bytes()
        for name, path in sorted(found.items())
        if not name.startswith(".") and (path.is_symlink() or path.is_file())
    }


def test_small_files_come_home_and_the_report_is_that_of_the_volume(lab: Lab, tmp_path: Path):
    collected = lab.collect()
    assert (len(collected.came), collected.unchanged, collected.kept) == (8, 0, {})
    assert collected.missing == [lab.sweep.points[5].directory]
    home, volume = files(lab.home), files(lab.volume)
    assert {n for n in volume if n not in home} == {
        *(n for n in volume if n.endswith("adapter_model.safetensors")), "sweeps/grid.json",
    }  # fmt: skip
    assert {n: b for n, b in home.items() if not n.endswith("collected.json")}.items() <= (
        volume.items()
    )
    shutil.copytree(lab.volume / "sweeps", lab.home / "sweeps")  # what the verb does
    there, here = load("grid", lab.volume), load("grid", lab.home)
    elsewhere = ["file"]
    assert here.drop(columns=elsewhere).equals(there.drop(columns=elsewhere))
    assert write_report("grid", lab.home).is_file()
    assert observe(lab.sweep)


def test_the_job_is_gone_when_all_is_here(lab: Lab):
    lab.collect()
    assert sum(lab.fake.created("jobs").values()) == sum(lab.fake.deleted("jobs").values()) == 1
    assert lab.fake.names("jobs") == []


def test_what_is_here_already_is_not_sent_again(lab: Lab):
    lab.collect()
    before = files(lab.home)
    again = lab.collect()
    assert (again.files, again.came, again.unchanged) == (0, [], 8)
    assert files(lab.home) == before
    lab.run(0, lab.volume).update_status(step=61)
    changed = lab.collect()
    assert (changed.came, changed.unchanged) == ([lab.sweep.points[0].directory], 7)
    assert lab.run(0).status()["step"] == 61


def test_a_run_without_its_weights_was_trained_and_is_not_scored_from_here(lab: Lab):
    lab.collect()
    assert lab.run(0).was_trained() and not lab.run(0).is_trained()
    assert not lab.run(4).was_trained()  # it failed
    lab.run(0).collected_file.unlink()
    assert not lab.run(0).was_trained()


def test_adapters_come_on_request_and_once(lab: Lab):
    lab.collect()
    with_adapters = lab.collect(adapters=True)
    assert with_adapters.unchanged == 8
    assert [lab.run(i).is_trained() for i in range(6)] == [True] * 4 + [False] * 2
    assert len(with_adapters.came) == 4
    again = lab.collect(adapters=True)
    assert (again.files, again.came) == (0, [])
    lab.run(0, lab.volume).update_status(eval_cause="later")
    lab.collect()
    assert lab.run(0).is_trained()  # what it has of the same adapter stays


def test_verdicts_of_preflights_come_home_unless_something_newer_is_known(lab: Lab):
    there, here = Runs(lab.volume).verdicts, Runs(lab.home).verdicts
    for name, created in {"new": 5, "newer": 7, "older": 3}.items():
        write_json(there / f"{name}-0123456789.json", {"verdict": "likely", "created": created})
    for name in ("newer", "older"):
        write_json(here / f"{name}-0123456789.json", {"verdict": "unsure", "created": 5})
    found = lab.collect()
    assert found.verdicts == 2
    assert "2 verdicts of preflights came" in " ".join(found.lines(lab.sweep))
    said = {path.name[:-16]: (read_json(path) or {})["verdict"] for path in here.glob("*.json")}
    assert said == {"new": "likely", "newer": "likely", "older": "unsure"}
    assert lab.collect().verdicts == 0


def test_adapters_are_asked_for_by_size(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collecting, "BATCH_BYTES", 15)  # two of seven bytes
    lab.collect(adapters=True)
    sizes = [len(a["directories"]) for a in lab.asked if a["files"] == list(collecting.WEIGHTS)]
    assert sizes == [2, 2]


def test_thousands_of_runs_are_asked_for_in_batches(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(collecting, "BATCH", 4)
    lab.collect()
    asked = [r["directories"] for r in lab.asked if r["files"] == list(collecting.SMALL)]
    assert [len(directories) for directories in asked] == [4, 4, 1]
    assert "8 of 9 directories" in " ".join(lab.said)


def test_a_batch_fits_into_a_url():
    digests = [hashlib.sha256(bytes([i, 1])).hexdigest() for i in range(collecting.BATCH)]
    have = {f"qwen3-4b-30b-on-policy-gkd-{text[:10]}": text[-16:] for text in digests}
    request = {"runs": "/runs", "directories": list(have), "files": collecting.SMALL, "have": have}
    assert len(transfer.pack(request)) < 7500  # of the 8192 that some proxies take


def test_names_lead_to_their_runs_here_too(lab: Lab):
    Runs(lab.volume).link_name("best", lab.run(1, lab.volume))
    lab.collect()
    assert (lab.home / "names" / "best").resolve() == lab.run(1).path.resolve()


def test_a_name_that_means_another_run_here_is_left_alone(lab: Lab):
    Runs(lab.volume).link_name("best", lab.run(1, lab.volume))
    Runs(lab.home).link_name("best", RunDir(lab.home / "tiny-gkd-0123456789"))
    collected = lab.collect()
    assert "already means tiny-gkd-0123456789" in collected.kept["names/best"]
    assert len(collected.came) == 8


# --------------------------------------------------------------------- nobody's own work


def test_a_run_of_this_machine_is_left_alone(lab: Lab):
    directory = lab.sweep.points[0].directory
    shutil.copytree(lab.run(0, lab.volume).path, lab.home / directory)
    before = files(lab.home)
    collected = lab.collect(adapters=True)
    assert collected.kept == {
        directory: "this machine's own work; move it away to have the cluster's"
    }
    assert before.items() <= files(lab.home).items()
    assert directory not in [d for request in lab.asked for d in request["directories"]]
    assert "left alone, 1: this machine's own work" in "\n".join(collected.lines(lab.sweep))


def test_a_run_that_was_changed_here_since_it_came_is_left_alone(lab: Lab):
    lab.collect()
    lab.run(0).update_status(phase="waiting", cause="retry was asked for")
    assert lab.sweep.points[0].directory in lab.collect().kept
    assert lab.run(0).status()["phase"] == "waiting"


def test_a_run_that_came_from_another_volume_is_left_alone(lab: Lab):
    lab.collect()
    marker = read_json(lab.run(0).collected_file) or {}
    write_json(lab.run(0).collected_file, marker | {"from": "elsewhere"})
    assert lab.collect().kept[lab.sweep.points[0].directory].startswith("came from elsewhere")


def test_a_run_that_a_process_here_works_on_is_left_alone(lab: Lab):
    lab.collect()
    with lab.run(0).lock():
        assert "at work on it" in lab.collect().kept[lab.sweep.points[0].directory]


def test_a_directory_whose_content_is_another_point_is_refused(lab: Lab):
    record = read_json(lab.run(0, lab.volume).spec_file) or {}
    record["versioned"]["optim"]["learning_rate"] = 1.0
    write_json(lab.run(0, lab.volume).spec_file, record)
    collected = lab.collect()
    assert "its content is not the point" in collected.kept[lab.sweep.points[0].directory]
    assert not lab.run(0).path.exists()
    assert len(collected.came) == 7


def test_an_adapter_that_is_not_whole_is_refused(lab: Lab):
    weights = lab.run(0, lab.volume).adapter / "adapter_model.safetensors"
    write_atomic(weights, b"torn")
    collected = lab.collect(adapters=True)
    assert "not whole" in collected.kept[lab.sweep.points[0].directory]
    assert not lab.run(0).is_trained() and lab.run(1).is_trained()


def test_two_collects_do_not_write_at_once(lab: Lab):
    with collecting._alone(lab.home.parent), pytest.raises(ConfigError, match="another"):  # noqa: SIM117
        with collecting._alone(lab.home.parent):
            pass


# ------------------------------------------------------------------------------ bad days


def test_a_stream_that_is_cut_is_asked_for_again(lab: Lab):
    lab.spoil = lambda turn, stream: stream[: len(stream) * 2 // 3] if turn < 3 else stream
    assert len(lab.collect().came) == 8
    assert [request["directories"] for request in lab.asked[:3]] == [
        lab.asked[0]["directories"]
    ] * 3
    assert "sending broke" in " ".join(lab.said)


def test_of_streams_that_are_always_cut_nothing_is_kept(lab: Lab):
    lab.spoil = lambda turn, stream: stream[: len(stream) // 2]
    with pytest.raises(Interrupted, match="4 times in a row"):
        lab.collect()
    assert files(lab.home) == {}
    assert lab.fake.names("jobs") == []


def test_a_file_that_is_not_what_the_manifest_says_is_not_kept(lab: Lab, tmp_path: Path):
    def forged(turn: int, stream: bytes) -> bytes:
        return _with_another_digest(stream, tmp_path)

    lab.spoil = forged
    with pytest.raises(Interrupted, match="not what was sent"):
        lab.collect()
    assert files(lab.home) == {}


def _with_another_digest(stream: bytes, place: Path) -> bytes:
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(stream), mode="r:gz") as old,
        tarfile.open(fileobj=out, mode="w:gz") as new,
    ):
        for member in old:
            content: Any = old.extractfile(member)
            data: bytes = content.read()
            if member.name == transfer.MANIFEST:
                manifest = json.loads(data)
                next(iter(manifest["files"].values()))["sha256"] = "0" * 64
                data = json.dumps(manifest).encode()
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return out.getvalue()


def test_interrupted_in_the_middle_the_same_command_goes_on(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collecting, "BATCH", 3)

    def said(text: str) -> None:
        if text.startswith("6 of"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="the same command goes on"):
        collect(lab.cluster, lab.site, lab.sweep, lab.home, False, said)
    assert lab.fake.names("jobs") == []
    rest = lab.collect()
    assert (len(rest.came), rest.unchanged) == (3, 5)


def test_leftovers_of_a_collect_that_was_killed_do_no_harm(lab: Lab):
    write_atomic(lab.home / collecting.STAGE / "came" / "tiny-gkd-1" / "spec.json", b"torn")
    lab.collect()
    assert not (lab.home / collecting.STAGE).exists()


def test_a_pod_that_is_evicted_is_replaced(lab: Lab):
    def evict(turn: int, stream: bytes) -> bytes:
        if turn > 1:
            return stream
        [job] = lab.fake.names("jobs")
        lab.fake.disrupt(job)
        lab.fake.run_pod(job)
        return stream[:100]

    lab.spoil = evict
    assert len(lab.collect().came) == 8


def test_a_job_that_somebody_deletes_is_made_again(lab: Lab):
    def delete(turn: int, stream: bytes) -> bytes:
        if turn > 1:
            return stream
        [job] = lab.fake.names("jobs")
        lab.fake.remove("jobs", job)
        return b""

    lab.spoil = delete
    assert len(lab.collect().came) == 8
    assert sum(lab.fake.created("jobs").values()) == 2


def test_a_pod_that_nobody_asked_for_too_long_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with FakeApi() as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "kubeconfig")))
        cluster = connect(None, None)
        lab = Lab(fake, cluster, tmp_path)
        first: list[str] = []

        def start(job: str) -> None:
            (fake.run_pod if first else fake.complete)(job)
            first.append(job)

        with kubelet(fake, start):
            assert len(lab.collect().came) == 8
        assert len(first) == 2 and fake.names("jobs") == []
        cluster.close()


def test_a_right_that_is_missing_is_named(lab: Lab):
    lab.fake.deny("get", "pods", sub="exec")
    lab.fake.deny("create", "pods", sub="exec")
    with pytest.raises(ConfigError, match="stillhouse-collector of k8s/access.yaml allow it"):
        lab.collect()
    assert lab.fake.names("jobs") == []


def test_an_image_without_digest_is_refused_before_anything_is_sent(lab: Lab):
    site = dataclasses.replace(lab.site, image="stillhouse:latest")
    with pytest.raises(ConfigError, match="digest"):
        collect(lab.cluster, site, lab.sweep, lab.home, False, lab.said.append)
    assert lab.fake.created("jobs").total() == 0


@pytest.mark.parametrize(
    ("why", "message", "said"),
    [
        ("Unschedulable", "0/3 nodes are available: 3 Insufficient cpu.", "no node"),
        ("ImagePullBackOff", "Back-off pulling image", "image not pulled"),
        ("FailedMount", 'MountVolume.SetUp failed for volume "runs": x', "not mounted"),
    ],
)
def test_a_pod_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, message: str, said: str
):
    with FakeApi() as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "kubeconfig")))
        cluster = connect(None, None)
        lab = Lab(fake, cluster, tmp_path)
        with (
            kubelet(fake, lambda job: fake.pending(job, why, message)),
            pytest.raises(ConfigError, match=f"does not start: .*{said}"),
        ):
            lab.collect()
        assert any(said in line for line in lab.said)
        assert fake.names("jobs") == []
        cluster.close()


def test_a_pod_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with FakeApi() as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig(tmp_path / "kubeconfig")))
        cluster = connect(None, None)
        lab = Lab(fake, cluster, tmp_path)
        words = json.dumps({"exit_code": 42, "cause": "this pod is to run other code"})
        with (
            kubelet(fake, lambda job: fake.fail(job, 42, words)),
            pytest.raises(ConfigError, match="ended: this pod is to run other code"),
        ):
            lab.collect()
        assert fake.names("jobs") == []
        cluster.close()


def test_sizes_are_said_in_words():
    assert [collecting.size(n) for n in (0, 999, 4_200, 999_600, 3_400_000)] == [
        "0 B", "999 B", "4.2 kB", "1 MB", "3.4 MB",
    ]  # fmt: skip
