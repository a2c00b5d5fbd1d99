"""Spools as records: the segments that are sealed, mapped, and rows taken from them.

A shard has the rows of several spools in order. Some are still being written, some are not there
yet: what has come so far, in order and without gaps, is there to be taken; `SpoolRecords.wait`
waits for more. Each segment is a window of the first epoch's order (see `order`).

Rows are gathered where they lie (see `gather`): a batch costs one fancy index for each field.

torch is imported inside the functions that use it, for agents on Spark have none.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.feed.folder import LOCK
from penstock.feed.gather import Blocks, runs_at
from penstock.feed.manifest import Part
from penstock.feed.segment import Field, MappedSegment, Ragged, fields_in_words
from penstock.feed.spool import Spool, SpoolEnd

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.02
"""From one look for more rows to the next."""


Take: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.int64]], Any]
"""Of rows' numbers and blocks, as `Blocks.take` has them, the tensor of a field."""


class NotYet(Exception):
    """It is not known yet which spool is next, or whether there is one."""


class SpoolRecords:
    """The records of a shard: the rows of its spools, one after the other.

    `len`, `whole` and `windows` look for what has come, as long as not all has: a few calls of the
    system.

    Arguments:
        folder: of the n-th spool, which may not be there yet; None when there is no n-th. Raises
            NotYet when that is not known.
        where: names the data, for messages.
        grace_s: how long the spool of a writer that has died may stay until another takes its
            place; then it is an error.
        alive: a file that is touched as long as someone reads for us, wherever it has come to.
    """

    def __init__(
        self,
        folder: Callable[[int], Path | None],
        where: str,
        *,
        grace_s: float = 0.0,
        alive: Path | None = None,
    ) -> None:
        self._folder, self._where, self._grace_s = folder, where, grace_s
        self._alive = alive
        self._seen: list[int | None] = []  # when it, and the last spool's lock, were touched
        self._looking = threading.Lock()
        self._spools: list[Spool] = []
        self._counted = 0  # segments of the last spool that are in the arrays below
        self._whole = False
        self._windows = np.zeros(1, np.int64)
        self._first = np.zeros(1, np.int64)  # row of each block, and of what is yet to come
        self._addresses: dict[str, NDArray[np.int64]] = {}  # (1 or 2, blocks)
        self._fields: Mapping[str, Field] = {}
        self._takes: dict[str, Take] = {"x": _no_rows, "y": _no_rows}

    def __len__(self) -> int:
        """Rows that can be taken."""
        self._look()
        return int(self._windows[-1])

    @property
    def whole(self) -> bool:
        """All rows have come."""
        self._look()
        return self._whole

    @property
    def windows(self) -> NDArray[np.int64]:
        """The first row of each window there is, and how many rows there are; (windows + 1,)."""
        self._look()
        return self._windows

    def wait(self, rows: int, timeout_s: float, over: Callable[[], bool] = lambda: False) -> None:
        """Returns when so many rows have come, or all.

        Arguments:
            timeout_s: how long nothing may come.
            over: whether nobody wants them any more; returns then, too.

        Raises:
            DataError: a spool's writer has died, or said why it gave up (which may be an error of
                another kind); a spool is damaged; or the time is over.
        """
        now = time.monotonic()
        give_up, pause_s, lived, seen = now + timeout_s, FIRST_PAUSE_S, now, -1
        while (there := len(self)) < rows and not self._whole and not over():
            now = time.monotonic()
            if there != seen or self._grows():
                seen, give_up = there, now + timeout_s
            if not self._spools or self._spools[-1].lives():
                lived = now
            elif now >= lived + self._grace_s:
                raise self._spools[-1].died()
            if now >= give_up:
                raise self._late(rows, timeout_s)
            time.sleep(min(pause_s, max(give_up - now, 0.0)))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def take(self, rows: NDArray[np.int64]) -> tuple[Any, Any]:
        """The rows of these numbers, in this order: fields x and y.

        Returns:
            Fresh tensors, (len(rows), *shape); a Ragged for a field of rows of unequal length.
            Without any spool that has rows, (0,) float32.

        Raises:
            IndexError: a row has not come yet.
        """
        try:
            return self._take(rows)
        except IndexError:
            self._look()
        try:
            return self._take(rows)
        except IndexError:
            asked = f"rows {rows.min()} to {rows.max()}"
            raise IndexError(f"{self._where}: {asked}: {len(self)} have come") from None

    def parts(self, numbers: Sequence[int]) -> list[Part]:
        """What the partitions of these numbers held, a spool for each; once all rows have come."""
        return [
            Part(
                partition=number,
                rows=end.rows,
                checksum=end.checksum,
                layout=fields_in_words(end.fields),
            )
            for number, end in zip(numbers, self.ends(), strict=True)
        ]

    def ends(self) -> list[SpoolEnd]:
        """What each spool holds; once all rows have come."""
        assert self._whole
        return [spool.end for spool in self._spools if spool.end is not None]

    def _take(self, rows: NDArray[np.int64]) -> tuple[Any, Any]:
        # `_first` before `_takes`, which may know of more blocks by then, but not of other ones.
        block = self._first.searchsorted(rows, "right")
        return self._takes["x"](rows, block), self._takes["y"](rows, block)

    def _grows(self) -> bool:
        """Whether its writer, or whoever reads for it, has been seen at work since the last look.

        Segments come late where rows are small and slow.
        """
        seen = []
        for path in (self._spools[-1].folder / LOCK if self._spools else None, self._alive):
            with contextlib.suppress(OSError):
                seen.append(None if path is None else path.stat().st_mtime_ns)
        changed, self._seen = seen != self._seen, seen
        return changed

    def _late(self, rows: int, timeout_s: float) -> DataError:
        last = "no spool is known yet"
        if self._spools:
            last = f"{self._spools[-1].folder} has {self._spools[-1].rows}"
        return DataError(
            f"{self._where}: {self._windows[-1]} rows have come, and no more in {timeout_s:g} s: "
            f"expected {rows}; {last}",
            hint="whoever reads the data is slow, or stuck: look into its log",
        )

    def _look(self) -> None:
        if not self._whole:
            with self._looking:
                self._look_further()

    def _look_further(self) -> None:
        while not self._whole:
            if self._spools:
                spool = self._spools[-1]
                spool.refresh()
                if fresh := spool.mapped[self._counted :]:
                    self._add(fresh, spool.folder)
                if spool.end is None:
                    return
            try:
                folder = self._folder(len(self._spools))
            except NotYet:
                return
            if folder is None:
                self._whole = True
            else:
                self._spools.append(Spool(folder, self._where))
                self._counted = 0

    def _add(self, segments: list[MappedSegment], folder: Path) -> None:
        fields = segments[0].fields  # a spool has but one kind of rows
        if self._fields and fields != self._fields:
            raise DataError(
                f"{self._where}: rows of {folder} are {fields_in_words(fields)}, those before "
                f"{fields_in_words(self._fields)}: expected one size",
                hint="pad, cut or resize them to one size, with one dtype",
            )
        self._fields = fields
        self._counted += len(segments)
        blocks = [block for segment in segments for block in segment.blocks]
        rows = self._first[-1] + np.cumsum([block.rows for block in blocks])
        first = np.concatenate([self._first, rows])
        for name, field in fields.items():
            fresh = np.array([block.addresses[name] for block in blocks], np.int64).T
            known = self._addresses.get(name, fresh[:, :0])
            self._addresses[name] = np.concatenate([known, fresh], axis=1)
            self._takes[name] = _taking(field, first, *self._addresses[name])
        ends = self._first[-1] + np.cumsum([segment.rows for segment in segments])
        self._windows = np.concatenate([self._windows, ends])
        self._first = first  # last: `take` goes by it


def _taking(field: Field, first: NDArray[np.int64], *addresses: NDArray[np.int64]) -> Take:
    """What gathers a field from blocks at these addresses, two for each where it is ragged."""
    import torch

    if not field.ragged:
        dense = Blocks(first, addresses[0], (field.dtype, field.shape))
        return lambda rows, block: torch.from_numpy(dense.take(rows, block))
    spans = Blocks(first, addresses[0], ("int64", (2,)), stride=8)  # where a row begins, and ends

    def take(rows: NDArray[np.int64], block: NDArray[np.int64]) -> Ragged:
        starts, stops = spans.take(rows, block).T
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(stops - starts, out=offsets[1:])
        return Ragged(offsets, runs_at(addresses[1][block - 1] + starts, stops - starts))

    return take


def _no_rows(rows: NDArray[np.int64], block: NDArray[np.int64]) -> Any:
    import torch

    if len(rows):
        raise IndexError("there are no rows")
    return torch.empty(0)
