"""Test the installation: lock file, wheel, light launcher, and import contracts."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.compose import conf_dir
from tests.builders.sample_runs import write_sample
from tools import lock

ROOT = Path(__file__).parent.parent
CARRIED = ("conf", "k8s")  # folders beside the package that an installed wheel brings along

WHEEL = "{name}-1.0-py3-none-any.whl"
LOCK = """version = 1
requires-python = ">=3.11"

[[package]]
name = "{name}"
version = "1.0"
source = {{ registry = "{index}" }}
sdist = {{ url = "{index}/aa/{name}-1.0.tar.gz", hash = "sha256:aa", size = 1 }}
wheels = [
    {{ url = "{index}/bb/{name}-1.0-py3-none-any.whl{tail}", hash = "sha256:bb", size = 1 }},
]
"""
TINY = """[project]
name = "tiny"
version = "1"
requires-python = ">=3.11"
dependencies = ["iniconfig==2.1.0"]

[tool.uv]
package = false
find-links = ["wheels"]
"""


def run(
    *command: str | Path, cwd: Path, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """The finished process, out of any environment that is active around the tests."""
    ours = {"VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "PYTHONPATH"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )


def must(*command: str | Path, cwd: Path) -> str:
    """What a command prints that has to succeed."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def lock_py(verb: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "tools" / "lock.py", verb, cwd=cwd)


def uv() -> str:
    """The uv that made this environment: in it, or on PATH."""
    found = shutil.which(
        "uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert found, "these tests install packages with uv: pip install uv"
    return found


# The lock -----------------------------------------------------------------------------------------


def test_the_committed_lock_names_no_host() -> None:
    staged = must("git", "show", ":uv.lock", cwd=ROOT)
    assert "://" not in staged
    assert len(lock.pins(staged)) > 500  # 170 packages and their files: it is the real one


@settings(max_examples=30)
@given(
    index=st.from_regex(
        r"https?://[a-z0-9.-]{1,20}(:[0-9]{1,4})?(/[a-z+]{1,8}){0,3}", fullmatch=True
    ),
    name=st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True),
    tail=st.sampled_from(["", "#sha256=ff", "?token=a/b"]),
)
def test_stripping_takes_hosts_and_nothing_else(index: str, name: str, tail: str) -> None:
    full = LOCK.format(index=index, name=name, tail=tail)
    bare = lock.strip(full)
    assert "://" not in bare and "token" not in bare
    assert lock.strip(bare) == bare
    assert lock.pins(bare) == {
        ("package", name, "1.0"),
        ("file", f"{name}-1.0.tar.gz", "sha256:aa"),
        ("file", WHEEL.format(name=name), "sha256:bb"),
    }
    assert lock.pins(full) == lock.pins(bare)


@given(st.text())
def test_stripping_twice_is_stripping_once_whatever_the_text(text: str) -> None:
    assert lock.strip(lock.strip(text)) == lock.strip(text)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('hash = "sha256:bb"', 'hash = "sha256:bc"', "+ file tiny-1.0-py3-none-any.whl sha256:bc"),
        ('version = "1.0"', 'version = "1.1"', "+ package tiny 1.1"),
        ('name = "tiny"', 'name = "tinny"', "+ package tinny 1.0"),
    ],
)
def test_check_refuses_a_lock_that_pins_other_things(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    full = LOCK.format(index="https://index.example/simple", name="tiny", tail="")
    (tmp_path / "uv.lock").write_text(lock.strip(full))
    must("git", "init", "--quiet", cwd=tmp_path)
    must("git", "add", "uv.lock", cwd=tmp_path)
    (tmp_path / "uv.lock").write_text(full)  # as plain `uv sync` leaves it
    assert lock_py("check", tmp_path).returncode == 0
    (tmp_path / "uv.lock").write_text(full.replace(before, after))
    refused = lock_py("check", tmp_path)
    assert refused.returncode == 1
    assert said in refused.stderr


def test_check_refuses_a_staged_lock_with_a_host(tmp_path: Path) -> None:
    full = LOCK.format(index="https://index.example/simple", name="tiny", tail="")
    (tmp_path / "uv.lock").write_text(full)
    must("git", "init", "--quiet", cwd=tmp_path)
    must("git", "add", "uv.lock", cwd=tmp_path)
    refused = lock_py("check", tmp_path)
    assert refused.returncode == 1
    assert "names a host" in refused.stderr


def test_setup_lets_git_strip_what_is_staged(tmp_path: Path) -> None:
    full = LOCK.format(index="https://index.example/simple", name="tiny", tail="")
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "lock.py", tmp_path / "tools")
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    must("git", "init", "--quiet", cwd=tmp_path)
    assert lock_py("setup", tmp_path).returncode == 0
    (tmp_path / "uv.lock").write_text(full)
    must("git", "add", "uv.lock", cwd=tmp_path)
    assert must("git", "show", ":uv.lock", cwd=tmp_path) == lock.strip(full)


def test_restore_proves_hashes_before_anything_installs(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "pyproject.toml").write_text(TINY)
    must(uv(), "lock", "--python", sys.executable, cwd=tmp_path)
    lock_py("write", tmp_path)
    file = tmp_path / "uv.lock"
    bare = file.read_text()
    assert "://" not in bare

    restored = lock_py("restore", tmp_path)
    assert restored.returncode == 0, restored.stderr
    assert "://" in file.read_text()
    assert lock.strip(file.read_text()) == bare

    forged = re.sub(r"sha256:..", "sha256:00", bare, count=1)
    file.write_text(forged)
    refused = lock_py("restore", tmp_path)
    assert refused.returncode == 1
    assert "- file iniconfig-2.1.0" in refused.stderr
    assert file.read_text() == forged  # nothing lost, no host written

    file.write_text(bare)
    (tmp_path / "pyproject.toml").write_text(TINY.replace('0"]\n', '0", "typing-extensions"]\n'))
    refused = lock_py("restore", tmp_path)
    assert refused.returncode == 1
    assert "uv lock" in refused.stderr
    assert file.read_text() == bare


def test_no_tracked_file_names_a_package_host_or_a_home() -> None:
    names = (
        r"pyp[i]\.org|pythonhoste[d]|registr[y]\.npmjs|crate[s]\.io|/(home|User[s]|wor[k])/[a-z]"
    )
    found = run("git", "grep", "-nIiE", names, "--", ".", cwd=ROOT)
    assert found.returncode == 1, found.stdout + found.stderr  # 1: nothing found


# The wheel ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it would be published, built by the locked build backend."""
    folder = tmp_path_factory.mktemp("dist")
    must(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_carries_conf_and_k8s(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
    for folder in CARRIED:
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert inside[f"stillhouse/{path.relative_to(ROOT).as_posix()}"] == path.read_bytes()


def test_the_wheel_asks_for_no_torch_unless_an_extra_is_named(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    wants = re.findall(r"^Requires-Dist: (.+)$", metadata, re.M)
    assert any(want.startswith("torch") for want in wants)
    assert not [want for want in wants if want.startswith("torch") and "extra ==" not in want]


def test_trl_is_locked_and_neither_asked_for_nor_installed_outside_the_parity_group(
    wheel: Path,
) -> None:
    assert 'name = "trl"' in (ROOT / "uv.lock").read_text()
    assert find_spec("trl") is None
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert not re.findall(r"^Requires-Dist: trl", archive.read(name).decode(), re.M)


def test_a_checkout_reads_its_own_conf_and_no_copy_of_it() -> None:
    assert conf_dir() == ROOT / "conf"
    copies = [Path(entry) / "stillhouse" / "conf" for entry in sys.path]
    assert not [copy for copy in copies if copy.exists()]


# The launcher without torch -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def light(wheel: Path) -> Path:
    """An environment with the wheel and what it needs, and none of its extras; its `bin` folder.

    Kept under .cache/ for as long as what it was made from stays the same.
    """
    lock_text = lock.strip((ROOT / "uv.lock").read_text())
    asked = (ROOT / "pyproject.toml").read_text()
    key = hashlib.sha256(f"{asked}\0{lock_text}\0{sys.version}".encode()).hexdigest()[:12]
    shelf = ROOT / ".cache" / "launcher"
    home = shelf / key
    shelf.mkdir(parents=True, exist_ok=True)
    with FileLock(shelf / "lock"):
        if not (home / "complete").exists():
            for old in [path for path in shelf.iterdir() if path.is_dir()]:
                shutil.rmtree(old)
            (home / "wheels").mkdir(parents=True)
            (home / "pyproject.toml").write_text(asked)
            (home / "uv.lock").write_text(lock_text)
            sync = ["sync", "--quiet", "--no-default-groups", "--no-install-project"]
            must(uv(), *sync, "--python", sys.executable, cwd=home)
            (home / "complete").touch()
        environment = home / ".venv"
        install = ["pip", "install", "--quiet", "--offline", "--no-deps", "--reinstall"]
        must(uv(), *install, "--python", environment / "bin" / "python", wheel, cwd=home)
    return environment / "bin"


def test_plain_uv_sync_installs_what_a_lock_without_hosts_pins(light: Path) -> None:
    synced = (light.parent.parent / "uv.lock").read_text()
    locked = lock.pins((ROOT / "uv.lock").read_text())
    assert "://" in synced  # uv found this machine's index by itself
    assert locked <= lock.pins(synced)
    # A wheel uploaded to a locked release since is the one thing that may be more.
    assert {pin[0] for pin in lock.pins(synced) - locked} <= {"file"}


def test_the_light_environment_has_no_torch_and_its_own_conf(light: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec; from stillhouse.compose import conf_dir;"
        "print([find_spec(m) for m in ('torch', 'transformers', 'lm_eval', 'wandb')]);"
        "print(conf_dir())"
    )
    found, conf = must(light / "python", "-c", code, cwd=tmp_path).splitlines()
    assert found == "[None, None, None, None]"
    assert light.parent in Path(conf).parents
    assert (Path(conf) / "train.yaml").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--help", "plan"),
        (f"plan {ROOT / 'sweeps' / 'quickstart.yaml'}", "new"),
        ("status sample", "9 done"),
        ("logs sample", "all is done; with --point P"),
        ("retry sample", "nothing to retry"),
        ("cancel sample", "sample"),
        ("report sample", "lmbda"),
    ],
)
def test_the_launcher_answers_without_torch(
    light: Path, tmp_path: Path, words: str, said: str
) -> None:
    write_sample(tmp_path / "runs")
    answer = run(light / "stillhouse", *words.split(), cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert said in answer.stdout + answer.stderr


def test_training_and_scoring_without_torch_are_a_sentence(light: Path, tmp_path: Path) -> None:
    for script in ("train.py", "eval.py"):
        answer = run(light / "python", str(ROOT / script), "pair=tiny", cwd=tmp_path)
        assert answer.returncode == 42 and "only launches and reads" in answer.stderr
    assert list(tmp_path.iterdir()) == []


# Who may import whom ------------------------------------------------------------------------------

PLANTED = {
    "Entry points open rooms": ("stillhouse/rundir.py", "stillhouse.sweep"),
    "Rooms do not import": ("stillhouse/sweep/planted.py", "stillhouse.results.planted"),
    "Results go from": ("stillhouse/results/stats.py", "stillhouse.results.report"),
    "The launcher's core": ("stillhouse/sweep/plan.py", "stillhouse.sweep.cluster.jobs"),
    "This machine and": ("stillhouse/sweep/local/planted.py", "stillhouse.sweep.cluster.jobs"),
    "No study is": ("stillhouse/results/planted.py", "studies.planted"),
    "torch and its family": ("stillhouse/evals/planted.py", "torch"),
    "lm_eval stays": ("stillhouse/distill/planted.py", "lm_eval"),
    "hydra stays": ("stillhouse/sweep/planted.py", "hydra.core"),
    "kubernetes stays": ("stillhouse/sweep/cluster/planted.py", "kubernetes.client"),
    "wandb stays": ("stillhouse/distill/planted.py", "wandb"),
    "HTTP stays": ("stillhouse/distill/planted.py", "starlette.applications"),
    "matplotlib stays": ("stillhouse/results/planted.py", "matplotlib.pyplot"),
    "pandas and scipy": ("stillhouse/spec/train.py", "pandas"),
}


def lint_imports(cwd: Path) -> dict[str, str]:
    """What import-linter says of each contract, by the contract's first words."""
    said = run(Path(sys.executable).parent / "lint-imports", "--no-cache", cwd=cwd).stdout
    lines = [line for line in said.splitlines() if re.search(r" (KEPT|BROKEN)( \(|$)", line)]
    verdicts = {
        key: "BROKEN" if "BROKEN" in line else "KEPT"
        for line in lines
        for key in PLANTED
        if line.startswith(key)
    }
    assert len(verdicts) == len(lines) > 0, said  # each contract has a planted import here
    return verdicts


def package_copy(folder: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", folder)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "stillhouse", folder / "stillhouse", ignore=ignore)
    return folder


def test_every_import_contract_breaks_on_an_import_planted_in_a_function(tmp_path: Path) -> None:
    copy = package_copy(tmp_path)
    for file, module in PLANTED.values():
        with (copy / file).open("a") as source:
            source.write(f"\n\ndef planted() -> None:\n    import {module}\n")
    assert lint_imports(copy) == dict.fromkeys(PLANTED, "BROKEN")


def test_a_new_hallway_file_must_be_given_its_place_in_the_layers(tmp_path: Path) -> None:
    copy = package_copy(tmp_path)
    (copy / "stillhouse" / "unplaced.py").write_text("")
    assert lint_imports(copy)["Entry points open rooms"] == "BROKEN"
