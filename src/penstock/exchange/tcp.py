"""`TcpTransport`: ranks of different hosts, over the data sockets that `Peers` opened.

What one rank has for another in one share is a message: a header of 256 bytes, then the body in
pieces of 256 KiB. Piece i goes on stream i modulo their number, the header before piece 0, so that
what is small keeps to one socket, and what is large has the windows of several. Where there are no
bytes there is no message: who neither gives nor gets costs nothing, and is not waited for.

Ranks that agree can tell each other's headers in advance: they hold the operation, its number, the
count of shares, and the number of bytes. Who receives compares a header whole with the one it
expects, and takes it apart only to say how they differ. So the bytes of another share, or of a
stranger, are never taken for this one's.

The thread that calls does everything. It sends from the parts' own memory and receives into scratch
that is kept, of every rank one chunk (a piece on each stream) at a time; while a chunk is read, the
kernel takes in what comes next. A chunk is read only when the same bytes of this rank's own parts
have gone out, so that a collective may write its result over its input. Nobody waits for ever for
that: of all ranks the one at the earliest chunk finds everyone sending it, and taking it in.
"""

from __future__ import annotations

import math
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from penstock.errors import TransportError
from penstock.exchange.operation import Turn
from penstock.exchange.peers import Peers
from penstock.exchange.transport import Read, Views, differs, lost, misfit, stalled

MAGIC = b"PSK1"
"""Its last character is the version of what is said here."""
FIELDS = struct.Struct("<4sHxxQQQQ")
"""Magic, bytes of text, number of the operation, count of shares, signature, bytes of the body.
The operation's text follows, in UTF-8, then zeros."""
HEADER_BYTES = 256
"""The text is cut to fit. A multiple of `ALIGNMENT_BYTES`, so that the body is aligned too."""
TEXT_BYTES = HEADER_BYTES - FIELDS.size
PIECE_BYTES = 256 * 1024
"""[measured: loopback, 2 cores, 2026-11: both directions at once went at 3.4 GB/s each with calls
of 256 KiB, at 2.5 GB/s with calls of 1 MiB; with a sending thread at 2.3 GB/s]"""
SPIN_S = 100e-6
"""How long to ask again and again for what is small before sleeping.
[measured: loopback, 2 cores, 2026-11: 1 KiB back and forth took 7 us; with sleeping 14 to 50 us]"""
LOOK_S = 0.02
"""How often a rank that is in a share looks whether the group was aborted or a peer has died."""
SAY_S = 1.0
"""After how long a rank tells the others that it waits."""
EXPLAIN_S = 0.2
"""How long a closed data socket may wait for `Peers` to hear why."""

Chunks = Iterator[tuple[Views, int, int]]
"""What `Read` is called with, again and again."""


class TcpTransport:
    """One rank's end of a group over TCP: see `penstock.exchange.transport.Transport`.

    A rank whose number of bytes for this one is given as 0 is not heard in this share: what it
    sends all the same is found out by the next share that expects something from it.

    Arguments:
        peers: the connections, which are closed with this.
    """

    name = "tcp"

    def __init__(self, peers: Peers) -> None:
        self.rank, self.world_size = peers.rank, peers.world_size
        self.hosts: Sequence[str] = peers.hosts
        self._peers = peers
        others = [peer for peer in range(self.world_size) if peer != self.rank]
        self._links = [_Link(peer, peers.data(peer)) for peer in others]
        self._shares = 0
        self._look_at = 0.0
        self._failure: TransportError | None = None

    def share(self, turn: Turn, parts: Views, sizes: Sequence[int], read: Read) -> None:
        with self.flow(turn, parts, sizes) as chunks:
            for views, start, stop in chunks:
                read(views, start, stop)

    @contextmanager
    def flow(
        self, turn: Turn, parts: Views, sizes: Sequence[int], at_least: int = 0
    ) -> Iterator[Chunks]:
        """A share that is read at the caller's pace: within it, bytes are under way already.

        Arguments:
            at_least: chunks come up to this many bytes, also where nobody has as many for this
                rank: what this one has for others in them has gone out by then.

        Yields:
            What `read` of `share` is called with, chunk by chunk; all of it is to be taken.
        """
        if self._failure is not None:
            raise TransportError(self._failure.message, hint=self._failure.hint)
        self._shares += 1
        share = _Share(turn.sequence, turn.operation, turn.timeout_s, self._shares)
        try:
            sources, longest = self._begin(share, parts, sizes)
            yield self._chunks(share, parts[self.rank], sources, max(longest, at_least))
            while share.sending:
                self._move(share)
        except BaseException as error:
            self._fail(share, error)
            raise

    def allocate(self, num_bytes: int, turn: Turn) -> torch.Tensor | None:
        return None  # hosts share no memory

    def holds(self, tensor: torch.Tensor) -> bool:
        return False

    def abort(self, reason: str) -> None:
        self._peers.abort(reason)
        self._look_at = 0.0

    def close(self) -> None:
        if self._failure is None:
            self._failure = TransportError(f"rank {self.rank} has left the group")
        self._peers.close()

    def _begin(self, share: _Share, parts: Views, sizes: Sequence[int]) -> tuple[list[_Link], int]:
        """Sends and receives what goes at once; returns who has bytes for this rank, and the
        largest number of them, the own ones included."""
        if share.began >= self._look_at:
            self._look(share, share.began)
        own = parts[self.rank]
        longest = 0 if own is None else own.numel()
        sources: list[_Link] = []
        for link in self._links:
            part, num_bytes = parts[link.peer], sizes[link.peer]
            if part is not None and part.numel():
                body = part.numpy().data
                share.sending += link.give(share.header(len(body)), body)
            if num_bytes:
                link.expect(share.header(num_bytes), num_bytes)
                share.receiving += link.open(0)
                sources.append(link)
                longest = max(longest, num_bytes)
        share.unconfirmed += sources
        # What is large comes piecemeal: spinning for each piece would take a core from training.
        share.spin_until = share.began + (SPIN_S if longest <= PIECE_BYTES else 0.0)
        self._transfer(share)
        return sources, longest

    def _chunks(
        self, share: _Share, own: torch.Tensor | None, sources: Sequence[_Link], longest: int
    ) -> Chunks:
        """Each chunk when it is there: its views, where it starts, where it stops."""
        chunk = self._links[0].chunk_bytes if self._links else max(1, longest)
        for number, start in enumerate(range(0, longest, chunk)):
            stop = min(start + chunk, longest)
            if start:
                for link in sources:
                    share.receiving += link.open(start)
            # Who reads may write over this rank's part, whose bytes must then have gone out.
            while share.receiving or not all(s.has_sent(number) for s in share.sending):
                self._move(share)
            views: list[torch.Tensor | None] = [None] * self.world_size
            for link in sources:
                views[link.peer] = link.view(start)
            if own is not None and start < len(own):
                views[self.rank] = own[start:stop]
            yield views, start, stop

    def _move(self, share: _Share) -> None:
        """Sends and receives what goes at once; where nothing does, waits a little."""
        moved, now = self._transfer(share), time.monotonic()
        if moved:
            if now >= share.deadline:
                self._look(share, now)
            return
        if now >= self._look_at:
            try:
                self._look(share, now)
            except TransportError:
                # Who has left or died may have sent before all that this share needs.
                if not self._transfer(share):
                    raise
                return
        if now < share.spin_until:
            os.sched_yield()
        else:
            self._sleep(share)

    def _transfer(self, share: _Share) -> bool:
        """Sends and receives what goes at once; whether anything did."""
        moved = 0
        try:
            for stream in share.sending:
                moved += stream.push()
            for stream in share.receiving:
                moved += stream.pull()
        except (OSError, EOFError) as error:
            raise self._lost(share, stream.peer, error) from error
        if moved:
            share.sending = [stream for stream in share.sending if stream.outgoing]
            share.receiving = [stream for stream in share.receiving if stream.incoming]
            for link in [link for link in share.unconfirmed if self._met(share, link)]:
                share.unconfirmed.remove(link)
                share.heard.add(link.peer)
        return moved > 0

    def _sleep(self, share: _Share) -> None:
        """Until something can be sent or received, or it is time to look."""
        events: dict[socket.socket, int] = {}
        for stream in share.sending:
            events[stream.socket] = select.POLLOUT
        for stream in share.receiving:
            events[stream.socket] = events.get(stream.socket, 0) | select.POLLIN
        poll = select.poll()
        try:
            for connection, wanted in events.items():
                poll.register(connection, wanted)
        except ValueError:  # closed by another thread, which the next attempt to use it tells
            return
        poll.poll(LOOK_S * 1000)

    def _look(self, share: _Share, now: float) -> None:
        """Sees to what is due beside the bytes: abort and death, telling others, the deadline."""
        self._look_at = now + LOOK_S
        try:
            self._peers.look()
        except TransportError as error:
            raise TransportError(f"{share.what}: {error.message}", hint=error.hint) from error
        if now >= share.say_at:
            share.say_at = math.inf
            self._peers.waits(share.sequence)
        if now >= share.deadline:
            # Who waits says so, and whose bytes are all here has come; the rest is missing.
            outstanding = share.outstanding()
            came = share.heard.difference(outstanding)
            silent = self._peers.missing(share.sequence)
            missing = [peer for peer in silent if peer not in came] or outstanding
            raise stalled(share, missing, self.hosts)

    def _met(self, share: _Share, link: _Link) -> bool:
        """Whether a peer's header has come.

        Raises:
            TransportError: it is not the expected one.
        """
        theirs = link.header()
        if theirs is None:
            return False
        if theirs == link.expected:
            return True
        peer, where = link.peer, f"rank {link.peer} on {self.hosts[link.peer]}"
        magic, text_bytes, sequence, shares, signature, num_bytes = FIELDS.unpack_from(theirs)
        if magic != MAGIC:
            raise TransportError(
                f"{share.what}: {where} sent {theirs[:16].hex(' ')}..., which begins no message",
                hint="all ranks must run the same version of penstock",
            )
        text = theirs[FIELDS.size :][:text_bytes].decode(errors="replace")
        mine = share.operation.text
        if (signature, sequence) == (share.operation.signature, share.sequence):
            if shares == share.shares:
                size = FIELDS.unpack_from(link.expected)[-1]
                raise misfit(share, self.rank, size, peer, num_bytes, self.hosts)
            text, mine = f"step {shares} of {text}", f"step {share.shares} of {mine}"
        elif sequence != share.sequence:
            text, mine = f"{text}, number {sequence}", f"{mine}, number {share.sequence}"
        raise differs(min(sequence, share.sequence), mine, self.rank, peer, text, self.hosts)

    def _lost(self, share: _Share, peer: int, error: Exception) -> TransportError:
        """The error of a data socket that is closed, with what the peer's other sockets tell."""
        if self._failure is not None:
            return self._failure
        why, give_up = None, time.monotonic() + EXPLAIN_S
        while why is None and time.monotonic() < give_up:
            self._look(share, time.monotonic())
            why = self._peers.gone(peer)
            time.sleep(0.002)
        return lost(share.what, peer, self.hosts, why or f"is cut off: {error}")

    def _fail(self, share: _Share, error: BaseException) -> None:
        """Keeps why the transport is of no more use, and ends the group for all others."""
        if self._failure is not None:
            return
        if isinstance(error, TransportError):
            self._failure = error
        else:
            what = f"{type(error).__name__}: {error}"
            self._failure = TransportError(f"{share.what}: rank {self.rank} raised {what}")
        self._peers.abort(self._failure.message)


@dataclass(slots=True)
class _Share(Turn):
    """One share under way: until when, and what still has to move."""

    shares: int
    began: float = field(default_factory=time.monotonic)
    deadline: float = 0.0
    say_at: float = 0.0
    spin_until: float = 0.0
    text: bytes = b""
    sending: list[_Stream] = field(default_factory=list)
    receiving: list[_Stream] = field(default_factory=list)
    unconfirmed: list[_Link] = field(default_factory=list)
    heard: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.deadline = self.began + self.timeout_s
        self.say_at = self.began + min(SAY_S, self.timeout_s / 2)
        self.text = self.operation.text.encode()[:TEXT_BYTES]

    def header(self, num_bytes: int) -> bytes:
        """Of a message of this share: (HEADER_BYTES,)."""
        signature, text = self.operation.signature, self.text
        fields = FIELDS.pack(MAGIC, len(text), self.sequence, self.shares, signature, num_bytes)
        return (fields + text).ljust(HEADER_BYTES, b"\0")

    def outstanding(self) -> list[int]:
        """The peers with whom bytes are yet to be exchanged."""
        return sorted({stream.peer for stream in self.receiving or self.sending})


class _Stream:
    """A data socket, and the memory between which and it bytes are moving."""

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer, self.socket = peer, connection
        self.outgoing: list[memoryview] = []
        """Pieces to be sent, the next one last."""
        self.incoming = memoryview(b"")
        """What is yet to be filled."""
        self._pieces = 0

    def give(self, pieces: list[memoryview]) -> None:
        """Sets what is to be sent: of each chunk one piece."""
        self.outgoing, self._pieces = pieces[::-1], len(pieces)

    def has_sent(self, chunk: int) -> bool:
        """Whether all pieces up to that of this chunk (counted from 0) have gone out."""
        return len(self.outgoing) <= max(0, self._pieces - chunk - 1)

    def push(self) -> int:
        """Sends what the socket takes at once; returns how many bytes."""
        pieces = self.outgoing
        try:
            # Two, so that a header and a small body go in one packet.
            sent = rest = self.socket.sendmsg(pieces[:-3:-1])
        except BlockingIOError:
            return 0
        while pieces and rest >= len(pieces[-1]):
            rest -= len(pieces.pop())
        if rest:
            pieces[-1] = pieces[-1][rest:]
        return sent

    def pull(self) -> int:
        """Receives what is there; returns how many bytes.

        Raises:
            EOFError: the peer has closed its end.
        """
        try:
            received = self.socket.recv_into(self.incoming)
        except BlockingIOError:
            return 0
        if not received:
            raise EOFError("its connection is closed")
        self.incoming = self.incoming[received:]
        return received


class _Link:
    """The streams of one peer, and the scratch for a chunk of what it sends."""

    def __init__(self, peer: int, connections: Sequence[socket.socket]) -> None:
        self.peer = peer
        self.chunk_bytes = PIECE_BYTES * len(connections)
        self.expected = b""
        """The header of the message that is expected."""
        self._streams = [_Stream(peer, connection) for connection in connections]
        self._size = 0
        self._scratch: torch.Tensor | None = None

    def give(self, header: bytes, body: memoryview) -> list[_Stream]:
        """Hands a message to the streams; returns those that have something to send."""
        pieces = [body[at : at + PIECE_BYTES] for at in range(0, len(body), PIECE_BYTES)]
        for number, stream in enumerate(self._streams):
            stream.give(pieces[number :: len(self._streams)])
        self._streams[0].outgoing.append(memoryview(header))
        return [stream for stream in self._streams if stream.outgoing]

    def expect(self, header: bytes, size: int) -> None:
        """Prepares for a message with this header and a body of `size` bytes."""
        self.expected, self._size = header, size
        if self._scratch is None:
            self._scratch = torch.empty(HEADER_BYTES + self.chunk_bytes, dtype=torch.uint8)
            self._memory = self._scratch.numpy().data

    def open(self, start: int) -> list[_Stream]:
        """Makes room for the chunk from `start` on; returns the streams on which it comes."""
        stop = HEADER_BYTES + min(self.chunk_bytes, self._size - start)
        busy = []
        for stream, at in zip(self._streams, range(HEADER_BYTES, stop, PIECE_BYTES)):
            first = 0 if start == 0 and at == HEADER_BYTES else at
            stream.incoming = self._memory[first : min(at + PIECE_BYTES, stop)]
            busy.append(stream)
        return busy

    def header(self) -> bytes | None:
        """The header of the message whose first chunk is open; None until all of it is there."""
        if len(self._streams[0].incoming) > min(PIECE_BYTES, self._size):
            return None
        return bytes(self._memory[:HEADER_BYTES])

    def view(self, start: int) -> torch.Tensor | None:
        """The chunk from `start` on, once it is there; None where the message has ended before."""
        if start >= self._size or self._scratch is None:
            return None
        return self._scratch[
            HEADER_BYTES : HEADER_BYTES + min(self.chunk_bytes, self._size - start)
        ]
