"""Test that every command in docs/cluster.md is valid, and that what it explains exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from stillhouse import cli
from stillhouse.compose import compose, from_command_line, options_of
from stillhouse.spec import TrainSpec
from stillhouse.sweep.state import STATES

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "cluster.md").read_text()
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.M | re.S)


def commands(page: str) -> list[str]:
    lines = [line for block in BLOCK.findall(page) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines]


COMMANDS = list(
    dict.fromkeys(
        [*commands(GUIDE), *commands(README.split("## On a cluster")[1].split("\n## ")[0])]
    )
)


def test_a_first_result_takes_ten_commands():
    assert len(commands(GUIDE.split("## Every day")[0])) == 10


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("stillhouse ")])
def test_every_verb_takes_its_words(line: str):
    _, verb, *words = shlex.split(line)
    assert verb in cli.VERBS
    _, rest = cli._parser(verb).parse_known_args(words)
    target, rest = cli._target(rest)
    compose(from_command_line([*rest, "site=cluster"], TrainSpec), TrainSpec)
    if verb == "push":  # its path is a laptop's
        return
    sweep = Path("sweeps") / Path(target or "quickstart").with_suffix(".yaml").name
    assert (ROOT / sweep).is_file()


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("kubectl apply")])
def test_every_file_that_is_applied_is_kubernetes(line: str):
    files = [word for word in shlex.split(line) if word.endswith(".yaml")]
    assert files
    for file in files:
        for content in yaml.safe_load_all((ROOT / file).read_text()):
            assert content["kind"] and content["metadata"]["name"], file


@pytest.mark.parametrize("line", [c for c in COMMANDS if c.startswith("make ")])
def test_every_target_exists(line: str):
    assert f"\n{line.split()[1]}:" in (ROOT / "Makefile").read_text()


def test_no_command_is_of_a_kind_that_nobody_checks():
    known = ("stillhouse ", "make ", "k8s/train.sh ")
    rest = [line for line in COMMANDS if not line.startswith(known)]
    kubectl = ("create namespace", "config set-context --current", "apply -f", "create secret")
    assert all(line.startswith(tuple(f"kubectl {verb}" for verb in kubectl)) for line in rest)


def test_the_line_without_a_sweep_file_prints_its_job():
    [line] = [c for c in COMMANDS if c.startswith("k8s/train.sh ") and "--dry-run" in c]
    done = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["kind"] == "Job"


def test_every_state_and_every_site_is_explained():
    explained = re.findall(r"^\| (\w+) \| ", GUIDE, re.M)
    assert {*STATES} <= {*explained}
    for name in {*options_of("site")} - {"local"}:
        assert f"site={name}" in GUIDE or f"site/{name}.yaml" in GUIDE, name
