"""Where a spool's segments end: a function of the sizes of its rows, and not of how they came.

Rows of one size: a segment has exactly

    window_rows = the largest power of two with window_rows * bytes of a row <= 16 MiB,
                  but 64 at least and 65,536 at most

Rows of unequal length: it ends before the first row with which it would be of n rows and b bytes
other than

    n <= 65,536   and   b <= 16 MiB for n > 64,  b <= 64 MiB for 1 < n <= 64

A first row says nothing of the others there, and training waits for the first segment: hence bytes.
Up to 64 rows may take more of them, since fewer are little to shuffle. A row of more than 64 MiB
has a segment to itself. A segment is known to have ended when the next row comes, or none does.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from penstock.feed.segment import Ragged, Values

WINDOW_BYTES = 16 * 2**20
FEW_ROWS_BYTES = 4 * WINDOW_BYTES
"""Of no more than SMALLEST_WINDOW rows, where they are of unequal length."""
SMALLEST_WINDOW, LARGEST_WINDOW = 64, 65_536
OFFSET_BYTES = 8
"""What a row of unequal length takes besides its own bytes."""


class Windows:
    """The windows of rows that come a few at a time, and the batches that those are written in.

    Arguments:
        first: some rows, which are still to come (`cuts`); the first of them says how large a
            window of rows of one size is.
        batch_bytes: of a batch, at most, unless a single row is larger.

    Attributes:
        window_rows: rows of a window: exactly so many, or at most where they are of unequal length.
    """

    def __init__(self, first: Values, batch_bytes: int) -> None:
        self._batch_bytes = batch_bytes
        self._rows = self._bytes = 0  # of the window that is open
        self._ragged = any(isinstance(value, Ragged) for value in first.values())
        if self._ragged:
            self.window_rows = LARGEST_WINDOW
            return
        row_bytes = max(int(_bytes_before(first, 1)[1]), 1)
        window = 1 << max((WINDOW_BYTES // row_bytes).bit_length() - 1, 0)
        self.window_rows = min(max(window, SMALLEST_WINDOW), LARGEST_WINDOW)
        self._batch_rows = max(batch_bytes // row_bytes, 1)

    def cuts(self, values: Values) -> Iterator[tuple[int, int, bool]]:
        """Cuts the next rows into batches, each of one window.

        Returns:
            Rows [start, stop) of `values`, one batch after the other, and whether the window ends
            with them. No rows end one that ended with those before, as is seen only now.
        """
        rows = len(next(iter(values.values())))
        before = _bytes_before(values, rows) if self._ragged else None
        start = 0
        while start < rows:
            if before is None:
                end = start + self.window_rows - self._rows
                stop = min(start + self._batch_rows, end, rows)
            else:
                end = self._end(before, start)
                batch = _last(before, int(before[start]) + self._batch_bytes)
                stop = min(max(batch, start + 1), end, rows)
                self._bytes += int(before[stop] - before[start])
            self._rows += stop - start
            # Where no row of these follows `end`, a later one may still fit.
            ends = self._rows == self.window_rows or (stop == end < rows)
            if ends:
                self._rows = self._bytes = 0
            yield start, stop, ends
            start = stop

    def _end(self, before: NDArray[np.int64], start: int) -> int:
        """Where the open window ends, as far as the rows from `start` on tell: not before it."""
        began = int(before[start]) - self._bytes  # where the window did, as `before` counts
        end = _last(before, began + WINDOW_BYTES)
        few = min(_last(before, began + FEW_ROWS_BYTES), start + SMALLEST_WINDOW - self._rows)
        least = start if self._rows else start + 1
        return min(max(end, few, least), start + LARGEST_WINDOW - self._rows)


def _last(before: NDArray[np.int64], most: int) -> int:
    """How many rows there are before so many bytes are passed; -1 if the first is beyond them."""
    return int(before.searchsorted(most, "right")) - 1


def _bytes_before(values: Values, rows: int) -> NDArray[np.int64]:
    """The bytes before each of the first rows, and of all of them; (rows + 1,), as `raw` has them.

    Rising, where a field is ragged.
    """
    found, each = np.zeros(rows + 1, np.int64), 0
    for value in values.values():
        if isinstance(value, Ragged):
            found += value.offsets[: rows + 1] - value.offsets[0]
            each += OFFSET_BYTES
        else:
            each += value[:1].nbytes
    return found + each * np.arange(rows + 1)
