"""Test that no secret is sent or shown, and that nothing else is taken for one."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.errors import ConfigError
from stillhouse.spec import EvalSpec
from stillhouse.sweep.cluster import secrets
from stillhouse.sweep.cluster.jobspec import (
    eval_step,
    train_step,
)
from stillhouse.sweep.cluster.manifest import (
    refuse_unsendable,
)
from tests.builders.manifests import (
    rendered,
    tiny,
    typed,
)
from tests.builders.published import EVAL, TRAIN, lines

SECRETS = {
    "a Hugging Face token": "hf_" + "AbCdEfGh" * 4,
    "a W&B key": "0123456789abcdef0123456789abcdef01234567",
    "an API key": "sk-proj-abcdefgh01234567",
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "an AWS key": "AKIAIOSFODNN7EXAMPLE",
    "a Slack token": "xoxb-123456789012-abcdef",
    "a signed token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "a key in PEM": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a password in a URL": "https://ada:lovelace@host/path",
}


@pytest.mark.parametrize(("kind", "value"), SECRETS.items())
def test_a_secret_is_refused_wherever_it_stands_and_never_shown(kind: str, value: str):
    point, sweep = tiny()
    step = train_step(point, sweep)
    with_env = dataclasses.replace(sweep.site, pod_env={"X": value})
    cases = [
        (dataclasses.replace(step, words=(*step.words, f"data_path={value}")), sweep.site),
        (dataclasses.replace(step, words=(*step.words, "--tags", value)), sweep.site),
        (dataclasses.replace(step, words=(value,)), sweep.site),
        (dataclasses.replace(step, tags=("a", value)), sweep.site),
        (dataclasses.replace(step, names=(value,)), sweep.site),
        (step, with_env),
        (step, dataclasses.replace(sweep.site, wandb_secret=value)),
    ]
    for case, site in cases:
        with pytest.raises(ConfigError) as refused:
            rendered(case, site)
        said = str(refused.value)
        assert kind in said and "wandb_secret" in said
        assert value not in said


@pytest.mark.parametrize(
    ("kind", "text"),
    [(secrets.BY_NAME, "password=" + "hunter"), ("a W&B key", SECRETS["a W&B key"])],
)
def test_a_secret_among_the_settings_of_an_evaluation_is_found_as_in_words(kind: str, text: str):
    point, sweep = tiny()
    step = eval_step([point], [], sweep)
    assert isinstance(step.spec, EvalSpec)
    suite = dataclasses.replace(step.spec.suite, include_path=f"/runs/{text}")
    spec = dataclasses.replace(step.spec, suite=suite)
    with pytest.raises(ConfigError, match=f"include_path looks like {kind}"):
        refuse_unsendable([dataclasses.replace(step, spec=spec)], sweep.site)


def test_a_secret_in_one_point_of_many_is_found_before_the_first_is_sent():
    sweep = typed(f"pair=tiny lmbda=0,0.5,1 tags=[{SECRETS['an AWS key']}]")
    with pytest.raises(ConfigError, match="an AWS key"):
        refuse_unsendable((train_step(point, sweep) for point in sweep.points), sweep.site)


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "DB_PASSWORD", "aws_secret_access_key"]
)
def test_a_name_that_says_it_is_a_secret_is_believed(name: str):
    point, sweep = tiny()
    site = dataclasses.replace(sweep.site, pod_env={name: "anything"})
    with pytest.raises(ConfigError, match=name):
        rendered(train_step(point, sweep), site)
    words = ["run", f"{name}=anything"]
    with pytest.raises(ConfigError) as refused:
        secrets.refuse_words(words, "command line")
    assert "anything" not in str(refused.value)


kinds = st.sampled_from(sorted(SECRETS.items()))
around = st.text(st.characters(blacklist_categories=["L", "N", "Cs"]), max_size=8)


@given(kinds, around, around)
def test_a_secret_is_found_whatever_stands_around_it(secret, before: str, after: str):
    if secret[0] == "a password in a URL":
        before = after = ""  # what stands around may make it another URL
    before = before.replace("_", "")
    assert secrets.find(f"{before}{secret[1]}{after}") is not None


@given(st.text("0123456789abcdef", min_size=64, max_size=64), st.integers(), st.floats())
def test_no_id_digest_or_number_looks_like_a_secret(digest: str, whole: int, number: float):
    values = [digest, digest[:10], f"tiny-gkd-{digest[:10]}", f"name@sha256:{digest}", str(whole)]
    assert [secrets.find(value) for value in (*values, str(number))] == [None] * 6


def test_no_published_line_and_no_file_of_ours_looks_like_one():
    def is_refused(words: list[str]) -> bool:
        try:
            secrets.refuse_words(words, "a line")
        except ConfigError:
            return True
        return False

    ours = [line.split() for line in (*lines(TRAIN), *lines(EVAL))]
    ours.append(["max_new_tokens=128", "max_gen_toks=4", "wandb_secret=wandb"])
    ours.append([f"student_revision={'a' * 40}", "task-token-x=1"])
    ours.append(["--student-revision", "b" * 40, "--hf-secret", "hf-token"])
    assert [words for words in ours if is_refused(words)] == []
    assert is_refused(["--hf-secret", "hf_" + "a" * 34]), "one that is"
