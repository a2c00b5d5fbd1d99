"""Assignments by hand: how inputs lie is said, and every node takes what costs least from there.

They need no search, and are as odd as a test wants them: what must be right is right for any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from penstock.exchange.cost import Link
from penstock.model.graph import Graph, Input, Node
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, Layout, P, Placement, S, largest_shape, possible
from penstock.plan.rules.signatures import Signature, combinations

Style = Literal["data", "zero", "model", "mixed"]
STYLES: tuple[Style, ...] = get_args(Style)
"""`data`: the batch is split, and updates are made by all. `zero`: parameters and state, too, by
rows. `model`: parameters by rows and by columns in turn, and the batch copied. `mixed`, for several
axes: the batch on the first axis, parameters by rows and columns on the others."""

BYTES_PER_S = 1e9
"""What is read and written; low beside the links, so that work is split rather than spared routes.
"""


def cluster(sizes: Sequence[int]) -> Cluster:
    """One host with a device for each rank of a mesh."""
    device = Device("of a test", {"float32": 1e9}, BYTES_PER_S, 1 << 34, 0.0)
    link = Link(latency_s=1e-9, bytes_per_s=1e11)
    return Cluster(1, math.prod(sizes), device, link, link)


def styled(graph: Graph, sizes: Sequence[int], style: Style) -> Assignment:
    """An assignment of one of `STYLES`."""
    turn = iter(range(len(graph.inputs)))

    def wanted(item: Input) -> Layout:
        axes = len(sizes)
        if item.role == "data":
            batch, rest = {"model": (0, axes), "mixed": (1, axes - 1)}.get(style, (axes, 0))
            return (S(0),) * batch + (B,) * rest
        if style == "data" or item.role not in ("parameter", "state"):
            return (B,) * axes
        if style == "zero":
            return (S(0),) * axes
        dim = next(turn) % 2 if item.role == "parameter" else 0
        return tuple(B if style == "mixed" and axis == 0 else S(dim) for axis in range(axes))

    inputs = {
        item.name: _fitting(graph.specs[item.name].shape, wanted(item), sizes)
        for item in graph.inputs
    }
    by_all: Style = "data"
    return greedy(graph, sizes, inputs, lambda n, _: style != by_all or n.phase != "update")


def greedy(
    graph: Graph,
    sizes: Sequence[int],
    inputs: Mapping[str, Layout],
    allowed: Callable[[Node, tuple[Signature, ...]], bool] = lambda node, chosen: True,
) -> Assignment:
    """Each node, in order, takes the signatures that cost least: the ways to it, its work on the
    largest part, and, for new values, the ways to where the old ones lie.

    Arguments:
        inputs: layouts, by name; copied where there is none.
        allowed: which of a node's signatures may be taken, beside the first.
    """
    routes, copied = Routes(cluster(sizes), sizes), (B,) * len(sizes)
    lying: dict[str, Layout] = {i.name: inputs.get(i.name, copied) for i in graph.inputs}
    becomes = {
        output.name: lying[graph.input(output.role, output.target).name]
        for output in graph.outputs
        if output.role in ("parameter", "buffer", "state")
    }
    nodes: dict[str, tuple[Signature, ...]] = {}

    def way_s(name: str, source: Layout, target: Layout) -> float:
        spec = graph.specs[name]
        way = routes.way(spec.shape, spec.dtype.itemsize, source, target)
        return math.inf if way is None else way.cost_s

    def cost_s(node: Node, chosen: tuple[Signature, ...]) -> float:
        total = 0.0
        for number, name in enumerate(node.inputs):
            target = tuple(of.inputs[number] for of in chosen)
            total += way_s(name, lying[name], target) + _work_s(graph, name, target, sizes)
        for number, output in enumerate(node.outputs):
            if output is not None:
                layout = _layout([of.outputs[number] for of in chosen])
                total += _work_s(graph, output, layout, sizes)
                if output in becomes:
                    total += way_s(output, layout, becomes[output])
        return total

    for node in graph.nodes:
        first, *others = combinations(node, graph.specs, sizes)
        ways = [first, *(chosen for chosen in others if allowed(node, chosen))]
        best = min(ways, key=lambda chosen: cost_s(node, chosen))
        nodes[node.name] = best
        for number, output in enumerate(node.outputs):
            if output is not None:
                lying[output] = _layout([of.outputs[number] for of in best])
    return Assignment(tuple(sizes), dict(inputs), nodes)


def _fitting(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> Layout:
    """The layout, with B on as many axes, from the last on, as the shape is too small for."""
    for kept in range(len(layout), -1, -1):
        found = layout[:kept] + (B,) * (len(layout) - kept)
        if possible(shape, found, sizes):
            return found
    return (B,) * len(layout)


def _layout(placements: Sequence[Placement | None]) -> Layout:
    return tuple(P if placement is None else placement for placement in placements)


def _work_s(graph: Graph, name: str, layout: Layout, sizes: Sequence[int]) -> float:
    spec = graph.specs[name]
    return math.prod(largest_shape(spec.shape, layout, sizes)) * spec.dtype.itemsize / BYTES_PER_S
