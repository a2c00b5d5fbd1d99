"""Tiny networks of every kind that is planned, each with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from penstock.model import zoo
from penstock.model.graph import Graph

Optimizer = Callable[[Any], torch.optim.Optimizer]
SGD: Optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)
ADAMW: Optimizer = partial(torch.optim.AdamW, lr=1e-2)
ADAGRAD: Optimizer = partial(torch.optim.Adagrad, lr=1e-2)


@dataclass(frozen=True)
class Example:
    """A network with what a step of it takes.

    Arguments:
        network: with its weights, drawn under a fixed seed.
        x, y: a batch.
        loss: `(output, y) -> scalar`.
    """

    network: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    loss: Callable[[Any, Any], torch.Tensor]

    @property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.y

    def inputs(self, graph: Graph, seed: int = 7) -> dict[str, torch.Tensor]:
        """All inputs of the captured step, before the first: weights, states, the batch."""
        own = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        data = {"x": self.x, "y": self.y}
        found: dict[str, torch.Tensor] = {}
        for item in graph.inputs:
            spec = graph.specs[item.name]
            match item.role:
                case "parameter" | "buffer":
                    found[item.name] = own[item.target].detach().clone()
                case "state":
                    start = graph.initial[item.name]
                    found[item.name] = torch.full(spec.shape, start, dtype=spec.dtype)
                case "data":
                    found[item.name] = data[item.name]
                case "constant":
                    found[item.name] = graph.constants[item.name]
                case "scalar":
                    value = seed if item.name == "seed" else 0.01
                    found[item.name] = torch.tensor(value, dtype=spec.dtype)
        return found


def following(
    graph: Graph, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The next step's inputs: parameters, buffers and state as this one has left them."""
    found = dict(inputs)
    for output in graph.outputs:
        if output.role in ("parameter", "buffer", "state"):
            found[graph.input(output.role, output.target).name] = outputs[output.name]
    return found


def tiny(name: str, dtype: torch.dtype = torch.float64, batch: int = 6) -> Example:
    """One of `TINY`, with weights and floating-point inputs of this dtype."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.set_default_dtype(dtype)
        try:
            return TINY[name](batch)
        finally:
            torch.set_default_dtype(before)


def _images(network: nn.Module, side: int, batch: int, channels: int = 3) -> Example:
    x = torch.randn(batch, channels, side, side)
    return Example(network, x, torch.randint(10, (batch,)), F.cross_entropy)


def _text(network: nn.Module, batch: int, length: int = 8, vocabulary: int = 32) -> Example:
    """Each position's next word."""
    x = torch.randint(vocabulary, (batch, length))
    y = torch.randint(vocabulary, (batch, length))
    return Example(network, x, y, F.cross_entropy)


def _mlp(batch: int) -> Example:
    network = zoo.mlp(inputs=12, hidden=(16, 8), classes=10)
    return Example(network, torch.randn(batch, 12), torch.randint(10, (batch,)), F.cross_entropy)


def _vgg(batch: int) -> Example:
    network = zoo.vgg16(classes=10, image=32, width=4, dense=24, batch_norm=True)
    return _images(network, 32, batch)


def _lenet(batch: int) -> Example:
    return _images(zoo.lenet(), 28, batch, 1)


def _resnet(batch: int) -> Example:
    return _images(zoo.resnet(layers=(1, 1), width=4, classes=10), 16, batch)


def _autoencoder(batch: int) -> Example:
    network = zoo.autoencoder(shape=(1, 6, 6), hidden=(20, 12), code=4)
    x = torch.rand(batch, 1, 6, 6)
    return Example(network, x, x.clone(), F.binary_cross_entropy_with_logits)


def _lstm(batch: int, cell: Any = "lstm") -> Example:
    network = zoo.text_lstm(vocabulary=32, embedding=8, hidden=8, classes=4, cell=cell)
    x = torch.randint(32, (batch, 4))
    return Example(network, x, torch.randint(4, (batch,)), F.cross_entropy)


def _gpt(batch: int) -> Example:
    return _text(zoo.gpt(32, width=16, heads=4, layers=2, length=8, dropout=0.1), batch)


def _bert(batch: int) -> Example:
    return _text(zoo.bert(32, width=16, heads=4, layers=2, length=8, dropout=0.1), batch)


def _vit(batch: int) -> Example:
    network = zoo.vit(image=8, patch=4, width=16, heads=4, layers=2, classes=10)
    return _images(network, 8, batch)


def _recommender(batch: int) -> Example:
    rows = (40, 24, 12)
    network = zoo.recommender(rows=rows, width=4, dense_features=0, hidden=(), top=(12,))
    x = torch.stack([torch.randint(n, (batch,)) for n in rows], dim=1)
    return Example(network, x, torch.randint(2, (batch,)), F.cross_entropy)


def _mixture(batch: int) -> Example:
    network = zoo.mixture_of_experts(
        32, width=16, hidden=24, experts=4, top=2, heads=4, layers=1, length=8
    )
    return _text(network, batch)


TINY: dict[str, Callable[[int], Example]] = {
    "mlp": _mlp,
    "lenet": _lenet,
    "vgg": _vgg,
    "resnet": _resnet,
    "autoencoder": _autoencoder,
    "lstm": _lstm,
    "gru": lambda batch: _lstm(batch, "gru"),
    "gpt": _gpt,
    "bert": _bert,
    "vit": _vit,
    "recommender": _recommender,
    "mixture": _mixture,
}
