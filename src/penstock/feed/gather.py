"""Rows that lie in many blocks of memory at once, gathered by their addresses.

Row r of block b lies at `addresses[b] + (r - first[b]) * row_bytes`. All rows of a batch, from
however many blocks, are one fancy index: into a view whose element i is the `row_bytes` bytes at
`lowest address + i` (its elements overlap: one begins at every byte), by `address - lowest`. So it
costs what `ndarray.take` on a single array costs. Nothing but the rows asked for is touched.

Addresses are trusted: whoever gives them keeps the memory, and has checked that the rows lie in it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 2**63 - 1
"""NumPy has no arrays of more bytes, not even as views whose elements overlap."""


class Blocks:
    """Blocks of rows of one length.

    Arguments:
        first: the first row of each block, and the end of the last, (blocks + 1,).
        addresses: where each block begins, (blocks,).
        row: dtype and shape of what to gather of a row.
        stride: bytes from the beginning of a row to that of the next; without it, those of `row`.
    """

    def __init__(
        self,
        first: NDArray[np.int64],
        addresses: NDArray[np.int64],
        row: tuple[str, tuple[int, ...]],
        stride: int | None = None,
    ) -> None:
        dtype, self._shape = row
        self._dtype = np.dtype(dtype)
        self._row_bytes = self._dtype.itemsize * math.prod(self._shape)
        self._stride = self._row_bytes if stride is None else stride
        counts = np.diff(first)
        filled = np.flatnonzero(counts)
        lasts = addresses[filled] + self._stride * (counts[filled] - 1)
        self._lowest = int(addresses[filled].min(initial=LARGEST))
        places = int(lasts.max(initial=self._lowest)) - self._lowest + 1
        # Where row 0 would lie if all blocks were as this one is. In front, what is no place.
        origins = addresses - self._stride * first[:-1] - self._lowest
        self._origins = np.concatenate([[LARGEST // 2], origins])
        self._view = None
        if 0 < places * self._row_bytes <= LARGEST:
            self._view = np.asarray(_Bytes(self._lowest, places, f"|V{self._row_bytes}"))

    def take(self, rows: NDArray[np.int64], block: NDArray[np.int64]) -> NDArray[Any]:
        """Some rows.

        Arguments:
            rows: their numbers, in any order.
            block: `first.searchsorted(rows, "right")`.

        Returns:
            (len(rows), *shape), fresh.

        Raises:
            IndexError: there is no such row.
        """
        places = rows * self._stride
        places += self._origins.take(block)
        if self._view is not None:
            found = self._view[places]
        else:  # without bytes; or so large and so far apart that a loop costs them nothing
            if not block.all():
                raise IndexError("a row before the first")
            found = runs_at(places + self._lowest, np.full(len(rows), self._row_bytes))
        return found.view(self._dtype).reshape(len(rows), *self._shape)


def runs_at(addresses: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Rows of unequal length, one behind the other.

    Arguments:
        addresses, lengths: of the rows, in any order, (rows,).

    Returns:
        (sum of lengths,), fresh.
    """
    filled = np.flatnonzero(lengths)
    if not len(filled):
        return np.empty(0, np.uint8)
    starts, stops = addresses[filled], addresses[filled] + lengths[filled]
    lowest = int(starts.min())
    memory = np.asarray(_Bytes(lowest, int(stops.max()) - lowest, "|u1")).data
    runs = zip((starts - lowest).tolist(), (stops - lowest).tolist(), strict=True)
    return np.frombuffer(bytearray().join([memory[a:b] for a, b in runs]), np.uint8)


class _Bytes:
    """Memory from `address` on, as NumPy takes it: an element begins at every byte."""

    def __init__(self, address: int, places: int, kind: str) -> None:
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address, True),  # read only
            "shape": (places,),
            "strides": (1,),
            "typestr": kind,
        }
