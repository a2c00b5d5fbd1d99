"""Views: the same numbers in the same order, under another shape.

Shapes are cut into groups of dims with as many numbers each, as small as can be:

    (4, 6, 3, 5) viewed as (24, 15):  (4, 6) is (24), (3, 5) is (15)

In a group only the outermost dim can be split (that of more than one row), for then each part is a
range of the group's numbers. With n rows of `inner` numbers each, cut by units of u rows, it is cut
by units of u * inner numbers, which must be whole rows of the other shape:

    S(i, u)  <->  S(o, u * inner_i / inner_o)

Units above 1 are written only where they matter (see `layout`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from penstock.model.graph import Graph, Node
from penstock.plan.layout import P, S, cut
from penstock.plan.rules.formula import Signature, Specs, Units

VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default",
        "squeeze.default", "squeeze.dim", "squeeze.dims",
    )
)  # fmt: skip
"""The operators that are views in this sense."""

Group = tuple[tuple[int, ...], tuple[int, ...]]
"""Dims of the one and of the other shape."""


def groups(one: Sequence[int], other: Sequence[int]) -> tuple[Group, ...]:
    """The groups of two shapes of as many numbers, at least one; dims of size 1 are in none."""
    left = [dim for dim, size in enumerate(one) if size != 1]
    right = [dim for dim, size in enumerate(other) if size != 1]
    found = []
    while left and right:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        while (a := _size(one, ours)) != (b := _size(other, theirs)):
            if a < b:
                ours.append(left.pop(0))
            else:
                theirs.append(right.pop(0))
        found.append((tuple(ours), tuple(theirs)))
    return tuple(found)


def _size(shape: Sequence[int], dims: Sequence[int]) -> int:
    return math.prod(shape[dim] for dim in dims)


def signatures(node: Node, specs: Specs, parts: int, units: Units) -> Iterator[Signature]:
    """Those of a view on an axis of so many ranks, without the one of B alone."""
    for fold in _folds(node, specs):
        pairs = set()
        for unit in (1, *units.get(fold.one, ())):
            other = fold.across(unit, parts, units)
            if other is not None:
                pairs.add((unit, other))
        for unit in (1, *units.get(fold.other, ())):
            other = fold.turned().across(unit, parts, units)
            if other is not None:
                pairs.add((other, unit))
        for unit, other in sorted(pairs):
            yield Signature((S(fold.dim, unit),), (S(fold.other_dim, other),))
    yield Signature((P,), (P,))


def agrees(node: Node, specs: Specs, chosen: Sequence[Signature], sizes: Sequence[int]) -> bool:
    """Whether a view's parts on a mesh are the same numbers in both shapes.

    On each axis by itself they are. Where several axes split one dim, what is cut by a unit of 1
    on the outer axis may be uneven on the inner.
    """
    for fold in _folds(node, specs):
        chain = tuple(
            (parts, signature.inputs[0].unit, output.unit)
            for parts, signature in zip(sizes, chosen, strict=True)
            if (output := signature.outputs[0]) is not None
            and output == S(fold.other_dim, output.unit)
        )
        if len(chain) > 1 and not _cut_alike(fold, chain):
            return False
    return True


def units_of(graph: Graph, sizes: Sequence[int]) -> Units:
    """The units by which dims of a graph may be cut, as its views make them.

    (batch, length) viewed as (batch * length) and split by batch has units of `length` rows; they
    are of no account where the ranks of the mesh divide the batch.
    """
    ranks = math.prod(sizes)
    found: dict[int, set[int]] = {}
    folds = {fold for node in graph.nodes if node.op in VIEWS for fold in _folds(node, graph.specs)}
    both = sorted(folds | {fold.turned() for fold in folds})
    grown = True
    while grown:
        grown = False
        for fold in both:
            for unit in (1, *found.get(fold.one, ())):
                other, rest = divmod(unit * fold.inner, fold.other_inner)
                known = found.setdefault(fold.other, set())
                if not rest and other > 1 and other not in known:
                    many = fold.other // other
                    if many >= min(sizes) and many % ranks:
                        known.add(other)
                        grown = True
    return {size: tuple(sorted(units)) for size, units in sorted(found.items()) if units}


class Fold(NamedTuple):
    """A group by its outermost dims.

    Arguments:
        dim, one, inner: of the one shape: the dim, its rows, the numbers of a row.
        other_dim, other, other_inner: of the other shape.
    """

    dim: int
    one: int
    inner: int
    other_dim: int
    other: int
    other_inner: int

    def turned(self) -> Fold:
        return Fold(*self[3:], *self[:3])

    def across(self, unit: int, parts: int, units: Units) -> int | None:
        """What a unit of the one shape is in the other; None where parts are not whole rows."""
        if self.one % unit or self.one // unit < parts:
            return None
        other, rest = divmod(unit * self.inner, self.other_inner)
        if rest == 0:
            matters = other in units.get(self.other, ()) or self.other // other % parts
            return other if matters else 1
        even = self.one // unit % parts == 0 and self.other % parts == 0
        return 1 if even else None


def _folds(node: Node, specs: Specs) -> tuple[Fold, ...]:
    (source,), (target,) = node.inputs, node.outputs
    assert target is not None
    return _folded(specs[source].shape, specs[target].shape)


@functools.cache
def _folded(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[Fold, ...]:
    if math.prod(one) == 0:
        return ()
    return tuple(
        Fold(ours[0], one[ours[0]], _size(one, ours[1:]),
             theirs[0], other[theirs[0]], _size(other, theirs[1:]))
        for ours, theirs in groups(one, other)
    )  # fmt: skip


@functools.cache
def _cut_alike(fold: Fold, chain: tuple[tuple[int, int, int], ...]) -> bool:
    """Whether parts have the same numbers, cut along some axes by a unit in either shape."""
    ranges = {((0, fold.one), (0, fold.other))}
    for parts, unit, other in chain:
        ranges = {
            (cut(*ours, parts, index, unit), cut(*theirs, parts, index, other))
            for ours, theirs in ranges
            for index in range(parts)
        }
    return all(
        tuple(edge * fold.inner for edge in ours)
        == tuple(edge * fold.other_inner for edge in theirs)
        for ours, theirs in ranges
    )
