"""Where records come from: `Source` (what a Job names) and `Records` (one shard's rows of it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from penstock.feed.manifest import Manifest, Piece

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]"


class Records(Protocol):
    """The rows of some pieces of a source, numbered from 0 in the order of the pieces."""

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
