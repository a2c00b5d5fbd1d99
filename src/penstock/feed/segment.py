"""Segments: the files of a spool, each an Arrow IPC file of tensors' rows.

A field of rows of one size is a column of fixed-size binary: the bytes of each row as an array of
the field's dtype and shape has them (C order). A field of rows of unequal length is a column of
large binary. The schema's metadata says what the columns mean. The last record batch has no rows;
its metadata says how many rows the spool has up to here, their checksum, and that of what came
before: so a segment can be told to follow another, even one that a writer before this one wrote.

Space is reserved before it is written, with write(2): a full disk is an error then and there, and
no SIGBUS in whoever maps the file later. (It is also several times as fast, where the file system
would otherwise put off the allocation.)

pyarrow is imported inside the functions that use it: its import starts a thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

WRITING = ".writing"
"""Ends the names of files that are not whole yet."""
BYTES = "bytes"
"""The dtype of a field of rows of unequal length."""
OVERHEAD_BYTES = 4096
"""Room for the description of a record batch."""
KEY = b"penstock"


@dataclass(frozen=True)
class Field:
    """How a row of a field looks.

    Arguments:
        dtype: NumPy's name, such as "uint8" or "float32"; "bytes" for rows of unequal length.
        shape: of one row; () for bytes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def ragged(self) -> bool:
        return self.dtype == BYTES

    @property
    def row_bytes(self) -> int:
        """Of a field that is not ragged."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape) if self.shape else ''}"


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length: row i is `data[offsets[i] : offsets[i + 1]]`.

    Arguments:
        offsets: (rows + 1,) int64, never falling; need not begin with 0.
        data: uint8.
    """

    offsets: NDArray[np.int64]
    data: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        """The bytes of one row, a view."""
        return self.data[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


Values: TypeAlias = "Mapping[str, NDArray[Any] | Ragged]"
"""Some rows, by field: arrays whose first dim is the row."""


def field_of(value: NDArray[Any] | Ragged) -> Field:
    """How the rows of a value look."""
    if isinstance(value, Ragged):
        return Field(BYTES, ())
    return Field(value.dtype.name, value.shape[1:])


def raw(value: NDArray[Any] | Ragged) -> list[NDArray[np.uint8]]:
    """What makes up some rows, as bytes: of a ragged value, the lengths and what they count."""
    if isinstance(value, Ragged):
        data = value.data[value.offsets[0] : value.offsets[-1]]
        return [value.lengths.view(np.uint8), np.ascontiguousarray(data)]
    native = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
    return [native.reshape(-1).view(np.uint8)]


class SegmentWriter:
    """Writes one segment, which has another name until it is sealed.

    Raises (all its functions):
        OSError: the disk is full, or does not do what it should.
    """

    def __init__(self, path: Path, fields: Mapping[str, Field], window_rows: int) -> None:
        import pyarrow as pa

        self.rows = 0
        self._path, self._fields = path, fields
        self._written = path.with_name(path.name + WRITING)
        kinds = {
            n: pa.large_binary() if f.ragged else pa.binary(f.row_bytes) for n, f in fields.items()
        }
        words = {"window_rows": window_rows, "fields": fields_to_json(fields)}
        self._schema = pa.schema(list(kinds.items()), metadata={KEY: json.dumps(words)})
        self._file = pa.OSFile(str(self._written), "wb")
        # The same file, to take space for it.
        self._space = open(self._written, "r+b", buffering=0)  # noqa: SIM115
        options = pa.ipc.IpcWriteOptions(use_threads=False)
        self._writer = pa.ipc.new_file(self._file, self._schema, options=options)

    def write(self, rows: int, parts: Mapping[str, Sequence[NDArray[np.uint8]]]) -> None:
        """Appends so many rows, by field as `raw` gives them."""
        import pyarrow as pa

        need = OVERHEAD_BYTES + sum(part.nbytes for field in parts.values() for part in field)
        reserve(self._space.fileno(), self._file.tell(), need)
        columns = []
        for field in self._schema:
            *lengths, data = parts[field.name]
            buffers = [None, pa.py_buffer(data)]
            if lengths:
                offsets = np.zeros(rows + 1, np.int64)
                np.cumsum(lengths[0].view(np.int64), out=offsets[1:])
                buffers.insert(1, pa.py_buffer(offsets))
            columns.append(pa.Array.from_buffers(field.type, rows, buffers))
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self.rows += rows

    def seal(self, **words: Any) -> int:
        """Ends the file with `words` (JSON values) and gives it its name; returns its bytes."""
        import pyarrow as pa

        none = pa.RecordBatch.from_pylist([], schema=self._schema)
        reserve(self._space.fileno(), self._file.tell(), OVERHEAD_BYTES)
        self._writer.write_batch(none, custom_metadata={KEY: json.dumps(words)})
        self._writer.close()
        size = int(self._file.tell())
        self._file.close()
        self._space.truncate(size)
        self._space.close()
        self._written.replace(self._path)
        return size

    def discard(self) -> None:
        """Takes back what was written; not after `seal`."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._space.close()
        self._written.unlink(missing_ok=True)


@dataclass(frozen=True)
class Block:
    """Rows that lie side by side in memory.

    Arguments:
        rows: how many.
        addresses: by field, where they begin; of a ragged field where the offsets begin and
            where the data does.
    """

    rows: int
    addresses: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MappedSegment:
    """A sealed segment in memory. Its blocks are good as long as `owner` is kept.

    Arguments:
        words: those that it was sealed with.
    """

    rows: int
    bytes: int
    window_rows: int
    fields: Mapping[str, Field]
    words: Mapping[str, Any]
    blocks: tuple[Block, ...]
    owner: object


def map_segment(path: Path) -> MappedSegment:
    """Maps a sealed segment.

    Raises:
        OSError, ValueError: it cannot be read, or is no segment; KeyError too, and what Arrow
            raises is a ValueError or an OSError.
    """
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(use_threads=False)
    with pa.memory_map(str(path)) as file:
        # As a buffer, since Arrow reads files with threads of its own, even mapped ones.
        mapped = file.read_buffer()
    reader = pa.ipc.open_file(mapped, options=options)
    words = json.loads((reader.schema.metadata or {})[KEY])
    fields = fields_from_json(words["fields"])
    last = reader.num_record_batches - 1
    blocks = tuple(_block(reader.get_batch(i), fields) for i in range(last))
    _, ending = reader.get_batch_with_custom_metadata(last)
    return MappedSegment(
        sum(block.rows for block in blocks),
        mapped.size,
        words["window_rows"],
        fields,
        json.loads(ending[KEY]),
        blocks,
        mapped,
    )


def fields_in_words(fields: Mapping[str, Field]) -> str:
    return ", ".join(f"{name}: {field}" for name, field in fields.items())


def fields_to_json(fields: Mapping[str, Field]) -> dict[str, Any]:
    return {name: [field.dtype, list(field.shape)] for name, field in fields.items()}


def fields_from_json(words: Mapping[str, Any]) -> dict[str, Field]:
    return {name: Field(dtype, tuple(shape)) for name, (dtype, shape) in words.items()}


def reserve(fd: int, start: int, need_bytes: int) -> None:
    """Takes space for a file, from `start` on.

    Raises:
        OSError: the disk has no more. (One that cannot reserve is no error.)
    """
    try:
        os.posix_fallocate(fd, start, need_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _block(batch: pa.RecordBatch, fields: Mapping[str, Field]) -> Block:
    """Where the columns of a batch lie: within what was mapped, or it is a ValueError."""
    addresses = {}
    for name, field in fields.items():
        column = batch.column(name)
        places = [(b.address, b.size) if b else (0, 0) for b in column.buffers()[1:]]
        if field.ragged:
            offsets = np.frombuffer(column.buffers()[1], np.int64)[: batch.num_rows + 1]
            fits = len(offsets) == batch.num_rows + 1 and offsets[0] >= 0
            fits = fits and bool((np.diff(offsets) >= 0).all()) and offsets[-1] <= places[1][1]
        else:
            fits = places[0][1] >= batch.num_rows * field.row_bytes
        if not fits or column.offset or column.null_count:
            raise ValueError(f"field {name!r} is not as long as it says")
        addresses[name] = tuple(address for address, _ in places)
    return Block(batch.num_rows, addresses)
