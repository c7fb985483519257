"""Test how the numbers of a preflight become a verdict, and what a plan says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse import preflight_rules
from stillhouse.cli import main
from stillhouse.compose import compose, data_file, from_command_line
from stillhouse.errors import ConfigError
from stillhouse.preflight_rules import Measured, decide, rules_of
from stillhouse.rundir import Runs, write_json
from stillhouse.spec import TrainSpec

RULES = rules_of(data_file("preflight"), "conf/preflight.yaml")


def numbers(**values: float | tuple[float, float, float]) -> dict[str, Measured]:
    """Numbers with their intervals; one that is given alone has a narrow one."""
    whole = {k: v if isinstance(v, tuple) else (v, v - 0.01, v + 0.01) for k, v in values.items()}
    return {name: Measured(*ends, 64) for name, ends in whole.items()}


# What pairs of the zoo showed at step 0 (docs/results/zoo), and what became of them.
BETA = {1: preflight_rules.asked_numbers(1, 200), 0: preflight_rules.asked_numbers(0, 200)}
PLAN = numbers(reverse_kl=3, teacher_lead=0.7, kept_25=0.37, forward_kl=2.9)
PAIRS = {
    "the same style": (
        BETA[1] | numbers(reverse_kl=1, teacher_lead=0.7, kept_25=0.74, forward_kl=0.4),
        "likely",
    ),
    "other words": (
        BETA[0] | numbers(reverse_kl=10, teacher_lead=0.8, kept_25=0.1, forward_kl=6),
        "unlikely",
    ),
    "a long preamble": (
        BETA[1] | numbers(reverse_kl=3, teacher_lead=0.6, kept_25=0.05, forward_kl=6.3),
        "unlikely",
    ),
    "another mark": (
        BETA[1] | numbers(reverse_kl=5, teacher_lead=0.6, kept_25=0.4, forward_kl=4),
        "unlikely",
    ),
    "a plan first, forward KL": (BETA[0] | PLAN, "likely"),
    "a plan first, reverse KL": (BETA[1] | PLAN, "unsure"),
    "nothing new": (
        BETA[1] | numbers(reverse_kl=1.6, teacher_lead=-0.2, kept_25=1, forward_kl=1.9),
        "unlikely",
    ),
    "a student at its capacity, which fails": (
        BETA[1] | numbers(reverse_kl=0.4, teacher_lead=0.3, kept_25=0.8, forward_kl=0.1),
        "unsure",
    ),
    "long answers of which few tokens matter, which gain": (
        BETA[1] | numbers(reverse_kl=0.7, teacher_lead=0.8, kept_25=0.45, forward_kl=0.14),
        "unsure",
    ),
    "the same function": (BETA[1] | numbers(reverse_kl=(0, 0, 0), teacher_lead=0), "unlikely"),
    "without answers": (BETA[1] | numbers(reverse_kl=1, told_apart=0.6), "unsure"),
    "a lead that may be none": (
        BETA[1] | numbers(reverse_kl=1, teacher_lead=(0.15, 0.02, 0.28), kept_25=0.9, forward_kl=1),
        "unsure",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_shipped_rules_say_what_was_seen_of_such_pairs(name: str) -> None:
    measured, expected = PAIRS[name]
    assert decide(RULES, measured)["verdict"] == expected


def test_a_difference_of_patterns_says_nothing_of_a_run_that_is_much_longer() -> None:
    measured, _ = PAIRS["other words"]
    assert decide(RULES, measured | preflight_rules.asked_numbers(0, 1000))["verdict"] == "unsure"


def test_a_pilot_that_gains_settles_what_the_rest_leaves_unsure() -> None:
    measured, _ = PAIRS["a plan first, reverse KL"]
    assert decide(RULES, measured | numbers(pilot_gain=0.2))["verdict"] == "likely"


def test_a_verdict_names_its_rule_and_its_reasons_in_numbers() -> None:
    said = decide(RULES, PAIRS["a long preamble"][0])
    assert said["rule"] == "patterns_differ"
    assert said["recipe"] == "rescue=sft_alone, beside rescue=cold_start"
    assert said["reasons"] == [
        "the teacher cannot go on from what the student begins, and itself writes otherwise",
        "kept_25 below 0.3: 0.05 [0.04, 0.06], n = 64",
        "forward_kl above 5.3: 6.3 [6.29, 6.31], n = 64",
        "max_steps below 300: 200",
    ]
    assert "76 runs" in said["calibrated_on"]


def rule(**fields: Any) -> dict[str, Any]:
    plain = {"rule": "r", "when": [], "verdict": "unsure", "reason": "so", "recipe": None}
    return {"calibrated_on": "nothing", "fitted_on": [], "rules": [plain | fields]}


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        (rule(verdict="maybe"), "rules.0.verdict: Input should be 'likely', 'unlikely' or"),
        (rule(wen=[]), "wen"),
        (rule(when=[{"number": "x", "end": "low", "side": "above", "threshold": 1}]), "last rule"),
        (
            {"calibrated_on": "nothing", "fitted_on": [], "rules": []},
            "the last rule must always hold",
        ),
    ],
)
def test_rules_that_are_none_are_refused(plain: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rules_of(plain, "a file")


def test_what_is_not_defined_holds_for_nothing_and_is_null_in_json() -> None:
    nothing = Measured(float("nan"), float("nan"), float("nan"), 3)
    assert Measured.of(nothing.as_json()).as_json() == {
        "value": None, "low": None, "high": None, "n": 3,
    }  # fmt: skip
    assert decide(RULES, {"kept_25": nothing})["verdict"] == "unsure"


# ---- what it is of


def spec_of(line: str) -> TrainSpec:
    return compose(from_command_line(line.split(), TrainSpec), TrainSpec)


@pytest.mark.parametrize("change", ["beta=0", "max_steps=50", "quant=none", "on_loss=pg"])
def test_a_verdict_is_of_a_pair_with_a_loss_and_a_number_of_steps(change: str) -> None:
    assert preflight_rules.key_of(spec_of("pair=tiny")) != preflight_rules.key_of(
        spec_of(f"pair=tiny {change}")
    )


@pytest.mark.parametrize("change", ["seed=3", "method=hybrid", "threads=1", "learning_rate=1e-3"])
def test_it_is_not_of_what_a_sweep_varies_besides(change: str) -> None:
    assert preflight_rules.key_of(spec_of("pair=tiny")) == preflight_rules.key_of(
        spec_of(f"pair=tiny {change}")
    )


# As a file keeps it: the verdict is of the rules of another day, the numbers stay what they are.
FOUND: dict[str, Any] = {
    "verdict": "likely", "rule": "gone", "recipe": None, "reasons": ["it was said so once"],
    "numbers": {name: m.as_json() for name, m in PAIRS["a long preamble"][0].items()},
    "facts": {"quantization_error": 0.0823},
}  # fmt: skip


def planned(runs: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["plan", "pair=tiny", "lmbda=0,1", "beta=0,1", "--runs", str(runs), *more]) == 0
    return capsys.readouterr().out


def test_a_plan_shows_the_verdicts_that_are_known_and_how_to_get_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = planned(tmp_path, capsys)
    assert "will these pairs distil (preflight)?" in said
    how = "100 steps of 32 tokens)"
    assert f"not asked of tiny in int4 in groups of 32 (jsd, beta 0, {how} and of 1 more: " in said
    spec = spec_of("pair=tiny beta=1")
    write_json(Runs(tmp_path).verdict_file("tiny", preflight_rules.key_of(spec)), FOUND)
    said = planned(tmp_path, capsys)
    known = (
        f"in groups of 32, weights changed by 8.2% (jsd, beta 1, {how}: the teacher cannot go on"
    )
    assert f"unlikely tiny in int4 {known}" in said
    assert f"not asked of tiny in int4 in groups of 32 (jsd, beta 0, {how}: stillhouse pre" in said
    (command,) = [line.partition(": ")[2] for line in said.splitlines() if "not asked" in line]
    words = command.split()[2:]
    assert words[-2:] == ["--runs", str(tmp_path)]
    asked = compose(from_command_line(words[:-2], TrainSpec), TrainSpec)
    assert preflight_rules.key_of(asked) == preflight_rules.key_of(spec_of("pair=tiny beta=0"))
    plan = json.loads(planned(tmp_path, capsys, "--json"))
    assert [(one["beta"], one["verdict"]) for one in plan["preflight"]] == [
        (0, None),
        (1, "unlikely"),
    ]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"numbers": {"x": 1}}', "\0"])
def test_a_torn_verdict_is_one_line_of_a_plan(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Runs(tmp_path).verdict_file("tiny", preflight_rules.key_of(spec_of("pair=tiny beta=1")))
    file.parent.mkdir()
    file.write_text(content)
    said = planned(tmp_path, capsys)
    assert f"  unreadable {file}: " in said and "not asked of tiny" in said


def test_a_plan_names_an_unquantised_pair_and_one_step_as_a_person_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pair=tiny_told", "max_steps=1", "max_new_tokens=1", "prompt_template='{question} ='"]
    assert main(["plan", *words, "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "not asked of tiny_told (jsd, beta 1, 1 step of 1 token): stillhouse pref" in said
    assert """prompt_template="'{question} ='" --runs""" in said
    assert "1 point, rule of thumb: " in said
