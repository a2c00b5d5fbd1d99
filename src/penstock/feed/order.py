"""In which order a shard reads its rows: pure functions of numbers that a run records.

Rows are sorted by 64-bit keys from Philox (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). NumPy promises the same bits from a bit generator in every version, which it
does not promise of `Generator.permutation`, and a resumed epoch must continue in the same order.
"""

from __future__ import annotations

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
    key = np.random.SeedSequence(seed, spawn_key=(epoch, shard))
    order = np.argsort(np.random.Philox(key).random_raw(rows), kind="stable")
    return order.astype(np.int64, copy=False)


def steps_per_epoch(shard_rows: Sequence[int], examples_per_step: int) -> int:
    """Steps until the largest shard has seen its rows once, `examples_per_step` of them a step."""
    return max(-(-rows // examples_per_step) for rows in shard_rows)
