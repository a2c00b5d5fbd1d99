"""What a run fixes before it begins: its plan, its devices, its folder; and what may not change."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock import AllReduce, Averaging
from penstock.errors import DataError, JobError, RunError
from penstock.feed import Manifest
from penstock.feed.manifest import Partition
from penstock.runtime.decisions import (
    Wanted,
    check_unchanged,
    decide,
    decided,
    devices,
    new_directory,
)
from penstock.runtime.store import Store
from penstock.runtime.worker import Settings

TRAIN = Manifest((Partition("a", 3), Partition("b", 1200)))


def wanted(**changes: Any) -> Wanted:
    values: dict[str, Any] = {
        "name": "digits",
        "shards": 4,
        "threads": None,
        "seed": 7,
        "device": "auto",
        "job_yaml": "",
        "runs": "runs",
        "max_restarts": 3,
    }
    return Wanted(**(values | changes))


# Devices


@pytest.mark.parametrize(
    ("nodes", "device", "backend"),
    [
        ([], "cpu", "gloo"),
        ([("a", []), ("b", [])], "cpu", "gloo"),
        ([("a", ["0"]), ("b", [])], "cpu", "gloo"),  # a rank without one
        ([("a", ["0"])], "cuda", "nccl"),
        ([("a", ["0"]), ("a", ["1"])], "cuda", "nccl"),
        ([("a", ["0"]), ("b", ["0"])], "cuda", "nccl"),
        ([("a", ["0", "1"]), ("a", ["2", "3"])], "cuda", "nccl"),
        ([("a", ["0"]), ("a", ["0"])], "cuda", "gloo"),  # two ranks on one device
        ([("a", ["0"]), ("a", ["0"]), ("b", ["0"])], "cuda", "gloo"),
    ],
)
def test_devices(nodes: list[tuple[str, list[str]]], device: str, backend: str) -> None:
    facts = {rank: {"host": host, "gpus": gpus} for rank, (host, gpus) in enumerate(nodes)}
    assert devices(facts) == (device, backend)


def test_nodes_that_say_nothing_of_gpus() -> None:
    assert devices({0: {"host": "a"}, 1: {"host": "a", "gpus": ["0"]}}) == ("cpu", "gloo")


# Plans


def test_what_is_asked_for_is_planned_and_the_rest_is_found() -> None:
    settings = Settings(Averaging(every=5))
    plan = decide(wanted(), settings, {"train": TRAIN}, threads=6, device="cuda")
    assert (plan.shards, plan.threads, plan.seed, plan.device) == (4, 6, 7, "cuda")
    assert plan.strategy == {"averaging": Averaging(every=5).model_dump()}
    assert plan.manifests == {"train": TRAIN}
    asked = decide(wanted(threads=2, device="cpu"), settings, {}, threads=6, device="cuda")
    assert (asked.threads, asked.device) == (2, "cpu")


def test_the_plan_of_the_run_that_is_resumed(tmp_path: Path) -> None:
    store, settings = Store(str(tmp_path / "run")), Settings(AllReduce())
    store.write("job.yaml", b"")
    with pytest.raises(RunError, match="neither a plan nor a checkpoint") as caught:
        decided(store, settings)
    assert store.url in caught.value.message
    assert caught.value.hint == "run it again without resume"
    plan = decide(wanted(), settings, {"train": TRAIN}, threads=1, device="cpu")
    store.write("plan.json", json.dumps(plan.to_dict()).encode())
    assert decided(store, settings) == (plan, None)
    with pytest.raises(JobError, match=r"^strategy: .*averaging.*began with .*allreduce") as error:
        decided(store, Settings(Averaging()))
    assert error.value.hint


# Data that has changed


def changed(*partitions: Partition) -> DataError:
    plan = decide(wanted(), Settings(AllReduce()), {"train": TRAIN}, threads=1, device="cpu")
    check_unchanged(plan, {"train": TRAIN})
    with pytest.raises(DataError) as caught:
        check_unchanged(plan, {"train": Manifest(partitions)})
    assert "or begin a new run" in caught.value.hint
    assert "sort within partitions" in caught.value.hint
    return caught.value


def test_another_partition_is_named() -> None:
    assert changed(Partition("a", 3), Partition("c", 1200)).message == (
        "train has changed since the run began: 1,203 records in 2 partitions, 1,203 records then"
        "; b of 1,200 is now c of 1,200"
    )


def test_another_number_of_rows_is_named() -> None:
    assert changed(Partition("a", 3), Partition("b", 1201)).message.endswith(
        "; b of 1,200 is now b of 1,201"
    )


def test_more_and_fewer_partitions() -> None:
    more = changed(*TRAIN.partitions, Partition("c", 1)).message
    assert more.endswith("1,204 records in 3 partitions, 1,203 records then")
    assert changed(Partition("a", 3)).message.endswith(
        "3 records in 1 partitions, 1,203 records then"
    )


def test_partitions_that_are_whole_now_have_another_order() -> None:
    plan = decide(wanted(), Settings(AllReduce()), {"train": TRAIN}, threads=1, device="cpu")
    with pytest.raises(DataError, match="train has changed"):
        check_unchanged(plan, {"train": replace(TRAIN, whole=True)})


def test_a_source_that_the_run_did_not_have() -> None:
    plan = decide(wanted(), Settings(AllReduce()), {"train": TRAIN}, threads=1, device="cpu")
    with pytest.raises(DataError, match=r"^test has changed .*: 1,203 records .*, none then"):
        check_unchanged(plan, {"train": TRAIN, "test": TRAIN})


# Folders


def test_a_new_directory_is_nobodys(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    asked = wanted(runs=f"{runs}/")
    seen: list[Path] = []
    give_up = time.monotonic() + 5
    while not (seen and seen[-1].name.endswith("-3")):  # three within a second
        assert time.monotonic() < give_up
        seen.append(Path(new_directory(asked)))
        assert not seen[-1].exists()
        assert seen[-1].parent == runs
        assert seen[-1].name.startswith("digits-20")
        seen[-1].mkdir(parents=True)
    assert len(set(seen)) == len(seen)
    first, second, third = seen[-3:]
    assert (second.name, third.name) == (f"{first.name}-2", f"{first.name}-3")


def test_a_directory_where_there_is_no_file_system() -> None:
    url = new_directory(wanted(runs="memory://test-decisions/runs"))
    assert url.startswith("memory://test-decisions/runs/digits-20")
