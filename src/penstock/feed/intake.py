"""What an agent takes in: the rows of Spark's partitions as they come, a spool for each.

    <folder>/read/<source>/<partition>    what this agent reads; see `shelf` for the rest

What an agent has read outlives it if the run may go on (`kept`): the agents of the run that does
take it, and tell of it as if they had read it.

Batches hold rows of any source: `source` and `partition` say whose they are, and the source's
columns follow under names of the launcher's. Spark gives one partition after the other, so that
where the next begins the one before is whole.

Spark's n partitions are dealt out to S shards in blocks, shard s having those from floor(n s / S)
on, and numbered such that partition p belongs to shard p mod S: the k-th of shard s is s + k S
(`numbers`). Agents are given blocks as well (Spark's `coalesce`), so that where Spark looks at no
places each reads what its own worker is to have.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.errors import DataError, PenstockError
from penstock.feed.bad import BadRecords
from penstock.feed.columns import Place, Selection
from penstock.feed.converter import Converter
from penstock.feed.filling import key_of
from penstock.feed.kept import KeptSpools
from penstock.feed.shelf import Shelf
from penstock.feed.spool import SpoolWriter

if TYPE_CHECKING:
    import pyarrow as pa

MEND = "in the DataFrame"


def numbers(count: int, shards: int) -> tuple[int, ...]:
    """Of each of Spark's partitions, its number in the run."""
    found = []
    for index in range(count):
        shard = ((index + 1) * shards - 1) // count
        found.append(shard + (index - count * shard // shards) * shards)
    return tuple(found)


@dataclass(frozen=True)
class Arrival:
    """A source whose rows come.

    Arguments:
        name: of the source in the run, for messages.
        selection: of its columns.
        numbers: of each of Spark's partitions, its number in the run.
        on_bad_record, quarantine: see `BadRecords`.
    """

    name: str
    selection: Selection
    numbers: tuple[int, ...]
    on_bad_record: str = "error"
    quarantine: str | None = None


class Intake(Shelf):
    """Takes in batches, and keeps them for this agent's worker and for others.

    Arguments:
        folder: of the agent.
        arrivals: the sources, pickled.
        columns: by source, what its columns are called in the batches, in the selection's order.
        tell: called with what the directory is to know.
    """

    def __init__(
        self,
        folder: str,
        arrivals: bytes,
        columns: Sequence[Sequence[str]],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__(Path(folder))
        self._columns, self._tell = columns, tell
        self._arrivals: list[Arrival] = pickle.loads(arrivals)
        self._bad = [BadRecords(a.on_bad_record, a.quarantine) for a in self._arrivals]
        self._converters = [
            Converter(arrival.selection, Place(arrival.name, "", mend=MEND), bad)
            for arrival, bad in zip(self._arrivals, self._bad, strict=True)
        ]
        self._partition: _Partition | None = None
        self._kept: KeptSpools | None = None
        for source, arrival in enumerate(self._arrivals):
            self.open(source, arrival.numbers)

    def resume(self, place: str, run: str, wanted: Sequence[tuple[int, int, int, str]]) -> None:
        """Takes what is kept here of an earlier run in the same directory.

        Arguments:
            place: where it is kept, and what this agent reads may be; see `KeptSpools`.
            run: the run's directory.
            wanted: source, partition, rows and checksum of each spool that is to be had.
        """
        self._kept = KeptSpools(Path(place), run)
        for source, partition, rows, checksum in wanted:
            key = self._key(source, partition, rows, checksum)
            if self._kept.take(key, rows, checksum, self.reading(source, partition)):
                where = {"source": source, "partition": partition}
                self._tell({"event": "reading", **where})
                self._tell({"event": "sum", **where, "of": "rows", "sum": f"{rows} {checksum}"})

    def leave(self, keep: bool) -> None:
        """Keeps what has been read to its end for a run that goes on from here, or nothing."""
        assert self._kept is not None
        if not keep:
            self._kept.remove()
            return
        for source, partition, folder, end in self.whole():
            with contextlib.suppress(OSError):  # it is read again then
                self._kept.keep(self._key(source, partition, end.rows, end.checksum), folder)

    def write(self, batch: pa.RecordBatch) -> None:
        """Takes rows in; those of a negative source are nobody's.

        Raises:
            DataError: a row of which no tensor can be made; the disk is full; or a partition that
                was not there when they were counted.
        """
        sources, partitions = (
            batch.column(name).to_numpy().astype(np.int64) for name in ("source", "partition")
        )
        changes = (np.diff(sources) != 0) | (np.diff(partitions) != 0)
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), batch.num_rows]
        for start, stop in pairwise(edges):
            if start < stop and sources[start] >= 0:
                rows = batch.slice(start, stop - start)
                self._take(int(sources[start]), int(partitions[start]), rows)

    def close(self) -> dict[str, Any]:
        """All rows have come. Gives what was left out of them, by source."""
        self._end()
        return {
            "bad": [
                {"source": arrival.name, "count": bad.count, "line": bad.line()}
                for arrival, bad in zip(self._arrivals, self._bad, strict=True)
                if bad.count
            ]
        }

    def fail(self, error: PenstockError) -> None:
        """No more rows come, for this reason: whoever waits for the partition is told."""
        if self._partition is not None:
            self._partition.writer.fail(error)
            self._partition = None

    def abandon(self) -> None:
        """No more rows come, and nobody waits for them."""
        if self._partition is not None:
            self._partition.writer.abandon()
            self._partition = None

    def _key(self, source: int, partition: int, rows: int, checksum: str) -> str:
        arrival = self._arrivals[source]
        return key_of(arrival.name, repr(arrival.selection), partition, rows, checksum)

    def _take(self, source: int, index: int, rows: pa.RecordBatch) -> None:
        import pyarrow as pa

        if self._partition is None or self._partition.key != (source, index):
            self._end()
            self._partition = self._begin(source, index)
        arrival, partition = self._arrivals[source], self._partition
        columns = [rows.column(name) for name in self._columns[source]]
        batch = pa.RecordBatch.from_arrays(columns, arrival.selection.names)
        partition.writer.write(self._converters[source].convert(batch))
        self._sum_of_first(partition)

    def _begin(self, source: int, index: int) -> _Partition:
        arrival = self._arrivals[source]
        where = f"{arrival.name}: partition {index}"
        if index >= len(arrival.numbers):
            raise DataError(
                f"{where}: expected 0 to {len(arrival.numbers) - 1}: their number has changed "
                "since they were counted",
                hint="adaptive execution: spark.sql.adaptive.coalescePartitions.enabled=false, or "
                "cache the DataFrame",
            )
        number = arrival.numbers[index]
        self._converters[source].at(Place(where, "", mend=MEND))
        writer = SpoolWriter(self.reading(source, number), where)
        self._tell({"event": "reading", "source": source, "partition": number})
        return _Partition((source, index), number, writer)

    def _end(self) -> None:
        """The partition that was being read is whole."""
        if self._partition is None:
            return
        partition, self._partition = self._partition, None
        end = partition.writer.close()
        self._sum_of_first(partition)
        self._tell_sum(partition, "rows", f"{end.rows} {end.checksum}")

    def _sum_of_first(self, partition: _Partition) -> None:
        """Tells of the first segment as soon as it is there."""
        if partition.writer.segments and not partition.told:
            partition.told = True
            self._tell_sum(partition, "first rows", partition.writer.segments[0].checksum)

    def _tell_sum(self, partition: _Partition, of: str, value: str) -> None:
        where = {"source": partition.key[0], "partition": partition.number}
        self._tell({"event": "sum", **where, "of": of, "sum": value})


@dataclass
class _Partition:
    """The one that is being read: source and Spark's number, its number in the run."""

    key: tuple[int, int]
    number: int
    writer: SpoolWriter
    told: bool = False
