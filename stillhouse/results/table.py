"""Load the files of a sweep into one pandas frame, one row per (point, task).

Rows that no run trained (teacher, untrained student, quantized student) are in it too; `kind` tells
them apart. Nothing here needs torch or lm-eval.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from stillhouse.errors import ConfigError, ContractError, nearest
from stillhouse.file_formats import WHOLE_SWEEP, checked
from stillhouse.identity import as_before, chat_settings, digest, score_key
from stillhouse.results import provenance
from stillhouse.results.provenance import Frame
from stillhouse.results.stats import NAN, binomial_se
from stillhouse.rundir import (
    FORMAT,
    Json,
    RunDir,
    Runs,
    eval_file,
    read_baseline,
    read_json,
    read_score,
)
from stillhouse.spec import SuiteSpec

if TYPE_CHECKING:
    import pandas as pd

ScoreColumn = tuple[str, str | None, str | None]  # task, metric, score key; None: any
SHARES = ("quantised_share", "adapted_share")
GAPS = ("rollout_gap_mean", "rollout_gap_max", "rollout_ess")
STATUS = ("phase", "step", "max_steps", "exit_code", "cause", "stopped_by")
_SWEEP_KEYS = ("name", "file", "question", "compare", "axes", "created", "words")


def load(sweep_name: str, runs: str | Path = "runs") -> pd.DataFrame:
    """One row per (point, task) of a sweep, finished or not, and one per (baseline, task).

    Columns: kind ("point", "teacher", "student", "ptq"), id, name, arm (its overrides as text,
    without the seed and what follows from another), one column per override, seed; task, metric,
    value (NaN: not scored), doc_se (binomial standard error over documents, NaN where answers are
    not right or wrong), n_docs, examples (few-shot), higher_is_better; trained, phase, cause, step,
    max_steps, exit_code, stopped_by (a watch rule), warnings (names of the rules that warned);
    scored_otherwise (a score exists, made with other settings than the sweep's suite), file,
    directory (below runs); pair_name, quant_type, method_name, pair_key, quant_key;
    quantised_share, adapted_share (of the student's matrix weights, NaN where an older run did not
    count them); code_digest, code_revision, code_dirty, version_*, eval_version_*; train_seconds,
    eval_seconds, devices, device, price_usd, tokens_*; rollout_gap_mean (nats per token, mean over
    steps), rollout_gap_max (of any token), rollout_ess (lowest of a step; NaN where no step drew,
    see `distill/gap.py`); source_student, source_teacher,
    source_tokenizer, source_data (what it was trained on: digest or commit, 10 digits), scored_*
    (what its score depends on), processor, cpu_capability, gpu, threads, eval_cpu_capability,
    eval_gpu.
    `attrs` holds what the sweep file says ("sweep"), the names of its overrides ("fields"), and
    which of them another one determines at every point ("follows": {field: the other}).

    Raises:
        ConfigError: no such sweep here. ContractError: a file of another format, or an edited one.
    """
    import pandas as pd

    place = Runs(Path(runs))
    sweep = read_sweep(sweep_name, place)
    columns, follows = _score_columns(sweep, place), _follows(sweep)
    rows: list[Json] = []
    for entry in sweep["baselines"]:
        directory = place.root / "baselines" / entry["directory"]
        facts = _baseline_facts(entry, directory)
        rows += [facts | score for score in _scores(directory, columns)]
    _add_pair_to_names(rows)
    for point in sweep["points"]:
        run = RunDir(place.root / f"{point['slug']}-{point['id']}")
        rows += _point_rows(point, run, follows, columns)
    fields = list(dict.fromkeys(x for p in sweep["points"] for x in _without_seed(p["overrides"])))
    frame: Frame = pd.DataFrame(rows)
    first = ["kind", "id", "name", "arm", *fields, "seed", "task", "metric", "value", "doc_se"]
    first += ["n_docs", "higher_is_better", "trained", "phase", "cause", "step", "max_steps"]
    first += ["exit_code", "stopped_by", "warnings", "scored_otherwise", "file", "pair_name"]
    first += ["quant_type", "method_name", *SHARES, "pair_key", "quant_key"]
    first += ["code_digest", "code_revision", "code_dirty"]
    first += ["train_seconds", "eval_seconds", "devices", "device", "price_usd", *GAPS]
    frame = frame.reindex(columns=list(dict.fromkeys([*first, *frame.columns])))
    for whole in ("seed", "n_docs", "step", "max_steps", "exit_code"):
        frame[whole] = frame[whole].astype("Int64")
    known = {key: sweep.get(key) for key in _SWEEP_KEYS}
    frame.attrs = {"sweep": known, "fields": fields, "follows": follows}
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


def _score_columns(sweep: Json, runs: Runs) -> list[ScoreColumn]:
    """The score columns of the table; a sweep without a suite shows whatever was scored."""
    if sweep["suite"] is None:
        points = [f"{p['slug']}-{p['id']}" for p in sweep["points"]]
        files = (file for name in points for file in (runs.root / name).glob("eval/*.json"))
        return [(task, None, None) for task in sorted({file.stem for file in files})]
    suite = TypeAdapter(SuiteSpec).validate_python(sweep["suite"])
    columns: list[ScoreColumn] = [(t.task, t.metric, score_key(suite, t)) for t in suite.tasks]
    compare: Json = sweep["compare"] or {}
    task, _, metric = str(compare.get("metric") or "").partition("/")
    compared = [(t, metric, key) for t, m, key in columns if metric and t == task and m != metric]
    return [*columns, *compared]


def _follows(sweep: Json) -> dict[str, str]:
    """Overrides that another one determines at every point, so that they add no axis.

    The compared one never follows. Of two others that determine each other, a number gives way to
    a name, and the later to the earlier.
    """
    if sweep["compare"] is None:
        return {}
    by, first = sweep["compare"]["by"], sweep["points"][0]["overrides"]
    points = [
        {k: format_value(_cell(v)) for k, v in p["overrides"].items()} for p in sweep["points"]
    ]
    shared = set[str].intersection(*map(set, points)) - {"seed"}
    varied = [field for field in first if field in shared and len({p[field] for p in points}) > 1]
    follows: dict[str, str] = {}
    for field in sorted(reversed(varied), key=lambda x: isinstance(first[x], str)):
        for other in varied:
            pairs = {(p[other], p[field]) for p in points}
            determines = len(pairs) == len({value for value, _ in pairs})
            if determines and field not in (by, other) and other not in follows:
                follows[field] = other
                break
    return follows


def _point_rows(
    point: Json, run: RunDir, follows: Mapping[str, str], columns: Sequence[ScoreColumn]
) -> list[Json]:
    """A row per task of one point; if one of its files is unreadable, its rows say which."""
    recorded = _recorded_facts(point, run, follows)
    try:
        facts = _record_facts(run) | recorded | _status_facts(run)
        facts |= _cost_facts(run) | _gap_facts(run)
        return [facts | score for score in _scores(run.path, columns)]
    except ContractError as error:
        why = str(error)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # Of another shape deeper down than the loaders look: a spec of an edited record, say.
        why = f"{run.path}: its files are not of the shape that training writes ({error!r})"
    facts = recorded | {"trained": False, "step": None, "phase": "unreadable", "cause": why}
    facts |= {"value": NAN, "higher_is_better": None, "scored_otherwise": False}
    tasks = [(task, metric) for task, metric, _ in columns] or [(None, None)]
    return [facts | {"task": task, "metric": metric} for task, metric in tasks]


def _recorded_facts(point: Json, run: RunDir, follows: Mapping[str, str]) -> Json:
    """What the sweep's record alone says of a point."""
    overrides = {field: _cell(value) for field, value in point["overrides"].items()}
    arm = {field: value for field, value in overrides.items() if field not in follows}
    facts = {"kind": "point", "id": point["id"], "name": point["name"], "arm": arm_name(arm)}
    return facts | {"directory": run.path.name} | overrides


def _status_facts(run: RunDir) -> Json:
    status = run.status()
    warnings = {"warnings": " ".join(status.get("warnings") or {})}
    return {key: status.get(key) for key in STATUS} | warnings | {"trained": run.was_trained()}


def _record_facts(run: RunDir) -> Json:
    """A run's models, code, and versions."""
    record = run.record()
    if record is None:
        return {}
    spec = record["spec"]
    facts = _pair_facts(spec["pair"], spec["quant"], chat_settings(spec["data"]))
    facts |= {"method_name": spec["method"]["method_name"], "seed": spec["training"]["seed"]}
    facts |= provenance.run_columns(record)
    facts |= {key: record.get("coverage", {}).get(key) for key in SHARES}
    facts |= {f"code_{key}": value for key, value in record["code"].items()}
    return facts | {f"version_{key}": value for key, value in record["versions"].items()}


def _baseline_facts(entry: Json, directory: Path) -> Json:
    name = f"ptq_{entry['quant_type']}" if entry["label"] == "ptq" else entry["label"]
    facts: Json = {"kind": entry["label"], "name": name, "arm": name, "trained": False}
    facts |= {"pair_name": entry["pair_name"], "quant_type": entry["quant_type"]}
    baseline = read_baseline(directory)
    if baseline is None:
        return facts
    chat = baseline.get("chat", chat_settings({}))
    if "chat" in baseline:  # its conversations are rendered otherwise than by default
        facts["name"] = facts["arm"] = f"{name} ({chat})"
    facts |= _pair_facts(baseline["pair"], baseline["quant"], chat)
    return facts | provenance.pair_columns(baseline["pair"])


def _pair_facts(pair: Json, quant: Json | None, chat: str) -> Json:
    content: Any = as_before("pair", pair)
    # With another chat template, the pair has baselines of its own.
    content = content if chat == chat_settings({}) else [content, chat]
    facts = {"pair_name": pair["pair_name"], "pair_key": digest(content)[:10]}
    if quant is not None:
        key = digest(as_before("quant", quant))[:10]
        facts |= {"quant_type": quant["quant_type"], "quant_key": key}
    return facts


def _add_pair_to_names(baselines: list[Json]) -> None:
    """Add the pair to the names of baselines of several pairs, in place."""
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


def _gap_facts(run: RunDir) -> Json:
    """How far a run's rollouts were from the function that was trained on them."""
    logged: list[Json] = []
    with contextlib.suppress(ContractError):  # `curves.read_runs` reports it; scores stay
        logged = [line for line in run.metrics() if "rollout/gap_max" in line]
    if not logged:
        return {}
    mean, largest, ess = (
        [line[f"rollout/{name}"] for line in logged] for name in ("gap_mean", "gap_max", "ess")
    )
    return dict(zip(GAPS, (fmean(mean), max(largest), min(ess)), strict=True))


def _scores(directory: Path, columns: Sequence[ScoreColumn]) -> Iterator[Json]:
    if not columns:
        yield {"task": None, "metric": None, "value": NAN, "higher_is_better": None}
    for task, metric, key in columns:
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
        right_or_wrong = is_main and correct_by_document(score) is not None
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
        facts |= provenance.score_columns(score)
        yield facts | {f"eval_version_{key}": v for key, v in score["versions"].items()}


def correct_by_document(score: Json) -> dict[int, float] | None:
    """1.0 or 0.0 by document of an eval file, None where answers are not simply right or wrong."""
    values = {sample["doc"]: float(sample["value"]) for sample in score["samples"]}
    return values if values and set(values.values()) <= {0.0, 1.0} else None


def _without_seed(overrides: Mapping[str, Any]) -> Json:
    return {field: value for field, value in overrides.items() if field != "seed"}


def _cell(value: Any) -> Any:
    """A value that a frame can group by: a list (a λ schedule, say) becomes JSON, null "null".

    NaN is for a point that does not set an override at all.
    """
    if value is None:
        return "null"
    return json.dumps(value) if isinstance(value, list | dict) else value


def format_value(value: Any) -> str:
    """An override's value as text; 1 and 1.0 give the same."""
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


def arm_name(overrides: Mapping[str, Any]) -> str:
    """An arm's name: its overrides without the seed."""
    named = _without_seed(overrides).items()
    return ", ".join(f"{field} = {format_value(value)}" for field, value in named) or "base"


def is_set(value: Any) -> bool:
    """Whether a point sets an override that others of its sweep set."""
    return value is not None and value == value  # NaN where it does not


def points_of(frame: Frame) -> Frame:
    """One row per point, whatever it was scored on."""
    return frame[frame["kind"] == "point"].drop_duplicates("id")


def is_unscored(frame: Frame) -> Any:
    """Which rows wait for their score; without any task, for their training."""
    return frame["value"].isna() & (frame["task"].notna() | ~frame["trained"].astype(bool))
