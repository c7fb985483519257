"""Test the ledger in the cluster: ends of tasks, names and sweeps, with many concurrent writers."""

from __future__ import annotations

import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.errors import ConfigError
from stillhouse.sweep.cluster.connect import Cluster
from stillhouse.sweep.cluster.find import Names
from stillhouse.sweep.cluster.ledger import (
    DIGITS,
    Ledger,
    cancel_sweep,
    prepare_of,
    read_sweep,
    score_of,
    shard_of,
    sweep_object,
    sweeps,
    write_sweep,
)
from stillhouse.sweep.registry import of_record
from stillhouse.sweep.registry import record_of as record_of_sweep
from stillhouse.sweep.state import Record, record_of
from tests.builders.driving import cluster_of, sweep_of
from tests.fakes.fake_api import FakeApi
from tests.fakes.faults import Faults

CLAIM = "stillhouse-runs"


@pytest.fixture
def ledger(cluster: Cluster) -> Ledger:
    return Ledger(cluster, CLAIM)


def read_anew(cluster: Cluster) -> dict[str, Record]:
    ledger = Ledger(cluster, CLAIM)
    ledger.read()
    return ledger.records()


# ------------------------------------------------------------------------------ records

TIMES = st.floats(0, 1e6).map(lambda time: round(time, 1))


@settings(derandomize=True, database=None)
@given(
    st.fixed_dictionaries(
        dict(
            state=st.sampled_from(["done", "failed", "stopped", "cancelled", "alone"]),
            code=st.integers(0, 255),
            cause=st.none() | st.text(min_size=1, max_size=1500),
            tail=st.none() | st.text(min_size=1, max_size=1000),
            at=TIMES,
            queued=TIMES,
            starting=TIMES,
            running=TIMES,
            lost=TIMES,
            devices=st.integers(0, 8),
            gpu=st.none() | st.just("NVIDIA-H100"),
        )
    )
)
def test_a_record_is_read_as_it_was_written(fields: dict[str, Any]) -> None:
    record = Record(**fields)
    assert record_of(record.to_json()) == record


def test_a_done_point_takes_little_room() -> None:
    record = Record("done", 0, None, None, 1764093876.1, 12.5, 8.25, 3600.5, 0.0, 8, "NVIDIA-H100")
    assert len(record.to_json()) < 110


def test_long_words_are_cut() -> None:
    record = record_of(Record("failed", 1, "c" * 9000, "t" * 9000 + "end").to_json())
    assert (len(str(record.cause)), len(str(record.tail))) == (1500, 1000)
    assert str(record.tail).endswith("end")


def test_keys_lie_where_their_id_says() -> None:
    assert shard_of("3f30da16db") == "3"
    assert shard_of(score_of("3f30da16db", "faf7e7ee37")) == "3"
    assert shard_of(score_of("teacher-ad3de0bcf5", "faf7e7ee37")) == "a"
    assert shard_of(prepare_of("79a8e49f2e")) == "7"


# ------------------------------------------------------------------------------- the ledger


def test_what_is_written_is_read_by_everybody(cluster: Cluster, ledger: Ledger) -> None:
    ledger.write({"1bf9e6f3a4": Record("done"), "3f30da16db": Record("failed", 43, "NaN")})
    ledger.write({"1bf9e6f3a4.faf7e7ee37": Record("done")})
    assert read_anew(cluster) == ledger.records()
    assert len(ledger.records()) == 3
    assert ledger.get("5de20340e9") is None


def test_one_request_writes_all_that_lies_in_one_config_map(fake: FakeApi, ledger: Ledger) -> None:
    many = {f"{digit}{number:09x}": Record("done") for digit in "07f" for number in range(50)}
    ledger.write(many)
    assert fake.requests["create", "configmaps"] == 3
    before = fake.requests["patch", "configmaps"]
    ledger.write(many)
    assert fake.requests["patch", "configmaps"] == before + 3
    assert fake.names("configmaps") == [f"stillhouse-done-{CLAIM}-{digit}" for digit in "07f"]


def test_a_record_that_is_none_is_removed(cluster: Cluster, ledger: Ledger) -> None:
    ledger.write({"1bf9e6f3a4": Record("failed", 42), "1ff9e6f3a4": Record("done")})
    ledger.write({"1bf9e6f3a4": None})
    assert set(read_anew(cluster)) == {"1ff9e6f3a4"} == set(ledger.records())


def test_two_volumes_are_two_ledgers(cluster: Cluster, ledger: Ledger) -> None:
    ledger.write({"1bf9e6f3a4": Record("done")})
    other = Ledger(cluster, "another")
    other.read()
    assert other.records() == {}
    other.write({"1bf9e6f3a4": Record("failed", 42)})
    assert read_anew(cluster) == {"1bf9e6f3a4": Record("done")}


def test_drivers_that_write_at_once_behind_bad_connections_leave_all_of_it(
    fake: FakeApi, cluster: Cluster, tmp_path: Path
) -> None:
    def one(number: int) -> None:
        door = fake.door(Faults(number))
        with cluster_of(door, tmp_path / f"kubeconfig-{number}") as client:
            door.faults.rates = {"drop_after": 0.2, "twice": 0.1, "error": 0.1}
            ledger = Ledger(client, CLAIM)
            for digit in DIGITS:
                ledger.write({f"{digit}{number:09x}": Record("done", number)})

    writers = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {key: record.code for key, record in read_anew(cluster).items()} == {
        f"{digit}{number:09x}": number for digit in DIGITS for number in range(4)
    }


def test_reading_anew_says_what_changed_and_asks_for_nothing_that_is_fresh(
    fake: FakeApi, cluster: Cluster, ledger: Ledger
) -> None:
    ledger.read()
    other = Ledger(cluster, CLAIM)
    other.write({"1bf9e6f3a4": Record("done"), "2bf9e6f3a4": Record("cancelled")})
    assert ledger.refresh(["1bf9e6f3a4"], within_s=60.0) == set()
    assert fake.requests["get", "configmaps"] == 0
    assert ledger.refresh(["1bf9e6f3a4"], within_s=0.0) == {"1bf9e6f3a4"}
    assert ledger.get("2bf9e6f3a4") is None
    assert ledger.refresh(["2bf9e6f3a4"], within_s=0.0) == {"2bf9e6f3a4"}
    assert ledger.cancelled_at("2bf9e6f3a4") is not None
    again = Ledger(cluster, CLAIM)
    again.read()
    assert again.cancelled_at("2bf9e6f3a4") is None  # it was so before anybody looked


def test_a_ledger_that_fills_keeps_who_is_done_and_then_says_so(ledger: Ledger) -> None:
    words = Record("failed", 1, "c" * 1500, "t" * 1000)
    for start in range(0, 400, 100):
        ledger.write({f"0{number:09x}": words for number in range(start, start + 100)})
    assert ledger.get(f"0{399:09x}") == Record("failed", 1)
    with pytest.raises(ConfigError, match=f"stillhouse-done-{CLAIM}-0: full"):
        ledger.write({f"0{number:09x}": Record("done") for number in range(1000, 7000)})


# ---------------------------------------------------------------------------------- names


def test_a_name_means_one_run(cluster: Cluster) -> None:
    names = Names(cluster)
    assert names.read() == {}
    assert names.claim("half", "tiny-gkd-1bf9e6f3a4")
    assert not names.claim("half", "tiny-gkd-1bf9e6f3a4")
    assert names.claim("alias", "tiny-gkd-1bf9e6f3a4")
    with pytest.raises(ConfigError, match='the name "half" already means tiny-gkd-1bf9e6f3a4'):
        names.claim_all({"new": "tiny-gkd-3f30da16db", "half": "tiny-gkd-3f30da16db"})
    assert set(names.read()) == {"half", "alias"}


def test_of_two_who_want_one_name_at_once_one_gets_it(fake: FakeApi, tmp_path: Path) -> None:
    won: list[int] = []

    def one(number: int) -> None:
        door = fake.door(Faults(number))
        with cluster_of(door, tmp_path / f"kubeconfig-{number}") as client:
            door.faults.rates = {"drop_after": 0.2, "twice": 0.2}
            names = Names(client)
            names.claim(f"own-{number}", f"run-{number}")
            try:
                names.claim("half", f"run-{number}")
            except ConfigError:
                return
            won.append(number)

    people = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    (winner,) = won
    with cluster_of(fake, tmp_path / "kubeconfig") as client:
        said = Names(client).read()
    assert said == {f"own-{n}": f"run-{n}" for n in range(6)} | {"half": f"run-{winner}"}


# --------------------------------------------------------------------------------- sweeps


def test_a_sweep_is_found_again_from_anywhere(cluster: Cluster) -> None:
    sweep = sweep_of()
    record = record_of_sweep(sweep)
    assert read_sweep(cluster, "s") is None
    write_sweep(cluster, record)
    write_sweep(cluster, record)
    there = read_sweep(cluster, "s")
    assert there == record
    found = of_record(record, sweep.runs, "here")
    assert found.by_id.keys() == sweep.by_id.keys() and found.suite == sweep.suite
    assert list(map(str, found.points)) == list(map(str, sweep.points))
    assert [row.directory for row in found.baselines] == [r.directory for r in sweep.baselines]
    assert (found.cache_dir, found.commits) == (sweep.cache_dir, sweep.commits)


def test_a_sweep_that_was_cancelled_stays_marked(cluster: Cluster) -> None:
    assert not cancel_sweep(cluster, "s")
    record = record_of_sweep(sweep_of())
    write_sweep(cluster, record)
    assert [(mark.name, mark.cancelled) for mark in sweeps(cluster)] == [("s", None)]
    assert cancel_sweep(cluster, "s")
    write_sweep(cluster, record)
    (mark,) = sweeps(cluster, "s")
    assert mark.cancelled is not None
    assert sweeps(cluster, "another") == []


def test_names_that_no_object_can_have_are_told_apart(cluster: Cluster) -> None:
    record = record_of_sweep(sweep_of())
    for name in ("My_Sweep", "my-sweep", "my_sweep", "ünder"):
        write_sweep(cluster, record | {"name": name})
    assert {mark.name for mark in sweeps(cluster)} == {"My_Sweep", "my-sweep", "my_sweep", "ünder"}
    assert read_sweep(cluster, "my_sweep") == record | {"name": "my_sweep"}
    assert sweep_object("lmbda-beta") == "stillhouse-sweep-lmbda-beta"


def test_a_sweep_that_fits_into_no_object_says_so(cluster: Cluster) -> None:
    record = record_of_sweep(sweep_of())
    points = [{"id": sha256(str(number).encode()).hexdigest()} for number in range(30_000)]
    with pytest.raises(ConfigError, match="its 30000 points do not fit"):
        write_sweep(cluster, record | {"points": points})
