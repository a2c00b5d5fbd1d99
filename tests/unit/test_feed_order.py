"""The order of an epoch that goes window by window."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.feed.order import epoch_order, window_order, windowed

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def ends(sizes: list[int]) -> np.ndarray:
    return np.cumsum([0, *sizes])


@given(SIZES, st.integers(0, 2**40), st.integers(0, 3), st.integers(0, 5), st.data())
def test_each_row_once_in_its_window_and_however_it_is_cut(
    sizes: list[int], seed: int, epoch: int, shard: int, data: st.DataObject
) -> None:
    windows = ends(sizes)
    whole = windowed(seed, epoch, shard, windows, 0, int(windows[-1]))
    assert whole.dtype == np.int64
    for number, (first, end) in enumerate(itertools.pairwise(windows)):
        own = whole[first:end]
        assert sorted(own) == list(range(first, end))
        assert np.array_equal(own - first, window_order(seed, epoch, shard, number, end - first))
    cuts = sorted(data.draw(st.lists(st.integers(0, int(windows[-1])), max_size=8)))
    borders = [0, *cuts, int(windows[-1])]
    parts = [windowed(seed, epoch, shard, windows, a, b) for a, b in itertools.pairwise(borders)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_window_depends_on_no_later_one() -> None:
    sizes = [64, 64, 10, 64, 1]
    whole = windowed(7, 0, 2, ends(sizes), 0, 203)
    for known in range(1, 6):
        windows = ends(sizes[:known])
        assert np.array_equal(windowed(7, 0, 2, windows, 0, windows[-1]), whole[: windows[-1]])
    with pytest.raises(AssertionError, match="not come yet"):
        windowed(7, 0, 2, ends([64]), 60, 65)


def test_every_number_matters() -> None:
    """Otherwise two shards, epochs or windows would be in one order; the control is the same."""
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2**32, 0, 0, 0)]
    orders = {tuple(window_order(*key, 50).tolist()) for key in keys}
    orders.add(tuple(epoch_order(0, 0, 0, 50).tolist()))
    orders.add(tuple(range(50)))
    assert len(orders) == len(keys) + 2
    assert np.array_equal(window_order(*keys[0], 50), window_order(*keys[0], 50))


def test_what_is_returned_is_the_callers() -> None:
    windows = ends([20, 20])
    rows = windowed(3, 0, 0, windows, 0, 40)
    kept = rows.copy()
    rows[:] = 0
    again = windowed(3, 0, 0, windows, 5, 15)
    assert np.array_equal(again, kept[5:15])
    again[:] = 0
    assert np.array_equal(windowed(3, 0, 0, windows, 0, 40), kept)


def test_these_are_the_orders_that_runs_have_recorded() -> None:
    """A resumed epoch goes on in the order in which it began: no version may change it."""
    assert window_order(42, 0, 3, 1, 8).tolist() == RECORDED_WINDOW
    assert epoch_order(42, 1, 3, 8).tolist() == RECORDED_EPOCH


RECORDED_WINDOW = [5, 2, 0, 6, 7, 4, 1, 3]
RECORDED_EPOCH = [6, 0, 5, 1, 7, 2, 3, 4]
