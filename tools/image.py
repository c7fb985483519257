#!/usr/bin/env python3
"""Build the pods' image (`make image`) with whichever builder this machine has.

    image.py [NAME]

NAME is a repository that the cluster can pull from (registry.example/team/stillhouse). The image is
pushed there, and the line for conf/site is printed, with the digest that the registry reports.
Without NAME, or with ARCHIVE=FILE in the environment, nothing is pushed. Standard library only.

The build context is a copy of the files that `.dockerignore` names and git tracks, in their current
state. Nothing else can get into a layer, and a secret in any of them is refused.

Environment: ENGINE (docker, podman or buildah; the first that works), BASE, INDEX, UV_VERSION (the
Dockerfile's arguments), ARCHIVE (with podman or buildah: write an OCI archive, for a node that
imports it).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ENGINES = ("docker", "podman", "buildah")
ARGUMENTS = ("UV_VERSION", "BASE", "INDEX")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Refused(Exception):
    """The image cannot be built or sent; the text says what to do."""


def engine() -> str:
    """The builder to use: the one that is asked for, or the first that answers."""
    asked = os.environ.get("ENGINE")
    for name in (asked,) if asked else ENGINES:
        if shutil.which(name) is None:
            continue
        # The docker command may be here without its daemon.
        probe = subprocess.run([name, "info"], capture_output=True, text=True)
        if probe.returncode == 0:
            return name
    raise Refused(
        f"no {asked or 'docker, podman or buildah'} that works here; install one of them (buildah"
        " and podman need no daemon), or build k8s/Dockerfile elsewhere, from `git archive HEAD`"
    )


def run(*command: str, shows: bool = False) -> str:
    """Standard output of a command that has to succeed; "" where it is shown instead."""
    done = subprocess.run(command, stdout=None if shows else subprocess.PIPE, text=True)
    if done.returncode:
        raise Refused(f"{' '.join(command[:2])} failed with {done.returncode}; its words are above")
    return done.stdout or ""


def tag() -> str:
    """The commit of the image, to tell images apart in a registry; pods use the digest."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    described = subprocess.run(words, capture_output=True, text=True)
    return described.stdout.strip() or "local"


def context(into: Path) -> None:
    """Copy what the image is built from.

    Raises:
        Refused: git does not track one of the files, or one of them has a secret.
    """
    sys.path.insert(0, str(ROOT))  # this file is started as it is, by any Python
    from stillhouse.errors import ConfigError
    from stillhouse.sweep.cluster.project_files import project_files, refuse_secrets

    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    names = [line[1:] for line in lines if line.startswith("!")]
    try:
        for path, file in project_files(ROOT, names).items():
            refuse_secrets(path, file.read_bytes())
            (into / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, into / path)
    except ConfigError as error:
        raise Refused(str(error)) from error
    for name in names:  # the Dockerfile copies a folder that may be empty, too
        if (ROOT / name).is_dir():
            (into / name).mkdir(parents=True, exist_ok=True)


def build(builder: str, reference: str) -> None:
    """Build k8s/Dockerfile from a copy of the checkout that holds nothing else."""
    given = {name: os.environ.get(name, "") for name in ARGUMENTS}
    options = [f"--build-arg={name}={value}" for name, value in given.items() if value]
    # OCI, because the digest of the manifest is what a cluster pulls by.
    kind = [] if builder == "docker" else ["--format=oci"]
    with tempfile.TemporaryDirectory() as folder:
        context(Path(folder))
        file = [f"--file={folder}/k8s/Dockerfile", f"--tag={reference}", folder]
        run(builder, "build", *kind, *options, *file, shows=True)


def push(builder: str, reference: str, to: str | None) -> str:
    """Send the image to its registry, or to `to`; the digest under which it is known there."""
    if builder == "docker":
        if to is not None:
            raise Refused("ARCHIVE needs podman or buildah: docker cannot say an archive's digest")
        run(builder, "push", reference, shows=True)
        known = run(builder, "inspect", '--format={{join .RepoDigests " "}}', reference)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "digest"
            target = [f"oci-archive:{to}:{reference}"] if to else []
            run(builder, "push", f"--digestfile={file}", reference, *target)
            known = file.read_text()
    found = DIGEST.search(known)
    if found is None:
        raise Refused(f"{builder} does not say the digest of {reference}; look into the registry")
    return found[0]


def main(argv: list[str]) -> int:
    """0 when there is an image, 1 when it was refused."""
    name, archive = (argv or [""])[0], os.environ.get("ARCHIVE") or None
    try:
        if len(argv) > 1 or "@" in name or ":" in name.rpartition("/")[2]:
            raise Refused(
                "one NAME, without a tag: make image IMAGE=registry.example/team/stillhouse"
            )
        builder = engine()
        reference = f"{name or 'localhost/stillhouse'}:{tag()}"
        build(builder, reference)
        if not name and archive is None:
            print(
                f"built {reference}, which is only here. To use it in a cluster, name a repository"
            )
            print("that its nodes can pull from: make image IMAGE=registry.example/team/stillhouse")
            return 0
        digest = push(builder, reference, archive)
    except Refused as error:
        print(f"make image: {error}", file=sys.stderr)
        return 1
    print(f"written to {archive}." if archive else "pushed.", "The line for conf/site, or a word:")
    print(f"image: {reference.rpartition(':')[0]}@{digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
