"""Shared memory between ranks: what is asked of it beside what all transports promise. Ranks are
threads here, with memory and sockets as between processes."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock.exchange import shm
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.exchange.shm import NoMemory

pytestmark = pytest.mark.usefixtures("deadline")


def run(world_size: int, function: Callable[[Communicator], Any]) -> list[Any]:
    """Calls a function with each rank of a group."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []

    def call(rank: int) -> None:
        try:
            group = connect(store, rank, world_size, timeout_s=20.0, address="127.0.0.1")
            try:
                results[rank] = function(group)
                group.barrier()
            finally:
                group.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(r,), name=str(r)) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    if failures:
        raise failures[0]
    return results


def through(group: Communicator) -> str:
    tensor = torch.ones(5)
    group.all_reduce(tensor, sync=True)
    assert tensor.tolist() == [group.world_size] * 5
    return group.through


def segments() -> list[str]:
    return [name for name in os.listdir(shm.FOLDER) if name.startswith("penstock-")]


def test_ranks_of_one_machine_meet_in_memory() -> None:
    assert run(3, through) == ["memory"] * 3


@pytest.fixture
def rank_1_has_none(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rank 1 cannot have a segment as large as this, or larger; the list's one number."""
    create, limit = shm._create, [1 << 62]

    def scarce(num_bytes: int) -> Any:
        if threading.current_thread().name == "1" and num_bytes >= limit[0]:
            raise NoMemory("none is left")
        return create(num_bytes)

    monkeypatch.setattr(shm, "_create", scarce)
    return limit


@pytest.mark.parametrize("limit", [1, 1000], ids=["none at all", "not enough"])
def test_without_memory_all_ranks_take_tcp(limit: int, rank_1_has_none: list[int]) -> None:
    rank_1_has_none[0] = limit
    before = set(segments())
    assert run(3, through) == ["tcp"] * 3
    assert set(segments()) <= before


def allocate(group: Communicator) -> tuple[bool, float]:
    memory = group.allocate(40 << 20)
    tensor = memory.view(torch.float32)
    assert tensor.count_nonzero() == 0
    tensor.fill_(group.rank)
    group.all_reduce(tensor, sync=True)
    return group._transport.holds(tensor), tensor.max().item()


def test_memory_that_one_rank_cannot_have_is_ordinary_on_all(rank_1_has_none: list[int]) -> None:
    assert run(2, allocate) == [(True, 1.0)] * 2
    rank_1_has_none[0] = 30 << 20
    assert run(2, allocate) == [(False, 1.0)] * 2


def sleep_and_wake(group: Communicator) -> float:
    """Seconds that a rank which sleeps takes to hear of one that comes late."""
    worst = 0.0
    for _ in range(5):
        if group.rank == 1:
            time.sleep(0.05)
        now = torch.tensor([time.monotonic() if group.rank == 1 else 0.0], dtype=torch.float64)
        group.all_reduce(now, sync=True)
        worst = max(worst, time.monotonic() - now.item())
    return worst


def test_who_sleeps_is_woken() -> None:
    assert max(run(2, sleep_and_wake)) < 0.5


def test_a_wake_that_is_lost_costs_a_nap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "_FUTEX_WAKE", 99)  # which the kernel refuses
    assert max(run(2, sleep_and_wake)) < 0.5


def anything(group: Communicator) -> None:
    """Many collectives of all sizes at random paces: a slot written too early would be seen."""
    everyone, rank = range(group.world_size), group.rank
    pace, plan = random.Random(rank), random.Random(7)
    allocated = group.allocate(12 << 20).view(torch.float32)
    for number in range(150):
        if pace.random() < 0.1:
            time.sleep(pace.random() * 0.003)
        length = plan.choice([1, 3, 1000, 70_000, 262_144, 262_145, 700_000])
        kind = plan.randrange(4)
        if kind == 0:
            tensor = allocated[:length] if plan.random() < 0.5 else torch.empty(length)
            tensor.fill_(float(rank + number))
            group.all_reduce(tensor, sync=True)
            expected = sum(everyone) + group.world_size * number
            assert tensor[0] == tensor[-1] == expected
            assert (tensor == expected).all()
        elif kind == 1:
            root = plan.randrange(group.world_size)
            tensor = torch.full((length,), float(rank * 1000 + number))
            group.broadcast(tensor, root, sync=True)
            assert (tensor == root * 1000 + number).all()
        elif kind == 2:
            gathered = torch.zeros(group.world_size, length)
            group.all_gather(gathered, torch.full((length,), float(rank + number)), sync=True)
            for other in everyone:
                assert (gathered[other] == other + number).all()
        else:
            outputs = [torch.zeros(length + other) for other in everyone]
            inputs = [torch.full((length + rank,), float(10 * rank + to)) for to in everyone]
            group.exchange(outputs, inputs, sync=True)
            for other in everyone:
                assert (outputs[other] == 10 * other + rank).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_nothing_is_overwritten_before_it_is_read(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "_KNOWN", 4)  # the table of known rounds overflows, too
    run(world_size, anything)


def test_the_test_above_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(self: shm.ShmTransport, wait: object) -> None:
        self._round += 1
        self._posted[self.rank][0] = self._round

    monkeypatch.setattr(shm.ShmTransport, "_post", hasty)
    with pytest.raises(BaseException, match=r"."):
        run(2, anything)
