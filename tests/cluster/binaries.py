"""Build the programs of a Kubernetes cluster once, and keep them outside the checkout.

`python -m tests.cluster.binaries` builds them if they are missing and prints their folder. The
folder's name is a hash of everything that goes into the build, so an existing folder is complete
and correct.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

SOURCES = Path(__file__).parent / "kube"
GO_AT_LEAST = (1, 26)  # what Kueue asks for; Kubernetes itself would take 1.24
KWOK = ("sigs.k8s.io/kwok", "v0.7.0")
KUEUE = ("sigs.k8s.io/kueue", "v0.19.0")
# Kueue keeps the certificate of its visibility server in /visibility. Ours has no right to that:
# relative to where it is started will do.
KUEUE_LINK = "-X sigs.k8s.io/kueue/pkg/visibility.certDir=visibility"
# What Kubernetes says its version is has to be told to two of its packages.
VERSIONED = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
STRIP = "-s -w"
# Module mode is said aloud: no vendor folder, no workspace, and go.sum is read, not written.
GO_ENV = {"CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false", "GOWORK": "off"}
PROGRAMS = ("kube", "pause", "kwok", "kueue")
PARTS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kubectl",
)

# What the real node needs of a Debian: a program of it, and the package it comes in.
NODE_PACKAGES: Mapping[str, str] = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
    "unshare": "util-linux",
    "openssl": "openssl",
}


class Missing(Exception):
    """Something that this machine would have to have; the message says how to get it."""


def key() -> str:
    """What names the folder: a hash over sources, versions, flags and the machine's kind."""
    facts = [
        GO_ENV,
        KWOK,
        KUEUE,
        KUEUE_LINK,
        STRIP,
        VERSIONED,
        platform.system(),
        platform.machine(),
    ]
    hashed = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in ("go.mod", "go.sum", "main.go", "pause/main.go"):
        hashed.update(f"\0{name}\0".encode() + (SOURCES / name).read_bytes())
    return hashed.hexdigest()[:12]


def folder() -> Path:
    """Where the programs are or would be: XDG_CACHE_HOME, or ~/.cache, by key."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "stillhouse" / f"kube-{key()}"


def ready() -> Path:
    """The folder, with PROGRAMS, a link for each of PARTS, and manifests/. Builds it where need be.

    Raises Missing where there is no Go or an old one, CalledProcessError where the build fails.
    """
    target = folder()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            check_go()
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as made:
                build(Path(made))
                os.chmod(made, 0o755)
                os.rename(made, target)
                os.mkdir(made)  # for the context manager to remove
    return target


def check_go() -> None:
    """Raises Missing where there is no Go, or one older than GO_AT_LEAST."""
    wanted = ".".join(map(str, GO_AT_LEAST))
    if not shutil.which("go"):
        raise Missing(f"no `go` on PATH: install Go {wanted} or later (https://go.dev/dl)")
    said = subprocess.run(
        ["go", "env", "GOVERSION"], check=True, capture_output=True, text=True
    ).stdout
    found = re.match(r"go(\d+)\.(\d+)", said)
    if not found or tuple(map(int, found.groups())) < GO_AT_LEAST:
        raise Missing(f"`go` is {said.strip()}: install Go {wanted} or later (https://go.dev/dl)")


def go(*args: str, into: Path | None = None) -> str:
    """What `go ARGS` prints, run among our sources."""
    env = {**os.environ, **GO_ENV} | ({"GOBIN": str(into)} if into else {})
    done = subprocess.run(
        ["go", *args], check=True, cwd=SOURCES, env=env, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def build(into: Path) -> None:
    """Fills the folder. On two cores: 14 minutes, or one where Go's own cache is warm."""
    version = go("list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes").strip()
    major, minor, _ = version.removeprefix("v").split(".")
    said = {"gitVersion": version, "gitCommit": version, "gitMajor": major, "gitMinor": minor}
    said |= {"gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z"}
    link = [f"-X {package}.{name}={value}" for package in VERSIONED for name, value in said.items()]
    tell(f"building Kubernetes {version} ...")
    go("build", "-ldflags", " ".join([STRIP, *link]), "-o", str(into / "kube"), ".")
    go("build", "-ldflags", STRIP, "-o", str(into / "pause"), "./pause")
    for name in PARTS:
        (into / name).symlink_to("kube")
    for (module, version), flags in ((KWOK, STRIP), (KUEUE, f"{STRIP} {KUEUE_LINK}")):
        # A module of its own each: their versions of the Kubernetes libraries are not ours.
        name = module.rsplit("/", 1)[-1]
        tell(f"building {name} {version} ...")
        go("install", "-ldflags", flags, f"{module}/cmd/{name}@{version}", into=into)
    copy_manifests(into / "manifests")


def copy_manifests(into: Path) -> None:
    """The kinds and webhooks of kwok and Kueue, from the modules that were just built."""

    def source(module: tuple[str, str]) -> Path:
        return Path(json.loads(go("mod", "download", "-json", "@".join(module)))["Dir"])

    kwok, kueue = source(KWOK), source(KUEUE)
    shutil.copytree(kueue / "config/components/crd/bases", into / "kueue")
    shutil.copy(kueue / "config/components/webhook/manifests.yaml", into / "kueue-webhooks.yaml")
    shutil.copy(kwok / "kustomize/crd/bases/kwok.x-k8s.io_stages.yaml", into / "kwok-stages.yaml")
    for path in (into, *into.rglob("*")):  # Go's module cache is read-only, and so are copies of it
        path.chmod(0o755 if path.is_dir() else 0o644)


def need_node_packages(install: bool) -> None:
    """Raises Missing, with the command, where the real node lacks packages; root may `install`."""
    lacking = sorted({p for program, p in NODE_PACKAGES.items() if not shutil.which(program)})
    if not lacking:
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *lacking]
    if not (install and os.geteuid() == 0 and shutil.which("apt-get")):
        raise Missing(f"the real node needs packages: {' '.join(command)}")
    subprocess.run(["apt-get", "update", "--quiet"], check=True)
    subprocess.run(command, check=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> int:
    """Install and build everything that may need a package index. Exit code 1 if that fails."""
    try:
        where = ready()
        if platform.system() == "Linux" and os.geteuid() == 0:
            need_node_packages(install=True)
    except Missing as missing:
        tell(f"make test-cluster: {missing}")
        return 1
    print(where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
