"""Recomputation: the same step to the bit, in the memory that is said, at the least price."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph, Node
from penstock.plan.memory.liveness import Lifetimes, source_of
from penstock.plan.memory.mincut import Cut
from penstock.plan.memory.recompute import AGAIN, Candidate, Recomputation, again
from penstock.plan.memory.segments import Call, Stored, _abstract, _borders, _crossing, _hull
from penstock.testing.memory import Stepper, measured_peak
from penstock.testing.networks import ADAMW, Example, following, tiny

MATMULS = ("aten.mm.", "aten.bmm.", "aten.convolution.", "aten._scaled_dot")


def seconds(node: Node) -> float:
    """Products take ten times as long as all else."""
    return 10e-6 if node.op.startswith(MATMULS) else 1e-6


def captured(example: Example) -> tuple[Graph, dict[str, torch.Tensor]]:
    graph = capture(example.network, example.loss, example.batch, ADAMW)
    return graph, example.inputs(graph)


def deep_gpt(layers: int = 3) -> Example:
    torch.manual_seed(0)
    network = zoo.gpt(64, width=32, heads=2, layers=layers, length=32, dropout=0.1)
    x, y = torch.randint(64, (8, 32)), torch.randint(64, (8, 32))
    return Example(network, x, y, F.cross_entropy)


def deep_residual() -> Example:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    return Example(zoo.resnet(layers=(4,), width=16, classes=10), x, y, F.cross_entropy)


NETWORKS = {
    "gpt": deep_gpt,
    "resnet": deep_residual,
    "lstm": lambda: tiny("lstm"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_to_the_bit_in_the_memory_that_is_said(name: str) -> None:
    graph, inputs = captured(NETWORKS[name]())
    front = Recomputation(graph, seconds).sweep()
    assert front[0].graph is graph
    assert front[-1].peak_bytes < front[0].peak_bytes
    for one, other in itertools.pairwise(front):
        assert one.extra_s < other.extra_s
        assert one.peak_bytes > other.peak_bytes
    for candidate in {front[1], front[len(front) // 2], front[-1]}:
        candidate.graph.validate()
        check_counts(graph, candidate)
        assert Lifetimes.of_graph(candidate.graph).peak_bytes == candidate.peak_bytes
        mine, theirs = dict(inputs), dict(inputs)
        for _ in range(2):
            a, b = graph.run(theirs), candidate.graph.run(mine)
            assert a.keys() == b.keys()
            for tensor in a:
                assert torch.equal(a[tensor], b[tensor]), tensor
            mine, theirs = following(graph, mine, b), following(graph, theirs, a)


def check_counts(graph: Graph, candidate: Candidate) -> None:
    """Everything at most twice; extra seconds are those of what runs again."""
    counts = Counter(node.name.removesuffix(AGAIN) for node in candidate.graph.nodes)
    assert counts.keys() == {node.name for node in graph.nodes}
    assert max(counts.values()) == 2
    twice = [node for node in graph.nodes if counts[node.name] == 2]
    assert all(node.phase == "forward" for node in twice)
    extra = sum(seconds(node) for node in twice if source_of(node) is None)
    assert extra == pytest.approx(candidate.extra_s)


def test_gradients_are_the_same_to_the_bit() -> None:
    example = deep_gpt(2)
    graph = capture(example.network, example.loss, example.batch)
    inputs = example.inputs(graph)
    names = [node.name for node in graph.nodes if node.phase == "forward"]
    every = again(graph, names)
    every.validate()
    a, b = graph.run(inputs), every.run(inputs)
    assert len(a) > 10
    assert all(torch.equal(a[name], b[name]) for name in a)
    # A mask that were drawn anew would show.
    other = every.run(inputs | {"seed": inputs["seed"] + 1})
    assert not all(torch.equal(a[name], other[name]) for name in a)


def test_measured_memory_is_what_is_said() -> None:
    graph, inputs = captured(deep_gpt())
    choices = Recomputation(graph, seconds)
    front = choices.sweep()
    for candidate in (front[0], front[-1]):
        lifetimes = Lifetimes.of_graph(candidate.graph)
        stepper = Stepper(candidate.graph, {n: t.clone() for n, t in inputs.items()})
        stepper.step()
        measured = measured_peak(stepper.step)
        assert candidate.peak_bytes - lifetimes.resident_bytes == pytest.approx(measured, rel=0.05)
    kept, least = (c.peak_bytes - lifetimes.resident_bytes for c in (front[0], front[-1]))
    assert least < 0.5 * kept


def test_the_cheapest_that_fits_is_taken() -> None:
    graph, _ = captured(deep_gpt())
    choices = Recomputation(graph, seconds)
    front = choices.sweep()
    assert choices.within(front[0].peak_bytes) is front[0]
    least = front[-1].peak_bytes
    assert choices.within(least - 1) is None
    before = 0.0
    for share in (0.9, 0.7, 0.5, 0.3, 0.0):
        budget = int(least + share * (front[0].peak_bytes - least))
        found = choices.within(budget)
        assert found is not None
        assert found.peak_bytes <= budget
        assert before <= found.extra_s <= min(c.extra_s for c in front if c.peak_bytes <= budget)
        before = found.extra_s
    # What is cheap runs again before any product does.
    mild = choices.within(int(least + 0.7 * (front[0].peak_bytes - least)))
    assert mild is not None
    ran = [node for node in graph.nodes if node.name in mild.names]
    assert ran
    assert not any(node.op.startswith(MATMULS) for node in ran)


def test_depth_costs_time_in_proportion() -> None:
    """No segment runs through those before it: twice the depth is twice the time, at most."""
    extra = []
    for layers in (3, 6):
        graph, _ = captured(deep_gpt(layers))
        least = Recomputation(graph, seconds).sweep()[-1]
        forward = sum(
            seconds(n) for n in graph.nodes if n.phase == "forward" and source_of(n) is None
        )
        extra.append(least.extra_s / forward)
    assert all(share < 1 for share in extra)


def test_parts_of_a_rank_are_counted_as_they_are() -> None:
    graph, _ = captured(tiny("gpt"))
    half = {
        name: replace(spec, shape=(spec.shape[0] // 2, *spec.shape[1:]))
        if spec.shape and spec.shape[0] % 2 == 0
        else spec
        for name, spec in graph.specs.items()
    }
    none = lambda node, specs: 0  # noqa: E731
    whole = Recomputation(graph, seconds, scratch=none).sweep()[0]
    part = Recomputation(graph, seconds, half, none).sweep()[0]
    assert part.peak_bytes == Lifetimes.of_graph(graph, scratch=none, specs=half).peak_bytes
    assert part.peak_bytes < 0.7 * whole.peak_bytes


def test_cuts_are_cheapest() -> None:
    rng = random.Random(0)
    for _ in range(150):
        size = rng.randrange(3, 10)
        pipes = [
            (a, b, rng.randrange(1, 20))
            for a in range(size)
            for b in range(size)
            if a != b and a != 1 and b != 0 and rng.random() < 0.35
        ]
        cut = Cut(size)
        for pipe in pipes:
            cut.pipe(*pipe)

        def cost(side: set[int], pipes: list[tuple[int, int, int]] = pipes) -> int:
            return sum(c for a, b, c in pipes if a in side and b not in side)

        others = [v for v in range(size) if v > 1]
        subsets = itertools.chain.from_iterable(
            itertools.combinations(others, n) for n in range(size - 1)
        )
        found = cut.source_side()
        assert 0 in found
        assert 1 not in found
        assert cost(found) == min(cost({0, *subset}) for subset in subsets)


def calls_at_random(count: int, rng: random.Random) -> list[Call]:
    return [
        Call(
            n,
            (Stored(n, rng.randrange(1, 50), rng.random() < 0.6),),
            tuple({rng.randrange(n) for _ in range(rng.randrange(3))} if n else ()),
            rng.randrange(1, 50),
        )
        for n in range(count)
    ]


def test_hulls_are_those_of_all_choices() -> None:
    rng = random.Random(1)
    for _ in range(30):
        calls = calls_at_random(7, rng)
        points = set()
        for size in range(8):
            for runs in itertools.combinations(range(7), size):
                needed = {s.number for call in calls for s in call.makes if s.needed}
                for n in reversed(range(7)):
                    if n in runs and n in needed:
                        needed |= set(calls[n].reads)
                kept = sum(calls[n].makes[0].num_bytes for n in needed if n not in runs)
                points.add((kept, sum(calls[n].cost for n in runs)))
        hull = _hull(_abstract(calls, ()))
        for choice in hull:
            assert (choice.kept_bytes, choice.cost) in points
        for byte_price, cost_price in [(1, 1), (3, 1), (1, 4), (10**6, 1)]:
            best = min(byte_price * kept + cost_price * cost for kept, cost in points)
            assert best == min(byte_price * c.kept_bytes + cost_price * c.cost for c in hull)


def test_borders_are_where_least_crosses() -> None:
    rng = random.Random(2)
    for _ in range(30):
        calls = calls_at_random(8, rng)
        crossing = _crossing(calls)
        needs = [call.makes[0].num_bytes * call.makes[0].needed for call in calls]
        bound = max(needs) * 2

        def allowed(cuts: tuple[int, ...], needs: list[int] = needs, bound: int = bound) -> bool:
            edges = [-1, *cuts, 7]
            return all(sum(needs[a + 1 : b + 1]) <= bound for a, b in itertools.pairwise(edges))

        best = min(
            sum(crossing[c] for c in cuts)
            for n in range(8)
            for cuts in itertools.combinations(range(7), n)
            if allowed(cuts)
        )
        *cuts, end = _borders(calls, crossing, bound)
        assert end == 7
        assert allowed(tuple(cuts))
        assert sum(crossing[c] for c in cuts) == best
