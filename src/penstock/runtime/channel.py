"""Messages between a worker and the driver: JSON in length-framed bytes over TCP.

After connecting, each side proves the run's token to the other:

    driver -> worker   {"challenge": c1}
    worker -> driver   {"rank": r, "proof": HMAC(token, worker:c1), "challenge": c2}
    driver -> worker   {"proof": HMAC(token, driver:c2)}

Then the worker sends events and the driver instructions; nothing is unpickled.
"""

from __future__ import annotations

import json
import select
import socket
import struct
from typing import Any

from penstock.errors import TransportError
from penstock.exchange import token as proofs

Message = dict[str, Any]
MAX_FRAME_BYTES = 16 << 20
HANDSHAKE_S = 10.0


def encode(message: Message) -> bytes:
    """One frame: 4 bytes length (big endian), JSON in UTF-8."""
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


class Frames:
    """Bytes in, messages out. Raises ValueError for what cannot be a frame."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete with these bytes."""
        self._pending += data
        messages = []
        while len(self._pending) >= 4:
            (length,) = struct.unpack_from(">I", self._pending)
            if length > self.max_bytes:
                raise ValueError(f"a frame of {length} bytes; at most {self.max_bytes}")
            if len(self._pending) < 4 + length:
                break
            try:
                message = json.loads(bytes(self._pending[4 : 4 + length]))
            except RecursionError as error:
                raise ValueError("a frame that is nested too deeply") from error
            del self._pending[: 4 + length]
            if not isinstance(message, dict):
                raise ValueError("a frame that is no JSON object")
            messages.append(message)
        return messages


class Channel:
    """The worker's end.

    Raises:
        TransportError: the driver does not answer, or does not know the token.
    """

    def __init__(self, address: tuple[str, int], token: str, rank: int) -> None:
        self._frames = Frames(MAX_FRAME_BYTES)
        self._received: list[Message] = []
        try:
            self._socket = socket.create_connection(address, timeout=HANDSHAKE_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            theirs = str(self._next()["challenge"])
            mine = proofs.challenge()
            answer = proofs.proof(token, "worker", theirs)
            self.send({"rank": rank, "proof": answer, "challenge": mine})
            if not proofs.proves(token, "driver", mine, self._next().get("proof")):
                raise TransportError(f"{address[0]}:{address[1]} does not know this run's token")
        except (OSError, KeyError, ValueError) as error:
            raise TransportError(
                f"rank {rank} cannot reach the driver at {address[0]}:{address[1]}: {error}",
                hint="a firewall between the two, or a driver that has ended",
            ) from error

    def send(self, message: Message) -> None:
        """Sends an event to the driver."""
        self._socket.sendall(encode(message))

    def receive(self) -> list[Message]:
        """The instructions that have come; does not wait.

        Raises:
            TransportError: the driver is gone.
        """
        while select.select([self._socket], [], [], 0)[0]:
            data = self._socket.recv(1 << 16)
            if not data:
                raise TransportError("the driver is gone")
            self._received += self._frames.feed(data)
        received, self._received = self._received, []
        return received

    def close(self) -> None:
        """Ends the conversation."""
        self._socket.close()

    def _next(self) -> Message:
        while not self._received:
            data = self._socket.recv(1 << 16)
            if not data:
                raise ConnectionError("it closed the connection; is its run another one?")
            self._received += self._frames.feed(data)
        return self._received.pop(0)
