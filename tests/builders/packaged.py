"""Packages of files that we write, and those that carry real weights and rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from stillhouse import packages
from stillhouse.errors import ConfigError


def install(cache_dir: Path, name: str, version: str, files: Mapping[str, bytes]) -> None:
    """Put a package of these files where `uv pip install --target` would."""
    root = cache_dir / "packages"
    about = root / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    for file, content in {
        about: metadata.encode(),
        **{root / f: c for f, c in files.items()},
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def packages_at_hand(name: str, cache_dir: Path) -> None:
    """Let a test's cache have the packages of the project's; skip the test where there are none."""
    here = Path(os.environ.get("STILLHOUSE_CACHE", ".cache")).absolute()
    try:
        packages.find(name, here)
    except ConfigError as error:
        pytest.skip(str(error))
    if (here / "packages").is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / "packages").symlink_to(here / "packages")
