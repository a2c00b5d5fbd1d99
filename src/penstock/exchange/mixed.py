"""`MixedTransport`: ranks of several hosts, of which some share one.

Ranks of one host read each other's bytes in shared memory, the others' come over TCP, and all of
one range are read at once. The host's memory sets the pace: whenever it shows a range, what the
other hosts have for it is taken from the sockets. So nothing is kept but TCP's own scratch.

Nobody waits for ever for that. Of all ranks consider the one that has read the least: whoever it
waits for, in memory or on a socket, has read as much, and so has sent what it needs next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.exchange.operation import Turn
from penstock.exchange.peers import Peers
from penstock.exchange.shm import ShmTransport
from penstock.exchange.tcp import Chunks, TcpTransport
from penstock.exchange.transport import ALIGNMENT_BYTES, Read, Views

_BYTE = torch.ones(1, dtype=torch.uint8)


class MixedTransport:
    """One rank's end: see `penstock.exchange.transport.Transport`.

    Arguments:
        peers: the connections of the whole group, closed with this.
        near: the ranks on this rank's host, itself among them, in order.
        everyone: the ranks of each host, the same list on all ranks.

    Attributes:
        near: moves bytes within the host; its ranks are places in the list of that name.
        far: moves bytes between hosts.
        groups: the ranks of each host, in the order of their first ranks.

    Raises:
        TransportError: the shared memory cannot be had.
    """

    name = "memory and tcp"

    def __init__(
        self, peers: Peers, near: Sequence[int], everyone: Sequence[Sequence[int]]
    ) -> None:
        self.rank, self.world_size = peers.rank, peers.world_size
        self.hosts: Sequence[str] = peers.hosts
        self.groups = sorted(sorted(ranks) for ranks in everyone)
        if sorted(near) not in self.groups:
            raise ValueError(f"ranks {near} are no host of {everyone}")
        self.near = ShmTransport(peers, near)
        self.far = TcpTransport(peers)
        self._members = list(near)

    def share(self, turn: Turn, parts: Views, sizes: Sequence[int], read: Read) -> None:
        inside = [parts[member] for member in self._members]
        inside_sizes = [sizes[member] for member in self._members]
        outside, outside_sizes = list(parts), list(sizes)
        for member in self._members:
            outside[member], outside_sizes[member] = None, 0
        longest = max(sizes)
        with self.far.flow(turn, outside, outside_sizes, longest) as chunks:
            joined = _Joined(self._members, chunks, longest, read)
            self.near.share(turn, inside, inside_sizes, joined.read)
            joined.rest()

    def allocate(self, num_bytes: int, turn: Turn) -> torch.Tensor | None:
        """Memory that this host's ranks read in place; None on all ranks where a host has none."""
        memory = self.near.allocate(num_bytes, turn)
        said = _BYTE if memory is not None else torch.zeros_like(_BYTE)
        had: list[bool] = []

        def hear(views: Views, start: int, stop: int) -> None:
            had.extend(bool(view) for view in views if view is not None)

        self.share(turn, [said] * self.world_size, [1] * self.world_size, hear)
        return memory if all(had) else None

    def holds(self, tensor: torch.Tensor) -> bool:
        return self.near.holds(tensor)

    def abort(self, reason: str) -> None:
        self.far.abort(reason)

    def close(self) -> None:
        self.far.close()
        self.near.close()


class _Joined:
    """Shows the ranges of the host's memory together with what the other hosts have for them.

    Arguments:
        members: the host's ranks.
        chunks: of the other hosts, up to `longest`.
        longest: the largest number of bytes that any rank has for this one.
    """

    def __init__(self, members: Sequence[int], chunks: Chunks, longest: int, read: Read) -> None:
        self._members, self._chunks, self._longest, self._read = members, chunks, longest, read
        self._far: Views = []
        self._first = self._last = 0  # of the chunk under `_far`
        self._at = 0

    def read(self, near: Views, start: int, stop: int) -> None:
        """Reads [start, stop), of which these are the views of the host's ranks."""
        # Where the host has no more, but others have, the next range starts on a line.
        stop = min(-(-stop // ALIGNMENT_BYTES) * ALIGNMENT_BYTES, self._longest)
        while self._at < stop:
            if self._at == self._last:
                self._far, self._first, self._last = next(self._chunks)
            end = min(stop, self._last)
            views = [_cut(view, self._at - self._first, end - self._first) for view in self._far]
            for member, view in zip(self._members, near, strict=True):
                views[member] = _cut(view, self._at - start, end - start)
            self._read(views, self._at, end)
            self._at = end

    def rest(self) -> None:
        """Reads what the other hosts have beyond the host's own ranks."""
        self.read([None] * len(self._members), self._at, self._longest)


def _cut(view: torch.Tensor | None, start: int, stop: int) -> torch.Tensor | None:
    """A part of a view; None where it has ended before."""
    if view is None or start >= len(view):
        return None
    return view if start == 0 and stop >= len(view) else view[start:stop]
