"""The driver's end of the channels to its agents and workers: a small server without threads.

`poll` accepts, authenticates, reads and writes; whoever does not prove the run's token within the
deadline is dropped, and whoever reads slowly cannot hold up the others.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock import token as proofs
from penstock.cluster.channel import HANDSHAKE_S, MAX_FRAME_BYTES, Frames, Message, encode, tune
from penstock.errors import UserError

MAX_UNPROVEN_BYTES = 16384
ROLES = ("worker", "agent")


@dataclass(eq=False)
class Peer:
    """A connection.

    Attributes:
        number: never used twice.
        hello: what it said of itself with the proof of the token; empty before.
    """

    number: int
    socket: socket.socket
    challenge: str
    deadline: float
    hello: Message = field(default_factory=dict)
    frames: Frames = field(default_factory=lambda: Frames(MAX_UNPROVEN_BYTES))
    outgoing: deque[memoryview] = field(default_factory=deque)


class Coordinator:
    """Listens for the agents and workers of one run.

    Arguments:
        token: the run's token.
        host, port: where to listen; port 0 is any free one.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, token: str, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._token = token
        self._peers: dict[socket.socket, Peer] = {}
        self._numbered: dict[int, Peer] = {}
        self._count = 0
        try:
            self._listener = _listener(host, port)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(
                f"port {port} on {host} cannot be used: {error.strerror}",
                hint="give another port, or none: then any free one is taken",
            ) from error
        self._listener.setblocking(False)
        self.address: tuple[str, int] = host, self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""
        return self._selector.fileno()

    def poll(self) -> list[tuple[Peer, Message | None]]:
        """What peers have sent, in order. Never waits.

        The first message of a peer is its hello; None says that its connection ended.
        """
        received: list[tuple[Peer, Message | None]] = []
        for key, mask in self._selector.select(timeout=0):
            if key.fileobj is self._listener:
                self._accept()
                continue
            peer = self._peers.get(key.fileobj)  # type: ignore[call-overload]
            if peer is not None and mask & selectors.EVENT_READ:
                received += self._read(peer)
            if mask & selectors.EVENT_WRITE and key.fileobj in self._peers:
                self._flush(self._peers[key.fileobj])
        now = time.monotonic()
        for peer in [p for p in self._peers.values() if not p.hello and p.deadline < now]:
            self._drop(peer)
        return received

    def send(self, peer: int, message: Message, body: Sequence[bytes | memoryview] = ()) -> None:
        """An instruction to a peer, if it is still there. The body is not copied.

        What cannot go out at once goes out in later `poll`s.
        """
        if peer not in self._numbered:
            return
        if body:
            message = message | {"bytes": sum(memoryview(part).nbytes for part in body)}
        self._enqueue(self._numbered[peer], encode(message), *body)

    def send_all(self, role: str, message: Message) -> None:
        """An instruction to all peers of a role."""
        for peer in list(self._numbered.values()):
            if peer.hello["role"] == role:
                self.send(peer.number, message)

    def drop(self, peer: int) -> None:
        """Ends a peer's connection, if it is still there."""
        if peer in self._numbered:
            self._drop(self._numbered[peer])

    def close(self) -> None:
        """Stops listening and ends all connections."""
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        connection.setblocking(False)
        tune(connection)
        self._count += 1
        deadline = time.monotonic() + HANDSHAKE_S
        peer = Peer(self._count, connection, proofs.challenge(), deadline)
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)
        self._enqueue(peer, encode({"challenge": peer.challenge}))

    def _read(self, peer: Peer) -> list[tuple[Peer, Message | None]]:
        messages: list[Message] = []
        ended = False
        try:
            while not ended and (peer.hello or not messages):
                data = peer.socket.recv(1 << 16)
                messages += peer.frames.feed(data)
                ended = not data
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            ended = True
        received: list[tuple[Peer, Message | None]] = []
        for message in messages:
            if peer.hello:
                received.append((peer, message))
            elif self._admit(peer, message):
                received.append((peer, peer.hello))
            else:
                ended = True
                break
        if ended:
            received += self._ended(peer)
        return received

    def _admit(self, peer: Peer, message: Message) -> bool:
        role, challenge = message.get("role"), message.pop("challenge", None)
        if role not in ROLES or not isinstance(challenge, str):
            return False
        if not proofs.proves(self._token, role, peer.challenge, message.pop("proof", None)):
            return False
        if not isinstance(message.get("rank"), int):
            return False
        peer.hello, peer.frames.max_bytes = message, MAX_FRAME_BYTES
        self._numbered[peer.number] = peer
        self._enqueue(peer, encode({"proof": proofs.proof(self._token, "driver", challenge)}))
        return True

    def _enqueue(self, peer: Peer, *parts: bytes | memoryview) -> None:
        idle = not peer.outgoing
        peer.outgoing.extend(view for part in parts if (view := memoryview(part).cast("B")).nbytes)
        if idle:  # else its turn comes in `poll`
            self._flush(peer)

    def _flush(self, peer: Peer) -> None:
        """Sends what goes out now."""
        try:
            while peer.outgoing:
                sent = peer.socket.send(peer.outgoing[0])
                if sent == len(peer.outgoing[0]):
                    peer.outgoing.popleft()
                else:
                    peer.outgoing[0] = peer.outgoing[0][sent:]
        except BlockingIOError:
            pass
        except OSError:  # reading tells that it is gone, after what it said last
            peer.outgoing.clear()
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outgoing else 0)
        self._selector.modify(peer.socket, events)

    def _ended(self, peer: Peer) -> list[tuple[Peer, Message | None]]:
        if peer.socket not in self._peers:
            return []
        self._drop(peer)
        return [(peer, None)] if peer.hello else []

    def _drop(self, peer: Peer) -> None:
        self._selector.unregister(peer.socket)
        del self._peers[peer.socket]
        self._numbered.pop(peer.number, None)
        peer.socket.close()


def _listener(host: str, port: int) -> socket.socket:
    """Listens at this address, or at all if it is not this machine's own, as behind a NAT."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL and not isinstance(error, socket.gaierror):
            raise
        return socket.create_server(("", port), family=family)
