"""Which rank sends what to whom: the topologies of collectives, as pure lists of messages.

A topology is written once, as the messages of all ranks (`Pattern`); a rank's `Schedule`
(penstock.exchange.topology) is its own ends of them. For p ranks and a buffer of n bytes, the
steps, and what the busiest rank sends:

    all_reduce      star               2                    n (p - 1)
                    tree               2 ceil(log2 p)       n ceil(log2 p)
                    ring               2 (p - 1)            2 n (p - 1) / p
                    halving_doubling   2 log2 p             2 n (p - 1) / p
                                       2 floor(log2 p) + 2  at most 3 n, where p is no power of two
                    direct             2                    2 n (p - 1) / p
                    gather             1                    n (p - 1)
                    hierarchical_X     X among the hosts' first ranks, and a star in each host
    reduce          star, tree         as the first half of all_reduce
    broadcast       star, tree         as the second half of all_reduce
                    ring, direct       a scatter by the root, then all_gather
    reduce_scatter  ring, direct       as the first half of all_reduce; rank r gets chunk r
    all_gather      ring, direct       as the second half of all_reduce; rank r has chunk r
    barrier         dissemination      ceil(log2 p)         nothing

`star`, `direct` and `gather` add all ranks' values in one place. `tree` and `halving_doubling` add
step by step, and in the same order: the nodes of the fixed tree (`penstock.exchange.tree`) are what
they add. So all five give the same bits, for any number of ranks; `ring` gives others.

Sources: Thakur, Rabenseifner and Gropp 2005 (Int. J. High Perform. Comput. Appl. 19, 49), for
halving-doubling, which here begins with the nearest rank, and where ranks beyond a power of two
fold in after the halving instead of before it; Patarasuk and Yuan 2009 (J. Parallel Distrib.
Comput. 69, 117) for the ring; Hensgen, Finkel and Manber 1988 (Int. J. Parallel Program. 17, 1) for
the barrier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from penstock.exchange import tree

Hosts = tuple[tuple[int, ...], ...]
"""The ranks of each host; every rank is there once."""

TOPOLOGIES = {
    "all_reduce": ("gather", "direct", "star", "tree", "halving_doubling", "ring"),
    "reduce": ("star", "tree"),
    "broadcast": ("star", "direct", "tree", "ring"),
    "reduce_scatter": ("direct", "ring"),
    "all_gather": ("direct", "ring"),
    "barrier": ("dissemination",),
}
"""What `schedule` takes, by collective; of two that cost the same the first is chosen."""

HIERARCHICAL = "hierarchical_"
"""Before the name of an all-reduce topology: that one among the hosts."""


Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Messages:
    """Some messages of one step: chunks [first, last) from source to target; int64 (messages,)."""

    source: Indices
    target: Indices
    first: Indices
    last: Indices
    reduce: bool


Steps = Iterator[Iterable[Messages]]


@dataclass(frozen=True)
class Pattern:
    """A collective as all ranks' messages, step by step. `steps` is made while it is read, once."""

    chunks: int
    steps: Steps


def pattern(
    collective: str, topology: str, world_size: int, *, root: int = 0, hosts: Hosts = ()
) -> Pattern:
    """All ranks' messages; see `schedule` for the arguments."""
    if hosts:
        check_hosts(hosts, world_size)
    across = topology.removeprefix(HIERARCHICAL)
    known = TOPOLOGIES.get(collective, ())
    if across not in known or (across != topology and (collective != "all_reduce" or not hosts)):
        raise ValueError(f"no {topology!r} for {collective!r}; there are {', '.join(known)}")
    if not 0 <= root < world_size:
        raise ValueError(f"root {root} is not a rank below {world_size}")
    if world_size == 1:
        return Pattern(1, iter(()))
    if across != topology:
        return _hierarchical(across, hosts)
    p = world_size
    match collective, topology:
        case "all_reduce", "gather":
            return Pattern(1, iter([_everyone(p, lambda source, _: 0 * source, reduce=True)]))
        case "all_reduce", "direct":
            return Pattern(p, chain(_direct_reduce_scatter(p), _direct_all_gather(p)))
        case "all_reduce", "star":
            return Pattern(1, chain(_star_reduce(p, 0), _star_broadcast(p, 0)))
        case "all_reduce", "tree":
            return Pattern(1, chain(_tree_reduce(p, 0), _tree_broadcast(p, 0)))
        case "all_reduce", "halving_doubling":
            return Pattern(1 << _log2(p), chain(_halving(p), _doubling(p)))
        case "all_reduce", "ring":
            return Pattern(p, chain(_ring_reduce_scatter(p), _ring_all_gather(p)))
        case "reduce", "star":
            return Pattern(1, _star_reduce(p, root))
        case "reduce", "tree":
            return Pattern(1, _tree_reduce(p, root))
        case "broadcast", "star":
            return Pattern(1, _star_broadcast(p, root))
        case "broadcast", "direct":
            return Pattern(p, chain(_scatter(p, root), _direct_all_gather(p)))
        case "broadcast", "tree":
            return Pattern(1, _tree_broadcast(p, root))
        case "broadcast", "ring":
            return Pattern(p, chain(_scatter(p, root), _ring_all_gather(p)))
        case "reduce_scatter", "direct":
            return Pattern(p, _direct_reduce_scatter(p))
        case "reduce_scatter", "ring":
            return Pattern(p, _ring_reduce_scatter(p))
        case "all_gather", "direct":
            return Pattern(p, _direct_all_gather(p))
        case "all_gather", "ring":
            return Pattern(p, _ring_all_gather(p))
    return Pattern(1, _dissemination(p))


def check_hosts(hosts: Hosts, world_size: int) -> None:
    """ValueError unless each rank below `world_size` is on one host, and no host is empty."""
    if sorted(chain(*hosts)) != list(range(world_size)) or not all(hosts):
        raise ValueError(f"hosts must hold each rank below {world_size} once; got {hosts}")


def _log2(number: int) -> int:
    return number.bit_length() - 1


def _messages(
    source: npt.ArrayLike,
    target: npt.ArrayLike,
    first: npt.ArrayLike = 0,
    last: npt.ArrayLike = 1,
    *,
    reduce: bool,
) -> Messages:
    ends = np.broadcast_arrays(source, target, first, last)
    source, target, first, last = (np.asarray(end, np.int64) for end in ends)
    return Messages(source, target, first, last, reduce)


def _everyone(
    p: int, chunk: Callable[[Indices, Indices], Indices], *, reduce: bool
) -> Iterator[Messages]:
    """Each rank sends a chunk to each other, the next one first, so that none is beset by all."""
    source = np.arange(p)
    for distance in range(1, p):
        target = (source + distance) % p
        first = chunk(source, target)
        yield Messages(source, target, first, first + 1, reduce)


def _direct_reduce_scatter(p: int) -> Steps:
    yield _everyone(p, lambda _, target: target, reduce=True)


def _direct_all_gather(p: int) -> Steps:
    yield _everyone(p, lambda source, _: source, reduce=False)


def _ring_reduce_scatter(p: int) -> Steps:
    """The sum of chunk c starts at rank c + 1 and goes round to rank c."""
    ranks = np.arange(p)
    for step in range(p - 1):
        chunk = (ranks - step - 1) % p
        yield [Messages(ranks, (ranks + 1) % p, chunk, chunk + 1, reduce=True)]


def _ring_all_gather(p: int) -> Steps:
    ranks = np.arange(p)
    for step in range(p - 1):
        chunk = (ranks - step) % p
        yield [Messages(ranks, (ranks + 1) % p, chunk, chunk + 1, reduce=False)]


def _others(p: int, root: int) -> Indices:
    return np.delete(np.arange(p), root)


def _star_reduce(p: int, root: int) -> Steps:
    yield [_messages(_others(p, root), root, reduce=True)]


def _star_broadcast(p: int, root: int) -> Steps:
    yield [_messages(root, _others(p, root), reduce=False)]


def _scatter(p: int, root: int) -> Steps:
    others = _others(p, root)
    yield [_messages(root, others, others, others + 1, reduce=False)]


def _merges(p: int, root: int) -> list[Indices]:
    """By level of the fixed tree, the lowest first: who gives a subtree's sum to whom, (2, merges).

    The sum of a subtree is held by the root, where the root is in it, or else by its first rank.
    """

    def holder(low: int, high: int) -> int:
        return root if low <= root < high else low

    levels: list[list[tuple[int, int]]] = [[] for _ in range((p - 1).bit_length())]
    for low, high in sorted(tree.nodes(p)):
        if high - low > 1:
            split = tree.middle(low, high)
            left, right, target = holder(low, split), holder(split, high), holder(low, high)
            levels[_log2(high - low - 1)].append((left if target == right else right, target))
    return [np.array(level, np.int64).T for level in levels]


def _tree_reduce(p: int, root: int) -> Steps:
    for source, target in _merges(p, root):
        yield [_messages(source, target, reduce=True)]


def _tree_broadcast(p: int, root: int) -> Steps:
    for source, target in reversed(_merges(p, root)):
        yield [_messages(target, source, reduce=False)]


def _halves(i: Indices, count: int, chunks: int) -> tuple[Indices, int]:
    """First chunk, and number of chunks, of what rank i holds after `count` halvings."""
    first = np.zeros_like(i)
    for bit in range(count):
        first += (i >> bit & 1) * (chunks >> bit + 1)
    return first, chunks >> count


def _halving(p: int) -> Steps:
    """Reduce-scatter within [0, 2^k), the largest power of two in p, joined by the ranks beyond it.

    p is a sum of powers of two, and so are the ranks: [0, 2^k), and the next groups, ever smaller.
    Each group halves by itself, pairs at distance 1 first, which gives the fixed tree over its
    ranks; when it is done, the next group's sums, ready by then, are added to its own. So the last
    addition is of [0, 2^k) and the rest: the root of the fixed tree.
    """
    chunks = 1 << _log2(p)
    sizes = [1 << bit for bit in reversed(range(p.bit_length())) if p >> bit & 1]
    bases = [sum(sizes[:number]) for number in range(len(sizes))]
    for bit in range(_log2(p) + (len(sizes) > 1)):
        step = []
        for number, (base, size) in enumerate(zip(bases, sizes, strict=True)):
            i = np.arange(size)
            if 1 << bit < size:
                partner = i ^ 1 << bit
                first, count = _halves(partner, bit + 1, chunks)
                step.append(_messages(base + i, base + partner, first, first + count, reduce=True))
            elif 1 << bit == size and number + 1 < len(sizes):
                # The low bits of i have chosen the larger range in which its own one lies.
                source = bases[number + 1] + i % sizes[number + 1]
                first, count = _halves(i, bit, chunks)
                step.append(_messages(source, base + i, first, first + count, reduce=True))
        yield step


def _doubling(p: int) -> Steps:
    chunks = 1 << _log2(p)
    i = np.arange(chunks)
    for bit in reversed(range(_log2(p))):
        first, count = _halves(i, bit + 1, chunks)
        yield [_messages(i, i ^ 1 << bit, first, first + count, reduce=False)]
    if beyond := p - chunks:
        yield [_messages(i[:beyond], chunks + i[:beyond], 0, chunks, reduce=False)]


def _dissemination(p: int) -> Steps:
    """After step s a rank has heard, by way of others, from the 2^(s+1) - 1 ranks before it."""
    ranks = np.arange(p)
    for bit in range((p - 1).bit_length()):
        yield [_messages(ranks, (ranks + (1 << bit)) % p, 0, 0, reduce=False)]


def by_first_rank(hosts: Hosts) -> list[list[int]]:
    """The hosts in the order in which sums over them are taken; the first of each leads it."""
    return sorted(sorted(ranks) for ranks in hosts)


def _hierarchical(across: str, hosts: Hosts) -> Pattern:
    order = by_first_rank(hosts)
    leaders = np.array([ranks[0] for ranks in order])
    followers = np.array([rank for ranks in order for rank in ranks[1:]], np.int64)
    followed = np.repeat(leaders, [len(ranks) - 1 for ranks in order])
    inner = pattern("all_reduce", across, len(hosts))

    def steps() -> Steps:
        if len(followers):
            yield [_messages(followers, followed, 0, inner.chunks, reduce=True)]
        for step in inner.steps:
            yield (
                Messages(leaders[m.source], leaders[m.target], m.first, m.last, m.reduce)
                for m in step
            )
        if len(followers):
            yield [_messages(followed, followers, 0, inner.chunks, reduce=False)]

    return Pattern(inner.chunks, steps())
