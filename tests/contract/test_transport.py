"""What every transport promises (`penstock.exchange.transport.Transport`)."""

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
from penstock.exchange.transport import Transport
from penstock.testing.group import GONE, in_processes, in_threads

pytestmark = pytest.mark.usefixtures("deadline", "nothing_left")

Group = Callable[..., list[Any]]

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
def group(request: pytest.FixtureRequest) -> Group:
    found: Group = request.param
    return found


def values(rank: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that differ between ranks and between elements."""
    count = torch.arange(torch.Size(shape).numel()) * 7 + 31 * rank + 1
    return (count % 3 == 0 if dtype == torch.bool else count % 101).to(dtype).view(shape)


def all_gather(transport: Transport) -> None:
    for dtype in DTYPES:
        for length in LENGTHS:
            output = torch.zeros(transport.world_size, length, dtype=dtype)
            input = values(transport.rank, length, dtype=dtype)
            transport.all_gather(output, input).wait()
            for rank in range(transport.world_size):
                assert torch.equal(output[rank], values(rank, length, dtype=dtype))


def all_to_all(transport: Transport) -> None:
    world_size = transport.world_size
    for dtype in DTYPES:
        for length in LENGTHS:
            output = torch.zeros(world_size, length, dtype=dtype)
            input = values(transport.rank, world_size, length, dtype=dtype)
            transport.all_to_all(output, input).wait()
            for rank in range(world_size):
                theirs = values(rank, world_size, length, dtype=dtype)
                assert torch.equal(output[rank], theirs[transport.rank])


def broadcast(transport: Transport) -> None:
    for dtype in DTYPES:
        for length in LENGTHS:
            for root in range(transport.world_size):
                tensor = values(transport.rank, length, dtype=dtype)
                transport.broadcast(tensor, root).wait()
                assert torch.equal(tensor, values(root, length, dtype=dtype))
    number = torch.tensor(transport.rank + 5)  # no dim at all, as counters in buffers have
    transport.broadcast(number, 0).wait()
    assert number.item() == 5


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("collective", [all_gather, all_to_all, broadcast])
def test_what_was_given_arrives(
    collective: Callable[[Transport], None], world_size: int, group: Group
) -> None:
    assert group(world_size, collective) == [None] * world_size


def ranks(transport: Transport) -> tuple[int, int]:
    transport.barrier()  # gloo: one that ends at once breaks the others' joining
    return transport.rank, transport.world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_count_from_0(world_size: int, group: Group) -> None:
    assert group(world_size, ranks) == [(rank, world_size) for rank in range(world_size)]


def come_late(transport: Transport) -> tuple[float, float]:
    time.sleep(0.1 * transport.rank)
    came = time.monotonic()
    transport.barrier()
    return came, time.monotonic()


@pytest.mark.parametrize("world_size", [1, 3])
def test_nobody_passes_a_barrier_before_the_last_has_come(world_size: int, group: Group) -> None:
    times = group(world_size, come_late)
    assert min(went for _, went in times) >= max(came for came, _ in times)


def many_at_once(transport: Transport) -> None:
    world_size, rank, dtype = transport.world_size, transport.rank, torch.float32
    rounds = 12
    started = []
    for n in range(rounds):
        length = 1 + 3000 * n
        gathered = torch.zeros(world_size, length)
        first = transport.all_gather(gathered, values(rank + n, length, dtype=dtype))
        exchanged = torch.zeros(world_size, length)
        second = transport.all_to_all(exchanged, values(rank - n, world_size, length, dtype=dtype))
        sent = values(rank, length, dtype=dtype)
        third = transport.broadcast(sent, n % world_size)
        started.append((length, gathered, exchanged, sent, first, second, third))
    for n, (length, gathered, exchanged, sent, *works) in enumerate(started):
        for work in works:
            work.wait()
        for other in range(world_size):
            assert torch.equal(gathered[other], values(other + n, length, dtype=dtype))
            theirs = values(other - n, world_size, length, dtype=dtype)
            assert torch.equal(exchanged[other], theirs[rank])
        assert torch.equal(sent, values(n % world_size, length, dtype=dtype))
    transport.barrier()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_several_are_under_way_at_once(world_size: int, group: Group) -> None:
    assert group(world_size, many_at_once) == [None] * world_size


def collectives(transport: Transport) -> dict[str, Callable[[], object]]:
    """Each collective, waited for."""
    both = [torch.zeros(transport.world_size, 1000), torch.zeros(transport.world_size, 1000)]
    return {
        "all_gather": lambda: transport.all_gather(both[0], both[1][0]).wait(),
        "all_to_all": lambda: transport.all_to_all(*both).wait(),
        "broadcast": lambda: transport.broadcast(both[0], 1).wait(),
        "barrier": transport.barrier,
    }


def without_rank_1(transport: Transport, name: str, how: str) -> str | None:
    """What the others are told when rank 1 takes no part in a collective."""
    transport.barrier()
    if transport.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "leaves":
            transport.close()
        else:
            time.sleep(8)
        return None
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        collectives(transport)[name]()
    assert time.monotonic() - began < 15
    transport.close()  # waits for nobody
    return str(caught.value)


@pytest.mark.parametrize("name", ["all_gather", "all_to_all", "broadcast", "barrier"])
def test_a_rank_that_leaves_is_an_error_for_the_others(name: str, group: Group) -> None:
    told = group(3, partial(without_rank_1, name=name, how="leaves"))
    assert told[1] is None
    for rank in (0, 2):
        assert name in told[rank]
        # gloo knows that a connection is gone, and not whose it was
        assert ("rank 1 left" if group is in_threads else f"rank {rank}: ") in told[rank]


def test_a_rank_that_is_killed_is_an_error_for_the_others() -> None:
    told = in_processes(3, partial(without_rank_1, name="all_gather", how="killed"))
    assert told[1] is GONE
    assert all("all_gather" in told[rank] for rank in (0, 2))


def test_a_rank_that_is_late_is_an_error_for_the_others(group: Group) -> None:
    told = group(2, partial(without_rank_1, name="all_gather", how="sleeps"), timeout_s=4.0)
    assert "all_gather" in told[0]
    if group is in_threads:
        assert "4.0 s passed; missing ranks [1]" in told[0]


def in_another_order(transport: Transport) -> str:
    names = list(collectives(transport))
    with pytest.raises(TransportError) as caught:
        collectives(transport)[names[transport.rank]]()
    return str(caught.value)


def test_loopback_tells_when_ranks_disagree_on_what_comes_next() -> None:
    for told in in_threads(2, in_another_order):
        assert told == "collective number 0 differs between ranks: ['all_gather', 'all_to_all']"


def raises(transport: Transport) -> None:
    transport.barrier()  # gloo: one that ends at once breaks the others' joining
    raise ValueError(f"rank {transport.rank}")


def test_a_failing_rank_fails_the_test(group: Group) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 raised:.*ValueError: rank 0") as caught:
        group(2, raises)
    assert "Traceback" in str(caught.value)
