"""Carries out one rank's `Schedule`: what `topology.follow` does in one process, between ranks.

Each step is one share, with parts for the step's peers alone. What comes is combined with what the
step before has left, or copied over it, while the next piece is on its way. Within a step, ranges
that come and go are apart; the one exception, `gather`, receives the very range that it sends, and
a transport lets what was read in a range be written there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from penstock.exchange import serial
from penstock.exchange.reduction import Combine, Reduction
from penstock.exchange.topology import Receive, Schedule, Send, Step
from penstock.exchange.transport import ALIGNMENT_BYTES, Read, Views

Buffer = torch.Tensor | Sequence[torch.Tensor]
"""A rank's buffer: (n,), to be cut into as many chunks as the schedule has; or those chunks, of any
lengths, where no message has more than one."""

_Piece = Callable[[int, int], torch.Tensor]
"""Takes chunks [first, last) to their elements, in place."""

_TOKEN = torch.zeros(1, dtype=torch.uint8)
"""What a message of no chunks holds: ranks with no bytes for each other would not meet."""


class Share(Protocol):
    """`Transport.share` of tensors of any dtype, as one collective calls it."""

    def __call__(
        self, parts: Sequence[torch.Tensor | None], sizes: Sequence[int], read: Read
    ) -> None: ...


def carry_out(
    schedule: Schedule,
    share: Share,
    rank: int,
    world_size: int,
    buffer: Buffer = (),
    combine: Combine | None = None,
) -> None:
    """Does this rank's part; the other ranks do theirs of the same topology.

    Arguments:
        buffer: changed in place; not in memory that others read where it lies.
        combine: of what is received to be added: parts in order of rank, not always of all ranks.
    """
    piece = _cutting(buffer, schedule.chunks)
    for step in schedule.steps:
        parts: list[torch.Tensor | None] = [None] * world_size
        sizes = [0] * world_size
        for send in step.sends:
            parts[send.peer] = _elements(send, piece)
        for receive in step.receives:
            sizes[receive.peer] = _elements(receive, piece).nbytes
        share(parts, sizes, _reading(step, rank, piece, combine))


def stepwise(combine: Combine) -> tuple[Combine, bool]:
    """What adds partial sums instead of combining all ranks' parts at once.

    Returns:
        It, and whether the end result must still be divided by the number of ranks.
    """
    if isinstance(combine, Reduction) and combine.op == "avg":
        return replace(combine, op="sum"), True
    return combine, False


def cut(first: int, last: int, parts: int, itemsize: int = 1) -> list[tuple[int, int]]:
    """Borders of so many about equal runs of [first, last); each starts on a cache line, if `first`
    does."""
    step = max(1, ALIGNMENT_BYTES // itemsize)
    lines = -(-(last - first) // step)
    marks = [min(last, first + lines * part // parts * step) for part in range(parts + 1)]
    return list(itertools.pairwise(marks))


def _cutting(buffer: Buffer, chunks: int) -> _Piece:
    if not isinstance(buffer, torch.Tensor):
        return lambda first, last: buffer[first]
    borders = cut(0, len(buffer), chunks, buffer.itemsize)
    return lambda first, last: buffer[borders[first][0] : borders[last - 1][1]]


def _elements(part: Send | Receive, piece: _Piece) -> torch.Tensor:
    return _TOKEN if part.first == part.last else piece(part.first, part.last)


def _reading(step: Step, rank: int, piece: _Piece, combine: Combine | None) -> Read:
    """Combines or copies what comes in this step, as it comes."""
    places: list[tuple[torch.Tensor, list[int]]] = []
    for (first, last), group in itertools.groupby(sorted(step.receives, key=_range), key=_range):
        if first < last:
            receives = list(group)
            peers = [receive.peer for receive in receives]
            adding = [rank] if receives[0].reduce else []
            places.append((piece(first, last), sorted(peers + adding)))

    def read(views: Views, start: int, stop: int) -> None:
        for out, peers in places:
            if start >= out.nbytes:
                continue
            own = out[start // out.itemsize : min(stop, out.nbytes) // out.itemsize]
            given = [own if p == rank else _typed(views[p], out.dtype) for p in peers]
            if len(given) == 1:
                serial.copy(given[0], own)
            elif combine is not None:
                combine.combine(given, own)

    return read


def _typed(view: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    assert view is not None, "a transport gives views of all that was said to come"
    return view.view(dtype)


def _range(part: Receive) -> tuple[int, int]:
    return part.first, part.last
