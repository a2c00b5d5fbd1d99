"""Messages between a run's driver and its agents and workers: JSON in length-framed bytes over TCP.

After connecting, each side proves the run's token to the other:

    driver -> peer     {"challenge": c1}
    peer   -> driver   {"role": "worker", "rank": r, ..., "challenge": c2,
                        "proof": HMAC(token, worker:c1)}
    driver -> peer     {"proof": HMAC(token, driver:c2)}

Then the peer sends events and the driver instructions; nothing is unpickled. An instruction with
the key "bytes" is followed by so many raw bytes, its body.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from typing import Any

from penstock import token as proofs
from penstock.errors import TransportError

Message = dict[str, Any]
MAX_FRAME_BYTES = 16 << 20
HANDSHAKE_S = 10.0
BODY_S = 60.0
"""How long a body may stand still on its way."""
SILENT_MS = 30_000
"""How long what was sent may stay unacknowledged: then the other machine counts as gone."""


def tune(connection: socket.socket) -> None:
    """Small messages go at once, and a machine that has vanished is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)


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
        while (message := self.next()) is not None:
            messages.append(message)
        return messages

    def add(self, data: bytes) -> None:
        """Takes bytes, for `next`."""
        self._pending += data

    def next(self) -> Message | None:
        """The next message, if it is complete."""
        if len(self._pending) < 4:
            return None
        (length,) = struct.unpack_from(">I", self._pending)
        if length > self.max_bytes:
            raise ValueError(f"a frame of {length} bytes; at most {self.max_bytes}")
        if len(self._pending) < 4 + length:
            return None
        try:
            message = json.loads(bytes(self._pending[4 : 4 + length]))
        except RecursionError as error:
            raise ValueError("a frame that is nested too deeply") from error
        del self._pending[: 4 + length]
        if not isinstance(message, dict):
            raise ValueError("a frame that is no JSON object")
        return message

    def take(self, count: int) -> bytes:
        """At most so many raw bytes of what has come and is no message yet."""
        taken = bytes(self._pending[:count])
        del self._pending[:count]
        return taken


class Channel:
    """The end of an agent or worker. `send` may be called by several threads.

    Arguments:
        address: of the driver.
        hello: who this is: "role", "rank" and what else the driver is to know.

    Raises:
        TransportError: the driver does not answer, or does not know the token.
    """

    def __init__(self, address: tuple[str, int], token: str, hello: Message) -> None:
        self._frames = Frames(MAX_FRAME_BYTES)
        self._sending = threading.Lock()
        role = str(hello["role"])
        try:
            self._socket = socket.create_connection(address, timeout=HANDSHAKE_S)
            tune(self._socket)
            theirs = str(self._next()["challenge"])
            mine = proofs.challenge()
            answer = proofs.proof(token, role, theirs)
            self.send(hello | {"proof": answer, "challenge": mine})
            if not proofs.proves(token, "driver", mine, self._next().get("proof")):
                raise TransportError(f"{address[0]}:{address[1]} does not know this run's token")
        except (OSError, KeyError, ValueError) as error:
            raise TransportError(
                f"the {role} of rank {hello['rank']} on {socket.gethostname()} cannot reach the "
                f"driver at {address[0]}:{address[1]}: {error}",
                hint="a firewall between the two, or a driver that has ended",
            ) from error
        self._socket.settimeout(BODY_S)
        self.local_address: str = self._socket.getsockname()[0]
        """The address of this machine by which it reaches the driver."""

    def fileno(self) -> int:
        """Readable when `receive` may have something."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends an event to the driver."""
        with self._sending:
            self._socket.sendall(encode(message))

    def receive(self) -> list[Message]:
        """The instructions that have come, bodies under "body"; waits only for a body's rest.

        Raises:
            TransportError: the driver is gone.
        """
        try:
            while select.select([self._socket], [], [], 0)[0]:
                self._read()
        except OSError as error:
            raise TransportError(f"the driver is gone: {error}") from error
        received = []
        while (message := self._frames.next()) is not None:
            if "bytes" in message:
                message["body"] = self._body(int(message["bytes"]))
            received.append(message)
        return received

    def close(self) -> None:
        """Ends the conversation."""
        self._socket.close()

    def _next(self) -> Message:
        while (message := self._frames.next()) is None:
            self._read()
        return message

    def _read(self) -> None:
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("it closed the connection; is its run another one, or over?")
        self._frames.add(data)

    def _body(self, length: int) -> bytearray:
        body = bytearray(length)
        view, there = memoryview(body), 0
        while there < length:
            if taken := self._frames.take(length - there):
                view[there : there + len(taken)] = taken
                there += len(taken)
                continue
            if not select.select([self._socket], [], [], BODY_S)[0]:
                raise TransportError(f"the driver sent {there} of {length} bytes, then nothing")
            count = self._socket.recv_into(view[there:])
            if not count:
                raise TransportError("the driver is gone")
            there += count
        return body
