"""The transport over TCP: what arrives, and what is said when it does not."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from penstock.errors import TransportError
from penstock.exchange.operation import Operation, Turn
from penstock.exchange.peers import Peers
from penstock.exchange.tcp import HEADER_BYTES, PIECE_BYTES, TcpTransport
from penstock.exchange.transport import ALIGNMENT_BYTES

STREAMS = 2
CHUNK = STREAMS * PIECE_BYTES
SUM = Operation("all_reduce", "sum float32 (4,)")
DEADLINE_S = 20.0


def threads(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each function returned or raised, each called in a thread of its own."""
    results: list[Any] = [None] * len(functions)

    def call(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    running = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in running:
        thread.start()
    give_up = time.monotonic() + DEADLINE_S
    for index, thread in enumerate(running):
        thread.join(max(0.0, give_up - time.monotonic()))
        assert not thread.is_alive(), f"rank {index} did not end"
    return results


Group = Callable[[int], list[TcpTransport]]


@pytest.fixture
def group() -> Iterator[Group]:
    """Makes the transports of all ranks of a group."""
    made: list[TcpTransport] = []

    def make(world_size: int) -> list[TcpTransport]:
        store = HashStore()
        store.set_timeout(timedelta(seconds=DEADLINE_S))

        def meet(rank: int) -> TcpTransport:
            peers = Peers.meet(
                store, rank, world_size, address="127.0.0.1", streams=STREAMS, timeout_s=DEADLINE_S
            )
            # Each rank on a host of its own, as far as errors tell.
            peers.hosts = tuple(f"host-{other}" for other in range(world_size))
            return TcpTransport(peers)

        transports = threads([lambda rank=rank: meet(rank) for rank in range(world_size)])
        for transport in transports:
            assert isinstance(transport, TcpTransport), transport
        made.extend(transports)
        return transports

    yield make
    for transport in made:
        transport.close()


def body(source: int, target: int, num_bytes: int) -> torch.Tensor:
    """Bytes that differ between pairs of ranks, and have a period that no piece has."""
    return ((torch.arange(num_bytes) * 7 + 31 * source + 5 * target) % 251).to(torch.uint8)


class Reader:
    """Keeps what it is shown; checks that it is shown as promised."""

    def __init__(self, transport: TcpTransport) -> None:
        self.transport = transport
        self.got = [bytearray() for _ in range(transport.world_size)]
        self.calls: list[tuple[int, int]] = []

    def __call__(self, views: Sequence[torch.Tensor | None], start: int, stop: int) -> None:
        assert len(views) == len(self.got)
        assert start == (self.calls[-1][1] if self.calls else 0) < stop
        assert start % ALIGNMENT_BYTES == 0
        self.calls.append((start, stop))
        lengths = [0 if view is None else len(view) for view in views]
        assert max(lengths) == stop - start
        for rank, view in enumerate(views):
            if view is None:
                continue
            assert len(self.got[rank]) == start
            assert len(view)
            assert rank == self.transport.rank or view.data_ptr() % ALIGNMENT_BYTES == 0
            self.got[rank] += view.numpy().tobytes()


def share(
    transport: TcpTransport,
    table: Sequence[Sequence[int | None]],
    *,
    sequence: int = 0,
    operation: Operation = SUM,
    timeout_s: float = 10.0,
) -> Reader:
    """One share in which rank a gives `table[a][b]` bytes to rank b; checks what has come."""
    rank, everyone = transport.rank, range(transport.world_size)
    parts = [None if (n := table[rank][to]) is None else body(rank, to, n) for to in everyone]
    sizes = [table[source][rank] or 0 for source in everyone]
    reader = Reader(transport)
    transport.share(Turn(sequence, operation, timeout_s), parts, sizes, reader)
    for source in everyone:
        assert bytes(reader.got[source]) == body(source, rank, sizes[source]).numpy().tobytes()
    return reader


def everywhere(transports: Sequence[TcpTransport], *rest: Any, **named: Any) -> list[Any]:
    """`share` on all ranks at once: readers, or the errors they raised."""
    return threads([lambda t=t: share(t, *rest, **named) for t in transports])


def check(results: Sequence[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result


def same(world_size: int, num_bytes: int | None) -> list[list[int | None]]:
    return [[num_bytes] * world_size] * world_size


SIZES = [0, 1, 13, 4096, PIECE_BYTES, PIECE_BYTES + 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77_777]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_give_to_all(world_size: int, group: Group) -> None:
    transports = group(world_size)
    for sequence, size in enumerate(SIZES):
        check(everywhere(transports, same(world_size, size), sequence=sequence))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_rank_may_have_any_number_of_bytes_for_any_other(world_size: int, group: Group) -> None:
    numbers = random.Random(world_size)
    transports = group(world_size)
    everyone = range(world_size)
    for sequence in range(12):
        table = [[numbers.choice([None, *SIZES]) for _ in everyone] for _ in everyone]
        check(everywhere(transports, table, sequence=sequence))


def test_what_is_large_comes_in_chunks(group: Group) -> None:
    for reader in everywhere(group(2), same(2, 2 * CHUNK + 5)):
        assert reader.calls == [(0, CHUNK), (CHUNK, 2 * CHUNK), (2 * CHUNK, 2 * CHUNK + 5)]


def narrow(transports: Sequence[TcpTransport]) -> None:
    """Makes the buffers between all ranks hold less than a piece."""
    for transport in transports:
        for peer in set(range(transport.world_size)) - {transport.rank}:
            for connection in transport._peers.data(peer):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
                assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < PIECE_BYTES


@pytest.mark.parametrize("own", [False, True])
def test_who_reads_may_write_over_the_same_bytes_of_the_parts(own: bool, group: Group) -> None:
    """Rank 0 gives to rank 1, who comes late, while rank 2 has long given to rank 0."""
    transports = group(3)
    narrow(transports)
    size = 2 * CHUNK + 5
    part, written = body(0, 1, size), 0

    def read(views: Sequence[torch.Tensor | None], start: int, stop: int) -> None:
        nonlocal written
        part[start:stop] = 255
        written += stop - start

    def late() -> Reader:
        time.sleep(0.2)
        return share(transports[1], table)

    # Without rank 2, rank 0 reads only what it has for itself.
    table = [[size if own else None, size, None], [None] * 3, [None if own else size, None, None]]
    parts = [part if own else None, part, None]
    sizes = [table[source][0] or 0 for source in range(3)]
    check(
        threads(
            [
                lambda: transports[0].share(Turn(0, SUM, 10.0), parts, sizes, read),
                late,
                lambda: share(transports[2], table),
            ]
        )
    )
    assert written == size
    assert part.eq(255).all()


def test_sockets_may_take_less_than_they_are_given(group: Group) -> None:
    """Both give first, far more than the buffers between them hold."""
    transports = group(2)
    narrow(transports)
    for sequence in range(2):
        check(everywhere(transports, same(2, 2 * CHUNK + 5), sequence=sequence))


def test_nothing_is_read_where_there_is_nothing(group: Group) -> None:
    assert [reader.calls for reader in everywhere(group(2), same(2, None))] == [[], []]
    # else the readers of other tests might check nothing
    table = [[None, 3], [None, None]]
    assert [reader.calls for reader in everywhere(group(2), table)] == [[], [(0, 3)]]


def test_the_own_part_is_shown_as_it_is(group: Group) -> None:
    transports = group(2)
    part = body(0, 1, 100)
    seen: list[int] = []

    def read(views: Sequence[torch.Tensor | None], start: int, stop: int) -> None:
        assert views[0] is not None
        seen.append(views[0].data_ptr())

    transports[0].share(Turn(0, SUM, 5.0), [part, None], [100, 0], read)
    assert seen == [part.data_ptr()]


def test_a_step_of_a_ring_needs_only_the_two_neighbours(group: Group) -> None:
    """Rank 3 of 4 comes late; ranks 1 and 2, who have nothing from it, are done before."""
    transports = group(4)
    table = [[1000 if to == (rank + 1) % 4 else None for to in range(4)] for rank in range(4)]
    ended = [0.0] * 4

    def ring(rank: int) -> None:
        if rank == 3:
            time.sleep(0.3)
        share(transports[rank], table)
        ended[rank] = time.monotonic()

    began = time.monotonic()
    check(threads([lambda r=r: ring(r) for r in range(4)]))
    assert max(ended[1], ended[2]) - began < 0.3 <= ended[0] - began


def test_scratch_is_kept(group: Group) -> None:
    transports = group(2)
    seen: list[list[int]] = []

    def read(views: Sequence[torch.Tensor | None], start: int, stop: int) -> None:
        seen.append([view.data_ptr() for view in views if view is not None])

    part, size = body(0, 0, 2 * CHUNK), 2 * CHUNK
    for sequence in range(3):
        turn = Turn(sequence, SUM, 5.0)
        give = lambda turn=turn: transports[1].share(turn, [part, None], [0, 0], read)  # noqa: E731
        take = lambda turn=turn: transports[0].share(turn, [None] * 2, [0, size], read)  # noqa: E731
        check(threads([give, take]))
    assert len(seen) == 6
    assert len({address for addresses in seen for address in addresses}) == 1


def errors(results: Sequence[Any]) -> list[str]:
    """The messages of all ranks' errors."""
    for result in results:
        assert isinstance(result, TransportError), result
    return [result.message for result in results]


def test_ranks_that_mean_different_operations_are_told_both(group: Group) -> None:
    transports = group(3)
    other = Operation("broadcast", "float32 (9,) from 0")
    told = errors(
        threads(
            [
                lambda t=t: share(t, same(3, 1000), operation=other if t.rank == 1 else SUM)
                for t in transports
            ]
        )
    )
    for message in told:
        assert "collective number 0 differs between ranks" in message
        assert "rank 1 (host-1) is at broadcast of float32 (9,) from 0" in message
        assert "is at all_reduce of sum float32 (4,)" in message


def test_ranks_at_different_numbers_are_told_both(group: Group) -> None:
    told = errors(
        threads([lambda t=t: share(t, same(2, 1000), sequence=6 + t.rank) for t in group(2)])
    )
    for message in told:
        assert "collective number 6 differs between ranks" in message
        assert "rank 0 (host-0) is at all_reduce of sum float32 (4,), number 6" in message
        assert "rank 1 (host-1) is at all_reduce of sum float32 (4,), number 7" in message


@pytest.mark.parametrize(
    ("given", "taken"), [(1000, 2000), (2000, 1000), (5, CHUNK + 5), (CHUNK, 1)]
)
def test_sizes_that_do_not_fit_are_told(given: int, taken: int, group: Group) -> None:
    transports = group(2)
    # What rank 0 gives may be gone before it hears of the error: then its next share raises.
    _, told = threads(
        [
            lambda n=n, t=t: share(t, [[None, n], [None, None]])
            for n, t in zip((given, taken), transports)
        ]
    )
    expected = (
        f"all_reduce of sum float32 (4,), number 0: rank 0 on host-0 has {given} bytes for rank 1 "
        f"on host-1, which expects {taken}"
    )
    assert errors([told]) == [expected]
    for message in errors(everywhere(transports, same(2, 10), sequence=1)):
        assert expected in message


def test_what_an_earlier_share_left_is_not_taken_for_this_ones(group: Group) -> None:
    """Rank 1 takes nothing from a share in which rank 0 had something for it."""
    transports = group(2)
    results = threads(
        [
            lambda: share(transports[0], [[None, 100], [None, None]]),
            lambda: share(transports[1], same(2, None)),
        ]
    )
    check(results)
    (message,) = errors(everywhere(transports, same(2, 100))[1:])
    assert "rank 0 (host-0) is at step 1 of all_reduce" in message
    assert "rank 1 (host-1) is at step 2 of all_reduce" in message


def inject(transports: Sequence[TcpTransport], data: bytes) -> None:
    """Sends bytes to rank 1 as if rank 0's transport had."""
    connection = transports[0]._peers.data(1)[0]
    assert connection.send(data) == len(data)


def test_what_is_no_message_is_told(group: Group) -> None:
    transports = group(2)
    inject(transports, b"GET / HTTP/1.1\r\n" * 20)
    with pytest.raises(TransportError, match="rank 0 on host-0 sent 47 45 54") as caught:
        share(transports[1], same(2, 100))
    assert "same version" in caught.value.hint


def test_a_header_in_pieces_is_a_header(group: Group) -> None:
    transports = group(2)
    text = SUM.text.encode()
    fields = struct.pack("<4sHxxQQQQ", b"PSK1", len(text), 0, 1, SUM.signature, 10)
    data = (fields + text).ljust(HEADER_BYTES, b"\0") + body(0, 1, 10).numpy().tobytes()

    def trickle() -> None:
        for at in range(0, len(data), 50):
            inject(transports, data[at : at + 50])
            time.sleep(0.002)

    check(threads([trickle, lambda: share(transports[1], [[None, 10], [None, None]])]))


def test_a_peer_that_ends_in_the_middle_of_a_message_is_named(group: Group) -> None:
    transports = group(2)
    began = time.monotonic()

    def leave() -> None:
        time.sleep(0.05)
        transports[0].close()

    inject(transports, b"PSK1")
    told = threads([leave, lambda: share(transports[1], same(2, 100))])[1]
    assert isinstance(told, TransportError)
    assert told.message == "all_reduce of sum float32 (4,), number 0: rank 0 on host-0 left"
    assert time.monotonic() - began < 1.0


def test_a_peer_whose_data_socket_breaks_is_named(group: Group) -> None:
    transports = group(2)
    transports[0]._peers.data(1)[1].shutdown(socket.SHUT_RDWR)
    told = threads([lambda: share(transports[1], same(2, 2 * CHUNK))])[0]
    assert isinstance(told, TransportError)
    assert "rank 0 on host-0 is cut off" in told.message
    with pytest.raises(TransportError, match=r"the group was aborted: .* cut off"):
        share(transports[0], same(2, 2 * CHUNK))


def test_an_abort_releases_who_waits(group: Group) -> None:
    transports = group(3)
    aborted_at = 0.0

    def wait(transport: TcpTransport) -> float:
        with pytest.raises(TransportError) as caught:
            share(transport, same(3, 1000))
        assert caught.value.message.startswith(
            "all_reduce of sum float32 (4,), number 0: the group"
        )
        assert "was aborted: the battery is flat (by rank" in caught.value.message
        return time.monotonic()

    def abort() -> None:
        nonlocal aborted_at
        time.sleep(0.2)
        aborted_at = time.monotonic()
        transports[0].abort("the battery is flat")

    # rank 0 itself waits too, and rank 2 never comes
    results = threads([lambda: wait(transports[0]), lambda: wait(transports[1]), abort])
    check(results)
    assert all(0 <= ended - aborted_at < 0.5 for ended in results[:2])
    for transport in transports:
        with pytest.raises(TransportError, match="the battery is flat"):
            share(transport, same(3, None))


def test_an_error_in_reading_ends_the_group(group: Group) -> None:
    transports = group(2)

    def read(views: Sequence[torch.Tensor | None], start: int, stop: int) -> None:
        raise ValueError("no such dtype")

    part = body(0, 1, 10)
    transports[1].share(Turn(0, SUM, 5.0), [part, None], [0, 0], read)
    with pytest.raises(ValueError, match="no such dtype"):
        transports[0].share(Turn(0, SUM, 5.0), [None, None], [0, 10], read)
    told = errors(everywhere(transports, same(2, 10), sequence=1))
    assert all("number 0: rank 0 raised ValueError: no such dtype" in message for message in told)


def test_at_the_deadline_the_missing_are_named_to_all(group: Group) -> None:
    transports = group(4)
    began = time.monotonic()
    table = same(4, 1000)
    came = [t for t in transports if t.rank != 2]
    told = errors(threads([lambda t=t: share(t, table, timeout_s=0.5) for t in came]))
    assert time.monotonic() - began < 1.5
    for message in told:
        assert "after 0.5 s rank 2 (on host-2) had not come" in message
    # the failed transport says the same again
    with pytest.raises(TransportError) as caught:
        share(transports[3], table)
    assert caught.value.message == told[-1]
