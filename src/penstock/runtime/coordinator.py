"""The driver's end of the channels to its workers: a small server without threads.

`poll` accepts, authenticates, reads; whoever does not prove the run's token within the deadline is
dropped and cannot hold up the others.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from dataclasses import dataclass, field

from penstock.errors import UserError
from penstock.exchange import token as proofs
from penstock.runtime.channel import HANDSHAKE_S, MAX_FRAME_BYTES, Frames, Message, encode

MAX_UNPROVEN_BYTES = 4096


@dataclass(eq=False)
class Peer:
    """A connection; `rank` is None until it has proved the token."""

    socket: socket.socket
    challenge: str
    deadline: float
    rank: int | None = None
    frames: Frames = field(default_factory=lambda: Frames(MAX_UNPROVEN_BYTES))


class Coordinator:
    """Listens for the workers of one run.

    Arguments:
        token: the run's token.
        host, port: where to listen; port 0 is any free one.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, token: str, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._token = token
        self._peers: dict[socket.socket, Peer] = {}
        self._ranks: dict[int, Peer] = {}
        try:
            self._listener = socket.create_server((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise UserError(
                f"port {port} on {host} cannot be used: {error.strerror}",
                hint="give another port, or none: then any free one is taken",
            ) from error
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""
        return self._selector.fileno()

    def poll(self) -> list[tuple[int, Message | None]]:
        """What ranks have sent, in order; None for a rank whose connection ended. Never waits."""
        received: list[tuple[int, Message | None]] = []
        for key, _ in self._selector.select(timeout=0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                received += self._read(self._peers[key.fileobj])  # type: ignore[index]
        now = time.monotonic()
        for peer in [p for p in self._peers.values() if p.rank is None and p.deadline < now]:
            self._drop(peer)
        return received

    def send(self, message: Message) -> None:
        """An instruction to all workers that are connected."""
        for peer in list(self._ranks.values()):
            if not self._send(peer, message):
                self._drop(peer)

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
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer = Peer(connection, proofs.challenge(), time.monotonic() + HANDSHAKE_S)
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)
        if not self._send(peer, {"challenge": peer.challenge}):
            self._drop(peer)

    def _read(self, peer: Peer) -> list[tuple[int, Message | None]]:
        messages: list[Message] = []
        ended = False
        try:
            while not ended and (peer.rank is not None or not messages):
                data = peer.socket.recv(1 << 16)
                messages += peer.frames.feed(data)
                ended = not data
        except BlockingIOError:
            pass
        except (OSError, ValueError):
            ended = True
        received: list[tuple[int, Message | None]] = []
        for message in messages:
            if peer.rank is not None:
                received.append((peer.rank, message))
            elif not self._admit(peer, message):
                ended = True
                break
        if ended:
            if peer.rank is not None:
                received.append((peer.rank, None))
            self._drop(peer)
        return received

    def _admit(self, peer: Peer, message: Message) -> bool:
        rank, challenge = message.get("rank"), message.get("challenge")
        if not proofs.proves(self._token, "worker", peer.challenge, message.get("proof")):
            return False
        if not isinstance(rank, int) or not isinstance(challenge, str) or rank in self._ranks:
            return False
        peer.rank, peer.frames.max_bytes = rank, MAX_FRAME_BYTES
        self._ranks[rank] = peer
        return self._send(peer, {"proof": proofs.proof(self._token, "driver", challenge)})

    def _send(self, peer: Peer, message: Message) -> bool:
        """Whether it went out."""
        try:
            peer.socket.sendall(encode(message))
        except OSError:
            return False
        return True

    def _drop(self, peer: Peer) -> None:
        self._selector.unregister(peer.socket)
        del self._peers[peer.socket]
        if peer.rank is not None:
            del self._ranks[peer.rank]
        peer.socket.close()
