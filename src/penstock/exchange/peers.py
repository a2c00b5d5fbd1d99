"""`Peers`: what the ranks of a group tell each other beside the collectives' own bytes.

On the control socket of each pair go frames: kind u8, sequence u64, length u32, then so many bytes
of text or data. They say that a rank waits in a collective, that it ends the group, or that it
leaves; the end of the connection without a goodbye says that it died.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.errors import TransportError
from penstock.exchange.meeting import CONTROL, DATA, MAIL, Lane, Store, meet

FRAME = struct.Struct("!BQI")
WAITS, ABORT, GOODBYE, GATHER = 1, 2, 3, 4
MAX_TEXT_BYTES = 1 << 20
TICK_S = 0.05
"""How long `gather` sleeps between two looks."""


class Peers:
    """Connections among all ranks of a group, and what is heard on them; made by `meet`.

    All methods may be called from any thread, except that `gather` is for one at a time. Whoever
    uses the mail and data sockets stops before `close`.

    Attributes:
        hosts: by rank, the name of its machine, for errors.
    """

    def __init__(self, rank: int, hosts: Sequence[str], sockets: dict[Lane, socket.socket]) -> None:
        self.rank = rank
        self.world_size = len(hosts)
        self.hosts = tuple(hosts)
        self._sockets = sockets
        self._lines = {
            peer: _Line(peer, s) for (peer, lane), s in sockets.items() if lane == CONTROL
        }
        self._open = {line.socket.fileno(): line for line in self._lines.values()}
        self._poll = select.poll()
        for fileno in self._open:
            self._poll.register(fileno, select.POLLIN)
        self._lock = threading.RLock()  # a signal's handler may abort while this thread looks
        self._error: TransportError | None = None
        self._aborted = False
        self._closed = False
        _LIVE.add(self)

    @classmethod
    def meet(
        cls,
        store: Store,
        rank: int,
        world_size: int,
        *,
        address: str | None = None,
        streams: int = 1,
        timeout_s: float = 60.0,
    ) -> Peers:
        """Connects with all other ranks; every rank calls it once with the same store.

        Whoever connects without the group's secret is dropped, and the meeting goes on.

        Arguments:
            store: for the use of this group alone: a `PrefixStore` per group. Whoever reads it can
                join the group.
            address: to listen on and to publish; by default the one from which packets go to
                MASTER_ADDR or the store's host, else 127.0.0.1.
            streams: data sockets per pair. One is level with the line up to 10 Gbit/s; of two that
                share a line, the slower is waited for (4 to 12% at 1 Gbit/s). [measured: network
                namespaces, tbf, 2026-11]

        Raises:
            TransportError: names the ranks that did not come before the deadline.
        """
        hosts, sockets = meet(store, rank, world_size, address, streams, timeout_s)
        return cls(rank, hosts, sockets)

    def mail(self, peer: int) -> socket.socket:
        """The pair's socket for messages point to point; nonblocking."""
        return self._sockets[peer, MAIL]

    def data(self, peer: int) -> list[socket.socket]:
        """The pair's sockets for collectives; nonblocking."""
        return [
            s for (rank, lane), s in sorted(self._sockets.items()) if rank == peer and lane >= DATA
        ]

    def control_filenos(self) -> list[int]:
        """Readable when `look` has something to hear."""
        return list(self._open)

    def look(self) -> None:
        """Hears what has come; never waits.

        Raises:
            TransportError: the group was aborted, or a peer died, or this rank has closed; from
                then on always the same. That a peer has left is no error here: see `gone`.
        """
        with self._lock:
            if self._error is None and self._open:
                self._hear()
            elif not self._closed:
                for line in self._open.values():
                    self._flush(line)
            if self._error is not None:
                raise TransportError(self._error.message, hint=self._error.hint)

    def gone(self, peer: int) -> str | None:
        """ "left" or "died", as far as `look` has heard, else None."""
        return self._lines[peer].gone if peer in self._lines else None

    def waits(self, sequence: int) -> None:
        """Tells all others that this rank waits in this collective. Never waits for them."""
        with self._lock:
            self._tell(WAITS, sequence)

    def missing(self, sequence: int) -> list[int]:
        """The other ranks that have not said, so far, that they wait in this one or a later one."""
        return [peer for peer, line in sorted(self._lines.items()) if line.waits < sequence]

    def gather(self, data: bytes, timeout_s: float = 60.0) -> list[bytes]:
        """What each rank gave, by rank; at most 1 MiB each. For setting up; every rank calls it.

        Raises:
            TransportError: as `look`, or a rank left, or did not come before the deadline.
        """
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"gather takes at most {MAX_TEXT_BYTES} bytes, got {len(data)}")
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._tell(GATHER, 0, data)
        while True:
            self.look()
            lines = self._lines.values()
            silent = [line for line in lines if not line.gathered]
            if not silent and not any(line.unsent for line in lines if line.gone is None):
                break
            for line in silent:
                if line.gone is not None:
                    raise TransportError(f"gather: {self._name(line.peer)} has {line.gone}")
            if time.monotonic() >= deadline:
                late = ", ".join(self._name(line.peer) for line in silent or lines)
                raise TransportError(
                    f"gather: after {timeout_s:g} s {late} had not come",
                    hint="a rank that is stopped, slow, or in another part of the program",
                )
            stuck = any(line.unsent for line in lines)
            _await_readable(self.control_filenos(), 0.001 if stuck else TICK_S)
        parts = {peer: line.gathered.popleft() for peer, line in self._lines.items()}
        return [parts.get(peer, data) for peer in range(self.world_size)]

    def abort(self, reason: str) -> None:
        """Ends the group: from now on `look` raises, here and, when they hear of it, at all others.

        Never waits. Whatever of it does not go out at once goes out in later calls of `look`.
        """
        with self._lock:
            if not self._aborted and not self._closed:
                self._aborted = True
                self._tell(ABORT, 0, reason.encode()[:MAX_TEXT_BYTES])
                self._fail(self._abort_text(reason, self.rank))

    def close(self) -> None:
        """Says goodbye and closes all sockets; waits for nobody. Doing it again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._tell(GOODBYE)
            self._closed = True
            self._fail("this rank has left the group")
            for line in self._open.values():
                _part(line.socket)
            self._open.clear()
            for connection in self._sockets.values():
                connection.close()

    def forget(self) -> None:
        """In a forked child: the connections are the parent's, and end with it alone."""
        self._lock, self._closed = threading.RLock(), True
        self._error = TransportError("the group is that of the process this one was forked from")
        self._open.clear()
        for connection in self._sockets.values():
            connection.close()

    def _name(self, peer: int) -> str:
        return f"rank {peer} on {self.hosts[peer]}"

    def _abort_text(self, reason: str, by: int) -> str:
        return f"the group was aborted: {reason} (by {self._name(by)})"

    def _fail(self, message: str, hint: str = "") -> None:
        """What `look` raises from now on; the first cause stays."""
        self._error = self._error or TransportError(message, hint=hint)

    def _tell(self, kind: int, sequence: int = 0, text: bytes = b"") -> None:
        for line in self._open.values():
            line.unsent += FRAME.pack(kind, sequence, len(text)) + text
            self._flush(line)

    def _flush(self, line: _Line) -> None:
        """Sends what goes out now."""
        try:
            while line.unsent:
                del line.unsent[: line.socket.send(line.unsent)]
        except BlockingIOError:
            pass
        except OSError:  # reading tells that it is gone, after what it said last
            line.unsent.clear()
        stuck = bool(line.unsent)
        if stuck != line.stuck:
            line.stuck = stuck
            self._poll.modify(line.socket, select.POLLIN | (select.POLLOUT if stuck else 0))

    def _hear(self) -> None:
        died = []
        for fileno, events in self._poll.poll(0):
            line = self._open[fileno]
            if events & select.POLLOUT:
                self._flush(line)
            if events & ~select.POLLOUT and self._read(line):
                self._poll.unregister(fileno)
                del self._open[fileno]
                if line.gone is None:
                    line.gone = "died"
                    died.append(line.peer)
        # An abort tells more than the end of those who left because of it.
        if died:
            names = ", ".join(self._name(peer) for peer in died)
            self._fail(f"{names} died", hint="its log tells why, if it had the time to say so")

    def _read(self, line: _Line) -> bool:
        """Hears one peer; whether its connection has ended."""
        ended = False
        try:
            data = line.socket.recv(1 << 16)
            line.received += data
            ended = not data
        except BlockingIOError:
            pass
        except OSError:
            ended = True
        while len(line.received) >= FRAME.size:
            kind, sequence, length = FRAME.unpack_from(line.received)
            if kind not in (WAITS, ABORT, GOODBYE, GATHER) or length > MAX_TEXT_BYTES:
                start = bytes(line.received[:16])
                self._fail(
                    f"{self._name(line.peer)} sent {start!r}, which is no message",
                    hint="do all ranks run the same version of penstock?",
                )
                line.received.clear()
                return True
            if len(line.received) < FRAME.size + length:
                break
            text = bytes(line.received[FRAME.size : FRAME.size + length])
            del line.received[: FRAME.size + length]
            if kind == WAITS:
                line.waits = max(line.waits, sequence)
            elif kind == GATHER:
                line.gathered.append(text)
            elif kind == ABORT:
                self._aborted = True
                self._fail(self._abort_text(text.decode(errors="replace"), line.peer))
            else:
                line.gone = "left"
        return ended


@dataclass(eq=False)
class _Line:
    """One peer's control socket.

    Attributes:
        waits: the latest collective in which it said that it waits.
        stuck: whether what is unsent waits for the peer to read.
    """

    peer: int
    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    stuck: bool = False
    waits: int = -1
    gathered: deque[bytes] = field(default_factory=deque)
    gone: str | None = None


def _part(connection: socket.socket) -> None:
    """Ends what is sent, and empties what was received: else a reset could overtake the goodbye."""
    try:
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    except OSError:
        pass


def _await_readable(filenos: Sequence[int], timeout_s: float) -> None:
    waiting = select.poll()
    for fileno in filenos:
        waiting.register(fileno, select.POLLIN)
    waiting.poll(timeout_s * 1000)


_LIVE: weakref.WeakSet[Peers] = weakref.WeakSet()


def _forget_all() -> None:
    for peers in list(_LIVE):
        peers.forget()


os.register_at_fork(after_in_child=_forget_all)
