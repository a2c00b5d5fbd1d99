"""Where records come from: `Source` (what a Job names) and `Records` (one shard's rows of it)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from penstock.feed.manifest import Manifest, Part, Piece

if TYPE_CHECKING:
    import torch

    from penstock.feed.spooled import SpoolRecords

Tensors: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]"


@dataclass(frozen=True)
class Rows:
    """Some records on their way to a batch.

    Arguments:
        x, y: features and target: tensors, or what a stage is yet to make tensors of; first dim
            the record.
        ids: record ids, (records,) int64.
    """

    x: Any
    y: Any
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """A function that every batch passes on its way to training; picklable.

    Arguments:
        name: of the stage, for people.
        apply: called with the rows and a random generator that belongs to them (a function of
            seed, epoch, shard and place in the order, so that the result is the same whoever
            works); gives the rows that go on. Rows that it leaves out are left out of all three.
        workers: threads that may be in it at once.
    """

    name: str
    apply: Callable[[Rows, np.random.Generator], Rows]
    workers: int = 1


class Records(Protocol):
    """The rows of some pieces of a source, numbered from 0 in the order of the pieces.

    Those whose `take` may draw from global random generators have `draws`, which is true: they are
    taken by the thread that trains, while it has their shard's random state.
    """

    def __len__(self) -> int: ...

    def take(self, rows: NDArray[np.int64]) -> tuple[Tensors, Tensors]:
        """The batch of these rows, in this order: features and target on the CPU.

        Tensors are fresh (the caller may keep and change them); their first dim is `len(rows)`.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """A description of data that any worker can open; picklable and small.

    (In-memory arrays are pickled out of band, so that workers of one machine share them.)
    It may have `stages`, a tuple of `Stage`: batches pass them in this order.
    """

    def manifest(self) -> Manifest:
        """Its partitions and their rows.

        Called once by the driver before anything starts; what is wrong with the data as a whole
        (missing or truncated file, wrong column) is a `DataError` here.
        """
        ...

    def open(self, pieces: Sequence[Piece]) -> Records:
        """The records of these pieces, in this order. Called by the worker that trains on them."""
        ...

    def describe(self) -> dict[str, Any] | None:
        """What a Job file would say, such as `{"mnist": {"split": "train"}}`; None if it cannot."""
        ...


@runtime_checkable
class Stream(Source, Protocol):
    """A source whose records nobody has counted before they are read: its manifest is open.

    Its partitions stay whole, and partition p is shard p mod shards' own.
    """

    def open_shard(self, shard: int, shards: int) -> SpoolRecords:
        """The records of a shard, which may be yet to come: a spool for each of its partitions."""
        ...

    def parts(self, shard: int, shards: int, records: SpoolRecords) -> list[Part]:
        """What the shard's partitions held, once all have come."""
        ...
