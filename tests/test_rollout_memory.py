"""Test the estimate of rollout memory beside the student, computed from the files before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_compatibility import model, spec

from stillhouse import memory, rollout_memory

# 6 million weights of projections; per position 2 layers × 2 × 1 head × 4 channels.
SHAPES = {
    "model.embed_tokens.weight": [8, 4],
    "lm_head.weight": [8, 4],
    "model.layers.0.mlp.up_proj.weight": [1000, 4000],
    "model.layers.1.mlp.up_proj.weight": [500, 4000],
    "model.norm.weight": [4],
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return model(tmp_path / "m", SHAPES, num_hidden_layers=2, num_attention_heads=1, hidden_size=4)


def test_a_copy_and_the_keys_and_values_of_all_rows_by_hand(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_memory, "GPU", directory / "none")
    half = spec(directory)  # in bfloat16: 2 bytes; 4 x 2 x 8 rows of 88 positions
    [line] = rollout_memory.lines([half, half])
    copy, past = 12e6, 2 * 2 * 4 * 2 * 64 * 88
    assert line == (
        f"rollouts of pair qwen3_4b_self: a copy of {copy / 1e9:.2g} GB (bfloat16) beside the"
        f" student, and up to {past / 1e9:.2g} GB of keys and values (64 rows at once)"
    )
    single = spec(directory, "mixed_precision=no", "student_dtype=float32", "rollout_rows=8")
    [line] = rollout_memory.lines([single])
    assert "a copy of 0.024 GB (float32)" in line and "(8 rows at once)" in line
    assert rollout_memory.lines([spec(directory, "lmbda=0")]) == []


def test_what_does_not_fit_is_said_with_what_happens(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_memory, "GPU", directory / "none")
    for free, said in ((1000, "transformers' generate writes"), (12_100_000, "rollout_rows")):
        monkeypatch.setattr(rollout_memory, "host_bytes", lambda free=free: free)
        [line] = rollout_memory.lines([spec(directory)])
        assert said in line and f"{free / 1e9:.2g} GB are there" in line


def test_of_a_container_its_own_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500\n")
    whole = memory.host_bytes()
    assert whole > 10**6
    (tmp_path / "memory.max").write_text("1500\n")
    assert memory.host_bytes() == 1000
