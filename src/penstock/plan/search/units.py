"""Which tensors may be cut between units of several rows: heads, and batches folded with lengths.

    (batch, length, 3 * 16) viewed as (batch, length, 3, 16), and 3 heads split over 2 ranks:
    the 48 numbers are cut between units of 16

The sizes at which a graph's views fold dims are known (`units_of`); but to offer a unit of 16 to
all dims of 48 rows would make the search larger for nothing. So units go from tensor to tensor: a
view that unfolds a dim begins, and an operator that can be split by the units of a tensor passes
them on to those that it reads and gives along the same dim, in either direction. A matrix behind
heads is cut by them along the dim that it sums over, and what it gives is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from penstock.model.graph import Graph, Node
from penstock.plan.costs.routes import plain
from penstock.plan.layout import B, Placement, S, possible
from penstock.plan.rules.formula import Signature, Units
from penstock.plan.rules.signatures import signatures, units_of
from penstock.plan.rules.views import VIEWS

_Cut = tuple[str, Placement]
"""A tensor and how it is cut."""


def of_sizes(graph: Graph, sizes: Sequence[int]) -> Units:
    """`units_of`, without those that make no difference on any axis."""
    found = {
        size: tuple(unit for unit in units if _matters(size, unit, sizes))
        for size, units in units_of(graph, sizes).items()
    }
    return {size: units for size, units in found.items() if units}


def of_tensors(
    graph: Graph, sizes: Sequence[int], units: Units
) -> Mapping[str, tuple[Placement, ...]]:
    """By tensor, the placements with units above 1 in which it may lie.

    Arguments:
        sizes: of the mesh's axes.
        units: as `of_sizes` finds them.
    """
    if not units:
        return {}
    ways: list[frozenset[_Cut]] = []
    found: set[_Cut] = set()
    for node in graph.nodes:
        for signature in {s: None for p in sizes for s in signatures(node, graph.specs, p, units)}:
            cut = _cut(node, signature)
            if any(placement.unit > 1 for _, placement in cut):
                whole = {each for each in cut if each[1].unit == 1}
                ways.append(cut - whole)
                if node.op in VIEWS and whole:
                    found |= cut - whole
    of: dict[_Cut, list[frozenset[_Cut]]] = {}
    for way in ways:
        for each in way:
            of.setdefault(each, []).append(way)
    waiting = sorted(found)
    while waiting:
        for way in of[waiting.pop()]:
            waiting += way - found
            found |= way
    placements: dict[str, list[Placement]] = {}
    for name, placement in sorted(found):
        placements.setdefault(name, []).append(placement)
    return {name: tuple(of_one) for name, of_one in placements.items()}


def _matters(size: int, unit: int, sizes: Sequence[int]) -> bool:
    """Whether a dim can be cut so that it is not the same without the unit."""
    layouts = itertools.product((B, S(0, unit)), repeat=len(sizes))
    return any(
        possible((size,), layout, sizes) and any(p.unit > 1 for p in plain((size,), layout, sizes))
        for layout in layouts
    )


def _cut(node: Node, signature: Signature) -> frozenset[_Cut]:
    """What a signature cuts."""
    lying = [*zip(node.inputs, signature.inputs), *zip(node.outputs, signature.outputs)]
    return frozenset((name, p) for name, p in lying if name and p and p.is_split)
