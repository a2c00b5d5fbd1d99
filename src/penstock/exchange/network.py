"""What a group knows of its network: links measured when it forms, and the topologies they suggest.

For a ring of ranks, those of one host or one of each host, all links are measured at once:

    step_s       the median time of a share in which each rank has one byte for the next
    message_s    (all_s - step_s) / (2 (p - 1) - 2), where in all_s each has a byte for each other
    latency_s    step_s - 2 message_s, as a step of the ring is one message out and one in
    bytes_per_s  (n - m) / (t(n) - t(m)) of the last two sizes, which takes off latency, and what a
                 rate limiter lets pass at once (a burst)

The slowest rank's times count, as in `cost`. `measure` is a collective: all ranks get one result.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from penstock.errors import RunError
from penstock.exchange import collectives
from penstock.exchange.collectives import Call
from penstock.exchange.cost import Link, Links, Table
from penstock.exchange.operation import Operation
from penstock.exchange.pattern import Hosts
from penstock.exchange.reduction import PIECE_BYTES
from penstock.exchange.transport import Transport, ignore

ROUNDS = 15
"""Steps of one byte; their median is not moved by a few that the scheduler has held up."""
SIZES_BYTES = tuple(1 << bit for bit in (16, 18, 20, 22))
TRIES = 4
"""Messages of each size. The first opens TCP's window, and takes what a rate limiter lets pass at
once; of the others the fastest counts, as a busy machine only makes them slower."""
ENOUGH_S, CERTAIN_S = 0.005, 0.03
"""No larger message is tried once the fastest of a size has taken this long, and no third one of a
size once two have taken that long. [measured: two hosts joined by veth, 2026-11: 30 ms in all at
10 Gbit/s, 50 ms at 1 Gbit/s, 110 ms at 100 Mbit/s; rates within 10% of the line's]"""
MESSAGE_S = 5e-6
"""Where a ring of two cannot tell what a further message costs. [measured: 4 to 7 us among 3 and 4
ranks, loopback, 2 cores, 2026-11]"""
OPERATION = Operation("measuring the network")


@dataclass(frozen=True)
class Network:
    """What is measured once and then kept, so that a run takes the same ways to its end.

    Arguments:
        names: by rank, the name of its machine.
        links: between the ranks.
        table: the topologies chosen for them.
    """

    names: tuple[str, ...]
    links: Links
    table: Table

    def fits(self, names: Sequence[str], hosts: Hosts) -> bool:
        """Whether it is of a group on these machines, with the same ranks on each."""
        return self.names == tuple(names) and self.table.hosts == hosts

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "names": list(self.names),
            "links": self.links.to_json(),
            "table": self.table.to_json(),
        }

    @classmethod
    def from_json(cls, values: Any) -> Network:
        """What `to_json` gave.

        Raises:
            RunError: it is not that; names the key, what it is, and what it should be.
        """
        expected = ("names", "links", "table")
        if not isinstance(values, dict) or set(values) != set(expected):
            got = sorted(map(str, values)) if isinstance(values, dict) else repr(values)
            raise RunError(f"the network: got {got}; expected an object of {', '.join(expected)}")
        links, table = Links.from_json(values["links"]), Table.from_json(values["table"])
        names = values["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RunError(f"the network: names is {names!r}; expected a list of text")
        if not len(names) == links.world_size == sum(map(len, table.hosts)):
            raise RunError(
                f"the network: {len(names)} names, links of {links.world_size} ranks, a table for "
                f"{sum(map(len, table.hosts))}; expected as many of each"
            )
        return cls(tuple(names), links, table)


def measure(transport: Transport, hosts: Hosts, timeout_s: float) -> Network:
    """Measures the links among all ranks, and chooses. Every rank calls it, before anything else.

    Arguments:
        hosts: the ranks of each host.
        timeout_s: how long to wait for a rank.

    Raises:
        TransportError: a rank is gone, or does not come.
    """
    call = Call(transport, 0, OPERATION, timeout_s)
    links = measure_links(call, hosts)
    table = _told_by_first(call, Table.of(links).to_json() if transport.rank == 0 else None)
    return Network(tuple(transport.hosts), links, Table.from_json(table))


def measure_links(call: Call, hosts: Hosts) -> Links:
    """The links alone; what is not there (between hosts, where there is one) is as the other."""
    own = next(ranks for ranks in hosts if call.transport.rank in ranks)
    leaders = [ranks[0] for ranks in hosts]
    near = _link(call, own) if len(hosts) < call.transport.world_size else None
    far = _link(call, leaders) if len(hosts) > 1 else None
    adding_s = max(_everyones(call, _time_adding()))
    known = near or far
    assert known is not None, "a group of one has no network"
    return Links(hosts, near or known, far or known, PIECE_BYTES / adding_s)


def _link(call: Call, ring: Sequence[int]) -> Link:
    """Measures the links of a ring of ranks, at the same time as those of other rings.

    Who is not in a ring of its own takes part with nothing to send.
    """
    rank, ranks = call.transport.rank, len(ring)
    at = ring.index(rank) if rank in ring else None
    beside = [] if at is None or ranks == 1 else [ring[(at + 1) % ranks], ring[at - 1]]
    following, preceding = beside[:1], beside[1:]
    others = [r for r in ring if r != rank] if beside else []

    def step(to: Sequence[int], of: Sequence[int]) -> float:
        byte = torch.zeros(1, dtype=torch.uint8)
        return max(_everyones(call, median(_time(call, to, of, byte) for _ in range(ROUNDS))))

    def fastest(num_bytes: int) -> float:
        data, took_s = torch.zeros(num_bytes, dtype=torch.uint8), math.inf
        for number in range(TRIES):
            if number > 1 and took_s > CERTAIN_S:
                break
            last_s = max(_everyones(call, _time(call, following, preceding, data)))
            took_s = min(took_s, last_s) if number else math.inf
        return took_s

    step_s = step(following, preceding)
    all_s = step(others, others)
    widest = max(_everyones(call, float(len(others))))
    message_s = max(0.0, all_s - step_s) / (2 * widest - 2) if widest > 1 else MESSAGE_S
    message_s = min(message_s, step_s / 4)  # of a step with two, most is not theirs
    before_bytes, before_s, took_s = 0, 0.0, 0.0
    for num_bytes in SIZES_BYTES:
        before_s = took_s
        took_s = fastest(num_bytes)
        if took_s > ENOUGH_S or num_bytes == SIZES_BYTES[-1]:
            break
        before_bytes = num_bytes
    # A hold-up of the smaller message must not make the link seem endless.
    sent_s = max(took_s - before_s, took_s / 2)
    return Link(step_s - 2 * message_s, (num_bytes - before_bytes) / sent_s, message_s)


def _time(call: Call, to: Sequence[int], of: Sequence[int], data: torch.Tensor) -> float:
    """Seconds of a share in which this rank has `data` for some, and some have as much for it."""
    world_size = call.transport.world_size
    parts = [data if rank in to else None for rank in range(world_size)]
    sizes = [data.nbytes if rank in of else 0 for rank in range(world_size)]
    began = time.perf_counter()
    call.share(parts, sizes, ignore)
    return time.perf_counter() - began


def _time_adding() -> float:
    one, other = torch.ones(2, PIECE_BYTES // 4)

    def added() -> float:
        began = time.perf_counter()
        torch.add(one, other, out=one)
        return time.perf_counter() - began

    return min(added() for _ in range(10))


def _everyones(call: Call, value: float) -> list[float]:
    """A number of each rank, by rank; all are at the same place afterwards."""
    own = torch.tensor([value], dtype=torch.float64)
    outputs = torch.zeros(call.transport.world_size, dtype=torch.float64)
    collectives.all_gather(call, own, list(outputs.view(-1, 1)))
    return outputs.tolist()


def _told_by_first(call: Call, values: Any) -> Any:
    """JSON values of rank 0, on all ranks."""
    text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    length = torch.tensor([len(text)])
    collectives.broadcast(call, length, 0)
    if call.transport.rank != 0:
        text = torch.zeros(int(length), dtype=torch.uint8)
    collectives.broadcast(call, text, 0)
    return json.loads(text.numpy().tobytes())
