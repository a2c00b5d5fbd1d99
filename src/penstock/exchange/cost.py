"""What collectives cost, and which topology is chosen for which message.

The time of one step is that of its slowest rank r, and of a collective the sum over its steps:

    t(step) = max over r of  latency + m_r message_s + max(near_r, far_h(r)) + added_r / reduce
    near_r  = max(bytes that r sends, bytes that r receives) / bytes_per_s      inside a host
    far_h   = max(bytes that the ranks of host h send, receive) / bytes_per_s   between hosts

where latency is the far one if r has a message to or from another host, m_r is the number of
messages that r sends and receives (each of its link's message_s), and added_r are the bytes that r
receives to add. Links are full duplex. A rank's messages share its link inside the host, and a
host's ranks share the link to the others. `_step_times` computes t(step).

It is the model of Hockney 1994 (Parallel Computing 20, 389; alpha-beta), with the overhead per
message of LogP (Culler et al. 1993, PPoPP): without it a star would be ahead for all small
messages, however many ranks there are.

`num_bytes` of a collective is the size of each rank's whole buffer: for a reduce-scatter what a
rank brings, for an all-gather what it ends up with.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from penstock.errors import RunError
from penstock.exchange.pattern import (
    HIERARCHICAL,
    TOPOLOGIES,
    Hosts,
    Messages,
    check_hosts,
    pattern,
)
from penstock.exchange.topology import at_once, exact

Sums = Literal["any", "exact", "once"]
"""What is asked of sums: nothing; the bits of the fixed tree; those, and that no partial sum
travels (in half precision it would be rounded each time)."""

ADDING = ("all_reduce", "reduce", "reduce_scatter")

SIZES_BYTES = tuple(1 << bit for bit in range(8, 31))
"""The borders that a table can have."""

Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Link:
    """How long messages take.

    Arguments:
        latency_s: of a step, however many messages it has at a time.
        bytes_per_s: in each direction.
        message_s: what each message costs the rank that sends it, and the one that receives it.
    """

    latency_s: float
    bytes_per_s: float
    message_s: float = 0.0


@dataclass(frozen=True)
class Links:
    """Who is joined to whom, and how.

    Arguments:
        hosts: the ranks of each host.
        near, far: between two ranks of one host, and between two hosts.
        reduce_bytes_per_s: how fast a rank adds what it receives to what it has.
    """

    hosts: Hosts
    near: Link
    far: Link
    reduce_bytes_per_s: float

    def __post_init__(self) -> None:
        check_hosts(self.hosts, self.world_size)

    @cached_property
    def world_size(self) -> int:
        return sum(len(ranks) for ranks in self.hosts)

    @cached_property
    def host_of(self) -> npt.NDArray[np.int64]:
        """By rank, the number of its host; (world_size,)."""
        host_of = np.empty(self.world_size, np.int64)
        for host, ranks in enumerate(self.hosts):
            host_of[list(ranks)] = host
        return host_of

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"hosts": [list(ranks) for ranks in self.hosts]}

    @classmethod
    def from_json(cls, values: Any) -> Links:
        """What `to_json` gave.

        Raises:
            RunError: it is not that; names the key, what it is, and what it should be.
        """
        keys = ("hosts", "near", "far", "reduce_bytes_per_s")
        _keys("the links", values, keys)
        near, far = (_link_from(f"links.{key}", values[key]) for key in ("near", "far"))
        speed = _number_from("links.reduce_bytes_per_s", values["reduce_bytes_per_s"])
        return cls(_hosts_from("links.hosts", values["hosts"]), near, far, speed)


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a collective would take.

    Arguments:
        time_s: until the last rank is done.
        busy_s: by rank, how much of it the rank is not waiting for a slower one; (world_size,).
        sent_bytes, received_bytes: by rank, to the byte; int64 (world_size,).
        steps: their number.
    """

    time_s: float
    busy_s: Reals
    sent_bytes: npt.NDArray[np.int64]
    received_bytes: npt.NDArray[np.int64]
    steps: int


def candidates(hosts: Hosts, collective: str, sums: Sums = "any") -> tuple[str, ...]:
    """The topologies there are for a collective, in the order in which they are preferred."""
    p = sum(len(ranks) for ranks in hosts)
    names = TOPOLOGIES[collective]
    if collective == "all_reduce" and 1 < len(hosts) < p:
        names += tuple(HIERARCHICAL + name for name in names)
    if sums == "any":
        return names
    return tuple(
        name
        for name in names
        if exact(collective, name, p, hosts) and (sums == "exact" or at_once(name, p))
    )


def simulate(collective: str, topology: str, links: Links, num_bytes: int) -> Simulation:
    """Goes through all messages of all ranks, for a buffer of `num_bytes`; root 0.

    Times take chunks as equal; what is sent and received is counted to the byte.
    """
    p = links.world_size
    whole = pattern(collective, topology, p, hosts=links.hosts)
    starts = np.arange(whole.chunks + 1) * num_bytes // whole.chunks
    time_s, steps = 0.0, 0
    busy_s, sent, received = np.zeros(p), np.zeros(p), np.zeros(p)

    def counted(step: Iterable[Messages]) -> Iterable[Messages]:
        for m in step:
            size = starts[m.last] - starts[m.first]
            # bincount adds in float64, which is exact below 2^53 bytes.
            sent[:] += np.bincount(m.source, size, p)
            received[:] += np.bincount(m.target, size, p)
            yield m

    for step in whole.steps:
        fixed_s, chunk_s = _step_times(links, counted(step))
        own_s = fixed_s + chunk_s * (num_bytes / whole.chunks)
        busy_s += own_s
        time_s += float(own_s.max())
        steps += 1
    return Simulation(time_s, busy_s, sent.astype(np.int64), received.astype(np.int64), steps)


def costs(links: Links, collective: str, topology: str, sizes_bytes: Sequence[int]) -> Reals:
    """The seconds that a collective takes for buffers of each of these sizes; (sizes,)."""
    whole = pattern(collective, topology, links.world_size, hosts=links.hosts)
    sizes = np.asarray(sizes_bytes, np.float64) / whole.chunks
    total_s = np.zeros(len(sizes))
    for step in whole.steps:
        fixed_s, chunk_s = _step_times(links, step)
        total_s += (fixed_s + np.outer(sizes, chunk_s)).max(axis=1)
    return total_s


def choose(links: Links, collective: str, num_bytes: int, *, sums: Sums = "any") -> str:
    """The topology that costs least; the first of `candidates` where several cost the same."""
    return _best(links, collective, [num_bytes], sums)[0]


class Row(NamedTuple):
    """The topology of messages of at most so many bytes; None: of all larger ones."""

    up_to_bytes: int | None
    topology: str


@dataclass(frozen=True)
class Table:
    """The frozen choice: which topology each collective takes for which size.

    Arguments:
        hosts: those for which it was made. A hierarchical topology goes by them, wherever the ranks
            are now, so that its sums keep their bits.
        rows: by collective, and by what is asked of its sums, in ascending order of size.
    """

    hosts: Hosts
    rows: Mapping[str, Mapping[Sums, tuple[Row, ...]]]

    @classmethod
    def of(cls, links: Links) -> Table:
        """The cheapest topologies on these links, with borders among `SIZES_BYTES`."""
        rows: dict[str, dict[Sums, tuple[Row, ...]]] = {}
        for collective in TOPOLOGIES:
            rows[collective] = {}
            for sums in _asked(collective):
                names = _best(links, collective, SIZES_BYTES, sums)
                borders = [
                    Row(size, name)
                    for size, name, larger in zip(SIZES_BYTES, names, names[1:])
                    if name != larger
                ]
                rows[collective][sums] = (*borders, Row(None, names[-1]))
        return cls(links.hosts, rows)

    def topology(self, collective: str, num_bytes: int, *, sums: Sums = "any") -> str:
        """The one to take for a buffer of `num_bytes` (of a collective that adds: with `sums`)."""
        for row in self.rows[collective][sums]:
            if row.up_to_bytes is None or num_bytes <= row.up_to_bytes:
                return row.topology
        raise AssertionError("a table's last row has no border")

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "hosts": [list(ranks) for ranks in self.hosts],
            "topologies": {
                collective: {sums: [row._asdict() for row in rows] for sums, rows in kinds.items()}
                for collective, kinds in self.rows.items()
            },
        }

    @classmethod
    def from_json(cls, values: Any) -> Table:
        """What `to_json` gave.

        Raises:
            RunError: it is not a table; names the key, what it is, and what it should be.
        """
        _keys("the table", values, ("hosts", "topologies"))
        hosts = _hosts_from("hosts", values["hosts"])
        _keys("topologies", values["topologies"], TOPOLOGIES)
        rows: dict[str, dict[Sums, tuple[Row, ...]]] = {}
        for collective, kinds in values["topologies"].items():
            key = f"topologies.{collective}"
            _keys(key, kinds, _asked(collective))
            rows[collective] = {
                sums: _rows_from(f"{key}.{sums}", kinds[sums], collective, hosts, sums)
                for sums in _asked(collective)
            }
        return cls(hosts, rows)


def _step_times(links: Links, step: Iterable[Messages]) -> tuple[Reals, Reals]:
    """What one step takes each rank: seconds for no bytes, and seconds per byte of a chunk."""
    p, host_of = links.world_size, links.host_of
    near, far = 0, 1
    messages = np.zeros((2, p))
    outgoing, incoming, added = np.zeros((2, p)), np.zeros((2, p)), np.zeros(p)
    for m in step:
        is_far = host_of[m.source] != host_of[m.target]
        source, target, chunks = m.source + is_far * p, m.target + is_far * p, m.last - m.first
        for end, load in ((source, outgoing), (target, incoming)):
            messages += np.bincount(end, minlength=2 * p).reshape(2, p)
            load += np.bincount(end, chunks, 2 * p).reshape(2, p)
        if m.reduce:
            added += np.bincount(m.target, chunks, p)

    latency_s = np.maximum(
        (messages[near] > 0) * links.near.latency_s, (messages[far] > 0) * links.far.latency_s
    )
    fixed_s = (
        latency_s + messages[near] * links.near.message_s + messages[far] * links.far.message_s
    )
    of_host = [np.bincount(host_of, load[far], len(links.hosts)) for load in (outgoing, incoming)]
    near_s = np.maximum(outgoing[near], incoming[near]) / links.near.bytes_per_s
    far_s = (messages[far] > 0) * np.maximum(*of_host)[host_of] / links.far.bytes_per_s
    return fixed_s, np.maximum(near_s, far_s) + added / links.reduce_bytes_per_s


def _best(links: Links, collective: str, sizes_bytes: Sequence[int], sums: Sums) -> list[str]:
    names = candidates(links.hosts, collective, sums)
    prices = np.stack([costs(links, collective, name, sizes_bytes) for name in names])
    return [names[i] for i in prices.argmin(axis=0)]


def _asked(collective: str) -> tuple[Sums, ...]:
    return get_args(Sums) if collective in ADDING else ("any",)


def _rows_from(key: str, values: Any, collective: str, hosts: Hosts, sums: Sums) -> tuple[Row, ...]:
    if not isinstance(values, list) or not values:
        raise _wrong(key, values, "a list of rows")
    names = candidates(hosts, collective, sums)
    rows: list[Row] = []
    border = -1
    for number, value in enumerate(values):
        where = f"{key}[{number}]"
        _keys(where, value, Row._fields)
        up_to, topology = value["up_to_bytes"], value["topology"]
        if number == len(values) - 1:
            if up_to is not None:
                raise _wrong(f"{where}.up_to_bytes", up_to, "null in the last row")
        elif type(up_to) is not int or up_to <= border:
            raise _wrong(f"{where}.up_to_bytes", up_to, f"a whole number above {border}")
        if topology not in names:
            raise _wrong(f"{where}.topology", topology, f"one of {', '.join(names)}")
        border = up_to
        rows.append(Row(up_to, topology))
    return tuple(rows)


def _hosts_from(key: str, values: Any) -> Hosts:
    try:
        hosts = tuple(tuple(operator.index(rank) for rank in ranks) for ranks in values)
        check_hosts(hosts, sum(len(ranks) for ranks in hosts))
    except (TypeError, ValueError) as error:
        raise _wrong(key, values, "lists that hold each rank once") from error
    return hosts


def _link_from(key: str, values: Any) -> Link:
    names = [field.name for field in fields(Link)]
    _keys(key, values, names)
    return Link(*(_number_from(f"{key}.{name}", values[name]) for name in names))


def _number_from(key: str, value: Any) -> float:
    least = 1.0 if key.endswith("bytes_per_s") else 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e18:
        raise _wrong(key, value, f"a number of at least {least:g}")
    return float(value)


def _keys(key: str, values: Any, expected: Iterable[str]) -> None:
    if not isinstance(values, dict) or set(values) != set(expected):
        got = sorted(map(str, values)) if isinstance(values, dict) else values
        raise _wrong(key, got, f"an object of {', '.join(expected)}")


def _wrong(key: str, got: object, expected: str) -> RunError:
    return RunError(
        f"the table of topologies: {key} is {got!r}; expected {expected}",
        hint="it is written when a run begins and not to be changed; a new run makes a new one",
    )
