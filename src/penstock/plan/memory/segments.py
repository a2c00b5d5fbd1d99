"""What of the forward pass may run again, segment by segment: mixtures to choose from.

A storage that is needed (backward reads it, or an operator that runs again) is either kept, for its
bytes, or its operator runs again, for its seconds, and then needs what it reads. For one price of a
second in bytes the best choice is a cheapest cut of a graph:

    source ──inf──► need(s)                  if backward reads s
    need(s) ──bytes(s)──► again(n)           n makes s: cut if s is kept
    again(n) ──price seconds(n)──► sink      cut if n runs again
    again(n) ──inf──► need(s)                n reads s

(Ahuja, Magnanti and Orlin, "Network flows", 1993, section 19.2, on the selection of projects.)

Kept bytes are not the peak: what runs again for a stretch of backward is alive at once. So the
forward pass is first cut into segments, at places that little crosses (`_borders`); what crosses is
kept, and segments choose by themselves: the hull of (bytes, seconds) of each, for all prices
(`_hull`). Then segments go from choice to choice, cheapest first and early ones before late ones,
as what is early runs again when most has been freed (`_mixture`).
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from penstock.plan.memory.mincut import Cut

LONGEST = 400
"""Operators of a segment, above which its cuts take too long (a second each)."""


@dataclass(frozen=True)
class Stored:
    """A storage that forward makes.

    Arguments:
        number: of it; others name it by that.
        num_bytes: that keeping it takes.
        needed: whether backward reads it.
    """

    number: int
    num_bytes: int
    needed: bool


@dataclass(frozen=True)
class Call:
    """An operator of forward that is no view.

    Arguments:
        number: of it.
        makes: storages.
        reads: numbers of storages that forward has made.
        cost: of running it again, in femtoseconds: whole numbers are not rounded.
    """

    number: int
    makes: tuple[Stored, ...]
    reads: tuple[int, ...]
    cost: int


def mixtures(calls: Sequence[Call]) -> list[list[frozenset[int]]]:
    """What may run again.

    Arguments:
        calls: of forward, in order.

    Returns:
        For some lengths of segments, numbers of calls: from none on, each keeping less.
    """
    crossing = _crossing(calls)
    total = sum(stored.num_bytes for call in calls for stored in call.makes if stored.needed)
    found: dict[tuple[int, ...], list[frozenset[int]]] = {}
    for parts in _numbers_of_segments(len(calls)):
        borders = tuple(_borders(calls, crossing, total // parts))
        if borders not in found:
            found[borders] = _mixture(calls, borders)
    return list(found.values())


def _numbers_of_segments(num_calls: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, ... to as many as there are calls; not so few that they are long."""
    for exponent in itertools.count():
        for number in (2**exponent, 3 * 2 ** (exponent - 1)):
            if number > max(1, num_calls):
                return
            if number == int(number) and number * LONGEST >= num_calls:
                yield int(number)


def _crossing(calls: Sequence[Call]) -> list[int]:
    """Bytes that forward has made up to each call, and reads behind it."""
    last = {read: position for position, call in enumerate(calls) for read in call.reads}
    change = [0] * len(calls)
    for position, call in enumerate(calls):
        for stored in call.makes:
            change[position] += stored.num_bytes
            change[last.get(stored.number, position)] -= stored.num_bytes
    return list(itertools.accumulate(change))


def _borders(calls: Sequence[Call], crossing: Sequence[int], longest_bytes: int) -> list[int]:
    """Where to cut into segments that need at most so many bytes each, so that least crosses.

    A segment of one call may need more.

    Returns:
        Positions of calls behind which is cut; the last call's at the end.
    """
    needs = [sum(s.num_bytes for s in call.makes if s.needed) for call in calls]
    inside = list(itertools.accumulate(needs, initial=0))
    # best[i]: bytes that cross and number of segments, of the best way to cut the first i calls.
    best: list[tuple[int, int]] = [(0, 0)]
    before = [0]
    window = deque([0])  # beginnings of the last segment, the best first, each later than the last
    for end in range(1, len(calls) + 1):
        while len(window) > 1 and (
            inside[end] - inside[window[0]] > longest_bytes or end - window[0] > LONGEST
        ):
            window.popleft()
        begin = window[0]
        crosses = crossing[end - 1] if end < len(calls) else 0
        best.append((best[begin][0] + crosses, best[begin][1] + 1))
        before.append(begin)
        while window and best[window[-1]] > best[end]:
            window.pop()
        window.append(end)
    borders = []
    at = len(calls)
    while at:
        borders.append(at - 1)
        at = before[at]
    return borders[::-1]


def _mixture(calls: Sequence[Call], borders: Sequence[int]) -> list[frozenset[int]]:
    """What runs again, as segments go from choice to choice, the cheapest change first."""
    last = {read: position for position, call in enumerate(calls) for read in call.reads}
    changes: list[tuple[float, int, int]] = []
    segments: list[tuple[Sequence[Call], Sequence[_Choice]]] = []
    begin = 0
    for number, border in enumerate(borders):
        own = calls[begin : border + 1]
        begin = border + 1
        later = {s.number for call in own for s in call.makes if last.get(s.number, -1) > border}
        hull = _hull(_abstract(own, later))
        segments.append((own, hull))
        for choice, (more, less) in enumerate(itertools.pairwise(hull), start=1):
            price = (less.cost - more.cost) / (more.kept_bytes - less.kept_bytes)
            changes.append((price, number, choice))

    def again(number: int, choice: int) -> frozenset[int]:
        own, hull = segments[number]
        return frozenset(own[position].number for position in hull[choice].again)

    current = {number: again(number, 0) for number in range(len(segments))}
    mixture = [frozenset[int]().union(*current.values())]
    for _, number, choice in sorted(changes):
        now = again(number, choice)
        mixture.append((mixture[-1] - current[number]) | now)
        current[number] = now
    return mixture


@dataclass(frozen=True)
class _Choice:
    """Of a segment: which of its calls run again, by position; what that keeps and costs."""

    again: frozenset[int]
    kept_bytes: int
    cost: int


_Segment = tuple[Call, ...]
"""Calls whose storages are numbered by themselves; what is read of other segments is left out."""


def _abstract(calls: Sequence[Call], later: Collection[int]) -> _Segment:
    """A segment by itself; equal for equal segments.

    Arguments:
        later: what other segments read. It is kept, and nobody has to ask for it: it gets number
            -1.
    """
    own = {s.number: n for n, s in enumerate(s for call in calls for s in call.makes)}
    return tuple(
        Call(
            position,
            tuple(
                Stored(-1 if s.number in later else own[s.number], s.num_bytes, s.needed)
                for s in call.makes
            ),
            tuple(own[read] for read in call.reads if read in own and read not in later),
            call.cost,
        )
        for position, call in enumerate(calls)
    )


@functools.lru_cache(maxsize=1024)
def _hull(calls: _Segment) -> tuple[_Choice, ...]:
    """The choices that are best at some price, from keeping all to keeping least."""
    total_bytes = sum(stored.num_bytes for call in calls for stored in call.makes)
    total_cost = sum(call.cost for call in calls)

    def between(more: _Choice, less: _Choice) -> Iterator[_Choice]:
        byte_price, cost_price = less.cost - more.cost, more.kept_bytes - less.kept_bytes
        found = _cheapest(calls, byte_price, cost_price)
        line = byte_price * more.kept_bytes + cost_price * more.cost
        if byte_price * found.kept_bytes + cost_price * found.cost < line:
            yield from between(more, found)
            yield found
            yield from between(found, less)

    all_kept = _cheapest(calls, 1, total_bytes + 1)
    least_kept = _cheapest(calls, total_cost + 1, 1)
    if least_kept.kept_bytes >= all_kept.kept_bytes:
        return (all_kept,)
    return all_kept, *between(all_kept, least_kept), least_kept


def _cheapest(calls: _Segment, byte_price: int, cost_price: int) -> _Choice:
    """Minimizes byte_price x bytes + cost_price x cost."""
    storages = 1 + max((s.number for call in calls for s in call.makes), default=-1)
    infinite = 1 + sum(
        cost_price * call.cost + byte_price * sum(s.num_bytes for s in call.makes) for call in calls
    )
    cut = Cut(2 + storages + len(calls))
    for call in calls:
        again = 2 + storages + call.number
        kept_anyway = any(s.number < 0 for s in call.makes)
        cut.pipe(again, 1, infinite if kept_anyway else cost_price * call.cost)
        for read in call.reads:
            cut.pipe(again, 2 + read, infinite)
        for stored in call.makes:
            if stored.number >= 0:
                cut.pipe(2 + stored.number, again, byte_price * stored.num_bytes)
                if stored.needed:
                    cut.pipe(0, 2 + stored.number, infinite)
    side = cut.source_side()
    runs = frozenset(call.number for call in calls if 2 + storages + call.number in side)
    kept = sum(
        stored.num_bytes
        for call in calls
        for stored in call.makes
        if stored.number >= 0 and 2 + stored.number in side and call.number not in runs
    )
    return _Choice(runs, kept, sum(calls[number].cost for number in runs))
