"""This file is where a sweep becomes a page that a person reads: question, answer, evidence.

The page is one HTML file with its figures inside: no script, nothing fetched. Beside it lie the
same tables as Markdown and CSV and the same figures as SVG and PNG.
"""

from __future__ import annotations

import html
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stillhouse.compose import data_file
from stillhouse.errors import DIVERGED, MISTAKE, OUT_OF_MEMORY, STOPPED, visible
from stillhouse.results import (
    budget,
    calibration,
    collapse,
    overlaps,
    predictions,
    requantised,
    rests,
    table,
)
from stillhouse.results.answer import answer
from stillhouse.results.curves import PAIR_LEAVES, compared_leaf, read
from stillhouse.results.figures import draw
from stillhouse.results.gap_figure import gap_records
from stillhouse.results.layout import Table, as_csv, duration, records
from stillhouse.results.plots import Picture
from stillhouse.results.predictions import Predictions
from stillhouse.results.sections import sections
from stillhouse.results.summary import remarks, summary, to_markdown, wide
from stillhouse.results.table import Frame
from stillhouse.rundir import Runs, sweep_leftovers, write_atomic
from stillhouse.verdict import rules_of

MEANING = {
    MISTAKE: "a mistake in what was asked",
    DIVERGED: "diverged",
    OUT_OF_MEMORY: "out of memory",
    STOPPED: "stopped by a watch rule",
}
NOTE = (
    "± is one standard error over n training seeds; each seed is one run. A row without seeds"
    " (teacher, untrained students) was measured once: its binomial standard error is over"
    " documents, another kind of noise."
)


def write_report(sweep_name: str, runs: Path) -> Path:
    """Write a sweep's page, tables and figures below its report directory; the page's path.

    Beside report.html: table.md, table.csv (one row per arm and task), points.csv (one row per
    point and task), comparisons.csv (one row per comparison), each figure as SVG and PNG; arms.csv
    (one row per arm: its curve, tokens, seconds, overlap) where those were measured, and
    predictions.csv (one row per run whose pair a preflight was asked of). Works on a sweep that is
    half done, and says so.

    Raises:
        ConfigError: no such sweep, or its comparison is of something it does not have.
        ContractError: a file of another format, or an edited one.
    """
    place = Runs(runs)
    frame = table.load(sweep_name, runs)
    directory = place.report(sweep_name)
    found = answer(frame)
    logged = read(frame, place)
    standings = collapse.standings(frame, logged, found)
    equal = budget.equal_compute(frame, logged)
    rescored = requantised.rescored(frame)
    overlap = overlaps.overlaps(logged)
    rules = rules_of(data_file("preflight"), "conf/preflight.yaml")
    asked = Predictions(calibration.cases(frame, place, rules), rules.fitted_on)
    arms = summary(frame)
    families = {
        "main": found.main,
        "settings": found.settings,
        "untrained": found.untrained,
        "equal compute": equal.comparisons,
        "equal compute, settings": equal.settings,
        **rescored,
    }
    sweep = frame.attrs["sweep"]
    content: dict[str, Any] = {
        "sweep": sweep,
        "text": found.text if sweep["compare"] or not asked.cases else predictions.told(asked),
        "context": " ".join(filter(None, (found.context, collapse.told(standings)))),
        "remarks": [*remarks(frame), *calibration.left_out(frame, place)],
        "scores": wide(arms),
        "note": NOTE,
        "sections": sections(found, standings, equal, rescored, overlap, asked),
        "costs": cost_table(frame),
    }
    files = {
        "points.csv": as_csv(frame),
        "table.csv": as_csv(arms),
        "table.md": _markdown(content),
        "comparisons.csv": as_csv(
            {"family": name, **record}
            for name, family in families.items()
            for record in records(family)
        ),
    }
    known = [
        {s.arm: collapse.record(s) for s in standings},
        {s.arm: budget.record(s) for s in equal.spent},
        {a.arm: {"arm": a.arm} | overlaps.record(a) for a in overlap},
        gaps := gap_records(logged),
    ]
    named = dict.fromkeys(arm for records_ in known for arm in records_)
    if standings or overlap or gaps:
        rows = [[records_.get(arm, {}) for records_ in known] for arm in named]
        files["arms.csv"] = as_csv({k: v for part in row for k, v in part.items()} for row in rows)
    if asked.cases:
        files["predictions.csv"] = as_csv(calibration.as_rows(asked.cases))
    sweep_leftovers(directory)
    for name, text in files.items():
        write_atomic(directory / name, text.encode())
    content |= {
        "figures": [(p.title, p.caption, inline(p)) for p in draw(frame, logged, asked, directory)],
        "failures": failure_table(frame),
        "facts": _facts(frame, place),
        "command": commands(frame, runs),
    }
    path = directory / "report.html"
    write_atomic(path, _page(**content).encode())
    return path


def _page(**content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # not our own HTML
    )
    return environment.get_template("report.html.j2").render(**content)


def _markdown(content: Mapping[str, Any]) -> str:
    sweep = content["sweep"]
    parts = [f"# {sweep['question'] or sweep['name']}", content["text"], content["context"]]
    parts += [to_markdown(*content["scores"]).rstrip(), NOTE]
    parts += [f"- {remark}" for remark in content["remarks"]]
    for section in content["sections"]:
        parts += [f"## {section.title}", section.text]
        for exhibit in section.exhibits:
            if not exhibit.is_folded:
                heading = f"{exhibit.heading}:" if exhibit.heading else ""
                parts += [heading, to_markdown(*exhibit.table).rstrip()]
        parts.append(section.note)
    if content["costs"][1]:
        parts += ["## What it cost", to_markdown(*content["costs"]).rstrip()]
    return visible("\n\n".join(part for part in parts if part) + "\n")


def inline(picture: Picture) -> str:
    """A figure's SVG as an element of an HTML page: its ids its own, its ink the page's."""
    text = picture.svg.read_text()
    text = text[text.index("<svg") :].replace("xlink:href", "href")
    prefix = f"{picture.name}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text).replace("url(#", f"url(#{prefix}")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    opening = (
        f'<svg viewBox="0 0 {width} {height}" style="max-width: {float(width) * 4 / 3:.0f}px"'
        f' role="img" aria-label="{html.escape(picture.title)}">'
    )
    return opening + text[text.index(">") + 1 :]


def cost_table(frame: Frame) -> Table:
    """The seeds' cost table: runs, device time and price, by method or compared value, and in all.

    Device time is wall time times devices. The price is that of training, "not known" where a run's
    site names none.
    """
    points = table.points_of(frame).assign(
        scoring=lambda p: p["id"].map(frame.groupby("id")["eval_seconds"].sum())
    )
    trained = points[points["train_seconds"].notna()]
    by = "method_name" if points["method_name"].nunique() > 1 else compared_leaf(frame)
    is_apart = points["pair_name"].nunique() > 1 and by not in PAIR_LEAVES
    keys = ["pair_name", by] if is_apart else [by]
    rows: list[list[str]] = []
    for key, part in trained.groupby(keys, sort=False, dropna=False):
        values = [table.spell(v) if table.is_set(v) else "base" for v in key]
        rows.append([", ".join(values), *_spent(part)])
    if len(rows) > 1:
        rows.append(["all", *_spent(trained)])
    return [by, "runs", "device time", "scoring", "rollout tokens", "teacher tokens", "price"], rows


def _spent(part: Frame) -> list[str]:
    seconds = (part["train_seconds"] * part["devices"]).sum()
    price = "not known" if part["price_usd"].isna().any() else f"${part['price_usd'].sum():.2f}"
    tokens = [f"{int(part[f'tokens_{kind}'].sum()):,}" for kind in ("rollout", "teacher")]
    return [str(len(part)), duration(seconds), duration(part["scoring"].sum()), *tokens, price]


def failure_table(frame: Frame) -> Table:
    """Points that ended badly, those with one cause together."""
    points = table.points_of(frame)
    failed = points[points["phase"] == "failed"].fillna({"cause": "no cause was written"})
    rows: list[list[str]] = []
    for (cause, code), part in failed.groupby(["cause", "exit_code"], sort=False, dropna=False):
        who = [f"{row['arm']}, seed {row['seed']}" for row in part.to_dict("records")]
        meaning = MEANING.get(code, "infrastructure") if table.is_set(code) else "killed"
        logs = [f"{name}/log.txt" for name in part["directory"]]
        more = f" and {len(logs) - 3} more" if len(logs) > 3 else ""
        rows.append([str(cause), meaning, "; ".join(who), ", ".join(logs[:3]) + more])
    return ["cause", "meaning", "points", "look in"], rows


def _facts(frame: Frame, runs: Runs) -> list[tuple[str, str]]:
    """How the sweep was made, as (what, value) pairs."""
    sweep = frame.attrs["sweep"]
    points = table.points_of(frame)
    asked = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(sweep["created"]))
    facts = [("sweep", f"{sweep['name']}, asked for on {asked}")]
    facts.append(("file", sweep["file"] or "none: typed on the command line"))
    for leaf, values in sweep["axes"].items():
        followed = frame.attrs["follows"].get(leaf)
        follows = f" (follows from {followed})" if followed else ""
        facts.append((f"axis {leaf}", ", ".join(table.spell(value) for value in values) + follows))
    facts.append(("seeds", _distinct(points["seed"].dropna().unique())))
    facts.append(("pair", _distinct(points["pair_name"].dropna().unique())))
    facts.append(("quantiser", _distinct(points["quant_type"].dropna().unique())))
    for share in table.SHARES:
        facts.append((f"weights {share.removesuffix('_share')}", _share(points, share)))
    for key, part in points.groupby("code_digest"):
        first = part.iloc[0]
        # Code that travelled to a cluster has no git there: its digest says it all.
        known = first["code_revision"] if table.is_set(first["code_revision"]) else ""
        revision = f", git {known[:10]}" if known else ""
        dirty = " with uncommitted changes" if part["code_dirty"].eq(True).any() else ""
        facts.append(("code", f"{key}{revision}{dirty} ({len(part)} points)"))
    facts += rests.told(frame)
    versions = [c for c in frame if c.startswith(("version_", "eval_version_lm_eval"))]
    for column in versions:
        name = column.removeprefix("eval_").removeprefix("version_")
        facts.append((name, _distinct(frame[column].dropna().unique())))
    facts.append(("devices", _distinct(points["device"].dropna().unique())))
    facts.append(("run directories", str(runs.root)))
    return [(what, value) for what, value in facts if value]


def _share(points: Frame, column: str) -> str:
    """Of the matrix weights of the text decoder; by quantiser where that makes a difference."""
    known = points.dropna(subset=[column])
    shares = {
        quant: " or ".join(f"{share:.1%}" for share in sorted(part.unique()))
        for quant, part in known.groupby("quant_type")[column]
    }
    if len(set(shares.values())) == 1:
        return next(iter(shares.values()))
    return ", ".join(f"{share} under {quant}" for quant, share in shares.items())


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(table.spell(value) for value in values)


def commands(frame: Frame, runs: Path) -> list[str]:
    """The lines that make this sweep again, and this page."""
    sweep = frame.attrs["sweep"]
    where = [] if runs == Path("runs") else ["--runs", str(runs)]
    asked = [word for word in (sweep["file"], *(sweep["words"] or [])) if word]
    again = [["stillhouse", "run", *asked, *where]] if asked else []
    return [shlex.join(line) for line in [*again, ["stillhouse", "report", sweep["name"], *where]]]
