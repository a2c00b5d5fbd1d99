"""What is measured of a made-up network, whose every share advances a made-up clock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from penstock.errors import RunError
from penstock.exchange import network
from penstock.exchange.collectives import Call
from penstock.exchange.cost import Link, Links, Table
from penstock.exchange.network import Network, measure, measure_links
from penstock.exchange.operation import Operation, Turn
from penstock.exchange.pattern import Hosts
from penstock.exchange.transport import Read, Views
from penstock.testing.group import in_threads

LATENCY_S, MESSAGE_S, BYTES_PER_S, BURST_BYTES = 1e-4, 5e-6, 125e6, 200_000


class Wire:
    """A transport of rank 0, whose peers all do as it does, on a link as `cost` has it.

    Of each large message the first bytes pass at once, as through a rate limiter. Every tenth share
    is held up.
    """

    name, rank = "wire", 0

    def __init__(self, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world_size = world_size
        self.hosts: Sequence[str] = [f"host{rank}" for rank in range(world_size)]
        self.now, self.sent_bytes, self.shares = 0.0, 0, 0
        monkeypatch.setattr(network.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(network, "_time_adding", lambda: network.PIECE_BYTES / 4e9)

    def share(self, turn: Turn, parts: Views, sizes: Sequence[int], read: Read) -> None:
        others = [p for rank, p in enumerate(parts) if rank != self.rank and p is not None]
        sent = sum(len(part) for part in others)
        heard = sum(size > 0 for rank, size in enumerate(sizes) if rank != self.rank)
        self.shares, self.sent_bytes = self.shares + 1, self.sent_bytes + sent
        self.now += LATENCY_S + (len(others) + heard) * MESSAGE_S
        self.now += max(0, sent - BURST_BYTES) / BYTES_PER_S
        self.now += 0.02 if self.shares % 10 == 0 else 0.0
        own = next((part for part in parts if part is not None), None)
        if own is not None:
            read([own] * self.world_size, 0, len(own))

    def allocate(self, num_bytes: int, turn: Turn) -> None:
        return None

    def holds(self, tensor: torch.Tensor) -> bool:
        return False

    def abort(self, reason: str) -> None:
        raise AssertionError(reason)

    def close(self) -> None:
        pass


def apart(world_size: int) -> Hosts:
    return tuple((rank,) for rank in range(world_size))


def call(transport: Any) -> Call:
    return Call(transport, 0, Operation("test"), 10.0)


def test_the_link_is_found_in_spite_of_bursts_and_hold_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(5, monkeypatch)
    links = measure_links(call(wire), apart(5))
    assert links.hosts == apart(5)
    assert links.far.latency_s == pytest.approx(LATENCY_S, rel=1e-6)
    assert links.far.message_s == pytest.approx(MESSAGE_S, rel=1e-6)
    assert links.far.bytes_per_s == pytest.approx(BYTES_PER_S, rel=0.05)
    assert links.reduce_bytes_per_s == pytest.approx(4e9)
    assert links.near == links.far, "no host has two ranks"
    assert wire.sent_bytes < 10e6


def test_a_burst_is_not_taken_for_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a single message of a size below the burst would have told: the negative control."""
    wire = Wire(2, monkeypatch)
    began = wire.now
    data = torch.zeros(network.SIZES_BYTES[0], dtype=torch.uint8)
    wire.share(Turn(0, Operation("test"), 1.0), [None, data], [0, len(data)], lambda *_: None)
    assert len(data) / (wire.now - began) > 4 * BYTES_PER_S


def test_two_cannot_tell_what_a_message_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    links = measure_links(call(Wire(2, monkeypatch)), apart(2))
    assert links.far.message_s == network.MESSAGE_S


def test_all_ranks_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(group: Any) -> Any:
        hosts = ((0, 1), (2,), (3,))
        return measure(group._transport, hosts, 10.0).to_json()

    results = in_threads(4, found)
    assert all(result == results[0] for result in results)
    assert results[0]["names"] == ["this process"] * 4
    assert results[0]["links"]["near"] != results[0]["links"]["far"]
    assert Table.from_json(results[0]["table"]).hosts == ((0, 1), (2,), (3,))


LINKS = Links(((0,), (1, 2)), Link(1e-5, 3e9, 1e-6), Link(1e-4, 125e6), 5e9)
NETWORK = Network(("a", "b", "b"), LINKS, Table.of(LINKS))


def test_it_fits_the_same_machines_only() -> None:
    assert NETWORK.fits(["a", "b", "b"], ((0,), (1, 2)))
    assert not NETWORK.fits(["a", "b", "c"], ((0,), (1, 2)))
    assert not NETWORK.fits(["a", "b", "b"], ((0,), (1,), (2,)))
    assert not NETWORK.fits(["a", "b"], ((0,), (1,)))


def test_it_comes_back_from_json() -> None:
    assert Network.from_json(json.loads(json.dumps(NETWORK.to_json()))) == NETWORK


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["names"], ["a", 1, "b"], "names is"),
        (["names"], ["a"], "1 names, links of 3 ranks, a table for 3"),
        (["links", "far"], {"latency_s": 1}, "links.far is"),
        (["links", "far", "bytes_per_s"], 0, "links.far.bytes_per_s is 0; expected a number"),
        (["links", "near", "latency_s"], True, "links.near.latency_s is True"),
        (["links", "near", "latency_s"], float("nan"), "links.near.latency_s is nan"),
        (["links", "hosts"], [[0], [0]], "links.hosts is"),
        (["table", "hosts"], [[0], [1, 1]], "hosts is [[0], [1, 1]]"),
        (["more"], 1, "expected an object of names, links, table"),
    ],
)
def test_what_is_no_network_is_named(path: list[str], value: Any, words: str) -> None:
    values = json.loads(json.dumps(NETWORK.to_json()))
    at = values
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(RunError) as caught:
        Network.from_json(values)
    assert words in caught.value.message


def test_what_is_no_object_is_named() -> None:
    with pytest.raises(RunError, match="got 'x'"):
        Network.from_json("x")
