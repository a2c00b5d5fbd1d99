"""Heads and batches that ranks do not divide: the search cuts them between whole ones."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from penstock.exchange.cost import Link
from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.costs.routes import Routes, plain
from penstock.plan.layout import B, P, S
from penstock.plan.programs.interpret import run_all
from penstock.plan.programs.lower import lower
from penstock.plan.programs.verify import verify
from penstock.plan.search.price import ClusterPrices
from penstock.plan.search.search import Search
from penstock.plan.search.units import of_sizes, of_tensors
from penstock.testing.networks import ADAMW, SGD, Example, following

HEAD = 4
"""Numbers of each of the 3 heads."""
LENGTH = 8


def machines(devices: int, latency_s: float = 3e-4) -> Cluster:
    """Slow devices, so that work is split; and links to be used seldom."""
    link = Link(latency_s, 1e9, 1e-7)
    return Cluster(1, devices, Device("made up", {"float64": 1e7}, 1e8, 1 << 40, 1e-7), link, link)


@functools.cache
def gpt(batch: int, heads: int = 3) -> tuple[Example, Graph]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = zoo.gpt(16, width=HEAD * heads, heads=heads, layers=2, length=LENGTH).double()
        x, y = torch.randint(16, (2, batch, LENGTH))
    example = Example(network, x, y, F.cross_entropy)
    return example, capture(network, example.loss, example.batch, ADAMW if batch == 1 else SGD)


def distance(example: Example, graph: Graph, assignment: Assignment) -> float:
    """Of what ranks give and what one process gives, over two steps."""
    sizes = assignment.sizes
    inputs = example.inputs(graph)
    programs = lower(graph, assignment, Routes(machines(sizes[0]), sizes), bucket_bytes=2048)
    verify(programs, graph, assignment)
    parallel = run_all(graph, programs, inputs, [{}, {}])
    worst = 0.0
    for found in parallel:
        expected = graph.run(inputs)
        inputs = following(graph, inputs, expected)
        for name, tensor in found.items():
            difference = (tensor.double() - expected[name].double()).abs()
            worst = max(worst, float(difference.max()))
    return worst


def attentions(graph: Graph, assignment: Assignment) -> list[str]:
    return [
        str(assignment.nodes[node.name][0])
        for node in graph.nodes
        if node.phase == "forward" and "attention" in node.op
    ]


PINS = {
    "blocks.0.attention.qkv": f"S0/{3 * HEAD}",
    "blocks.0.attention.output.weight": f"S1/{HEAD}",
}


def test_three_heads_on_two_ranks_are_split_by_whole_heads() -> None:
    example, graph = gpt(1)
    search = Search(graph, machines(2), pins=PINS)
    found = search.find(gap=1e-4).assignment
    assert attentions(graph, found)[0] == "S1, S1, S1 -> S1, S1"
    assert found.layout_of(graph, "blocks.0.attention.qkv.bias") == (S(0, 3 * HEAD),)
    assert isinstance(search.prices, ClusterPrices)
    inside = [
        (change.source, change.target)
        for change in found.ways(graph, search.prices.routes)
        if change.tensor in graph.producer
        and graph.producer[change.tensor][0].phase == "forward"
        and any(node.module == "blocks.0.attention.output" for node in change.awaiting)
    ]
    assert inside == [((P,), (B,))]  # What the two have summed over their own heads.
    assert distance(example, graph, found) <= 1e-10


def test_a_pin_without_a_unit_takes_what_is_best_of_any() -> None:
    _, graph = gpt(1)
    (name,) = (k for k in PINS if k.endswith("output.weight"))
    found = {
        pin: Search(graph, machines(2), pins={name: pin}).find(gap=1e-6).price.step_s
        for pin in ("S1", "[S1]", f"S1/{HEAD}")
    }
    assert found["S1"] == pytest.approx(min(found.values()), rel=1e-5)


def test_without_units_heads_would_be_brought_together(monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = gpt(1)
    with_units = Search(graph, machines(2, 1e-4)).find(gap=1e-4).price
    monkeypatch.setattr("penstock.plan.search.price.of_sizes", lambda *_: {})
    without = Search(graph, machines(2, 1e-4)).find(gap=1e-4).price
    assert with_units.step_s < 0.999 * without.step_s


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_batch_that_ranks_do_not_divide_is_split_by_whole_examples(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, graph = gpt(2 * ranks + 1, heads=4)
    search = Search(graph, machines(ranks))
    found = search.preset("data_parallel")
    products = {
        str(found.nodes[node.name][0])
        for node in graph.nodes
        if node.op == "aten.mm.default" and node.phase == "forward"
    }
    assert products == {f"S0/{LENGTH}, B -> S0/{LENGTH}"}
    assert search.price(found).exchange_s < 0.01 * search.price(found).step_s
    assert distance(example, graph, found) <= 1e-10
    monkeypatch.setattr("penstock.plan.search.price.of_sizes", lambda *_: {})
    without = Search(graph, machines(ranks))
    gathered = without.price(without.preset("data_parallel"))
    assert gathered.exchange_s > 10 * search.price(found).exchange_s


def test_units_are_of_the_tensors_that_heads_reach() -> None:
    _, graph = gpt(1)
    units = of_sizes(graph, (2,))
    assert units == {3 * HEAD: (HEAD,), 9 * HEAD: (3 * HEAD,)}
    found = of_tensors(graph, (2,), units)
    assert found["blocks.0.attention.qkv.weight"] == (S(0, 3 * HEAD),)
    assert found["blocks.0.attention.output.weight"] == (S(1, HEAD),)
    assert found["blocks.0.attention.output.weight/exp_avg"] == (S(1, HEAD),)
    # Of as many rows, but of no heads.
    for name in ("tokens.weight", "blocks.0.dense.0.weight", "blocks.0.attention.output.bias"):
        assert name not in found
    assert len(found) < len(graph.specs) / 3


@pytest.mark.parametrize("sizes", [(3,), (4,), (3, 1), (8, 4)])
def test_where_units_make_no_difference_there_are_none(sizes: tuple[int, ...]) -> None:
    _, graph = gpt(1)
    assert of_sizes(graph, sizes) == {}  # 3 heads: each rank has one, or some have none
    assert of_tensors(graph, sizes, {}) == {}
    assert of_sizes(gpt(1)[1], (2,))


def test_no_two_combinations_cut_alike() -> None:
    _, graph = gpt(6, heads=6)
    sizes = (2, 2)
    prices = ClusterPrices(graph, machines(4), sizes)
    several = 0
    for node in graph.nodes:
        seen = set()
        for chosen in prices.combinations(node):
            lying = [*zip(*((*one.inputs, *one.outputs) for one in chosen), strict=True)]
            names = [*node.inputs, *node.outputs]
            seen.add(
                tuple(
                    name and plain(graph.specs[name].shape, layout, sizes)
                    for name, layout in zip(names, lying, strict=True)
                )
            )
        assert len(seen) == len(prices.combinations(node))
        several += any(p.unit > 1 for way in seen for lies in way for p in lies or ())
    assert several
    assert all(p in (B, P) or p.unit >= 1 for p in prices.units("blocks.0.attention.qkv.weight"))
