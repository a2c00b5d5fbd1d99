"""Which cells are alike, so that one decision is made for all of them.

After Weisfeiler and Lehman (1968): each cell begins with the hash of what it is (operators, shapes,
constants), and in each round takes in the hashes of its neighbours,

    h_0(u) = hash(key(u))        h_{r+1}(u) = hash(h_r(u), h_r of givers by port, h_r of readers)

so that cells with the same h_r are alike as far as r steps around them. Layers that repeat are then
tied, apart from those within r steps of either end of the network. The fewer rounds, the more is
tied, and the smaller the search: `tied` takes as many as keep it below a number of choices. Hashes
are hashlib's, and so the same in every process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from penstock.plan.rules.joins import Cell

MAX_CHOICES = 3000
"""Of all classes together, which is the number of the integer program's binary variables."""

ROUNDS = (24, 16, 12, 9, 7, 5, 4, 3, 2, 1)


def tied(cells: Sequence[Cell], max_choices: int = MAX_CHOICES) -> tuple[int, ...]:
    """By cell, the number of the first cell of its class.

    No cells are tied if they have no more choices than this all together.
    """
    found = tuple(range(len(cells)))
    for rounds in ROUNDS:
        if sum(len(cells[k].choices) for k in set(found)) <= max_choices:
            break
        found = alike(cells, rounds)
    return found


def alike(cells: Sequence[Cell], rounds: int) -> tuple[int, ...]:
    """By cell, the number of the first one that is like it as far as so many steps around."""
    giver = {name: (k, at) for k, cell in enumerate(cells) for at, name in enumerate(cell.gives)}
    around: list[list[tuple[str, int]]] = [[] for _ in cells]
    for k, cell in enumerate(cells):
        for port, name in enumerate(cell.reads):
            source, place = giver[name]
            around[k].append((f"reads {port} {place}", source))
            around[source].append((f"gives {place} {port}", k))
    hashes = [_hash(cell.key) for cell in cells]
    for _ in range(rounds):
        hashes = [
            _hash(hashes[k], *sorted(f"{how} {hashes[other]}" for how, other in near))
            for k, near in enumerate(around)
        ]
    first: dict[str, int] = {}
    return tuple(first.setdefault(found, k) for k, found in enumerate(hashes))


def _hash(*words: str) -> str:
    return hashlib.blake2b("\n".join(words).encode(), digest_size=16).hexdigest()
