"""Test checkpoints: complete or absent, restored to the bit, and never unpickled."""

from __future__ import annotations

import shutil

import pytest
import torch

from stillhouse.distill import checkpoint
from stillhouse.errors import ContractError
from stillhouse.rundir import RunDir


def trained(steps, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_what_is_restored_goes_on_to_the_same_bits(tmp_path):
    run = RunDir(tmp_path)
    model, optimizer = trained(3)
    checkpoint.save(run, 3, model, optimizer, {"cost": {}})
    other, other_optimizer = trained(0, seed=0)
    state = checkpoint.load_newest(run, other, other_optimizer, print)
    assert state == {"step": 3, "cost": {}}
    for m, o in ((model, optimizer), (other, other_optimizer)):
        torch.manual_seed(9)
        m(torch.randn(5, 4)).square().sum().backward()
        o.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "damage",
    ["truncate", "remove", "flip", "no manifest", "manifest cut", "manifest edited"],
)
def test_a_torn_checkpoint_is_skipped_and_said(tmp_path, damage):
    run, said = RunDir(tmp_path), []
    for step in (1, 2):
        checkpoint.save(run, step, *trained(step), {"cost": {}})
    newest = run.checkpoints / "step-2"
    victim = newest / "optimizer.safetensors"
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "flip":
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(bytes(data))
    elif damage == "remove":
        victim.unlink()
    elif damage == "manifest edited":
        (newest / "manifest.json").write_text('{"state.json": 5}')
    elif damage == "manifest cut":
        (newest / "manifest.json").write_text('{"adapter')
    else:
        (newest / "manifest.json").unlink()
    model, optimizer = trained(0)
    state = checkpoint.load_newest(run, model, optimizer, said.append)
    assert state is not None
    assert state["step"] == 1
    assert "step-2" in said[0] and "going back" in said[0]


def test_a_disk_that_fills_up_loses_nothing_that_was_there(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    checkpoint.save(run, 1, *trained(1), {"cost": {}})

    def full(tensors, path):
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(run, 2, *trained(2), {"cost": {}})
    monkeypatch.undo()
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-1"]
    assert checkpoint.load_newest(run, *trained(0), print)["step"] == 1  # type: ignore[index]


def test_leftovers_of_a_killed_save_are_no_checkpoint(tmp_path):
    run = RunDir(tmp_path)
    checkpoint.save(run, 1, *trained(1), {"cost": {}})
    shutil.copytree(run.checkpoints / "step-1", run.checkpoints / ".step-2.77.tmp")
    assert checkpoint.load_newest(run, *trained(0), print)["step"] == 1  # type: ignore[index]
    checkpoint.save(run, 3, *trained(3), {"cost": {}})
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-1", "step-3"]


def test_only_the_newest_two_are_kept_and_their_order_is_numeric(tmp_path):
    run = RunDir(tmp_path)
    for step in (9, 10, 100):
        checkpoint.save(run, step, *trained(1), {"cost": {}})
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-10", "step-100"]


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path):
    run = RunDir(tmp_path)
    checkpoint.save(run, 1, *trained(1), {"cost": {}})
    model = torch.nn.Linear(4, 3)
    with pytest.raises(ContractError, match="other tensors"):
        checkpoint.load_newest(run, model, torch.optim.AdamW(model.parameters()), print)
