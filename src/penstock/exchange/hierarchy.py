"""All-reduce among hosts of several ranks: first within each host, then between, then within.

Of n bytes on h hosts, 2 n (h - 1) / h leave each host, however many ranks it has. The tensor goes
piece by piece, and each piece in three stages, which are under way at once for pieces in a row:

    inside    lane i reduces the i-th part of the piece of its host's ranks, in memory
    across    the i-th lanes of all hosts reduce their parts among each other, over TCP
    spread    the lanes give their parts to their host's ranks, in memory

Every host has as many lanes, ranks that speak for it, as the one with the fewest ranks has. Sums
are taken only where the fixed tree takes them in this order anyway (`Combine.grouped`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from penstock.exchange import serial
from penstock.exchange.mixed import MixedTransport
from penstock.exchange.operation import Turn
from penstock.exchange.reduction import Combine
from penstock.exchange.schedules import cut
from penstock.exchange.tcp import Chunks
from penstock.exchange.transport import Read, Views, ignore

LEAST_BYTES = 128 << 10
"""Below, three stages take longer than what they save. [measured: 2 hosts of 2 ranks, 10 Gbit/s,
2 busy cores, AMD EPYC, 2026-11: 4 KiB took 0.21 ms, at once 0.17; 256 KiB took as long]"""
PIECE_BYTES = 1 << 20
"""What is in one stage at a time. [measured: as above, 4 MiB took at least 3.8 ms, in pieces of
512 KiB 5.1, of 4 MiB 5.9; at 1 Gbit/s in the median 35.4, of 4 MiB 39.3]"""

Range = tuple[int, int]


def all_reduce(
    transport: MixedTransport,
    turn: Turn,
    source: torch.Tensor,
    out: torch.Tensor,
    combine: Combine,
) -> bool:
    """Reduces the tensors of all ranks for all, if that is better done so; else does nothing.

    Arguments:
        source: what this rank brings, (n,), contiguous.
        out: (n,), contiguous; may be the source.

    Returns:
        Whether it was done: the same on all ranks.
    """
    if source.nbytes < LEAST_BYTES:
        return False
    orders = combine.grouped(transport.groups, out.dtype)
    if orders is None:
        return False
    run = _AllReduce(transport, turn, source, out, orders)
    pieces = list(itertools.pairwise([*range(0, source.nbytes, PIECE_BYTES), source.nbytes]))
    for step in range(len(pieces) + 2):
        under_way = run.across(pieces[step - 1]) if 0 < step <= len(pieces) else nullcontext()
        with under_way:  # the sockets take and bring bytes while this thread is busy in memory
            if step < len(pieces):
                run.inside(pieces[step])
            if step > 1:
                run.spread(pieces[step - 2])
    return True


class _AllReduce:
    """One of them under way. Ranges are of the tensors' bytes."""

    def __init__(
        self,
        transport: MixedTransport,
        turn: Turn,
        source: torch.Tensor,
        out: torch.Tensor,
        orders: tuple[list[Combine], Combine],
    ) -> None:
        self._near, self._far, self._turn = transport.near, transport.far, turn
        self._source, self._out = source.view(torch.uint8), out.view(torch.uint8)
        self._dtype = out.dtype
        groups, place = transport.groups, transport.near.rank
        self._hosts = len(groups)
        self._host = next(n for n, group in enumerate(groups) if transport.rank in group)
        self._inner, self._outer = orders[0][self._host], orders[1]
        self._lanes = min(map(len, groups))
        self._lane = place if place < self._lanes else None
        self._column = [] if self._lane is None else [group[place] for group in groups]
        """The ranks of this lane, by host."""

    def inside(self, piece: Range) -> None:
        """Reduces, in memory, this lane's part of the piece into `out`."""
        parts = self._parts(piece)
        given: list[torch.Tensor | None] = [None] * self._near.world_size
        given[: self._lanes] = [self._source[start:stop] for start, stop in parts]
        first, last = 0, 0
        read: Read = ignore
        if self._lane is not None:
            first, last = parts[self._lane]
            read = self._reducing(self._inner, first, range(self._near.world_size))
        self._near.share(self._turn, given, [last - first] * self._near.world_size, read)

    @contextmanager
    def across(self, piece: Range) -> Iterator[None]:
        """Reduces this lane's part among hosts; within it, bytes are on the wire."""
        parts = [(0, 0)] * self._hosts
        if self._lane is not None:
            lane = self._parts(piece)[self._lane]
            # Of two hosts both reduce all of it: as many bytes, and one step less.
            parts = [lane] * 2 if self._hosts == 2 else cut(*lane, self._hosts)
        first, last = parts[self._host]
        given = [self._out[start:stop] for start, stop in parts]
        with self._flow(given, [last - first] * self._hosts) as chunks:
            yield
            read = self._reducing(self._outer, first, self._column)
            for views, start, stop in chunks:
                read(views, start, stop)
        if self._hosts == 2:
            return
        given = [self._out[first:last]] * self._hosts
        with self._flow(given, [stop - start for start, stop in parts]) as chunks:
            for views, start, _ in chunks:
                self._copy([views[rank] for rank in self._column], parts, start)

    def spread(self, piece: Range) -> None:
        """Gives, in memory, this lane's part to the host's ranks, and takes the other lanes'."""
        parts = self._parts(piece)
        given: list[torch.Tensor | None] = [None] * self._near.world_size
        if self._lane is not None:
            first, last = parts[self._lane]
            given = [self._out[first:last]] * self._near.world_size
        sizes = [0] * self._near.world_size
        sizes[: self._lanes] = [stop - start for start, stop in parts]
        self._near.share(
            self._turn, given, sizes, lambda views, start, _: self._copy(views, parts, start)
        )

    def _parts(self, piece: Range) -> list[Range]:
        """Of each lane."""
        return cut(*piece, self._lanes)

    def _flow(
        self, given: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> AbstractContextManager[Chunks]:
        """A share among the ranks of this lane; other ranks give and get nothing."""
        parts: list[torch.Tensor | None] = [None] * self._far.world_size
        expected = [0] * self._far.world_size
        for number, rank in enumerate(self._column):
            parts[rank], expected[rank] = given[number], sizes[number]
        return self._far.flow(self._turn, parts, expected)

    def _reducing(self, combine: Combine, first: int, ranks: Sequence[int]) -> Read:
        """Reduces what these ranks have into `out`, from there on."""

        def read(views: Views, start: int, stop: int) -> None:
            found = [views[rank] for rank in ranks]
            parts = [view.view(self._dtype) for view in found if view is not None]
            combine.combine(parts, self._out[first + start : first + stop].view(self._dtype))

        return read

    def _copy(self, views: Views, parts: Sequence[Range], start: int) -> None:
        """Copies what others have reduced to where it belongs in `out`."""
        for view, (first, _) in zip(views, parts, strict=False):
            if view is not None:
                serial.copy(view, self._out[first + start : first + start + len(view)])
