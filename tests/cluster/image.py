"""Write a container image (an OCI archive) without a container engine."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "localhost/stillhouse"  # of every image on a test's node; the digest tells them apart
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


def write(
    archive: Path,
    files: Mapping[str, bytes],
    links: Mapping[str, str] | None = None,
    folders: Sequence[str] = (),
    **config: Any,
) -> str:
    """Writes an image of one layer: executable `files`, symbolic `links` (path to target) and empty
    `folders`, by paths without the first slash; `config` as in OCI: Env, Entrypoint, User.

    Returns what it is called, NAME@sha256:... The same content gives the same bytes.
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in folders:
            put(tar, name, kind=tarfile.DIRTYPE, mode=0o755)
        for name, content in sorted(files.items()):
            put(tar, name, content)
        for name, target in sorted((links or {}).items()):
            put(tar, name, kind=tarfile.SYMTYPE, target=target)
    blobs: dict[str, bytes] = {}

    def blob(kind: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(content)}

    root = blob("layer.v1.tar", layer.getvalue())
    system = {"os": "linux", "architecture": MACHINES[platform.machine()]}
    about = {**system, "config": config, "rootfs": {"type": "layers", "diff_ids": [root["digest"]]}}
    parts = {"config": blob("config.v1+json", encoded(about)), "layers": [root]}
    kind = "application/vnd.oci.image.manifest.v1+json"
    manifest = blob("manifest.v1+json", encoded({"schemaVersion": 2, "mediaType": kind, **parts}))
    with tarfile.open(archive, "w") as tar:
        put(tar, "oci-layout", encoded({"imageLayoutVersion": "1.0.0"}))
        put(tar, "index.json", encoded({"schemaVersion": 2, "manifests": [manifest]}))
        for digest, content in blobs.items():
            put(tar, f"blobs/sha256/{digest}", content)
    return reference(archive)


def reference(archive: Path) -> str:
    """What the one image of an OCI archive is called on a test's node: NAME@sha256:…."""
    with tarfile.open(archive) as tar:
        index = tar.extractfile("index.json")
        assert index, f"{archive} is not an OCI archive"
        (manifest,) = json.load(index)["manifests"]
    return f"{NAME}@{manifest['digest']}"


def put(
    tar: tarfile.TarFile,
    name: str,
    content: bytes = b"",
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o755,
    target: str = "",
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size = kind, mode, target, len(content)
    tar.addfile(info, io.BytesIO(content))


def encoded(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
