"""Rows gathered by address: from many blocks, of any size, wherever they lie."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.feed.gather import Blocks, runs_at


def laid_out(arrays: list[NDArray[np.uint8]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First rows and addresses of arrays that are blocks."""
    first = np.cumsum([0, *(len(array) for array in arrays)])
    return first, np.array([array.ctypes.data for array in arrays], np.int64)


@pytest.mark.parametrize("row_bytes", [1, 3, 8, 784, 4096])
def test_rows_of_many_blocks_are_as_of_one_array(row_bytes: int) -> None:
    rng = np.random.default_rng(row_bytes)
    counts = [5, 0, 1, 300, 0, 0, 64, 1]
    arrays = [rng.integers(0, 255, (n, row_bytes), dtype=np.uint8) for n in counts]
    rng.shuffle(arrays)  # in memory they lie in another order
    whole = np.concatenate(arrays)
    first, addresses = laid_out(arrays)
    blocks = Blocks(first, addresses, ("uint8", (row_bytes,)))
    for rows in [np.arange(0), rng.permutation(len(whole)), rng.integers(0, len(whole), 1000)]:
        found = blocks.take(rows, first.searchsorted(rows, "right"))
        assert found.dtype == np.uint8
        assert np.array_equal(found, whole[rows])
        found[:] = 0  # it is the caller's
    assert np.array_equal(whole, np.concatenate(arrays)), "and what it came from is unchanged"
    assert whole.any()


@pytest.mark.parametrize(
    "row", [("float32", (2, 3)), ("bool", ()), ("int64", ()), ("uint16", (5,))]
)
def test_rows_have_a_dtype_and_a_shape(row: tuple[str, tuple[int, ...]]) -> None:
    arrays = [(np.random.default_rng(i).random((9, *row[1])) * 2).astype(row[0]) for i in range(4)]
    first, addresses = laid_out([array.view(np.uint8).reshape(9, -1) for array in arrays])
    rows = np.array([35, 0, 8, 9, 9, 20])
    found = Blocks(first, addresses, row).take(rows, first.searchsorted(rows, "right"))
    assert (found.dtype.name, found.shape) == (row[0], (6, *row[1]))
    assert np.array_equal(found, np.concatenate(arrays)[rows])


def test_rows_of_no_bytes() -> None:
    first, addresses = np.array([0, 5, 7]), np.array([0, 0])
    rows = np.array([6, 0, 3])
    for row in [("float32", (0,)), ("uint8", (3, 0, 2))]:
        found = Blocks(first, addresses, row).take(rows, first.searchsorted(rows, "right"))
        assert (found.dtype.name, found.shape) == (row[0], (3, *row[1]))


def test_a_row_that_is_not_there() -> None:
    array = np.arange(10, dtype=np.int64)
    first = np.array([0, 10])
    blocks = Blocks(first, np.array([array.ctypes.data]), ("int64", ()))
    assert blocks.take(np.array([9]), np.array([1])).tolist() == [9]
    for row in [10, 1000, -1, -11]:
        rows = np.array([3, row])
        with pytest.raises(IndexError):
            blocks.take(rows, first.searchsorted(rows, "right"))


def test_large_rows_far_apart() -> None:
    """Where no view can be made, as NumPy's arrays would be too large."""
    size = 2**20
    with mmap.mmap(-1, 3 * size) as low:
        array = np.frombuffer(low, np.uint8).reshape(3, size)
        array[:] = np.arange(3, dtype=np.uint8)[:, None]
        first, near = np.array([0, 3]), np.array([array.ctypes.data])
        assert Blocks(first, near, ("uint8", (size,)))._view is not None
        first = np.array([0, 1, 3, 4])
        # The last block is said to lie where nothing is: it is not touched.
        far = np.array([array.ctypes.data, array.ctypes.data + size, 2**60])
        blocks = Blocks(first, far, ("uint8", (size,)))
        assert blocks._view is None
        rows = np.array([2, 0, 2])
        found = blocks.take(rows, first.searchsorted(rows, "right"))
        assert np.array_equal(found, array[rows])
        found[:] = 7
        with pytest.raises(IndexError):
            blocks.take(np.array([-1]), np.array([0]))
        del array, found


def test_runs_of_unequal_length() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, 1000, dtype=np.uint8) for _ in range(5)]
    which, starts = rng.integers(0, 5, 200), rng.integers(0, 900, 200)
    lengths = rng.integers(0, 100, 200) * rng.integers(0, 2, 200)
    assert (lengths == 0).any()
    addresses = np.array([arrays[w].ctypes.data for w in which], np.int64) + starts
    addresses[lengths == 0] = 0  # where nothing is
    wanted = [arrays[w][s : s + n] for w, s, n in zip(which, starts, lengths, strict=True)]
    found = runs_at(addresses, lengths)
    assert np.array_equal(found, np.concatenate(wanted))
    found[:] = 0
    assert runs_at(addresses[:0], lengths[:0]).shape == (0,)
    assert runs_at(np.zeros(3, np.int64), np.zeros(3, np.int64)).shape == (0,)
