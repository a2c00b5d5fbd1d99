"""Records from Parquet files: each row group is a partition, each row a record.

pyarrow is imported inside the functions that use it: its import starts a thread, and worker
processes are forked from a server that must have one thread only.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError, did_you_mean
from penstock.feed.arrays import ArrayRecords
from penstock.feed.files import contents, locate, opened
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.source import Records, Source

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def parquet(url: str | os.PathLike[str], *, features: str | Sequence[str], target: str) -> Source:
    """Records from a Parquet file, a folder of them, or a glob, on any fsspec URL.

    A column of numbers or booleans is a tensor (batch,); lists of one length, nested or not, are
    (batch, d, ...); a fixed-shape tensor is (batch, ...) as it says; binary of one length is
    uint8 (batch, length). Dtypes stay as they are. Only the columns named are read, and a worker
    holds only its own rows, all of them in memory.

    Arguments:
        url: a file; a folder, whose `*.parquet` files count at any depth, save those whose path
            has a part that starts with "_" or "."; or a glob. Files are sorted by path.
        features: a column, taken as its tensor; or several columns of numbers, stacked as float32
            (batch, columns), or as float64 if one of them is. A list of one column of numbers is
            (batch, 1); a list of one other column is that column.
        target: a column, taken as its tensor.

    Raises:
        DataError: from `manifest()` for missing or damaged files, missing columns, and columns of
            other types or of another type in another file; from `open()` for nulls and for lists
            or binary of unequal lengths. Rows are counted from 0 in each file.
    """
    if not features:
        raise DataError("parquet: no feature columns", hint="name at least one in features")
    names = features if isinstance(features, str) else tuple(features)
    return ParquetSource(os.fspath(url), names, target)


@dataclass(frozen=True)
class RowGroup:
    """Row group number `group` of a file; its first row is row `first_row` of the file."""

    path: str
    group: int
    first_row: int
    rows: int


@dataclass(frozen=True)
class Layout:
    """How a row becomes a row of an array: (dtype, shape) of features and of target."""

    x: tuple[np.dtype[Any], tuple[int, ...]]
    y: tuple[np.dtype[Any], tuple[int, ...]]
    stacked: bool


class ParquetSource:
    """Parquet files. What `manifest()` learns of them travels with the source: it is small."""

    def __init__(self, url: str, features: str | tuple[str, ...], target: str) -> None:
        self._url, self._features, self._target = url, features, target
        self._learnt: tuple[tuple[RowGroup, ...], Layout] | None = None

    def manifest(self) -> Manifest:
        groups, _ = self._learnt = self._learn()
        start = len(
            posixpath.commonpath([posixpath.dirname(group.path) for group in groups] or [""])
        )
        return Manifest(
            tuple(
                Partition(f"{group.path[start:].lstrip('/')}#{group.group}", group.rows)
                for group in groups
            )
        )

    def open(self, pieces: Sequence[Piece]) -> Records:
        if self._learnt is None:
            self._learnt = self._learn()
        groups, layout = self._learnt
        rows = sum(piece.rows for piece in pieces)
        x, y = (np.empty((rows, *shape), dtype) for dtype, shape in (layout.x, layout.y))
        names = self._feature_names
        parts = [x[:, i] for i in range(len(names))] if layout.stacked else [x]
        done = 0
        for piece in pieces:  # filled piece by piece: no more than one row group is held twice
            group = groups[piece.partition]
            table = self._read(group).slice(piece.start, piece.rows)
            for name, part in [*zip(names, parts, strict=True), (self._target, y)]:
                place = _Place(group.path, name, group.first_row + piece.start)
                _fill(part[done : done + piece.rows], table.column(name), place)
            done += piece.rows
        return ArrayRecords(x, y)

    def describe(self) -> dict[str, Any]:
        features = self._features if isinstance(self._features, str) else list(self._features)
        return {"parquet": {"url": self._url, "features": features, "target": self._target}}

    @property
    def _feature_names(self) -> list[str]:
        return [self._features] if isinstance(self._features, str) else list(self._features)

    @property
    def _columns(self) -> list[str]:
        return list(dict.fromkeys([*self._feature_names, self._target]))

    def _learn(self) -> tuple[tuple[RowGroup, ...], Layout]:
        """Reads every file's footer, and one row."""
        groups: list[RowGroup] = []
        types: dict[str, pa.DataType] = {}
        paths = _files(self._url)
        for path in paths:
            with _parquet_file(self._url, path) as file:
                for name in self._columns:
                    found = _column_type(file.schema_arrow, _Place(path, name))
                    if found != types.setdefault(name, found):
                        raise _Place(path, name).error(
                            f" is {found}, but {types[name]} in {paths[0]}",
                            "all files must have the same columns; write them anew with one schema",
                        )
                first_row = 0
                for number in range(file.metadata.num_row_groups):
                    rows = file.metadata.row_group(number).num_rows
                    groups.append(RowGroup(path, number, first_row, rows))
                    first_row += rows
        return tuple(groups), self._layout(groups, types, paths[0])

    def _layout(
        self, groups: Sequence[RowGroup], types: dict[str, pa.DataType], path: str
    ) -> Layout:
        import pyarrow as pa

        group = next((group for group in groups if group.rows), None)
        if group is None:
            row = {name: pa.array([], kind) for name, kind in types.items()}
        else:
            path = group.path
            with _parquet_file(self._url, path) as file:
                batch = next(
                    file.iter_batches(
                        batch_size=1,
                        row_groups=[group.group],
                        columns=self._columns,
                        use_threads=False,
                    )
                )
                row = {name: batch.column(name) for name in types}
        arrays = {
            name: _dense(row[name], _Place(path, name, group.first_row if group else 0), None)
            for name in types
        }
        features = [arrays[name] for name in self._feature_names]
        y = arrays[self._target]
        stacked = not isinstance(self._features, str) and all(array.ndim == 1 for array in features)
        if stacked:
            wide = any(array.dtype == np.float64 for array in features)
            dtype = np.dtype(np.float64 if wide else np.float32)
            return Layout((dtype, (len(features),)), (y.dtype, y.shape[1:]), stacked)
        if len(features) > 1:
            name = next(name for name in self._feature_names if arrays[name].ndim > 1)
            raise _Place(path, name).error(
                f" is {types[name]}: several features are stacked, and must be numbers",
                f"name it alone, as features: {name}, or write its values as columns",
            )
        return Layout((features[0].dtype, features[0].shape[1:]), (y.dtype, y.shape[1:]), stacked)

    def _read(self, group: RowGroup) -> pa.Table:
        with _parquet_file(self._url, group.path) as file:
            if (
                group.group >= file.metadata.num_row_groups
                or file.metadata.row_group(group.group).num_rows != group.rows
            ):
                raise DataError(
                    f"{group.path}: row group {group.group} no longer has {group.rows} rows",
                    hint="the file was changed after the run began; start a new run",
                )
            return file.read_row_group(group.group, columns=self._columns, use_threads=False)


@dataclass(frozen=True)
class _Place:
    """Where values come from, for messages. A row of the file holds `per_row` of them."""

    path: str
    column: str
    first_row: int = 0
    per_row: int = 1

    def row(self, value: int) -> int:
        return self.first_row + value // self.per_row

    def error(self, what: str, hint: str) -> DataError:
        return DataError(f"{self.path}: column {self.column!r}{what}", hint=hint)


def _files(url: str) -> list[str]:
    """Paths on the file system of the URL, sorted."""
    fs, root = locate(url)
    if fs.isfile(root):
        return [root]
    if fs.isdir(root):
        found = [path for path in fs.find(root) if path.endswith(".parquet")]
        found = [path for path in found if not _is_hidden(path[len(root) :])]
        if not found:
            raise DataError(f"{url}: no *.parquet file; {contents(fs, root)}")
        return sorted(found)
    matches = [path for path in fs.glob(root) if fs.isfile(path)]
    if not matches:
        raise DataError(
            f"{url}: no such file or folder, and no file matches it; "
            f"{contents(fs, posixpath.dirname(root))}"
        )
    return sorted(matches)


def _is_hidden(path: str) -> bool:
    """As Spark and pyarrow have it: `_temporary`, `.part-0.parquet.crc`."""
    return any(part.startswith(("_", ".")) for part in path.split("/"))


@contextmanager
def _parquet_file(url: str, path: str) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(url, path) as handle:
        try:
            # Without threads, here and in reads: a worker has as many as its plan says, to compute.
            with pq.ParquetFile(handle, pre_buffer=False) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: cannot be read as Parquet: {error}", hint="write or copy it again"
            ) from error


def _column_type(schema: pa.Schema, place: _Place) -> pa.DataType:
    """The type of a column that a tensor can be made of."""
    indices = schema.get_all_field_indices(place.column)
    if not indices:
        raise DataError(
            f"{place.path}: no column {place.column!r}; it has: {', '.join(schema.names)}",
            hint=did_you_mean(place.column, schema.names),
        )
    if len(indices) > 1:
        raise place.error(f" is there {len(indices)} times", "give every column its own name")
    kind = schema.field(indices[0]).type
    _refuse_type(kind, kind, place)
    return kind


def _refuse_type(kind: pa.DataType, column: pa.DataType, place: _Place) -> None:
    import pyarrow as pa

    if pa.types.is_dictionary(kind) or _is_list(kind):
        _refuse_type(kind.value_type, column, place)
    elif isinstance(kind, pa.FixedShapeTensorType):
        _refuse_type(kind.storage_type, column, place)
    elif not (_is_number(kind) or _is_binary(kind)):
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        raise place.error(
            f" is {column}: expected numbers, lists of numbers, or binary",
            "turn strings into integer codes before the file is written"
            if text
            else "cast it to numbers before the file is written",
        )


def _is_number(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_binary(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    )


def _fill(out: NDArray[Any], column: pa.ChunkedArray, place: _Place) -> None:
    """Writes the values of a column, chunk by chunk, into an array with a row for each."""
    done = 0
    for chunk in column.chunks:
        at = replace(place, first_row=place.first_row + done)
        out[done : done + len(chunk)] = _dense(chunk, at, out.shape[1:])
        done += len(chunk)


def _dense(array: pa.Array, place: _Place, shape: tuple[int, ...] | None) -> NDArray[Any]:
    """The values of an Arrow array: (len(array), ...).

    Arguments:
        array: of a type that `_column_type` lets pass.
        place: of its first value.
        shape: of a row, where it is known; else the first value decides it.
    """
    import pyarrow as pa
    from pyarrow.compute import list_value_length

    if array.null_count:
        first = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise place.error(
            f": null in row {place.row(first)}", "fill or drop nulls before the file is written"
        )
    kind = array.type
    if isinstance(kind, pa.FixedShapeTensorType):
        _dense(array.storage, place, None)  # for nulls within a tensor
        return np.asarray(array.to_numpy_ndarray())
    if pa.types.is_dictionary(kind):
        return _dense(array.dictionary_decode(), place, shape)
    if _is_number(kind):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    if _is_binary(kind):
        array = array.cast(pa.large_binary())
        _, offset_buffer, value_buffer = array.buffers()
        offsets = np.frombuffer(offset_buffer, np.int64)[array.offset :][: len(array) + 1]
        length = _common_length(np.diff(offsets), place, shape, "bytes")
        if value_buffer is None or not len(array):
            return np.empty((len(array), length), np.uint8)
        values = np.frombuffer(value_buffer, np.uint8)
        return values[offsets[0] : offsets[-1]].reshape(len(array), length)
    lengths = list_value_length(array).to_numpy(zero_copy_only=False)
    length = _common_length(lengths, place, shape, "values")
    inner = replace(place, per_row=place.per_row * max(length, 1))
    values = _dense(array.flatten(), inner, None if shape is None else shape[1:])
    return values.reshape(len(array), length, *values.shape[1:])


def _common_length(
    lengths: NDArray[Any], place: _Place, shape: tuple[int, ...] | None, noun: str
) -> int:
    if shape is None:
        expected = int(lengths[0]) if len(lengths) else 0
    else:
        expected = shape[0]
    odd = np.flatnonzero(lengths != expected)
    if len(odd):
        raise place.error(
            f": row {place.row(int(odd[0]))} holds {lengths[odd[0]]} {noun}, the first row "
            f"{expected}: expected one length",
            "pad or cut them to one length before the file is written",
        )
    return expected
