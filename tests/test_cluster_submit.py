"""Test lines of k8s/train.sh and k8s/eval.sh: read, shown and printed without any cluster."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stillhouse.cli import main
from stillhouse.compose import compose, from_command_line
from stillhouse.errors import ConfigError
from stillhouse.identity import eval_id, point_id, slug
from stillhouse.rundir import Json, directory_name
from stillhouse.spec import EvalSpec, TrainSpec
from stillhouse.sweep.cluster.submit_args import Line, read
from tests.builders.published import EVAL, TRAIN, lines

ROOT = Path(__file__).parent.parent
PUBLISHED = [line for line in lines(TRAIN) + lines(EVAL) if line.startswith("k8s/")]


def line_of(text: str) -> Line:
    """What a published line asks for."""
    door, name, *words = text.split()
    return read("train" if door == "k8s/train.sh" else "eval", name, words)


def dry_run(text: str, capsys: pytest.CaptureFixture[str]) -> Json:
    door, *words = text.split()
    assert main([Path(door).stem, *words, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("text", PUBLISHED, ids=lambda text: text.split()[1])
def test_the_spec_in_a_job_is_what_its_line_asks_for(text: str) -> None:
    door, name, *typed = text.split()
    line = line_of(text)
    if door == "k8s/train.sh":
        asked = compose(from_command_line(typed, TrainSpec), TrainSpec)
        sent = line.step.spec
        assert isinstance(sent, TrainSpec)
        typed_again = compose(from_command_line([*line.step.typed], TrainSpec), TrainSpec)
        assert sent == dataclasses.replace(typed_again, site=sent.site)
        assert point_id(sent) == point_id(asked) == line.step.id
        assert line.step.name == directory_name(slug(asked), line.step.id)
        assert (sent.place.name, sent.place.tags) == (name, asked.place.tags)
        assert sent.place.runs == "/runs"
    else:
        asked_eval = compose(from_command_line(typed, EvalSpec), EvalSpec)
        sent_eval = line.step.spec
        assert sent_eval == compose(from_command_line([*line.step.typed], EvalSpec), EvalSpec)
        assert isinstance(sent_eval, EvalSpec)
        assert eval_id(sent_eval) == eval_id(asked_eval) == line.step.id
        assert sent_eval.evaluation.lora_paths == asked_eval.evaluation.lora_paths


def test_a_job_says_what_it_is_called_and_which_adapters_it_scores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = dry_run(PUBLISHED[-1], capsys)
    told = job["metadata"]["annotations"]
    assert told["stillhouse/names"] == "eval"
    assert "dump/lmbda_1_int4" in told["stillhouse/words"], "as it was typed"
    job = dry_run(PUBLISHED[5], capsys)
    assert shlex.split(job["metadata"]["annotations"]["stillhouse/tags"]) == ["sweep", "lr"]
    assert "stillhouse/sweep" not in job["metadata"]["labels"], "a line belongs to no sweep"


def test_what_a_label_says_does_not_change_a_scoring_job() -> None:
    one, other = (read("eval", name, ["--lora-paths", "dump/a"]) for name in ("eval", "mine"))
    assert one.step.name == other.step.name


def test_what_differs_is_what_changes_something() -> None:
    said = read("train", "x", ["--lmbda", "0", "--learning-rate", "1e-5", "--quant-type", "int4"])
    assert said.differs == ("lmbda=0",), "int4 and 1e-5 are the defaults"
    assert read("train", "x", ["--pair", "tiny"]).differs == ("pair=tiny",)


def test_where_it_runs_is_said_in_the_same_line() -> None:
    for kind in ("train", "eval"):
        line = read(kind, "x", ["--queue", "team-a", "site=kueue", "--memory-gib=7"])
        assert (line.site.queue, line.site.site_name, line.site.memory_gib) == (
            "team-a", "kueue", 7,
        )  # fmt: skip
        assert "queue team-a" in "\n".join(line.about())


@pytest.mark.parametrize(
    ("kind", "words", "says"),
    [
        ("train", [], "a name comes first"),
        ("train", ["--lmbda", "0"], "a name comes first"),
        ("train", ["a/b", "--lmbda", "0"], "letters, digits"),
        ("train", ["x", "--lmda", "0"], 'Did you mean "lmbda"'),
        ("train", ["x", "--quant-type", "int5"], 'Did you mean "int4"'),
        ("train", ["x", "--learning-rate", "fast"], "optim.learning_rate"),
        ("train", ["x", "--lmbda"], "needs a value"),
        ("train", ["x", "lmbda=0,1"], "is a sweep"),
        ("train", ["x", "--name", "y"], "two names"),
        ("train", ["x", "--runs", "elsewhere"], "place of this machine"),
        ("train", ["x", "--output_dir", "dump/x"], "place of this machine"),
        ("train", ["x", "site=kueu"], 'Did you mean "kueue"'),
        ("eval", ["x", "--lora-path", "dump/a"], 'Did you mean "lora_paths"'),
        ("eval", ["x", "--suite", "mcq"], 'Did you mean "mcq5"'),
        ("eval", ["x", "--lmbda", "0"], 'no knob "lmbda"'),
        ("eval", ["x", "--lora-paths", "dump/a", "--tracker", "wandb"], 'no knob "tracker"'),
    ],
)
def test_a_slip_is_42_and_says_what_was_meant(
    kind: str, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([kind, *words, "--dry-run"]) == 42
    out, error = capsys.readouterr()
    assert says in error and out == ""
    assert error.startswith("ConfigError: ") and error.count("\n") <= 2


def test_a_secret_never_appears_in_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    token = "hf_" + "aB3" * 12
    assert main(["train", "x", "--tags", token, "--dry-run"]) == 42
    out, error = capsys.readouterr()
    assert token not in out + error


def test_one_letter_wrong_anywhere_in_a_published_flag_is_refused() -> None:
    flags = sorted({w for line in PUBLISHED for w in line.split() if w.startswith("--")})
    assert len(flags) > 10
    for flag in flags:
        kind = "eval" if "lora" in flag or "teacher" in flag else "train"
        for at in range(2, len(flag)):
            if flag[at] in "-_":
                continue
            wrong = flag[:at] + ("x" if flag[at] != "x" else "y") + flag[at + 1 :]
            with pytest.raises(ConfigError, match="no knob"):
                read(kind, "x", [wrong, "1"])


# ------------------------------------------------------------------------------- the scripts


def script(path: Path, *words: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "KUBECONFIG"} | more
    command = [str(path), *words]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_a_script_works_from_anywhere_and_through_a_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = dry_run(PUBLISHED[0], capsys)
    (tmp_path / "stillhouse").mkdir()  # is not imported, though it lies where we stand
    (tmp_path / "link.sh").symlink_to(ROOT / "k8s" / "train.sh")
    (tmp_path / "train.sh").symlink_to("link.sh")
    on_path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [*PUBLISHED[0].split()[1:], "--dry-run"]
    for path in (ROOT / "k8s" / "train.sh", tmp_path / "train.sh"):
        done = script(path, *words, cwd=tmp_path, PATH=on_path)
        assert done.returncode == 0, done.stderr
        job = yaml.safe_load(done.stdout)
        assert job["metadata"]["name"] == printed["metadata"]["name"]
        assert job["metadata"]["annotations"] == printed["metadata"]["annotations"]


def test_a_dry_run_with_json_is_one_object_with_the_job_in_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = dry_run(PUBLISHED[0], capsys)
    assert main(["train", *PUBLISHED[0].split()[1:], "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [yaml.safe_load(text) for text in said["manifests"]] == [manifest]
    assert said["totals"]["new"] == 1 and said["points"][0]["state"] == "new"


def test_a_dry_run_loads_no_client_and_says_what_else_would_be_sent(tmp_path: Path) -> None:
    program = (
        "import sys; from stillhouse.cli import main; code = main(['eval', 'x', '--dry-run'])\n"
        "print(sorted({'torch', 'kubernetes', 'pandas', 'rich'} & {*sys.modules})); sys.exit(code)"
    )
    done = script(Path(sys.executable), "-c", program, cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
    assert "ConfigMap stillhouse-code-" in done.stderr and "make image" in done.stderr
