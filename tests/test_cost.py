"""What points will cost, and what runs have cost."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.rundir import Runs, new_record, write_json
from stillhouse.sweep.cost import estimate, labels_by, spent, totals
from stillhouse.sweep.grid import Point, Sweep, load_sweep


def sweep(runs: Path, line: str) -> Sweep:
    return load_sweep(None, line.split(), runs)


def finish(runs: Path, point: Point, load: float, work: float, **fields: Any) -> None:
    """Write what a done run leaves behind: record, adapter and cost."""
    run = Runs(runs).of(point.spec)
    write_json(run.spec_file, new_record(point.spec, {}))
    weights = run.adapter / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"1234")
    contract = {"id": point.id, "files": {weights.name: {"size": 4}}}
    (run.adapter / "stillhouse.json").write_text(json.dumps(contract))
    seconds = {"load": load, "train": work, "total": load + work}
    cost = {"seconds": seconds, "tokens": {}, "device": "cpu", "devices": 1, "threads": 1}
    write_json(run.cost_file, cost | {"price_usd_per_hour": None} | fields)


def test_a_generated_pair_has_a_rule_of_thumb_and_a_hub_pair_has_none(tmp_path: Path):
    tiny = sweep(tmp_path, "pair=tiny lmbda=0.5 max_steps=200")
    (cost,) = estimate(tiny.points, tmp_path).values()
    assert cost.seconds == pytest.approx(200 * 0.15)  # 32 sequences a step
    assert cost.basis.startswith("rule of thumb")
    assert cost.usd is None
    hub = sweep(tmp_path, "pair=qwen3_4b_self suite=null")
    (cost,) = estimate(hub.points, tmp_path).values()
    assert (cost.seconds, cost.device_hours, cost.usd) == (None, None, None)
    assert cost.basis.startswith("not known")


def test_done_runs_of_the_same_shape_are_the_measure(tmp_path: Path):
    done = sweep(tmp_path, "pair=tiny lmbda=1 max_steps=100 seeds=3").points
    for point, work in zip(done, (10.0, 30.0, 20.0), strict=True):
        finish(tmp_path, point, load=4, work=work)
    longer = sweep(tmp_path, "pair=tiny lmbda=1 max_steps=500 learning_rate=1e-3 seeds=1")
    (cost,) = estimate(longer.points, tmp_path).values()
    assert cost.seconds == pytest.approx(4 + 500 * 0.2)  # median of 0.1, 0.3 and 0.2 s a step
    assert cost.basis == "measured: 0.2 s a step, 3 runs (cpu)"


@pytest.mark.parametrize(
    "change",
    [
        "lmbda=0",
        "lmbda=[[0,0],[1,1]]",
        "quant=none",
        "per_device_train_batch_size=16",
        "gradient_accumulation_steps=2",
        "num_processes=2",
        "max_new_tokens=64",
        "max_length=64",
    ],
)
def test_a_run_of_another_shape_is_no_measure(tmp_path: Path, change: str):
    finish(tmp_path, sweep(tmp_path, "pair=tiny lmbda=1").points[0], load=1, work=1000)
    other = sweep(tmp_path, f"pair=tiny lmbda=1 {change}")
    (cost,) = estimate(other.points, tmp_path).values()
    assert cost.basis.startswith("rule of thumb")


def test_the_same_schedule_from_another_method_file_is_the_same_shape(tmp_path: Path):
    finish(tmp_path, sweep(tmp_path, "pair=tiny method=hybrid").points[0], load=0, work=100)
    spelt = sweep(tmp_path, "pair=tiny method=hybrid lmbda=[[0,0],[0.5,0],[0.5,1]] beta=0.5")
    (cost,) = estimate(spelt.points, tmp_path).values()
    assert cost.seconds == pytest.approx(100)


def test_a_run_that_is_not_done_is_no_measure(tmp_path: Path):
    point = sweep(tmp_path, "pair=tiny lmbda=1").points[0]
    finish(tmp_path, point, load=1, work=1000)
    (Runs(tmp_path).of(point.spec).adapter / "stillhouse.json").unlink()
    assert estimate([point], tmp_path)[point.id].basis.startswith("rule of thumb")


def test_dollars_follow_from_seconds_devices_and_the_sites_price(tmp_path: Path):
    priced = sweep(tmp_path, "pair=tiny max_steps=3600 num_processes=2 price_usd_per_hour=3")
    (cost,) = estimate(priced.points, tmp_path).values()
    assert cost.seconds == pytest.approx(3600 * 0.3)  # two processes, twice the sequences
    assert cost.device_hours == pytest.approx(0.6)
    assert cost.usd == pytest.approx(1.8)


def test_totals_add_up_by_axis_and_name_what_is_not_known(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny,smollm2_self lmbda=0,1 max_steps=240 suite=null seeds=2")
    costs = estimate(asked.points, tmp_path)
    tiny, smol, everything = totals(costs, labels_by(asked.points, "pair"))
    assert (tiny.label, tiny.runs, tiny.unknown, tiny.unpriced) == ("pair = tiny", 4, 0, 4)
    assert tiny.hours == pytest.approx(4 * 240 * 0.15 / 3600)
    assert (smol.label, smol.runs, smol.unknown, smol.hours) == ("pair = smollm2_self", 4, 4, 0)
    assert (everything.label, everything.runs, everything.unknown) == ("all", 8, 4)
    assert everything.usd is None
    for by in asked.axes:
        assert totals(costs, labels_by(asked.points, by))[-1] == everything


def test_what_was_spent_is_read_from_the_runs_that_say_so(tmp_path: Path):
    points = sweep(tmp_path, "pair=tiny lmbda=0,1 seeds=2").points
    finish(tmp_path, points[0], load=600, work=3000, devices=2, price_usd_per_hour=1.5)
    finish(tmp_path, points[1], load=0, work=1800)
    costs = spent(tmp_path, [point.id for point in points])
    assert set(costs) == {points[0].id, points[1].id}
    assert costs[points[0].id].usd == pytest.approx(3.0)
    by_method = totals(costs, labels_by(points, "method_name"))
    assert [(row.label, row.runs) for row in by_method] == [("method_name = gkd", 2), ("all", 2)]
    assert by_method[0].hours == pytest.approx(1.5)
    assert by_method[0].device_hours == pytest.approx(2.5)
    assert (by_method[0].usd, by_method[0].unpriced) == (pytest.approx(3.0), 1)
    assert spent(tmp_path, []) == {}
