"""The fixed binary tree along which sums over shards are taken.

The tree over shards [low, high) splits at low + the largest power of two below high - low:

    sum(low, high) = sum(low, middle) + sum(middle, high)

It depends on the number of shards alone, so a sum has the same bits whoever computes its parts.
A worker holds contiguous shards; `cover` gives the subtrees it can sum by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import torch

Node = tuple[int, int]
"""A subtree: the shards [low, high)."""

Order: TypeAlias = "int | tuple[Order, Order]"
"""How parts are combined: a part by its index, or two orders to be combined first."""


def middle(low: int, high: int) -> int:
    """Where the node [low, high) with at least two shards is split."""
    return low + (1 << (high - low - 1).bit_length() - 1)


@lru_cache(maxsize=64)
def nodes(shards: int) -> frozenset[Node]:
    """All 2 * shards - 1 nodes of the tree."""
    found = set()
    waiting = [(0, shards)]
    while waiting:
        low, high = waiting.pop()
        found.add((low, high))
        if high - low > 1:
            split = middle(low, high)
            waiting += [(low, split), (split, high)]
    return frozenset(found)


def assign(shards: int, workers: int) -> tuple[range, ...]:
    """The contiguous shards of each worker; sizes differ by at most one."""
    return tuple(range(shards * w // workers, shards * (w + 1) // workers) for w in range(workers))


def merges(own: range, shards: int) -> tuple[tuple[Node, ...], tuple[int, ...]]:
    """How a worker adds its own shards with a stack of rows, one row per subtree held.

    Each shard is pushed on the stack; while the two topmost subtrees are siblings, the upper is
    added to the lower and popped.

    Returns:
        The subtrees held at the end, in order (row i holds subtree i), and for each own shard the
        number of additions that follow its push.
    """
    tree = nodes(shards)
    stack: list[Node] = []
    additions = []
    for shard in own:
        stack.append((shard, shard + 1))
        count = 0
        while len(stack) > 1 and (stack[-2][0], stack[-1][1]) in tree:
            high = stack.pop()[1]
            stack[-1] = (stack[-1][0], high)
            count += 1
        additions.append(count)
    return tuple(stack), tuple(additions)


def cover(own: range, shards: int) -> tuple[Node, ...]:
    """The largest subtrees that lie within a worker's own shards, in order."""
    return merges(own, shards)[0]


@lru_cache(maxsize=64)
def order(parts: int) -> Order:
    """The order in which so many parts are combined."""
    return order_of([(part, part + 1) for part in range(parts)], parts)


def order_of(subtrees: Sequence[Node], shards: int) -> Order:
    """The order in which subtrees, which together cover all shards, are combined to the whole."""
    index = {node: number for number, node in enumerate(subtrees)}

    def below(node: Node) -> Order:
        if node in index:
            return index[node]
        split = middle(*node)
        return below((node[0], split)), below((split, node[1]))

    return below((0, shards))


def grouped(order: Order, groups: Sequence[Sequence[int]]) -> tuple[list[Order], Order] | None:
    """Takes an order apart into what groups of parts can do by themselves, and what is left.

    Arguments:
        groups: of parts; each part is in one of them.

    Returns:
        The order within each group, of its parts by their places in it, and that of the groups'
        results; None where some group's parts are not combined with each other alone.
    """
    numbers = {frozenset(group): number for number, group in enumerate(groups)}
    places = {part: place for group in groups for place, part in enumerate(group)}
    within: list[Order] = [-1] * len(groups)

    def placed(below: Order) -> Order:
        if isinstance(below, int):
            return places[below]
        return placed(below[0]), placed(below[1])

    def outside(below: Order) -> Order | None:
        number = numbers.get(frozenset(_parts(below)))
        if number is not None:
            within[number] = placed(below)
            return number
        if isinstance(below, int):
            return None
        left, right = outside(below[0]), outside(below[1])
        return None if left is None or right is None else (left, right)

    between = outside(order)
    return None if between is None else (within, between)


def _parts(order: Order) -> list[int]:
    """All parts of an order."""
    return [order] if isinstance(order, int) else _parts(order[0]) + _parts(order[1])


def tree_sum(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of one tensor per shard along the tree; a reference for tests and small things."""

    def total(below: Order) -> torch.Tensor:
        if isinstance(below, int):
            return values[below].clone()
        return total(below[0]).add_(total(below[1]))

    return total(order(len(values)))
