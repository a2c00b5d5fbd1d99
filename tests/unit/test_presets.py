"""The known ways to split a network, as the search compares with them."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penstock.errors import UserError
from penstock.exchange.cost import Link
from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, P, S
from penstock.plan.search.presets import PRESETS
from penstock.plan.search.search import Search

LINK = Link(20e-6, 1.25e9, 1e-6)


def cluster(hosts: int, devices: int) -> Cluster:
    return Cluster(
        hosts, devices, Device("made up", {"float32": 1e12}, 1e11, 1 << 50, 5e-6), LINK, LINK
    )


@functools.cache
def step_of(name: str) -> Graph:
    adam = functools.partial(torch.optim.AdamW, lr=1e-3)
    tokens = torch.zeros(16, 32, dtype=torch.int64)
    if name == "gpt":
        network = zoo.gpt(vocabulary=512, width=64, heads=4, layers=2, length=32, tied=False)
        return capture(network, F.cross_entropy, (tokens, tokens), adam)
    if name == "convolutional":
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )
        batch = torch.zeros(16, 3, 8, 8), torch.zeros(16, dtype=torch.int64)
        return capture(network, F.cross_entropy, batch, adam)
    network = (
        zoo.mlp(inputs=512, hidden=(512, 512), classes=10)
        if name == "mlp"
        else zoo.text_lstm(vocabulary=64, embedding=16, hidden=16, classes=4)
    )
    if name == "mlp":
        batch = torch.zeros(16, 512), torch.zeros(16, dtype=torch.int64)
    else:
        batch = tokens[:, :6], torch.zeros(16, dtype=torch.int64)
    return capture(network, F.cross_entropy, batch, adam)


def of(graph: Graph, hosts: int, devices: int, name: str) -> tuple[Search, Assignment]:
    search = Search(graph, cluster(hosts, devices))
    return search, search.preset(name)


def read(graph: Graph, assignment: Assignment, op: str) -> list[list[object]]:
    """On the last axis, how the forward nodes of an operator read."""
    return [
        [assignment.read_as(graph, node, k)[-1] for k in range(len(node.inputs))]
        for node in graph.nodes
        if node.op == op and node.phase == "forward"
    ]


def test_data_parallel_splits_the_batch_and_adds_up_gradients() -> None:
    graph = step_of("convolutional")
    search, chosen = of(graph, 2, 2, "data_parallel")
    for item in graph.inputs:
        layout = (S(0), S(0)) if item.role == "data" else (B, B)
        assert chosen.layout_of(graph, item.name) == layout, item.name
    for node in graph.nodes:
        if node.op == "aten.convolution.default":
            assert chosen.layout_of(graph, node.name) == (S(0), S(0))
        if node.op == "aten.convolution_backward.default":
            assert chosen.layout_of(graph, str(node.outputs[1])) == (P, P)
    # A sum over the batch is waited for only by batch norm; gradients are not.
    found = search.price(chosen)
    assert found.late_s > 0
    assert found.compute_s < Search(graph, cluster(1, 1), (1,)).find().price.compute_s


def test_zero_keeps_parameters_and_state_in_parts() -> None:
    graph = step_of("mlp")
    search, chosen = of(graph, 1, 4, "zero")
    by_data = search.preset("data_parallel")
    for item in graph.inputs:
        shape = graph.specs[item.name].shape
        if item.role in ("parameter", "state") and shape and shape[0] % 4 == 0:
            assert chosen.layout_of(graph, item.name)[0].is_split, item.name
    # What is computed is what data parallel computes, on gathered parameters.
    assert read(graph, chosen, "aten.mm.default") == [[S(0), B]] * 3
    assert read(graph, by_data, "aten.mm.default") == [[S(0), B]] * 3
    assert search.price(chosen).held_bytes < search.price(by_data).held_bytes
    assert search.price(chosen).exchange_s > search.price(by_data).exchange_s


def test_megatron_splits_matrices_by_columns_then_rows() -> None:
    graph = step_of("gpt")
    _, chosen = of(graph, 1, 4, "megatron")
    for layer in range(2):
        matrix = {
            name: chosen.layout_of(graph, f"blocks.{layer}.{name}.weight")
            for name in ("attention.qkv", "attention.output", "dense.0", "dense.2")
        }
        assert matrix == {
            "attention.qkv": (S(0),), "attention.output": (S(1),),
            "dense.0": (S(0),), "dense.2": (S(1),),
        }  # fmt: skip
    attention = [
        node for node in graph.nodes if "scaled_dot" in node.op and node.phase == "forward"
    ]
    assert len(attention) == 2
    for node in attention:
        assert chosen.layout_of(graph, str(node.outputs[0])) == (S(1),)  # by heads


@pytest.mark.parametrize("mesh", [(1, 4), (2, 4)])
def test_megatron_keeps_logits_split_by_class(mesh: tuple[int, int]) -> None:
    """So that nothing of their size travels inside a host."""
    graph = step_of("gpt")
    search, chosen = of(graph, *mesh, "megatron")
    axes = (S(0),) * (mesh[0] > 1)
    (loss,) = (node for node in graph.nodes if node.op == "penstock.log_sums.default")
    (gradient,) = (node for node in graph.nodes if node.op == "penstock.class_gradient.default")
    assert chosen.read_as(graph, loss, 0) == (*axes, S(1))
    assert chosen.read_as(graph, gradient, 1) == (*axes, S(1))
    assert chosen.layout_of(graph, "head.weight")[-1] == S(0)
    ways = chosen.ways(graph, Routes(cluster(*mesh), search.sizes))
    inside = {w.tensor for w in ways if any(hop.axis == len(axes) for hop in w.way.hops)}
    assert "_log_softmax:parts.0" in inside
    assert all(graph.specs[name].numel < 16 * 32 * 512 for name in inside)


def test_megatron_splits_a_large_table_by_row() -> None:
    """Which is also the head's: rows are words, of which logits are."""
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    network = zoo.gpt(vocabulary=20000, width=64, heads=4, layers=1, length=8)
    graph = capture(network, F.cross_entropy, (tokens, tokens), torch.optim.SGD)
    search, chosen = of(graph, 1, 4, "megatron")
    assert chosen.layout_of(graph, "tokens.weight") == (S(0),)
    ways = chosen.ways(graph, Routes(cluster(1, 4), search.sizes))
    assert not any(20000 in graph.specs[way.tensor].shape for way in ways)


def test_megatron_is_data_parallel_between_hosts() -> None:
    graph = step_of("gpt")
    _, chosen = of(graph, 2, 4, "megatron")
    assert chosen.layout_of(graph, "x") == (S(0), B)
    assert chosen.layout_of(graph, "blocks.0.dense.0.weight") == (B, S(0))
    for item in graph.inputs:
        if item.role == "parameter":
            assert chosen.layout_of(graph, item.name)[0] == B


@pytest.mark.parametrize("name", ["gpt", "convolutional", "mlp", "lstm"])
@pytest.mark.parametrize("mesh", [(1, 3), (2, 2), (1, 64)])
def test_every_preset_is_there_for_every_graph(name: str, mesh: tuple[int, int]) -> None:
    """Also where nothing can be split evenly, or at all."""
    graph = step_of(name)
    search = Search(graph, cluster(*mesh))
    for preset in PRESETS:
        chosen = search.preset(preset)
        assert chosen.nodes.keys() == {node.name for node in graph.nodes}
        assert 0 < search.price(chosen).step_s < 1e3


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match=r"no preset 'fsdp'[\s\S]*data_parallel, zero, megatron"):
        of(step_of("mlp"), 1, 2, "fsdp")
