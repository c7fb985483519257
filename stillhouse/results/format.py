"""Format numbers, comparisons, and tables as text, Markdown, and CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stillhouse.errors import visible
from stillhouse.results.comparisons import Comparison
from stillhouse.results.provenance import Frame
from stillhouse.results.stats import Estimate, number
from stillhouse.rundir import Json

Table = tuple[list[str], list[list[str]]]  # header, rows
BEGINS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
ROUNDING = 1e-12  # of a difference of two scores: far above float64's, far below one document's


def comparison_tables(
    family: Sequence[Comparison], gaps: Mapping[str, float] | None = None
) -> list[tuple[str, Table]]:
    """(reference, table of its comparisons); intervals are 95 %, p is Holm's.

    gaps: the teacher's lead over a reference, whose table gets the share that was recovered.
    """
    references = dict.fromkeys(c.reference for c in family)
    return [
        (r, _comparison_table([c for c in family if c.reference == r], (gaps or {}).get(r)))
        for r in references
    ]


def _comparison_table(family: Sequence[Comparison], gap: float | None) -> Table:
    header = ["arm", "verdict", "difference", "95 % interval", "p (Holm)", "detectable"]
    header += [] if gap is None else ["gap recovered"]
    documents = any(c.crossed is not None for c in family)
    settings = any(c.setting for c in family)
    if documents:
        header.insert(4, "over documents too")
    if settings:
        header.insert(1, "at")
    rows: list[list[str]] = []
    for c in family:
        d = c.paired.difference
        unpaired = f" (without {c.paired.unpaired} unshared seeds)" if c.paired.unpaired else ""
        row = [c.arm, *([c.setting] if settings else []), c.verdict.text + unpaired]
        row += [signed(d.mean), interval(d.low, d.high)]
        row += [interval(c.crossed.low, c.crossed.high) if c.crossed else "–"] if documents else []
        row += [probability(c.p), number(c.paired.detectable)]
        rows.append(row if gap is None else [*row, f"{d.mean / gap:.0%}"])
    return header, rows


def comparison_record(c: Comparison) -> Json:
    """A comparison as a row of a CSV file."""
    d = c.paired.difference
    row: Json = {"arm": c.arm, "reference": c.reference, "setting": c.setting}
    row |= {"verdict": c.verdict.kind, "arm_mean": c.arm_mean, "reference_mean": c.reference_mean}
    row |= {"n": d.n, "difference": d.mean, "se": d.se, "low": d.low, "high": d.high}
    row |= {"low_other_documents": c.crossed.low if c.crossed else None}
    row |= {"high_other_documents": c.crossed.high if c.crossed else None}
    return row | {"p": c.paired.p, "p_holm": c.p, "detectable": c.paired.detectable}


def as_csv(rows: Frame | Iterable[Mapping[str, Any]]) -> str:
    """Rows as a CSV file's text; a row that lacks a column leaves it empty.

    Names and values come from whoever wrote the sweep, and a spreadsheet runs what begins like a
    formula: such text, and no number, gets an apostrophe before it.
    """
    import pandas as pd

    frame: Frame = pd.DataFrame(rows if isinstance(rows, pd.DataFrame) else list(rows))
    cells = {name: [_inert(cell) for cell in frame[name]] for name in frame.columns}
    columns = {_inert(name): pd.Series(cells[name], dtype=object) for name in frame.columns}
    return pd.DataFrame(columns).to_csv(index=False)


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    return f"'{visible(cell)}" if cell.startswith(BEGINS_A_FORMULA) else visible(cell)


def as_markdown(table: Table) -> str:
    """A Markdown table, its columns padded so that it reads as plain text too."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (table[0], *table[1])]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in escaped]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in lines)


def signed(value: float) -> str:
    """A difference with its sign; what rounding leaves of equal means is 0."""
    if abs(value) <= ROUNDING:
        return number(0.0)
    return f"+{number(value)}" if value > 0 else number(value).replace("-", "−")


def interval(low: float, high: float) -> str:
    """An interval as text, a dash where there is none."""
    return f"[{signed(low)}, {signed(high)}]" if low == low else "–"


def probability(p: float) -> str:
    """A p value as text: three decimals, never "0.000"."""
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def mean_and_error(e: Estimate) -> str:
    """A mean over seeds ± its standard error; the mean alone for a single seed."""
    return f"{number(e.mean)} ± {number(e.se)}" if e.n > 1 else number(e.mean)


def duration(seconds: float) -> str:
    """Seconds as text, in hours, minutes, or seconds."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def first_of(shown: int, total: int, what: str) -> str:
    """The end of a caption whose figure leaves some out; "" if it shows all."""
    return f" The first {shown} of {total} {what}." if total > shown else ""
