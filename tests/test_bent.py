"""Test that input with one changed field gives an answer or an error message (`tests/bent.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bent import KINDS, asked, objects, run, sample

from stillhouse.errors import ConfigError, ContractError
from stillhouse.sweep.cluster.cache import NamespaceCache
from stillhouse.sweep.cluster.ledger import Ledger
from stillhouse.sweep.cluster.objects import job_view, last_words, notes, pod_view, viewed
from stillhouse.sweep.grid import load_sweep

COUNT = 25


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bent")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_bent_input_ends_in_an_answer_or_a_sentence(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    if kind in ("status_file", "score"):
        sample.cache_clear()
    assert run(kind, COUNT) >= COUNT


# ------------------------------------------------------------------ what they have shown


@pytest.fixture
def cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> NamespaceCache:
    monkeypatch.chdir(place)
    return NamespaceCache(Ledger(NOBODY, "stillhouse-runs"))


NOBODY: Any = None  # a cluster that is never asked


def edited(number: int, **notes: str) -> Any:
    job = objects()[number][1]
    told = {f"stillhouse/{name}": text for name, text in notes.items()}
    meta = job["metadata"] | {"annotations": job["metadata"]["annotations"] | told}
    return job | {"metadata": meta}


@pytest.mark.parametrize(
    ("name", "text"),
    [("attempts", "[{}]"), ("attempts", "no"), ("attempts", '{"a":1}'), ("devices", "two"),
     ("names", "it's")],
)  # fmt: skip
def test_a_jobs_annotation_that_somebody_edited_makes_its_point_unreadable(
    name: str, text: str, cache: NamespaceCache
) -> None:
    first, second = (point.id for point in asked().points)
    cache.learn("jobs", edited(0, **{name: text}))
    seen = cache.look(first, None)
    assert seen.state == "unreadable" and seen.cause is not None
    job = objects()[0][1]["metadata"]["name"]
    assert f"Job {job}: annotation stillhouse/{name}: not what we write" in seen.cause
    assert f"kubectl annotate job {job} stillhouse/{name}-" in seen.cause
    assert cache.look(second, None).state == "new", "and nobody else's"
    cache.learn("jobs", edited(1, **{name: text}))  # it failed: the cause is what it says itself
    assert cache.look(first, None).state == "failed"


def test_an_object_of_another_form_is_a_remark_and_hides_nothing(cache: NamespaceCache) -> None:
    job, pod = objects()[0][1], objects()[6][1]
    cache.learn("jobs", job)
    cache.learn("pods", pod | {"status": {"phase": 5}})
    cache.learn("jobs", {"metadata": {"name": "bare"}})
    cache.learn("events", {"metadata": {}, "lastTimestamp": "yesterday"})
    assert cache.look(asked().points[0].id, None).state == "waiting"
    said = sorted(cache.odd)
    assert [line.split(":")[0] for line in said] == [
        "Job bare", "event (without a name)", "pod pod",
    ]  # fmt: skip
    assert all("kubectl get -o yaml" in line for line in said)
    assert [*notes([{"metadata": {}, "lastTimestamp": "yesterday"}])] == []


def test_a_view_has_the_types_that_it_says(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    job, pod = objects()[0][1], objects()[6][1]
    for view, item in ((job_view, job | {"status": {"ready": "1"}}),
                       (pod_view, pod | {"spec": {"nodeName": 1}})):  # fmt: skip
        with pytest.raises(ContractError, match="not of the form that one has"):
            viewed(view, item)
    for odd in ('{"exit_code": "one"}', '{"exit_code": 1, "cause": 5}', "{", "{" * 5000, "{}[]"):
        assert last_words(odd).exit_code is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("base: {pair: tiny, tags: [[a]]}", r"s\.yaml: tags: \['a'\] is not text"),
        ("base: {pair: tiny, [1]: 2}", "found a list or a mapping as a key"),
        ("base: {pair: tiny, seed: !!int x}", "a value is not of its type"),
        ("base: {pair: tiny, seed: !!bool x}", "a value is not of its type"),
        ("base: {pair: tiny, seed: " + "9" * 5000 + "}", "a value is not of its type"),
        ("base: {pair: tiny}\ngrid: {lmbda: [0, 1]}\neval: {suite: tiny}\n"
         "compare: {by: lmbda, metric: tiny_gen/exact_match, baseline: [0]}",
         r"compare\.baseline = \[0\]: not a value of lmbda"),
        ("base: {pair: tiny, chat_template_kwargs: {1: 2}}", "chat_template_kwargs = 1"),
    ],
)  # fmt: skip
def test_a_sweep_file_that_cannot_be_meant_says_where(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_sweep(str(tmp_path / "s.yaml"), [], tmp_path)
