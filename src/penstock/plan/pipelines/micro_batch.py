"""A batch in micro-batches: what each is given, and the same step by one process.

A step of k micro-batches runs forward and backward of each by itself, and updates once:

    loss      = sum over m of loss_m / k
    gradient  = sum over m, in order, of the gradient of loss_m / k
    buffers   go from micro-batch to micro-batch (`BatchNorm`'s statistics)
    seed_m    = k seed + m

so that no two micro-batches of any two steps draw the same numbers, and k = 1 is the step itself.
What is given to micro-batch m, or made of it, has the name that it has in the graph and `#m`
behind it (`at`); with k = 1 it has the name alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from penstock.errors import UserError
from penstock.model.graph import Graph, Input, Node, Output

Tensors = Mapping[str, torch.Tensor]

SEED = "seed"
ONE = "one"
"""The node that capture makes of the gradient of the loss by itself."""


def at(name: str, micro_batch: int, micro_batches: int) -> str:
    """The name of something of a micro-batch."""
    return name if micro_batches == 1 else f"{name}#{micro_batch}"


def scaled_one(node: Node, micro_batches: int) -> Node:
    """A node, of which the gradient of the loss by itself becomes 1 / k."""
    if node.name != ONE or node.op != "aten.full.default":
        return node
    shape, value = node.args
    return replace(node, args=(shape, value / micro_batches))


def cut_batch(graph: Graph, tensors: Tensors, micro_batches: int) -> dict[str, torch.Tensor]:
    """A step's inputs with the batch in micro-batches; of those that are given, the rest stay.

    Arguments:
        graph: captured at the size of a micro-batch.
        tensors: by the graph's names; data (batch, ...).

    Raises:
        UserError: the batch is not of k micro-batches; names the tensor.
    """
    data = {item.name for item in graph.inputs if item.role == "data"}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name not in data:
            found[name] = tensor
            continue
        shape = graph.specs[name].shape
        if not shape or tuple(tensor.shape) != (shape[0] * micro_batches, *shape[1:]):
            raise UserError(
                f"{name} is {list(tensor.shape)}; expected {micro_batches} micro-batches of "
                f"{list(shape)}",
                hint="capture the step at batch / micro-batches",
            )
        for micro_batch, part in enumerate(torch.split(tensor, shape[0])):
            found[at(name, micro_batch, micro_batches)] = part
    return found


def accumulated(graph: Graph, micro_batches: int) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    """The step of several micro-batches by one process: from whole inputs to outputs by name.

    It knows nothing of stages: the graph runs as it is up to the gradients, once a micro-batch, and
    then what is left of it.

    Arguments:
        graph: captured at the size of a micro-batch.
    """
    running, updating, gradients = _halves(graph, micro_batches)
    loss = graph.output("loss").name
    buffers = {
        graph.input("buffer", output.target).name: output.name
        for output in graph.outputs
        if output.role == "buffer"
    }

    def step(tensors: Tensors) -> dict[str, torch.Tensor]:
        given = cut_batch(graph, tensors, micro_batches)
        data = [item.name for item in graph.inputs if item.role == "data"]
        now = {name: tensor for name, tensor in tensors.items() if name not in data}
        totals: dict[str, torch.Tensor] = {}
        for micro_batch in range(micro_batches):
            now |= {name: given[at(name, micro_batch, micro_batches)] for name in data}
            if SEED in tensors:
                now[SEED] = tensors[SEED] * micro_batches + micro_batch
            found = running.run({item.name: now[item.name] for item in running.inputs})
            now |= {old: found[new] for old, new in buffers.items()}
            for name in {*gradients, loss}:
                totals[name] = totals[name] + found[name] if name in totals else found[name]
        totals[loss] = totals[loss] / micro_batches
        known = now | totals | {new: now[old] for old, new in buffers.items()}
        results = updating.run({item.name: known[item.name] for item in updating.inputs})
        known |= results
        return {output.name: known[output.name] for output in graph.outputs}

    return step


@functools.lru_cache(maxsize=8)
def _halves(graph: Graph, micro_batches: int) -> tuple[Graph, Graph, frozenset[str]]:
    """Forward and backward; the updates; and the gradients that go from one to the other."""
    first = [scaled_one(n, micro_batches) for n in graph.nodes if n.phase != "update"]
    second = [node for node in graph.nodes if node.phase == "update"]
    made = {name for node in first for name in node.outputs if name is not None}
    wanted = {name for node in second for name in node.inputs}
    wanted |= {output.name for output in graph.outputs if output.role == "gradient"}
    gradients = wanted & made
    outputs = [o for o in graph.outputs if o.role in ("loss", "buffer")]
    outputs += [Output("gradient", name, name) for name in sorted(gradients)]
    inputs = [*graph.inputs, *(Input(name, "data", name) for name in sorted(gradients))]
    results = {name for node in second for name in node.outputs}
    return (
        replace(graph, nodes=tuple(first), outputs=tuple(outputs)),
        replace(
            graph,
            inputs=tuple(inputs),
            nodes=tuple(second),
            outputs=tuple(o for o in graph.outputs if o.name in results),
        ),
        frozenset(gradients),
    )
