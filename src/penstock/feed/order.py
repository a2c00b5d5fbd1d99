"""In which order a shard reads its rows: pure functions of numbers that a run records.

Rows are sorted by 64-bit keys from Philox (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). NumPy promises the same bits from a bit generator in every version, which it
does not promise of `Generator.permutation`, and a resumed epoch must continue in the same order.

An epoch is shuffled over all rows of the shard: `epoch_order`. The first one is not where rows come
while it is read (spools): it goes through windows of rows in the order in which they come, and is
shuffled within each: `windowed`. The order of a window depends on no later one, so training starts
on the first; and windows are a function of the data (see `spool`), so the order is the same
whoever reads, and however fast the rows came.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def epoch_order(seed: int, epoch: int, shard: int, rows: int) -> NDArray[np.int64]:
    """The permutation of one shard's rows for one epoch; depends on these four numbers only.

    Arguments:
        seed: of the job; 0 or more, below 2**128.
        epoch, shard: 0 or more, below 2**32.
        rows: how many the shard owns.

    Returns:
        (rows,) int64: each of 0 to rows - 1 once.
    """
    # As spawn key and not as more entropy, where (2**32 + 1, 0, 0) would be as (1, 1, 0).
    return _shuffled(np.random.SeedSequence(seed, spawn_key=(epoch, shard)), rows)


def window_order(seed: int, epoch: int, shard: int, window: int, rows: int) -> NDArray[np.int64]:
    """The permutation of the rows of one window, numbered from 0; as `epoch_order`.

    Arguments:
        window: its number in the shard; 0 or more, below 2**32.
        rows: how many the window has.
    """
    return _shuffled(np.random.SeedSequence(seed, spawn_key=(epoch, shard, window)), rows)


def windowed(
    seed: int, epoch: int, shard: int, windows: NDArray[np.int64], start: int, stop: int
) -> NDArray[np.int64]:
    """The rows at positions [start, stop) of an epoch that goes window by window.

    Arguments:
        windows: the first row of each window, and the end of the last, (windows + 1,): of those
            that have come, which must hold `stop` rows at least.

    Returns:
        (stop - start,) int64, numbered through the shard.
    """
    assert 0 <= start <= stop <= windows[-1], "these rows have not come yet"
    parts = [np.empty(0, np.int64)]
    window = int(np.searchsorted(windows, start, side="right")) - 1
    while start < stop:
        first, end = windows[window : window + 2].tolist()
        upto = min(stop, end)
        order = _window_order(seed, epoch, shard, window, end - first)
        parts.append(first + order[start - first : upto - first])
        start, window = upto, window + 1
    return np.concatenate(parts)


def steps_per_epoch(shard_rows: Sequence[int], examples_per_step: int) -> int:
    """Steps until the largest shard has seen its rows once, `examples_per_step` of them a step."""
    return max(-(-rows // examples_per_step) for rows in shard_rows)


_window_order = functools.lru_cache(maxsize=32)(window_order)
"""Several successive steps read a window, of each shard of a worker. Not to be written to."""


def _shuffled(key: np.random.SeedSequence, rows: int) -> NDArray[np.int64]:
    order = np.argsort(np.random.Philox(key).random_raw(rows), kind="stable")
    return order.astype(np.int64, copy=False)
