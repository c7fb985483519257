"""Plan the next actions of a sweep from the states of its points. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillhouse.sweep.points import Baseline
from stillhouse.sweep.state import Observation


@dataclass(frozen=True)
class Action:
    """One thing to do next: prepare a group's pair, train a point, or score a pack of one group."""

    kind: Literal["prepare", "train", "eval"]
    group: str
    points: tuple[str, ...] = ()
    baselines: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Situation:
    """The input of `actions`."""

    groups: Mapping[str, str]  # point id -> group, in the order in which points start
    packs: Mapping[str, str]  # point id -> which points one evaluation may score together
    observations: Mapping[str, Observation]
    baselines: Sequence[Baseline]
    prepared: Mapping[str, bool]  # group -> whether its pair is there; missing: not tried yet
    live: Sequence[Action]
    since: float  # this loop does not restart a point that was asked to stop after this

    @property
    def spreads(self) -> bool:
        """Whether the rest of a group may be cut into new packs, to use idle slots."""
        return self.packs == self.groups


def actions(now: Situation, slots: int, pack: int) -> list[Action]:
    """What to start now, at most as much as there are free slots.

    Full packs first; then training, group by group, each group's pair prepared before it (one at a
    time); then what is left to score of groups in which nothing is trained any more.
    """
    free = slots - len(now.live)
    if free <= 0:
        return []
    to_train, to_score = _idle(now)
    chosen: list[Action] = []
    for key, ids in to_score.items():
        whole = len(ids) // pack * pack
        chosen += _packs(now, ids[:whole], pack)
        to_score[key] = ids[whole:]
    chosen += _trainings(now, to_train, max(0, free - len(chosen)))
    coming = _coming(now, to_train)
    rest = {key: ids for key, ids in to_score.items() if ids and key not in coming}
    for ids in rest.values():
        # A pack is a maximum: where it may be cut anew, idle slots share the rest.
        share = max(1, (free - len(chosen)) // len(rest)) if now.spreads else 1
        chosen += _packs(now, ids, min(pack, -(-len(ids) // share)))
    waiting = {now.groups[id_] for id_, key in now.packs.items() if key in coming}
    waiting |= {now.groups[id_] for ids in to_score.values() for id_ in ids}
    return _with_baselines(now, chosen[:free], waiting)[:free]


def _idle(now: Situation) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Points that may start: those to train by group, and those to score by pack."""
    busy = {id_ for action in now.live for id_ in action.points}
    to_train: dict[str, list[str]] = {}
    to_score: dict[str, list[str]] = {}
    for id_, group in now.groups.items():
        seen = now.observations[id_]
        if id_ in busy or seen.state not in ("new", "waiting"):
            continue
        if seen.asked_to_stop is not None and seen.asked_to_stop >= now.since:
            continue  # somebody stopped it while we ran; starting it again would undo that
        if seen.is_trained:
            to_score.setdefault(now.packs[id_], []).append(id_)
        elif now.prepared.get(group) is not False:
            to_train.setdefault(group, []).append(id_)
    return to_train, to_score


def _trainings(now: Situation, to_train: Mapping[str, Sequence[str]], free: int) -> list[Action]:
    chosen: list[Action] = []
    is_preparing = any(action.kind == "prepare" for action in now.live)
    for group, ids in to_train.items():
        if group in now.prepared:
            chosen += [Action("train", group, (id_,)) for id_ in ids[: free - len(chosen)]]
        elif not is_preparing and len(chosen) < free:
            chosen.append(Action("prepare", group))
            is_preparing = True
    return chosen


def _coming(now: Situation, to_train: Mapping[str, Sequence[str]]) -> set[str]:
    """The packs in which some point may still become trained."""
    idle = (id_ for ids in to_train.values() for id_ in ids)
    elsewhere = (
        id_
        for id_, seen in now.observations.items()
        if seen.state == "running" and not seen.is_trained
    )
    here = (id_ for action in now.live if action.kind == "train" for id_ in action.points)
    return {now.packs[id_] for id_ in itertools.chain(idle, elsewhere, here)}


def _packs(now: Situation, ids: Sequence[str], size: int) -> list[Action]:
    return [
        Action("eval", now.groups[ids[start]], tuple(ids[start : start + size]))
        for start in range(0, len(ids), size)
    ]


def _with_baselines(now: Situation, chosen: list[Action], waiting: set[str]) -> list[Action]:
    """The actions, with each baseline that is not scored yet in one of them or in one of its own.

    `waiting`: groups that have or will have something else to score. Where there is nothing else, a
    point that is scored already takes a baseline along: evaluations load by adapter.
    """
    taken = {directory for action in now.live for directory in action.baselines}
    first: dict[str, str] = {}  # group -> the pack that takes its baselines along
    for id_, group in now.groups.items():
        first.setdefault(group, now.packs[id_])
    open_ = [b for b in now.baselines if not (b.is_scored or b.cause or b.directory in taken)]
    result: list[Action] = []
    for action in chosen:
        along: list[Path] = []
        is_first = action.kind == "eval" and now.packs[action.points[0]] == first[action.group]
        for baseline in list(open_):
            if is_first and action.group in baseline.groups:
                along.append(baseline.directory)
                open_.remove(baseline)
        result.append(Action(action.kind, action.group, action.points, tuple(along)))
    return result + _carried(now, [b for b in open_ if not waiting & b.groups])


def _carried(now: Situation, baselines: Iterable[Baseline]) -> list[Action]:
    """Evaluations of baselines with a point that is scored already: it costs a load, no more."""
    carriers: dict[str, str] = {}  # group -> a point of it that is done
    for id_, group in now.groups.items():
        if now.observations[id_].state == "done":
            carriers.setdefault(group, id_)
    together: dict[str, list[Path]] = {}
    for baseline in baselines:
        group = next((g for g in sorted(baseline.groups) if g in carriers), None)
        if group:
            together.setdefault(group, []).append(baseline.directory)
    return [
        Action("eval", group, (carriers[group],), tuple(directories))
        for group, directories in together.items()
    ]
