"""Spools: a partition's rows on local disk, read while they are written.

A spool is a folder (see `folder`) of segments (see `segment`). A segment is also the window within
which the first epoch is shuffled. So where it ends is a function of the data and not of how rows
came (see `windows`).

A reader maps sealed segments and looks for later ones by name. One that finds neither an end nor a
held lock knows that the writer has died: that is an error, and never a short epoch. It goes by the
folder's path alone, which may be a link that is turned to another spool of the same rows: what it
has mapped stays good, and each segment says what rows it follows.

Nothing is flushed to the medium: a spool outlives its writer and no crash of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError, PenstockError
from penstock.feed.folder import (
    END,
    FAILED,
    LOCK,
    Segment,
    SpoolEnd,
    SpoolFolder,
    damaged,
    failure,
    segment_name,
    writer_lives,
)
from penstock.feed.segment import (
    WRITING,
    Field,
    MappedSegment,
    Ragged,
    SegmentWriter,
    Values,
    field_of,
    fields_in_words,
    map_segment,
    raw,
)
from penstock.feed.windows import Windows

__all__ = [
    "END",
    "FAILED",
    "LOCK",
    "WRITING",
    "Field",
    "Ragged",
    "Segment",
    "Spool",
    "SpoolEnd",
    "SpoolFolder",
    "SpoolWriter",
    "Values",
    "segment_name",
    "writer_lives",
]

BATCH_BYTES = 4 * 2**20
"""Rows are written in batches of about this, and smaller ones are collected: little memory, and
few blocks among which a row is to be found. (The speed of writing does not depend on it.)"""
LARGER_DISK = (
    "make room there, or choose a larger disk: PENSTOCK_SPOOL names the folder, on Spark "
    "spark.local.dir (SPARK_LOCAL_DIRS) does"
)


class SpoolWriter:
    """Writes a partition's spool. In memory it has no more than a batch or a row of its own.

    Whatever it raises, readers are told of.

    Arguments:
        folder: of the spool; made here.
        where: names the data, for messages.
        need_bytes: what all rows will take, if that is known.

    Raises:
        DataError: the folder holds a closed spool, or another writes there; or the disk has less
            room than is needed.
    """

    def __init__(
        self, folder: str | os.PathLike[str], where: str, *, need_bytes: int | None = None
    ) -> None:
        self._folder = SpoolFolder(folder, where)
        self._need_bytes = need_bytes
        self._fields: dict[str, Field] = {}
        self._sums: dict[str, list[int]] = {}
        self._rows = 0
        self._windows: Windows | None = None
        self.segments: list[Segment] = []
        """Those that are sealed."""
        self._segment: SegmentWriter | None = None
        self._small: dict[str, list[bytearray]] = {}
        self._small_rows = self._small_bytes = 0
        if (need_bytes or 0) > (free := shutil.disk_usage(self._folder.path).free):
            error = self._full(f"{need_bytes:,} bytes are needed, {free:,} are free")
            self.fail(error)
            raise error

    def write(self, values: Values) -> None:
        """Appends rows: by field, the same number of each.

        Raises:
            DataError: a field is of another dtype or shape than before, or the disk is full.
        """
        rows = len(next(iter(values.values())))
        assert all(len(value) == rows for value in values.values())
        if not rows:
            return
        with self._telling():
            self._folder.touch()
            self._check(values)
            self._windows = self._windows or Windows(values, BATCH_BYTES)
            for start, stop, ends in self._windows.cuts(values):
                if start < stop:
                    self._append(stop - start, values, start)
                if ends:
                    self._seal()

    def close(self) -> SpoolEnd:
        """Seals the spool.

        Raises:
            DataError: the disk is full.
        """
        with self._telling():
            if self._small_rows or self._segment is not None:
                self._seal()
            checksum = _checksum(self._rows, self._fields, self._sums)
            fields, segments = self._fields, tuple(self.segments)
            window_rows = 0 if self._windows is None else self._windows.window_rows
            end = SpoolEnd(self._rows, checksum, fields, window_rows, segments)
            self._folder.end(end)
        return end

    def fail(self, error: PenstockError) -> None:
        """Gives up, and tells readers why; no more than a first time."""
        self._discard()
        self._folder.fail(error)

    def abandon(self) -> None:
        """Gives up without a word: readers find that the writer is gone."""
        self._discard()
        self._folder.release()

    def _check(self, values: Values) -> None:
        fields = {name: field_of(value) for name, value in values.items()}
        if not self._fields:
            self._fields = fields
        elif fields != self._fields:
            raise DataError(
                f"{self._folder.where}: row {self._rows} is {fields_in_words(fields)}, those "
                f"before are {fields_in_words(self._fields)}",
                hint="all rows have one dtype and size",
            )

    def _append(self, rows: int, values: Values, start: int) -> None:
        parts = {name: raw(_cut(value, start, start + rows)) for name, value in values.items()}
        size = sum(part.nbytes for field in parts.values() for part in field)
        for name, field in parts.items():
            sums = self._sums.get(name, [0] * len(field))
            self._sums[name] = [zlib.crc32(p.data, s) for p, s in zip(field, sums, strict=True)]
        self._rows += rows
        if size >= BATCH_BYTES // 4:
            self._flush()
            self._put(rows, parts)
            return
        # Copied, for the caller may use its memory again.
        for name, field in parts.items():
            buffers = self._small.setdefault(name, [bytearray() for _ in field])
            for buffer, data in zip(buffers, field, strict=True):
                buffer += data.data
        self._small_rows += rows
        self._small_bytes += size
        if self._small_bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._small_rows:
            parts = {n: [np.frombuffer(b, np.uint8) for b in f] for n, f in self._small.items()}
            self._put(self._small_rows, parts)
            self._small, self._small_rows, self._small_bytes = {}, 0, 0

    def _put(self, rows: int, parts: Mapping[str, list[NDArray[np.uint8]]]) -> None:
        if self._segment is None:
            assert self._windows is not None
            path = self._folder.path / segment_name(len(self.segments))
            self._segment = SegmentWriter(path, self._fields, self._windows.window_rows)
        self._segment.write(rows, parts)

    def _seal(self) -> None:
        self._flush()
        assert self._segment is not None
        after = self.segments[-1].checksum if self.segments else ""
        checksum = _checksum(self._rows, self._fields, self._sums)
        rows = self._segment.rows
        size = self._segment.seal(after=after, rows=self._rows, checksum=checksum)
        self.segments.append(Segment(segment_name(len(self.segments)), rows, size, checksum))
        self._segment = None

    def _discard(self) -> None:
        self._small = {}
        if self._segment is not None:
            self._segment.discard()
            self._segment = None

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        assert self._folder.held, "the spool is closed, or was given up"
        try:
            yield
        except OSError as os_error:
            what = f"cannot write row {self._rows}: {os_error}"
            if self._need_bytes is not None:
                what += f" ({self._need_bytes:,} bytes are needed in all)"
            written = sum(segment.bytes for segment in self.segments)
            free = shutil.disk_usage(self._folder.path).free
            error = self._full(f"{what}; {written:,} bytes are written, {free:,} are free")
            self.fail(error)
            raise error from os_error
        except DataError as error:
            self.fail(error)
            raise

    def _full(self, what: str) -> DataError:
        folder = self._folder
        return DataError(f"{folder.where}: no room in {folder.path}: {what}", hint=LARGER_DISK)


class Spool:
    """A spool as its reader sees it: the segments that are sealed, mapped into memory.

    Arguments:
        folder: of the spool; need not be there yet.
        where: names the data, for messages.

    Raises:
        DataError: see `refresh`.
    """

    def __init__(self, folder: str | os.PathLike[str], where: str) -> None:
        self.folder, self.where = Path(folder), where
        self.end: SpoolEnd | None = None
        """Of a closed spool whose segments are all mapped."""
        self.rows = 0
        self.segments: list[Segment] = []
        self.mapped: list[MappedSegment] = []
        self.refresh()

    def refresh(self) -> None:
        """Maps what has been sealed since.

        Raises:
            DataError: a segment is missing, or not as it was written, or follows other rows than
                those before it.
        """
        if self.end is not None:
            return
        end = SpoolEnd.read(self.folder)  # first: all segments are there before it is
        while (path := self.folder / segment_name(len(self.segments))).exists():
            self._map(path)
        if end is not None:
            self._match(end)
            self.end = end

    def lives(self) -> bool:
        """Whether more can come; not if the writer has died.

        Raises:
            DataError, or another: what the writer said when it gave up.
        """
        folder = os.path.realpath(self.folder)
        if self.end is not None or writer_lives(self.folder) is not False:
            return True
        self.refresh()  # what was written last is there by now
        if self.end is not None:
            return True
        if (error := failure(self.folder)) is not None:
            raise error
        # A link that has been turned meanwhile is looked at anew.
        return os.path.realpath(self.folder) != folder

    def died(self) -> DataError:
        """The error for a writer that lives no more."""
        return DataError(
            f"{self.where}: the writer of {self.folder} has died after {self.rows} rows: expected "
            "more, or an end",
            hint="look into its log; run again to have them written anew",
        )

    def _map(self, path: Path) -> None:
        try:
            mapped = map_segment(path)
            after, rows, checksum = (mapped.words[k] for k in ("after", "rows", "checksum"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, f"cannot be read: {error}") from error
        if after != (self.segments[-1].checksum if self.segments else ""):
            raise DataError(
                f"{self.where}: {path} follows other rows than those that were read before it: "
                "expected the same rows from whoever writes them",
                hint="data that is read again must not change: store it, and read what was stored",
            )
        if rows != self.rows + mapped.rows:
            what = f"ends with row {self.rows + mapped.rows}: expected row {rows}"
            raise damaged(path, what)
        self.rows = rows
        self.mapped.append(mapped)
        self.segments.append(Segment(path.name, mapped.rows, mapped.bytes, checksum))

    def _match(self, end: SpoolEnd) -> None:
        for number, segment in enumerate(end.segments):
            if number == len(self.segments):
                expected = f"expected {len(end.segments)} segments"
                raise damaged(self.folder / segment.name, f"is missing: {expected}")
            mine = self.segments[number]
            if (mine.rows, mine.checksum) != (segment.rows, segment.checksum):
                was = f"has {mine.rows} rows, checksum {mine.checksum}"
                now = f"expected {segment.rows} rows, checksum {segment.checksum}"
                raise damaged(self.folder / segment.name, f"{was}: {now}")
        if len(self.segments) > len(end.segments):
            what = f"is not of this spool: expected {len(end.segments)} segments"
            raise damaged(self.folder / self.segments[len(end.segments)].name, what)


def _checksum(rows: int, fields: Mapping[str, Field], sums: Mapping[str, list[int]]) -> str:
    words = [(name, str(fields[name]), sums[name]) for name in sorted(sums)]
    return f"{zlib.crc32(json.dumps([rows, words]).encode()):08x}"


def _cut(value: NDArray[Any] | Ragged, start: int, stop: int) -> NDArray[Any] | Ragged:
    if isinstance(value, Ragged):
        return Ragged(value.offsets[start : stop + 1], value.data)
    return value[start:stop]
