"""Records from CSV files: each line a record, each block of lines a partition.

The columns named must be of numbers (or true and false); a column is int64 if every value in every
file is a whole number, else float32. So `manifest()` reads all of it once.

pyarrow is imported inside the functions that use it, as in `columns`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.feed.columns import Features, Place, Selection, column_type, unsuitable
from penstock.feed.lines import Blocks, failing, suffixes_of
from penstock.feed.source import Source
from penstock.feed.table import BadLine, Chunk, Part, TableSource

if TYPE_CHECKING:
    import pyarrow as pa

_SAMPLED = 100
"""So many values tell what a column is of."""


def csv(
    url: str | os.PathLike[str],
    *,
    features: Features,
    target: str,
    delimiter: str = ",",
    header: bool = True,
    on_bad_record: str = "error",
) -> Source:
    """Records from CSV files, gzipped or not, on any fsspec URL.

    Columns are of numbers: int64 where all values are whole, else float32; or of true and false:
    bool. Values may be quoted, and then have line ends in them. Rows are counted from 0 in each
    file, without its header and empty lines.

    Arguments:
        url: a file; a folder, whose `*.csv` and `*.tsv` files count at any depth; or a glob. Files
            are sorted by path.
        features: a column, as (batch,); or several, stacked as float32 (batch, columns).
        target: a column, as (batch,).
        delimiter: between values: one character.
        header: whether the first line of each file names its columns; else they are f0, f1, ...
        on_bad_record: what becomes of lines with more or fewer values than the header, missing
            values, and values that are no numbers: "error", "skip" or "quarantine".

    Raises:
        DataError: from `manifest()`, for whatever is wrong with the files.
    """
    if len(delimiter.encode()) != 1:
        raise DataError(f"csv: delimiter {delimiter!r}: expected one ASCII character")
    selection = Selection.of("csv", features, target)
    return TableSource(os.fspath(url), selection, CsvFormat(delimiter, header), on_bad_record)


class CsvFormat:
    """Blocks of lines are parts. Learns the columns' types while the parts are first read."""

    name = "csv"
    suffixes = suffixes_of(".csv", ".tsv")
    single = True

    def __init__(self, delimiter: str, header: bool) -> None:
        self._delimiter, self._header = delimiter, header
        self._blocks = Blocks(delimiter)
        self._types: dict[str, pa.DataType] = {}

    def describe(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self._delimiter != ",":
            values["delimiter"] = self._delimiter
        if not self._header:
            values["header"] = False
        return values

    def parts(self, url: str, path: str, check: Callable[[pa.Schema, str], None]) -> Iterator[Part]:
        columns: tuple[str, ...] = ()
        number = 0
        for start, data in self._blocks.cut(url, path):
            if not columns:
                columns, skipped = self._columns(path, data)
                start, data = start + skipped, data[skipped:]
            if data:
                yield Part(path, number, start=start, stop=start + len(data), columns=columns)
                number += 1
        self._blocks.forget()

    def chunks(
        self, url: str, part: Part, names: Sequence[str], batch_rows: int | None
    ) -> Iterator[Chunk]:
        import pyarrow as pa

        place = Place(part.path, "", part.first_row)
        for name in names:  # the types are seen to below
            schema = pa.schema([(column, pa.float64()) for column in part.columns])
            column_type(schema, replace(place, column=name))
        data = self._blocks.read(url, part.path, part.start, part.stop)
        if not data.strip():
            return
        bad: list[BadLine] = []
        wanted = {name: self._types.get(name, pa.string()) for name in names}
        try:
            table = self._parsed(data, part, wanted, bad)
        except pa.ArrowInvalid:  # a value is not what its column was so far
            bad.clear()
            wanted = dict.fromkeys(names, pa.string())
            try:
                table = self._parsed(data, part, wanted, bad)
            except pa.ArrowInvalid as error:
                raise DataError(f"{part.path}: cannot be read as CSV: {error}") from error
        rows = table.num_rows + len(bad)
        numbers = _numbers(table.num_rows, [line.row for line in bad])
        keep = np.ones(table.num_rows, bool)
        columns = {}
        for name, kind in wanted.items():
            column = table.column(name).combine_chunks()
            if pa.types.is_string(kind):
                column = self._numeric(column, replace(place, column=name), numbers, bad, keep)
            columns[name] = column
        batch = pa.RecordBatch.from_pydict(columns)
        if not keep.all():
            batch, numbers = batch.filter(pa.array(keep)), numbers[keep]
        yield Chunk(batch, rows, numbers if bad else None, sorted(bad, key=lambda line: line.row))

    def _columns(self, path: str, data: bytes) -> tuple[tuple[str, ...], int]:
        """A file's columns, and how many bytes its header has."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        end = data.find(b"\n") + 1 or len(data)
        while data.count(b'"', 0, end) % 2 and end < len(data):  # a name with a line end in it
            end = data.find(b"\n", end) + 1 or len(data)
        try:
            named = arrow_csv.read_csv(
                pa.BufferReader(data[:end]),
                read_options=arrow_csv.ReadOptions(
                    use_threads=False, autogenerate_column_names=not self._header
                ),
                parse_options=self._parse_options(None),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: cannot be read as CSV: its first line: {error}") from error
        return tuple(named.schema.names), end if self._header else 0

    def _parse_options(self, handler: Callable[[Any], str] | None) -> Any:
        from pyarrow import csv as arrow_csv

        return arrow_csv.ParseOptions(
            delimiter=self._delimiter, newlines_in_values=True, invalid_row_handler=handler
        )

    def _parsed(
        self, data: bytes, part: Part, types: dict[str, pa.DataType], bad: list[BadLine]
    ) -> pa.Table:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        def misfit(row: Any) -> str:
            what = (
                f"has {row.actual_columns} values: expected {row.expected_columns}, as the first "
                "line has"
            )
            bad.append(BadLine(row.number - 1, lambda number: f"row {number} {what}", row.text))
            return "skip"

        return arrow_csv.read_csv(
            pa.BufferReader(data),
            read_options=arrow_csv.ReadOptions(
                use_threads=False, block_size=len(data) + 1, column_names=list(part.columns)
            ),
            parse_options=self._parse_options(misfit),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(types), column_types=types, strings_can_be_null=True
            ),
        )

    def _numeric(
        self,
        strings: pa.Array,
        place: Place,
        numbers: NDArray[np.int64],
        bad: list[BadLine],
        keep: NDArray[np.bool_],
    ) -> pa.Array:
        """Strings as numbers. What are none are added to `bad`, and not kept."""
        import pyarrow as pa
        from pyarrow import compute

        strings = compute.utf8_trim_whitespace(strings)

        def cast(kind: pa.DataType, low: int, high: int) -> bool:
            try:
                strings.slice(low, high - low).cast(kind)
            except pa.ArrowInvalid:
                return False
            return True

        kind = self._types.get(place.column)
        if kind is None:
            kind = _kind_of(strings.drop_null().slice(0, _SAMPLED))
            if kind is None:
                raise unsuitable("string", "string", place)
        if kind == pa.int64() and not cast(kind, 0, len(strings)):
            kind = pa.float64()
        odd = list(failing(0, len(strings), partial(cast, kind)))
        if odd:
            bad += [
                BadLine(
                    int(numbers[i]),
                    _no_number(place.column, strings[i].as_py()),
                    {place.column: strings[i].as_py()},
                )
                for i in odd
                if keep[i]
            ]
            keep[odd] = False
            mask = np.zeros(len(strings), bool)
            mask[odd] = True
            strings = compute.if_else(pa.array(mask), pa.scalar(None, pa.string()), strings)
        if kind == pa.float64() and self._types.get(place.column) in (None, pa.int64()):
            kind = pa.int64() if cast(pa.int64(), 0, len(strings)) else kind
        if strings.null_count < len(strings):
            self._types[place.column] = kind
        return strings.cast(kind)


def _no_number(column: str, text: str) -> Callable[[int], str]:
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    return lambda number: f"column {column!r}: row {number} holds {shown!r}: expected a number"


def _kind_of(strings: pa.Array) -> pa.DataType | None:
    """float64 or bool, whichever at least half of the values are; int64 where there are none."""
    import pyarrow as pa

    if not len(strings):
        return pa.int64()
    for kind in (pa.float64(), pa.bool_()):
        good = 0
        for value in strings:
            try:
                good += pa.array([value.as_py()]).cast(kind) is not None
            except pa.ArrowInvalid:
                continue
        if 2 * good >= len(strings):
            return kind
    return None


def _numbers(rows: int, missing: Sequence[int]) -> NDArray[np.int64]:
    """The numbers of rows, where these numbers are of others."""
    gone = np.sort(np.asarray(missing, np.int64))
    at = np.arange(rows)
    return at + np.searchsorted(gone - np.arange(len(gone)), at, side="right")
