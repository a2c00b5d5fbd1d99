"""Every topology gives what its collective means, and the exact ones the bits of the fixed tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.exchange import tree
from penstock.exchange.pattern import HIERARCHICAL, TOPOLOGIES, Hosts
from penstock.exchange.topology import (
    Receive,
    Schedule,
    Send,
    Step,
    at_once,
    exact,
    follow,
    schedule,
    validate,
)

WORLD_SIZES = [*range(1, 10), 16, 17]
ALL = [(collective, t) for collective, names in TOPOLOGIES.items() for t in names]
ADDING = [(c, t) for c, t in ALL if c in ("all_reduce", "reduce", "reduce_scatter")]
LENGTHS = [0, 1, 3, 131]

HOSTS: list[Hosts] = [
    ((0, 1, 2),),
    ((0,), (1,), (2,)),
    ((0, 1), (2, 3)),
    ((0, 1), (2, 3), (4,)),
    ((0, 1), (2, 3), (4, 5, 6, 7)),
    ((0, 1, 2, 3), (4, 5, 6)),
    ((0, 1, 2), (3, 4, 5)),
    ((0, 2), (1, 3)),
    ((2, 3), (0, 1)),
    ((5, 1), (3,), (0, 2, 4)),
    tuple(tuple(range(i, i + 2)) for i in range(0, 16, 2)),
]


def all_ranks(
    collective: str, topology: str, world_size: int, root: int = 0, hosts: Hosts = ()
) -> list[Schedule]:
    return [
        schedule(collective, topology, world_size, rank, root=root, hosts=hosts)
        for rank in range(world_size)
    ]


def integers(world_size: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(world_size)
    shape = (world_size, length)
    return list(torch.randint(-1000, 1000, shape, generator=generator))


def reals(world_size: int, length: int) -> list[torch.Tensor]:
    return list(torch.randn((world_size, length), generator=torch.Generator().manual_seed(7)))


def own_chunk(world_size: int, rank: int, length: int) -> slice:
    return slice(length * rank // world_size, length * (rank + 1) // world_size)


def roots(collective: str, world_size: int) -> list[int]:
    if collective in ("broadcast", "reduce"):
        return sorted({0, world_size // 2, world_size - 1})
    return [0]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("collective", "topology"), ALL)
def test_result_is_what_the_collective_means(
    collective: str, topology: str, world_size: int
) -> None:
    for root in roots(collective, world_size):
        schedules = all_ranks(collective, topology, world_size, root)
        validate(schedules, may_overlap=topology == "gather")
        for length in LENGTHS:
            values = integers(world_size, length)
            buffers = [one.clone() for one in values]
            follow(schedules, buffers)
            total = torch.stack(values).sum(0)
            gathered = torch.cat(
                [g[own_chunk(world_size, r, length)] for r, g in enumerate(values)]
            )
            for rank, buffer in enumerate(buffers):
                if collective == "all_reduce":
                    assert buffer.equal(total)
                elif collective == "broadcast":
                    assert buffer.equal(values[root])
                elif collective == "all_gather":
                    assert buffer.equal(gathered)
                elif collective == "reduce_scatter":
                    own = own_chunk(world_size, rank, length)
                    assert buffer[own].equal(total[own])
                elif collective == "reduce":
                    assert rank != root or buffer.equal(total)
                else:
                    assert buffer.equal(values[rank])


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("across", TOPOLOGIES["all_reduce"])
def test_hierarchical_result(hosts: Hosts, across: str) -> None:
    world_size = sum(map(len, hosts))
    schedules = all_ranks("all_reduce", HIERARCHICAL + across, world_size, hosts=hosts)
    validate(schedules, may_overlap=across == "gather")
    values = integers(world_size, 131)
    buffers = [one.clone() for one in values]
    follow(schedules, buffers)
    assert all(buffer.equal(torch.stack(values).sum(0)) for buffer in buffers)
    # Between hosts only the first of each speaks.
    host_of = {rank: ranks for ranks in hosts for rank in ranks}
    for rank, own in enumerate(schedules):
        for step in own.steps:
            far = [s.peer for s in step.sends if s.peer not in host_of[rank]]
            assert not far or rank == min(host_of[rank])
            assert all(peer == min(host_of[peer]) for peer in far)


def bits_are_the_trees(
    collective: str, schedules: Sequence[Schedule], values: Sequence[torch.Tensor], root: int
) -> bool:
    expected = tree.tree_sum(values)
    buffers = [one.clone() for one in values]
    follow(schedules, buffers)
    if collective == "reduce":
        return buffers[root].equal(expected)
    if collective == "reduce_scatter":
        parts = [own_chunk(len(values), rank, len(expected)) for rank in range(len(values))]
        return all(b[own].equal(expected[own]) for b, own in zip(buffers, parts, strict=True))
    return all(buffer.equal(expected) for buffer in buffers)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("collective", "topology"), ADDING)
def test_sums_have_the_trees_bits_where_exact_says_so_and_nowhere_else(
    collective: str, topology: str, world_size: int
) -> None:
    for root in roots(collective, world_size):
        schedules = all_ranks(collective, topology, world_size, root)
        same = bits_are_the_trees(collective, schedules, reals(world_size, 2003), root)
        assert same == exact(collective, topology, world_size)


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("across", TOPOLOGIES["all_reduce"])
def test_hierarchical_sums_have_the_trees_bits_where_exact_says_so(
    hosts: Hosts, across: str
) -> None:
    world_size = sum(map(len, hosts))
    schedules = all_ranks("all_reduce", HIERARCHICAL + across, world_size, hosts=hosts)
    same = bits_are_the_trees("all_reduce", schedules, reals(world_size, 2003), 0)
    assert same == exact("all_reduce", HIERARCHICAL + across, world_size, hosts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.booleans())
def test_any_hosts(host_of: list[int], contiguous: bool) -> None:
    if contiguous:
        host_of = sorted(host_of)
    ranks = range(len(host_of))
    hosts = tuple(tuple(r for r in ranks if host_of[r] == host) for host in sorted({*host_of}))
    schedules = all_ranks("all_reduce", "hierarchical_halving_doubling", len(ranks), hosts=hosts)
    validate(schedules)
    same = bits_are_the_trees("all_reduce", schedules, reals(len(ranks), 2003), 0)
    assert same == exact("all_reduce", "hierarchical_halving_doubling", len(ranks), hosts)


@pytest.mark.parametrize("topology", TOPOLOGIES["all_reduce"])
def test_all_ranks_have_the_same_bits(topology: str) -> None:
    buffers = reals(7, 2003)
    follow(all_ranks("all_reduce", topology, 7), buffers)
    assert all(buffer.equal(buffers[0]) for buffer in buffers)


def test_what_is_exact() -> None:
    """Said outright, since the tests above would hold for an `exact` that fits wrong schedules."""
    for topology in ("gather", "direct", "star", "tree", "halving_doubling"):
        assert all(exact("all_reduce", topology, p) for p in range(1, 18))
    assert not exact("all_reduce", "ring", 5)
    assert not exact("reduce_scatter", "ring", 5)
    said = [exact("all_reduce", "hierarchical_tree", sum(map(len, h)), h) for h in HOSTS]
    assert said == [True] * 6 + [False, False, True, False, True]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("collective", "topology"), ADDING)
def test_at_once_means_that_no_partial_sum_travels(
    collective: str, topology: str, world_size: int
) -> None:
    summands = []

    def count(values: Sequence[torch.Tensor]) -> torch.Tensor:
        summands.append(len(values))
        return tree.tree_sum(values)

    follow(all_ranks(collective, topology, world_size), integers(world_size, 131), count)
    assert at_once(topology, world_size) == all(n == world_size for n in summands)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_nobody_leaves_a_barrier_before_all_have_come(world_size: int) -> None:
    schedules = all_ranks("barrier", "dissemination", world_size)
    heard = [{rank} for rank in range(world_size)]
    for number in range(len(schedules[0].steps)):
        before = [set(known) for known in heard]
        assert any(known != set(range(world_size)) for known in before)  # no step too many
        for rank, own in enumerate(schedules):
            for receive in own.steps[number].receives:
                heard[rank] |= before[receive.peer]
    assert all(known == set(range(world_size)) for known in heard)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_numbers_of_steps(world_size: int) -> None:
    def steps(collective: str, topology: str) -> int:
        return len(schedule(collective, topology, world_size, 0).steps)

    depth, height = (world_size - 1).bit_length(), world_size.bit_length() - 1
    folds = 0 if world_size == 1 << height else 2
    some = int(world_size > 1)
    assert steps("all_reduce", "gather") == some
    assert steps("all_reduce", "direct") == steps("all_reduce", "star") == 2 * some
    assert steps("all_reduce", "tree") == 2 * depth
    assert steps("all_reduce", "ring") == 2 * (world_size - 1)
    assert steps("all_reduce", "halving_doubling") == 2 * height + folds
    assert steps("barrier", "dissemination") == steps("broadcast", "tree") == depth


def test_only_gather_overwrites_what_it_sends() -> None:
    for collective, topology in ALL:
        overlaps = [step.overlaps for s in all_ranks(collective, topology, 5) for step in s.steps]
        assert any(overlaps) == (topology == "gather")
    with pytest.raises(ValueError, match="what comes overlaps what is sent"):
        validate(all_ranks("all_reduce", "gather", 3))


def with_step(step: Step, rank: int = 1, number: int = 1) -> list[Schedule]:
    schedules = all_ranks("all_reduce", "ring", 4)
    steps = list(schedules[rank].steps)
    steps[number] = step
    schedules[rank] = replace(schedules[rank], steps=tuple(steps))
    return schedules


def mutants() -> Iterator[tuple[str, Callable[[Step], Step]]]:
    """What is done to the step `sends 3 to rank 2, receives and adds 2 from rank 0`."""
    yield "sends and receives differ", lambda step: replace(step, sends=())
    yield "sends and receives differ", lambda step: replace(step, receives=())
    yield "sends and receives differ", lambda step: replace(step, sends=(Send(2, 0, 1),))
    yield "sends and receives differ", lambda step: replace(step, sends=(Send(3, 3, 4),))
    yield "sends and receives differ", lambda s: replace(s, receives=(Receive(0, 1, 2, True),))
    yield "a second Send", lambda step: replace(step, sends=step.sends * 2)
    yield "a second Receive", lambda step: replace(step, receives=step.receives * 2)
    yield "among 4 chunks", lambda step: replace(step, sends=(Send(2, 3, 5),))
    yield "among 4 chunks", lambda step: replace(step, sends=(Send(2, -1, 0),))
    yield "among 4 chunks", lambda step: replace(step, sends=(Send(2, 3, 2),))
    yield "among 4 chunks", lambda step: replace(step, sends=(Send(1, 3, 4),))
    yield "among 4 chunks", lambda step: replace(step, sends=(Send(4, 3, 4),))
    yield "overlaps what is sent", lambda step: replace(step, sends=(Send(2, 2, 4),))
    for other in (Receive(3, 1, 3, True), Receive(3, 2, 3, False)):
        yield (
            r"Receive\(.*\) overlaps",
            lambda step, other=other: replace(step, receives=(*step.receives, other)),
        )


@pytest.mark.parametrize(("says", "mutate"), list(mutants()))
def test_validate_finds(says: str, mutate: Callable[[Step], Step]) -> None:
    step = schedule("all_reduce", "ring", 4, 1).steps[1]
    assert step == Step((Send(2, 3, 4),), (Receive(0, 2, 3, True),))
    validate(with_step(step))
    with pytest.raises(ValueError, match=says):
        validate(with_step(mutate(step)))


def test_validate_finds_ranks_that_differ_in_steps_or_chunks() -> None:
    schedules = all_ranks("all_reduce", "ring", 4)
    shorter = replace(schedules[2], steps=schedules[2].steps[:-1])
    finer = replace(schedules[2], chunks=8)
    for odd in (shorter, finer):
        with pytest.raises(ValueError, match="chunks and steps differ"):
            validate([*schedules[:2], odd, schedules[3]])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("all_reduce", "square", 4, 0), "no 'square' for 'all_reduce'; there are gather, direct"),
        (("all_to_all", "direct", 4, 0), "no 'direct' for 'all_to_all'"),
        (("all_reduce", "hierarchical_ring", 4, 0), "no 'hierarchical_ring'"),
        (("all_reduce", "ring", 4, 4), "rank 4 is not below 4"),
    ],
)
def test_what_there_is_not(arguments: tuple[str, str, int, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        schedule(*arguments)


def test_wrong_roots_and_hosts() -> None:
    with pytest.raises(ValueError, match="root 4 is not a rank below 4"):
        schedule("broadcast", "star", 4, 0, root=4)
    for hosts in (((0, 1), (1, 2, 3)), ((0, 1), (3,)), ((0, 1, 2, 3), ())):
        with pytest.raises(ValueError, match="hosts must hold each rank below 4 once"):
            schedule("all_reduce", "hierarchical_ring", 4, 0, hosts=hosts)
