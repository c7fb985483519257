"""Test the documentation: each command parses or runs, and each link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from stillhouse import cli
from stillhouse.compose import compose, from_command_line
from stillhouse.preflight_rules import EXIT_CODES
from stillhouse.spec import EvalSpec, TrainSpec
from tests.builders.cheap import CACHE
from tests.builders.sample_runs import Sample, write_sample

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


# A verdict is one whatever the pair, and of this one it takes seconds.
CHEAP_PAIR = ["teacher_steps=8", "student_steps=8", "sanity_max_nll=9", "max_new_tokens=6"]
CHEAP_PAIR += ["threads=1", f"cache_dir={ROOT / CACHE}"]


def commands(page: str) -> list[str]:
    """The lines of a page's shell blocks, without comments."""
    blocks = [text for kind, text in BLOCK.findall(page) if kind in ("", "bash")]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    doors = ("make ", "python ", "uv run", "stillhouse ", "accelerate ")
    return [line for line in lines if line.startswith(doors)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page}: {link}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A directory with sweeps/ and the finished quickstart that the README talks about."""
    place = tmp_path_factory.mktemp("checkout")
    (place / "sweeps").symlink_to(ROOT / "sweeps")
    write_sample(place / "runs", Sample(name="quickstart"))
    return place


@pytest.mark.parametrize("line", commands(README))
def test_every_command_of_the_readme_is_one(line, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    words = shlex.split(line.removeprefix("uv run "))
    if words[:2] == ["accelerate", "launch"]:
        words = ["python", *words[2:]]
    if words[0] == "make":
        assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text()
    elif words[:2] == ["python", "train.py"]:
        compose(from_command_line(words[2:], TrainSpec), TrainSpec)
    elif words[:2] == ["python", "eval.py"]:
        compose(from_command_line(words[2:], EvalSpec), EvalSpec)
    else:
        assert words[0] == "stillhouse"
        # What would train for minutes is planned: the same target, words and checks.
        verb = {"run": "plan"}.get(words[1], words[1])
        target = "--point" in words and "ID" in words
        rest = words[2:-2] if target else words[2:]
        if verb == "preflight":  # a few prompts and steps show as well that it is a command
            rest = ["2" if word == "50" else word for word in rest] + ["--prompts=4", *CHEAP_PAIR]
        code = cli.main([verb, *rest])
        is_answered = code in EXIT_CODES.values() if verb == "preflight" else code == 0
        assert is_answered, capsys.readouterr().err


@pytest.mark.parametrize("line", commands((ROOT / "docs" / "real.md").read_text()))
def test_every_command_of_the_page_on_real_weights_is_one(line):
    words = shlex.split(line.removeprefix("uv run "))
    if words[1] == "train.py":
        compose(from_command_line(words[2:], TrainSpec), TrainSpec)
    elif words[1] == "eval.py":
        compose(from_command_line(words[2:], EvalSpec), EvalSpec)
    else:
        assert words[:2] == ["uv", "pip"] or words[1] in cli.VERBS | cli.COMMANDS


def test_the_readme_shows_at_least_a_dozen_commands():
    assert len(commands(README)) >= 12


def test_the_sweep_that_the_readme_shows_is_the_quickstart():
    blocks = [text for kind, text in BLOCK.findall(README) if kind == "yaml"]
    [shown] = [text for text in blocks if text.startswith("question: ")]
    kept = (ROOT / "sweeps" / "quickstart.yaml").read_text()
    strip = [line.split("  #")[0].rstrip() for line in kept.splitlines()]
    assert shown.splitlines() == [line for line in strip if not line.startswith("#")]


def test_the_python_that_the_readme_shows_runs(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    [shown] = [text for kind, text in BLOCK.findall(README) if kind == "python"]
    names: dict[str, object] = {}
    exec(shown, names)
    assert len(names["frame"]) > 9  # type: ignore[arg-type]


def test_every_path_of_the_tree_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"^(?:  )?([\w/]+(?:\.py|/))", tree, re.M):
        assert (ROOT / name).exists() or (ROOT / "stillhouse" / name).exists(), name


def test_first_screen_is_a_sentence_a_table_and_two_commands():
    screen = README.split("## ")[0]
    assert "| arm" in screen and "make quickstart" in screen and "make test" in screen


def test_no_page_or_source_names_a_registrys_host():
    hosts = r"pyp[i]\.org|pythonhoste[d]|prox[y]\.golan[g]|registr[y]\.np[m]|crate[s]\.io"
    done = subprocess.run(["git", "grep", "-nIiE", hosts], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""


def test_no_table_that_is_published_names_a_path_of_the_machine_that_made_it():
    for file in (ROOT / "docs" / "results").glob("*/*.csv"):
        assert ",/" not in file.read_text(), file
