"""Test the code bundle: complete, identical wherever it is made, and never with a secret in it."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from kubernetes import client

from stillhouse.compose import compose, from_command_line
from stillhouse.errors import ConfigError
from stillhouse.identity import point_id
from stillhouse.rundir import Json, code_identity
from stillhouse.spec import TrainSpec
from stillhouse.sweep.cluster.code_bundle import SCRIPTS, bundle, sweep_file

ROOT = Path(__file__).parent.parent
SAYS = "from stillhouse.sweep.cluster.code_bundle import bundle; print(bundle().key)"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of its own, which nobody edits meanwhile."""
    place = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("stillhouse", "conf", "k8s"):
        shutil.copytree(ROOT / folder, place / folder, ignore=ignored)
    return place


def python(code: str, at: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python in which `stillhouse` is what lies at a place."""
    env = {**os.environ, "PYTHONPATH": str(at), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )


def key_of(at: Path, cwd: Path) -> str:
    done = python(SAYS, at, cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def sent(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    """The bundle of that checkout, as another process makes it."""
    code = (
        "import json; from stillhouse.sweep.cluster.code_bundle import bundle; b = bundle();"
        "print(json.dumps({'digest': b.digest, 'key': b.key, 'manifest': b.manifest}))"
    )
    done = python(code, checkout, tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unpacked(sent: Json, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pod")
    packed = base64.b64decode(sent["manifest"]["binaryData"]["code.tar.gz"])
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(place, filter="data")
    return place


def test_what_is_unpacked_has_the_digest_and_composes_the_same_point(
    sent: Json, unpacked: Path, tmp_path: Path
):
    words = ["pair=tiny", "lmbda=0.5", "learning_rate=5e-6"]
    code = (
        "from stillhouse.compose import compose, from_command_line;"
        "from stillhouse.rundir import code_identity; from stillhouse.identity import point_id;"
        "from stillhouse.spec import TrainSpec;"
        f"print(code_identity()['digest']);"
        f"print(point_id(compose(from_command_line({words}, TrainSpec), TrainSpec)))"
    )
    done = python(code, unpacked, tmp_path)
    assert done.returncode == 0, done.stderr
    here = point_id(compose(from_command_line(words, TrainSpec), TrainSpec))
    assert done.stdout.split() == [sent["digest"], here]


def test_a_bundle_made_inside_a_pod_is_the_same_one(sent: Json, unpacked: Path, tmp_path: Path):
    assert key_of(unpacked, tmp_path) == sent["key"]


def test_an_installed_package_makes_the_same_bundle_as_the_checkout(
    checkout: Path, sent: Json, tmp_path: Path
):
    installed = tmp_path / "site-packages" / "stillhouse"
    shutil.copytree(checkout / "stillhouse", installed)
    shutil.copytree(checkout / "conf", installed / "conf")
    shutil.copytree(checkout / "k8s", installed / "k8s")
    assert key_of(installed.parent, tmp_path) == sent["key"]


def test_another_conf_is_another_bundle_of_the_same_code(
    checkout: Path, sent: Json, tmp_path: Path
):
    shutil.copytree(checkout, tmp_path / "mine")
    (tmp_path / "mine" / "conf" / "site" / "mine.yaml").write_text("defaults: [cluster, _self_]\n")
    key = key_of(tmp_path / "mine", tmp_path)
    assert key != sent["key"]
    assert key.partition("-")[0] == sent["key"].partition("-")[0] == sent["digest"]


def test_the_archive_depends_on_nothing_but_its_files(sent: Json):
    packed = base64.b64decode(sent["manifest"]["binaryData"]["code.tar.gz"])
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(packed))) as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert names == sorted(names)
    assert {(m.mtime, m.uid, m.gid, m.mode, m.isfile()) for m in members} == {
        (0, 0, 0, 0o644, True)
    }
    assert {name.partition("/")[0] for name in names} == {
        "stillhouse", "conf", "k8s", "train.py", "eval.py",
    }  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or "/." in name]


def test_the_config_map_is_immutable_named_by_its_content_and_small(sent: Json):
    manifest = sent["manifest"]
    assert manifest["metadata"]["name"] == f"stillhouse-code-{sent['key']}"
    assert manifest["immutable"] is True
    assert manifest["data"]["pod.py"] == (ROOT / "stillhouse/pod.py").read_text()
    assert len(json.dumps(manifest)) < 700_000
    parsed = client.V1ConfigMap.from_dict(manifest)
    assert parsed is not None
    assert json.loads(parsed.to_json()) == manifest


def test_the_doors_that_travel_are_those_of_the_checkout():
    for name, text in SCRIPTS.items():
        assert (ROOT / name).read_text() == text


def test_a_secret_in_conf_is_refused_with_its_place_and_not_shown(checkout: Path, tmp_path: Path):
    shutil.copytree(checkout, tmp_path / "mine")
    secret = "hf_" + "AbCdEfGh" * 4
    lines = ["site_name: mine", "pod_env:", f"  HELLO: {secret}"]
    (tmp_path / "mine" / "conf" / "site" / "mine.yaml").write_text("\n".join(lines))
    refused = python(SAYS, tmp_path / "mine", tmp_path)
    assert refused.returncode != 0
    assert "conf/site/mine.yaml, line 3 looks like a Hugging Face token" in refused.stderr
    assert secret not in refused.stderr


def test_sources_that_change_under_a_launcher_are_not_sent(checkout: Path, tmp_path: Path):
    shutil.copytree(checkout, tmp_path / "mine")
    code = (
        "from pathlib import Path; from stillhouse.rundir import code_identity; code_identity();"
        f"file = Path({str(tmp_path / 'mine' / 'stillhouse' / 'stop.py')!r});"
        f"file.write_text(file.read_text() + '# later'); {SAYS}"
    )
    refused = python(code, tmp_path / "mine", tmp_path)
    assert "run it again" in refused.stderr


def test_more_than_a_config_map_can_take_is_refused_and_the_largest_named(
    checkout: Path, tmp_path: Path
):
    shutil.copytree(checkout, tmp_path / "mine")
    (tmp_path / "mine" / "conf" / "data" / "rows.yaml").write_bytes(os.urandom(2**20))
    refused = python(SAYS, tmp_path / "mine", tmp_path)
    assert "conf/data/rows.yaml" in refused.stderr


def test_a_sweep_file_travels_as_it_is_unless_it_holds_a_secret():
    content = "question: Does it? # ünïcode\ngrid: {lmbda: [0, 1]}\n".encode()
    manifest = sweep_file("stillhouse-drive-x-0123456789", "a sweep", "x.yaml", content)
    assert manifest["data"] == {"x.yaml": content.decode()}
    with pytest.raises(ConfigError, match="x.yaml, line 2"):
        sweep_file("n", "s", "x.yaml", b"base:\n  hf_token: abc\n")


def test_this_process_can_make_its_own():
    made = bundle()
    assert made.digest == code_identity()["digest"]
    assert made.manifest["metadata"]["labels"]["stillhouse/code"] == made.digest


def test_what_lies_beside_the_code_stays_at_home_and_a_key_in_any_of_it_is_refused(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("stillhouse", "conf", "k8s"):
        shutil.copytree(Path(__file__).parent.parent / folder, copy / folder, ignore=ignored)
    key = "hf" + "_" + "a1" * 16
    (copy / "stillhouse/wandb.env").write_text(f"WANDB_API_KEY={'0a' * 20}\n")
    code = (
        "import base64, gzip, io, sys, tarfile\n"
        "from stillhouse.sweep.cluster.code_bundle import bundle\n"
        "packed = base64.b64decode(bundle().manifest['binaryData']['code.tar.gz'])\n"
        "print(*tarfile.open(fileobj=io.BytesIO(packed), mode='r:gz').getnames())"
    )

    def made() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", code]
        env = {**os.environ, "PYTHONPATH": str(copy)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    names = made().stdout.split()
    assert "stillhouse/pod.py" in names and "k8s/job.yaml" in names
    assert not [name for name in names if name.endswith(".env")]
    for file in ("k8s/token.yaml", "stillhouse/mine.py"):
        (copy / file).write_text(f"token: {key}\n")
        refused = made()
        assert refused.returncode != 0 and f"{file}, line 1" in refused.stderr
        assert key not in refused.stderr
        (copy / file).unlink()
