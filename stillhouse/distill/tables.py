"""Open files of rows (JSON, JSON Lines, Parquet), and report what is malformed in them.

Rows are parsed only on access: if the processed rows are already cached, only the files' digest has
to be computed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from stillhouse.errors import DataError
from stillhouse.fingerprints import of_rows
from stillhouse.local_models import SUFFIXES

Row = dict[str, Any]

KINDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


@dataclass(frozen=True)
class Table:
    """The rows of one or more files of one kind, and the digest of these files' bytes."""

    files: tuple[Path, ...]
    digest: str

    @cached_property
    def rows(self) -> Sequence[Row]:
        """The rows, in the files' order; parsed on first access.

        Raises DataError for what cannot be parsed; for a jsonl file with the line number.
        """
        if self.files[0].suffix == ".parquet":
            return _ParquetRows(self.files)
        return [row for file in self.files for row in _json_rows(file)]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, numbers: Sequence[int]) -> list[Row]:
        """The rows with these numbers, counted from 0."""
        if isinstance(self.rows, _ParquetRows):
            return self.rows.at(numbers)
        return [self.rows[number] for number in numbers]


def open_table(files: Sequence[Path], cache_dir: Path) -> Table:
    """The rows of files of one kind. Blank lines are skipped.

    Raises DataError for another kind of file, and for a missing file.
    """
    for file in files:
        if not file.name.endswith(SUFFIXES):
            raise DataError(f"{file}: not a {KINDS} file")
        if not file.is_file():
            raise DataError(f"{file}: no such file")
    return Table(tuple(files), of_rows(files, cache_dir))


# ---------------------------------------------------------------- JSON


def _json_rows(file: Path) -> list[Row]:
    content = _bytes(file)
    if ".json" in file.suffixes[-2:] and content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        return _array(file, content)
    rows: list[Row] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}: holds {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def _array(file: Path, content: bytes) -> list[Row]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not a JSON array ({error})") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"{file}: element {number} of the array is {type(row).__name__}, not an object"
            )
    return rows


def _bytes(file: Path) -> bytes:
    if file.suffix != ".gz":
        return file.read_bytes()
    try:
        return gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be unpacked as gzip ({error})") from error


# ---------------------------------------------------------------- parquet


class _ParquetRows(Sequence[Row]):
    """Rows of parquet files, converted to Python on access: there may be a million."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            tables = [pyarrow.parquet.read_table(file, memory_map=True) for file in files]
            self._table = pyarrow.concat_tables(tables)
        except (pyarrow.ArrowException, OSError) as error:
            names = ", ".join(map(str, files))
            raise DataError(f"{names}: cannot be read as parquet ({error})") from error

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: Any) -> Any:
        return self._table.slice(row, 1).to_pylist()[0]

    def at(self, numbers: Sequence[int]) -> list[Row]:
        """Read adjacent rows together: several times faster than one at a time."""
        # Not `take`: for nested columns it joins all chunks first, and 2 GiB of text do not fit.
        found: list[Row] = []
        for first, count in _runs(numbers):
            found += self._table.slice(first, count).to_pylist()
        return found


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs as (first, count): 3 4 5 9 gives (3, 3) and (9, 1)."""
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        together = [number for _, number in run]
        yield together[0], len(together)
