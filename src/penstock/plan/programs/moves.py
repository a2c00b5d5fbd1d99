"""One hop of a way, as a rank carries it out: which box of which tensor comes from whom.

Ranks i and j of a line have a tensor in boxes that the layouts before and after the hop give them,
A_i and A'_i of the whole tensor. What a rank j needs of a rank i is

    S -> B, S -> S    A_i and A'_j's intersection        all_gather, all_to_all
    P -> S            A'_j, summed over all i            reduce_scatter
    P -> B            all, summed over all i             all_reduce
    B -> S            A'_j, its own                      slice
    B -> P            all of it on the first rank, and zeros on the others
    S -> P            its own, in zeros

A hop along an axis of one rank changes the layout's name and nothing else. A hop on an axis while
another axis further inside splits the same dim moves boxes that lie otherwise: then what a rank
needs is not on its line, which is an error here and a way that `routes` never takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from penstock.errors import PlanError
from penstock.plan.costs.routes import LOCAL, Hop
from penstock.plan.costs.routes import after as behind
from penstock.plan.layout import Coordinates, Layout, in_words, part
from penstock.plan.programs.program import Box, Kind, Local, Move, box_shape


def exchange_of(hop: Hop, sizes: Sequence[int]) -> Kind | None:
    """The collective that a hop takes; None where it takes none."""
    if sizes[hop.axis] == 1 or hop.kind in LOCAL:
        return None
    return cast("Kind", hop.kind)


def local_hop(
    names: tuple[str, str],
    shape: Sequence[int],
    before: Layout,
    hop: Hop,
    sizes: Sequence[int],
    coordinates: Coordinates,
) -> Local:
    """A hop that takes no collective.

    Arguments:
        names: of the value before the hop, and behind it.
        shape: of the whole tensor.
        before: the layout before it.

    Raises:
        PlanError: this rank does not have what it needs.
    """
    after = behind(before, hop)
    own, new = part(shape, before, sizes, coordinates), part(shape, after, sizes, coordinates)
    if hop.kind == "keep" and coordinates[hop.axis] > 0:
        return Local("zeros", *names)
    if own == new:
        return Local("same", *names)
    if hop.kind == "pad":
        return Local("place", *names, box=_within(own, new, names, before, after))
    return Local("slice", *names, box=_within(new, own, names, before, after))


def exchange_hop(
    names: tuple[str, str],
    shape: Sequence[int],
    before: Layout,
    hop: Hop,
    sizes: Sequence[int],
    coordinates: Coordinates,
) -> Move:
    """A hop that takes a collective: see `local_hop`."""
    after, axis = behind(before, hop), hop.axis
    line = [(*coordinates[:axis], index, *coordinates[axis + 1 :]) for index in range(sizes[axis])]
    olds = [part(shape, before, sizes, at) for at in line]
    news = [part(shape, after, sizes, at) for at in line]
    own, new = part(shape, before, sizes, coordinates), part(shape, after, sizes, coordinates)
    match hop.kind:
        case "all_reduce":
            return Move(*names)
        case "reduce_scatter":
            return Move(*names, sends=tuple(_within(n, own, names, before, after) for n in news))
        case "all_gather":
            receives = tuple(_within(old, new, names, before, after) for old in olds)
            _check_whole(receives, new, names, before, after)
            return Move(*names, receives=receives)
        case _:
            sends = tuple(_shared(own, there, own) for there in news)
            receives = tuple(_shared(old, new, new) for old in olds)
            _check_whole(receives, new, names, before, after)
            return Move(*names, sends=sends, receives=receives)


def _shared(one: Box, other: Box, outer: Box) -> Box:
    """The intersection, as it lies in `outer`; where there is none, an empty box."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    if any(start >= stop for start, stop in common):
        return ((0, 0),) * len(common)
    return tuple((a - c, b - c) for (a, b), (c, _) in zip(common, outer, strict=True))


def _within(box: Box, outer: Box, names: tuple[str, str], before: Layout, after: Layout) -> Box:
    if any(a < c or b > d for (a, b), (c, d) in zip(box, outer, strict=True)):
        raise _elsewhere(names, before, after)
    return _shared(box, outer, outer)


def _check_whole(
    boxes: Sequence[Box], whole: Box, names: tuple[str, str], before: Layout, after: Layout
) -> None:
    """Boxes of one line do not overlap, so that they are the whole if they have its size."""
    size = sum(math.prod(box_shape(box)) for box in boxes)
    if size != math.prod(box_shape(whole)):
        raise _elsewhere(names, before, after)


def _elsewhere(names: tuple[str, str], before: Layout, after: Layout) -> PlanError:
    return PlanError(
        f"{names[0]} from {in_words(before)} to {in_words(after)} in one hop: what a rank needs is "
        "not on its line",
        hint="an axis further inside splits the same dim: hop on that one first",
    )
