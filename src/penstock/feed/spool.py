"""Spools: a partition's rows on local disk, checked once and counted, for processes to come.

    000000.arrow   a segment: some batches, as an Arrow IPC file, whose footer seals it
    000001.arrow   ...
    end.json       rows and bytes of each segment, the columns' layout, a checksum: written last

What is being written has another name until it is whole, so a folder with an `end.json` holds all
of a partition and one without holds nothing. Files are written with write(2) alone: a full disk is
an error then and there, and no SIGBUS in whoever maps them later. Nothing is flushed to the medium:
a spool outlives its writer and no crash of the machine.

pyarrow is imported inside the functions that use it, as in `columns`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.feed.columns import Place, column_type, dense

if TYPE_CHECKING:
    import pyarrow as pa

SEGMENT_BYTES = 64 * 2**20
"""A segment ends with the batch that reaches this."""
END = "end.json"
WRITING = ".writing"
"""Ends the names of files that are not whole yet."""


@dataclass(frozen=True)
class Segment:
    """A file of a spool: its name, rows, and bytes on disk."""

    name: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class SpoolEnd:
    """What a closed spool holds.

    Arguments:
        rows: of all segments.
        checksum: eight hexadecimal digits: a function of the columns' names, and of the dtype,
            shape and values of the array that each becomes, row after row. Not of batches, of
            segments, or of how Arrow lays values out.
        bytes: of all segments, on disk.
        layout: by column, dtype and shape of a row; empty where there are no rows.
        segments: in order.
    """

    rows: int
    checksum: str
    bytes: int
    layout: dict[str, tuple[str, tuple[int, ...]]]
    segments: tuple[Segment, ...]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """By column, an array as its values give it, with no rows."""
        return {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in self.layout.items()}


class SpoolWriter:
    """Writes a partition's spool; one that is not closed leaves no end.

    Arguments:
        folder: of the spool; made here.
        place: of the partition's first row, for messages.

    Raises:
        DataError: the folder is there already.
    """

    def __init__(self, folder: str | os.PathLike[str], place: Place | None = None) -> None:
        self._folder = Path(folder)
        self._place = place or Place(str(folder), "")
        self._segments: list[Segment] = []
        self._layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._sums: dict[str, int] = {}
        self._rows = 0
        self._sealed_rows = 0
        self._whole = True
        self._schema: pa.Schema | None = None
        self._file: Any = None
        self._writer: Any = None
        try:
            self._folder.mkdir(parents=True)
        except FileExistsError as error:
            raise DataError(
                f"{self._folder} is there already: a spool is written once",
                hint="remove the folder, or give another",
            ) from error

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends a batch, of which `columns.dense` can make arrays.

        Raises:
            DataError: a column, null, length or size of which no array can be made, by its row;
                another schema than before; or the disk is full.
        """
        import pyarrow as pa

        if self._schema is None:
            for name in batch.schema.names:
                column_type(batch.schema, replace(self._place, column=name))
            self._schema = batch.schema
        elif not batch.schema.equals(self._schema):
            raise DataError(
                f"{self._place.where}: the schema changes at row {self._rows} from "
                f"{_words(self._schema)} to {_words(batch.schema)}",
                hint="a partition has one schema",
            )
        if not batch.num_rows:
            return
        self._whole = False
        self._check(batch)
        with self._room(batch.nbytes):
            if self._writer is None:
                self._file = pa.OSFile(str(self._next() + WRITING), "wb")
                options = pa.ipc.IpcWriteOptions(use_threads=False)
                self._writer = pa.ipc.new_file(self._file, batch.schema, options=options)
            self._writer.write_batch(batch)
            if self._file.tell() >= SEGMENT_BYTES:
                self._seal()
        self._whole = True

    def close(self) -> SpoolEnd:
        """Seals the spool.

        Raises:
            DataError: the disk is full.
        """
        assert self._whole, "a write has failed: there is nothing to close"
        with self._room(0):
            if self._writer is not None:
                self._seal()
            end = SpoolEnd(
                self._rows,
                self._checksum(),
                sum(segment.bytes for segment in self._segments),
                self._layout,
                tuple(self._segments),
            )
            written = self._folder / (END + WRITING)
            written.write_text(json.dumps(asdict(end), indent=1))
            written.replace(self._folder / END)
        return end

    def _check(self, batch: pa.RecordBatch) -> None:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            _, shape = self._layout.get(name, ("", None))
            place = replace(self._place, column=name, first_row=self._place.first_row + self._rows)
            values = dense(column, place, shape)
            self._layout[name] = (str(values.dtype), values.shape[1:])
            data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self._sums[name] = zlib.crc32(data.data, self._sums.get(name, 0))
        self._rows += batch.num_rows

    def _checksum(self) -> str:
        columns = [(name, *self._layout[name], self._sums[name]) for name in sorted(self._sums)]
        return f"{zlib.crc32(json.dumps([self._rows, columns]).encode()):08x}"

    def _next(self) -> str:
        return str(self._folder / f"{len(self._segments):06d}.arrow")

    def _seal(self) -> None:
        self._writer.close()
        self._file.close()
        path = self._next()
        os.replace(path + WRITING, path)
        rows = self._rows - self._sealed_rows
        self._segments.append(Segment(os.path.basename(path), rows, os.path.getsize(path)))
        self._sealed_rows, self._writer, self._file = self._rows, None, None

    @contextlib.contextmanager
    def _room(self, need_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            written = sum(segment.bytes for segment in self._segments)
            free = shutil.disk_usage(self._folder).free
            raise DataError(
                f"{self._place.where}: cannot write {need_bytes:,} bytes after row {self._rows} "
                f"into {self._folder}: {error} ({written:,} bytes written, {free:,} free)",
                hint="a worker keeps its partitions on local disk: make room there, or set "
                "spark.local.dir (SPARK_LOCAL_DIRS) to a larger disk",
            ) from error


class Spool:
    """A closed spool, mapped into memory: what is read of it is not copied.

    Arguments:
        folder: of the spool.

    Raises:
        DataError: it is not closed, or a segment is missing, too many, or not as it was written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self.end = self._read_end()
        expected = [segment.name for segment in self.end.segments]
        there = sorted(path.name for path in self._folder.glob("*.arrow"))
        for name in sorted({*expected} ^ {*there}):
            what = "is missing" if name in expected else "is not of this spool"
            raise self._damaged(name, f"{what}: expected {len(expected)} segments")
        self._batches = [batch for segment in self.end.segments for batch in self._map(segment)]

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
        """Rows [start, stop) of the partition, batch by batch; stop None is its end."""
        first, stop = 0, self.end.rows if stop is None else stop
        for batch in self._batches:
            low, high = max(start - first, 0), min(stop - first, batch.num_rows)
            if low < high:
                yield batch.slice(low, high - low)
            first += batch.num_rows

    def _read_end(self) -> SpoolEnd:
        try:
            values = json.loads((self._folder / END).read_text())
            return SpoolEnd(
                values["rows"],
                values["checksum"],
                values["bytes"],
                {name: (dtype, tuple(shape)) for name, (dtype, shape) in values["layout"].items()},
                tuple(Segment(**segment) for segment in values["segments"]),
            )
        except FileNotFoundError as error:
            raise self._damaged(END, "is missing: the spool was never closed") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(END, f"cannot be read: {error}") from error

    def _map(self, segment: Segment) -> list[pa.RecordBatch]:
        import pyarrow as pa

        path = self._folder / segment.name
        if (size := path.stat().st_size) != segment.bytes:  # reading past the end is a SIGBUS
            raise self._damaged(segment.name, f"has {size} bytes: expected {segment.bytes}")
        try:
            options = pa.ipc.IpcReadOptions(use_threads=False)
            # As a buffer, since Arrow reads files with threads of its own, even mapped ones.
            mapped = pa.memory_map(str(path)).read_buffer()
            reader = pa.ipc.open_file(mapped, options=options)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(segment.name, f"cannot be read: {error}") from error
        rows = sum(batch.num_rows for batch in batches)
        if rows != segment.rows:
            raise self._damaged(segment.name, f"has {rows} rows: expected {segment.rows}")
        return batches

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(
            f"{self._folder / name} {what}",
            hint="a spool is nobody's to change; run again to have it written anew",
        )


def _words(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)
