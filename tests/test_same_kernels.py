"""Test that a generated model is the same on CPUs that differ."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stillhouse.distill import same_kernels
from stillhouse.distill.toy.recipes import RECIPES
from stillhouse.rundir import file_digest

IS_X86_LINUX = sys.platform == "linux" and platform.machine() == "x86_64"
SMALL = dataclasses.replace(RECIPES["tiny"]["student"], batch=6)
STEPS = 3
# What these steps gave on an AMD EPYC with AVX-512, and on an emulated Intel Haswell (AVX2) and
# Nehalem (SSE4.2). Another torch, MKL, tokenizers or glibc may give another one: this is then the
# place to say so, with a new tiny.VERSION.
BITS = "eff374fba981"
# What a CPU without these would make the libraries choose, and a person's own wishes.
LIMITS = (
    {"ATEN_CPU_CAPABILITY": "default", "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4"},
    {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AUTO", "OMP_NUM_THREADS": "2"},
)


def making(into: Path, limits: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process, limited from outside, that has a small model made."""
    code = (
        "import sys; from pathlib import Path; from tests.test_same_kernels import SMALL, STEPS;"
        " from stillhouse.distill.toy import tiny;"
        f" tiny.make(SMALL, STEPS, 0, Path({str(into)!r}), print);"
        " sys.exit('torch' in sys.modules)"
    )
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | limits)


def test_a_model_is_the_same_whatever_the_cpu_can_do(tmp_path: Path) -> None:
    makers = [making(tmp_path / str(number), limits) for number, limits in enumerate(LIMITS)]
    assert [maker.wait(240) for maker in makers] == [0, 0]
    made = [file_digest(tmp_path / str(number) / "model.safetensors") for number in range(2)]
    assert made[0] == made[1]
    if IS_X86_LINUX:
        assert made[0].startswith(BITS)


def test_nothing_that_the_caller_wishes_of_kernels_reaches_the_maker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "KMP_AFFINITY", "MKL_CBWR"):
        monkeypatch.setenv(name, "wish")
    monkeypatch.setenv("HOME", "/somewhere")
    environment = same_kernels.fixed_environment()
    assert "wish" not in environment.values()
    assert environment["MKL_CBWR"] == "COMPATIBLE" and environment["HOME"] == "/somewhere"


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc")
def test_what_nobody_waits_for_is_not_trained_on(tmp_path: Path) -> None:
    job = {"recipe": dataclasses.asdict(SMALL), "steps": 10**6, "seed": 0, "into": str(tmp_path)}

    def wait_for(number: int, server: int) -> None:
        children = Path(f"/proc/{server}/task/{server}/children")
        end = time.monotonic() + 120
        while len(children.read_text().split()) != number:
            assert time.monotonic() < end, f"not {number} at work"
            time.sleep(0.05)

    reads = same_kernels._asked(job)
    assert same_kernels._server is not None
    server = same_kernels._server._process.pid
    wait_for(1, server)
    os.close(reads)
    wait_for(0, server)

    ended: list[str] = []

    def ask() -> None:
        try:
            same_kernels.trained(job, print)
        except ChildProcessError as error:
            ended.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_for(1, server)
    same_kernels.stop()
    asking.join(60)
    assert ended == ["the process that trains a pair ended before it was done; see above"]
    assert not Path(f"/proc/{server}").exists()
