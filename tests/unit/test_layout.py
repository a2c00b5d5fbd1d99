"""Layouts: every element at the ranks that are to have it, and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch

from penstock.plan.layout import (
    B,
    Layout,
    P,
    S,
    coordinates_of,
    cut,
    everyone,
    in_words,
    join,
    largest_shape,
    line,
    local_shape,
    part,
    plain_unit,
    possible,
    rank_of,
    read_layout,
    share,
    split,
)

MESHES = [(1,), (2,), (3,), (4,), (2, 2), (2, 3), (3, 2, 2)]
PLACEMENTS = [B, P, S(0), S(1), S(1, 2), S(2)]


def layouts(sizes: tuple[int, ...], shape: tuple[int, ...]) -> list[Layout]:
    every = itertools.product(PLACEMENTS, repeat=len(sizes))
    return [layout for layout in every if possible(shape, layout, sizes)]


@pytest.mark.parametrize("sizes", MESHES)
def test_what_is_split_is_joined_again(sizes: tuple[int, ...]) -> None:
    shape = 7, 24, 5
    whole = torch.arange(7 * 24 * 5, dtype=torch.float64).reshape(shape) + 1
    found = layouts(sizes, shape)
    assert len(found) > 4
    for layout in found:
        parts = [split(whole, layout, sizes, c) for c in everyone(sizes)]
        assert torch.equal(join(parts, layout, sizes, shape), whole)
        for tensor, coordinates in zip(parts, everyone(sizes)):
            assert tuple(tensor.shape) == local_shape(shape, layout, sizes, coordinates)
            assert min(tensor.shape) > 0
        largest = largest_shape(shape, layout, sizes)
        assert largest == tuple(map(max, zip(*(tensor.shape for tensor in parts))))
        most = max(tensor.numel() for tensor in parts) / whole.numel()
        assert most <= share(shape, layout, sizes) <= 1


def test_a_partial_tensor_is_a_sum() -> None:
    tensors = [torch.full((2, 3), float(n)) for n in (1, 2, 4)]
    assert torch.equal(join(tensors, (P,), (3,), (2, 3)), torch.full((2, 3), 7.0))
    assert torch.equal(join(tensors, (B,), (3,), (2, 3)), tensors[0])


def test_uneven_parts_differ_by_a_unit() -> None:
    assert [cut(0, 7, 3, c) for c in range(3)] == [(0, 2), (2, 4), (4, 7)]
    assert [cut(0, 12, 2, c, 4) for c in range(2)] == [(0, 4), (4, 12)]
    for size, parts in itertools.product(range(1, 30), range(1, 8)):
        cuts = [cut(0, size, parts, c) for c in range(parts)]
        assert cuts[0][0] == 0
        assert cuts[-1][1] == size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
        lengths = [stop - start for start, stop in cuts]
        assert max(lengths) - min(lengths) <= 1


def test_an_inner_axis_cuts_what_the_outer_one_has_left() -> None:
    ranges = [part((10,), (S(0), S(0)), (2, 2), c)[0] for c in everyone((2, 2))]
    assert ranges == [(0, 2), (2, 5), (5, 7), (7, 10)]


def test_what_is_possible() -> None:
    assert possible((3,), (S(0),), (3,))
    assert not possible((2,), (S(0),), (3,))  # a rank would have nothing
    assert not possible((4,), (S(1),), (2,))
    assert not possible((7, 3), (S(0, 2),), (2,))  # no whole units
    assert possible((5,), (S(0), S(0)), (2, 2))
    assert not possible((3,), (S(0), S(0)), (2, 2))
    assert possible((), (B, P), (2, 2))
    assert plain_unit(24, 4, 6) == 1
    assert plain_unit(24, 3, 6) == 6


def test_ranks_and_lines() -> None:
    sizes = 2, 3, 4
    assert [coordinates_of(sizes, r) for r in range(24)] == list(everyone(sizes))
    assert all(rank_of(sizes, c) == r for r, c in enumerate(everyone(sizes)))
    assert line(sizes, 2, (1, 0, 2)) == (12, 13, 14, 15)
    assert line(sizes, 0, (1, 0, 2)) == (2, 14)


def test_words() -> None:
    layout = S(0), S(12, 64), B, P
    assert in_words(layout) == "[S0, S12/64, B, P]"
    assert read_layout(in_words(layout)) == layout
    for wrong in ("S", "R", "S0/x", "[S1, 0]"):
        with pytest.raises(ValueError, match="no placement"):
            read_layout(wrong)
