"""Connections among ranks: who gets in, who is named, and what is heard of aborts and deaths."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import FileStore, HashStore, PrefixStore, Store

from penstock import token as proofs
from penstock.errors import TransportError
from penstock.exchange import meeting
from penstock.exchange.meeting import GREETING, HELLO, MAGIC, PROOF
from penstock.exchange.peers import ABORT, FRAME, GATHER, MAX_TEXT_BYTES, WAITS, Peers

HOST = socket.gethostname()
SOON_S = 5.0


def meet(
    world_size: int, store: Store | None = None, *, timeout_s: float = 10.0, streams: int = 2
) -> list[Peers]:
    """All ranks meet, each in a thread of its own."""
    shared = store or HashStore()

    def one(rank: int) -> Peers:
        return Peers.meet(shared, rank, world_size, timeout_s=timeout_s, streams=streams)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Peers]]]:
    """`meet`, whose peers are closed in the end."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    made: list[Peers] = []

    def make(*arguments: object, **options: object) -> list[Peers]:
        made.extend(peers := meet(*arguments, **options))  # type: ignore[arg-type]
        return peers

    yield make
    for peers in made:
        peers.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def until(condition: Callable[[], object], what: str) -> None:
    """Waits for what another rank's bytes have yet to bring about."""
    give_up = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.001)


def error_of(peers: Peers) -> str:
    """What `look` raises, as soon as it does."""
    give_up = time.monotonic() + SOON_S
    while time.monotonic() < give_up:
        try:
            peers.look()
        except TransportError as error:
            return str(error)
        time.sleep(0.001)
    pytest.fail("look raised nothing")


def gathered(group: list[Peers], data: Callable[[int], bytes]) -> list[list[bytes]]:
    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(lambda p: p.gather(data(p.rank), 10.0), group))


# Meeting


@pytest.mark.parametrize("streams", [1, 3])
def test_every_pair_is_joined_by_its_own_sockets(
    group: Callable[..., list[Peers]], streams: int
) -> None:
    ranks = group(4, streams=streams)
    for a in ranks:
        assert (a.world_size, a.hosts) == (4, (HOST,) * 4)
        assert len(a.control_filenos()) == 3
        for b in ranks:
            if a is b:
                continue
            ends = [a.mail(b.rank), *a.data(b.rank)]
            others = [b.mail(a.rank), *b.data(a.rank)]
            assert len(ends) == len(others) == 1 + streams
            for lane, (end, other) in enumerate(zip(ends, others, strict=True)):
                assert end.getsockname() == other.getpeername()
                assert not end.getblocking()
                assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                end.send(bytes([a.rank, b.rank, lane]))
                until(lambda other=other: readable(other), "three bytes")
                assert other.recv(10) == bytes([a.rank, b.rank, lane])


def readable(connection: socket.socket) -> bool:
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


def test_only_a_control_socket_ends_when_the_peer_is_silent(
    group: Callable[..., list[Peers]],
) -> None:
    """On a data socket the limit would end the connection with a rank that is busy for long."""
    first, second = group(2)
    for connection in [first.mail(1), *first.data(1), second.mail(0), *second.data(0)]:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
    for peers in (first, second):
        control = socket.socket(fileno=os.dup(peers.control_filenos()[0]))
        with control:
            assert control.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
            assert control.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_one_rank_opens_nothing() -> None:
    before = open_files()
    alone = Peers.meet(HashStore(), 0, 1)
    assert alone.control_filenos() == []
    alone.look()
    alone.waits(3)
    assert alone.missing(3) == []
    assert alone.gather(b"own") == [b"own"]
    assert open_files() <= before + 1  # poll's
    alone.abort("enough")
    assert error_of(alone) == f"the group was aborted: enough (by rank 0 on {HOST})"
    alone.close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_over_ipv6(group: Callable[..., list[Peers]], monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_ipv6():
        pytest.skip("no IPv6 on this machine")
    monkeypatch.setenv("MASTER_ADDR", "::1")
    ranks = group(2)
    assert ranks[0].mail(1).family == socket.AF_INET6
    assert gathered(ranks, lambda rank: bytes([rank])) == [[b"\x00", b"\x01"]] * 2


@pytest.mark.parametrize(
    ("master", "expected"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("", "127.0.0.1")]
)
def test_the_address_is_the_one_that_routes_to_the_master(
    monkeypatch: pytest.MonkeyPatch, master: str, expected: str
) -> None:
    if ":" in master and not has_ipv6():
        pytest.skip("no IPv6 on this machine")
    monkeypatch.setenv("MASTER_ADDR", master)
    store = HashStore()
    with pytest.raises(TransportError):
        Peers.meet(store, 0, 2, timeout_s=0.05)
    assert json.loads(store.get("peers/1/0"))["address"] == expected


def test_the_given_address_is_published() -> None:
    store = HashStore()
    with pytest.raises(TransportError):
        Peers.meet(store, 1, 2, address="127.0.0.7", timeout_s=0.05)
    door = json.loads(store.get("peers/1/1"))
    assert (door["address"], door["host"]) == ("127.0.0.7", HOST)
    assert door["port"] > 0


def test_a_rank_that_never_starts_is_named() -> None:
    before = open_files()
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        store = HashStore()
        waits = [pool.submit(Peers.meet, store, r, 4, timeout_s=0.5) for r in (0, 2)]
        for rank, waiting in zip((0, 2), waits, strict=True):
            with pytest.raises(TransportError) as caught:
                waiting.result(SOON_S)
            assert f"rank {rank} of 4 on {HOST} had not seen rank 1, 3 " in str(caught.value)
            assert "after 0.5 s" in str(caught.value)
            assert "hint:" in str(caught.value)
    assert time.monotonic() - started < 3
    assert open_files() <= before


def test_a_rank_that_does_not_connect_is_named_and_nothing_is_left_open() -> None:
    """Rank 0 answers nobody, rank 2 never connects: rank 1 has met neither."""
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        store.set("peers/1/secret", proofs.new_token())
        store.set("peers/1/0", json.dumps({"address": "127.0.0.1", "port": port, "host": "a"}))
        store.set("peers/1/2", json.dumps({"address": "127.0.0.1", "port": 1, "host": "c"}))
        before = open_files()
        with pytest.raises(TransportError) as caught:
            Peers.meet(store, 1, 3, timeout_s=0.4)
        assert open_files() == before
    assert f"rank 0 on a at 127.0.0.1:{port}" in str(caught.value)
    assert "rank 2 on c at 127.0.0.1:1" in str(caught.value)


def test_an_address_where_nobody_listens_is_told_with_the_reason() -> None:
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    store.set("peers/1/secret", proofs.new_token())
    store.set("peers/1/0", json.dumps({"address": "127.0.0.1", "port": port, "host": "a"}))
    with pytest.raises(TransportError, match=rf"rank 0 on a at .*:{port} \(Connection refused\)"):
        Peers.meet(store, 1, 2, timeout_s=0.3)


class Meeting:
    """One rank of 2 that meets in the background, for a test that plays the other or disturbs."""

    def __init__(self, store: Store, rank: int, timeout_s: float = SOON_S) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.meeting = self.pool.submit(Peers.meet, store, rank, 2, timeout_s=timeout_s)

    def end(self) -> None:
        self.pool.shutdown()
        if self.meeting.exception() is None:
            self.meeting.result().close()


def door_of(store: Store, rank: int) -> tuple[str, int]:
    door = json.loads(store.get(f"peers/1/{rank}"))
    return door["address"], door["port"]


def hello(token: str, challenge: str, *, claims: int = 1, proven: int = 1, lane: int = 0) -> bytes:
    proof = proofs.proof(token, f"connect {proven} to 0, lane {lane}", challenge)
    return HELLO.pack(MAGIC, claims, lane, proofs.challenge().encode(), proof.encode())


def greeting(connection: socket.socket) -> str:
    magic, challenge = GREETING.unpack(connection.recv(GREETING.size, socket.MSG_WAITALL))
    assert magic == MAGIC
    return str(challenge.decode())


@pytest.mark.parametrize(
    "says",
    [
        b"GET / HTTP/1.1\r\nHost: penstock\r\n\r\n" * 9,
        b"\x00" * 4096,
        b"",
        "wrong token",
        "another rank's proof",
        "its own rank",
        "no such lane",
    ],
    ids=lambda says: says if isinstance(says, str) else f"{len(says)} bytes",
)
def test_who_does_not_prove_the_secret_is_dropped_and_meeting_goes_on(says: str | bytes) -> None:
    store = HashStore()
    zero = Meeting(store, 0)
    store.set("peers/1/1", json.dumps({"address": "127.0.0.1", "port": 1, "host": "b"}))
    try:
        with socket.create_connection(door_of(store, 0), SOON_S) as intruder:
            challenge = greeting(intruder)
            token = store.get("peers/1/secret").decode()
            said = {
                "wrong token": hello(proofs.new_token(), challenge),
                "another rank's proof": hello(token, challenge, claims=1, proven=2),
                "its own rank": hello(token, challenge, claims=0, proven=0),
                "no such lane": hello(token, challenge, lane=9),
            }.get(str(says), says)
            assert isinstance(said, bytes)
            if said:
                intruder.sendall(said)
            else:
                intruder.shutdown(socket.SHUT_WR)
            intruder.settimeout(SOON_S)
            with contextlib.suppress(ConnectionResetError):  # with bytes of ours unread
                assert intruder.recv(1) == b"", "it was answered"
        assert not zero.meeting.done()
        one = Peers.meet(store, 1, 2, timeout_s=SOON_S)
        assert zero.meeting.result(SOON_S).world_size == 2
        one.close()
    finally:
        zero.end()


def test_the_right_proof_is_let_in() -> None:
    """The control of the test above: what it sends would do, with the secret."""
    store = HashStore()
    zero = Meeting(store, 0)
    store.set("peers/1/1", json.dumps({"address": "127.0.0.1", "port": 1, "host": "b"}))
    lanes = []
    try:
        for lane in range(3):  # control, mail, and one stream
            connection = socket.create_connection(door_of(store, 0), SOON_S)
            lanes.append(connection)
            challenge = greeting(connection)
            message = hello(store.get("peers/1/secret").decode(), challenge, lane=lane)
            connection.sendall(message)
            (answer,) = PROOF.unpack(connection.recv(PROOF.size, socket.MSG_WAITALL))
            own = HELLO.unpack(message)[3].decode()
            role = f"accept 1 to 0, lane {lane}"
            assert proofs.proves(store.get("peers/1/secret").decode(), role, own, answer.decode())
        zero.meeting.result(SOON_S).look()
    finally:
        zero.end()
        for connection in lanes:
            connection.close()


def test_a_stranger_that_says_nothing_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "HANDSHAKE_S", 0.3)
    store = HashStore()
    zero = Meeting(store, 0)
    store.set("peers/1/1", json.dumps({"address": "127.0.0.1", "port": 1, "host": "b"}))
    mute = [socket.create_connection(door_of(store, 0), SOON_S) for _ in range(5)]
    try:
        for connection in mute:
            greeting(connection)
            connection.settimeout(SOON_S)
            assert connection.recv(1) == b""  # dropped at its deadline
        late = socket.create_connection(door_of(store, 0), SOON_S)
        one = Peers.meet(store, 1, 2, timeout_s=SOON_S)
        assert zero.meeting.done() or zero.meeting.result(0.2)
        one.close()
        late.close()
    finally:
        zero.end()
        for connection in mute:
            connection.close()


def test_who_connects_does_not_believe_whoever_listens() -> None:
    """Rank 0's port is another program's now: it does not know the secret, and is not trusted."""
    store = HashStore()
    store.set("peers/1/secret", proofs.new_token())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SOON_S)
        port = listener.getsockname()[1]
        store.set("peers/1/0", json.dumps({"address": "127.0.0.1", "port": port, "host": "a"}))
        one = Meeting(store, 1, timeout_s=1.5)
        connection, _ = listener.accept()
        with connection:
            connection.sendall(GREETING.pack(MAGIC, proofs.challenge().encode()))
            said = HELLO.unpack(connection.recv(HELLO.size, socket.MSG_WAITALL))
            proof = proofs.proof(proofs.new_token(), "accept 1 to 0, lane 0", said[3].decode())
            connection.sendall(PROOF.pack(proof.encode()))
            connection.settimeout(0.7)  # before the meeting ends anyway
            assert connection.recv(1) == b""
    with pytest.raises(TransportError, match="rank 0 on a"):
        one.meeting.result(2 * SOON_S)
    one.end()


def test_groups_of_one_store_do_not_meet(group: Callable[..., list[Peers]]) -> None:
    store = HashStore()
    old = group(2, PrefixStore("1", store))
    new = group(2, PrefixStore("2", store))
    secrets = {store.get(f"{number}/peers/1/secret") for number in (1, 2)}
    assert len(secrets) == 2
    assert all(len(bytes.fromhex(secret.decode())) == 32 for secret in secrets)
    old[0].abort("the old one")
    error_of(old[1])
    new[0].look()
    assert gathered(new, lambda rank: b"%d" % rank) == [[b"0", b"1"]] * 2


# What is heard


def test_gather_is_by_rank_and_in_order(group: Callable[..., list[Peers]]) -> None:
    ranks = group(3)
    for turn in range(3):
        parts = [b"%d of turn %d" % (rank, turn) for rank in range(3)]
        assert gathered(ranks, lambda rank, parts=parts: parts[rank]) == [parts] * 3
    large = [bytes([rank]) * (MAX_TEXT_BYTES - rank) for rank in range(3)]
    assert gathered(ranks, lambda rank: large[rank]) == [large] * 3
    with pytest.raises(ValueError, match="at most 1048576 bytes, got 1048577"):
        ranks[0].gather(bytes(MAX_TEXT_BYTES + 1))


def test_gather_of_a_rank_that_is_ahead(group: Callable[..., list[Peers]]) -> None:
    fast, slow = group(2)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(lambda: [fast.gather(b"a"), fast.gather(b"b")])
        assert slow.gather(b"c") == [b"a", b"c"]
        time.sleep(0.05)
        assert slow.gather(b"d") == [b"b", b"d"]
        assert ahead.result(SOON_S) == [[b"a", b"c"], [b"b", b"d"]]


def test_gather_names_who_does_not_come(group: Callable[..., list[Peers]]) -> None:
    ranks = group(3)
    with ThreadPoolExecutor(2) as pool:
        for waiting in [pool.submit(p.gather, b"", 0.3) for p in ranks[:2]]:
            with pytest.raises(TransportError, match=rf"after 0.3 s rank 2 on {HOST} had not"):
                waiting.result(SOON_S)


def test_gather_names_who_has_left(group: Callable[..., list[Peers]]) -> None:
    first, second = group(2)
    second.close()
    with pytest.raises(TransportError, match=rf"gather: rank 1 on {HOST} has left"):
        first.gather(b"")


def test_missing_are_those_who_have_not_said_that_they_wait(
    group: Callable[..., list[Peers]],
) -> None:
    ranks = group(4)
    assert ranks[0].missing(0) == [1, 2, 3]
    ranks[1].waits(7)
    ranks[2].waits(6)
    until(lambda: ranks[0].look() or ranks[0].missing(6) == [3], "two have said so")
    assert ranks[0].missing(7) == [2, 3]
    assert ranks[0].missing(8) == [1, 2, 3]
    ranks[2].waits(7)
    until(lambda: ranks[0].look() or ranks[0].missing(7) == [3], "the second comes")
    ranks[3].look()
    assert 3 not in ranks[3].missing(0)
    until(lambda: ranks[3].look() or ranks[3].missing(7) == [0], "all were told")


def test_a_peer_that_does_not_read_blocks_nobody(group: Callable[..., list[Peers]]) -> None:
    """What it was told stays in a buffer, and goes out, complete, in later looks."""
    first, second = group(2)
    started = time.monotonic()
    for sequence in range(400_000):
        first.waits(sequence)
    assert first._lines[1].unsent, "the socket was to be full"
    assert time.monotonic() - started < 10
    first.look()
    assert second.missing(399_999) == [0]
    until(lambda: first.look() or second.look() or not second.missing(399_999), "it has read")
    assert not first._lines[1].unsent
    first.abort("and still in step")
    assert error_of(second) == f"the group was aborted: and still in step (by rank 0 on {HOST})"


def test_abort_is_heard_by_all_with_reason_and_rank(group: Callable[..., list[Peers]]) -> None:
    ranks = group(3)
    for peers in ranks:
        peers.look()
    threading.Thread(target=ranks[1].abort, args=("löss is not finite",)).start()
    text = f"the group was aborted: löss is not finite (by rank 1 on {HOST})"
    assert [error_of(peers) for peers in ranks] == [text] * 3
    ranks[2].abort("a later one")
    for peers in ranks:
        peers.close()
    assert [error_of(peers) for peers in ranks] == [text] * 3, "not always the same"


def test_an_abort_releases_who_waits_within_100_ms(group: Callable[..., list[Peers]]) -> None:
    first, second = group(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(first.gather, b"", 10.0)
        time.sleep(0.05)
        aborted = time.monotonic()
        second.abort("enough")
        with pytest.raises(TransportError, match="enough"):
            waiting.result(SOON_S)
        assert time.monotonic() - aborted < 0.5  # 0.1 s, on a machine that has other work


def test_an_abort_tells_more_than_the_deaths_that_follow(
    group: Callable[..., list[Peers]],
) -> None:
    """Rank 1 dies of the abort of rank 2; rank 0 looks when both have happened."""
    first, second, third = group(3)
    first.look()
    third.abort("the cause")
    sever(second)
    until(lambda: has_ended(first, 1), "the end of rank 1 has come")
    assert "the cause" in error_of(first)


def sever(peers: Peers) -> None:
    """Ends connections as a death does: without goodbye."""
    for connection in peers._sockets.values():
        connection.shutdown(socket.SHUT_RDWR)


def has_ended(peers: Peers, peer: int) -> bool:
    try:
        return peers._lines[peer].socket.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


def test_leaving_is_no_error_until_somebody_asks(group: Callable[..., list[Peers]]) -> None:
    first, second, third = group(3)
    third.waits(5)
    second.close()
    second.close()
    until(lambda: first.look() or first.gone(1), "rank 1 has left")
    assert (first.gone(1), first.gone(2), first.gone(0)) == ("left", None, None)
    until(lambda: first.look() or len(first.control_filenos()) == 1, "its end is heard")
    until(lambda: third.look() or third.gone(1), "rank 1 has left")
    first.waits(5)  # the others go on
    until(lambda: third.look() or third.missing(5) == [1], "they hear each other")
    with pytest.raises(TransportError, match="this rank has left"):
        second.look()


def test_goodbye_is_heard_although_messages_were_left_unread(
    group: Callable[..., list[Peers]],
) -> None:
    """Closing a socket with unread bytes resets it: what it had yet to send would be lost."""
    first, second = group(2)
    control = second._lines[0].socket
    while unsent_bytes(control) < 10_000:
        second._tell(GATHER, 0, bytes(10_000))
    assert not second._lines[0].unsent
    first.waits(1)
    until(lambda: readable(control), "something unread")
    second.close()
    until(lambda: first.look() or first.gone(1), "rank 1 has left")
    assert first.gone(1) == "left"


def unsent_bytes(connection: socket.socket) -> int:
    """What the kernel still holds of it, as the peer's kernel has no room."""
    siocoutqnsd = 0x894B
    (num_bytes,) = struct.unpack("i", fcntl.ioctl(connection, siocoutqnsd, bytes(4)))
    return int(num_bytes)


def test_what_is_no_message_is_an_error_that_names_the_peer(
    group: Callable[..., list[Peers]],
) -> None:
    too_long = FRAME.pack(WAITS, 0, MAX_TEXT_BYTES + 1)
    for garbage in (b"\xffGET / HTTP/1.1", FRAME.pack(9, 0, 0), too_long):
        first, second = group(2)
        second._lines[0].socket.send(garbage)
        assert f"rank 1 on {HOST} sent " in error_of(first)
    first, second = group(2)
    frame = FRAME.pack(ABORT, 0, 4) + b"slow"
    for position in range(len(frame)):  # a frame in pieces is none
        first.look()
        second._lines[0].socket.send(frame[position : position + 1])
    assert "aborted: slow (by rank 1" in error_of(first)


def test_closing_leaves_no_file_open() -> None:
    before = open_files()
    for _ in range(3):
        for peers in meet(3):
            peers.abort("also after this")
            peers.close()
            assert peers.control_filenos() == []
    assert open_files() <= before


def test_many_threads_look_at_once(group: Callable[..., list[Peers]]) -> None:
    first, second = group(2)
    interval_s = sys.getswitchinterval()

    def look() -> str:
        give_up = time.monotonic() + SOON_S
        try:
            while time.monotonic() < give_up:
                first.look()
        except TransportError as error:
            return str(error)
        return "nothing"

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            looking = [pool.submit(look) for _ in range(4)]
            for sequence in range(2000):
                second.waits(sequence)
            second.abort("the end")
            (text,) = {result.result(2 * SOON_S) for result in looking}
            assert "the end" in text
    finally:
        sys.setswitchinterval(interval_s)
    assert first.missing(1999) == []


# Deaths of real processes


def live(path: str, rank: int, world_size: int, line: Connection) -> None:
    """A rank in a process of its own: meets, says so, and lives until it is killed."""
    peers = Peers.meet(FileStore(path, world_size), rank, world_size, timeout_s=30)
    line.send("met")
    line.poll(60)
    peers.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[int], tuple[Peers, list[BaseProcess]]]]:
    """Rank 0 here, the others in processes."""
    started: list[tuple[BaseProcess, Connection]] = []
    here: list[Peers] = []

    def start(world_size: int) -> tuple[Peers, list[BaseProcess]]:
        context = multiprocessing.get_context("fork")  # no thread runs here, and it is quick
        path = str(tmp_path / "store")
        for rank in range(1, world_size):
            line, far = context.Pipe()
            process = context.Process(target=live, args=(path, rank, world_size, far), daemon=True)
            process.start()
            far.close()
            started.append((process, line))
        here.append(Peers.meet(FileStore(path, world_size), 0, world_size, timeout_s=30))
        for _, line in started:
            assert line.poll(30)
            assert line.recv() == "met"
        return here[0], [process for process, _ in started]

    yield start
    for process, line in started:
        process.kill()
        process.join(10)
        line.close()
    for peers in here:
        peers.close()


def test_a_killed_process_is_noticed_and_a_stopped_one_is_not(
    processes: Callable[[int], tuple[Peers, list[BaseProcess]]],
) -> None:
    peers, others = processes(3)
    assert others[0].pid is not None
    assert others[1].pid is not None
    os.kill(others[0].pid, signal.SIGSTOP)
    for _ in range(20):  # a stopped rank is seen by deadlines only: it may go on
        peers.look()
        time.sleep(0.01)
    assert peers.gone(1) is None
    killed = time.monotonic()
    others[1].kill()
    assert error_of(peers).startswith(f"rank 2 on {HOST} died\n  hint:")
    assert time.monotonic() - killed < 1
    assert (peers.gone(1), peers.gone(2)) == (None, "died")
