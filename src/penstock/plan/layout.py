"""How a tensor lies on a mesh of ranks: split, copied or partial along each axis.

On an axis of p ranks a tensor is

    S(dim)   split: rank c has the part [start_c, start_{c+1}) of that dim
    B        copied: every rank has all of it
    P        partial: every rank has a tensor of the whole shape, and their sum is the tensor

as OneFlow has it (Yuan et al. 2021, arXiv:2110.15032, "SBP"). A `Layout` says so for each axis of
the mesh, the outermost first; a dim that is split along several axes is split by the outermost
first, and each part further. Parts may be uneven: n = k unit rows are cut between units,

    start_c = unit floor(k c / p)

so that with unit = 1 they differ by one row at most. A `unit` above 1 is for a dim in which
several are folded: (batch, length) flattened to (batch * length) and split by batch has
unit = length. Where p divides k the unit makes no difference, and S(dim) is written with unit 1.

Ranks are numbered along the mesh row by row: the last axis varies fastest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

Coordinates = tuple[int, ...]
"""Of a rank, along each axis."""


class Placement(NamedTuple):
    """Along one axis: `S(dim, unit)`, `B` or `P`."""

    dim: int
    unit: int = 1

    @property
    def is_split(self) -> bool:
        return self.dim >= 0

    def __repr__(self) -> str:
        if not self.is_split:
            return "B" if self.dim == -1 else "P"
        return f"S{self.dim}" if self.unit == 1 else f"S{self.dim}/{self.unit}"


B = Placement(-1)
P = Placement(-2)
Layout = tuple[Placement, ...]


def S(dim: int, unit: int = 1) -> Placement:
    """Split along a dim."""
    return Placement(dim, unit)


def in_words(layout: Layout) -> str:
    """As `[S0, B]`."""
    return f"[{', '.join(map(repr, layout))}]"


def read_layout(words: str) -> Layout:
    """What `in_words` gave.

    Raises:
        ValueError: it is no layout.
    """
    return tuple(_read(word.strip()) for word in words.strip("[] ").split(",") if word.strip())


def _read(word: str) -> Placement:
    if word in ("B", "P"):
        return B if word == "B" else P
    dim, _, unit = word.removeprefix("S").partition("/")
    if not word.startswith("S") or not dim.isdigit() or not (unit or "1").isdigit():
        raise ValueError(f"{word!r} is no placement: expected S0, S1, ..., S0/8, B or P")
    return S(int(dim), int(unit or 1))


def cut(start: int, stop: int, parts: int, index: int, unit: int = 1) -> tuple[int, int]:
    """The part `index` of [start, stop) cut into `parts`, between units."""
    units = (stop - start) // unit
    return start + unit * (units * index // parts), start + unit * (units * (index + 1) // parts)


def plain_unit(size: int, parts: int, unit: int) -> int:
    """The unit as it is written: 1 where `parts` divides the units of a dim of this size."""
    return 1 if (size // unit) % parts == 0 else unit


def part(
    shape: Sequence[int], layout: Layout, sizes: Sequence[int], coordinates: Coordinates
) -> tuple[tuple[int, int], ...]:
    """The range [start, stop) of each dim that lies at these coordinates.

    Arguments:
        shape: of the whole tensor.
        sizes: of the mesh's axes.
    """
    ranges = [(0, size) for size in shape]
    for placement, parts, index in zip(layout, sizes, coordinates, strict=True):
        if placement.is_split:
            start, stop = ranges[placement.dim]
            ranges[placement.dim] = cut(start, stop, parts, index, placement.unit)
    return tuple(ranges)


def local_shape(
    shape: Sequence[int], layout: Layout, sizes: Sequence[int], coordinates: Coordinates
) -> tuple[int, ...]:
    """Of the part at these coordinates."""
    return tuple(stop - start for start, stop in part(shape, layout, sizes, coordinates))


def largest_shape(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape of the largest part. No rank has more of any dim."""
    largest = list(shape)
    for placement, parts in zip(layout, sizes, strict=True):
        if placement.is_split:
            units = largest[placement.dim] // placement.unit
            largest[placement.dim] = placement.unit * -(-units // parts)
    return tuple(largest)


def share(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> float:
    """How much of the tensor the rank with most of it has; 1 for one that nobody splits."""
    whole = math.prod(shape)
    return math.prod(largest_shape(shape, layout, sizes)) / whole if whole else 1.0


def possible(shape: Sequence[int], layout: Layout, sizes: Sequence[int]) -> bool:
    """Whether a tensor of this shape can lie so: every rank has a unit at least of every dim."""
    smallest = list(shape)
    for placement, parts in zip(layout, sizes, strict=True):
        if placement.is_split:
            if placement.dim >= len(shape):
                return False
            units, rest = divmod(smallest[placement.dim], placement.unit)
            if rest or units < parts:
                return False
            smallest[placement.dim] = placement.unit * (units // parts)
    return True


def everyone(sizes: Sequence[int]) -> Iterator[Coordinates]:
    """The coordinates of all ranks, in the order of ranks."""
    return itertools.product(*(range(size) for size in sizes))


def rank_of(sizes: Sequence[int], coordinates: Coordinates) -> int:
    """The rank at these coordinates."""
    rank = 0
    for size, index in zip(sizes, coordinates, strict=True):
        rank = rank * size + index
    return rank


def coordinates_of(sizes: Sequence[int], rank: int) -> Coordinates:
    """Where a rank is."""
    found = []
    for size in reversed(sizes):
        rank, index = divmod(rank, size)
        found.append(index)
    return tuple(reversed(found))


def line(sizes: Sequence[int], axis: int, coordinates: Coordinates) -> tuple[int, ...]:
    """The ranks that differ from the one at these coordinates along one axis alone, in order."""
    return tuple(
        rank_of(sizes, (*coordinates[:axis], index, *coordinates[axis + 1 :]))
        for index in range(sizes[axis])
    )


def split(
    tensor: torch.Tensor, layout: Layout, sizes: Sequence[int], coordinates: Coordinates
) -> torch.Tensor:
    """What of a whole tensor lies at these coordinates, as a tensor of its own.

    Along an axis on which it is partial, the first rank has all of it and the others zeros.
    """
    for dim, (start, stop) in enumerate(part(tensor.shape, layout, sizes, coordinates)):
        tensor = tensor.narrow(dim, start, stop - start)
    if any(p == P and c > 0 for p, c in zip(layout, coordinates, strict=True)):
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    return tensor.clone(memory_format=torch.contiguous_format)


def join(
    parts: Sequence[torch.Tensor], layout: Layout, sizes: Sequence[int], shape: Sequence[int]
) -> torch.Tensor:
    """The whole tensor from the parts of all ranks, in the order of ranks.

    Where it is copied, the first of the copies is taken.
    """
    whole = torch.zeros(tuple(shape), dtype=parts[0].dtype, device=parts[0].device)
    for tensor, coordinates in zip(parts, everyone(sizes), strict=True):
        if any(p == B and c > 0 for p, c in zip(layout, coordinates, strict=True)):
            continue
        place = tuple(slice(a, b) for a, b in part(shape, layout, sizes, coordinates))
        whole[place] += tensor
    return whole
