"""Which cells are alike, so that one decision is made for all of them.

After Weisfeiler and Lehman (1968): each cell begins with the hash of what it is (operators, shapes,
constants), and in each round takes in the hashes of its neighbours,

    h_0(u) = hash(key(u))        h_{r+1}(u) = hash(h_r(u), h_r of givers by port, h_r of readers)

so that cells with the same h_r are alike as far as r steps around them. Layers that repeat are then
tied, apart from those within r steps of either end of the network. The fewer rounds, the more is
tied, and the smaller the search: `tied` takes as many as keep it below a number of choices.

Of layers that are one product each, the best is often to split every other one by columns and the
one behind it by rows, which layers that are all tied cannot be. So every other cell of those alike
is tied at first, and all of them only where that is not small enough. Hashes are hashlib's, and so
the same in every process.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from penstock.plan.rules.joins import Cell

MAX_CHOICES = 3000
"""Of all classes together, which is the number of the integer program's binary variables."""

ROUNDS = (24, 16, 12, 9, 7, 5, 4, 3, 2, 1)
WAYS = (*((rounds, 2) for rounds in ROUNDS if rounds >= 4), *((rounds, 1) for rounds in ROUNDS))
"""Rounds, and every how manieth cell is tied; the first that is small enough is taken. Of fewer
rounds, too little is left free at the ends for what is in turn between them to begin and end well.
"""


def tied(cells: Sequence[Cell], max_choices: int = MAX_CHOICES) -> tuple[int, ...]:
    """By cell, the number of the first cell of its class.

    No cells are tied if they have no more choices than this all together.
    """
    found = tuple(range(len(cells)))
    if _choices(cells, found) <= max_choices:
        return found
    hashes = _hashes(cells, max(ROUNDS))
    for rounds, period in WAYS:
        found = _every(hashes[rounds], period)
        if _choices(cells, found) <= max_choices:
            break
    return found


def alike(cells: Sequence[Cell], rounds: int, period: int = 1) -> tuple[int, ...]:
    """By cell, the number of the first one that is like it as far as so many steps around.

    Arguments:
        period: only every so manieth of those is taken as like it.
    """
    return _every(_hashes(cells, rounds)[rounds], period)


def _choices(cells: Sequence[Cell], classes: Sequence[int]) -> int:
    return sum(len(cells[k].choices) for k in set(classes))


def _every(hashes: Sequence[str], period: int) -> tuple[int, ...]:
    first: dict[tuple[str, int], int] = {}
    seen: Counter[str] = Counter()
    found = []
    for k, what in enumerate(hashes):
        found.append(first.setdefault((what, seen[what] % period), k))
        seen[what] += 1
    return tuple(found)


def _hashes(cells: Sequence[Cell], rounds: int) -> list[list[str]]:
    """Of every cell, after each number of rounds."""
    giver = {name: (k, at) for k, cell in enumerate(cells) for at, name in enumerate(cell.gives)}
    around: list[list[tuple[str, int]]] = [[] for _ in cells]
    for k, cell in enumerate(cells):
        for port, name in enumerate(cell.reads):
            source, place = giver[name]
            around[k].append((f"reads {port} {place}", source))
            around[source].append((f"gives {place} {port}", k))
    found = [[_hash(cell.key) for cell in cells]]
    for _ in range(rounds):
        before = found[-1]
        found.append(
            [
                _hash(before[k], *sorted(f"{how} {before[other]}" for how, other in near))
                for k, near in enumerate(around)
            ]
        )
    return found


def _hash(*words: str) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=16).hexdigest()
