"""Test that a pod gets exactly the text a user wrote, with every quote and backslash.

value ─► words ─► flags        and        words ─► manifest ─► YAML ─► kubelet ─► words
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stillhouse.compose import Overrides, as_command_line, from_command_line, from_json
from stillhouse.errors import ConfigError
from stillhouse.rundir import Json
from stillhouse.spec import TrainSpec
from stillhouse.sweep.cluster.jobspec import drive_step, train_step
from stillhouse.sweep.cluster.manifest import render
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Sweep
from stillhouse.text import number_of, shell_line
from tests.manifest_checklist import check

ODD = "\\'\"$(){}[],:= \n\t#%aé0~!*&|>\u2028\x85"
TEXT = st.one_of(st.text(max_size=12), st.text(alphabet=ODD, max_size=8)).filter(
    lambda text: "${" not in text  # refused, in a file and on a command line
)
SETTING = st.none() | st.booleans() | st.integers() | TEXT
SETTING |= st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
    "place.name": TEXT,
    "place.tags": st.lists(TEXT, max_size=3),
    "data.data_path": TEXT,
    "data.prompt_template": TEXT,
    "data.chat_template_kwargs": st.dictionaries(TEXT, SETTING, max_size=3),
    "place.commits": st.dictionaries(st.from_regex(r"[A-Za-z/._@-]{1,9}", fullmatch=True), TEXT),
    "site.pod_env": st.dictionaries(TEXT, TEXT, max_size=2),
    "optim.learning_rate": st.floats(allow_nan=False),
}


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(VALUES)), st.data())
def test_a_value_that_becomes_a_word_is_read_as_the_same_value(
    path: str, data: st.DataObject
) -> None:
    value = data.draw(VALUES[path])
    (word,) = as_command_line(Overrides({}, {path: value}))
    assume("${" not in word)
    back = from_command_line([word], TrainSpec).values[path]
    assert back == value and (repr(back) == repr(value) or isinstance(value, float)), word


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("\\", r"'\\'"),
        (r"C:\new", r"'C:\new'"),
        (r"a\'b", r"'a\\\'b'"),
        ("it's", r"'it\'s'"),
        ("é", "'é'"),
        ("two\nlines", "'two\nlines'"),
    ],
)
def test_in_hydras_quotes_only_backslashes_before_a_quote_are_doubled(
    value: str, word: str
) -> None:
    assert as_command_line(Overrides({}, {"place.name": value})) == [f"name={word}"]
    assert from_command_line([f"name={word}"], TrainSpec).values == {"place.name": value}


def kubelets(text: str, environment: Mapping[str, str]) -> str:
    """What a container is given for an argument: $(NAME) is filled in, and $$ is $."""

    def filled(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return environment.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", filled, text)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    runs = tmp_path_factory.mktemp("runs")
    return load_sweep(None, ["pair=tiny", "seeds=1", "owner=ada"], runs, site="cluster")


WORD = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=9)
WORD |= st.text(alphabet=ODD.replace("\x85", ""), min_size=1, max_size=9)
WORD |= st.sampled_from(["$(HOME)", "$$(HOME)", "$$", "a=$(OMP_NUM_THREADS)"])


@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORD, max_size=3))
def test_a_pod_is_given_the_words_that_the_launcher_has(sweep: Sweep, words: list[str]) -> None:
    step = drive_step(sweep, None)
    step = dataclasses.replace(step, words=(*words, *step.words))
    job = render(step, sweep.site, "0123456789abcdef-01234567")
    assert shlex.split(job["metadata"]["annotations"]["stillhouse/words"]) == [*step.words]
    assert in_pod(job) == [*step.words]
    assert [said for said in check(job) if "words" in said] == []
    step = train_step(sweep.points[0], sweep)
    assert step.spec is not None
    spec = dataclasses.replace(
        step.spec, place=dataclasses.replace(step.spec.place, tags=tuple(words))
    )
    job = render(dataclasses.replace(step, spec=spec), sweep.site, "0123456789abcdef-01234567")
    assert from_json(in_pod(job)[-1], TrainSpec).place.tags == tuple(words)


def in_pod(job: Json) -> list[str]:
    """The arguments of the entry point, as a kubelet leaves them."""
    args: list[str] = job["spec"]["template"]["spec"]["containers"][0]["args"]
    given_ = [kubelets(word, {"HOME": "/home", "OMP_NUM_THREADS": "8"}) for word in args]
    return given_[given_.index("--") + 1 :]


@pytest.mark.parametrize("where", ["question", "tag", "key", "name"])
def test_a_sweep_file_fills_in_nothing_and_says_so(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", "a private thing")
    text = {
        "question": "question: 'Does ${oc.env:MINE} help?'\nbase: {pair: tiny}\n",
        "tag": "base: {pair: tiny, tags: ['${oc.env:MINE}']}\n",
        "key": "base: {pair: tiny, chat_template_kwargs: {'${oc.env:MINE}': 1}}\n",
        "name": "base: {pair: tiny}\npoints: [{name: '${MINE}', lmbda: 0}]\n",
    }[where]
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"\$\{…\} is not filled in") as refused:
        load_sweep(str(tmp_path / "s.yaml"), [], tmp_path)
    assert "private" not in str(refused.value)


@given(st.lists(TEXT.map(lambda text: f"prompt_template={text}") | TEXT, max_size=4))
def test_a_line_for_a_shell_is_read_as_the_words_it_was_made_of(words: list[str]):
    assert shlex.split(shell_line(words)) == words


def test_a_line_for_a_shell_quotes_values_so_that_a_person_can_read_them():
    words = ["lmbda=0", "data_path='a b'", "name=my run", "target_modules=[a,b]"]
    said = """lmbda=0 data_path="'a b'" name='my run' target_modules='[a,b]'"""
    assert shell_line(words) == said
    assert [number_of(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
