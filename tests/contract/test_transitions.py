"""Every way between layouts: right to the bit, on all ranks, with the bytes that theory gives.

Tensors hold whole numbers, of which sums are exact in any order. Partial ones are random terms.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from penstock.errors import PlanError
from penstock.exchange import loopback
from penstock.exchange.cost import Link, Links, simulate
from penstock.model.graph import Graph, Input, Output, Spec
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.costs.routes import Hop, Routes, plain
from penstock.plan.layout import (
    B,
    Layout,
    P,
    Placement,
    S,
    everyone,
    in_words,
    join,
    part,
    possible,
    split,
)
from penstock.plan.programs.groups import in_this_process
from penstock.plan.programs.interpret import interpret
from penstock.plan.programs.lower import lower
from penstock.plan.programs.moves import exchange_hop, local_hop
from penstock.plan.programs.program import Exchange, Program
from penstock.plan.programs.verify import verify

pytestmark = pytest.mark.usefixtures("deadline")

DEVICE = Device("of a test", {"float32": 1e11}, 1e14, 1 << 34, 0.0)
"""Whose memory is so fast that a way is never longer to spare copies."""
LINK = Link(latency_s=2e-5, bytes_per_s=4e9, message_s=2e-6)
MESHES = [(2,), (3,), (4,), (2, 2), (2, 3), (3, 1)]


def routes(sizes: Sequence[int]) -> Routes:
    return Routes(Cluster(1, math.prod(sizes), DEVICE, LINK, LINK), sizes)


def layouts(
    shape: Sequence[int], sizes: Sequence[int], placements: Sequence[Placement]
) -> list[Layout]:
    """All layouts of these placements in which a tensor can lie, each under one name."""
    every = itertools.product(placements, repeat=len(sizes))
    fitting = [layout for layout in every if possible(shape, layout, sizes)]
    return list(dict.fromkeys(plain(shape, layout, sizes) for layout in fitting))


def scatter(whole: torch.Tensor, layout: Layout, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Parts for all ranks; where it is partial, of random terms whose sum it is."""
    partial = [n if p == P else 1 for p, n in zip(layout, sizes, strict=True)]
    terms = {at: torch.randint_like(whole, 9) for at in everyone(partial)}
    first = (0,) * len(sizes)
    terms[first] = whole - sum(term for at, term in terms.items() if at != first)
    split_only = tuple(B if p == P else p for p in layout)
    return [
        split(
            terms[tuple(c if p == P else 0 for p, c in zip(layout, at, strict=True))],
            split_only,
            sizes,
            at,
        )
        for at in everyone(sizes)
    ]


def programs_of(
    ways: Sequence[tuple[Layout, Layout]], spec: Spec, sizes: tuple[int, ...]
) -> tuple[Program, ...]:
    """Programs that bring an input `x0`, `x1`, ... each from one layout to another."""
    names = [f"x{number}" for number in range(len(ways))]
    graph = Graph(
        inputs=tuple(Input(name, "data", name) for name in names),
        nodes=(),
        outputs=tuple(Output("output", name, name) for name in names),
        specs=dict.fromkeys(names, spec),
    )
    sources = {name: way[0] for name, way in zip(names, ways, strict=True)}
    targets = {name: way[1] for name, way in zip(names, ways, strict=True)}
    assignment = Assignment(sizes, sources, {}, targets)
    programs = lower(graph, assignment, routes(sizes))
    verify(programs, graph, assignment)
    return programs


def run(
    programs: Sequence[Program], inputs: Sequence[dict[str, torch.Tensor]]
) -> list[dict[str, torch.Tensor]]:
    """What each rank's program gives, of each rank's inputs; by the names of tensors."""
    results: list[Any] = [None] * len(programs)
    ends = in_this_process(programs[0].sizes, timeout_s=20.0)

    def one(rank: int) -> None:
        try:
            given = interpret(programs[rank], ends[rank], inputs[rank])
            results[rank] = {item.tensor: given[item.value] for item in programs[rank].outputs}
        except BaseException as error:
            results[rank] = error
            ends[rank].abort("a rank has failed")

    threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in range(len(programs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40.0)
    for end in ends:
        end.close()
    for result in results:
        if not isinstance(result, dict):
            raise AssertionError(repr(result)) from result
    return results


def check(ways: Sequence[tuple[Layout, Layout]], spec: Spec, sizes: tuple[int, ...]) -> None:
    programs = programs_of(ways, spec, sizes)
    torch.manual_seed(0)
    wholes = [torch.randint(99, spec.shape).to(spec.dtype) for _ in ways]
    parts = [scatter(w, source, sizes) for w, (source, _) in zip(wholes, ways, strict=True)]
    inputs = [{f"x{k}": p[rank] for k, p in enumerate(parts)} for rank in range(len(programs))]
    results = run(programs, inputs)
    for number, (whole, (source, target)) in enumerate(zip(wholes, ways, strict=True)):
        what = f"{in_words(source)} -> {in_words(target)} of {spec} on {sizes}"
        given = [result[f"x{number}"] for result in results]
        assert torch.equal(join(given, target, sizes, spec.shape), whole), what
        if P not in target:
            for tensor, at in zip(given, everyone(sizes), strict=True):
                assert torch.equal(tensor, split(whole, target, sizes, at)), f"{what} at {at}"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("shape", [(12, 12), (13, 7)], ids=["even", "uneven"])
def test_every_way_gives_the_tensor(sizes: tuple[int, ...], shape: tuple[int, int]) -> None:
    found = layouts(shape, sizes, [S(0), S(1), B, P])
    assert len(found) >= 4
    check(list(itertools.permutations(found, 2)), Spec(shape, torch.float64), sizes)


@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 2)], ids=str)
def test_ways_between_units(sizes: tuple[int, ...]) -> None:
    """35 times 3 rows, and 21 times 5, are cut at other places than 105 rows."""
    shape = (105, 2, 4)
    found = layouts(shape, sizes, [S(0), S(0, 3), S(0, 5), S(2), B, P])
    assert any(p.unit > 1 for layout in found for p in layout)
    check(list(itertools.permutations(found, 2)), Spec(shape, torch.float64), sizes)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8], ids=str
)
def test_ways_of_other_dtypes(dtype: torch.dtype) -> None:
    placements = [S(0), S(1), B] + ([P] if dtype in (torch.float32, torch.int64) else [])
    found = layouts((8, 9), (3,), placements)
    check(list(itertools.permutations(found, 2)), Spec((8, 9), dtype), (3,))


def test_ways_of_what_has_no_dims() -> None:
    check(list(itertools.permutations(layouts((), (2, 2), [B, P]), 2)), Spec((), torch.float64),
          (2, 2))  # fmt: skip


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Bytes that each rank of a line has given a loopback transport for others."""
    counted: Counter[int] = Counter()
    share = loopback.LoopbackTransport.share

    def counting(self: Any, turn: Any, parts: Any, sizes: Any, read: Any) -> None:
        mine = (p.numel() for to, p in enumerate(parts) if p is not None and to != self.rank)
        counted[self.rank] += sum(mine)
        share(self, turn, parts, sizes, read)

    monkeypatch.setattr(loopback.LoopbackTransport, "share", counting)
    return counted


def theory(source: Placement, target: Placement, spec: Spec, parts: int) -> list[int]:
    """Bytes that each rank of an axis sends, from the parts' sizes."""

    def size(placement: Placement, rank: int) -> int:
        ranges = part(spec.shape, (placement,), (parts,), (rank,))
        return math.prod(b - a for a, b in ranges) * spec.dtype.itemsize

    ranks = range(parts)
    if source == B or target == P:
        return [0] * parts
    if source == P and target == B:
        links = Links(tuple((rank,) for rank in ranks), LINK, LINK, 4e9)
        return list(map(int, simulate("all_reduce", "direct", links, spec.num_bytes).sent_bytes))
    if source == P:
        return [spec.num_bytes - size(target, rank) for rank in ranks]
    if target == B:
        return [(parts - 1) * size(source, rank) for rank in ranks]
    # Of an own part (rows), what others have (columns).
    own = [size(source, rank) for rank in ranks]
    return [n - n * size(target, rank) // spec.num_bytes for rank, n in enumerate(own)]


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("shape", [(192, 384), (193, 389)], ids=["even", "uneven"])
@pytest.mark.parametrize("way", list(itertools.permutations([S(0), S(1), B, P], 2)), ids=str)
def test_bytes_are_those_of_theory(
    parts: int,
    shape: tuple[int, int],
    way: tuple[Placement, Placement],
    sent: Counter[int],
) -> None:
    spec = Spec(shape, torch.float64)
    sizes = (parts,)
    programs = programs_of([((way[0],), (way[1],))], spec, sizes)
    tensors = scatter(torch.ones(shape, dtype=spec.dtype), (way[0],), sizes)
    run(programs, [{"x0": tensor} for tensor in tensors])
    expected = theory(*way, spec, parts)
    # A flat buffer that is summed is cut at cache lines; the rest is exact.
    slack = 64 * parts if way == (P, B) else 0
    for rank in range(parts):
        assert abs(sent[rank] - expected[rank]) <= slack
        exchanges = [i for i in programs[rank].instructions if isinstance(i, Exchange)]
        assert abs(sum(map(programs[rank].sent_bytes, exchanges)) - expected[rank]) <= slack
    busiest = routes(sizes).way(shape, 8, (way[0],), (way[1],))
    assert busiest is not None
    assert abs(busiest.sent_bytes - max(expected)) <= slack


def test_a_hop_on_an_outer_axis_along_a_dim_that_an_inner_one_splits_is_refused() -> None:
    names, shape, sizes = ("x", "y"), (12, 8), (2, 2)
    with pytest.raises(PlanError, match=r"x from \[S0, S0\] to \[B, S0\] in one hop"):
        exchange_hop(names, shape, (S(0), S(0)), Hop(0, S(0), B), sizes, (0, 1))
    with pytest.raises(PlanError, match="not on its line"):
        exchange_hop(names, shape, (P, S(0)), Hop(0, P, S(0)), sizes, (0, 1))
    with pytest.raises(PlanError, match="not on its line"):
        exchange_hop(names, shape, (S(0), S(0)), Hop(0, S(0), S(1)), sizes, (1, 0))
    with pytest.raises(PlanError, match="not on its line"):
        local_hop(names, shape, (B, S(0)), Hop(0, B, S(0)), sizes, (0, 1))
