"""Records that are rows of tables in files: what Parquet, Arrow, CSV and JSON lines have in common.

    driver    manifest()   finds the files and their partitions, learns what the columns are like
    worker    open()       a thread reads the pieces, converts them and fills a spool (`filling`)

A `Format` knows how its files fall into parts that can be read by themselves; each is a partition.
Where a format does not know the rows of a part without reading it, or bad records are left out, the
manifest is made by reading everything once, by the same converter that the workers use: so what it
counts is what they get, and all bad records are told once, by the driver.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.feed.bad import BadRecords
from penstock.feed.columns import Place, Selection
from penstock.feed.converter import Converter, Known, Values
from penstock.feed.decode import stages_of
from penstock.feed.files import File, find, locate, shared_folder
from penstock.feed.filling import filled, key_of
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.segment import Ragged
from penstock.feed.source import Stage

if TYPE_CHECKING:
    import pyarrow as pa

    from penstock.feed.spooled import SpoolRecords

READ_BYTES = 8 * 2**20
"""So much of a part is read at once, where its format leaves a choice."""
_READ_ROWS = 65536


@dataclass(frozen=True)
class Part:
    """A part of a file that can be read by itself.

    Arguments:
        path: of the file.
        number: of the part in it.
        rows: of which records can be made; None: nobody has counted them yet.
        first_row: as counted in the file, bad ones included.
        start, stop: its bytes, where the format has it so.
        columns: of the file, in their order, where the part itself does not tell.
    """

    path: str
    number: int
    rows: int | None = None
    first_row: int = 0
    start: int = 0
    stop: int = 0
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadLine:
    """A row of which no batch could be made.

    Arguments:
        row: counted from the chunk's first.
        reason: given its number in the file, what is wrong.
        record: what it holds.
    """

    row: int
    reason: Callable[[int], str]
    record: Any


@dataclass(frozen=True)
class Chunk:
    """Some rows of a part.

    Arguments:
        batch: those of which one could be made.
        rows: how many it spans, bad ones included.
        numbers: of the batch's rows among these; None: they are all there.
        bad: the others.
    """

    batch: pa.RecordBatch
    rows: int
    numbers: NDArray[np.int64] | None = None
    bad: Sequence[BadLine] = field(default=())


class Format(Protocol):
    """How files of one kind are read. Picklable; may learn while it reads the first time."""

    name: str
    """Of the function of `penstock.feed`."""
    suffixes: tuple[str, ...]
    """Of a folder's files."""
    single: bool
    """Whether its numbers have no dtypes: what is not whole becomes float32, as torch has it."""

    def describe(self) -> dict[str, Any]:
        """The keywords that it adds to those of every table."""
        ...

    def parts(self, url: str, path: str, check: Callable[[pa.Schema, str], None]) -> Iterator[Part]:
        """The parts of a file, in order. What is asked for next may be the chunks of the last.

        Arguments:
            check: to be called with the file's schema and its path, where it tells its types.
        """
        ...

    def chunks(
        self, url: str, part: Part, names: Sequence[str], batch_rows: int | None
    ) -> Iterator[Chunk]:
        """The rows of a part, in order, with the columns of these names.

        Arguments:
            batch_rows: how many to read at once; None: as many as are `READ_BYTES`.
        """
        ...


@dataclass(frozen=True)
class _Learnt:
    """What `manifest()` learns; it travels with the source."""

    files: tuple[File, ...]
    parts: tuple[Part, ...]
    known: Known


class TableSource:
    """Files of one format.

    Arguments:
        url: of a file, folder or glob.
        selection: of the columns.
        format: of the files.
        on_bad_record: "error", "skip" or "quarantine".
    """

    def __init__(
        self, url: str, selection: Selection, format: Format, on_bad_record: str = "error"
    ) -> None:
        self._url, self._selection, self._format = url, selection, format
        self.bad = BadRecords(on_bad_record)
        self._learnt: _Learnt | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What decodes encoded images, if there are any."""
        return stages_of(self._selection.features, self._url, self.bad)

    def manifest(self) -> Manifest:
        self.bad.clear()
        learnt = self._learnt = self._learn(self.bad)
        start = shared_folder(learnt.files)
        return Manifest(
            tuple(
                Partition(f"{part.path[start:].lstrip('/')}#{part.number}", part.rows or 0)
                for part in learnt.parts
            )
        )

    def open(self, pieces: Sequence[Piece]) -> SpoolRecords:
        if self._learnt is None:
            self._learnt = self._learn(self._quiet())
        rows, known = sum(piece.rows for piece in pieces), self._learnt.known
        key = key_of(
            self.describe(),
            [asdict(file) for file in self._learnt.files],
            [asdict(piece) for piece in pieces],
        )
        need_bytes = None if known.row_bytes is None else rows * known.row_bytes
        empty = known.empty or {"x": np.empty(0, np.float32), "y": np.empty(0, np.float32)}
        return filled(key, self._url, rows, lambda: self._read(pieces), empty, need_bytes)

    def describe(self) -> dict[str, Any]:
        values = {"url": self._url, **self._selection.describe(), **self._format.describe()}
        if not self.bad.stops:
            values["on_bad_record"] = self.bad.on_bad_record
        return {self._format.name: values}

    def _converter(self, path: str, bad: BadRecords, known: Known | None = None) -> Converter:
        return Converter(self._selection, Place(path, ""), bad, known, single=self._format.single)

    def _quiet(self) -> BadRecords:
        """For rows that `manifest()` has told of already."""
        return BadRecords("error" if self.bad.stops else "skip")

    def _learn(self, bad: BadRecords) -> _Learnt:
        """Lists the files and their parts, and reads as much as is needed to count their rows."""
        files = tuple(find(self._url, self._format.suffixes))
        parts: list[Part] = []
        types: dict[str, pa.DataType] = {}

        def check(schema: pa.Schema, path: str) -> None:
            for name, found in self._selection.check(schema, Place(path, "")).items():
                if found != types.setdefault(name, found):
                    raise Place(path, name).error(
                        f" is {found}, but {types[name]} in {files[0].path}",
                        "all files must have the same columns; write them anew with one schema",
                    )

        converter = self._converter(files[0].path, bad)
        for file in files:
            first_row = 0
            for part in self._format.parts(self._url, file.path, check):
                part = replace(part, first_row=first_row)
                spanned = part.rows or 0
                if part.rows is None or not bad.stops:
                    part, spanned = self._counted(part, converter, bad)
                parts.append(part)
                first_row += spanned
        if bad.count and not any(part.rows for part in parts):
            raise bad.every(self._url)
        return _Learnt(files, tuple(parts), self._know(parts))

    def _counted(self, part: Part, converter: Converter, bad: BadRecords) -> tuple[Part, int]:
        """The part with the number of its good rows, and how many it spans."""
        good = spanned = 0
        for chunk in self._format.chunks(self._url, part, self._selection.names, None):
            converter.known.types.clear()  # they may have widened: see `_know`
            values = self._converted(converter, bad, part, spanned, chunk)
            good, spanned = good + len(values["y"]), spanned + chunk.rows
        return replace(part, rows=good), spanned

    def _know(self, parts: Sequence[Part]) -> Known:
        """What the columns are like, now that all types are known, by the first good row."""
        known = Known()
        part = next((part for part in parts if part.rows), None)
        if part is not None:
            bad = self._quiet()
            converter = self._converter(part.path, bad, known)
            spanned = 0
            for chunk in self._format.chunks(self._url, part, self._selection.names, 1):
                self._converted(converter, bad, part, spanned, chunk)
                spanned += chunk.rows
                if known.empty:
                    break
        return known

    def _read(self, pieces: Sequence[Piece]) -> Generator[Values, None, None]:
        """The rows of these pieces; what a worker's thread runs."""
        assert self._learnt is not None
        known, bad = copy.deepcopy(self._learnt.known), self._quiet()
        sizes = {file.path: file.size for file in self._learnt.files}
        fs, _ = locate(self._url)
        row_bytes = known.row_bytes
        batch_rows = row_bytes and max(1, min(READ_BYTES // max(row_bytes, 1), _READ_ROWS))
        for piece in pieces:
            part = self._learnt.parts[piece.partition]
            if (size := sizes.pop(part.path, None)) is not None:
                self._unchanged(fs, part.path, size)
            converter = self._converter(part.path, bad, known)
            good = spanned = 0
            for chunk in self._format.chunks(self._url, part, self._selection.names, batch_rows):
                if bad.stops and good + chunk.rows <= piece.start:  # another shard's
                    good, spanned = good + chunk.rows, spanned + chunk.rows
                    continue
                values = self._converted(converter, bad, part, spanned, chunk)
                rows = len(values["y"])
                low, high = max(piece.start - good, 0), min(piece.stop - good, rows)
                if low < high:
                    yield {name: _cut(value, low, high) for name, value in values.items()}
                good, spanned = good + rows, spanned + chunk.rows
                if good >= piece.stop:
                    break
            if good < piece.stop:
                raise DataError(
                    f"{part.path}: part {part.number} now has {good} rows where there were "
                    f"{part.rows}",
                    hint="the file was changed after the run began; start a new run",
                )

    def _converted(
        self, converter: Converter, bad: BadRecords, part: Part, spanned: int, chunk: Chunk
    ) -> Values:
        """A chunk's good rows. `spanned` rows of the part were before it."""
        first_row = part.first_row + spanned
        lines = chunk.bad
        bad.add(
            part.path,
            [first_row + line.row for line in lines],
            lambda i: lines[i].reason(first_row + lines[i].row),
            lambda i: lines[i].record,
            "mend it, or have it left out: on_bad_record: skip",
        )
        converter.at(Place(part.path, "", first_row))
        return converter.convert(chunk.batch, chunk.numbers)

    @staticmethod
    def _unchanged(fs: Any, path: str, size: int) -> None:
        try:
            now = File.of(fs, path).size
        except OSError as error:
            raise DataError(f"{path}: no longer there: {error}") from error
        if now != size:
            raise DataError(
                f"{path} has {now:,} bytes where it had {size:,}",
                hint="the file was changed after the run began; start a new run",
            )


def _cut(value: NDArray[Any] | Ragged, low: int, high: int) -> NDArray[Any] | Ragged:
    if isinstance(value, Ragged):
        return Ragged(value.offsets[low : high + 1], value.data)
    return value[low:high]
