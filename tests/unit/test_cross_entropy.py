"""Losses by classes from logits: the numbers are torch's, and logits are split by class."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penstock.exchange.cost import Link
from penstock.model import cross_entropy, zoo
from penstock.model.capture import capture
from penstock.model.cross_entropy import class_gradient, log_sum, log_sums, places_of, put_at
from penstock.model.graph import Graph
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import S
from penstock.plan.search.search import Search
from penstock.testing.networks import Example

CLASSES = 131
"""Of two places."""
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Logits(nn.Module):
    """Gives its parameter."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits + x


def captured(
    logits: torch.Tensor, y: torch.Tensor, loss: Loss
) -> tuple[Graph, torch.Tensor, torch.Tensor]:
    """The graph, its loss, and its gradient of logits."""
    example = Example(Logits(logits), torch.zeros((), dtype=logits.dtype), y, loss)
    graph = capture(example.network, loss, example.batch)
    outputs = graph.run(example.inputs(graph))
    return (
        graph,
        outputs[graph.output("loss").name],
        outputs[graph.output("gradient", "logits").name],
    )


def torchs(logits: torch.Tensor, y: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_()
    found = loss(leaf, y)
    found.backward()
    assert leaf.grad is not None
    return found.detach(), leaf.grad


def by_hand(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(F.log_softmax(logits, 1), y)


def also_read(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    found = F.log_softmax(logits, 1)
    return F.nll_loss(found, y) + found.square().mean()


WEIGHT = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
FROM_LOGITS: dict[str, Loss] = {
    "mean": F.cross_entropy,
    "sum": functools.partial(F.cross_entropy, reduction="sum"),
    "none": lambda x, y: (F.cross_entropy(x, y, reduction="none") ** 2).sum(),
    "ignored": functools.partial(F.cross_entropy, ignore_index=3),
    "by hand": by_hand,
}
BY_TORCH: dict[str, Loss] = {
    "smoothed": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "read elsewhere": also_read,
}


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("name", [*FROM_LOGITS, *BY_TORCH])
def test_numbers_are_those_of_torch(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(shape[0], CLASSES, *shape[1:], dtype=torch.float64)
    y = torch.randint(CLASSES, shape)
    y.view(-1)[:2] = 3
    loss = (FROM_LOGITS | BY_TORCH)[name]
    graph, *ours = captured(logits, y, loss)
    for found, wanted in zip(ours, torchs(logits, y, loss), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    softmax = any("softmax" in node.op for node in graph.nodes)
    assert softmax == (name in BY_TORCH)
    assert softmax != any("class_gradient" in node.op for node in graph.nodes)


def test_weights_of_classes_are_left_to_torch() -> None:
    class Weighted(Logits):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__(logits)
            self.register_buffer("weight", WEIGHT)

        def forward(self, x: torch.Tensor) -> Any:
            return self.logits + x, self.weight

    def loss(output: Any, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output[0], y, output[1], ignore_index=3)

    torch.manual_seed(0)
    for shape in ((6, CLASSES), (2, CLASSES, 3)):
        network = Weighted(torch.randn(shape, dtype=torch.float64))
        y = torch.randint(CLASSES, (shape[0], *shape[2:]))
        y.view(-1)[0] = 3
        example = Example(network, torch.zeros((), dtype=torch.float64), y, loss)
        graph = capture(network, loss, example.batch)
        found = graph.run(example.inputs(graph))[graph.output("gradient", "logits").name]
        loss(network(example.x), y).backward()
        torch.testing.assert_close(found, network.logits.grad, rtol=0, atol=1e-12)
        assert any("_log_softmax" in node.op for node in graph.nodes)


def test_few_classes_are_left_to_torch() -> None:
    graph, *_ = captured(torch.randn(4, 100), torch.randint(100, (4,)), F.cross_entropy)
    assert any("_log_softmax" in node.op for node in graph.nodes)
    assert [places_of(n) for n in (10, 127, 128, 50257)] == [1, 1, 2, 16]


@pytest.mark.parametrize("kind", ["large", "masked", "nothing counts"])
def test_numbers_at_the_edge(kind: str) -> None:
    """In single precision, as exactly as torch: large logits, -inf, no row that counts."""
    torch.manual_seed(0)
    logits, y = torch.randn(6, CLASSES), torch.randint(40, (6,))
    if kind == "large":
        logits = 1e4 * logits
    elif kind == "masked":
        logits[:, 60:] = -math.inf
    else:
        y[:] = -100
    _, *ours = captured(logits, y, F.cross_entropy)
    for found, wanted in zip(ours, torchs(logits, y, F.cross_entropy), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_operators_in_blocks(dim: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of tensors that lie otherwise in memory."""
    monkeypatch.setattr(cross_entropy, "BLOCK", block)
    torch.manual_seed(0)
    for turned in (False, True):
        x = torch.randn(5, 6, 7, dtype=torch.float64)
        x = x.transpose(1, 2) if turned else x
        maximum, log = log_sum(*log_sums(x, dim, 3), dim)
        torch.testing.assert_close(maximum + log, x.logsumexp(dim, keepdim=True))
        values = torch.randn_like(log)
        index = torch.randint(x.shape[dim], log.shape)
        found = class_gradient(values, x, maximum, log, index, dim, 0)
        put = put_at(values, index, dim, 0, x.shape[dim])
        torch.testing.assert_close(found, put - x.softmax(dim) * values)


def test_parts_of_which_one_is_all_masked() -> None:
    """A rank whose classes are -inf has a part of the sum all the same: 0."""
    x = torch.randn(4, 6, dtype=torch.float64)
    x[:, :3] = -math.inf
    parts = [log_sums(part, 1, 1) for part in x.split(3, 1)]
    maximum, log = log_sum(*(torch.cat(both, 1) for both in zip(*parts, strict=True)), 1)
    torch.testing.assert_close(maximum + log, x.logsumexp(1, keepdim=True))


def test_who_interprets_programs_has_the_operators() -> None:
    """In a process that has captured nothing."""
    code = (
        "import torch, penstock.plan.programs.interpret; "
        "print(*(hasattr(torch.ops.penstock, n) for n in ('log_sums', 'uniform', 'none_such')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["True", "True", "False"], run.stderr


# What the search finds.


def of_logits(graph: Graph, assignment: Assignment) -> list[Any]:
    """How the gradient of the logits is computed, by axis: by which dim of (rows, classes, ..)."""
    (node,) = (n for n in graph.nodes if n.op == "penstock.class_gradient.default")
    return [signature.inputs[1] for signature in assignment.nodes[node.name]]


def gpt(batch: int) -> Graph:
    """A small transformer with many words, as those of several languages."""
    network = zoo.gpt(vocabulary=50257, width=128, heads=4, layers=2, length=16, tied=False)
    tokens = torch.zeros(batch, 16, dtype=torch.int64)
    adam = functools.partial(torch.optim.AdamW, lr=1e-3)
    return capture(network, F.cross_entropy, (tokens, tokens), adam)


def cluster(gbit: float) -> Cluster:
    link = Link(20e-6, gbit * 1e9 / 8, 1e-6)
    return Cluster(1, 8, Device("made up", {"float32": 1e13}, 1e12, 1 << 50, 5e-6), link, link)


def test_the_search_splits_a_large_vocabulary_by_itself() -> None:
    graph, machines = gpt(8), cluster(10)
    found = Search(graph, machines).find()
    assert of_logits(graph, found.assignment) == [S(1)]
    assert found.assignment.layout_of(graph, "head.weight") == (S(0),)
    # Nothing that has the vocabulary's size travels.
    for change in found.assignment.ways(graph, Routes(machines, (8,))):
        assert 50257 not in graph.specs[change.tensor].shape, change.tensor
    known_s = {name: known.step_s for name, (_, known) in found.presets.items()}
    assert found.price.step_s < known_s["megatron"] < 0.1 * known_s["data_parallel"]


def test_the_search_leaves_logits_whole_where_the_batch_is_large() -> None:
    graph, machines = gpt(4096), cluster(100)
    found = Search(graph, machines).find()
    assert of_logits(graph, found.assignment) == [S(0)]
