"""Look up the models and data that points depend on now, each of them once per look at a sweep.

Ten thousand points of one sweep depend on a few models and files. A run's record says what it
depended on; `sources` finds the present state, once per distinct pair and data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stillhouse.errors import ContractError
from stillhouse.identity import digest, filled, from_plain
from stillhouse.rundir import Json, RunDir, read_baseline
from stillhouse.scores import changes
from stillhouse.sources import drift_of, of_pair, sources_of
from stillhouse.spec import PairSpec, TaskSpec, TrainSpec

NO_COMMITS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Below:
    """What the scores of a run or a baseline depend on now."""

    label: str  # point, teacher, student or ptq
    pair: PairSpec
    here: Json  # sources of the pair now
    cache_dir: Path
    adapter: str | None = None  # digest of its contract

    def changes(self, score: Json, task: TaskSpec) -> list[str]:
        """Why a score of this row is no longer valid, in sentences; [] where it is valid."""
        below = (self.pair, self.here, self.cache_dir, self.adapter)
        return changes(score, task, self.label, *below)


class Beneath:
    """What points depend on (weights, tokenizers and rows), as it is now; for one look at a sweep.

    `cache_dir`, `commits`: the sweep's; None: each run's own, as its record has them.
    """

    def __init__(
        self, cache_dir: Path | None = None, commits: Mapping[str, str] = NO_COMMITS
    ) -> None:
        self.cache_dir, self.commits = cache_dir, commits
        self._points: dict[str, tuple[TrainSpec, Json]] = {}
        self._pairs: dict[str, tuple[PairSpec, Json]] = {}

    def drift(self, run: RunDir, record: Json) -> list[str]:
        """A sentence for each source of a run that is not what its record says.

        Raises:
            ContractError: its spec is of another version.
        """
        spec, here = self._of(run, record)
        return drift_of(run, record, spec, here)

    def under(self, directory: Path) -> Below | None:
        """What the scores of a run or of a baseline depend on now; None: not known."""
        run = RunDir(directory)
        record = run.record()
        return self.under_run(run, record) if record else self.under_baseline(directory)

    def under_run(self, run: RunDir, record: Json) -> Below:
        """What the scores of a trained run depend on now."""
        spec, here = self._of(run, record)
        contract = run.contract()
        adapter = digest(contract)[:16] if contract else None
        return Below("point", spec.pair, here, Path(spec.place.cache_dir), adapter)

    def under_baseline(self, directory: Path) -> Below | None:
        """What the scores of a row that no run trained depend on now; None: it has none."""
        told = read_baseline(directory)
        if told is None or self.cache_dir is None:
            return None
        key = json.dumps(told["pair"], sort_keys=True)
        if key not in self._pairs:
            try:
                pair = TypeAdapter(PairSpec).validate_python(filled("pair", told["pair"]))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                raise ContractError(
                    f"{directory / 'baseline.json'}: pair.{'.'.join(map(str, first['loc']))}:"
                    f" {first['msg'].lower()}; move it away, and `stillhouse run` writes it anew"
                ) from error
            self._pairs[key] = pair, of_pair(pair, self.cache_dir, self.commits)
        pair, here = self._pairs[key]
        return Below(told["label"], pair, here, self.cache_dir)

    def _of(self, run: RunDir, record: Json) -> tuple[TrainSpec, Json]:
        plain: dict[str, Any] = record["spec"]
        place = plain["place"]
        own: dict[str, str] = place.get("commits") or {}
        key = json.dumps(
            [plain["pair"], plain["data"], plain.get("rescue"), own, place["cache_dir"]],
            sort_keys=True,
        )
        if key not in self._points:
            try:
                spec = from_plain(plain)
            except ValidationError as error:
                raise ContractError(
                    f"{run.spec_file}: its spec is of another version"
                    f" ({error.errors(include_url=False)[0]['msg']}); use the one that wrote it, or"
                    " another --runs directory"
                ) from error
            where = str(self.cache_dir) if self.cache_dir else place["cache_dir"]
            here = dataclasses.replace(spec.place, cache_dir=where, commits={**own, **self.commits})
            spec = dataclasses.replace(spec, place=here)
            self._points[key] = spec, sources_of(spec, Path(where))
        return self._points[key]
