"""Write the report of a sweep: one page with question, answer, and evidence, and its tables.

The page is one HTML file with its figures inside: no script, nothing fetched. Beside it lie the
same tables as Markdown and CSV and the same figures as SVG and PNG.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.errors import DIVERGED, MISTAKE, OUT_OF_MEMORY, STOPPED, visible
from stillhouse.results import plots, provenance, table
from stillhouse.results.analyses import ANALYSES
from stillhouse.results.answer import answer
from stillhouse.results.curves import PAIR_FIELDS, compared_field, read_runs
from stillhouse.results.figures import FIGURES
from stillhouse.results.format import (
    Table,
    as_csv,
    as_markdown,
    comparison_record,
    duration,
)  # fmt: skip
from stillhouse.results.provenance import Frame
from stillhouse.results.section import Evidence, Section
from stillhouse.results.summary import notes, summary, wide
from stillhouse.rundir import Json, Runs, make_directory, sweep_leftovers, write_atomic
from stillhouse.text import number_of, shell_line

MEANING = {
    MISTAKE: "user mistake",
    DIVERGED: "diverged",
    OUT_OF_MEMORY: "out of memory",
    STOPPED: "stopped by a watch rule",
}
NOTE = (
    "± is one standard error over n training seeds; each seed is one run. A row without seeds"
    " (teacher, untrained students) was measured once: its binomial standard error is over"
    " documents instead."
)


def write_report(sweep_name: str, runs: Path) -> Path:
    """Write a sweep's page, tables, and figures below its report directory; the page's path.

    Beside report.html: table.md, table.csv (one row per arm and task), points.csv (one row per
    point and task), comparisons.csv (one row per comparison), each figure as SVG and PNG; arms.csv
    (one row per arm: its curve, tokens, seconds, overlap) if those were measured, and
    predictions.csv (one row per run whose pair was preflighted). Works on an unfinished sweep, and
    says so.

    Raises:
        ConfigError: no such sweep, or its comparison is of something it does not have.
        ContractError: a file of another format, or an edited one.
    """
    place = Runs(runs)
    frame: Frame = table.load(sweep_name, runs)
    directory = place.report(sweep_name)
    make_directory(directory)
    sweep_leftovers(directory)
    evidence = Evidence(frame, place, answer(frame), read_runs(frame, place))
    sections = [analyze(evidence) for analyze in ANALYSES]
    content = _content(evidence, sections)
    for name, text in _files(evidence, sections).items():
        write_atomic(directory / name, text.encode())
    write_atomic(directory / "table.md", _markdown(content).encode())
    with plots.style():
        content["figures"] = _draw([partial(f, frame, evidence.curves) for f in FIGURES], directory)
        content["section_figures"] = {s.title: _draw(s.figures, directory) for s in sections}
    path = directory / "report.html"
    write_atomic(path, _page(**content).encode())
    return path


def _content(evidence: Evidence, sections: list[Section]) -> Json:
    """What the page and table.md show, figures apart."""
    frame, found = evidence.frame, evidence.answer
    sweep = frame.attrs["sweep"]
    alone = "" if sweep["compare"] else next((s.answer for s in sections if s.answer), "")
    return {
        "sweep": sweep,
        "text": alone or found.text,
        "context": " ".join(filter(None, (found.context, *(s.context for s in sections)))),
        "notes": [*notes(frame), *(note for s in sections for note in s.notes)],
        "scores": wide(summary(frame)),
        "note": NOTE,
        "sections": sections,
        "costs": cost_table(frame),
        "failures": failure_table(frame),
        "facts": _facts(frame, evidence.runs),
        "command": commands(frame, evidence.runs.root),
    }


def _files(evidence: Evidence, sections: list[Section]) -> dict[str, str]:
    """The CSV files beside the page, by name; without those that would have no row."""
    rows: dict[str, list[Json]] = {
        "comparisons.csv": [
            {"family": name} | comparison_record(comparison)
            for section in sections
            for name, family in section.families.items()
            for comparison in family
        ],
        "arms.csv": [
            {k: v for section in sections for k, v in section.arms.get(arm, {}).items()}
            for arm in dict.fromkeys(arm for section in sections for arm in section.arms)
        ],
    }
    for section in sections:
        rows |= section.files
    texts = {name: as_csv(part) for name, part in rows.items() if part or name == "comparisons.csv"}
    arms = as_csv(summary(evidence.frame))
    return texts | {"points.csv": as_csv(evidence.frame), "table.csv": arms}


def _draw(figures: Iterable[plots.Figure], directory: Path) -> list[tuple[str, str, str]]:
    """Save those figures that have data: (title, caption, SVG for the page)."""
    drawn = [made for make in figures if (made := make()) is not None]
    return [
        (title, caption, inline(plots.save(figure, name, directory), name, title))
        for figure, name, title, caption in drawn
    ]


def _visible(value: object) -> object:
    return visible(value) if type(value) is str else value  # Markup is our own HTML


def _page(**content: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_visible,
    )
    return environment.get_template("report.html.j2").render(**content)


def _markdown(content: Mapping[str, Any]) -> str:
    sweep, sections = content["sweep"], content["sections"]
    parts = [f"# {sweep['question'] or sweep['name']}", content["text"], content["context"]]
    parts += [as_markdown(content["scores"]).rstrip(), NOTE]
    parts += [f"- {note}" for note in content["notes"]]
    for section in [section for section in sections if section.exhibits]:
        parts += [f"## {section.title}", section.text]
        for exhibit in section.exhibits:
            if not exhibit.is_folded:
                heading = f"{exhibit.heading}:" if exhibit.heading else ""
                parts += [heading, as_markdown(exhibit.table).rstrip()]
        parts.append(section.note)
    if content["costs"][1]:
        parts += ["## Cost", as_markdown(content["costs"]).rstrip()]
    return visible("\n\n".join(part for part in parts if part) + "\n")


def inline(svg: str, name: str, title: str) -> str:
    """A figure's SVG as an element of an HTML page, with ids that no other figure has."""
    text = svg[svg.index("<svg") :].replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    opening = (
        f'<svg viewBox="0 0 {width} {height}" style="max-width: {float(width) * 4 / 3:.0f}px"'
        f' role="img" aria-label="{html.escape(title)}">'
    )
    return opening + text[text.index(">") + 1 :]


def cost_table(frame: Frame) -> Table:
    """Runs, device time, and price, by method or compared value, and in all.

    Device time is wall time times devices. The price is that of training, "not known" if a run's
    site names none.
    """
    points = table.points_of(frame)
    points = points.assign(scoring=points["id"].map(frame.groupby("id")["eval_seconds"].sum()))
    trained = points[points["train_seconds"].notna()]
    by = "method_name" if points["method_name"].nunique() > 1 else compared_field(frame)
    is_apart = points["pair_name"].nunique() > 1 and by not in PAIR_FIELDS
    keys = ["pair_name", by] if is_apart else [by]
    rows: list[list[str]] = []
    for key, part in trained.groupby(keys, sort=False, dropna=False):
        values = [table.format_value(v) if table.is_set(v) else "base" for v in key]
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
    """Failed points, those with one cause together."""
    points = table.points_of(frame)
    failed = points[points["phase"] == "failed"].fillna({"cause": "no cause recorded"})
    rows: list[list[str]] = []
    for (cause, code), part in failed.groupby(["cause", "exit_code"], sort=False, dropna=False):
        who = [f"{row['arm']}, seed {row['seed']}" for row in part.to_dict("records")]
        meaning = MEANING.get(code, "infrastructure") if table.is_set(code) else "killed"
        logs = [f"{name}/log.txt" for name in part["directory"]]
        more = f" and {len(logs) - 3} more" if len(logs) > 3 else ""
        rows.append([str(cause), meaning, "; ".join(who), ", ".join(logs[:3]) + more])
    return ["cause", "meaning", "points", "look in"], rows


def _facts(frame: Frame, runs: Runs) -> list[tuple[str, str]]:
    """How the sweep was made, as (name, value) pairs."""
    sweep, points = frame.attrs["sweep"], table.points_of(frame)
    created = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(sweep["created"]))
    facts = [("sweep", f"{sweep['name']}, created {created}")]
    facts.append(("file", sweep["file"] or "none: given on the command line"))
    for field, values in sweep["axes"].items():
        other = frame.attrs["follows"].get(field)
        follows = f" (follows from {other})" if other else ""
        facts.append((f"axis {field}", _listed(values) + follows))
    columns = {"seeds": "seed", "pair": "pair_name", "quantizer": "quant_type"}
    facts += [(name, _distinct(points[column])) for name, column in columns.items()]
    facts.append(("weights quantized", _share(points, "quantised_share")))
    facts.append(("weights adapted", _share(points, "adapted_share")))
    for key, part in points.groupby("code_digest"):
        first = part.iloc[0]
        # Code that was sent to a cluster has no git there: its digest says it all.
        known = first["code_revision"] if table.is_set(first["code_revision"]) else ""
        revision = f", git {known[:10]}" if known else ""
        dirty = " with uncommitted changes" if part["code_dirty"].eq(True).any() else ""
        facts.append(("code", f"{key}{revision}{dirty} ({number_of(len(part), 'point')})"))
    facts += provenance.as_facts(frame)
    for column in [c for c in frame if c.startswith(("version_", "eval_version_lm_eval"))]:
        name = column.removeprefix("eval_").removeprefix("version_")
        facts.append((name, _distinct(frame[column])))
    facts.append(("devices", _distinct(points["device"])))
    facts.append(("run directories", str(runs.root)))
    return [(name, value) for name, value in facts if value]


def _share(points: Frame, column: str) -> str:
    """The share of the text decoder's matrix weights; by quantizer if they differ."""
    known = points.dropna(subset=[column])
    shares = {
        quant: " or ".join(f"{share:.1%}" for share in sorted(part.unique()))
        for quant, part in known.groupby("quant_type")[column]
    }
    if len(set(shares.values())) == 1:
        return next(iter(shares.values()))
    return ", ".join(f"{share} under {quant}" for quant, share in shares.items())


def _distinct(column: Any) -> str:
    return _listed(column.dropna().unique())


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(table.format_value(value) for value in values)


def commands(frame: Frame, runs: Path) -> list[str]:
    """The command lines that run this sweep again, and write this page."""
    sweep = frame.attrs["sweep"]
    where = [] if runs == Path("runs") else ["--runs", str(runs)]
    given: list[str | None] = [sweep["file"], *(sweep["words"] or [])]
    words = [word for word in given if word]
    again = [["stillhouse", "run", *words, *where]] if words else []
    return [shell_line(line) for line in [*again, ["stillhouse", "report", sweep["name"], *where]]]
