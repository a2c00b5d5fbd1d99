"""Costs are those of the step lists, bytes are theory's, and the cheapest topology is chosen."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from penstock.errors import RunError
from penstock.exchange.cost import (
    SIZES_BYTES,
    Link,
    Links,
    Row,
    Table,
    candidates,
    choose,
    costs,
    simulate,
)
from penstock.exchange.pattern import TOPOLOGIES, Hosts
from penstock.exchange.topology import Receive, Send, schedule

NEAR = Link(latency_s=5e-6, bytes_per_s=5e9, message_s=2e-6)
FAR = Link(latency_s=5e-5, bytes_per_s=1.25e8, message_s=1e-5)

HOSTS: list[Hosts] = [
    ((0,), (1,)),
    ((0, 1, 2, 3, 4),),
    ((0, 1), (2, 3)),
    ((0, 3), (1, 5, 6), (2,), (4,)),
    tuple((rank,) for rank in range(9)),
]


def evenly(world_size: int, ranks_per_host: int = 1) -> Links:
    ranks = range(world_size)
    hosts = tuple(
        tuple(ranks[i : i + ranks_per_host]) for i in range(0, world_size, ranks_per_host)
    )
    return Links(hosts, NEAR, FAR, reduce_bytes_per_s=4e9)


def cost_of_the_lists(
    collective: str, topology: str, links: Links, num_bytes: int
) -> tuple[float, list[float], list[int], list[int]]:
    """Seconds in all and by rank, and bytes sent and received, from the ranks' schedules."""
    p = links.world_size
    host = {rank: number for number, ranks in enumerate(links.hosts) for rank in ranks}
    lists = [schedule(collective, topology, p, rank, hosts=links.hosts) for rank in range(p)]
    total_s, busy_s, sent, received = 0.0, [0.0] * p, [0] * p, [0] * p
    for number in range(len(lists[0].steps)):

        def chunks(rank: int, kind: type, far: bool, number: int = number) -> list[int]:
            step = lists[rank].steps[number]
            parts: list[Send | Receive] = [*step.sends, *step.receives]
            return [
                part.last - part.first
                for part in parts
                if isinstance(part, kind) and (host[part.peer] != host[rank]) == far
            ]

        slowest_s = 0.0
        for rank in range(p):
            own = lists[rank]
            chunk_bytes = num_bytes / own.chunks
            near = [chunks(rank, kind, False) for kind in (Send, Receive)]
            far = [chunks(rank, kind, True) for kind in (Send, Receive)]
            time_s = NEAR.message_s * sum(map(len, near)) + FAR.message_s * sum(map(len, far))
            time_s += FAR.latency_s if any(far) else NEAR.latency_s if any(near) else 0
            near_s = max(map(sum, near)) * chunk_bytes / NEAR.bytes_per_s
            shared = [
                sum(sum(chunks(other, kind, True)) for other in links.hosts[host[rank]])
                for kind in (Send, Receive)
            ]
            far_s = max(shared) * chunk_bytes / FAR.bytes_per_s if any(far) else 0
            added = sum(r.last - r.first for r in own.steps[number].receives if r.reduce)
            time_s += max(near_s, far_s) + added * chunk_bytes / links.reduce_bytes_per_s
            slowest_s = max(slowest_s, time_s)
            busy_s[rank] += time_s
            for part in own.steps[number].sends:
                where = own.elements(part, num_bytes)
                sent[rank] += where.stop - where.start
            for receive in own.steps[number].receives:
                where = own.elements(receive, num_bytes)
                received[rank] += where.stop - where.start
        total_s += slowest_s
    return total_s, busy_s, sent, received


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("collective", TOPOLOGIES)
def test_simulation_is_the_cost_of_the_lists(collective: str, hosts: Hosts) -> None:
    links = Links(hosts, NEAR, FAR, reduce_bytes_per_s=4e9)
    for topology in candidates(hosts, collective):
        for num_bytes in (0, 1, 100_003):
            time_s, busy_s, sent, received = cost_of_the_lists(
                collective, topology, links, num_bytes
            )
            found = simulate(collective, topology, links, num_bytes)
            assert found.time_s == pytest.approx(time_s, rel=1e-12)
            assert found.sent_bytes.tolist() == sent
            assert found.received_bytes.tolist() == received
            own = schedule(collective, topology, links.world_size, 0, hosts=hosts)
            assert found.steps == len(own.steps)
            assert found.busy_s.tolist() == pytest.approx(busy_s, rel=1e-12)
            assert costs(links, collective, topology, [num_bytes]) == pytest.approx(time_s)


def test_a_step_by_hand() -> None:
    """Three ranks on two hosts: gather of 1000 bytes."""
    links = Links(((0, 1), (2,)), Link(1.0, 100.0, 0.1), Link(5.0, 10.0, 0.5), 500.0)
    found = simulate("all_reduce", "gather", links, 1000)
    # Rank 2 gets 1000 bytes from each of 0 and 1, whose host sends both over one link.
    assert found.busy_s.tolist() == pytest.approx(
        [5 + 2 * 0.1 + 2 * 0.5 + 200 + 4] * 2 + [5 + 4 * 0.5 + 200 + 4]
    )
    assert found.time_s == pytest.approx(211.0)


@pytest.mark.parametrize("collective", TOPOLOGIES)
def test_4096_ranks_send_what_theory_says(collective: str) -> None:
    p = 4096
    n = 64 * 2**20
    links = evenly(p, 4)
    part = n * (p - 1) // p
    whole = n * (p - 1)
    busiest = {
        ("all_reduce", "gather"): whole,
        ("all_reduce", "direct"): 2 * part,
        ("all_reduce", "star"): whole,
        ("all_reduce", "tree"): 12 * n,
        ("all_reduce", "halving_doubling"): 2 * part,
        ("all_reduce", "ring"): 2 * part,
        ("reduce", "star"): n,
        ("reduce", "tree"): n,
        ("broadcast", "star"): whole,
        ("broadcast", "direct"): 2 * part,
        ("broadcast", "tree"): 12 * n,
        ("broadcast", "ring"): 2 * part,
        ("reduce_scatter", "direct"): part,
        ("reduce_scatter", "ring"): part,
        ("all_gather", "direct"): part,
        ("all_gather", "ring"): part,
        ("barrier", "dissemination"): 0,
    }
    for topology in TOPOLOGIES[collective]:
        found = simulate(collective, topology, links, n)
        assert found.sent_bytes.max() == busiest[collective, topology]
        assert found.sent_bytes.sum() == found.received_bytes.sum()
        assert 0 < found.time_s < np.inf


def test_4096_ranks_in_a_hierarchy_send_what_theory_says() -> None:
    n, hosts = 64 * 2**20, 1024
    found = simulate("all_reduce", "hierarchical_ring", evenly(4096, 4), n)
    followers = np.arange(4096) % 4 > 0
    assert set(found.sent_bytes[~followers]) == {2 * n * (hosts - 1) // hosts + 3 * n}
    assert set(found.sent_bytes[followers]) == {n}


@pytest.mark.parametrize("p", [3, 5, 1023])
def test_bytes_of_a_ring_are_theorys_up_to_the_rounding_of_chunks(p: int) -> None:
    n = 100_000_007
    found = simulate("all_reduce", "ring", evenly(p), n)
    assert abs(found.sent_bytes - 2 * n * (p - 1) / p).max() <= 2
    assert found.sent_bytes.sum() == 2 * n * (p - 1)


def test_halving_doubling_beyond_a_power_of_two_sends_less_than_thrice() -> None:
    n = 2**20
    for p in (3, 5, 7, 12, 17, 31, 33):
        assert simulate("all_reduce", "halving_doubling", evenly(p), n).sent_bytes.max() < 3 * n


def test_choice_is_the_cheapest() -> None:
    for links in (evenly(2), evenly(8), evenly(16, 4)):
        for num_bytes in (0, 1 << 10, 1 << 16, 1 << 26):
            names = candidates(links.hosts, "all_reduce")
            times = [simulate("all_reduce", name, links, num_bytes).time_s for name in names]
            chosen = choose(links, "all_reduce", num_bytes)
            assert times[names.index(chosen)] == pytest.approx(min(times))


def test_choice_follows_the_links() -> None:
    """What each topology is for, so that a choice that never changes is found out."""
    assert choose(evenly(4), "all_reduce", 1024) == "gather"
    assert choose(evenly(4), "all_reduce", 1 << 26) in ("direct", "halving_doubling", "ring")
    assert choose(evenly(256), "all_reduce", 256) == "tree"
    assert choose(evenly(256), "all_reduce", 1 << 16) == "halving_doubling"
    free = replace(evenly(256), far=replace(FAR, message_s=0.0))
    assert choose(free, "reduce", 8) == "star"
    assert choose(evenly(256), "reduce", 8) == "tree"
    assert choose(evenly(256), "broadcast", 1 << 28) in ("direct", "ring")
    assert choose(evenly(16, 4), "all_reduce", 1024).startswith("hierarchical_")
    assert choose(evenly(16, 4), "all_gather", 1 << 26) == "ring"
    assert choose(evenly(16), "all_gather", 256) == "direct"


def test_a_tie_goes_to_the_first() -> None:
    links = evenly(1)
    for collective, names in TOPOLOGIES.items():
        assert {simulate(collective, name, links, 1024).time_s for name in names} == {0}
        assert choose(links, collective, 1024) == names[0]


def test_sums_limit_the_choice() -> None:
    links = evenly(16, 4)
    assert "ring" in candidates(links.hosts, "reduce_scatter")
    assert choose(links, "reduce_scatter", 1 << 26) == "ring"
    assert choose(links, "reduce_scatter", 1 << 26, sums="exact") == "direct"
    exact = candidates(links.hosts, "all_reduce", "exact")
    assert "ring" not in exact
    assert "hierarchical_ring" not in exact
    assert "hierarchical_tree" in exact
    assert candidates(links.hosts, "all_reduce", "once") == ("gather", "direct", "star")
    for flat in (evenly(4), evenly(4, 4)):
        assert candidates(flat.hosts, "all_reduce") == TOPOLOGIES["all_reduce"]
    mixed = (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
    assert "hierarchical_tree" not in candidates(mixed, "all_reduce", "exact")


def test_table_is_the_choice_at_its_borders() -> None:
    links = evenly(16, 4)
    table = Table.of(links)
    assert table == Table.of(links)
    for collective in TOPOLOGIES:
        for sums in table.rows[collective]:
            for size in SIZES_BYTES:
                assert table.topology(collective, size, sums=sums) == choose(
                    links, collective, size, sums=sums
                )
            rows = table.rows[collective][sums]
            assert table.topology(collective, 0, sums=sums) == rows[0].topology
            assert table.topology(collective, 1 << 40, sums=sums) == rows[-1].topology
    assert len(table.rows["all_reduce"]["any"]) > 2


def test_a_row_ends_at_its_border() -> None:
    rows = (Row(100, "gather"), Row(200, "star"), Row(None, "ring"))
    table = Table(((0, 1),), {"all_reduce": {"any": rows}})
    found = [table.topology("all_reduce", n) for n in (0, 100, 101, 200, 201)]
    assert found == ["gather", "gather", "star", "star", "ring"]


def test_table_survives_json() -> None:
    table = Table.of(evenly(16, 4))
    again = Table.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again != Table.of(evenly(16, 2))


def set_at(*keys: str | int, to: Any) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = to

    return change


ROWS = ("topologies", "all_reduce", "any")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_at("more", to=1), "the table is .*'more'.*expected an object of hosts, topologies"),
        (set_at("hosts", to=[[0, 1], [3]]), "hosts is .*expected lists that hold each rank once"),
        (set_at("hosts", to=[[0, 1], ["2"]]), "hosts is"),
        (set_at("hosts", to=3), "hosts is 3"),
        (set_at("topologies", to=[]), r"topologies is \[\]; expected an object of all_reduce"),
        (
            set_at("topologies", "all_reduce", to={}),
            r"topologies.all_reduce is \[\]; .* any, exact",
        ),
        (set_at(*ROWS, to=[]), r"all_reduce.any is \[\]; expected a list of rows"),
        (set_at(*ROWS, 0, to={}), r"all_reduce.any\[0\] is \[\]; .* up_to_bytes, topology"),
        (set_at(*ROWS, 0, "topology", to="square"), r"any\[0\].topology is 'square'; .*ring"),
        (set_at(*ROWS, 0, "topology", to=[]), r"any\[0\].topology is \[\]"),
        (set_at(*ROWS, 0, "up_to_bytes", to="1"), r"any\[0\].up_to_bytes is '1'; .* above -1"),
        (set_at(*ROWS, 0, "up_to_bytes", to=True), r"any\[0\].up_to_bytes is True"),
        (set_at(*ROWS, 1, "up_to_bytes", to=1), r"any\[1\].up_to_bytes is 1; expected a whole"),
        (set_at(*ROWS, -1, "up_to_bytes", to=1), r"up_to_bytes is 1; expected null in the last"),
        (
            set_at("topologies", "all_reduce", "exact", -1, "topology", to="ring"),
            r"exact\[\d\].topology is 'ring'; expected one of gather",
        ),
        (
            set_at("topologies", "all_reduce", "once", -1, "topology", to="tree"),
            r"once\[\d\].topology is 'tree'; expected one of gather, direct, star$",
        ),
    ],
)
def test_a_wrong_table_is_named(change: Callable[[Any], None], says: str) -> None:
    values = Table.of(evenly(16, 4)).to_json()
    assert len(values["topologies"]["all_reduce"]["any"]) > 2
    Table.from_json(copy.deepcopy(values))
    change(values)
    with pytest.raises(RunError) as caught:
        Table.from_json(values)
    assert re.search(says, caught.value.message), caught.value.message
    assert caught.value.hint


def test_borders_rise() -> None:
    values = Table.of(evenly(16, 4)).to_json()
    rows = values["topologies"]["all_reduce"]["any"]
    rows[1]["up_to_bytes"] = rows[0]["up_to_bytes"]
    with pytest.raises(RunError, match=r"any\[1\].up_to_bytes .* above"):
        Table.from_json(values)


def test_hosts_must_hold_each_rank_once() -> None:
    with pytest.raises(ValueError, match="hosts must hold each rank below 3 once"):
        Links(((0, 1), (1,)), NEAR, FAR, 1e9)
