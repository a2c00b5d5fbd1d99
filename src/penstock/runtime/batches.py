"""A worker's batches: which rows each of its shards reads in each step, and where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.feed import Manifest, Source
from penstock.feed.order import epoch_order, steps_per_epoch
from penstock.feed.source import Records, Tensors


@dataclass(frozen=True)
class Batch:
    """Some records of one shard, on the worker's device.

    Arguments:
        x, y: features and target, as the source gives them; first dim `size`.
        ids: record ids, int64 (size,), counted through the source's partitions.
        shard: whose records they are.
        epoch: from 0.
        size: number of records.
    """

    x: Any
    y: Any
    ids: NDArray[np.int64]
    shard: int
    epoch: int
    size: int


@dataclass
class Cursor:
    """Where a source stands: the next step of an epoch. All shards move in step.

    `batch_size` and `accumulate` are those of the loop: they say how far a step has come.
    """

    batch_size: int
    accumulate: int
    epoch: int = 0
    step: int = 0


class Feed:
    """One source as this worker sees it.

    Arguments:
        own, shards: the shards of this worker, and their number in all.
        seed: of the order.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        manifest: Manifest,
        own: range,
        shards: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.name, self.own, self.seed = name, own, seed
        self.rows = manifest.shard_rows(shards)
        self._source, self._manifest = source, manifest
        self._shards, self._device = shards, device
        self._opened: dict[int, tuple[Records, NDArray[np.int64]]] = {}
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def steps_per_epoch(self, examples_per_step: int) -> int:
        """Steps until every shard has been read once."""
        steps = steps_per_epoch(self.rows, examples_per_step)
        if steps == 0:
            raise DataError(f"{self.name}: there are no records", hint="is the folder empty?")
        return steps

    def rows_of_step(self, i: int, step: int, examples_per_step: int) -> range:
        """Positions in the epoch's order that the i-th own shard reads in this step."""
        rows = self.rows[self.own[i]]
        return range(min(step * examples_per_step, rows), min((step + 1) * examples_per_step, rows))

    def batch(self, i: int, epoch: int, positions: range) -> Batch:
        """The records at these positions of the i-th own shard's order in this epoch."""
        return self._take(i, epoch, self._order(i, epoch)[positions.start : positions.stop])

    def in_order(self, i: int, batch_size: int) -> Iterator[Batch]:
        """All records of the i-th own shard as they lie, not shuffled."""
        rows = self.rows[self.own[i]]
        for start in range(0, rows, batch_size):
            yield self._take(i, 0, np.arange(start, min(start + batch_size, rows)))

    def _take(self, i: int, epoch: int, rows: NDArray[np.int64]) -> Batch:
        records, ids = self._open(i)
        x, y = records.take(rows)
        return Batch(
            on_device(x, self._device),
            on_device(y, self._device),
            ids[rows],
            self.own[i],
            epoch,
            len(rows),
        )

    def _open(self, i: int) -> tuple[Records, NDArray[np.int64]]:
        if i not in self._opened:
            pieces = self._manifest.share(self.own[i], self._shards)
            records = self._source.open(pieces)
            ids = [np.arange(p.first_id, p.first_id + p.rows, dtype=np.int64) for p in pieces]
            if len(records) != self.rows[self.own[i]]:
                raise DataError(
                    f"{self.name}: shard {self.own[i]} has {len(records)} records where the "
                    f"manifest says {self.rows[self.own[i]]}",
                    hint="the data changed after the run began",
                )
            self._opened[i] = records, np.concatenate(ids) if ids else np.empty(0, np.int64)
        return self._opened[i]

    def _order(self, i: int, epoch: int) -> NDArray[np.int64]:
        if self._orders.get(i, (-1,))[0] != epoch:
            shard = self.own[i]
            order = epoch_order(self.seed, epoch, shard, self.rows[shard])
            self._orders[i] = (epoch, order)
        return self._orders[i][1]


def on_device(tensors: Tensors, device: torch.device) -> Any:
    """The same structure on another device."""
    if isinstance(tensors, torch.Tensor):
        return tensors.to(device, non_blocking=True)
    if isinstance(tensors, dict):
        return {key: on_device(t, device) for key, t in tensors.items()}
    return tuple(on_device(t, device) for t in tensors)
