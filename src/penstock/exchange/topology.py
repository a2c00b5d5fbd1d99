"""`Schedule`: what one rank sends, receives and adds in a collective, step by step.

    schedule    one rank's ends of the messages of a topology (penstock.exchange.pattern)
    exact       whether its sums have the bits of the fixed tree
    at_once     whether they are made in one place
    validate    whether the schedules of all ranks fit together
    follow      carries them out in one process

All of it is pure: whoever carries a schedule out gives the same as `follow`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations, groupby

import numpy as np
import torch

from penstock.exchange import tree
from penstock.exchange.pattern import HIERARCHICAL, Hosts, by_first_rank, pattern


@dataclass(frozen=True)
class Send:
    """The chunks [first, last) of the own buffer, as they were before the step, go to `peer`."""

    peer: int
    first: int
    last: int


@dataclass(frozen=True)
class Receive:
    """The chunks [first, last) come from `peer`, and are added to the own, or copied over them.

    What is added to one range in one step is combined at once with the own chunks, in order of
    rank, along the fixed tree over the ranks that take part.
    """

    peer: int
    first: int
    last: int
    reduce: bool


@dataclass(frozen=True)
class Step:
    """What one rank does before it goes on: at most one message to and one from each peer."""

    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]

    @property
    def overlaps(self) -> bool:
        """Whether what comes falls upon what is sent, which must be kept until it has gone."""
        return any(_overlap(send, receive) for send in self.sends for receive in self.receives)


@dataclass(frozen=True)
class Schedule:
    """One rank's part in a collective, over a buffer in `chunks` parts.

    All ranks have the same number of steps; a rank may have nothing to do in one.
    """

    chunks: int
    steps: tuple[Step, ...]

    def elements(self, part: Send | Receive, length: int) -> slice:
        """Where these chunks lie in a buffer of `length` elements cut into parts equal within 1."""
        return slice(length * part.first // self.chunks, length * part.last // self.chunks)


@lru_cache(maxsize=256)
def schedule(
    collective: str,
    topology: str,
    world_size: int,
    rank: int,
    *,
    root: int = 0,
    hosts: Hosts = (),
) -> Schedule:
    """One rank's part.

    Arguments:
        collective, topology: see `pattern.TOPOLOGIES`; for "all_reduce" also each of its own after
            "hierarchical_".
        root: of "broadcast" and "reduce". Of a reduce, only the root's buffer is of use afterwards.
        hosts: the ranks of each host, where the topology is hierarchical.

    Raises:
        ValueError: there is no such topology, root or rank, or hosts do not hold each rank once.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not below {world_size}")
    whole = pattern(collective, topology, world_size, root=root, hosts=hosts)
    steps = []
    for step in whole.steps:
        sends, receives = [], []
        for m in step:
            for i in np.flatnonzero(m.source == rank):
                sends.append(Send(int(m.target[i]), int(m.first[i]), int(m.last[i])))
            for i in np.flatnonzero(m.target == rank):
                receives.append(
                    Receive(int(m.source[i]), int(m.first[i]), int(m.last[i]), m.reduce)
                )
        steps.append(Step(tuple(sends), tuple(receives)))
    return Schedule(whole.chunks, tuple(steps))


def exact(collective: str, topology: str, world_size: int, hosts: Hosts = ()) -> bool:
    """Whether sums follow the fixed tree over ranks, so that their bits are those of `tree_sum`.

    It holds for arithmetic in the buffer's own type; see `at_once` for wider sums.
    """
    if world_size <= 2:
        return True
    across = topology.removeprefix(HIERARCHICAL)
    if across == topology:
        return topology != "ring" or collective in ("broadcast", "all_gather")
    # The hosts' sums must be nodes of the tree over ranks, and so must whatever is made of them.
    order = by_first_rank(hosts)
    ends = np.cumsum([0] + [len(ranks) for ranks in order]).tolist()
    return (
        list(chain(*order)) == list(range(world_size))
        and {(ends[low], ends[high]) for low, high in tree.nodes(len(order))}
        <= tree.nodes(world_size)
        and exact(collective, across, len(order))
    )


def at_once(topology: str, world_size: int) -> bool:
    """Whether all values of an element are added in one place, so that it is rounded only once."""
    return topology in ("star", "direct", "gather") or world_size <= 2


def validate(schedules: Sequence[Schedule], *, may_overlap: bool = False) -> None:
    """Checks the schedules of all ranks against one another.

    Arguments:
        may_overlap: what comes may fall upon what is sent in the same step ("gather" does so).

    Raises:
        ValueError: numbers of chunks or steps differ; a message has another range at its two ends,
            or only one end; two messages go the same way in one step; a range is none; what comes
            overlaps what is sent or, unless both are added to the same range, what comes else.
    """
    shapes = {(own.chunks, len(own.steps)) for own in schedules}
    if len(shapes) > 1:
        raise ValueError(f"chunks and steps differ between ranks: {sorted(shapes)}")
    for number in range(len(schedules[0].steps)):
        sent: dict[tuple[int, int], tuple[int, int]] = {}
        received: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, own in enumerate(schedules):
            step = own.steps[number]
            where = f"step {number}, rank {rank}"
            parts: list[Send | Receive] = [*step.sends, *step.receives]
            for part in parts:
                peers = set(range(len(schedules))) - {rank}
                if part.peer not in peers or not 0 <= part.first <= part.last <= own.chunks:
                    raise ValueError(f"{where}: {part} among {own.chunks} chunks")
                if isinstance(part, Send):
                    ends, way = sent, (rank, part.peer)
                else:
                    ends, way = received, (part.peer, rank)
                if way in ends:
                    raise ValueError(f"{where}: a second {part}")
                ends[way] = _range(part)
            if step.overlaps and not may_overlap:
                raise ValueError(f"{where}: what comes overlaps what is sent: {step}")
            for one, other in combinations(step.receives, 2):
                together = one.reduce and other.reduce and _range(one) == _range(other)
                if _overlap(one, other) and not together:
                    raise ValueError(f"{where}: {one} overlaps {other}")
        if sent != received:
            odd = sorted(sent.items() ^ received.items())
            raise ValueError(f"step {number}: sends and receives differ: {odd}")


def follow(
    schedules: Sequence[Schedule],
    buffers: Sequence[torch.Tensor],
    combine: Callable[[Sequence[torch.Tensor]], torch.Tensor] = tree.tree_sum,
) -> None:
    """Does in one process what all ranks would: the reference for whoever carries schedules out.

    Arguments:
        buffers: by rank, (length,), changed in place.
        combine: the values of one range, each (elements,), by rank, to their reduction.
    """
    length = len(buffers[0])
    for steps in zip(*(s.steps for s in schedules), strict=True):
        messages = {
            (rank, send.peer): buffers[rank][schedules[rank].elements(send, length)].clone()
            for rank, step in enumerate(steps)
            for send in step.sends
        }
        for rank, step in enumerate(steps):
            for _, group in groupby(sorted(step.receives, key=_range), key=_range):
                parts = list(group)
                own = buffers[rank][schedules[rank].elements(parts[0], length)]
                values = {part.peer: messages[part.peer, rank] for part in parts}
                if parts[0].reduce:
                    values[rank] = own
                    own.copy_(combine([values[peer] for peer in sorted(values)]))
                else:
                    own.copy_(values[parts[0].peer])


def _range(part: Send | Receive) -> tuple[int, int]:
    return part.first, part.last


def _overlap(one: Send | Receive, other: Send | Receive) -> bool:
    return max(one.first, other.first) < min(one.last, other.last)
