"""Ranks of which some share a host, as threads: what they read, and how sums are taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from penstock.errors import TransportError
from penstock.exchange import hierarchy, tree
from penstock.exchange.mixed import MixedTransport
from penstock.exchange.operation import Operation, Turn
from penstock.exchange.peers import Peers
from penstock.exchange.reduction import Combine, Reduction, Total
from penstock.exchange.transport import ALIGNMENT_BYTES, Transport, Views, ignore

SUM = Operation("all_reduce", "sum float32")
DEADLINE_S = 20.0
ALLOCATE = Turn(1, Operation("allocate"), DEADLINE_S)
PAIRS = [[0, 1], [2, 3], [4]]
Hosts = Sequence[Sequence[int]]


def on_all(transports: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
    """What the function returned or raised for each rank, each in a thread of its own."""
    results: list[Any] = [None] * len(transports)

    def call(rank: int) -> None:
        try:
            results[rank] = function(transports[rank])
        except BaseException as error:
            results[rank] = error

    running = [threading.Thread(target=call, args=(r,), daemon=True) for r in range(len(results))]
    for thread in running:
        thread.start()
    give_up = time.monotonic() + DEADLINE_S
    for rank, thread in enumerate(running):
        thread.join(max(0.0, give_up - time.monotonic()))
        assert not thread.is_alive(), f"rank {rank} did not end"
    return results


def well(results: list[Any]) -> list[Any]:
    """Results none of which is an error."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


Group = Callable[[Hosts], list[MixedTransport]]


@pytest.fixture
def group() -> Iterator[Group]:
    """Makes the transports of ranks that are on these hosts."""
    made: list[MixedTransport] = []

    def make(hosts: Hosts) -> list[MixedTransport]:
        store = HashStore()
        store.set_timeout(timedelta(seconds=DEADLINE_S))
        world_size = sum(map(len, hosts))

        def meet(rank: int) -> MixedTransport:
            peers = Peers.meet(store, rank, world_size, address="127.0.0.1", timeout_s=DEADLINE_S)
            number = {r: n for n, ranks in enumerate(hosts) for r in ranks}
            peers.hosts = tuple(f"host-{number[other]}" for other in range(world_size))
            return MixedTransport(peers, hosts[number[rank]], hosts)

        transports = well(on_all(range(world_size), meet))
        made.extend(transports)
        return transports

    yield make
    for transport in made:
        transport.close()


def values(rank: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + length)
    if dtype.is_floating_point:
        return torch.randn(length, generator=generator).to(dtype)
    return torch.randint(-100, 100, (length,), generator=generator).to(dtype)


def body(source: int, target: int, num_bytes: int) -> torch.Tensor:
    """Bytes that differ between pairs of ranks, and have a period that no chunk has."""
    return ((torch.arange(num_bytes) * 7 + 31 * source + 5 * target) % 251).to(torch.uint8)


def heard(
    transport: Transport, parts: Views, sizes: Sequence[int], timeout_s: float = DEADLINE_S
) -> list[bytes]:
    """What one share showed of each rank; checks that it was shown as promised."""
    got = [bytearray() for _ in parts]
    stopped = 0

    def read(views: Views, start: int, stop: int) -> None:
        nonlocal stopped
        assert start == stopped < stop
        assert start % ALIGNMENT_BYTES == 0
        for rank, view in enumerate(views):
            expected = max(0, min(stop, sizes[rank]) - start)
            assert (0 if view is None else len(view)) == expected, "not all of a range at once"
            got[rank] += b"" if view is None else view.numpy().tobytes()
        stopped = stop

    transport.share(Turn(1, SUM, timeout_s), parts, sizes, read)
    return [bytes(g) for g in got]


@pytest.mark.parametrize("hosts", [PAIRS, [[0], [1, 2, 3]], [[1, 3], [0, 2]], [[0], [1]]], ids=str)
@pytest.mark.parametrize("scale", [1, 1000, 500_000])
def test_all_of_a_range_is_read_at_once_however_uneven(
    hosts: Hosts, scale: int, group: Group
) -> None:
    """Of some pairs nothing, of some more than a chunk, of near and far ones in turn."""
    transports = group(hosts)
    ranks = range(len(transports))

    def size(source: int, target: int) -> int:
        return (source * 3 + target * 5) % 4 * scale

    def call(transport: MixedTransport) -> list[list[bytes]]:
        rank = transport.rank
        parts = [body(rank, r, size(rank, r)) if size(rank, r) else None for r in ranks]
        return [heard(transport, parts, [size(r, rank) for r in ranks]) for _ in range(3)]

    for rank, shares in enumerate(well(on_all(transports, call))):
        for got in shares:
            assert got == [body(r, rank, size(r, rank)).numpy().tobytes() for r in ranks]


def test_what_is_read_may_be_overwritten(group: Group) -> None:
    """A sum over its own input: what a rank writes must be nowhere sent any more."""
    transports = group([[0, 1], [2]])
    length = 1_000_003

    def call(transport: MixedTransport) -> torch.Tensor:
        tensor = body(transport.rank, 0, length)

        def read(views: Views, start: int, stop: int) -> None:
            total = sum(view.to(torch.int64) for view in views if view is not None)
            assert isinstance(total, torch.Tensor)
            tensor[start:stop] = total % 251

        for _ in range(3):
            transport.share(Turn(1, SUM, DEADLINE_S), [tensor] * 3, [length] * 3, read)
        return tensor

    alone = sum(body(rank, 0, length).to(torch.int64) for rank in range(3)) * 9 % 251
    for tensor in well(on_all(transports, call)):
        assert torch.equal(tensor.to(torch.int64), alone)


def all_reduced(
    transports: Sequence[MixedTransport],
    parts: Sequence[torch.Tensor],
    combine: Combine,
    *,
    inputs_stay: bool = False,
) -> list[torch.Tensor | None]:
    """By rank, the result of a hierarchical all-reduce; None where there is none."""

    def call(transport: MixedTransport) -> torch.Tensor | None:
        source = parts[transport.rank].clone()
        out = torch.empty_like(source) if inputs_stay else source
        did = hierarchy.all_reduce(transport, Turn(1, SUM, DEADLINE_S), source, out, combine)
        assert not inputs_stay or torch.equal(source, parts[transport.rank])
        return out if did else None

    return well(on_all(transports, call))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are many, in all stages at once."""
    monkeypatch.setattr(hierarchy, "LEAST_BYTES", 1)
    monkeypatch.setattr(hierarchy, "PIECE_BYTES", 64 << 10)


HIERARCHIES = [PAIRS, [[0, 1], [2, 3]], [[0, 1, 2, 3], [4]], [[0], [1], [2]]]


@pytest.mark.parametrize("hosts", HIERARCHIES, ids=str)
@pytest.mark.parametrize("length", [1, 1009, 300_007])
def test_a_sum_over_shards_has_the_bits_of_one_host(
    hosts: Hosts, length: int, group: Group, small_pieces: None
) -> None:
    transports = group(hosts)
    parts = [values(rank, length) for rank in range(len(transports))]
    total = Total([(rank, rank + 1) for rank in range(len(parts))], len(parts))
    expected = tree.tree_sum(parts)
    for stay in (False, True):
        for got in all_reduced(transports, parts, total, inputs_stay=stay):
            assert got is not None
            assert torch.equal(got.view(torch.int32), expected.view(torch.int32))
    if length > 1000 and len(parts) > 2 and hosts != [[0], [1], [2]]:
        in_a_row = torch.stack(parts[::-1]).cumsum(0)[-1]
        assert not torch.equal(in_a_row, expected), "other orders give the same bits here"


def test_uneven_subtrees_of_shards(group: Group, small_pieces: None) -> None:
    """Rank 0 has summed four shards, ranks 1 and 2, on one host, two each."""
    transports = group([[0], [1, 2]])
    shards = [values(s, 5003) for s in range(8)]
    covers = [(0, 4), (4, 6), (6, 8)]
    parts = [tree.tree_sum(shards[low:high]) for low, high in covers]
    for got in all_reduced(transports, parts, Total(covers, 8)):
        assert got is not None
        assert torch.equal(got, tree.tree_sum(shards))


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        ("avg", torch.float32),
        ("min", torch.bfloat16),
        ("product", torch.int32),
        ("bxor", torch.int64),
    ],
)
def test_other_reductions_have_the_bits_of_one_host(
    op: str, dtype: torch.dtype, group: Group, small_pieces: None
) -> None:
    transports = group(PAIRS)
    parts = [values(rank, 30_011, dtype) for rank in range(5)]
    expected = torch.empty_like(parts[0])
    Reduction(op).combine(parts, expected)
    for got in all_reduced(transports, parts, Reduction(op)):
        assert got is not None
        assert torch.equal(got, expected)


def test_what_would_have_other_bits_is_left_to_the_direct_way(
    group: Group, small_pieces: None
) -> None:
    crossed = group([[0, 2], [1, 3]])
    parts = [values(rank, 1009) for rank in range(4)]
    total = Total([(rank, rank + 1) for rank in range(4)], 4)
    assert all_reduced(crossed, parts, total) == [None] * 4, "0 and 2 are no subtree"
    halves = [part.to(torch.bfloat16) for part in parts]
    assert all_reduced(crossed, halves, Reduction()) == [None] * 4
    smallest = torch.stack(parts).amin(0)
    for got in all_reduced(crossed, parts, Reduction("min")):  # has no order
        assert got is not None
        assert torch.equal(got, smallest)


def test_each_byte_leaves_a_host_once(
    group: Group, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    """2 (h - 1) / h of the tensor, however many ranks a host has."""
    transports = group([[0, 1], [2, 3]])
    sent = [0] * 4
    for transport in transports:
        flow = transport.far.flow

        def counting(*args: Any, rank: int = transport.rank, flow: Any = flow) -> Any:
            sent[rank] += sum(len(p) for r, p in enumerate(args[1]) if p is not None and r != rank)
            return flow(*args)

        monkeypatch.setattr(transport.far, "flow", counting)
    parts = [values(rank, 100_000) for rank in range(4)]
    all_reduced(transports, parts, Reduction())
    num_bytes = parts[0].nbytes
    assert sent[0] + sent[1] == sent[2] + sent[3] == num_bytes
    assert max(sent) < 0.51 * num_bytes, "one rank does all the sending"


def test_memory_is_shared_within_each_host(group: Group) -> None:
    transports = group([[0, 1], [2]])

    def call(transport: MixedTransport) -> bool:
        memory = transport.allocate(4_000_000, ALLOCATE)
        assert memory is not None
        assert transport.holds(memory)
        assert not transport.holds(torch.zeros(4_000_000, dtype=torch.uint8))
        tensor = memory.view(torch.float32)
        tensor.copy_(values(transport.rank, 1_000_000))
        turn = Turn(2, SUM, DEADLINE_S)
        did = hierarchy.all_reduce(transport, turn, tensor, tensor, Reduction())
        return did and torch.equal(tensor, tree.tree_sum([values(r, 1_000_000) for r in range(3)]))

    assert well(on_all(transports, call)) == [True] * 3


def test_where_one_host_has_no_memory_none_has(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    transports = group([[0, 1], [2]])
    monkeypatch.setattr(transports[2].near, "allocate", lambda *_: None)
    found = on_all(transports, lambda t: t.allocate(100, ALLOCATE))
    assert found == [None] * 3


def shares_4(transport: MixedTransport, operation: Operation, timeout_s: float = 2.0) -> str:
    part = torch.zeros(4, dtype=torch.uint8)
    world_size = transport.world_size
    turn = Turn(7, operation, timeout_s)
    with pytest.raises(TransportError) as caught:
        transport.share(turn, [part] * world_size, [4] * world_size, ignore)
    return str(caught.value)


@pytest.mark.parametrize("absent", [1, 2])
def test_who_does_not_come_is_named_near_and_far(absent: int, group: Group) -> None:
    transports = group([[0, 1], [2, 3]])
    began = time.monotonic()
    told = on_all(transports, lambda t: None if t.rank == absent else shares_4(t, SUM))
    for rank, text in enumerate(told):
        if rank != absent:
            assert f"rank {absent} (on host-{absent // 2})" in text
            assert text.count("(on host-") == 1, text
            assert "all_reduce of sum float32, number 7" in text
    assert 1.5 < time.monotonic() - began < 5.0


@pytest.mark.parametrize("other", [1, 2, 3])
def test_another_operation_is_named_by_global_ranks(other: int, group: Group) -> None:
    transports = group([[0, 1], [2, 3]])
    barrier = Operation("barrier", "")
    told = on_all(transports, lambda t: shares_4(t, barrier if t.rank == other else SUM))
    for text in told:
        assert "number 7 differs between ranks: " in text
        assert f"rank {other} (host-{other // 2}) is at barrier" in text
        assert "is at all_reduce of sum float32" in text


def test_what_differs_in_memory_is_named_by_global_ranks(group: Group) -> None:
    transports = group([[0, 1], [2, 3]])
    part = torch.zeros(4, dtype=torch.uint8)

    def call(transport: MixedTransport) -> None:
        operation = Operation("barrier", "") if transport.rank == 3 else SUM
        transport.near.share(Turn(7, operation, 2.0), [part] * 2, [4] * 2, ignore)

    for error in on_all(transports, call)[2:]:
        assert "rank 2 (host-1) is at all_reduce of sum float32; rank 3 (host-1) is" in str(error)


def test_an_abort_releases_near_and_far(group: Group) -> None:
    transports = group([[0, 1], [2, 3]])

    def call(transport: MixedTransport) -> tuple[str, float]:
        if transport.rank == 3:
            time.sleep(0.5)
            transport.abort("enough")
        text = shares_4(transport, SUM, DEADLINE_S)
        return text, time.monotonic()

    began = time.monotonic()
    for text, ended in well(on_all(transports, call)):
        assert "the group was aborted: enough" in text
        assert ended - began < 0.7
