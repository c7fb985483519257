"""This file is where jsonl and parquet files are opened; what is broken in them is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.at_hand import SUFFIXES
from stillhouse.errors import DataError


@dataclass(frozen=True)
class Table:
    """The rows of one or more files, and the digest of these files' bytes."""

    rows: Sequence[dict[str, Any]]
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.rows[row]


def read_table(files: list[Path]) -> Table:
    """All rows of files of one kind.

    Raises DataError for another kind of file, one that is not there, and one that cannot be parsed
    (of a jsonl file with the line's number). Lines of white space are passed over.
    """
    for file in files:
        if file.suffix not in SUFFIXES:
            raise DataError(f"{file}: not a {' or '.join(SUFFIXES)} file")
        if not file.is_file():
            raise DataError(f"{file}: no such file")
    hasher = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            hasher.update(hashlib.file_digest(opened, "sha256").digest())
    if files[0].suffix == ".parquet":
        return Table(_ParquetRows(files), hasher.hexdigest())
    return Table([row for file in files for row in _jsonl(file)], hasher.hexdigest())


def _jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
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


class _ParquetRows(Sequence[dict[str, Any]]):
    """Rows of parquet files, turned into Python one at a time: a data set may have a million."""

    def __init__(self, files: list[Path]) -> None:
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
