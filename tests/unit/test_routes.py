"""Ways between layouts: all there are, at the prices of exchange's step lists, none dearer than a
detour, with as many bytes as theory says."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from penstock.errors import UserError
from penstock.exchange.cost import Link, Links, candidates, costs
from penstock.plan.costs import routes
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.costs.routes import Hop, Line, Routes, Way, layouts, plain
from penstock.plan.layout import B, Layout, P, S, in_words, part, possible, read_layout

DEVICE = Device("made up", {"float32": 1e11}, 2e10, 1 << 34, 5e-6)
NEAR, FAR = Link(2e-5, 4e9, 2e-6), Link(1e-4, 1.25e9, 5e-6)
ADDING = DEVICE.memory_bytes_per_s / 3

MESHES = [(2,), (3,), (5,), (2, 2), (2, 3), (3, 2), (2, 4)]
SHAPES = [(8, 12), (7, 11), (30, 5, 4)]
PAIRS = list(itertools.product(MESHES, SHAPES))


def cluster(*sizes: int) -> Cluster:
    hosts, devices = sizes if len(sizes) == 2 else (sizes[0], 1)
    return Cluster(hosts, devices, DEVICE, NEAR, FAR)


def on(*sizes: int) -> Routes:
    return Routes(cluster(*sizes), sizes)


def found(routes: Routes, shape: tuple[int, ...], source: str, target: str) -> Way:
    way = routes.way(shape, 4, read_layout(source), read_layout(target))
    assert way is not None
    return way


def all_layouts(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[Layout]:
    """Of {S0, S1, B, P}, those that can be."""
    every = itertools.product((S(0), S(1), B, P), repeat=len(sizes))
    return [layout for layout in every if possible(shape, layout, sizes)]


@pytest.mark.parametrize(("sizes", "shape"), PAIRS)
def test_every_transition_is_found_and_each_of_its_hops_can_be(
    sizes: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    ways = on(*sizes)
    every = all_layouts(shape, sizes)
    assert len(every) >= 4 ** len(sizes) - 7
    for source, target in itertools.product(every, repeat=2):
        way = ways.way(shape, 4, source, target)
        assert way is not None
        assert (way.cost_s > 0) == (source != target) == bool(way.hops)
        layout = source
        for hop, reached in zip(way.hops, layouts(source, way.hops), strict=True):
            assert layout[hop.axis] == hop.source != hop.target == reached[hop.axis]
            assert possible(shape, reached, sizes)
            inside = [p.dim for p in layout[hop.axis + 1 :] if p.is_split]
            assert hop.source.dim not in inside
            assert hop.target.dim not in inside
            assert hop.target != P or target[hop.axis] == P
            layout = reached
        assert layout == target


@pytest.mark.parametrize(("sizes", "shape"), PAIRS)
def test_no_way_is_dearer_than_a_detour(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    ways = on(*sizes)
    every = all_layouts(shape, sizes)
    for a, b, c in itertools.product(every, repeat=3):
        if any(y == P != z for y, z in zip(b, c, strict=True)):
            continue  # no way makes sums to take them apart again
        direct, first, second = (ways.way(shape, 4, *ends) for ends in ((a, c), (a, b), (b, c)))
        assert direct is not None
        assert first is not None
        assert second is not None
        assert direct.cost_s <= first.cost_s + second.cost_s + 1e-8


def cheapest(links: Links, collective: str, num_bytes: float, sums: str = "exact") -> float:
    names = candidates(links.hosts, collective, sums)  # type: ignore[arg-type]
    return min(float(costs(links, collective, name, [num_bytes])[0]) for name in names)  # type: ignore[list-item]


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("rows", [8 * 9, 24 * 10**6])
def test_plain_hops_cost_what_exchange_says(parts: int, rows: int) -> None:
    ways, num_bytes = on(parts), 4 * rows
    links = Links(tuple((rank,) for rank in range(parts)), NEAR, FAR, ADDING)
    sums = {2: "any"}.get(parts, "exact")
    for target, collective in (("B", "all_reduce"), ("S0", "reduce_scatter")):
        way = found(ways, (rows,), "P", target)
        assert [hop.kind for hop in way.hops] == [collective]
        assert way.cost_s == pytest.approx(cheapest(links, collective, num_bytes, sums), rel=1e-9)
    gathered = found(ways, (rows,), "S0", "B")
    assert gathered.cost_s == pytest.approx(cheapest(links, "all_gather", num_bytes), rel=1e-9)


def test_an_all_to_all_is_one_step_in_which_each_has_a_part_for_each() -> None:
    parts, shape = 4, (400, 800)
    way = found(on(parts), shape, "S0", "S1")
    own_bytes = 4 * 400 * 800 / parts
    wire_s = own_bytes * 3 / 4 / FAR.bytes_per_s
    copies_s = 2 * own_bytes / DEVICE.memory_bytes_per_s + DEVICE.operator_s  # packs columns
    want_s = FAR.latency_s + 2 * 3 * FAR.message_s + wire_s + copies_s
    assert [hop.kind for hop in way.hops] == ["all_to_all"]
    assert way.cost_s == pytest.approx(want_s, rel=1e-9)


def test_local_hops_cost_what_memory_does() -> None:
    shape, ways = (400, 800), on(4)
    each_s = 4 * 400 * 800 / DEVICE.memory_bytes_per_s
    for source, target, touched, copies in (
        ("B", "S0", 2 / 4, 1),
        ("B", "P", 1, 1),
        ("S1", "P", 1 + 2 / 4, 2),
    ):
        way = found(ways, shape, source, target)
        assert way.sent_bytes == 0
        assert way.cost_s == pytest.approx(touched * each_s + copies * DEVICE.operator_s)


def test_later_dims_are_copied_and_first_ones_not() -> None:
    ways = on(4)
    rows, columns = (found(ways, (400, 400), source, "B") for source in ("S0", "S1"))
    copy_s = 2 * 4 * 400 * 400 / DEVICE.memory_bytes_per_s + DEVICE.operator_s
    assert columns.cost_s == pytest.approx(rows.cost_s + copy_s)
    first = found(ways, (1, 400, 400), "S1", "B")
    assert first.cost_s == pytest.approx(rows.cost_s)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_bytes_are_those_of_theory(parts: int) -> None:
    ways, shape = on(parts), (24, 48)
    n = 4 * 24 * 48
    for source, target, sent in (
        ("P", "B", 2 * (parts - 1) * n // parts),
        ("P", "S0", (parts - 1) * n // parts),
        ("P", "S1", (parts - 1) * n // parts),
        ("S0", "B", (parts - 1) * n // parts),
        ("S0", "S1", (parts - 1) * (n // parts) // parts),
    ):
        assert found(ways, shape, source, target).sent_bytes == sent


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize(
    ("source", "target"),
    [("P", "S0"), ("P", "S1"), ("S0", "B"), ("S1", "B"), ("S0", "S1"), ("S1", "S0"),
     ("S0/6", "S0"), ("S0", "S0/6"), ("S0/6", "S1"), ("S0/6", "B")],
)  # fmt: skip
def test_bytes_of_uneven_parts_are_counted(parts: int, source: str, target: str) -> None:
    shape, sizes = (42, 11), (parts,)
    way = found(on(parts), shape, source, target)
    before, after = (
        [part(shape, read_layout(layout), sizes, (rank,)) for rank in range(parts)]
        for layout in (source, target)
    )

    def both(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> int:
        rows, columns = (
            max(0, min(b, d) - max(a, c)) for (a, b), (c, d) in zip(one, other, strict=True)
        )
        return rows * columns

    sent = [
        sum(both(before[rank], after[peer]) for peer in range(parts) if peer != rank)
        for rank in range(parts)
    ]
    assert way.sent_bytes == 4 * max(sent) > 0


def test_sums_over_both_axes_go_between_hosts_in_parts() -> None:
    """A hierarchical all-reduce comes out: only a part of a sum crosses the slow links."""
    shape, sizes = (1 << 20,), (4, 8)
    way = found(on(*sizes), shape, "P, P", "B, B")
    assert [(hop.axis, hop.kind) for hop in way.hops] == [
        (1, "reduce_scatter"), (0, "all_reduce"), (1, "all_gather"),
    ]  # fmt: skip
    n = 4 << 20
    assert way.sent_bytes == 2 * 7 * n // 8 + 2 * 3 * (n // 8) // 4
    small = found(on(*sizes), (2,), "P, P", "B, B")  # fewer elements than devices
    assert [hop.kind for hop in small.hops] == ["all_reduce", "all_reduce"]


def test_lines_between_hosts_share_the_hosts_links() -> None:
    one = found(Routes(cluster(4, 1), (4,)), (1 << 24,), "P", "B").cost_s
    eight = Routes(cluster(4, 8), (4, 8))
    assert eight.way((1 << 24,), 4, (P, B), (B, B)) is not None
    slow = Routes(Cluster(4, 1, DEVICE, NEAR, replace(FAR, bytes_per_s=FAR.bytes_per_s / 8)), (4,))
    shared = eight.lines[0].price("all_reduce", 1 << 26)
    assert shared == pytest.approx(slow.lines[0].price("all_reduce", 1 << 26))
    assert shared > 3 * one
    # On one axis over all, each host has two ranks of the same line.
    flat = Routes(cluster(2, 2), (4,))
    links = Links(((0, 1), (2, 3)), NEAR, FAR, ADDING)
    assert flat.lines[0].price("all_gather", 1 << 20) == pytest.approx(
        cheapest(links, "all_gather", 1 << 20), rel=1e-9
    )


@pytest.mark.parametrize("parts", [2, 7, 8, 12, 128])
@pytest.mark.parametrize("ranks_per_host", [1, 2, 128])
def test_prices_between_the_sizes_are_those_of_the_step_lists(
    parts: int, ranks_per_host: int
) -> None:
    ranks = range(parts)
    hosts = tuple(tuple(ranks[i : i + ranks_per_host]) for i in range(0, parts, ranks_per_host))
    links = Links(hosts, NEAR, FAR, ADDING)
    line = Line([links])
    alike = len(hosts) in (1, parts)
    for kind in ("all_reduce", "reduce_scatter", "all_gather"):
        for num_bytes in (0, 1, 4, 100, 5_000, 77_777, 10**6, 10**8, 3 * 10**12):
            for itemsize, sums in ((4, "exact"), (2, "once")):
                sums = "any" if kind == "all_gather" else sums
                want = cheapest(links, kind, num_bytes, sums)
                got = line.price(kind, num_bytes, itemsize)
                # Where ranks differ, who is the slowest of a step depends on the size.
                assert got == pytest.approx(want, rel=1e-9 if alike and parts != 7 else 0.03)


def test_a_ring_is_not_missed_where_links_are_alike() -> None:
    """Which is why lines leave it out there."""
    for hosts in (((0, 1, 2, 3, 4),), tuple((rank,) for rank in range(5))):
        links = Links(hosts, NEAR, FAR, ADDING)
        for collective in ("all_reduce", "reduce_scatter", "all_gather"):
            sizes = [0, 1000, 10**6, 10**9]
            ring, direct = (costs(links, collective, name, sizes) for name in ("ring", "direct"))
            assert (direct <= ring * (1 + 1e-12)).all()


def test_lines_that_are_not_alike_cost_as_the_slowest() -> None:
    # Ranks 0 to 5 on hosts of three: of the lines of two, the middle one alone crosses.
    ways = Routes(Cluster(2, 3, DEVICE, NEAR, FAR), (3, 2))
    crossing = Line([Links(((0,), (1,)), NEAR, FAR, ADDING)])
    assert ways.lines[1].price("all_gather", 10**6) == pytest.approx(
        crossing.price("all_gather", 10**6)
    )


def test_units_are_as_the_layout_has_them() -> None:
    ways = on(3)
    assert plain((48,), (S(0, 8),), (3,)) == (S(0),)
    assert plain((40,), (S(0, 8),), (3,)) == (S(0, 8),)
    assert plain((48, 4), (S(0, 8), S(0, 4)), (3, 2)) == (S(0), S(0))
    assert found(ways, (48,), "S0/8", "S0") == Way(0.0, (), 0)
    assert found(ways, (48,), "S0/8", "B").hops == (Hop(0, S(0), B),)
    uneven = found(ways, (40,), "S0/8", "S0")
    assert uneven.hops == (Hop(0, S(0, 8), S(0)),)
    assert 0 < uneven.sent_bytes < 4 * 14


def test_what_was_looked_for_before_changes_nothing() -> None:
    shape, sizes = (40, 30), (2, 3)
    asked = list(itertools.product(["S0, S0/4", "S1, S0", "P, B", "B, S0"], repeat=2))
    forward, backward = on(*sizes), on(*sizes)
    one = {pair: found(forward, shape, *pair) for pair in asked}
    other = {pair: found(backward, shape, *pair) for pair in reversed(asked)}
    assert one == other


def test_tensors_that_cannot_lie_so_have_no_way() -> None:
    ways = on(4)
    assert ways.way((3,), 4, (B,), (S(0),)) is None
    assert ways.way((), 4, (S(0),), (B,)) is None
    assert ways.way((10,), 4, (S(0, 4),), (B,)) is None
    assert found(ways, (), "P", "B").sent_bytes == 4 * 2  # to the element


def test_an_axis_of_one_rank_costs_nothing() -> None:
    ways = Routes(cluster(1, 4), (1, 4))
    way = found(ways, (16, 16), "P, S0", "S1, S0")
    assert (way.cost_s, way.sent_bytes, len(way.hops)) == (0.0, 0, 1)


def test_4096_ranks() -> None:
    ways = Routes(cluster(512, 8), (512, 8))
    way = found(ways, (8192, 8192), "P, P", "S0, S1")
    assert way.hops
    assert way.sent_bytes < 2 * 4 * 8192 * 8192
    for source, target in itertools.product(all_layouts((8192, 8192), (512, 8)), repeat=2):
        assert ways.way((8192, 8192), 2, source, target) is not None, in_words(source)


def test_a_mesh_must_fit() -> None:
    with pytest.raises(UserError, match="2 x 9 ranks on 2 hosts of 8 devices"):
        Routes(cluster(2, 8), (2, 9))
    assert Routes(cluster(2, 8), (4,)).way((8,), 4, (P,), (B,)) is not None


def test_ties_go_to_fewer_hops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes._Map, "_price", lambda *_: (0.0, 0))
    ways = on(2, 2)
    for source, target in itertools.product(all_layouts((8, 8), (2, 2)), repeat=2):
        way = ways.way((8, 8), 4, source, target)
        assert way is not None
        changed = sum(a != b for a, b in zip(source, target, strict=True))
        assert changed <= len(way.hops) <= (changed if S(0) not in (*source, *target)
                                            and S(1) not in (*source, *target) else 4)  # fmt: skip
