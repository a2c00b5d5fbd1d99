"""What every group promises (`penstock.exchange.group.Group`)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from penstock.errors import TransportError
from penstock.exchange.group import Group
from penstock.testing.group import GONE, in_processes, in_threads

pytestmark = pytest.mark.usefixtures("deadline", "nothing_left")

Run = Callable[..., list[Any]]

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]
LENGTHS = [0, 1, 7, 100_000]
WORLD_SIZES = [1, 2, 3, 4]


@pytest.fixture(params=[in_threads, in_processes], ids=["loopback", "gloo"])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = request.param
    return found


def values(rank: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that differ between ranks and between elements."""
    count = torch.arange(torch.Size(shape).numel()) * 7 + 31 * rank + 1
    return (count % 3 == 0 if dtype == torch.bool else count % 101).to(dtype).view(shape)


def all_gather(group: Group) -> None:
    for dtype in DTYPES:
        for length in LENGTHS:
            output = torch.zeros(group.world_size, length, dtype=dtype)
            input = values(group.rank, length, dtype=dtype)
            group.all_gather(output, input).wait()
            for rank in range(group.world_size):
                assert torch.equal(output[rank], values(rank, length, dtype=dtype))


def all_to_all(group: Group) -> None:
    world_size = group.world_size
    for dtype in DTYPES:
        for length in LENGTHS:
            output = torch.zeros(world_size, length, dtype=dtype)
            input = values(group.rank, world_size, length, dtype=dtype)
            group.all_to_all(output, input).wait()
            for rank in range(world_size):
                theirs = values(rank, world_size, length, dtype=dtype)
                assert torch.equal(output[rank], theirs[group.rank])


def broadcast(group: Group) -> None:
    for dtype in DTYPES:
        for length in LENGTHS:
            for root in range(group.world_size):
                tensor = values(group.rank, length, dtype=dtype)
                group.broadcast(tensor, root).wait()
                assert torch.equal(tensor, values(root, length, dtype=dtype))
    number = torch.tensor(group.rank + 5)  # no dim at all, as counters in buffers have
    group.broadcast(number, 0).wait()
    assert number.item() == 5


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("collective", [all_gather, all_to_all, broadcast])
def test_what_was_given_arrives(
    collective: Callable[[Group], None], world_size: int, run: Run
) -> None:
    assert run(world_size, collective) == [None] * world_size


def ranks(group: Group) -> tuple[int, int]:
    group.barrier()  # gloo: one that ends at once breaks the others' joining
    return group.rank, group.world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_count_from_0(world_size: int, run: Run) -> None:
    assert run(world_size, ranks) == [(rank, world_size) for rank in range(world_size)]


def come_late(group: Group) -> tuple[float, float]:
    time.sleep(0.1 * group.rank)
    came = time.monotonic()
    group.barrier()
    return came, time.monotonic()


@pytest.mark.parametrize("world_size", [1, 3])
def test_nobody_passes_a_barrier_before_the_last_has_come(world_size: int, run: Run) -> None:
    times = run(world_size, come_late)
    assert min(went for _, went in times) >= max(came for came, _ in times)


def many_at_once(group: Group) -> None:
    world_size, rank, dtype = group.world_size, group.rank, torch.float32
    rounds = 12
    started = []
    for n in range(rounds):
        length = 1 + 3000 * n
        gathered = torch.zeros(world_size, length)
        first = group.all_gather(gathered, values(rank + n, length, dtype=dtype))
        exchanged = torch.zeros(world_size, length)
        second = group.all_to_all(exchanged, values(rank - n, world_size, length, dtype=dtype))
        sent = values(rank, length, dtype=dtype)
        third = group.broadcast(sent, n % world_size)
        started.append((length, gathered, exchanged, sent, first, second, third))
    for n, (length, gathered, exchanged, sent, *works) in enumerate(started):
        for work in works:
            work.wait()
        for other in range(world_size):
            assert torch.equal(gathered[other], values(other + n, length, dtype=dtype))
            theirs = values(other - n, world_size, length, dtype=dtype)
            assert torch.equal(exchanged[other], theirs[rank])
        assert torch.equal(sent, values(n % world_size, length, dtype=dtype))
    group.barrier()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_several_are_under_way_at_once(world_size: int, run: Run) -> None:
    assert run(world_size, many_at_once) == [None] * world_size


def collectives(group: Group) -> dict[str, Callable[[], object]]:
    """Each collective, waited for."""
    both = [torch.zeros(group.world_size, 1000), torch.zeros(group.world_size, 1000)]
    return {
        "all_gather": lambda: group.all_gather(both[0], both[1][0]).wait(),
        "all_to_all": lambda: group.all_to_all(*both).wait(),
        "broadcast": lambda: group.broadcast(both[0], 1).wait(),
        "barrier": group.barrier,
    }


def without_rank_1(group: Group, name: str, how: str) -> str | None:
    """What the others are told when rank 1 takes no part in a collective."""
    group.barrier()
    if group.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "leaves":
            group.close()
        else:
            time.sleep(8)
        return None
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        collectives(group)[name]()
    assert time.monotonic() - began < 15
    group.close()  # waits for nobody
    return str(caught.value)


@pytest.mark.parametrize("name", ["all_gather", "all_to_all", "broadcast", "barrier"])
def test_a_rank_that_leaves_is_an_error_for_the_others(name: str, run: Run) -> None:
    told = run(3, partial(without_rank_1, name=name, how="leaves"))
    assert told[1] is None
    for rank in (0, 2):
        assert name in told[rank]
        # gloo knows that a connection is gone, and not whose it was
        assert ("rank 1 left" if run is in_threads else f"rank {rank}: ") in told[rank]


def test_a_rank_that_is_killed_is_an_error_for_the_others() -> None:
    told = in_processes(3, partial(without_rank_1, name="all_gather", how="killed"))
    assert told[1] is GONE
    assert all("all_gather" in told[rank] for rank in (0, 2))


def test_a_rank_that_is_late_is_an_error_for_the_others(run: Run) -> None:
    told = run(2, partial(without_rank_1, name="all_gather", how="sleeps"), timeout_s=4.0)
    assert "all_gather" in told[0]
    if run is in_threads:
        assert "4.0 s passed; missing ranks [1]" in told[0]


def in_another_order(group: Group) -> str:
    names = list(collectives(group))
    with pytest.raises(TransportError) as caught:
        collectives(group)[names[group.rank]]()
    return str(caught.value)


def test_loopback_tells_when_ranks_disagree_on_what_comes_next() -> None:
    for told in in_threads(2, in_another_order):
        assert told == "collective number 0 differs between ranks: ['all_gather', 'all_to_all']"


def raises(group: Group) -> None:
    group.barrier()  # gloo: one that ends at once breaks the others' joining
    raise ValueError(f"rank {group.rank}")


def test_a_failing_rank_fails_the_test(run: Run) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 raised:.*ValueError: rank 0") as caught:
        run(2, raises)
    assert "Traceback" in str(caught.value)
