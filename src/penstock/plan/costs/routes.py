"""`Routes`: the cheapest way from one layout of a tensor to another, and what it costs.

A way is a chain of hops, each a change of placement along one axis of the mesh, made by all lines
of that axis at the same time. For an axis of p ranks, n bytes of a local part, of which the busiest
rank sends:

    P -> B     all_reduce       2 (p - 1) / p  n     n: of what each brings
    P -> S     reduce_scatter     (p - 1) / p  n     n: of what each brings
    S -> B     all_gather         (p - 1) / p  n     n: of what each ends up with
    S -> S'    all_to_all         (p - 1) / p  n     n: of a part; S(d, u) -> S(d, v) sends less
    B -> S     slice              nothing            each keeps its part
    B -> P     keep               nothing            the first keeps it, the others take zeros
    S -> P     pad                nothing            its part among zeros

(n is of the largest part; of uneven parts it is counted which rank sends most.) The price of a hop:

    min over topologies t of  exchange.cost.costs(line, t, n)              `Line.price`
    + bytes read and written by copies / memory_bytes_per_s + operator_s   `_copies`

where copies are those of local hops, and those that bring a split dim other than the first to
where the exchange wants it. The cheapest chain is Dijkstra's over the layouts that can be
(`possible`), with ties to the fewer hops. Since outer axes split first, no hop is made on an axis
along a dim that an inner axis splits. P is entered only where the target has it: on the way it
would make sums of what is none.
"""

from __future__ import annotations

import functools
import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from penstock.errors import UserError
from penstock.exchange.cost import ADDING, Link, Links, Sums, candidates, costs
from penstock.exchange.pattern import Hosts
from penstock.plan.costs.hardware import Cluster
from penstock.plan.layout import (
    B,
    Layout,
    P,
    Placement,
    S,
    cut,
    everyone,
    largest_shape,
    line,
    plain_unit,
    possible,
)

Kind = Literal[
    "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "slice", "keep", "pad"
]  # fmt: skip
LOCAL = ("slice", "keep", "pad")
"""The kinds of hops in which nothing is sent."""

_SIZES_BYTES = (0, *(1 << bit for bit in range(6, 41, 2)))
"""Where lines are priced; between them linearly, as almost all topologies' times are."""

_HOP_S = 1e-9
"""What a hop more must save. An all-reduce may be its two halves at the same price, to rounding."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Hop:
    """A change of placement along one axis."""

    axis: int
    source: Placement
    target: Placement

    @property
    def kind(self) -> Kind:
        """What makes it."""
        if self.source == P:
            return "all_reduce" if self.target == B else "reduce_scatter"
        if self.source == B:
            return "keep" if self.target == P else "slice"
        if self.target == P:
            return "pad"
        return "all_gather" if self.target == B else "all_to_all"


@dataclass(frozen=True)
class Way:
    """A chain of hops.

    Arguments:
        cost_s: of all.
        hops: in order; none where the layouts are the same.
        sent_bytes: by the rank that sends most.
    """

    cost_s: float
    hops: tuple[Hop, ...]
    sent_bytes: int


def after(layout: Layout, hop: Hop) -> Layout:
    """The layout that a hop makes of one."""
    return (*layout[: hop.axis], hop.target, *layout[hop.axis + 1 :])


def layouts(source: Layout, hops: Iterable[Hop]) -> Iterator[Layout]:
    """The layout after each hop."""
    for hop in hops:
        source = after(source, hop)
        yield source


def plain(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> Layout:
    """The same layout with unit 1 wherever the unit makes no difference."""
    found, left, even = [], list(shape), [True] * len(shape)
    for placement, parts in zip(layout, sizes, strict=True):
        dim, unit = placement
        if placement.is_split and dim < len(left):
            if even[dim]:
                unit = plain_unit(left[dim], parts, unit)
            units = left[dim] // unit
            even[dim] = even[dim] and units % parts == 0
            left[dim] = unit * -(-units // parts)
            placement = S(dim, unit)
        found.append(placement)
    return tuple(found)


class Line:
    """The ranks of an axis, and what collectives among them cost.

    Arguments:
        links: of the ranks of such lines; several where lines are not alike: the slowest counts.
    """

    def __init__(self, links: Sequence[Links]) -> None:
        self._links = links
        self._curves: dict[tuple[str, Sums], tuple[_Piece, ...]] = {}

    def price(self, kind: Kind, num_bytes: float, itemsize: int = 4) -> float:
        """Seconds of a collective for a buffer of so many bytes on each rank.

        An all-to-all is one step like that of the direct all-gather: each has a chunk for each. Two
        bytes are taken for half precision, of which the communicator asks that it be added at once.
        """
        if self._links[0].world_size == 1 or kind in LOCAL:
            return 0.0
        sums: Sums = "any" if kind not in ADDING else "once" if itemsize == 2 else "exact"
        curve = self._curves.get((kind, sums))
        if curve is None:
            curve = self._curves[kind, sums] = self._curve(kind, sums)
        piece = curve[bisect_right(_SIZES_BYTES, num_bytes) - 1]
        return max(min(a + b * num_bytes for a, b in one) for one in piece)

    def _curve(self, kind: Kind, sums: Sums) -> tuple[_Piece, ...]:
        found = []
        for links in self._links:
            if kind == "all_to_all":
                found.append([_times(links, "all_gather", "direct")])
            else:
                names = self._topologies(links, kind, sums)
                found.append([_times(links, kind, name) for name in names])
        return tuple(
            tuple(
                _lowest([_through(times, number) for times in topologies], number)
                for topologies in found
            )
            for number in range(len(_SIZES_BYTES))
        )

    @staticmethod
    def _topologies(links: Links, kind: Kind, sums: Sums) -> tuple[str, ...]:
        names = candidates(links.hosts, kind, sums)
        if len(links.hosts) in (1, links.world_size):
            # Where all links are alike, "direct" has the bytes of "ring", and its messages at once.
            names = tuple(name for name in names if name != "ring")
        return names


@functools.lru_cache(maxsize=1024)
def _times(links: Links, collective: str, topology: str) -> tuple[float, ...]:
    """Seconds at `_SIZES_BYTES`; those of 4,096 ranks take seconds to find."""
    return tuple(costs(links, collective, topology, _SIZES_BYTES).tolist())


_Piece = tuple[tuple[tuple[float, float], ...], ...]
"""Between two of `_SIZES_BYTES`, by links, the topologies that may cost least: a + b bytes."""


def _through(times: Sequence[float], number: int) -> tuple[float, float]:
    """a and b of the straight line from a size on; beyond the last, on from the last two."""
    low = min(number, len(_SIZES_BYTES) - 2)
    size, further = _SIZES_BYTES[low], _SIZES_BYTES[low + 1]
    slope = (times[low + 1] - times[low]) / (further - size)
    return times[low] - slope * size, slope


def _lowest(
    straight: Sequence[tuple[float, float]], number: int
) -> tuple[tuple[float, float], ...]:
    """Those of which no other is below at both ends, so that one of them is the lowest anywhere."""
    start = _SIZES_BYTES[number]
    stop = _SIZES_BYTES[number + 1] if number + 1 < len(_SIZES_BYTES) else 1 << 60
    ends = sorted({(a + b * start, a + b * stop): (a, b) for a, b in straight}.items())
    kept, best = [], math.inf
    for (_, at_stop), one in ends:
        if at_stop < best:
            kept.append(one)
            best = at_stop
    return tuple(kept)


class Routes:
    """Ways on a mesh over a cluster.

    Arguments:
        cluster: whose links and memory ways are priced on.
        sizes: of the mesh's axes, outermost first; ranks fill one host after the other.

    Raises:
        UserError: there are more ranks than devices.
    """

    def __init__(self, cluster: Cluster, sizes: Sequence[int]) -> None:
        self.cluster, self.sizes = cluster, tuple(sizes)
        ranks = math.prod(self.sizes)
        if not self.sizes or min(self.sizes) < 1 or ranks > cluster.ranks:
            raise UserError(
                f"a mesh of {' x '.join(map(str, self.sizes))} ranks on {cluster.hosts} hosts of "
                f"{cluster.devices} devices",
                hint=f"at most {cluster.ranks} ranks; by default {cluster.mesh}",
            )
        self.lines = tuple(Line(self._links(axis)) for axis in range(len(self.sizes)))
        self._maps: dict[tuple[Shape, int, tuple[Placement, ...]], _Map] = {}
        self._ways: dict[tuple[Shape, int, Layout, Layout], Way | None] = {}

    def way(
        self, shape: Sequence[int], itemsize: int, source: Layout, target: Layout
    ) -> Way | None:
        """The cheapest way; None where the tensor cannot lie in one of the layouts.

        Arguments:
            shape: of the whole tensor.
            itemsize: bytes of an element.
        """
        key = (tuple(shape), itemsize, source, target)
        try:
            return self._ways[key]
        except KeyError:
            self._ways[key] = found = self._find(*key)
            return found

    def _find(self, shape: Shape, itemsize: int, source: Layout, target: Layout) -> Way | None:
        if not all(possible(shape, layout, self.sizes) for layout in (source, target)):
            return None
        source, target = (plain(shape, layout, self.sizes) for layout in (source, target))
        # Layouts of a unit are on the map only where an end has it: what is found must not depend
        # on what was looked for before.
        extra = tuple(sorted({p for p in (*source, *target) if p.unit != 1}))
        place = self._maps.get((shape, itemsize, extra))
        if place is None:
            place = _Map(self, shape, itemsize, extra)
            self._maps[shape, itemsize, extra] = place
        return place.way(source, target)

    def _links(self, axis: int) -> list[Links]:
        """Of the lines of an axis, each kind once.

        A host's link to the others is shared by the lines that pass through it at the same time.
        """
        devices, cluster = self.cluster.devices, self.cluster
        found: dict[Hosts, list[tuple[int, ...]]] = {}
        firsts = (c for c in everyone(self.sizes) if c[axis] == 0)
        for ranks in (line(self.sizes, axis, first) for first in firsts):
            by_host: dict[int, list[int]] = {}
            for number, rank in enumerate(ranks):
                by_host.setdefault(rank // devices, []).append(number)
            hosts = tuple(map(tuple, by_host.values()))
            found.setdefault(hosts, []).append(tuple(by_host))
        lines_of = np.zeros(cluster.hosts, np.int64)
        for hosts, many in found.items():
            if len(hosts) > 1:
                np.add.at(lines_of, np.array(many).ravel(), 1)
        sharing = max(1, int(lines_of.max()))
        far = Link(cluster.far.latency_s, cluster.far.bytes_per_s / sharing, cluster.far.message_s)
        adding = cluster.device.memory_bytes_per_s / 3  # reads two, writes one
        return [Links(hosts, cluster.near, far, adding) for hosts in sorted(found)]


class _Map:
    """All hops between the layouts of tensors of one shape and item size."""

    def __init__(
        self, routes: Routes, shape: Shape, itemsize: int, extra: Sequence[Placement]
    ) -> None:
        self._lines, self._sizes, self._shape = routes.lines, routes.sizes, shape
        self._itemsize, self._device = itemsize, routes.cluster.device
        self._placements = (B, P, *(S(dim) for dim in range(len(shape))), *extra)
        self._next: dict[Layout, list[tuple[float, Hop, Layout]]] = {}
        self._trees: dict[tuple[Layout, tuple[int, ...]], _Tree] = {}

    def way(self, source: Layout, target: Layout) -> Way:
        """The cheapest."""
        partial = tuple(axis for axis, placement in enumerate(target) if placement == P)
        tree = self._trees.get((source, partial))
        if tree is None:
            tree = self._trees[source, partial] = self._search(source, frozenset(partial))
        hops: list[Hop] = []
        layout = target
        while layout != source:
            _, hop, layout = tree[layout]
            hops.append(hop)
        hops.reverse()
        total_s, sent_bytes = 0.0, 0
        for hop in hops:
            step_s, sent = self._price(layout, hop)
            total_s, sent_bytes, layout = total_s + step_s, sent_bytes + sent, after(layout, hop)
        return Way(total_s, tuple(hops), sent_bytes)

    def _search(self, source: Layout, partial: frozenset[int]) -> _Tree:
        """The cheapest last hop to every layout; into P along these axes only."""
        done: _Tree = {}
        numbers = {source: 0}
        best = {source: (0.0, 0)}
        queue: list[tuple[float, int, int, Layout, Hop | None, Layout]] = [
            (0.0, 0, 0, source, None, source)
        ]
        seen: set[Layout] = set()
        while queue:
            cost_s, hops, _, layout, hop, before = heapq.heappop(queue)
            if layout in seen:
                continue
            seen.add(layout)
            if hop is not None:
                done[layout] = (cost_s, hop, before)
            for step_s, step, reached in self._hops(layout):
                if reached in seen or (step.target == P and step.axis not in partial):
                    continue
                found = (cost_s + step_s + _HOP_S, hops + 1)
                if found < best.get(reached, (math.inf, 0)):
                    best[reached] = found
                    number = numbers.setdefault(reached, len(numbers))
                    heapq.heappush(queue, (*found, number, reached, step, layout))
        return done

    def _hops(self, layout: Layout) -> list[tuple[float, Hop, Layout]]:
        """From a layout: cost, hop, and the layout reached."""
        found = self._next.get(layout)
        if found is None:
            found = self._next[layout] = []
            for axis, source in enumerate(layout):
                inside = {p.dim for p in layout[axis + 1 :] if p.is_split}
                if source.dim in inside:
                    continue
                for target in self._placements:
                    if target == source or target.dim in inside:
                        continue
                    hop = Hop(axis, source, target)
                    reached = after(layout, hop)
                    if self._can_be(reached):
                        found.append((self._price(layout, hop)[0], hop, reached))
        return found

    def _can_be(self, layout: Layout) -> bool:
        """Whether the tensor can lie so, and it is not another layout in other words."""
        shape, sizes = self._shape, self._sizes
        return possible(shape, layout, sizes) and layout == plain(shape, layout, sizes)

    def _price(self, layout: Layout, hop: Hop) -> tuple[float, int]:
        """Seconds, and bytes that the busiest rank sends."""
        parts = self._sizes[hop.axis]
        if parts == 1:
            return 0.0, 0
        whole, before, following = (
            largest_shape(self._shape, after(layout, Hop(hop.axis, B, placement)), self._sizes)
            for placement in (B, hop.source, hop.target)
        )
        sent, buffer = _traffic(whole, hop, parts)
        touched, copies = _copies(whole, before, following, hop)
        device = self._device
        cost_s = touched * self._itemsize / device.memory_bytes_per_s + copies * device.operator_s
        cost_s += self._lines[hop.axis].price(hop.kind, buffer * self._itemsize, self._itemsize)
        return cost_s, sent * self._itemsize


_Tree = dict[Layout, tuple[float, Hop, Layout]]
"""To each layout: what it costs to be there, the last hop, and from where."""


def _traffic(whole: Shape, hop: Hop, parts: int) -> tuple[int, float]:
    """Elements that the busiest rank sends, and those of the buffer by which the hop is priced.

    Arguments:
        whole: the shape of what the line has together.

    The price is of parts that are equal, and as large as the largest: the slowest rank counts.
    """
    numel, (dim, unit), (to, to_unit) = math.prod(whole), hop.source, hop.target
    match hop.kind:
        case "all_reduce":
            return -(-2 * (parts - 1) * numel // parts), numel
        case "reduce_scatter":
            rest = numel // whole[to]
            least, most = _ends(whole[to], to_unit, parts)
            return (whole[to] - least) * rest, parts * most * rest
        case "all_gather":
            rest = numel // whole[dim]
            most = _ends(whole[dim], unit, parts)[1]
            return (parts - 1) * most * rest, parts * most * rest
        case "all_to_all" if dim == to:
            moved = _moved(whole[dim], unit, to_unit, parts) * (numel // whole[dim])
            return moved, moved * parts / (parts - 1)
        case "all_to_all":
            rest = numel // whole[dim] // whole[to]
            sent = _given(whole[dim], unit, whole[to], to_unit, parts)
            chunk = _ends(whole[dim], unit, parts)[1] * _ends(whole[to], to_unit, parts)[1]
            return sent * rest, parts * chunk * rest
    return 0, 0.0


def _copies(whole: Shape, before: Shape, following: Shape, hop: Hop) -> tuple[int, int]:
    """Elements that copies read and write, and the number of copies.

    Exchanges give and take parts one after the other, as those of the first dim lie. Those of a
    later dim are packed before, or put in their places afterwards.
    """
    old, new = math.prod(before), math.prod(following)
    match hop.kind:
        case "slice":
            return 2 * new, 1
        case "keep":
            return new, 1
        case "pad":
            return new + 2 * old, 2
    packs = hop.target.is_split and not _leads(whole, hop.target.dim)
    places = hop.source.is_split and not _leads(whole, hop.source.dim)
    return 2 * (old * packs + new * places), packs + places


def _leads(shape: Shape, dim: int) -> bool:
    """Whether parts along a dim lie one after the other in memory."""
    return math.prod(shape[:dim]) == 1


def _ends(size: int, unit: int, parts: int) -> tuple[int, int]:
    """The smallest and the largest part of a dim."""
    units = size // unit
    return unit * (units // parts), unit * -(-units // parts)


@functools.lru_cache(maxsize=4096)
def _given(size: int, unit: int, to_size: int, to_unit: int, parts: int) -> int:
    """What the busiest rank of an all-to-all gives away: its part of a dim, but for the part of
    the other dim that it keeps."""
    most = 0
    for index in range(parts):
        start, stop = cut(0, size, parts, index, unit)
        to_start, to_stop = cut(0, to_size, parts, index, to_unit)
        most = max(most, (stop - start) * (to_size - (to_stop - to_start)))
    return most


@functools.lru_cache(maxsize=4096)
def _moved(size: int, unit: int, to_unit: int, parts: int) -> int:
    """What the busiest rank gives away where a dim is cut between other units."""
    most = 0
    for index in range(parts):
        start, stop = cut(0, size, parts, index, unit)
        to_start, to_stop = cut(0, size, parts, index, to_unit)
        most = max(most, stop - start - max(0, min(stop, to_stop) - max(start, to_start)))
    return most
