"""This file is where a sweep's files become one pandas frame.

It has one row per (point, task); rows that no run trained (teacher, untrained student, quantised
student) are in it too, told apart by `kind`. Nothing here needs torch or lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from stillhouse.errors import ConfigError, ContractError, nearest
from stillhouse.file_formats import WHOLE_SWEEP, checked
from stillhouse.results import rests
from stillhouse.results.stats import NAN, binomial_se
from stillhouse.rundir import FORMAT, RunDir, Runs, eval_file, read_baseline, read_json, read_score
from stillhouse.spec import SuiteSpec, as_before, chat_settings, digest, score_key

if TYPE_CHECKING:
    import pandas as pd

Json = dict[str, Any]
Frame = Any  # a pandas DataFrame; pandas carries no types that a checker can follow
Asked = tuple[str, str | None, str | None]  # task, metric, score key; None: whatever is there
SHARES = ("quantised_share", "adapted_share")
_TOLD = ("name", "file", "question", "compare", "axes", "created", "words")


def load(sweep_name: str, runs: str | Path = "runs") -> pd.DataFrame:
    """One row per (point, task) of a sweep, finished or not, and one per (baseline, task).

    Columns: kind ("point", "teacher", "student", "ptq"), id, name, arm (its overrides in words,
    without the seed and what follows from another), one column per override, seed; task, metric,
    value (NaN: not scored), doc_se (binomial standard error over documents, NaN where answers are
    not right or wrong), n_docs, examples (that it read first), higher_is_better; trained, phase,
    cause, step, max_steps, exit_code, stopped_by (a watch rule), warnings (names of the rules that
    warned); scored_otherwise (a score is there, of other settings than
    asked), file, directory (below runs); pair_name, quant_type, method_name, pair_key, quant_key;
    quantised_share, adapted_share (of the student's matrix weights, NaN where an older run did not
    count them); code_digest, code_revision, code_dirty, version_*, eval_version_*; train_seconds,
    eval_seconds, devices, device, price_usd, tokens_*; source_student, source_teacher,
    source_tokenizer, source_data (what it was trained over: digest or commit, 10 digits), scored_*
    (what its score rests on), processor, cpu_capability, gpu, threads, eval_cpu_capability,
    eval_gpu.
    `attrs` holds what the sweep asked ("sweep"), its override names ("leaves"), and which of them
    another decides at every point ("follows": {leaf: the other}), as a rate for each loss.

    Raises:
        ConfigError: no such sweep here. ContractError: a file of another format, or an edited one.
    """
    import pandas as pd

    place = Runs(Path(runs))
    sweep = read_sweep(sweep_name, place)
    asked = _asked(sweep, place)
    follows = _follows(sweep)
    rows: list[Json] = []
    for entry in sweep["baselines"]:
        directory = place.root / "baselines" / entry["directory"]
        facts = _baseline_facts(entry, directory)
        rows += [facts | score for score in _scores(directory, asked)]
    _tell_apart(rows)
    for point in sweep["points"]:
        run = RunDir(place.root / f"{point['slug']}-{point['id']}")
        rows += _point_rows(point, run, follows, asked)
    leaves = list(dict.fromkeys(x for p in sweep["points"] for x in _arm(p["overrides"])))
    frame: Frame = pd.DataFrame(rows)
    first = ["kind", "id", "name", "arm", *leaves, "seed", "task", "metric", "value", "doc_se"]
    first += ["n_docs", "higher_is_better", "trained", "phase", "cause", "step", "max_steps"]
    first += ["exit_code", "stopped_by", "warnings", "scored_otherwise", "file", "pair_name"]
    first += ["quant_type", "method_name"]
    first += SHARES
    first += ["pair_key", "quant_key", "code_digest", "code_revision", "code_dirty"]
    first += ["train_seconds", "eval_seconds", "devices", "device", "price_usd"]
    frame = frame.reindex(columns=list(dict.fromkeys([*first, *frame.columns])))
    for whole in ("seed", "n_docs", "step", "max_steps", "exit_code"):
        frame[whole] = frame[whole].astype("Int64")
    frame.attrs = {"sweep": {key: sweep.get(key) for key in _TOLD}, "leaves": leaves}
    frame.attrs["follows"] = follows
    return frame


def read_sweep(name: str, runs: Runs) -> Json:
    """What `stillhouse run` wrote about a sweep.

    Raises:
        ConfigError: there is none of that name. ContractError: written in another format.
    """
    path = runs.sweep_file(name)
    sweep = read_json(path)
    if sweep is None:
        known = sorted(file.stem for file in path.parent.glob("*.json"))
        there = f"there are {', '.join(known[:8])}" if known else "there are none"
        more = f" and {len(known) - 8} more" if len(known) > 8 else ""
        hint = nearest(name, known) or " `stillhouse run SWEEP` starts one."
        raise ConfigError(f'{path.parent}: no sweep "{name}"; {there}{more}.{hint}')
    if sweep.get("format") != FORMAT:
        raise ContractError(
            f"{path}: written in format {sweep.get('format')}, this version reads format {FORMAT};"
            " use the version that wrote it"
        )
    return checked(sweep, WHOLE_SWEEP, path, "move it away and run the sweep's file again")


def _asked(sweep: Json, runs: Runs) -> list[Asked]:
    """The columns of the table; a sweep without a suite shows what was scored."""
    if sweep["suite"] is None:
        points = [f"{p['slug']}-{p['id']}" for p in sweep["points"]]
        files = (file for name in points for file in (runs.root / name).glob("eval/*.json"))
        return [(task, None, None) for task in sorted({file.stem for file in files})]
    suite = TypeAdapter(SuiteSpec).validate_python(sweep["suite"])
    asked: list[Asked] = [(t.task, t.metric, score_key(suite, t)) for t in suite.tasks]
    task, _, metric = ((sweep["compare"] or {}).get("metric") or "").partition("/")
    extra: list[Asked] = [
        (t, metric, key) for t, m, key in asked if metric and t == task and m != metric
    ]
    return asked + extra


def _follows(sweep: Json) -> dict[str, str]:
    """Overrides that say nothing of their own: at every point another one decides them.

    The compared one never follows. Of two others that decide each other, a number gives way to a
    name, and the later to the earlier.
    """
    if sweep["compare"] is None:
        return {}
    by, first = sweep["compare"]["by"], sweep["points"][0]["overrides"]
    points = [{k: spell(_cell(v)) for k, v in p["overrides"].items()} for p in sweep["points"]]
    shared = set[str].intersection(*map(set, points)) - {"seed"}
    varied = [leaf for leaf in first if leaf in shared and len({p[leaf] for p in points}) > 1]
    found: dict[str, str] = {}
    for leaf in sorted(reversed(varied), key=lambda x: isinstance(first[x], str)):
        for other in varied:
            pairs = {(p[other], p[leaf]) for p in points}
            decides = len(pairs) == len({decider for decider, _ in pairs})
            if decides and leaf not in (by, other) and other not in found:
                found[leaf] = other
                break
    return found


def _point_rows(
    point: Json, run: RunDir, follows: Mapping[str, str], asked: Sequence[Asked]
) -> list[Json]:
    """A row per task of one point; where a file of it is torn or odd, its row says which."""
    try:
        facts = _point_facts(point, run, follows)
        return [facts | score for score in _scores(run.path, asked)]
    except ContractError as error:
        why = str(error)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # Of another shape deeper down than the loaders look: a spec of an edited record, say.
        why = f"{run.path}: its files are not of the shape that training writes ({error!r})"
    facts = _told_of(point, run, follows) | {"trained": False, "step": None}
    facts |= {"phase": "unreadable", "cause": why}
    empty = {"value": NAN, "higher_is_better": None, "scored_otherwise": False}
    tasks = [(task, metric) for task, metric, _ in asked] or [(None, None)]
    return [facts | empty | {"task": task, "metric": metric} for task, metric in tasks]


def _told_of(point: Json, run: RunDir, follows: Mapping[str, str]) -> Json:
    """What the sweep's record alone says of a point."""
    overrides = {leaf: _cell(value) for leaf, value in point["overrides"].items()}
    arm = {leaf: value for leaf, value in overrides.items() if leaf not in follows}
    facts = {"kind": "point", "id": point["id"], "name": point["name"], "arm": label(arm)}
    return facts | {"directory": run.path.name} | overrides


def _point_facts(point: Json, run: RunDir, follows: Mapping[str, str]) -> Json:
    status = run.status()
    told = {
        key: status.get(key)
        for key in ("phase", "step", "max_steps", "exit_code", "cause", "stopped_by")
    }
    told["warnings"] = " ".join(status.get("warnings") or {})
    facts: Json = {}
    record = run.record()
    if record is not None:
        spec = record["spec"]
        chat = chat_settings(spec["data"])
        facts |= _pair_facts(spec["pair"], spec["quant"], chat)
        facts |= {"method_name": spec["method"]["method_name"], "seed": spec["training"]["seed"]}
        facts |= rests.of_run(record)
        facts |= {key: record.get("coverage", {}).get(key) for key in SHARES}
        facts |= {f"code_{key}": value for key, value in record["code"].items()}
        facts |= {f"version_{key}": value for key, value in record["versions"].items()}
    facts |= _told_of(point, run, follows) | {"trained": run.was_trained()}
    return facts | told | _cost_facts(run)


def _baseline_facts(entry: Json, directory: Path) -> Json:
    name = f"ptq_{entry['quant_type']}" if entry["label"] == "ptq" else entry["label"]
    facts: Json = {"kind": entry["label"], "name": name, "arm": name, "trained": False}
    facts |= {"pair_name": entry["pair_name"], "quant_type": entry["quant_type"]}
    told = read_baseline(directory)
    if told is None:
        return facts
    chat = told.get("chat", chat_settings({}))
    if "chat" in told:  # its conversations are written otherwise than by default
        facts["name"] = facts["arm"] = f"{name} ({chat})"
    return facts | _pair_facts(told["pair"], told["quant"], chat) | rests.of_pair(told["pair"])


def _pair_facts(pair: Json, quant: Json | None, chat: str) -> Json:
    content: Any = as_before("pair", pair)
    # Asked in another form, a pair's own baselines are others.
    content = content if chat == chat_settings({}) else [content, chat]
    facts = {"pair_name": pair["pair_name"], "pair_key": digest(content)[:10]}
    if quant is not None:
        key = digest(as_before("quant", quant))[:10]
        facts |= {"quant_type": quant["quant_type"], "quant_key": key}
    return facts


def _tell_apart(baselines: list[Json]) -> None:
    """Baselines of several pairs get the pair into their name, in place."""
    pairs = {row["pair_name"] for row in baselines}
    keys = {row.get("pair_key") for row in baselines}
    for row in baselines:
        if len(pairs) > 1:
            row["arm"] = f"{row['name']} ({row['pair_name']})"
        if len(keys) > len(pairs):  # one pair under several pair seeds or revisions
            row["arm"] = f"{row['name']} ({row['pair_name']} {(row.get('pair_key') or '?')[:4]})"


def _cost_facts(run: RunDir) -> Json:
    cost = run.cost()
    if cost is None:
        return {}
    seconds, price = cost["seconds"]["total"], cost["price_usd_per_hour"]
    facts: Json = {"train_seconds": seconds, "devices": cost["devices"], "device": cost["device"]}
    facts["price_usd"] = None if price is None else seconds / 3600 * cost["devices"] * price
    return facts | {f"tokens_{kind}": n for kind, n in cost["tokens"].items()}


def _scores(directory: Path, asked: Sequence[Asked]) -> Iterator[Json]:
    if not asked:
        yield {"task": None, "metric": None, "value": NAN, "higher_is_better": None}
    for task, metric, key in asked:
        file = eval_file(directory, task)
        score = read_score(directory, task, whole=True)
        if score is None or (key is not None and score["key"] != key):
            empty = {"task": task, "metric": metric, "value": NAN, "file": None}
            yield empty | {"scored_otherwise": score is not None}
            continue
        metric = metric or score["metric"]
        is_main = metric == score["metric"]
        if not is_main and metric not in score["metrics"]:
            known = ", ".join(score["metrics"])
            raise ConfigError(f"{file}: no metric {metric} (it has {known}); see compare.metric")
        value = score["value"] if is_main else score["metrics"][metric]
        right_or_wrong = is_main and right_answers(score) is not None
        facts = {
            "task": task,
            "metric": metric,
            "value": float(value),
            "higher_is_better": score["higher_is_better"],
            "n_docs": score["n"],
            "doc_se": binomial_se(value, score["n"]) if right_or_wrong else NAN,
            "eval_seconds": score["seconds"] if is_main else 0.0,
            "scored_otherwise": False,
            "examples": score.get("examples", 0),
            "file": str(file) if right_or_wrong else None,
        }
        facts |= rests.of_score(score)
        yield facts | {f"eval_version_{key}": v for key, v in score["versions"].items()}


def right_answers(score: Json) -> dict[int, float] | None:
    """1.0 or 0.0 by document of an eval file, None where answers are not simply right or wrong."""
    values = {sample["doc"]: float(sample["value"]) for sample in score["samples"]}
    return values if values and set(values.values()) <= {0.0, 1.0} else None


def _arm(overrides: Mapping[str, Any]) -> Json:
    return {leaf: value for leaf, value in overrides.items() if leaf != "seed"}


def _cell(value: Any) -> Any:
    """A value that a frame can group by: a list (a λ schedule, say) becomes its JSON, null a word.

    NaN is for a point that does not set an override at all.
    """
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, list | dict) else value


def spell(value: Any) -> str:
    """An override's value as a person writes it; 1 and 1.0 are spelt alike."""
    if value is None or value != value:  # NaN: where a point does not set it
        return "null"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        if abs(value) >= 1e-3:
            return f"{value:g}"
        digits, _, exponent = f"{value:.5e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"  # 1e-4 beside 5e-5
    return json.dumps(value) if isinstance(value, dict) else str(value)


def label(overrides: Mapping[str, Any]) -> str:
    """What an arm is called: its overrides without the seed."""
    return ", ".join(f"{k} = {spell(v)}" for k, v in _arm(overrides).items()) or "base"


def is_set(value: Any) -> bool:
    """Whether a point sets an override that others of its sweep set."""
    return value is not None and value == value  # NaN where it does not


def points_of(frame: Frame) -> Frame:
    """One row per point, whatever it was scored on."""
    return frame[frame["kind"] == "point"].drop_duplicates("id")


def is_unscored(frame: Frame) -> Any:
    """Which rows wait for their score; without any task, for their training."""
    return frame["value"].isna() & (frame["task"].notna() | ~frame["trained"].astype(bool))
