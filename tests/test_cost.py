"""Test the cost estimates for points, and the cost accounts of runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import ConfigError
from stillhouse.rundir import Runs, new_record, write_json
from stillhouse.sweep.cost import (
    Price,
    estimate,
    estimate_lines,
    labels_by,
    measured_jobs,
    price_of,
    prices,
    read_prices,
    totals,
)
from stillhouse.sweep.grid import load_sweep
from stillhouse.sweep.points import Point, Sweep
from stillhouse.sweep.spending import Spent, spent
from stillhouse.sweep.state import Record

PRODUCT = "NVIDIA-H100-80GB-HBM3"


def sweep(runs: Path, line: str, site: str = "local") -> Sweep:
    return load_sweep(None, line.split(), runs, site)


def finish(
    runs: Path, point: Point, load: float, work: float, is_collected: bool = False, **fields: Any
) -> None:
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
    if is_collected:
        write_json(run.collected_file, {"format": 1})
        weights.unlink()


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
        "on_loss=pg",
        "seed_tokens=8",
        "anchor_weight=0.1",
        "replay_size=50 off_policy_source=teacher",
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


def test_how_lambda_mixes_and_what_is_no_rollout_are_part_of_the_shape(tmp_path: Path):
    finish(tmp_path, sweep(tmp_path, "pair=tiny lmbda=0.7").points[0], load=1, work=1000)
    for change in ("lmbda_as=weight", "off_policy_source=teacher", "off_loss=ce"):
        other = sweep(tmp_path, f"pair=tiny lmbda=0.7 {change}")
        (cost,) = estimate(other.points, tmp_path).values()
        assert cost.basis.startswith("rule of thumb"), change


def test_what_a_method_never_uses_is_no_part_of_the_shape(tmp_path: Path):
    finish(tmp_path, sweep(tmp_path, "pair=tiny lmbda=0").points[0], load=0, work=100)
    unused = sweep(tmp_path, "pair=tiny lmbda=0 on_loss=pg lmbda_as=weight beta=0.5")
    (cost,) = estimate(unused.points, tmp_path).values()
    assert cost.seconds == pytest.approx(100)


def test_a_run_of_a_version_that_knew_fewer_knobs_is_no_measure(tmp_path: Path):
    point = sweep(tmp_path, "pair=tiny lmbda=1").points[0]
    finish(tmp_path, point, load=1, work=1000)
    record = Runs(tmp_path).of(point.spec).spec_file
    old = json.loads(record.read_text())
    del old["spec"]["method"]["replay_size"]
    record.write_text(json.dumps(old))
    assert estimate([point], tmp_path)[point.id].basis.startswith("rule of thumb")


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


# ------------------------------------------------------------------------------ a cluster


def test_on_a_cluster_only_what_came_from_one_is_a_measure(tmp_path: Path):
    first, second = sweep(tmp_path, "pair=tiny lmbda=1 max_steps=100 seeds=2").points
    finish(tmp_path, first, load=0, work=1000)
    there = sweep(tmp_path, "pair=tiny lmbda=1 seeds=[7] gpu_product=null", "cluster")
    [cost] = estimate(there.points, tmp_path, jobs=[]).values()
    assert (cost.seconds, cost.basis) == (
        None, "not known: no run like it was measured on this cluster",
    )  # fmt: skip
    finish(tmp_path, second, load=4, work=20, is_collected=True, device="Some GPU")
    [cost] = estimate(there.points, tmp_path, jobs=[]).values()
    assert cost.basis == "measured: 0.2 s a step, 1 run (Some GPU)"
    here = sweep(tmp_path, "pair=tiny lmbda=1 seeds=[7]")
    [cost] = estimate(here.points, tmp_path).values()
    assert cost.basis == "measured: 10 s a step, 1 run (cpu)"


def test_a_run_on_another_gpu_is_no_measure_where_the_site_names_one(tmp_path: Path):
    first, second = sweep(tmp_path, "pair=tiny lmbda=1 max_steps=100 seeds=2").points
    finish(tmp_path, first, load=0, work=1000, is_collected=True, device="NVIDIA A100-SXM4-80GB")
    there = sweep(tmp_path, f"pair=tiny lmbda=1 seeds=[7] gpu_product={PRODUCT}", "cluster")
    [cost] = estimate(there.points, tmp_path, jobs=[]).values()
    assert cost.basis == f"not known: no run like it was measured on {PRODUCT}"
    finish(tmp_path, second, load=0, work=10, is_collected=True, device="NVIDIA H100 80GB HBM3")
    [cost] = estimate(there.points, tmp_path, jobs=[]).values()
    assert cost.basis == "measured: 0.1 s a step, 1 run (NVIDIA H100 80GB HBM3)"


def test_undisturbed_jobs_of_the_sweep_are_a_measure_until_runs_come_home(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=1 max_steps=100 seeds=5", "cluster")
    ids = [point.id for point in asked.points]
    records = {
        ids[0]: Record("done", running=30.0, devices=1),
        ids[1]: Record("done", running=50.0, devices=1),
        ids[2]: Record("done", running=9.0, lost=900.0, devices=1),  # a part of it was done before
        ids[3]: Record("failed", code=43, running=1.0, devices=1),
    }
    jobs = measured_jobs(asked.points, records)
    cost = estimate(asked.points[4:], tmp_path, jobs)[ids[4]]
    assert cost.seconds == pytest.approx(40.0)
    assert cost.basis == "measured: 0.4 s a step, 2 Jobs (the cluster)"
    finish(tmp_path, asked.points[0], load=5, work=20, is_collected=True)
    assert estimate(asked.points[4:], tmp_path, jobs)[ids[4]].seconds == pytest.approx(25.0)


def test_a_cluster_without_gpus_has_the_rule_of_thumb_of_cores_one_with_them_has_none(
    tmp_path: Path,
):
    cores = sweep(tmp_path, "pair=tiny lmbda=1 gpu_resource=null", "cluster")
    [cost] = estimate(cores.points, tmp_path, jobs=[]).values()
    assert cost.basis.startswith("rule of thumb")
    gpus = sweep(tmp_path, "pair=tiny lmbda=1", "cluster")
    [cost] = estimate(gpus.points, tmp_path, jobs=[]).values()
    assert cost.basis.startswith("not known")


def test_a_plan_shows_hours_and_dollars_by_axis_and_what_they_rest_on(tmp_path: Path):
    words = f"pair=tiny lmbda=0,1 seeds=2 max_steps=100 gpu_product={PRODUCT} price_usd_per_hour=2"
    done = sweep(tmp_path, f"{words} learning_rate=1e-3", "cluster")
    for point in done.points[2:]:  # those of lmbda = 1
        finish(tmp_path, point, load=0, work=1800, is_collected=True, device=PRODUCT)
    asked = sweep(tmp_path, words, "cluster")
    costs = estimate(asked.points, tmp_path, jobs=[])
    assert estimate_lines(asked.points, costs, asked.site) == [
        "  to train   points        GPU-hours   cost",
        "  lmbda = 0       2        not known",
        "  lmbda = 1       2                1  $2.00",
        "  all             4  1 + 2 not known  $2.00",
        f"  2 points, not known: no run like it was measured on {PRODUCT}",
        f"  2 points, measured: 18 s a step, 2 runs ({PRODUCT})",
        "  $2 a device-hour (site.price_usd_per_hour); scoring is not counted",
    ]


def test_totals_of_nothing_to_train_are_no_lines(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=1", "cluster")
    assert estimate_lines((), {}, asked.site) == []


# --------------------------------------------------------------------------------- prices


def test_every_price_that_we_ship_says_whose_it_is_and_of_when():
    assert prices()
    for product, price in prices().items():
        assert price.usd_per_hour > 0 and price.source and price.date, product


def test_the_price_of_a_site_is_its_own_or_that_of_its_gpu(tmp_path: Path):
    product, price = next(iter(prices().items()))
    named = sweep(tmp_path, f"pair=tiny gpu_product={product}", "cluster").site
    assert price_of(named) == price
    assert str(price).startswith(f"${price.usd_per_hour:.4g} a device-hour (")
    own = sweep(tmp_path, f"pair=tiny gpu_product={product} price_usd_per_hour=0.5", "cluster")
    assert price_of(own.site) == Price(0.5, "site.price_usd_per_hour")
    assert price_of(sweep(tmp_path, "pair=tiny", "cluster").site) is None
    assert price_of(sweep(tmp_path, "pair=tiny gpu_product=Abacus", "cluster").site) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A100: {usd_per_hour: -1, source: x}", "A100.usd_per_hour: "),
        ("A100: {source: x}", "A100.usd_per_hour: "),
        ("A100: [1, 2", "prices.yaml: "),
        ("A100: 3", "A100: "),
    ],
)
def test_a_line_that_is_no_price_is_named(tmp_path: Path, text: str, said: str):
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"PRODUCT: \{usd_per_hour") as refused:
        read_prices(file)
    assert said in str(refused.value)


# ---------------------------------------------------------------------------------- spent


HOUR = 3600.0


def spend(tmp_path: Path, asked: Sweep, records: dict[str, Record]) -> Spent:
    return spent(asked, records, asked.site)


def test_what_a_cluster_took_is_split_into_queued_starting_running_and_lost(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=0,1 price_usd_per_hour=2 suite=null", "cluster")
    first, second = (point.id for point in asked.points)
    found = spend(
        tmp_path,
        asked,
        {
            first: Record(
                "done", queued=5 * HOUR, starting=HOUR / 2, running=3 * HOUR, lost=HOUR, devices=2
            ),
            second: Record("failed", code=43, running=HOUR, devices=2),
            "0123456789": Record("done", running=99 * HOUR, devices=8),  # another sweep's
        },
    )
    assert found.hours == {"queued": 10, "starting": 1, "running": 8, "lost": 2}
    assert found.usd == {"starting": 2, "running": 16, "lost": 4}
    assert (found.phases, found.uncollected) == ({"not collected": 6, "unfinished": 2}, 1)
    assert found.lines() == [
        "tasks that ended   device-hours        cost",
        "  queued                  10.00  holds none",
        "  starting                 1.00       $2.00",
        "  running                  8.00      $16.00",
        "    not collected          6.00",
        "    unfinished             2.00",
        "  lost                     2.00       $4.00",
        "  all but queued          11.00      $22.00",
        "  phases of 1 point: `stillhouse collect` brings them",
        "  $2 a device-hour (site.price_usd_per_hour)",
    ]


def test_what_failed_was_in_vain_what_diverged_is_an_answer(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=0,1 suite=tiny", "cluster")
    first, second = (point.id for point in asked.points)
    found = spend(
        tmp_path,
        asked,
        {
            first: Record("failed", code=44, running=HOUR, devices=1),
            f"{first}.0011223344": Record("alone", code=42, running=2 * HOUR, devices=1),
            second: Record("failed", code=43, running=4 * HOUR, devices=1),
        },
    )
    assert (found.hours["running"], found.hours["lost"]) == (4, 3)
    assert found.phases == {"unfinished": 4}


def test_running_is_told_by_phase_where_the_run_came_home(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=1 suite=null", "cluster")
    [point] = asked.points
    seconds = {"load": 60.0, "rollout": 1800.0, "train": 900.0, "save": 40.0, "total": 2800.0}
    finish(tmp_path, point, load=0, work=0, is_collected=True, seconds=seconds, devices=2)
    found = spend(tmp_path, asked, {point.id: Record("done", running=3000.0, devices=2)})
    assert found.hours["running"] == pytest.approx(6000 / 3600)
    shown = {phase: round(hours * 3600) for phase, hours in found.phases.items()}
    assert shown == {
        "load": 120, "rollout": 3600, "train": 1800, "save": 80, "start and end": 400,
    }  # fmt: skip
    assert found.uncollected == 0


def test_what_a_later_attempt_went_on_from_is_not_lost(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=1 suite=null", "cluster")
    [point] = asked.points
    # Preempted after 1000 s of which 900 were saved, ended by an attempt of 500 s: 1300 s of work.
    finish(tmp_path, point, load=100, work=1200, is_collected=True)
    record = Record("done", running=500.0, lost=1000.0, devices=1)
    found = spend(tmp_path, asked, {point.id: record})
    assert found.hours["running"] == pytest.approx(1300 / 3600)
    assert found.hours["lost"] == pytest.approx(200 / 3600)


def test_scoring_of_points_and_baselines_counts_as_running(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=1 suite=tiny", "cluster")
    [point] = asked.points
    baseline = asked.baselines[0].directory.name
    found = spend(
        tmp_path,
        asked,
        {
            f"{point.id}.0011223344": Record("done", starting=36.0, running=1800.0, devices=1),
            f"{baseline}.0011223344": Record("done", running=1800.0, devices=1),
            "prepare.0011223344": Record("done", running=7 * HOUR),
        },
    )
    assert (found.hours["running"], found.phases) == (1.0, {"scoring": 1.0})
    assert found.unpriced == pytest.approx(1.01)
    assert found.as_json()["usd"] == {"starting": 0, "running": 0, "lost": 0}


def test_a_device_that_has_a_price_is_priced_by_its_own_name(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=0,1 suite=null", "cluster")
    first, second = (point.id for point in asked.points)
    product, price = next(iter(prices().items()))
    found = spend(
        tmp_path,
        asked,
        {
            first: Record("done", running=HOUR, devices=1, gpu=product),
            second: Record("done", running=HOUR, devices=1, gpu="Abacus"),
        },
    )
    assert found.usd["running"] == pytest.approx(price.usd_per_hour)
    assert "  1.00 device-hours have no price and are left out" in found.lines()
    assert f"  {product}: {price}" in found.lines()
    assert "  price of Abacus not known: add it to k8s/prices.yaml" in found.lines()


def test_on_this_machine_the_runs_themselves_say_what_they_cost(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=0,1 seeds=2 suite=null")
    finish(tmp_path, asked.points[0], load=600, work=3000, devices=2, price_usd_per_hour=1.5)
    finish(tmp_path, asked.points[1], load=0, work=1800)
    found = spend(tmp_path, asked, {})
    assert found.hours["running"] == pytest.approx(2.5)
    assert found.usd["running"] == pytest.approx(3.0)
    assert found.unpriced == pytest.approx(0.5)
    assert found.phases == {"load": pytest.approx(1 / 3), "train": pytest.approx(5 / 3 + 0.5)}


def test_before_anything_has_ended_nothing_was_spent(tmp_path: Path):
    asked = sweep(tmp_path, "pair=tiny lmbda=0,1", "cluster")
    assert spend(tmp_path, asked, {}).lines() == ["nothing was spent yet: no task has ended"]
