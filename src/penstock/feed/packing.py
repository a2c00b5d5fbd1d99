"""How rows of Spark DataFrames travel from where they lie to the agents that keep them.

    map task     pack: a partition's Arrow batches as rows of `PACKED`, then its end mark
    agent        Unpacker: packed rows of many partitions, interleaved, into a spool for each

Agents have no tensor library, and pyarrow is imported inside the functions that use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from penstock.errors import DataError
from penstock.feed.columns import Place
from penstock.feed.spool import SpoolEnd, SpoolWriter

if TYPE_CHECKING:
    import pyarrow as pa

PACKED = "source int, partition int, batch int, rows bigint, body binary"
"""What `pack` gives, as Spark writes a schema."""
BATCH_BYTES = 4 * 2**20
"""A packed batch has no more, unless it is one row: Connect sends Arrow in batches of 4 MiB."""
ROW_BYTES = 2**30
"""A row has no more: what Spark passes on as one value ends at 2 GiB."""
MEND = "in the DataFrame"
AGAIN = "run again, and report it if it comes again"


class SpooledPartition(TypedDict):
    """What an agent tells of a partition that it has spooled: JSON values.

    Arguments:
        source, partition: their numbers.
        rows: of the partition.
        checksum: of its tensors; see `SpoolEnd`.
        layout: in words, the same for all partitions of a source; empty where there are no rows.
    """

    source: int
    partition: int
    rows: int
    checksum: str
    layout: str


def pack_task(
    code: str, source: int, numbers: range, owners: Sequence[int], batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """What a map task of Spark runs: `pack`, each row with the agent that is to have it.

    Arguments:
        code: the folder of the shipped code, of no use here.
        source: its number.
        numbers: the tasks' numbers of the source's partitions.
        owners: the rank that carries each shard.
    """
    import pyarrow as pa
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    if context.partitionId() not in numbers:
        raise DataError(
            f"source {source}: Spark runs task {context.partitionId()} for one of its partitions, "
            f"which are {numbers.start} to {numbers.stop - 1}: their number has changed since they "
            "were counted",
            hint="adaptive execution: spark.sql.adaptive.coalescePartitions.enabled=false, or "
            "cache the DataFrame",
        )
    partition = context.partitionId() - numbers.start
    owner = owners[partition % len(owners)]
    for batch in pack(batches, partition, source):
        agents = pa.array([owner] * batch.num_rows, pa.int32())
        yield pa.RecordBatch.from_arrays([agents, *batch.columns], ["agent", *batch.schema.names])


def pack(
    batches: Iterable[pa.RecordBatch], partition: int, source: int
) -> Iterator[pa.RecordBatch]:
    """A partition as rows of `PACKED`: its batches in order, numbered from 0, then its end mark.

    A row's body is a batch as an Arrow IPC stream, and `rows` its rows. The end mark has an empty
    body, the next number, and the rows of the whole partition; an empty partition has it as well.

    Arguments:
        batches: of the partition.
        partition, source: their numbers.

    Raises:
        DataError: a row of more than `ROW_BYTES`.
    """
    import pyarrow as pa

    number = total = 0
    for batch in batches:
        for part in _cut(batch):
            if part.nbytes > ROW_BYTES:
                raise DataError(
                    f"{_where(source, partition)}: row {total} takes {part.nbytes:,} bytes: "
                    f"expected at most {ROW_BYTES:,}",
                    hint=f"make rows smaller {MEND}",
                )
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, part.schema) as stream:
                stream.write_batch(part)
            yield _packed(source, partition, number, part.num_rows, sink.getvalue())
            number, total = number + 1, total + part.num_rows
    yield _packed(source, partition, number, total, pa.py_buffer(b""))


class Unpacker:
    """Packed rows into spools, `<folder>/<source>/<partition>/` each, every row checked.

    Arguments:
        folder: of the spools.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._arriving: dict[tuple[int, int], _Arriving] = {}
        self._spooled: dict[tuple[int, int], SpooledPartition] = {}

    def write(self, packed: pa.RecordBatch) -> None:
        """Takes rows of `PACKED`, those of one partition in their order.

        Arguments:
            packed: has the columns of `PACKED`, found by name. A row whose source is negative is
                nobody's and is passed over.

        Raises:
            DataError: a gap, a double or a damaged batch, by source and partition; a row that no
                tensor can be made of; or the disk is full.
        """
        columns = [packed.column(name).to_pylist() for name in ("source", "partition", "batch")]
        rows, bodies = packed.column("rows").to_pylist(), packed.column("body")
        for i, (source, partition, number) in enumerate(zip(*columns, strict=True)):
            if source >= 0:
                self._take(source, partition, number, rows[i], bodies[i].as_buffer())

    def close(self) -> list[SpooledPartition]:
        """All has come: what is spooled, by source and partition.

        Raises:
            DataError: a partition has not ended.
        """
        for (source, partition), arriving in sorted(self._arriving.items()):
            raise _misfit(
                source,
                partition,
                f"received {arriving.batches} batches and no end mark: expected batch "
                f"{arriving.batches} or the end mark",
            )
        return [self._spooled[key] for key in sorted(self._spooled)]

    def _take(
        self, source: int, partition: int, number: int, rows: int, body: pa.Buffer | None
    ) -> None:
        key = source, partition
        if key in self._spooled:
            raise _misfit(*key, f"received batch {number} after the end mark: expected no more")
        if key not in self._arriving:
            place = Place(_where(*key), "", mend=MEND)
            folder = self._folder / str(source) / str(partition)
            self._arriving[key] = _Arriving(SpoolWriter(folder, place))
        arriving = self._arriving[key]
        if number != arriving.batches:
            raise _misfit(*key, f"received batch {number}: expected batch {arriving.batches}")
        if body:
            batch = _unpacked(body, *key, number)
            if batch.num_rows != rows:
                raise _misfit(
                    *key, f"received {batch.num_rows} rows in batch {number}: expected {rows}"
                )
            arriving.writer.write(batch)
            arriving.batches, arriving.rows = number + 1, arriving.rows + rows
            return
        if rows != arriving.rows:
            raise _misfit(*key, f"received {arriving.rows} rows and the end mark: expected {rows}")
        self._spooled[key] = spooled(source, partition, arriving.writer.close())
        del self._arriving[key]


@dataclass
class _Arriving:
    writer: SpoolWriter
    batches: int = 0
    rows: int = 0


def spooled(source: int, partition: int, end: SpoolEnd) -> SpooledPartition:
    layout = ", ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in end.layout.items())
    return SpooledPartition(
        source=source, partition=partition, rows=end.rows, checksum=end.checksum, layout=layout
    )


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Halves, until each has at most `BATCH_BYTES` or one row."""
    if batch.num_rows > 1 and batch.nbytes > BATCH_BYTES:
        half = batch.num_rows // 2
        yield from _cut(batch.slice(0, half))
        yield from _cut(batch.slice(half))
    elif batch.num_rows:
        yield batch


def _packed(source: int, partition: int, number: int, rows: int, body: pa.Buffer) -> pa.RecordBatch:
    import pyarrow as pa

    offsets = pa.py_buffer(np.array([0, len(body)], np.int32))
    columns = {
        "source": pa.array([source], pa.int32()),
        "partition": pa.array([partition], pa.int32()),
        "batch": pa.array([number], pa.int32()),
        "rows": pa.array([rows], pa.int64()),
        "body": pa.Array.from_buffers(pa.binary(), 1, [None, offsets, body]),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), list(columns))


def _unpacked(body: pa.Buffer, source: int, partition: int, number: int) -> pa.RecordBatch:
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(body) as stream:
            return stream.read_next_batch()
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise _misfit(source, partition, f"batch {number} cannot be read: {error}") from error


def _where(source: int, partition: int) -> str:
    return f"source {source}, partition {partition}"


def _misfit(source: int, partition: int, what: str) -> DataError:
    return DataError(
        f"{_where(source, partition)}: {what}",
        hint=f"Spark has lost, doubled or changed some of it; {AGAIN}",
    )
