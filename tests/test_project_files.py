"""Test which project files may leave this machine: those of git or a RECORD, without secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.errors import ConfigError
from stillhouse.sweep.cluster.project_files import project_files, refuse_secrets

ROOT = Path(__file__).parent.parent
FOLDERS = ("stillhouse", "conf", "k8s")


def git(at: Path, *words: str) -> None:
    who = {
        f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    subprocess.run(
        ["git", "-C", str(at), *words], check=True, capture_output=True, env=os.environ | who
    )


def put(file: Path, text: str = "# nothing\n") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project of six files that git tracks."""
    root = tmp_path / "project"
    for name in (
        "stillhouse/__init__.py", "stillhouse/pod.py", "conf/train.yaml", "k8s/job.yaml",
        "k8s/Dockerfile", "stillhouse/notes.md",
    ):  # fmt: skip
        put(root / name)
    put(root / ".gitignore", "local_*\n")
    git(root.parent, "init", "-q", str(root))
    git(root, "add", ".")
    return root


def names(root: Path) -> set[str]:
    return set(project_files(root, FOLDERS))


SIX = {
    "stillhouse/__init__.py", "stillhouse/pod.py", "stillhouse/notes.md", "conf/train.yaml",
    "k8s/job.yaml", "k8s/Dockerfile",
}  # fmt: skip


def test_what_git_tracks_travels_as_it_is_now_and_what_is_of_no_use_stays(checkout: Path):
    put(checkout / "stillhouse" / "wandb.env", "KEY=1\n")
    put(checkout / "stillhouse" / "__pycache__" / "pod.cpython-311.pyc")
    changed = put(checkout / "stillhouse" / "pod.py", "# a person's working change\n")
    assert names(checkout) == SIX
    assert project_files(checkout, FOLDERS)["stillhouse/pod.py"].read_text() == changed.read_text()
    (checkout / "conf" / "train.yaml").unlink()  # tracked, and taken away: there is nothing to send
    put(checkout / "conf" / "pair" / "mine.yaml")
    git(checkout, "add", "conf/pair/mine.yaml")  # before any commit
    assert names(checkout) == SIX - {"conf/train.yaml"} | {"conf/pair/mine.yaml"}


@pytest.mark.parametrize(
    "name",
    ["stillhouse/mine.py", "stillhouse/local_mine.py", "stillhouse/.hidden/x.py",
     "conf/site/mine.yaml", "k8s/token.yaml", "k8s/more.sh"],
)  # fmt: skip
def test_a_file_that_is_used_here_and_not_tracked_is_named_with_the_way_out(
    checkout: Path, name: str
):
    put(checkout / name)
    with pytest.raises(ConfigError, match="git tracks, so no pod would have it: `git add` it") as e:
        names(checkout)
    assert name in str(e.value)
    git(checkout, "add", "-f", name)
    assert names(checkout) == SIX | {name}


def test_many_of_them_are_counted(checkout: Path):
    for number in range(5):
        put(checkout / "conf" / f"x{number}.yaml")
    with pytest.raises(ConfigError, match=r"conf/x0.yaml, conf/x1.yaml, conf/x2.yaml and 2 more"):
        names(checkout)


@pytest.mark.parametrize("is_tracked", [False, True])
def test_links_are_not_followed_tracked_or_not_to_files_or_to_folders(
    checkout: Path, tmp_path: Path, is_tracked: bool
):
    private = put(tmp_path / "private" / "site.yaml", "password: x\n")
    for name, target in (("conf/mine.yaml", private), ("stillhouse/more", private.parent)):
        (checkout / name).symlink_to(target)
        if is_tracked:
            git(checkout, "add", "-f", name)
        with pytest.raises(ConfigError, match=f"{name}: a link, and links are not followed"):
            names(checkout)
        (checkout / name).unlink()
    (checkout / "stillhouse" / "notes.md").unlink()
    (checkout / "stillhouse" / "notes.md").symlink_to(private)  # nobody reads it here
    assert names(checkout) == SIX - {"stillhouse/notes.md"}


def test_of_an_installed_package_its_record_says_what_is_of_it(tmp_path: Path):
    site = tmp_path / "site-packages"
    listed = ["stillhouse/__init__.py", "stillhouse/conf/train.yaml", "stillhouse/a,b.yaml"]
    for name in listed:
        put(site / name)
    lines = [f'"{name}",sha256=x,1' for name in listed]
    put(site / "stillhouse-0.1.0.dist-info" / "RECORD", "\n".join(lines))
    git(tmp_path.parent, "init", "-q", str(tmp_path))  # an environment inside somebody's checkout
    assert set(project_files(site, ["stillhouse"])) == set(listed)
    put(site / "stillhouse" / "conf" / "site" / "mine.yaml")
    with pytest.raises(
        ConfigError, match="RECORD lists.*move it away, or add its line to RECORD .PATH"
    ):
        project_files(site, ["stillhouse"])


def test_without_git_and_record_all_of_our_kinds_travel_and_links_do_not(checkout: Path):
    shutil.rmtree(checkout / ".git")
    put(checkout / "conf" / "site" / "mine.yaml")
    put(checkout / "conf" / ".vault" / "x.yaml")
    put(checkout / "stillhouse" / "wandb.env")
    assert names(checkout) == SIX - {"stillhouse/notes.md"} | {"conf/site/mine.yaml"}
    (checkout / "k8s" / "a_link.yaml").symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match=r"k8s/a_link.yaml: a link"):
        names(checkout)


def test_an_archive_that_was_unpacked_in_somebody_elses_checkout_is_none_of_it(
    checkout: Path, tmp_path: Path
):
    shutil.rmtree(checkout / ".git")
    git(tmp_path.parent, "init", "-q", str(tmp_path))
    assert names(checkout) == SIX - {"stillhouse/notes.md"}


def test_a_checkout_that_git_cannot_read_is_refused_in_its_words(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
):
    (checkout / ".git" / "HEAD").write_text("torn")
    with pytest.raises(ConfigError, match="git does not say which files.*not a git repository"):
        names(checkout)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="git does not say which files.*No such file"):
        names(checkout)


def test_a_hook_of_another_repository_does_not_answer_for_this_one(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "other"
    git(tmp_path, "init", "-q", str(other))
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert names(checkout) == SIX


def test_secrets_are_seen_in_every_file_and_digests_are_none():
    digits = "0a" * 20
    for path, line in (
        ("conf/site/mine.yaml", f"  WANDB: {digits}"),
        ("conf/site/mine.yaml", "password: hunter2"),
        ("k8s/secret.yaml", "  password: hunter2"),
        ("k8s/more.sh", f"export WANDB_API_KEY={digits}"),
        ("stillhouse/mine.py", f'WANDB_API_KEY = "{digits}"'),
        ("README.md", "hf" + "_" + "a1" * 16),
        ("uv.lock", 'url = "https://ada:' + "hunter2" + '@index.example/simple"'),
    ):
        with pytest.raises(ConfigError, match=f"{path}, line 2 looks like") as refused:
            refuse_secrets(path, f"# one\n{line}\n".encode())
        assert "hunter2" not in str(refused.value) and digits not in str(refused.value)
    refuse_secrets("k8s/job.yaml", f"stillhouse/hash: {digits}\nwandb_secret: wandb\n".encode())
    refuse_secrets("stillhouse/mine.py", f'revision = "{digits}"\ntoken = next(it)\n'.encode())


# ------------------------------------------------------------------------------- the image

ENGINE = """#!/bin/sh
[ "$1" = build ] || exit 0
for last; do :; done
cp -r "$last" "$SEEN"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout of this project, with an engine that keeps what it is given."""
    root = tmp_path / "project"
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    wanted = [line[1:] for line in lines if line.startswith("!")]
    wanted += [".dockerignore", ".gitignore", "tools"]
    for name, file in project_files(ROOT, wanted).items():
        put(root / name)
        shutil.copy(file, root / name)
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    put(tmp_path / "bin" / "docker", ENGINE).chmod(0o755)
    return root


def image(project: Path) -> subprocess.CompletedProcess[str]:
    place = project.parent
    shutil.rmtree(place / "seen", ignore_errors=True)
    env = {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "SEEN": str(place / "seen")}
    return subprocess.run(
        [sys.executable, "-I", "-S", "tools/image.py"],
        cwd=project, env=env, capture_output=True, text=True,
    )  # fmt: skip


def test_the_image_is_built_from_tracked_files_alone(project: Path):
    put(project / "stillhouse" / "wandb.env", "KEY=1\n")
    put(project / "conf" / "dump.safetensors")
    put(project / "runs" / "x" / "spec.json")
    put(project / "stillhouse" / "stop.py", "# a person's working change\n")
    done = image(project)
    assert done.returncode == 0, done.stderr
    seen = project.parent / "seen"
    there = {f.relative_to(seen).as_posix() for f in seen.rglob("*") if f.is_file()}
    assert {"stillhouse/pod.py", "conf/train.yaml", "k8s/Dockerfile", "uv.lock"} <= there
    assert not [name for name in there if name.endswith((".env", ".safetensors", ".json", ".pyc"))]
    assert "tools/image.py" not in there and (seen / "wheels").is_dir()
    assert os.access(seen / "k8s" / "train.sh", os.X_OK)
    assert "working change" in (seen / "stillhouse" / "stop.py").read_text()


def test_the_image_refuses_secrets_links_and_files_that_nobody_tracks(project: Path):
    key = "hf" + "_" + "a1" * 16
    kept = (project / "README.md").read_text()
    put(project / "README.md", f"{kept}\n{key}\n")
    refused = image(project)
    assert refused.returncode == 1 and "README.md, line" in refused.stderr
    assert key not in refused.stderr and not (project.parent / "seen").exists()
    put(project / "README.md", kept)
    mine = put(project / "conf" / "site" / "mine.yaml")
    assert "conf/site/mine.yaml: in use here" in image(project).stderr
    mine.unlink()
    mine.symlink_to("/etc/hostname")
    assert "conf/site/mine.yaml: a link" in image(project).stderr
    mine.unlink()
    shutil.rmtree(project / ".git")  # an archive that was unpacked
    assert image(project).returncode == 0
    assert (project.parent / "seen" / "pyproject.toml").is_file()
