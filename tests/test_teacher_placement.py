"""Test what `plan` says about the places where a teacher can be, by hand from its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_compatibility import model, spec

from stillhouse import teacher_placement
from stillhouse.spec import TrainSpec

# 6 million weights, 12 MB in bfloat16; hidden states of 4 numbers, 8 bytes a token.
SHAPES = {"model.embed_tokens.weight": [8, 4], "model.layers.0.mlp.up_proj.weight": [1500, 4000]}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(teacher_placement, "WORTH", 10**7)
    monkeypatch.setattr(teacher_placement, "GPU", tmp_path / "none")
    return model(tmp_path / "m", SHAPES)


def points(directory: Path, *lmbdas: float, **site: object) -> list[TrainSpec]:
    found = [spec(directory, f"lmbda={lmbda}") for lmbda in lmbdas]
    return [replace(one, site=replace(one.site, **site)) for one in found]


def test_each_place_is_compared_by_loads_and_copies(directory: Path) -> None:
    head, teacher, process, server, cache = teacher_placement.lines(
        points(directory, 0, 0, 0.5, 1, max_parallel=3)
    )
    assert head == "where can the teacher be (teacher_at)?"
    assert teacher == "  teacher of pair qwen3_4b_self: 0.012 GB of weights, 4 points"
    assert process == "    process  now       4 loads, and 0.012 GB in each of 3 points at once"
    assert server == "    server   best      1 load, and 0.012 GB once"
    assert cache == (
        "    cache              2 of them (lmbda 0, with teacher_rows=alone): a row is scored once,"
        " 8 bytes a token kept on disk"
    )


def test_a_cache_is_best_where_no_point_writes_and_a_process_where_one_runs_at_a_time(
    directory: Path,
) -> None:
    *_, cache = teacher_placement.lines(points(directory, 0, 0))
    assert cache.split()[:4] == ["cache", "best", "each", "point"]
    process = teacher_placement.lines(points(directory, 1, 0.5, max_parallel=1))[2]
    assert process.split()[:3] == ["process", "now,", "best"]


def test_processes_share_weights_whose_files_have_the_dtype_of_the_teacher(
    directory: Path, tmp_path: Path
) -> None:
    half = model(tmp_path / "half", SHAPES, dtype="BF16")
    process = teacher_placement.lines(points(half, 1, 0.5))[2]
    assert process.split()[:3] == ["process", "now,", "best"]
    assert process.endswith(
        "2 loads, and 0.012 GB for all: its files are in bfloat16, and processes share them"
    )


def test_a_cluster_serves_no_teacher(directory: Path) -> None:
    found = teacher_placement.lines(points(directory, 1, 0.5, site_name="cluster"))
    assert [line.split()[0] for line in found[2:]] == ["process"]


def test_nothing_is_said_of_one_point_of_the_students_own_base_or_of_a_small_teacher(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert teacher_placement.lines(points(directory, 1)) == []
    own = spec(directory, "quant=none", "method=sft")
    assert teacher_placement.lines([own, own]) == []
    monkeypatch.setattr(teacher_placement, "WORTH", 10**8)
    assert teacher_placement.lines(points(directory, 1, 0.5)) == []
