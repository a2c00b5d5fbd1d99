"""How the ranks of a group meet: connections between all pairs, each proven.

Every pair of ranks has several TCP connections, its lanes: control, mail and data. The higher rank
connects to the lower; addresses and the group's secret come from a store. On a new connection each
side proves the secret to the other before anything else is said:

    lower  -> higher   MAGIC, challenge
    higher -> lower    MAGIC, own rank, lane, challenge, proof
    lower  -> higher   proof

A proof covers both ranks, the lane and the direction, so that it is of no use on another
connection.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, Protocol

from penstock import token as proofs
from penstock.errors import TransportError

CONTROL, MAIL, DATA = 0, 1, 2
"""Lanes of a pair; from `DATA` on, its data sockets."""
MAGIC = b"penstok1"
GREETING = struct.Struct("!8s32s")
HELLO = struct.Struct("!8sIH32s64s")
PROOF = struct.Struct("!64s")
HANDSHAKE_S = 5.0
"""How long a stranger may take to prove itself."""
RETRY_S = 0.1
TICK_S = 0.05
SILENT_S = 30
"""How long a machine may be silent on a control socket: then it counts as gone."""

Lane = tuple[int, int]
"""A peer's rank, and which of the pair's connections."""
Handshake = Generator[int, bytes, Lane]
"""Yields how many bytes it needs next, and returns once the other side has proven itself."""


class Store(Protocol):
    """What is used of a torch.distributed.Store."""

    def add(self, key: str, value: int, /) -> int: ...

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


class Door(NamedTuple):
    """Where a rank listens, and its machine's name."""

    address: str
    port: int
    host: str


def meet(
    store: Store,
    rank: int,
    world_size: int,
    address: str | None,
    streams: int,
    timeout_s: float,
) -> tuple[list[str], dict[Lane, socket.socket]]:
    """The ranks' hosts, and this rank's connections with all others, nonblocking.

    Arguments:
        address: see `Peers.meet`, as for the others.
        streams: data lanes per pair.

    Raises:
        TransportError: names the ranks that did not come before the deadline.
    """
    host = socket.gethostname()
    if world_size == 1:
        return [host], {}
    deadline = time.monotonic() + timeout_s
    lanes = DATA + streams
    with _listener(address or _own_address(store), backlog=world_size * lanes) as listener:
        own = Door(listener.getsockname()[0], listener.getsockname()[1], host)
        token, doors = _publish(store, rank, world_size, own, timeout_s)
        meeting = _Meeting(token, rank, doors, lanes, listener)
        try:
            meeting.run(deadline, timeout_s)
        except BaseException:
            meeting.close()
            raise
    return [door.host for door in doors], meeting.met


class _Meeting:
    """One rank's part in the meeting: accepts from higher ranks, connects to lower ones.

    All of it goes on in one loop, so that nobody holds up anybody: a handshake that is slow, or no
    handshake at all, costs the others nothing.

    Attributes:
        met: the sockets whose other end has proven the secret.
    """

    def __init__(
        self, token: str, rank: int, doors: Sequence[Door], lanes: int, listener: socket.socket
    ) -> None:
        self.met: dict[Lane, socket.socket] = {}
        self._token = token
        self._rank = rank
        self._doors = doors
        self._listener = listener
        others = [peer for peer in range(len(doors)) if peer != rank]
        self._expected = {(peer, lane) for peer in others for lane in range(lanes)}
        self._due = {wanted: 0.0 for wanted in self._expected if wanted[0] < rank}
        self._guests: dict[int, _Guest] = {}
        self._failures: dict[int, str] = {}
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def run(self, deadline: float, timeout_s: float) -> None:
        """Until all have met; raises TransportError at the deadline."""
        while len(self.met) < len(self._expected):
            now = time.monotonic()
            if now >= deadline:
                raise self._incomplete(timeout_s)
            for lane in [lane for lane, due in self._due.items() if due <= now]:
                del self._due[lane]
                self._connect(lane)
            for guest in [g for g in self._guests.values() if g.deadline <= now]:
                self._drop(guest, "took too long to prove itself")
            for fileno, _ in self._poll.poll(TICK_S * 1000):
                if fileno == self._listener.fileno():
                    self._accept(now)
                else:
                    self._advance(self._guests[fileno])
        for guest in list(self._guests.values()):
            self._drop(guest, "is not needed")

    def close(self) -> None:
        for connection in [*self.met.values(), *(g.socket for g in self._guests.values())]:
            connection.close()

    def _connect(self, lane: Lane) -> None:
        door = self._doors[lane[0]]
        connection = socket.socket(_family(door.address), socket.SOCK_STREAM)
        # Who is slow to accept is only waited for: the deadline is the meeting's.
        guest = _Guest(connection, self._connecting(connection, *lane), float("inf"), lane)
        connection.setblocking(False)
        code = connection.connect_ex((door.address, door.port))
        if code not in (0, errno.EINPROGRESS):
            self._failures[lane[0]] = os.strerror(code)
            self._due[lane] = time.monotonic() + RETRY_S
            connection.close()
            return
        self._welcome(guest)

    def _accept(self, now: float) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        connection.setblocking(False)
        self._welcome(_Guest(connection, self._accepting(connection), now + HANDSHAKE_S))

    def _welcome(self, guest: _Guest) -> None:
        self._guests[guest.socket.fileno()] = guest
        self._poll.register(guest.socket, select.POLLIN)
        try:
            guest.needs = next(guest.handshake)
        except OSError as error:
            self._drop(guest, str(error))

    def _advance(self, guest: _Guest) -> None:
        """Takes no byte more than the handshake needs: what follows is for whoever comes next."""
        try:
            data = guest.socket.recv(guest.needs - len(guest.received))
            guest.received += data
            if not data:
                raise ConnectionError("closed the connection")
            if len(guest.received) == guest.needs:
                message, guest.received = guest.received, b""
                guest.needs = guest.handshake.send(message)
        except BlockingIOError:
            pass
        except StopIteration as proven:
            self._join(guest, proven.value)
        except OSError as error:
            self._drop(guest, error.strerror or str(error))

    def _accepting(self, connection: socket.socket) -> Handshake:
        own = proofs.challenge()
        connection.send(GREETING.pack(MAGIC, own.encode()))
        magic, peer, lane, challenge, proof = HELLO.unpack((yield HELLO.size))
        pair = f"{peer} to {self._rank}, lane {lane}"
        proven = proofs.proves(self._token, f"connect {pair}", own, proof.decode("latin-1"))
        if magic != MAGIC or not proven or (peer, lane) not in self._expected or peer < self._rank:
            raise ConnectionError("is not of this group")
        answer = proofs.proof(self._token, f"accept {pair}", challenge.decode("latin-1"))
        connection.send(PROOF.pack(answer.encode()))
        return peer, lane

    def _connecting(self, connection: socket.socket, peer: int, lane: int) -> Handshake:
        magic, challenge = GREETING.unpack((yield GREETING.size))
        if magic != MAGIC:
            raise ConnectionError("what listens there is not of this group")
        pair = f"{self._rank} to {peer}, lane {lane}"
        proof = proofs.proof(self._token, f"connect {pair}", challenge.decode("latin-1"))
        own = proofs.challenge()
        connection.send(HELLO.pack(MAGIC, self._rank, lane, own.encode(), proof.encode()))
        (answer,) = PROOF.unpack((yield PROOF.size))
        if not proofs.proves(self._token, f"accept {pair}", own, answer.decode("latin-1")):
            raise ConnectionError("what listens there is not of this group")
        return peer, lane

    def _join(self, guest: _Guest, lane: Lane) -> None:
        self._leave(guest)
        if lane in self.met:  # it has lost the earlier connection, or it would not come again
            self.met[lane].close()
        self.met[lane] = guest.socket
        _tune(guest.socket, lane[1])

    def _drop(self, guest: _Guest, why: str) -> None:
        self._leave(guest)
        guest.socket.close()
        if guest.wanted is not None:
            self._failures[guest.wanted[0]] = why
            self._due[guest.wanted] = time.monotonic() + RETRY_S

    def _leave(self, guest: _Guest) -> None:
        del self._guests[guest.socket.fileno()]
        self._poll.unregister(guest.socket)

    def _incomplete(self, timeout_s: float) -> TransportError:
        late = []
        for peer in sorted({peer for peer, _ in self._expected - self.met.keys()}):
            why = self._failures.get(peer)
            late.append(f"{self._name(peer)} ({why})" if why else self._name(peer))
        return TransportError(
            f"after {timeout_s:g} s {self._name(self._rank)} had no connection with "
            + ", ".join(late),
            hint="is each rank's address one that the others' machines can reach? MASTER_ADDR "
            "decides it where none is given",
        )

    def _name(self, rank: int) -> str:
        door = self._doors[rank]
        return f"rank {rank} on {door.host} at {door.address}:{door.port}"


@dataclass(eq=False)
class _Guest:
    """A connection that has proven nothing so far.

    Attributes:
        needs: how many bytes the handshake needs next.
        wanted: the lane, if this rank connects.
    """

    socket: socket.socket
    handshake: Handshake
    deadline: float
    wanted: Lane | None = None
    needs: int = 0
    received: bytes = b""


def _publish(
    store: Store, rank: int, world_size: int, own: Door, timeout_s: float
) -> tuple[str, list[Door]]:
    """Puts the own door into the store; returns the group's secret and all doors from there."""
    keys = [f"peers/{peer}" for peer in range(world_size)]
    try:
        prefix = f"peers/{_meeting(store, rank)}"  # what an earlier group left is not seen
        secret, keys = f"{prefix}/secret", [f"{prefix}/{peer}" for peer in range(world_size)]
        if rank == 0:
            store.set(secret, proofs.new_token())
        store.set(keys[rank], json.dumps(own._asdict()))
        store.wait([secret, *keys], timedelta(seconds=timeout_s))
        doors = [Door(**json.loads(store.get(key))) for key in keys]
        return store.get(secret).decode(), doors
    except RuntimeError as error:  # what stores raise at a deadline, or when they are gone
        raise TransportError(
            f"after {timeout_s:g} s rank {rank} of {world_size} on {own.host} had not seen "
            f"{_unseen(store, keys)} in the store: {str(error).splitlines()[0]}",
            hint="did each rank start, with this world size and this store? Their logs tell why",
        ) from error


def _meeting(store: Store, rank: int) -> int:
    """How many groups this rank has formed by this store, this one included; 0 if it cannot count
    (the driver's, which has a new one for each generation)."""
    try:
        return int(store.add(f"peers/meetings of {rank}", 1))
    except (NotImplementedError, RuntimeError):
        return 0


def _unseen(store: Store, keys: Sequence[str]) -> str:
    try:
        late = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:  # the store itself is gone
        return "the others"
    return f"rank {', '.join(late)}"


def _own_address(store: Store) -> str:
    """The address from which packets go to the store's machine."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    master = os.environ.get("MASTER_ADDR") or getattr(store, "host", "")
    if master:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            master, 1, type=socket.SOCK_DGRAM
        ):
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.connect(address)  # sends nothing
                    return str(probe.getsockname()[0])
            except OSError:
                continue
    return "127.0.0.1"


def _listener(address: str, backlog: int) -> socket.socket:
    listener = socket.create_server((address, 0), family=_family(address), backlog=backlog)
    listener.setblocking(False)
    return listener


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _tune(connection: socket.socket, lane: int) -> None:
    """Small messages go at once, and a machine that has vanished is noticed."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if lane == CONTROL:
        # Only here: where much is sent, the limit would also end connections with a rank that
        # lives but does not read for so long.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_S * 1000)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_S // 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENT_S // 6)
