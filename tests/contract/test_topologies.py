"""Every topology of every collective between real ranks, in threads and over TCP.

A table that knows one topology makes a group take it. Results are compared with what all ranks'
parts give at once: bit for bit, where the topology keeps the fixed tree's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from penstock.exchange.communicator import Communicator
from penstock.exchange.cost import ADDING, Link, Links, Row, Table, candidates
from penstock.exchange.network import Network
from penstock.exchange.pattern import HIERARCHICAL, TOPOLOGIES, Hosts
from penstock.exchange.reduction import Reduction, Total
from penstock.exchange.topology import at_once, exact
from penstock.testing.group import in_processes, in_threads

pytestmark = pytest.mark.usefixtures("deadline", "nothing_left")

SMALL = [0, 7, 1009]
LARGE = 300_007
"""Chunks are empty, shorter than a line, of odd ends, and larger than a transport's own pieces."""
FLOATS = [torch.float32, torch.complex64]
CASES = [
    *((length, dtype) for length in SMALL for dtype in (*FLOATS, torch.int64, torch.uint8)),
    (LARGE, torch.float32),
]
MOVED = [(0, torch.bool), (7, torch.complex128), (1009, torch.int16), (LARGE, torch.float32)]

RUNS: dict[str, Callable[..., list[Any]]] = {
    "loopback": in_threads,
    "tcp": partial(in_processes, through="tcp"),
}


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    return RUNS[request.param]


def only(group: Communicator, collective: str, topology: str, hosts: Hosts = ()) -> None:
    """Makes a group take one topology of a collective, whatever is asked of sums."""
    hosts = hosts or tuple((rank,) for rank in range(group.world_size))
    link = Link(1e-4, 1e9)
    rows = {
        name: dict.fromkeys(("any", "exact", "once"), (Row(None, names[0]),))
        for name, names in TOPOLOGIES.items()
    }
    rows[collective] = dict.fromkeys(("any", "exact", "once"), (Row(None, topology),))
    names = tuple(group.hosts)
    table = Table(hosts, rows)  # type: ignore[arg-type]
    group.network = Network(names, Links(hosts, link, link, 1e9), table)


def values(rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(31 * rank + length)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(length, dtype=dtype, generator=generator)
    return torch.randint(0, 50, (length,), generator=generator).to(dtype)


def at_one_place(parts: list[torch.Tensor], reduction: Reduction | Total) -> torch.Tensor:
    out = torch.empty_like(parts[0])
    reduction.combine(parts, out)
    return out


def alike(got: torch.Tensor, wanted: torch.Tensor, bitwise: bool) -> None:
    if bitwise:
        assert torch.equal(got, wanted)
    else:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def named(world_size: int) -> Iterator[tuple[str, str, Hosts]]:
    """All topologies of this many ranks, and those of ranks on hosts."""
    for collective, names in TOPOLOGIES.items():
        for name in names:
            yield collective, name, ()
    if world_size > 2:
        hosts = tuple(
            tuple(range(low, min(low + 2, world_size))) for low in range(0, world_size, 2)
        )
        for name in candidates(hosts, "all_reduce"):
            if name.startswith(HIERARCHICAL):
                yield "all_reduce", name, hosts


def reduces(group: Communicator) -> int:
    """Checks all that reduce; returns how many it tried."""
    rank, p, tried = group.rank, group.world_size, 0
    for collective, topology, hosts in named(p):
        only(group, collective, topology, hosts)
        for number, (length, dtype) in enumerate(CASES if collective in ADDING else ()):
            bitwise = dtype not in FLOATS or exact(collective, topology, p, hosts)
            ops = ("sum", "avg") if dtype in FLOATS else ("max", "bxor", "product")
            reduction = Reduction(ops[number % len(ops)])
            parts = [values(r, length, dtype) for r in range(p)]
            own = parts[rank].clone()
            if collective == "all_reduce":
                group.all_reduce(own, reduction, sync=True)
                alike(own, at_one_place(parts, reduction), bitwise)
            elif collective == "reduce":
                root = number % p
                group.reduce(own, reduction, root, sync=True)
                wanted = at_one_place(parts, reduction) if rank == root else parts[rank]
                alike(own, wanted, bitwise)
            else:
                lengths = [length + 3 * r for r in range(p)]
                given = [
                    [values(10 * r + q, lengths[q], dtype) for q in range(p)] for r in range(p)
                ]
                kept = [tensor.clone() for tensor in given[rank]]
                out = torch.empty(lengths[rank], dtype=dtype)
                group.reduce_scatter(out, given[rank], reduction, sync=True)
                alike(out, at_one_place([row[rank] for row in given], reduction), bitwise)
                assert all(map(torch.equal, kept, given[rank])), "what is given stays as it is"
            tried += 1
    return tried


def moves(group: Communicator) -> int:
    """Checks all that only move."""
    rank, p, tried = group.rank, group.world_size, 0
    for collective, topology, _ in named(p):
        only(group, collective, topology)
        for length, dtype in MOVED if collective in ("broadcast", "all_gather") else ():
            if collective == "broadcast":
                for root in range(p):
                    own = values(rank, length, dtype)
                    group.broadcast(own, root, sync=True)
                    assert torch.equal(own, values(root, length, dtype))
            else:
                lengths = [length + 3 * r for r in range(p)]
                outputs = [torch.empty(n, dtype=dtype) for n in lengths]
                group.gather_all(outputs, values(rank, lengths[rank], dtype), sync=True)
                for r, output in enumerate(outputs):
                    assert torch.equal(output, values(r, lengths[r], dtype))
            tried += 1
    return tried


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_topology_reduces(world_size: int, run: Callable[..., list[Any]]) -> None:
    hierarchical = 6 if world_size > 2 else 0
    names = sum(len(TOPOLOGIES[collective]) for collective in ADDING) + hierarchical
    assert run(world_size, reduces) == [names * len(CASES)] * world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_topology_moves(world_size: int, run: Callable[..., list[Any]]) -> None:
    assert run(world_size, moves) == [6 * len(MOVED)] * world_size


def halves(group: Communicator) -> dict[str, list[bytes]]:
    """Half precision, and sums over shards, through all topologies that may carry them."""
    rank, p, found = group.rank, group.world_size, dict[str, list[bytes]]()
    total = Total([(r, r + 1) for r in range(p)], p)
    for topology in TOPOLOGIES["all_reduce"]:
        if at_once(topology, p):
            only(group, "all_reduce", topology)
            for dtype, reduction in (
                (torch.bfloat16, Reduction("avg")),
                (torch.float16, Reduction("sum")),
                (torch.float32, total),
            ):
                parts = [values(r, 1009, dtype) for r in range(p)]
                own = parts[rank].clone()
                group.all_reduce(own, reduction, sync=True)
                alike(own, at_one_place(parts, reduction), True)
                bits = own.view(torch.uint8).numpy().tobytes()
                found.setdefault(f"{dtype} {reduction.op}", []).append(bits)
    return found


@pytest.mark.parametrize("world_size", [2, 5])
def test_what_is_rounded_once_has_the_same_bits_through_all_that_may_carry_it(
    world_size: int, run: Callable[..., list[Any]]
) -> None:
    results = run(world_size, halves)
    assert all(result == results[0] for result in results)
    for bits in results[0].values():
        assert len(bits) == (3 if world_size > 2 else 6)
        assert len(set(bits)) == 1


def ring_and_tree(group: Communicator) -> list[bytes]:
    found = []
    for topology in ("ring", "tree"):
        only(group, "all_reduce", topology)
        own = values(group.rank, 1009, torch.float32)
        group.all_reduce(own, sync=True)
        found.append(own.numpy().tobytes())
    return found


def test_the_ring_adds_in_another_order_which_these_tests_would_notice() -> None:
    results = in_threads(5, ring_and_tree)
    assert results[0][0] != results[0][1]
    assert all(result == results[0] for result in results), "the same bits on all ranks"
