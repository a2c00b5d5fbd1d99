"""Records from a map-style dataset: anything that has a length and gives a pair for an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.feed.arrays import record_ids
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.source import Records, Source, Tensors


def dataset(torch_map_style_dataset: Any) -> Source:
    """Records from an object with `__len__` and `__getitem__`, such as a torch `Dataset`.

    Record i is `object[i]`, a pair (features, target), read where it is used. Torch's
    `default_collate` makes a batch of records; a pair's half may be a number, an array, a tensor,
    or a tuple or dict of those.

    Raises:
        DataError: the object is not such a dataset; from `manifest()` when record 0 is not such a
            pair; from `take()` for a record that cannot be read or does not fit the others.
    """
    from torch.utils.data import IterableDataset

    kind = type(torch_map_style_dataset).__name__
    if isinstance(torch_map_style_dataset, IterableDataset):
        raise DataError(
            f"dataset: {kind} is an IterableDataset: its records have no numbers",
            hint="give a map-style dataset, with __len__ and __getitem__",
        )
    for method in ("__len__", "__getitem__"):
        if not hasattr(type(torch_map_style_dataset), method):
            raise DataError(
                f"dataset: {kind} has no {method}",
                hint="give a map-style dataset, with __len__ and __getitem__",
            )
    return DatasetSource(torch_map_style_dataset)


class DatasetSource:
    """A map-style dataset, pickled as it is."""

    def __init__(self, records: Any) -> None:
        self._records = records

    def manifest(self) -> Manifest:
        rows = len(self._records)
        if rows:
            _collate(self._records, [0])
        return Manifest((Partition(type(self._records).__name__, rows),))

    def open(self, pieces: Sequence[Piece]) -> Records:
        return DatasetRecords(self._records, record_ids(pieces))

    def describe(self) -> None:
        return None


class DatasetRecords:
    """The records of a map-style dataset with these ids: (records,) int64."""

    draws = True

    def __init__(self, records: Any, ids: NDArray[np.int64]) -> None:
        self._records, self._ids = records, ids

    def __len__(self) -> int:
        return len(self._ids)

    def take(self, rows: NDArray[np.int64]) -> tuple[Tensors, Tensors]:
        ids = self._ids[rows].tolist()
        if ids:
            return _collate(self._records, ids)
        x, y = _collate(self._records, [0])  # for the shapes of an empty batch
        return _empty(x), _empty(y)


def _empty(batch: Tensors) -> Tensors:
    if isinstance(batch, tuple):
        return tuple(tensor[:0] for tensor in batch)
    if isinstance(batch, dict):
        return {name: tensor[:0] for name, tensor in batch.items()}
    return batch[:0]


def _collate(records: Any, ids: list[int]) -> tuple[Tensors, Tensors]:
    from torch.utils.data import default_collate

    pairs = [_pair(records, i) for i in ids]
    try:
        x, y = (default_collate([pair[half] for pair in pairs]) for half in (0, 1))
    except Exception as error:
        raise _misfit(ids, pairs, error) from error
    return _tensors("features", x, ids[0]), _tensors("target", y, ids[0])


def _pair(records: Any, i: int) -> tuple[Any, Any]:
    try:
        record = records[i]
    except Exception as error:
        raise DataError(
            f"dataset: record {i}: {type(records).__name__}.__getitem__ raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(record, (tuple, list)) or len(record) != 2:
        size = f" of {len(record)}" if isinstance(record, (tuple, list)) else ""
        raise DataError(
            f"dataset: record {i} is a {type(record).__name__}{size}: expected a pair "
            "(features, target)",
            hint="several features go into one half: ((a, b), target)",
        )
    return record[0], record[1]


def _misfit(ids: list[int], pairs: list[tuple[Any, Any]], error: Exception) -> DataError:
    """Names the first record that cannot be collated, by itself or with the first of the batch."""
    from torch.utils.data import default_collate

    for i, pair in zip(ids, pairs, strict=True):
        try:
            default_collate([pairs[0], pair])
        except Exception as reason:
            return DataError(
                f"dataset: record {i} cannot be collated"
                f"{f' with record {ids[0]}' if i != ids[0] else ''}: {reason}",
                hint="records must be numbers, arrays or tensors of one shape and dtype",
            )
    return DataError(f"dataset: records {ids} cannot be collated: {error}")


def _tensors(half: str, batch: Any, i: int) -> Tensors:
    """`default_collate` gives a list for a tuple, and strings as they are."""
    from torch import Tensor

    if isinstance(batch, list):
        batch = tuple(batch)
    values = list(batch.values()) if isinstance(batch, dict) else batch
    leaves = values if isinstance(values, (tuple, list)) else (values,)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise DataError(
            f"dataset: the {half} of record {i} are not numbers, arrays or tensors, nor a tuple or "
            "dict of those",
            hint="turn strings into integer codes; do not nest tuples or dicts",
        )
    result: Tensors = batch
    return result
