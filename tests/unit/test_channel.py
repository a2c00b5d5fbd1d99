"""Messages between workers and their driver: framed, proven, and safe from strangers."""

from __future__ import annotations

import hmac
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock import token as proofs
from penstock.cluster import channel, coordinator
from penstock.cluster.channel import Channel, Frames, encode
from penstock.cluster.coordinator import MAX_UNPROVEN_BYTES, Coordinator
from penstock.errors import TransportError, UserError

TOKEN = proofs.new_token()
WORKER = {"role": "worker", "rank": 0}


@pytest.fixture
def server() -> Iterator[Coordinator]:
    made = Coordinator(TOKEN)
    yield made
    made.close()


def join(server: Coordinator, rank: int, token: str = TOKEN) -> Channel:
    """A worker's channel to the server, which is polled meanwhile."""
    found: list[Any] = []

    def connect() -> None:
        try:
            found.append(Channel(server.address, token, {"role": "worker", "rank": rank}))
        except TransportError as error:
            found.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    hello = []
    while thread.is_alive():
        hello += server.poll()
        thread.join(0.002)
    if isinstance(found[0], TransportError):
        raise found[0]
    assert [message for _, message in hello] == [{"role": "worker", "rank": rank}]
    assert isinstance(found[0], Channel)
    return found[0]


def told(received: list[Any]) -> list[tuple[int, Any]]:
    """Ranks and messages."""
    return [(peer.hello["rank"], message) for peer, message in received]


def polled(
    server: Coordinator, enough: Callable[[list[Any]], bool], seconds: float = 5.0
) -> list[Any]:
    received: list[Any] = []
    give_up = time.monotonic() + seconds
    while not enough(received) and time.monotonic() < give_up:
        received += server.poll()
        time.sleep(0.001)
    return told(received)


def stranger(server: Coordinator, data: bytes = b"") -> socket.socket:
    """A connection that says something else."""
    connection = socket.create_connection(server.address, timeout=5)
    connection.sendall(data)
    return connection


def is_dropped(server: Coordinator, connection: socket.socket) -> bool:
    """Whether the server ends a connection, soon."""
    give_up = time.monotonic() + 5
    while time.monotonic() < give_up:
        assert all(message is None for _, message in server.poll())
        if is_ended(connection):
            return True
    return False


def is_ended(connection: socket.socket) -> bool:
    """Whether a connection has ended; what came before that is taken."""
    connection.settimeout(0.01)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def forever(act: Callable[[], object]) -> None:
    """Again and again until it raises, within reason."""
    give_up = time.monotonic() + 5
    while time.monotonic() < give_up:
        act()
        time.sleep(0.001)


def test_frames_come_out_whole_however_they_are_cut() -> None:
    messages = [{"a": 1}, {}, {"text": "ä" * 300}, {"deep": [[[]]]}]
    data = b"".join(map(encode, messages))
    for size in (1, 3, 7, len(data)):
        frames = Frames(10_000)
        found: list[Any] = []
        for start in range(0, len(data), size):
            found += frames.feed(data[start : start + size])
        assert found == messages


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 101) + b" " * 101,
        struct.pack(">I", 0xFFFFFFFF),
        struct.pack(">I", 2) + b"{]",
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 4) + b"null",
        struct.pack(">I", 1) + b"\xff",
        struct.pack(">I", 0),
    ],
)
def test_what_cannot_be_a_frame(data: bytes) -> None:
    frames = Frames(100)
    assert frames.feed(encode({"fine": 1})) == [{"fine": 1}]
    with pytest.raises(ValueError):
        frames.feed(data)


def test_a_frame_that_is_nested_too_deeply() -> None:
    body = b"[" * 100_000
    with pytest.raises(ValueError, match="too deeply"):
        Frames(1 << 20).feed(struct.pack(">I", len(body)) + body)


def test_both_sides_talk_after_the_handshake(server: Coordinator) -> None:
    workers = [join(server, rank) for rank in (0, 1)]
    assert workers[0].receive() == []
    workers[0].send({"event": "progress", "loss": 0.5})
    workers[1].send({"event": "failed", "traceback": "x" * 1_000_000})
    workers[1].close()
    received = polled(server, lambda r: len(r) >= 3)
    assert [m for rank, m in received if rank == 0] == [{"event": "progress", "loss": 0.5}]
    assert [None if m is None else len(m["traceback"]) for rank, m in received if rank == 1] == [
        1_000_000,
        None,
    ]
    server.send_all("worker", {"do": "stop"})  # rank 1 is gone: no matter
    give_up = time.monotonic() + 5
    while not (got := workers[0].receive()):
        assert time.monotonic() < give_up
    assert got == [{"do": "stop"}]
    server.close()
    with pytest.raises(TransportError, match="the driver is gone"):
        forever(workers[0].receive)


def test_one_poll_tells_all_that_a_worker_said_before_it_ended(server: Coordinator) -> None:
    """The driver looks once after a process has ended: then its last message must be there."""
    worker = join(server, 3)
    message = {"event": "failed", "traceback": "y" * 150_000}
    worker.send(message)
    worker.close()
    time.sleep(0.05)
    assert told(server.poll()) == [(3, message), (3, None)]


def test_a_wrong_token_is_refused(server: Coordinator) -> None:
    with pytest.raises(TransportError, match=r"the worker of rank 0 .*cannot reach the driver"):
        join(server, 0, proofs.new_token())
    assert server._numbered == {}
    right = join(server, 0)
    right.send({"event": "fine"})
    assert polled(server, bool) == [(0, {"event": "fine"})]


def test_a_driver_that_does_not_know_the_token_is_refused() -> None:
    """Else a stranger on the port could give orders."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            connection, _ = listener.accept()
            connection.sendall(encode({"challenge": "c"}))
            connection.recv(4096)
            connection.sendall(encode({"proof": proofs.proof("guess", "driver", "c")}))
            connection.recv(4096)
            connection.close()

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(TransportError, match="does not know this run's token"):
            Channel(listener.getsockname(), TOKEN, WORKER)
        thread.join(5)


def test_a_proof_cannot_be_reflected_or_used_again() -> None:
    challenge = proofs.challenge()
    answer = proofs.proof(TOKEN, "worker", challenge)
    assert proofs.proves(TOKEN, "worker", challenge, answer)
    assert not proofs.proves(TOKEN, "driver", challenge, answer)
    assert not proofs.proves(TOKEN, "worker", proofs.challenge(), answer)
    for wrong in (None, 5, [], "", "ä", answer[:-1], answer.upper()):
        assert not proofs.proves(TOKEN, "worker", challenge, wrong)
    assert len({proofs.challenge() for _ in range(100)}) == 100


def test_proofs_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    constant = hmac.compare_digest

    def look(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return constant(a, b)

    monkeypatch.setattr(proofs.hmac, "compare_digest", look)
    proofs.proves(TOKEN, "worker", "c", "0" * 64)
    assert compared == [(proofs.proof(TOKEN, "worker", "c"), "0" * 64)]


GARBAGE = {
    "a web browser": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(100),
    "a frame too long for a stranger": struct.pack(">I", MAX_UNPROVEN_BYTES + 1),
    "the longest frame": struct.pack(">I", 0xFFFFFFFF) + bytes(5000),
    "no JSON": struct.pack(">I", 4) + b"\xff\xfe\x00\x01",
    "deep JSON": struct.pack(">I", 4000) + b"[" * 4000,
    "no object": struct.pack(">I", 2) + b"[]",
    "no proof": encode({"role": "worker", "rank": 0, "challenge": "c"}),
    "an empty proof": encode({"role": "worker", "rank": 0, "challenge": "c", "proof": ""}),
    "another kind of proof": encode(
        {"role": "worker", "rank": 0, "challenge": "c", "proof": {"a": 1}}
    ),
    "many guesses": b"".join(
        encode({"role": "worker", "rank": 0, "challenge": "c", "proof": "x"}) for _ in range(50)
    ),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_stranger_is_dropped_and_disturbs_nobody(server: Coordinator, what: str) -> None:
    worker = join(server, 0)
    connection = stranger(server, GARBAGE[what])
    assert is_dropped(server, connection)
    connection.close()
    worker.send({"event": "fine"})
    assert polled(server, bool) == [(0, {"event": "fine"})]
    assert len(server._numbered) == len(server._peers) == 1


def test_strangers_who_hang_up_at_once(server: Coordinator) -> None:
    worker = join(server, 0)
    for _ in range(20):
        connection = socket.create_connection(server.address)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()  # with a reset
    worker.send({"event": "fine"})
    assert polled(server, bool) == [(0, {"event": "fine"})]
    give_up = time.monotonic() + 5
    while len(server._peers) > 1:
        assert server.poll() == []
        assert time.monotonic() < give_up


@pytest.mark.parametrize("rank", [None, "0", 0.5, [0]])
def test_a_rank_that_is_none(server: Coordinator, rank: Any) -> None:
    connection = stranger(server)
    give_up = time.monotonic() + 5
    frames, hello = Frames(4096), []
    connection.settimeout(0.01)
    while not hello and time.monotonic() < give_up:
        server.poll()
        try:
            hello += frames.feed(connection.recv(4096))
        except TimeoutError:
            continue
    proof = proofs.proof(TOKEN, "worker", hello[0]["challenge"])
    connection.sendall(encode({"role": "worker", "rank": rank, "proof": proof, "challenge": "c"}))
    assert is_dropped(server, connection)
    connection.close()


@pytest.mark.parametrize("role", ["driver", "", None, ["worker"]])
def test_a_role_that_is_none(server: Coordinator, role: Any) -> None:
    """Else the driver's own proof, or that of another role, would do."""
    connection = stranger(server)
    connection.settimeout(5)
    server.poll()
    challenge = Frames(4096).feed(connection.recv(4096))[0]["challenge"]
    proof = proofs.proof(TOKEN, str(role), challenge)
    connection.sendall(encode({"role": role, "rank": 0, "proof": proof, "challenge": "c"}))
    assert is_dropped(server, connection)
    connection.close()


def test_a_body_follows_its_instruction_however_slowly_it_is_read(server: Coordinator) -> None:
    """More than the sockets hold goes out as the peer reads; others are served meanwhile."""
    slow, other = join(server, 0), join(server, 1)
    first = next(p.number for p in server._numbered.values() if p.hello["rank"] == 0)
    parts = [bytes([n]) * (3 << 20) for n in range(8)]
    server.send(first, {"do": "start"}, parts)
    server.send(first, {"do": "end"})
    server.send_all("worker", {"do": "stop"})
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.extend(wait_for(slow, 3)))
    give_up = time.monotonic() + 20
    assert wait_for(other, 1) == [{"do": "stop"}]
    thread.start()
    while thread.is_alive():
        server.poll()
        assert time.monotonic() < give_up
    assert [m["do"] for m in got] == ["start", "end", "stop"]
    assert bytes(got[0]["body"]) == b"".join(parts)


def wait_for(peer: Channel, count: int) -> list[Any]:
    got: list[Any] = []
    give_up = time.monotonic() + 20
    while len(got) < count and time.monotonic() < give_up:
        got += peer.receive()
        time.sleep(0.001)
    return got


def test_a_peer_that_is_dropped_or_gone_is_sent_nothing(server: Coordinator) -> None:
    worker = join(server, 0)
    number = next(iter(server._numbered))
    server.drop(number)
    server.send(number, {"do": "stop"}, [b"x"])
    with pytest.raises(TransportError):
        forever(worker.receive)
    assert not server._numbered


def test_a_slow_stranger_holds_up_nobody_and_is_dropped_in_the_end(
    server: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "HANDSHAKE_S", 0.4)
    silent, dribbling = stranger(server), stranger(server, b"\0")
    began = time.monotonic()
    worker = join(server, 0)
    worker.send({"event": "fine"})
    assert polled(server, bool) == [(0, {"event": "fine"})]
    assert time.monotonic() - began < 0.3
    for connection in (silent, dribbling):
        assert is_dropped(server, connection)
        connection.close()
    assert time.monotonic() - began >= 0.4
    worker.send({"event": "still here"})  # the deadline is for strangers only
    assert polled(server, bool) == [(0, {"event": "still here"})]


def test_the_limit_is_wider_for_those_who_have_proved_themselves(server: Coordinator) -> None:
    worker = join(server, 0)
    message = {"text": "x" * (MAX_UNPROVEN_BYTES * 10)}
    worker.send(message)
    assert polled(server, bool) == [(0, message)]
    worker._socket.sendall(struct.pack(">I", channel.MAX_FRAME_BYTES + 1))
    assert polled(server, bool) == [(0, None)]


def test_a_port_that_is_taken(server: Coordinator) -> None:
    port = server.address[1]
    with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 cannot be used") as caught:
        Coordinator(TOKEN, port=port)
    assert caught.value.hint
    server.close()
    Coordinator(TOKEN, port=port).close()


def test_a_driver_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with pytest.raises(
        TransportError, match=r"rank 2 on .* cannot reach the driver at 127\.0\.0\.1"
    ):
        Channel(address, TOKEN, {"role": "worker", "rank": 2})


def test_a_driver_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "HANDSHAKE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        with pytest.raises(TransportError, match="timed out"):
            Channel(listener.getsockname(), TOKEN, WORKER)
        assert time.monotonic() - began < 2


def test_close_ends_everything(server: Coordinator) -> None:
    worker, connection = join(server, 0), stranger(server)
    server.poll()
    server.close()
    with pytest.raises(TransportError):
        forever(worker.receive)
    assert is_ended(connection)
    connection.close()
    with pytest.raises(OSError):
        socket.create_connection(server.address, timeout=1)


def test_messages_are_json_and_nothing_else() -> None:
    message = {"event": "progress", "loss": 0.1, "name": "ä"}
    data = encode(message)
    assert struct.unpack(">I", data[:4])[0] == len(data) - 4
    assert json.loads(data[4:]) == message
    with pytest.raises(TypeError):
        encode({"object": object()})
