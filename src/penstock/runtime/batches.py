"""A worker's batches: which rows each of its shards reads in each step, and where it stands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.feed import Manifest, Records, Rows, Source, Stage, Stream
from penstock.feed.arrays import record_ids
from penstock.feed.bad import bad_of
from penstock.feed.dataframe import manifest_of
from penstock.feed.manifest import Part, partition_of
from penstock.feed.mapped import origin
from penstock.feed.order import epoch_order, steps_per_epoch, windowed
from penstock.feed.spooled import SpoolRecords

TIMEOUT_S = 300.0
"""How long rows that are still being read may fail to come."""
UNCHANGED = (
    "give the data that it began with, or begin a new run; rows that Spark shuffles come in "
    "another order each time: sort within partitions, or write them to a table first"
)
ID_BITS = 40
"""Where nobody has counted the records before, an id is the shard, and the row in these bits."""


Over: TypeAlias = Callable[[], bool]
"""Whether nobody waits any more for what is being read."""


def never() -> bool:
    """For who waits till the end."""
    return False


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


@dataclass(frozen=True)
class Request:
    """What the i-th own shard is to read for one batch.

    Arguments:
        epoch: whose order counts; None for records as they lie.
        positions: in that order; none where the shard has nothing (more) in a step.
        ends_shard: whether it is the shard's last batch of the step.
        ends_step: whether it is this worker's last of the step.
        more: if it ends the step, whether an own shard has rows for another one in this epoch.
    """

    i: int
    epoch: int | None
    positions: range
    ends_shard: bool = True
    ends_step: bool = True
    more: bool = True


class Feed:
    """One source as this worker sees it.

    Arguments:
        own, shards: the shards of this worker, and their number in all.
        seed: of the order.
        timeout_s: how long rows that are still being read may fail to come.
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
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.name, self.own, self.seed, self.device = name, own, seed, device
        self.stages: tuple[Stage, ...] = tuple(getattr(source, "stages", ()))
        self._source = origin(source)
        self.bad = bad_of(source)
        self._shards, self._timeout_s = shards, timeout_s
        self._opened: dict[int, tuple[Records, NDArray[np.int64] | None]] = {}
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._checked: set[int] = set()  # own shards whose rows are all there, as they should be
        self._know(manifest)

    def _know(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.rows = None if manifest.open else manifest.shard_rows(self._shards)

    def steps_per_epoch(self, examples_per_step: int) -> int | None:
        """Steps until every shard has been read once; None where nobody has counted yet."""
        if self.rows is None:
            return None
        steps = steps_per_epoch(self.rows, examples_per_step)
        if steps == 0:
            raise DataError(f"{self.name}: there are no records", hint="is the folder empty?")
        return steps

    @property
    def overlaps(self) -> bool:
        """Whether there is anything to do beside training: reading, stages, or another device."""
        if self.stages or self.device.type != "cpu":
            return not any(getattr(self._open(i)[0], "draws", False) for i in range(len(self.own)))
        return any(isinstance(self._open(i)[0], SpoolRecords) for i in range(len(self.own)))

    def requests(self, cursor: Cursor, epochs: int, over: Over) -> Iterator[Request]:
        """What is to be read from here on, step after step, shard after shard.

        Ends after the last epoch; where nobody has counted the records, after the first.
        """
        batch_size, per_step = cursor.batch_size, cursor.batch_size * cursor.accumulate
        epoch, step = cursor.epoch, cursor.step
        while epoch < epochs:
            steps, more = self.steps_per_epoch(per_step), True
            while step < steps if steps is not None else more:
                reads = [
                    self._positions(i, step * per_step, per_step, over)
                    for i in range(len(self.own))
                ]
                if steps is None:
                    more = any(another for _, another in reads)
                for i, (positions, _) in enumerate(reads):
                    starts = range(0, len(positions), batch_size) or range(1)
                    for start in starts:
                        last = start == starts[-1]
                        yield Request(
                            i,
                            epoch,
                            positions[start : start + batch_size],
                            last,
                            last and i == len(reads) - 1,
                            more,
                        )
                step += 1
            if steps is None:
                return
            epoch, step = epoch + 1, 0

    def in_order(self, i: int, batch_size: int, over: Over) -> Iterator[Request]:
        """All records of the i-th own shard as they lie."""
        start, more = 0, True
        while more:
            positions, more = self._positions(i, start, batch_size, over)
            if positions:
                yield Request(i, None, positions)
            start += batch_size
        self._reach(i, None, over)  # there may be more than there should be

    def read(self, request: Request, over: Over) -> Rows | None:
        """The records of a request, before any stage; None where there are none."""
        if not request.positions:
            return None
        i, shard = request.i, self.own[request.i]
        rows = self._rows(request, over)
        records, ids = self._open(i)
        x, y = records.take(rows)
        return Rows(x, y, (shard << ID_BITS) + rows if ids is None else ids[rows])

    def random(self, request: Request, stage: int) -> np.random.Generator:
        """What a stage may draw for a request: the same on any number of workers."""
        epoch = 2**32 - 1 if request.epoch is None else request.epoch
        key = (epoch, self.own[request.i], request.positions.start, stage)
        words = np.random.SeedSequence(self.seed, spawn_key=key)
        return np.random.Generator(np.random.Philox(words))

    def batch(self, request: Request, rows: Rows) -> Batch:
        """What training gets."""
        return Batch(
            rows.x, rows.y, rows.ids, self.own[request.i], request.epoch or 0, len(rows.ids)
        )

    def parts(self) -> list[Part]:
        """What the partitions of the own shards held; waits until all has been read."""
        assert isinstance(self._source, Stream)
        found: list[Part] = []
        for i, shard in enumerate(self.own):
            records, _ = self._open(i)
            assert isinstance(records, SpoolRecords)
            self._reach(i, None, never)
            found += self._source.parts(shard, self._shards, records)
        return found

    def settle(self, parts: list[Part]) -> None:
        """Everything has been counted: the parts of all shards are the manifest."""
        self._know(manifest_of(self.name, parts))

    def _positions(self, i: int, start: int, count: int, over: Over) -> tuple[range, bool]:
        """Of `count` positions from `start` on those that the i-th own shard has; whether it has
        more."""
        if self.rows is not None:
            rows = self.rows[self.own[i]]
        else:  # one more tells whether there is another step
            rows = self._reach(i, start + count + 1, over)
        return range(min(start, rows), min(start + count, rows)), rows > start + count

    def _reach(self, i: int, rows: int | None, over: Over) -> int:
        """Waits for so many rows of the i-th own shard, or for all; how many there are."""
        records, _ = self._open(i)
        if isinstance(records, SpoolRecords):
            records.wait(sys.maxsize if rows is None else rows, self._timeout_s, over)
            if self.rows is not None and records.whole and i not in self._checked:
                self._check_unchanged(i, records)
                self._checked.add(i)
        return len(records)

    def _rows(self, request: Request, over: Over) -> NDArray[np.int64]:
        """Which rows of the shard a request is for; waits for them."""
        i, positions = request.i, request.positions
        records, _ = self._open(i)
        shard = self.own[i]
        if request.epoch is None:
            self._reach(i, positions.stop, over)
            return np.arange(positions.start, positions.stop)
        if request.epoch == 0 and isinstance(records, SpoolRecords):
            self._reach(i, positions.stop, over)
            return windowed(self.seed, 0, shard, records.windows, positions.start, positions.stop)
        if self._orders.get(i, (-1,))[0] != request.epoch:
            self._reach(i, None, over)
            order = epoch_order(self.seed, request.epoch, shard, len(records))
            self._orders[i] = (request.epoch, order)
        return self._orders[i][1][positions.start : positions.stop]

    def _open(self, i: int) -> tuple[Records, NDArray[np.int64] | None]:
        if i not in self._opened:
            shard = self.own[i]
            if isinstance(self._source, Stream):
                self._opened[i] = self._source.open_shard(shard, self._shards), None
                return self._opened[i]
            assert self.rows is not None
            pieces = self.manifest.share(shard, self._shards)
            records = self._source.open(pieces)
            if not isinstance(records, SpoolRecords):
                self._check_rows(shard, len(records))
            self._opened[i] = records, record_ids(pieces)
        return self._opened[i]

    def _check_unchanged(self, i: int, records: SpoolRecords) -> None:
        """What has come is what the manifest says."""
        shard = self.own[i]
        if not isinstance(self._source, Stream):
            self._check_rows(shard, len(records))
            return
        recorded = {partition.name: partition.rows for partition in self.manifest.partitions}
        for part in self._source.parts(shard, self._shards, records):
            found = partition_of(part)
            if recorded.get(found.name) != found.rows:
                raise DataError(
                    f"{self.name} has changed since the run began: partition {part['partition']} "
                    f"is now {found.name} of {found.rows:,} rows, which it was not then",
                    hint=UNCHANGED,
                )

    def _check_rows(self, shard: int, found: int) -> None:
        assert self.rows is not None
        if found != self.rows[shard]:
            raise DataError(
                f"{self.name}: shard {shard} has {found} records where the manifest says "
                f"{self.rows[shard]}",
                hint="the data changed after the run began",
            )
