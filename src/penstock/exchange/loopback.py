"""A transport inside one process, a thread per rank: the in-memory twin of every transport."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from penstock.errors import TransportError
from penstock.exchange.operation import Operation, Turn
from penstock.exchange.transport import Read, Views, aborted, differs, lost, misfit, stalled


def loopback(world_size: int, *, chunk_bytes: int = 1 << 20) -> list[LoopbackTransport]:
    """The transports of all ranks; each is to be used by a thread of its own."""
    meeting = _Meeting(world_size, chunk_bytes)
    return [LoopbackTransport(rank, meeting) for rank in range(world_size)]


@dataclass
class _Meeting:
    world_size: int
    chunk_bytes: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    brought: dict[int, dict[int, tuple[Operation, Views]]] = field(default_factory=dict)
    read: dict[int, set[int]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    reason: str | None = None


class LoopbackTransport:
    """One rank's end."""

    name = "loopback"

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.world_size = meeting.world_size
        self.hosts: Sequence[str] = ("this process",) * meeting.world_size
        self._meeting = meeting
        self._steps = 0

    def share(self, turn: Turn, parts: Views, sizes: Sequence[int], read: Read) -> None:
        meeting, step, give_up = self._meeting, self._steps, time.monotonic() + turn.timeout_s
        self._steps += 1
        with meeting.changed:
            brought = meeting.brought.setdefault(step, {})
            brought[self.rank] = turn.operation, [p if p is None else p.clone() for p in parts]
            meeting.changed.notify_all()
            while len(brought) < self.world_size:
                self._wait(brought, give_up, turn)
        try:
            views = self._views(brought, turn, sizes)
        except TransportError as error:
            self.abort(error.message)
            raise
        longest = max([0, *sizes])
        for start in range(0, longest, meeting.chunk_bytes):
            stop = min(start + meeting.chunk_bytes, longest)
            read(
                [None if v is None or len(v) <= start else v[start:stop] for v in views],
                start,
                stop,
            )
        with meeting.changed:
            have_read = meeting.read.setdefault(step, set())
            have_read.add(self.rank)
            meeting.changed.notify_all()
            while len(have_read) < self.world_size:
                self._wait(have_read, give_up, turn)
            meeting.read.pop(step, None)
            meeting.brought.pop(step, None)

    def allocate(self, num_bytes: int, turn: Turn) -> torch.Tensor | None:
        return None

    def holds(self, tensor: torch.Tensor) -> bool:
        return False

    def abort(self, reason: str) -> None:
        with self._meeting.changed:
            self._meeting.reason = self._meeting.reason or reason
            self._meeting.changed.notify_all()

    def close(self) -> None:
        with self._meeting.changed:
            self._meeting.gone.add(self.rank)
            self._meeting.changed.notify_all()

    def _wait(self, there: Collection[int], give_up: float, turn: Turn) -> None:
        """Until something has changed; raises when nothing will."""
        meeting = self._meeting
        if meeting.reason is not None:
            raise aborted(turn.what, meeting.reason)
        missing = [rank for rank in range(self.world_size) if rank not in there]
        if left := [rank for rank in missing if rank in meeting.gone]:
            raise lost(turn.what, left[0], self.hosts, "has left")
        remaining_s = give_up - time.monotonic()
        if remaining_s <= 0:
            raise stalled(turn, missing, self.hosts)
        meeting.changed.wait(remaining_s)

    def _views(
        self, brought: dict[int, tuple[Operation, Views]], turn: Turn, sizes: Sequence[int]
    ) -> Views:
        """What each rank has for this one; raises where they differ on what this is."""
        views = []
        for peer, (theirs, parts) in sorted(brought.items()):
            if theirs != turn.operation:
                mine = turn.operation.text
                raise differs(turn.sequence, mine, self.rank, peer, theirs.text, self.hosts)
            view = parts[self.rank]
            num_bytes = 0 if view is None else len(view)
            if num_bytes != sizes[peer]:
                raise misfit(turn, self.rank, sizes[peer], peer, num_bytes, self.hosts)
            views.append(view)
        return views
