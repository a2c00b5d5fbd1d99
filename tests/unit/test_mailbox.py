"""Messages between two ranks: their order, sizes and deadlines, and what ends them."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.distributed import HashStore

from penstock.errors import TransportError
from penstock.exchange.mailbox import HEADER, MAGIC, Letter, Mailbox
from penstock.exchange.peers import Peers

HOST = socket.gethostname()
BIG = 24 << 20
"""More than the sockets of a pair hold."""


@pytest.fixture
def group() -> Iterator[Callable[..., list[Mailbox]]]:
    """Makes the mailboxes of all ranks; whatever is left of them in the end is closed."""
    made: list[tuple[Mailbox, Peers]] = []

    def make(world_size: int, timeout_s: float = 10.0) -> list[Mailbox]:
        store = HashStore()
        with ThreadPoolExecutor(world_size) as pool:
            meet = partial(Peers.meet, store, world_size=world_size, timeout_s=10)
            peers = list(pool.map(meet, range(world_size)))
        mailboxes = [Mailbox(p, timeout_s) for p in peers]
        made.extend(zip(mailboxes, peers, strict=True))
        return mailboxes

    yield make
    for mailbox, peers in made:
        mailbox.close()
        peers.close()


def noise(num_bytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def empty(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


Group = Callable[..., list[Mailbox]]


def error_of(letter: Letter) -> str:
    """What it fails with."""
    with pytest.raises(TransportError) as caught:
        letter.wait()
    assert letter.done()
    return str(caught.value)


def until(condition: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.001)


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 65_537, BIG])
@pytest.mark.parametrize("first", ["send", "receive"])
def test_bytes_arrive_as_they_were_sent(group: Group, num_bytes: int, first: str) -> None:
    a, b = group(2)
    data, into = noise(num_bytes), empty(num_bytes)
    if first == "send":
        sent = a.send(1, 5, data)
        received = b.receive(0, 5, into)
    else:
        received = b.receive(0, 5, into)
        sent = a.send(1, 5, data)
    received.wait()
    sent.wait()
    assert torch.equal(into, data)
    assert (received.source, sent.done(), received.done()) == (0, True, True)


def test_messages_of_one_tag_keep_their_order(group: Group) -> None:
    a, b = group(2)
    sent = [a.send(1, tag, noise(100, seed=10 * tag + turn)) for turn in range(5) for tag in (3, 4)]
    for tag in (4, 3):
        for turn in range(5):
            into = empty(100)
            b.receive(0, tag, into).wait()
            assert torch.equal(into, noise(100, seed=10 * tag + turn)), (tag, turn)
    for letter in sent:
        letter.wait()


@pytest.mark.parametrize("seed", range(4))
def test_many_letters_in_any_order(group: Group, seed: int) -> None:
    """Every rank sends to every rank, itself too, and each posts its letters in its own order."""
    size, tags, turns = 4, 3, 3
    mailboxes = group(size)
    pick = random.Random(seed)
    sizes = {
        (a, b, tag, turn): pick.choice([0, 1, 13, 5_000, 300_007])
        for a in range(size)
        for b in range(size)
        for tag in range(tags)
        for turn in range(turns)
    }
    seeds = {key: number for number, key in enumerate(sizes)}

    def live(rank: int) -> None:
        own = random.Random(100 * seed + rank)
        queues = [("send", b, tag) for b in range(size) for tag in range(tags)]
        queues += [("receive", a, tag) for a in range(size) for tag in range(tags)]
        posts = queues * turns
        own.shuffle(posts)
        turn = dict.fromkeys(queues, 0)
        letters, expected = [], []
        for post in posts:
            kind, peer, tag = post
            pair = (rank, peer) if kind == "send" else (peer, rank)
            key = (*pair, tag, turn[post])
            turn[post] += 1
            if kind == "send":
                letters.append(mailboxes[rank].send(peer, tag, noise(sizes[key], seeds[key])))
            else:
                into = empty(sizes[key])
                letters.append(mailboxes[rank].receive(peer, tag, into))
                expected.append((into, key))
        for letter in letters:
            letter.wait()
        for into, key in expected:
            assert torch.equal(into, noise(sizes[key], seeds[key])), key

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(live, range(size)))


def test_a_ring_that_sends_first_and_waits_for_it(group: Group) -> None:
    """Nobody receives before what it sends has gone; it is more than the sockets hold."""
    size = 3
    mailboxes = group(size)

    def live(rank: int) -> bool:
        mailboxes[rank].send((rank + 1) % size, 0, noise(BIG, rank)).wait()
        into = empty(BIG)
        mailboxes[rank].receive((rank - 1) % size, 0, into).wait()
        return torch.equal(into, noise(BIG, (rank - 1) % size))

    with ThreadPoolExecutor(size) as pool:
        assert list(pool.map(live, range(size))) == [True] * size


def test_what_nobody_asks_for_stays_with_its_sender(group: Group) -> None:
    a, b, c = group(3)
    b.send(1, 9, empty(1)).wait()  # its thread runs
    big = a.send(1, 1, noise(BIG))
    into = empty(1)
    other = b.receive(2, 2, into)  # of another rank: no reason to read what rank 0 has sent
    time.sleep(0.2)
    assert not big.done()
    assert all(message.memory is None for message in b._arrived if message.source == 0)
    c.send(1, 2, noise(1)).wait()
    other.wait()
    assert not big.done()
    behind = b.receive(0, 2, into)  # behind it: now it is read into memory of its own
    big.wait()
    a.send(1, 2, noise(1, 4)).wait()
    behind.wait()
    assert torch.equal(into, noise(1, 4))
    late = empty(BIG)
    b.receive(0, 1, late).wait()
    assert torch.equal(late, noise(BIG))


def test_a_receive_takes_over_what_has_come_in_part(group: Group) -> None:
    """The first half was read ahead, into memory of its own; the rest goes where it belongs."""
    a, b = group(2)
    raw = a._peers.mail(1)
    data = noise(1000)
    elsewhere = b.receive(0, 2, empty(1))
    raw.send(HEADER.pack(MAGIC, 1, 1000) + bytes(data[:400]))
    until(lambda: b._pairs[0].coming and b._pairs[0].coming.moved_bytes == 400, "400 bytes")
    into = empty(1000)
    letter = b.receive(0, 1, into)
    raw.send(bytes(data[400:]) + HEADER.pack(MAGIC, 2, 1) + b"x")
    letter.wait()
    elsewhere.wait()
    assert torch.equal(into, data)


def test_one_slow_pair_does_not_hold_up_another(group: Group) -> None:
    a, _, c = group(3)
    stuck = a.send(1, 0, noise(BIG))  # rank 1 reads nothing
    for turn in range(20):
        into = empty(70_000)
        letter = c.receive(0, 0, into)
        a.send(2, 0, noise(70_000, turn)).wait()
        letter.wait()
        assert torch.equal(into, noise(70_000, turn))
    assert not stuck.done()


def test_from_any_rank_takes_what_came_first(group: Group) -> None:
    mailboxes = group(4)
    own = mailboxes[0]
    own.receive(3, 8, empty(0))  # so that it reads, whoever sends
    for sender in (2, 1, 3):
        mailboxes[sender].send(0, 7, noise(5, sender)).wait()
        reads = own.receive(sender, 9, empty(0))
        mailboxes[sender].send(0, 9, empty(0)).wait()
        reads.wait()  # so what was sent before it has arrived, too
    for sender in (2, 1, 3):
        into = empty(5)
        letter = own.receive(None, 7, into)
        letter.wait()
        assert letter.source == sender
        assert torch.equal(into, noise(5, sender))


def test_from_any_rank_matches_the_tag_only(group: Group) -> None:
    a, b, c = group(3)
    into = empty(3)
    letter = a.receive(None, 7, into)
    b.send(0, 6, noise(3, 1)).wait()
    time.sleep(0.05)
    assert not letter.done()
    c.send(0, 7, noise(3, 2)).wait()
    letter.wait()
    assert letter.source == 2
    assert torch.equal(into, noise(3, 2))
    later = a.receive(1, 6, into)
    later.wait()
    assert torch.equal(into, noise(3, 1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_letter_to_oneself(group: Group, world_size: int) -> None:
    own = group(world_size)[0]
    data, into = noise(1000), empty(1000)
    own.send(0, 1, data).wait()  # nobody has to receive it first
    data.zero_()  # its memory is free
    letter = own.receive(None, 1, into)
    letter.wait()
    assert letter.source == 0
    assert torch.equal(into, noise(1000))
    other = empty(10)
    posted = own.receive(0, 2, other)
    own.send(0, 2, noise(10)).wait()
    posted.wait()
    assert torch.equal(other, noise(10))


# Errors


def test_another_size_is_an_error_that_names_both_and_the_next_is_right(group: Group) -> None:
    a, b = group(2)
    for sent, expected in ((BIG, 5), (3, 5), (5, 0), (0, 5)):
        letter = b.receive(0, 1, empty(expected))
        big = a.send(1, 1, noise(sent))
        text = error_of(letter)
        assert f"receive of {expected} bytes from rank 0 on {HOST}, tag 1" in text
        assert f"rank 0 on {HOST} sent {sent} bytes, expected {expected}" in text
        assert "hint:" in text
        into = empty(6)
        following = b.receive(0, 1, into)
        a.send(1, 1, noise(6, sent)).wait()
        following.wait()
        big.wait()
        assert torch.equal(into, noise(6, sent))


@pytest.mark.parametrize("world_size", [1, 2])
def test_another_size_than_what_has_arrived(group: Group, world_size: int) -> None:
    mailboxes = group(world_size)
    mailboxes[-1].send(0, 1, noise(4)).wait()
    letter = mailboxes[0].receive(None, 1, empty(9))
    assert f"rank {world_size - 1} on {HOST} sent 4 bytes, expected 9" in error_of(letter)


def test_the_deadline_names_peer_tag_and_bytes(group: Group) -> None:
    a, b = group(2, timeout_s=0.3)
    started = time.monotonic()
    receive = a.receive(1, 12, empty(34))
    anyone = a.receive(None, 13, empty(2))
    send = a.send(1, 14, noise(BIG))
    name = f"rank 1 on {HOST}"
    assert error_of(receive).startswith(
        f"receive of 34 bytes from {name}, tag 12: after 0.3 s nothing had come\n  hint:"
    )
    assert "receive of 2 bytes from any rank, tag 13: after 0.3 s" in error_of(anyone)
    assert f"send of {BIG} bytes to {name}, tag 14: after 0.3 s" in error_of(send)
    assert time.monotonic() - started < 2
    # The rest of it will never come: what follows must not be taken for it, on either side.
    assert "cannot be sent to" in error_of(a.send(1, 14, noise(10)))
    into = empty(BIG)
    text = error_of(b.receive(0, 14, into))
    assert f"rank 0 on {HOST} closed its end of the connection after " in text
    # The other way still goes.
    letter = a.receive(1, 1, empty(3))
    b.send(0, 1, noise(3)).wait()
    letter.wait()


def test_who_waits_no_longer_has_its_memory_back(group: Group) -> None:
    a, b = group(2)
    raw = a._peers.mail(1)
    into = empty(10)
    letter = b.receive(0, 1, into)
    with pytest.raises(TransportError, match=r"after 0.05 s nothing had come"):
        letter.wait(0.05)
    assert letter.done()
    partly = b.receive(0, 1, into)
    raw.send(HEADER.pack(MAGIC, 1, 10) + bytes(noise(4)))
    until(lambda: b._pairs[0].coming and b._pairs[0].coming.moved_bytes == 4, "4 bytes")
    with pytest.raises(TransportError, match=r"after 0.05 s 4 bytes had come"):
        partly.wait(0.05)
    into.zero_()
    raw.send(b"abcdef")
    other = empty(2)
    following = b.receive(0, 1, other)
    raw.send(HEADER.pack(MAGIC, 1, 2) + b"ok")
    following.wait()
    assert bytes(other) == b"ok"
    assert not into.any(), "written after it was given back"


def test_a_send_that_has_not_begun_is_given_up_without_harm(group: Group) -> None:
    a, b = group(2)
    first = a.send(1, 0, noise(BIG))
    second = a.send(1, 0, noise(5))
    with pytest.raises(TransportError, match=r"after 0.05 s 0 bytes had gone"):
        second.wait(0.05)
    third = a.send(1, 0, noise(7))
    for num_bytes in (BIG, 7):
        into = empty(num_bytes)
        b.receive(0, 0, into).wait()
        assert torch.equal(into, noise(num_bytes))
    first.wait()
    third.wait()


def test_an_abort_releases_all_letters_of_all_ranks_within_100_ms(group: Group) -> None:
    mailboxes = group(3)
    letters = [
        mailboxes[0].receive(1, 3, empty(8)),
        mailboxes[1].receive(None, 3, empty(8)),
        mailboxes[2].send(0, 4, noise(BIG)),
    ]
    time.sleep(0.05)
    aborted = time.monotonic()
    mailboxes[2]._peers.abort("enough")
    reason = f"the group was aborted: enough (by rank 2 on {HOST})"
    texts = [error_of(letter) for letter in letters]
    assert time.monotonic() - aborted < 0.5  # 0.1 s, on a machine that has other work
    assert texts[0] == f"receive of 8 bytes from rank 1 on {HOST}, tag 3: {reason}"
    assert all(reason in text for text in texts)
    assert reason in error_of(mailboxes[0].send(1, 3, empty(1)))


def test_a_peer_that_leaves_fails_what_it_owes_and_nothing_else(group: Group) -> None:
    a, b, c = group(3)
    b.send(0, 1, noise(6)).wait()
    owed = a.receive(1, 2, empty(4))
    anyone = a.receive(None, 5, empty(4))
    b.close()
    b._peers.close()
    assert f"rank 1 on {HOST} left" in error_of(owed)
    into = empty(6)
    a.receive(1, 1, into).wait()  # what it had sent is still there
    assert torch.equal(into, noise(6))
    assert f"rank 1 on {HOST} left" in error_of(a.receive(1, 1, into))
    letter = a.receive(2, 0, into)
    c.send(0, 0, noise(6, 2)).wait()
    letter.wait()
    assert not anyone.done()
    c.close()
    c._peers.close()
    assert "all other ranks have left" in error_of(anyone)


def test_a_peer_that_leaves_fails_what_is_on_its_way_to_it(group: Group) -> None:
    a, b = group(2)
    letters = [a.send(1, 1, noise(BIG)), a.send(1, 1, noise(1))]
    time.sleep(0.05)
    assert not any(letter.done() for letter in letters)
    b.close()
    b._peers.close()
    for letter in letters:
        assert f"rank 1 on {HOST} left" in error_of(letter)


def test_a_peer_that_dies_in_the_middle_is_named(group: Group) -> None:
    a, b = group(2)
    letter = b.receive(0, 1, empty(10))
    a._peers.mail(1).send(HEADER.pack(MAGIC, 1, 10) + b"1234")
    until(lambda: b._pairs[0].coming and b._pairs[0].coming.moved_bytes == 4, "4 bytes")
    for connection in a._peers._sockets.values():  # as a death does, without goodbye
        connection.shutdown(socket.SHUT_RDWR)
    assert f"rank 0 on {HOST} died" in error_of(letter)


def test_what_is_no_message_is_an_error_that_names_the_peer(group: Group) -> None:
    a, b = group(2)
    letter = b.receive(0, 1, empty(10))
    a._peers.mail(1).send(b"GET / HTTP/1.1\r\n\r\n, and more")
    assert f"rank 0 on {HOST} sent what is no message" in error_of(letter)


def test_when_done_calls_once_with_the_error(group: Group) -> None:
    a, b = group(2)
    heard: list[object] = []
    letter = b.receive(0, 1, empty(2))
    letter.when_done(heard.append)
    letter.when_done(lambda error: 1 // 0)  # one caller's mistake harms nobody else
    letter.when_done(lambda error: heard.append(threading.current_thread().name))
    assert heard == []
    a.send(1, 1, noise(2)).wait()
    letter.wait()
    until(lambda: len(heard) == 2, "both calls")
    assert heard == [None, "penstock-mailbox-1"]
    letter.when_done(heard.append)
    assert heard[2:] == [None]
    failing = b.receive(0, 1, empty(2))
    failing.when_done(heard.append)
    b.close()
    assert isinstance(heard[3], TransportError)
    assert len(heard) == 4


def test_a_call_may_post_the_next_letter(group: Group) -> None:
    a, b = group(2)
    into = empty(3)
    answered = a.receive(1, 2, into)
    letter = b.receive(0, 1, empty(1))
    letter.when_done(lambda error: b.send(0, 2, noise(3)) and None)
    a.send(1, 1, noise(1)).wait()
    answered.wait()
    assert torch.equal(into, noise(3))


def test_closing_ends_letters_and_thread_and_files(group: Group) -> None:
    threads = threading.active_count()
    a, b = group(2)
    files = len(os.listdir("/proc/self/fd"))
    waiting = a.receive(1, 0, empty(1))
    b.send(0, 1, empty(1)).wait()
    assert threading.active_count() == threads + 2
    for mailbox in (a, b, a):
        mailbox.close()
    assert "the mailbox was closed" in error_of(waiting)
    assert "the mailbox was closed" in error_of(a.send(1, 0, empty(1)))
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files - 2


def test_an_unused_mailbox_starts_no_thread(group: Group) -> None:
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for mailbox in group(2):
            mailbox.close()
            mailbox._peers.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= files + 4  # polls, until they are collected
