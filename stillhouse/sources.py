"""Identify which weights, tokenizer and rows a point depends on, and detect when they change.

A point's spec only names them, so they are not part of its content.

    sources: {"student":       {"what": name, "kind": "model", "digest": of weights, "settings": …}
              "teacher":       {"what": name, "kind": "model", "commit": of the hub, "open": for a
                                revision that may move, its name in `place.commits`}
              "tokenizer":     {"what": name, "kind": "tokenizer", "digest": …}
              "data":          {"what": name, "kind": "rows", "digest": …}
              "other_prompts": {"what": name, "kind": "rows", "digest": …}}

They are recorded when a point is first used, and compared at every later use. What is not on this
machine is left out and not reported. `what` is for people and is not compared: it may be a path,
and two machines can keep the same file at different paths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from stillhouse import fingerprints, local_models, packaged_prompts
from stillhouse.errors import ConfigError, ContractError, DataError
from stillhouse.rundir import Json, RunDir
from stillhouse.spec import DataSpec, EvalSpec, PairSpec, RescueSpec, TrainSpec

SETTINGS = ("config.json", "generation_config.json")  # of a model, beside its weights
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
PROBLEMS = ("train.jsonl", "held_out.jsonl")  # generated ones that are trained on, or watched
# For runs on a pair or rows that this project did not generate, which recorded no sources.
NOT_RECORDED = (
    "it was begun before a run recorded what it rests on: its weights and rows may have been others"
    " than are here, and its turns may have ended elsewhere"
)


def rests_on(spec: TrainSpec | EvalSpec) -> tuple[Any, ...]:
    """The fields that decide a spec's sources: specs that are equal in them have the same."""
    commits = tuple(sorted(spec.place.commits.items()))
    if isinstance(spec, EvalSpec):
        return spec.pair, commits
    data, rescue = spec.data, spec.rescue
    named = data.data_source, data.data_path, data.data_split
    return spec.pair, named, bool(rescue.other_prompts), rescue.other_file, commits


def sources_of(spec: TrainSpec | EvalSpec, cache_dir: Path) -> Json:
    """The sources of a point, or of an evaluation of its pair, that are on this machine now.

    Cheap where nothing changed: large files are read once (`fingerprints`). Never raises for what
    cannot be read: the code that needs it reports why.
    """
    found = of_pair(spec.pair, cache_dir, spec.place.commits)
    if isinstance(spec, TrainSpec):
        found |= _of_data(spec, cache_dir)
    return found


def differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A sentence for each source that is here and is not what was recorded."""
    both = [(key, recorded[key], here[key]) for key in recorded if key in here]
    return [said for key, then, now in both if (said := _difference(key, then, now))]


def drift(run: RunDir, spec: TrainSpec, here: Mapping[str, Any]) -> list[str]:
    """A sentence for each source of a run that is not what it was when the run began.

    [] for a run that never began. `here`: `sources_of` its spec. If the run recorded no sources,
    generated weights are compared by its adapter's contract and its record; for other weights and
    rows nothing is known, and one sentence says so.

    Raises:
        ContractError: a run directory that another version wrote, or that is not what it says.
    """
    record = run.record()
    return [] if record is None else drift_of(run, record, spec, here)


def drift_of(run: RunDir, record: Json, spec: TrainSpec, here: Mapping[str, Any]) -> list[str]:
    """The same as `drift`, for a record that was already read."""
    if "sources" in record:
        return differences(record["sources"], here)
    if spec.pair.pair_source != "generated" or spec.data.data_source != "generated":
        return [NOT_RECORDED]
    if spec.rescue.other_file is not None:
        return [NOT_RECORDED]
    return differences(_before_sources(spec, record, run.contract()), here)


def refusal(run: RunDir, found: list[str]) -> str:
    """The error text for resuming a run whose sources have changed."""
    return (
        f"{run.path}: {'; '.join(found)}. Restore that, or begin this point anew: the same command"
        f" with --sources=new, which keeps what lies here in {run.set_aside_root}"
    )


# ------------------------------------------------------------------------- what is here


def of_pair(pair: PairSpec, cache_dir: Path, commits: Mapping[str, str]) -> Json:
    """The sources of a pair alone: student, teacher and tokenizer."""
    found: Json = {}
    for role, name in (("student", pair.student), ("teacher", pair.teacher)):
        with contextlib.suppress(OSError, ContractError):
            there = local_models.model(pair, role, cache_dir, commits)
            if there is not None:
                found[role] = _model(pair, role, name, there, cache_dir)
                if role == "student" and there.commit is None:
                    files = [file for name in TOKENIZER for file in sorted(there.path.glob(name))]
                    digest = fingerprints.of_settings(files, cache_dir)
                    found["tokenizer"] = {"what": name, "kind": "tokenizer", "digest": digest}
    return found


def _model(
    pair: PairSpec, role: str, name: str, there: local_models.AtHand, cache_dir: Path
) -> Json:
    entry: Json = {"what": name, "kind": "model"}
    if there.commit is not None:
        _, revision = local_models.source_of(pair, role)
        return entry | _commit(there.commit, name, revision, "model")
    settings = [file for name in SETTINGS if (file := there.path / name).is_file()]
    entry["digest"] = fingerprints.of_weights(there.path, cache_dir)
    entry["settings"] = fingerprints.of_settings(settings, cache_dir)
    facts = cast("Json", local_models.prepared(pair, cache_dir).get("facts") or {})
    loss = facts.get(f"{role}_loss")
    return entry if loss is None else entry | {"loss": loss}


def _commit(commit: str, repo: str, revision: str | None, repo_type: str) -> Json:
    if revision and local_models.COMMIT.fullmatch(revision):
        return {"commit": commit}
    return {"commit": commit, "open": local_models.open_name(repo, revision, repo_type)}


def _of_data(spec: TrainSpec, cache_dir: Path) -> Json:
    found: Json = {}
    with contextlib.suppress(OSError, DataError):
        if (rows := rows_of(spec, cache_dir)) is not None:
            found["data"] = rows
    with contextlib.suppress(OSError):
        if spec.rescue.other_prompts and (file := _others(spec, spec.rescue, cache_dir)):
            what = spec.rescue.other_file or "generated problems"
            found["other_prompts"] = _entry(what, fingerprints.of_rows([file], cache_dir))
    return found


def rows_of(spec: TrainSpec | EvalSpec, cache_dir: Path) -> Json | None:
    """The source of the rows that are trained on; None where they are not on this machine."""
    data: DataSpec = spec.data
    if data.data_source == "generated":
        problems = _problems(spec.pair, cache_dir)
        files = [problems / name for name in PROBLEMS] if problems else []
        digest = fingerprints.of_rows(files, cache_dir) if files else None
        return _entry("generated problems", digest) if digest else None
    if data.data_path is None:
        return None
    if data.data_source == "packaged":
        with contextlib.suppress(ConfigError):
            file = packaged_prompts.prompts_file(data.data_path, cache_dir)
            return _entry(data.data_path, fingerprints.of_rows([file], cache_dir))
        return None
    if data.data_source == "local" and not Path(data.data_path).expanduser().exists():
        return None
    there = local_models.at_hand(data.data_path, None, "dataset", spec.place.commits)
    if there is None:
        return None
    if there.commit is not None:
        entry = _commit(there.commit, data.data_path, None, "dataset")
        return {"what": data.data_path, "kind": "rows"} | entry
    files = local_models.split_files(there.path, data.data_split)
    return _entry(data.data_path, fingerprints.of_rows(files, cache_dir))


def _others(spec: TrainSpec, rescue: RescueSpec, cache_dir: Path) -> Path | None:
    if rescue.other_file is not None:
        return Path(rescue.other_file).expanduser()
    problems = _problems(spec.pair, cache_dir)
    return problems / "other.jsonl" if problems else None


def _problems(pair: PairSpec, cache_dir: Path) -> Path | None:
    lies = local_models.prepared(pair, cache_dir).get("problems")
    return cache_dir / lies if lies else None


def _entry(what: str, digest: str) -> Json:
    return {"what": what, "kind": "rows", "digest": digest}


# ------------------------------------------------------------------------- what was here


def _before_sources(spec: TrainSpec, record: Json, contract: Json | None) -> Json:
    """The generated weights of a run that recorded no sources, from its record and contract."""
    prepared = cast("Json", record.get("prepared") or {})
    facts = cast("Json", prepared.get("facts") or {})
    found: Json = {}
    for role, what in (("student", spec.pair.student), ("teacher", spec.pair.teacher)):
        loss = facts.get(f"{role}_loss")
        found[role] = {"what": what, "kind": "model"} | ({} if loss is None else {"loss": loss})
    digest = cast("Json", (contract or {}).get("base") or {}).get("digest")
    if digest:
        found["student"]["digest"] = digest
    return found


def _difference(key: str, then: Json, now: Json) -> str | None:
    """How one source differs; None if the fields that both have are equal."""
    what = {
        "model": f"the weights of {now['what']} are not what they were",
        "tokenizer": f"the tokenizer or the chat template of {now['what']} is not what it was",
        "rows": f"{now['what']} is not what it was",
    }[cast("str", now["kind"])]
    pinned = {"commit", "digest"}
    if pinned & then.keys() and pinned & now.keys() and not pinned & then.keys() & now.keys():
        return f"{key}: {what}: {_spelled(then)} then, {_spelled(now)} now"
    for field in ("commit", "digest"):
        if then.get(field, now.get(field)) != now.get(field):
            back = (
                f" ('commits={{{then['open']}:{then['commit']}}}' is that)"
                if "open" in then
                else ""
            )
            return f"{key}: {what}: {_spelled(then)} then{back}, {_spelled(now)} now"
    if then.get("settings", now.get("settings")) != now.get("settings"):
        files = " or ".join(SETTINGS)
        return f"{key}: {files} of {now['what']} is not what it was"
    if not pinned & then.keys() and then.get("loss", now.get("loss")) != now.get("loss"):
        losses = f"trained to a loss of {then['loss']:.6g} then, {now.get('loss')!s:.8} now"
        return f"{key}: {what}: {losses}"
    return None


def _spelled(source: Json) -> str:
    if "commit" in source:
        return f"commit {source['commit'][:10]}"
    return f"sha256 {source['digest'][:10]}…"
