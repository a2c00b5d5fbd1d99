"""`Mailbox`: messages between two ranks, by tag, beside the collectives and their order.

On the mail socket of a pair go messages one after the other, each a header (MAGIC, tag i64, length
u64) and its bytes. A message goes straight into the memory of its receive if that is posted. If it
is not, its bytes stay in the socket, and its sender waits, unless something could be stuck behind
it: while this rank has a receive posted that a later message of the same sender could answer, or
any send of its own under way (its receiver may be waiting to be received from first), messages are
read into memory of their own. So memory grows by what others have sent too early, and only while
this rank itself waits for something.
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
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from penstock.errors import TransportError
from penstock.exchange.peers import Peers
from penstock.exchange.work import Work

HEADER = struct.Struct("!4sqQ")
MAGIC = b"mail"
TURN_BYTES = 4 << 20
"""As much of one message is moved before others have their turn."""
TICK_S = 0.05
"""How often aborts and deaths are looked for while a letter is under way."""
IDLE_S = 60.0
JOIN_S = 5.0
CLOSED = "closed its end of the connection"


class Letter(Work):
    """A send or receive under way; made by `Mailbox`, whose thread ends it, and calls then: what is
    called must not wait for another letter."""

    def __init__(
        self, mailbox: Mailbox, what: str, peer: int | None, tag: int, view: memoryview
    ) -> None:
        super().__init__(what)
        self.peer = peer
        self.tag = tag
        self.view = view
        self.moved_bytes = 0
        self.deadline = time.monotonic() + mailbox.timeout_s
        self._mailbox = mailbox

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it is done; by default until the mailbox's own deadline for it.

        A letter that is not done within `timeout_s` has failed: its memory is free again.

        Raises:
            TransportError: names peer, tag and bytes.
        """
        if not self._done.wait(timeout_s):
            assert timeout_s is not None
            self._mailbox.give_up(self, timeout_s)
        super().wait()


class Mailbox:
    """Sends and receives between pairs of ranks; one thread moves all of them at once.

    The thread starts with the first letter. Messages of one pair with one tag arrive in order;
    nothing else is ordered.

    Arguments:
        timeout_s: how long a letter may take.
    """

    def __init__(self, peers: Peers, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._peers = peers
        self._lock = threading.Lock()
        self._posted: deque[tuple[Callable[[Letter], None], Letter]] = deque()
        self._thread: threading.Thread | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._drop_wake = weakref.finalize(self, os.close, self._wake)  # or when nobody holds it
        self._ended: str | None = None
        self._closing = False
        # From here on the thread's own.
        self._pairs = {
            peer: _Pair(peer, peers.mail(peer))
            for peer in range(peers.world_size)
            if peer != peers.rank
        }
        self._by_fileno = {pair.socket.fileno(): pair for pair in self._pairs.values()}
        self._receives: list[Letter] = []
        self._arrived: list[_Message] = []
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)

    def send(self, peer: int, tag: int, data: torch.Tensor) -> Letter:
        """Sends uint8 (bytes,), contiguous, which stays untouched until the letter is done.

        Done means that it is on its way, not that it was received.
        """
        what = f"send of {data.numel()} bytes to {self._name(peer)}, tag {tag}"
        return self._post(self._send, Letter(self, what, peer, tag, data.numpy().data))

    def receive(self, peer: int | None, tag: int, into: torch.Tensor) -> Letter:
        """Receives into uint8 (bytes,), contiguous, which is the letter's until it is done.

        Arguments:
            peer: who sends; None: whoever's message with the tag has come first.
        """
        sender = "any rank" if peer is None else self._name(peer)
        what = f"receive of {into.numel()} bytes from {sender}, tag {tag}"
        return self._post(self._receive, Letter(self, what, peer, tag, into.numpy().data))

    def close(self) -> None:
        """Ends the thread; letters under way fail. Doing it again does nothing."""
        with self._lock:
            self._closing = True
            self._ended = self._ended or "the mailbox was closed"
            thread = self._thread
            if thread is None:
                self._close_wake()
            elif self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        if thread is not None and thread is not threading.current_thread():
            thread.join(JOIN_S)

    def give_up(self, letter: Letter, timeout_s: float) -> None:
        """Ends a letter whose waiter waits no longer."""
        self._post(lambda letter: self._expire(letter, timeout_s), letter)

    def _name(self, peer: int) -> str:
        return f"rank {peer} on {self._peers.hosts[peer]}"

    def _post(self, do: Callable[[Letter], None], letter: Letter) -> Letter:
        with self._lock:
            ended = self._ended
            if ended is None:
                self._posted.append((do, letter))
                if self._thread is None:
                    name = f"penstock-mailbox-{self._peers.rank}"
                    self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                    self._thread.start()
                os.eventfd_write(self._wake, 1)
        if ended is not None:
            letter.end(TransportError(f"{letter.what}: {ended}"))
        return letter

    def _run(self) -> None:
        reason = "the mailbox's thread failed"
        next_look = 0.0
        try:
            while not self._closing:
                while self._posted:
                    do, letter = self._posted.popleft()
                    do(letter)
                if (now := time.monotonic()) >= next_look:
                    next_look = now + TICK_S
                    self._peers.look()
                    self._review(now)
                busy = self._register()
                for fileno, events in self._poll.poll(1000 * (TICK_S if busy else IDLE_S)):
                    if fileno == self._wake:
                        os.eventfd_read(self._wake)
                    else:
                        self._move(self._by_fileno[fileno], events)
            reason = "the mailbox was closed"
        except TransportError as error:
            reason = error.message
        finally:
            with self._lock:
                self._ended = self._ended or reason
                self._close_wake()
            for letter in self._under_way():
                self._fail(letter, reason)

    def _under_way(self) -> list[Letter]:
        pairs = self._pairs.values()
        partly = [pair.coming.receive for pair in pairs if pair.coming and pair.coming.receive]
        sends = [letter for pair in pairs for letter in pair.sends]
        return [*partly, *self._receives, *sends, *(letter for _, letter in self._posted)]

    def _close_wake(self) -> None:
        if self._wake >= 0:
            self._drop_wake()
            self._wake = -1

    def _fail(self, letter: Letter, why: str, hint: str = "") -> None:
        letter.end(TransportError(f"{letter.what}: {why}", hint=hint))

    def _register(self) -> bool:
        """Polls each pair for what is wanted of it; whether any letter is under way."""
        sending = any(pair.sends for pair in self._pairs.values())
        senders = {letter.peer for letter in self._receives}
        busy = sending or bool(senders)
        for pair in self._pairs.values():
            bound = pair.coming is not None and pair.coming.receive is not None
            busy = busy or bound
            pair.ahead = sending or None in senders or pair.peer in senders
            reads = not pair.ended and (bound or pair.ahead)
            mask = (select.POLLIN if reads else 0) | (select.POLLOUT if pair.sends else 0)
            if mask != pair.mask:
                if mask == 0:  # an ended connection would be reported all the time
                    self._poll.unregister(pair.socket)
                else:
                    self._poll.register(pair.socket, mask)
                pair.mask = mask
        return busy

    def _review(self, now: float) -> None:
        """Fails the letters that are late, and those of peers that will say nothing more."""
        for letter in self._under_way():
            if letter.deadline <= now:
                self._expire(letter, self.timeout_s)
        ended = [pair for pair in self._pairs.values() if pair.ended]
        for pair in ended:
            why = f"{self._name(pair.peer)} {pair.why or self._peers.gone(pair.peer) or CLOSED}"
            if (message := pair.coming) is not None:
                pair.coming = None
                if message.receive is not None:
                    self._fail(message.receive, f"{why} after {message.moved_bytes} bytes")
                elif message in self._arrived:
                    self._arrived.remove(message)
            for letter in [letter for letter in self._receives if letter.peer == pair.peer]:
                self._receives.remove(letter)
                self._fail(letter, why)
        if ended and len(ended) == len(self._pairs):
            for letter in [letter for letter in self._receives if letter.peer is None]:
                self._receives.remove(letter)
                self._fail(letter, "all other ranks have left")

    def _expire(self, letter: Letter, timeout_s: float) -> None:
        """Ends a letter, wherever it is; nothing, if it is done."""
        if letter.done():
            return
        late = f"after {timeout_s:g} s"
        hint = "the other rank is stopped, slow, or has not come to its half of it"
        if letter in self._receives:
            self._receives.remove(letter)
            self._fail(letter, f"{late} nothing had come", hint)
            return
        for pair in self._pairs.values():
            if pair.coming is not None and pair.coming.receive is letter:
                pair.coming.discard()
                self._fail(letter, f"{late} {pair.coming.moved_bytes} bytes had come", hint)
            elif letter in pair.sends:
                gone_bytes = max(0, letter.moved_bytes)
                pair.sends.remove(letter)
                self._fail(letter, f"{late} {gone_bytes} bytes had gone", hint)
                if letter.moved_bytes > -HEADER.size:
                    # What follows would be taken for the rest of it.
                    pair.socket.shutdown(socket.SHUT_WR)

    def _send(self, letter: Letter) -> None:
        if letter.peer == self._peers.rank:
            message = _Message(letter.peer, letter.tag, len(letter.view), len(letter.view))
            message.memory = letter.view
            if not self._offer(message):
                message.memory = memoryview(bytearray(letter.view))
            letter.end()
            return
        assert letter.peer is not None
        pair = self._pairs[letter.peer]
        letter.moved_bytes = -HEADER.size
        pair.sends.append(letter)
        if len(pair.sends) == 1:
            self._write(pair)

    def _receive(self, letter: Letter) -> None:
        for message in self._arrived:
            if message.answers(letter):
                self._arrived.remove(message)
                self._bind(message, letter)
                return
        self._receives.append(letter)

    def _offer(self, message: _Message) -> bool:
        """To the first receive that it answers, if there is one; else it is kept for later ones."""
        for letter in self._receives:
            if message.answers(letter):
                self._receives.remove(letter)
                self._bind(message, letter)
                return True
        self._arrived.append(message)
        return False

    def _bind(self, message: _Message, letter: Letter) -> None:
        letter.source = message.source
        if message.num_bytes != len(letter.view):
            message.discard()
            self._fail(
                letter,
                f"{self._name(message.source)} sent {message.num_bytes} bytes, "
                f"expected {len(letter.view)}",
                "sender and receiver must mean the same shape and dtype",
            )
            return
        if message.memory is not None:
            letter.view[: message.moved_bytes] = message.memory[: message.moved_bytes]
            message.memory = None
        message.receive = letter
        if message.moved_bytes == message.num_bytes:
            letter.end()

    def _move(self, pair: _Pair, events: int) -> None:
        if pair.sends and events & ~select.POLLIN:
            self._write(pair)
        if not pair.ended and events & ~select.POLLOUT:
            self._read(pair)

    def _write(self, pair: _Pair) -> None:
        """Sends what goes out now, up to a turn."""
        try:
            while pair.sends:
                letter = pair.sends[0]
                start = letter.moved_bytes  # below 0: so much of the header has yet to go
                body = letter.view[max(0, start) : max(0, start) + TURN_BYTES]
                header = HEADER.pack(MAGIC, letter.tag, len(letter.view))
                letter.moved_bytes += pair.socket.sendmsg(
                    [header[start:], body] if start < 0 else [body]
                )
                if letter.moved_bytes < len(letter.view):
                    return
                pair.sends.popleft()
                letter.end()
        except BlockingIOError:
            pass
        except OSError as error:
            self._peers.look()
            why = self._peers.gone(pair.peer) or f"cannot be sent to: {error.strerror}"
            while pair.sends:
                self._fail(pair.sends.popleft(), f"{self._name(pair.peer)} {why}")

    def _read(self, pair: _Pair) -> None:
        """Takes what has come, up to a turn, as far as it has a place."""
        try:
            if pair.coming is None:
                data = pair.socket.recv(HEADER.size - len(pair.header))
                pair.ended = not data
                pair.header += data
                if len(pair.header) < HEADER.size:
                    return
                magic, tag, num_bytes = HEADER.unpack(pair.header)
                pair.header = b""
                if magic != MAGIC:
                    pair.ended, pair.why = True, "sent what is no message"
                    return
                pair.coming = _Message(pair.peer, tag, num_bytes)
                self._offer(pair.coming)
            message = pair.coming
            while message.moved_bytes < message.num_bytes:
                if message.receive is None and not pair.ahead:
                    return
                received = pair.socket.recv_into(message.place())
                pair.ended = received == 0
                message.moved_bytes += received
                if received < TURN_BYTES:
                    break
            if message.moved_bytes == message.num_bytes:
                pair.coming = None
                if message.receive is not None:
                    message.receive.end()
        except BlockingIOError:
            pass
        except OSError:
            pair.ended = True


@dataclass(eq=False)
class _Message:
    """What has come, or is coming.

    Attributes:
        moved_bytes: so much of it has come.
        receive: whose memory it goes to; else its own.
        discarded: it goes nowhere.
    """

    source: int
    tag: int
    num_bytes: int
    moved_bytes: int = 0
    receive: Letter | None = None
    memory: memoryview | None = None
    discarded: bool = False

    def answers(self, letter: Letter) -> bool:
        return letter.tag == self.tag and letter.peer in (None, self.source)

    def discard(self) -> None:
        self.receive, self.memory, self.discarded = None, None, True

    def place(self) -> memoryview:
        """For the next bytes of it."""
        stop = min(self.num_bytes, self.moved_bytes + TURN_BYTES)
        if self.discarded:
            return memoryview(bytearray(stop - self.moved_bytes))
        if self.receive is None and self.memory is None:
            self.memory = torch.empty(self.num_bytes, dtype=torch.uint8).numpy().data
        memory = self.memory if self.receive is None else self.receive.view
        assert memory is not None
        return memory[self.moved_bytes : stop]


@dataclass(eq=False)
class _Pair:
    """This rank and one other.

    Attributes:
        header: the part of the next message's header that has come.
        ahead: whether messages may be read that no receive is posted for.
        mask: what its socket is polled for.
        ended: nothing more will come; `why`, if it is not that the peer has gone.
    """

    peer: int
    socket: socket.socket
    sends: deque[Letter] = field(default_factory=deque)
    header: bytes = b""
    coming: _Message | None = None
    ahead: bool = False
    mask: int = 0
    ended: bool = False
    why: str | None = None
