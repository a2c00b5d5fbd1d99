"""Spools that go from one agent to another while they grow: order, doubles, losses, deadlines."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster import ferry
from penstock.cluster.ferry import Giver, Taker
from penstock.errors import TransportError
from penstock.token import new_token

WAIT_S = 10.0
TOKEN = new_token()


class Shelf:
    """What a giver has: files by source and partition, and how each ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[int, int, int]] = []

    def put(self, partition: int, number: int, data: bytes, what: str = "segment") -> None:
        path = self.folder / f"{partition}-{number}.{what}"
        path.with_suffix(".writing").write_bytes(data)
        path.with_suffix(".writing").replace(path)

    def find(self, source: int, partition: int, number: int) -> tuple[str, Path] | None:
        self.asked.append((source, partition, number))
        for what in ("segment", "end", "failed"):
            if (path := self.folder / f"{partition}-{number}.{what}").exists():
                return what, path
        return None


class Kept:
    """What a taker has copied."""

    def __init__(self) -> None:
        self.number = 0
        self.parts: list[tuple[str, bytes]] = []

    def put(self, what: str, number: int, data: bytes | bytearray) -> bool:
        assert number == self.number
        self.parts.append((what, bytes(data)))
        self.number += what == "segment"
        return what != "segment"


def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, "not in time"
        time.sleep(0.005)


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture
def giver(shelf: Shelf, errors: list[BaseException]) -> Iterator[Giver]:
    made = Giver(TOKEN, "127.0.0.1", shelf.find, errors.append)
    yield made
    made.close()


@pytest.fixture
def copies() -> dict[int, Kept]:
    return {}


@pytest.fixture
def taker(copies: dict[int, Kept], errors: list[BaseException]) -> Iterator[Callable[..., Taker]]:
    made = []

    def make(address: Any, token: str = TOKEN) -> Taker:
        def copy(source: int, partition: int) -> Kept:
            return copies.setdefault(partition, Kept())

        made.append(Taker(address, token, {"role": "agent", "rank": 1}, copy, errors.append))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_what_grows_is_copied_one_after_the_other(
    shelf: Shelf, giver: Giver, taker: Any, copies: dict[int, Kept], errors: list[BaseException]
) -> None:
    there = taker(giver.address)
    there.take(0, 5)
    there.take(0, 7)
    large = bytes(range(256)) * 2**14
    shelf.put(5, 0, large)
    until(lambda: 5 in copies and copies[5].number == 1)
    assert 7 not in copies
    shelf.put(5, 1, b"more")
    shelf.put(5, 2, b"the end", "end")
    shelf.put(7, 0, b"it broke", "failed")
    until(lambda: 7 in copies and copies[7].parts)
    assert copies[5].parts == [("segment", large), ("segment", b"more"), ("end", b"the end")]
    assert copies[7].parts == [("failed", b"it broke")]
    assert errors == []


def test_what_is_dropped_is_gone_on_with_elsewhere(
    shelf: Shelf, giver: Giver, taker: Any, copies: dict[int, Kept], errors: list[BaseException]
) -> None:
    there = taker(giver.address)
    there.take(0, 5)
    shelf.put(5, 0, b"first")
    until(lambda: 5 in copies and copies[5].number == 1)
    there.drop(0, 5)
    giver.close()
    other = Giver(TOKEN, "127.0.0.1", shelf.find, errors.append)
    try:
        taker(other.address).take(0, 5)
        shelf.put(5, 1, b"second")
        until(lambda: copies[5].number == 2)
    finally:
        other.close()
    assert [data for _, data in copies[5].parts] == [b"first", b"second"]
    assert errors == []


def test_nobody_without_the_token_is_given_anything(
    shelf: Shelf, giver: Giver, taker: Any, copies: dict[int, Kept], monkeypatch: Any
) -> None:
    shelf.put(5, 0, b"secret")
    taker(giver.address, new_token()).take(0, 5)
    taker(giver.address).take(0, 6)  # a negative control: this one is heard
    until(lambda: (0, 6, 0) in shelf.asked)
    time.sleep(0.2)
    assert (0, 5, 0) not in shelf.asked
    assert not copies[5].parts


def test_who_cannot_be_reached_is_named_in_time(
    taker: Any, errors: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ferry, "REACH_S", 1.0)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = nobody.getsockname()
        taker(address).take(0, 5)
        until(lambda: errors)
    (error,) = errors
    assert isinstance(error, TransportError)
    assert "rank 1 cannot take partition 5 of source 0 from the agent at 127.0.0.1:" in str(error)
    assert "firewall" in error.hint
