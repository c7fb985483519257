"""Packages that carry weights or rows: what is found, and what is said where something is amiss."""

from pathlib import Path

import pytest

from stillhouse import packages
from stillhouse.errors import ConfigError
from stillhouse.packages import PACKAGES, Package, find
from tests.builders.packaged import install

KNOWN = Package(
    "1.2",
    ("a_box/*.txt",),
    "8b92704951e68fd1b03e595268ae89b1f4921ca7748c964bbacca3111f81aa5c",
)


@pytest.fixture(autouse=True)
def a_known_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "a-box", KNOWN)


def refusal(cache_dir: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        find("a-box", cache_dir)
    return str(caught.value)


def test_a_package_in_the_cache_gives_the_files_that_are_used(tmp_path: Path) -> None:
    install(
        tmp_path, "a-box", "1.2", {"a_box/b.txt": b"two", "a_box/a.txt": b"one", "a_box/x.py": b""}
    )
    found = find("a-box", tmp_path)
    assert found == {
        f"a_box/{name}": tmp_path / "packages" / "a_box" / name for name in ("a.txt", "b.txt")
    }


def test_a_package_that_is_missing_is_refused_with_the_line_that_installs_it(
    tmp_path: Path,
) -> None:
    line = f"get it with `uv pip install --no-deps --target {tmp_path}/packages a-box==1.2`"
    assert refusal(tmp_path) == f"a-box is not installed; {line}"
    install(tmp_path, "a-box", "1.1", {"a_box/a.txt": b"one"})
    assert refusal(tmp_path) == f"a-box is of version 1.1; {line}"


def test_files_that_are_not_what_is_known_are_refused(tmp_path: Path) -> None:
    install(tmp_path, "a-box", "1.2", {"a_box/b.txt": b"two", "a_box/a.txt": b"three"})
    said = refusal(tmp_path)
    assert f"a-box in {tmp_path}/packages: its files are not those of version 1.2" in said
    assert f"`uv pip install --no-deps --target {tmp_path}/packages --reinstall a-box==1.2`" in said


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    install(tmp_path, "a-box", "1.2", {"a_box/a.txt": b"one"})
    (tmp_path / "packages" / "a_box" / "a.txt").unlink()
    again = "install it again with `uv pip install --no-deps --target"
    assert f"a-box in {tmp_path}/packages: a_box/*.txt is missing; {again}" in refusal(tmp_path)
    install(tmp_path, "a-box", "1.2", {"a_box/a.txt": b"one"})
    listed = tmp_path / "packages" / "a_box-1.2.dist-info" / "RECORD"
    listed.write_text("a_box/a.txt,,\na_box/b.txt,,\na_box/x.py,,\n")
    assert f"a-box in {tmp_path}/packages: a_box/b.txt is missing; {again}" in refusal(tmp_path)


def test_all_that_a_package_needs_is_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find(packages.GEMMA, tmp_path)
    words = str(caught.value).partition("get it with `")[2].rstrip("`").split()
    names = [packages.GEMMA, *(f"{packages.GEMMA}-part{n}" for n in (1, 2, 3, 4))]
    assert words[6:11] == [f"{name}==1.0.0" for name in names]
