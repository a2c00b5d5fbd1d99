"""Records that are rows of arrays in memory: `arrays`, and `npz` for a file of them."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError, did_you_mean
from penstock.feed.files import opened
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.source import Records, Source, Tensors

Columns = NDArray[Any] | tuple[NDArray[Any], ...] | dict[str, NDArray[Any]]


def arrays(x: Any, y: Any, *, partitions: Sequence[int] | None = None) -> Source:
    """Records from numpy arrays or torch tensors: record i is `(x[i], y[i])`.

    Nothing is copied unless it must be (a tensor on a GPU, a view with strides, a foreign byte
    order). Dtypes stay as they are: uint8 stays uint8, float64 stays float64.

    Arguments:
        x: features, first dim the record: an array, a tuple of arrays, or a dict of arrays.
        y: target, likewise.
        partitions: rows of each partition (0 is allowed) where partitions are to stay whole, as
            those of a cluster do: partition p then belongs to shard p mod shards. None: the rows
            are divided evenly, whatever the number of shards.

    Raises:
        DataError: lengths differ, partitions do not sum to them, or torch has no such dtype.
    """
    features, target = _columns("x", x), _columns("y", y)
    named = [*_leaves("x", features), *_leaves("y", target)]
    first_name, first = named[0]
    for name, array in named[1:]:
        if len(array) != len(first):
            raise DataError(
                f"{first_name} has {len(first)} rows but {name} has {len(array)}",
                hint="the first dim of every array counts the records",
            )
    return ArraySource(features, target, _manifest(len(first), partitions))


def npz(path: str | os.PathLike[str], x: str = "x", y: str = "y") -> Source:
    """Records from two arrays of a `numpy.savez` file on any fsspec URL. Pickles are refused.

    Arguments:
        path: of the file.
        x: name of the features in it, first dim the record.
        y: name of the target in it, likewise.

    Raises:
        DataError: from `manifest()`, for whatever is wrong with the file.
    """
    return NpzSource(os.fspath(path), x, y)


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Arrays in memory; pickle protocol 5 sends them out of band."""

    x: Columns
    y: Columns
    _manifest: Manifest

    def manifest(self) -> Manifest:
        return self._manifest

    def open(self, pieces: Sequence[Piece]) -> Records:
        return ArrayRecords(self.x, self.y, record_ids(pieces))

    def describe(self) -> None:
        return None


class ArrayRecords:
    """Rows of C-contiguous arrays.

    Arguments:
        x: arrays whose rows are the features.
        y: arrays whose rows are the target.
        ids: (records,) int64, the row of each record in those arrays; None: they are the records.
    """

    def __init__(self, x: Columns, y: Columns, ids: NDArray[np.int64] | None = None) -> None:
        self._x, self._y, self._ids = x, y, ids

    def __len__(self) -> int:
        return len(next(_leaves("y", self._y))[1]) if self._ids is None else len(self._ids)

    def take(self, rows: NDArray[np.int64]) -> tuple[Tensors, Tensors]:
        if self._ids is not None:
            rows = self._ids.take(rows)
        return _gather(self._x, rows), _gather(self._y, rows)


class NpzSource:
    """A file; each process reads it for itself."""

    def __init__(self, path: str, x: str, y: str) -> None:
        self._path, self._x, self._y = path, x, y
        self._loaded: tuple[NDArray[Any], NDArray[Any]] | None = None

    def manifest(self) -> Manifest:
        self._loaded = self._load()
        return Manifest((Partition(os.path.basename(self._path), len(self._loaded[1])),))

    def open(self, pieces: Sequence[Piece]) -> Records:
        x, y = self._loaded or self._load()
        return ArrayRecords(rows_of(x, pieces), rows_of(y, pieces))

    def describe(self) -> dict[str, Any]:
        return {"npz": {"path": self._path, "x": self._x, "y": self._y}}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaded": None}

    def _load(self) -> tuple[NDArray[Any], NDArray[Any]]:
        with opened(self._path) as file:
            try:
                archive = np.load(file, allow_pickle=False)
            except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
                raise self._not_npz(str(error)) from error
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise self._not_npz("it holds a single array")
            x, y = self._array(archive, self._x), self._array(archive, self._y)
        if len(x) != len(y):
            raise DataError(
                f"{self._path}: {self._x!r} has {len(x)} rows but {self._y!r} has {len(y)}",
                hint="the first dim of both arrays counts the records",
            )
        return x, y

    def _array(self, archive: np.lib.npyio.NpzFile, key: str) -> NDArray[Any]:
        if key not in archive.files:
            raise DataError(
                f"{self._path}: no array {key!r}; it holds: {', '.join(archive.files)}",
                hint=did_you_mean(key, archive.files) or "name the arrays with x: and y:",
            )
        try:
            array = archive[key]
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{self._path}: array {key!r} cannot be read: {error}") from error
        return _array(f"{self._path}: {key!r}", array)

    def _not_npz(self, why: str) -> DataError:
        return DataError(
            f"{self._path}: not an .npz file: {why}",
            hint="write it with numpy.savez(path, x=..., y=...)",
        )


def record_ids(pieces: Sequence[Piece]) -> NDArray[np.int64]:
    """The record ids of these pieces, in order: (rows of the pieces,) int64."""
    runs = [np.arange(p.first_id, p.first_id + p.rows, dtype=np.int64) for p in pieces]
    return np.concatenate([np.empty(0, np.int64), *runs])


def rows_of(array: NDArray[Any], pieces: Sequence[Piece]) -> NDArray[Any]:
    """A copy of the rows of these pieces and no others, where row and record id are the same."""
    runs = [array[p.first_id : p.first_id + p.rows] for p in pieces]
    return np.concatenate([array[:0], *runs])


def _gather(columns: Columns, rows: NDArray[np.int64]) -> Any:
    if isinstance(columns, tuple):
        return tuple(_gather(array, rows) for array in columns)
    if isinstance(columns, dict):
        return {name: _gather(array, rows) for name, array in columns.items()}
    import torch

    return torch.from_numpy(columns.take(rows, axis=0))


def _leaves(name: str, columns: Columns) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(columns, tuple):
        yield from ((f"{name}[{i}]", array) for i, array in enumerate(columns))
    elif isinstance(columns, dict):
        yield from ((f"{name}[{key!r}]", array) for key, array in columns.items())
    else:
        yield name, columns


def _columns(name: str, given: Any) -> Columns:
    if isinstance(given, (tuple, dict)) and not given:
        raise DataError(f"{name} is empty: expected at least one array")
    if isinstance(given, tuple):
        return tuple(_array(f"{name}[{i}]", array) for i, array in enumerate(given))
    if isinstance(given, dict):
        return {key: _array(f"{name}[{key!r}]", array) for key, array in given.items()}
    return _array(name, given)


def _array(name: str, given: Any) -> NDArray[Any]:
    """As a C-contiguous array in native byte order, of a dtype that torch knows."""
    import torch

    try:
        array = given.detach().cpu().numpy() if torch.is_tensor(given) else np.asarray(given)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        torch.from_numpy(np.empty(0, array.dtype))
    except (TypeError, ValueError) as error:
        dtype = getattr(given, "dtype", type(given).__name__)
        raise DataError(
            f"{name} is {dtype}: expected an array of numbers or booleans ({error})",
            hint=f"convert {name} first, for example to float32",
        ) from error
    if array.ndim == 0:
        raise DataError(f"{name} is a single value: expected an array whose first dim is records")
    return np.ascontiguousarray(array)


def _manifest(rows: int, partitions: Sequence[int] | None) -> Manifest:
    if partitions is None:
        return Manifest((Partition("arrays", rows),))
    if any(size < 0 for size in partitions) or sum(partitions) != rows:
        raise DataError(
            f"partitions {list(partitions)} sum to {sum(partitions)}, but there are {rows} rows",
            hint="give sizes of 0 or more that sum to the rows, or leave partitions out",
        )
    named = (Partition(f"arrays-{i}", int(size)) for i, size in enumerate(partitions))
    return Manifest(tuple(named), whole=True)
