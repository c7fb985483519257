"""Test the transfer of run files from a volume to a laptop: identical content, or nothing kept."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from stillhouse import transfer

SMALL = ["spec.json", "status.json", "metrics.jsonl", "log.txt", "eval/*.json"]
ONE, TWO, BASE = "tiny-gkd-0123456789", "tiny-gkd-abcdef0123", "baselines/teacher-0123456789"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A volume: two runs, a baseline, names, an adapter, a file that is being written."""
    root = tmp_path / "volume"
    files = {
        f"{ONE}/spec.json": b"{}",
        f"{ONE}/metrics.jsonl": b'{"step": 0}\n' * 5000,
        f"{ONE}/eval/tiny_gen.json": b'{"value": 0.5}',
        f"{ONE}/eval/.tiny_mc.json.7.tmp": b"half",
        f"{ONE}/adapter/adapter_model.safetensors": os.urandom(300_000),
        f"{ONE}/checkpoints/step-9/big": b"never asked for",
        f"{TWO}/spec.json": b'{"two": 2}',
        f"{BASE}/eval/tiny_gen.json": b'{"value": 1.0}',
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "names").mkdir()
    (root / "names/mine").symlink_to(f"../{ONE}")
    (root / "names/other").symlink_to("../tiny-gkd-9999999999")
    return root


def request(runs: Path, *directories: str, files: list[str] = SMALL, **more: Any) -> dict[str, Any]:
    return {"runs": str(runs), "directories": [*directories], "files": files, **more}


def sent(asked: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    assert transfer.send(asked, out) == 0
    return out.getvalue()


def received(asked: dict[str, Any], into: Path) -> dict[str, Any]:
    return transfer.receive([sent(asked)], into, asked)


def test_what_a_pod_sends_arrives_as_it_was(runs: Path, tmp_path: Path) -> None:
    """Through the very command that an `exec` runs."""
    code = Path(__file__).parent.parent
    bundle = tmp_path / "bundle/pod.py"
    bundle.parent.mkdir()
    shutil.copy(code / "stillhouse/pod.py", bundle)
    word = transfer.pack(request(runs, ONE, "tiny-gkd-none", BASE))
    done = subprocess.run(
        [sys.executable, bundle, "send", "--", word],
        capture_output=True, cwd=code, check=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    halves = (done.stdout[:1000], done.stdout[1000:])
    manifest = transfer.receive(
        halves, tmp_path / "home", request(runs, ONE, "tiny-gkd-none", BASE)
    )
    arrived = {
        str(path.relative_to(tmp_path / "home")): path.read_bytes()
        for path in (tmp_path / "home").rglob("*")
        if path.is_file()
    }
    assert arrived.keys() == {
        f"{ONE}/spec.json",
        f"{ONE}/metrics.jsonl",
        f"{ONE}/eval/tiny_gen.json",
        f"{BASE}/eval/tiny_gen.json",
    }
    assert all(content == (runs / name).read_bytes() for name, content in arrived.items())
    assert manifest["files"].keys() == arrived.keys()
    assert manifest["missing"] == ["tiny-gkd-none"] and manifest["unchanged"] == []
    assert manifest["names"] == {"mine": ONE}


def test_an_adapter_comes_when_it_is_asked_for(runs: Path, tmp_path: Path) -> None:
    manifest = received(request(runs, ONE, files=["adapter/*"]), tmp_path / "home")
    [name] = manifest["files"]
    assert (tmp_path / "home" / name).read_bytes() == (runs / name).read_bytes()


def test_a_directory_that_is_here_already_is_not_sent_again(runs: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    received(request(runs, ONE, TWO), home)
    have = {name: transfer.state(home / name, SMALL) for name in (ONE, TWO)}
    (runs / TWO / "spec.json").write_bytes(b'{"two": 3}')
    manifest = received(request(runs, ONE, TWO, have=have), tmp_path / "again")
    assert manifest["unchanged"] == [ONE]
    assert [*manifest["files"]] == [f"{TWO}/spec.json"]


def test_a_stream_that_is_cut_anywhere_is_refused_or_was_whole(runs: Path, tmp_path: Path) -> None:
    asked = request(runs, ONE, BASE)
    stream = sent(asked)
    files = transfer.receive([stream], tmp_path / "whole", asked)["files"]
    refused = 0
    for end in range(0, len(stream), 5):
        try:
            manifest = transfer.receive([stream[:end]], tmp_path / str(end), asked)
        except ValueError as error:
            assert "cut" in str(error)
            refused = end
        else:
            assert manifest["files"] == files
    assert refused > 0.8 * len(stream), "only a tar's padding may be missing"


def repacked(stream: bytes, change: Any) -> bytes:
    """The stream with its members changed by somebody on the way."""
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(stream), mode="r:gz") as before,
        tarfile.open(fileobj=out, mode="w:gz") as after,
    ):
        for member in before:
            content = before.extractfile(member)
            assert content is not None
            name, data = change(member.name, content.read())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            after.addfile(info, io.BytesIO(data))
    return out.getvalue()


NOT_ASKED = "not a plain file that was asked for"


def told(name: str, data: bytes, **said: Any) -> bytes:
    """The manifest with other words in it; every other member as it is."""
    return json.dumps(json.loads(data) | said).encode() if name == "manifest.json" else data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda n, d: (n, d.replace(b"0.5", b"0.9") if "eval" in n else d), "is not what was sent"),
        (lambda n, d: (n.replace("spec.json", "odd.json"), d), NOT_ASKED),
        (lambda n, d: (n.replace(f"{ONE}/spec.json", "../../etc"), d), NOT_ASKED),
        (lambda n, d: (n.replace(f"{ONE}/spec.json", "/etc/x"), d), NOT_ASKED),
        (lambda n, d: (n.replace("eval/", "eval/../"), d), NOT_ASKED),
        (lambda n, d: (n.replace(ONE, TWO), d), NOT_ASKED),
        (lambda n, d: (n.replace("eval/", "eval/\x1b[2J"), d), NOT_ASKED),
        (lambda n, d: (n.replace("eval/", "eval/\u202e"), d), NOT_ASKED),
        (lambda n, d: (n.replace("eval/", "eval/a\\"), d), NOT_ASKED),
        (lambda n, d: (n.replace("eval/", "eval/a\n"), d), NOT_ASKED),
        (lambda n, d: (n.replace("eval/", "eval/."), d), NOT_ASKED),
        (lambda n, d: (n.replace("eval/", f"eval/{'a' * 250}"), d), NOT_ASKED),
        (lambda n, d: (n.replace("metrics.jsonl", "spec.json"), d), NOT_ASKED),  # twice
        (lambda n, d: (n, b"[" * 100_000 if n == "manifest.json" else d), "is not JSON"),
        (lambda n, d: (n, told(n, d, names={"../../outside/evil": ONE})), "no name of a run"),
        (lambda n, d: (n, told(n, d, names={"/absolute": ONE})), "no name of a run"),
        (lambda n, d: (n, told(n, d, names={"a\nb": ONE})), "no name of a run"),
        (lambda n, d: (n, told(n, d, names={"mine": TWO})), "was not asked for"),
        (lambda n, d: (n, told(n, d, missing=["../elsewhere"])), "was not asked for"),
        (lambda n, d: (n, told(n, d, unchanged=[7])), "was not asked for"),
        (lambda n, d: (n, told(n, d, names=["mine"])), "its manifest is no object of"),
        (lambda n, d: (n, b"[]" if n == "manifest.json" else d), "its manifest is no object of"),
        (lambda n, d: (n, b"{" if n == "manifest.json" else d), "its manifest is not JSON"),
    ],
)
def test_what_was_changed_on_the_way_is_refused(
    runs: Path, tmp_path: Path, change: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        asked = request(runs, ONE)
        transfer.receive([repacked(sent(asked), change)], tmp_path / "home", asked)


def test_more_files_or_bytes_than_anything_asks_for_are_refused_before_they_are_written(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, limit in (("MOST_FILES", 1), ("MOST_BYTES", 10_000)):
        with monkeypatch.context() as patch:
            patch.setattr(transfer, name, limit)
            with pytest.raises(ValueError, match="nothing asks for so much"):
                received(request(runs, ONE), tmp_path / name)
        written = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in written) <= 10_000


def test_the_limits_of_a_request_hold_for_its_answer_before_anything_of_it_is_written(
    runs: Path, tmp_path: Path
) -> None:
    for limit in ({"largest": 100}, {"most": 150}):
        with pytest.raises(ValueError, match="nothing asks for so much"):
            received(request(runs, ONE) | limit, tmp_path / "home")
        written = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in written) <= 150


def test_a_header_that_memory_would_not_hold_is_refused(runs: Path, tmp_path: Path) -> None:
    """A gibibyte of zeros packs to a megabyte: it is the header that says how much is read."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    bomb = gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 21), compresslevel=1)
    with pytest.raises(ValueError, match="header is longer than"):
        transfer.receive([bomb], tmp_path / "home", request(runs, ONE))


def test_a_sparse_file_is_no_plain_one(runs: Path, tmp_path: Path) -> None:
    info = tarfile.TarInfo(f"{ONE}/spec.json")
    info.type = tarfile.GNUTYPE_SPARSE
    stream = gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match=NOT_ASKED):
        transfer.receive([stream], tmp_path / "home", request(runs, ONE))


def test_a_file_that_grows_is_sent_as_far_as_it_was(runs: Path, tmp_path: Path) -> None:
    grows = runs / ONE / "metrics.jsonl"
    before = grows.read_bytes()

    class Slow(io.BytesIO):
        def write(self, data: Any) -> int:
            with grows.open("ab") as file:
                file.write(b'{"step": 1}\n')
            return super().write(data)

    out = Slow()
    transfer.send(request(runs, ONE), out)
    transfer.receive([out.getvalue()], tmp_path / "home", request(runs, ONE))
    arrived = (tmp_path / "home" / ONE / "metrics.jsonl").read_bytes()
    assert arrived.startswith(before) and len(grows.read_bytes()) > len(arrived)
    assert all(json.loads(line) for line in arrived.splitlines())


def test_a_request_for_400_directories_fits_into_a_url() -> None:
    names = [f"qwen3-4b-self-gkd-{os.urandom(5).hex()}" for _ in range(400)]
    have = {name: os.urandom(8).hex() for name in names}
    word = transfer.pack(request(Path("/runs"), *names, have=have))
    assert transfer.unpack(word)["have"] == have
    assert len(word) < 16_000


def test_a_request_that_cannot_be_read_is_a_mistake() -> None:
    command = [sys.executable, "-m", "stillhouse.transfer", "send", "nonsense!"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 42 and done.stdout == ""
    assert "a request that cannot be read" in done.stderr


def holding(tmp_path: Path, seconds: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "stillhouse.transfer", "hold", seconds]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def test_a_pod_that_nobody_asks_ends_by_itself(tmp_path: Path) -> None:
    with holding(tmp_path, "0.2") as waiting:
        assert waiting.wait(20) == 0


def test_a_send_keeps_its_pod(tmp_path: Path) -> None:
    used = tmp_path / "stillhouse-sent"
    used.touch()
    later = time.time() + 2
    os.utime(used, (later, later))
    with holding(tmp_path, "0.1") as waiting:
        assert waiting.wait(20) == 0
    assert time.time() >= later


def test_a_pod_that_waits_ends_at_once_when_asked(tmp_path: Path) -> None:
    with holding(tmp_path, "60") as waiting:
        assert waiting.stdout is not None and waiting.stdout.readline().startswith(b"waiting")
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(20) == 0


def test_the_stream_is_a_gzipped_tar_that_ends_in_its_manifest(runs: Path) -> None:
    plain = gzip.decompress(sent(request(runs, TWO)))
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        assert tar.getnames() == [f"{TWO}/spec.json", "manifest.json"]
