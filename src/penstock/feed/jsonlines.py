"""Records from JSON lines: each line an object and a record, each block of lines a partition.

The columns' types are found by reading all of it once: whole numbers are int64 and become float32
where one of them is not whole, in lists as well.

pyarrow is imported inside the functions that use it, as in `columns`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.errors import DataError
from penstock.feed.columns import Features, Place, Selection, column_type
from penstock.feed.lines import Blocks, failing, suffixes_of
from penstock.feed.source import Source
from penstock.feed.table import BadLine, Chunk, Part, TableSource

if TYPE_CHECKING:
    import pyarrow as pa


def jsonl(
    url: str | os.PathLike[str],
    *,
    features: Features,
    target: str,
    on_bad_record: str = "error",
) -> Source:
    """Records from JSON lines, gzipped or not, on any fsspec URL.

    A column is a key of the objects: of numbers, int64 (batch,) where all are whole, else float32;
    of true and false, bool; of lists of one length, nested or not, (batch, d, ...). Rows are
    counted from 0 in each file, without empty lines.

    Arguments:
        url: a file; a folder, whose `*.jsonl`, `*.ndjson` and `*.json` files count at any depth;
            or a glob. Files are sorted by path.
        features, target: as `parquet` has them.
        on_bad_record: what becomes of lines that are no JSON objects, of missing and null values,
            of values of another type, and of lists of unequal lengths: "error", "skip" or
            "quarantine".

    Raises:
        DataError: from `manifest()`, for whatever is wrong with the files.
    """
    selection = Selection.of("jsonl", features, target)
    return TableSource(os.fspath(url), selection, JsonFormat(), on_bad_record)


class JsonFormat:
    """Blocks of lines are parts. Learns the columns' types while the parts are first read."""

    name = "jsonl"
    suffixes = suffixes_of(".jsonl", ".ndjson", ".json")
    single = True

    def __init__(self) -> None:
        self._blocks = Blocks()
        self._types: dict[str, pa.DataType] = {}

    def describe(self) -> dict[str, Any]:
        return {}

    def parts(self, url: str, path: str, check: Callable[[pa.Schema, str], None]) -> Iterator[Part]:
        for number, (start, data) in enumerate(self._blocks.cut(url, path)):
            yield Part(path, number, start=start, stop=start + len(data))
        self._blocks.forget()

    def chunks(
        self, url: str, part: Part, names: Sequence[str], batch_rows: int | None
    ) -> Iterator[Chunk]:
        import pyarrow as pa

        data = self._blocks.read(url, part.path, part.start, part.stop)
        if not data.strip():
            return
        place = Place(part.path, "", part.first_row)
        try:
            table = self._parsed(data, names, place)
        except pa.ArrowInvalid:
            yield self._sifted(data, names, place)
            return
        yield Chunk(_batch(table), table.num_rows)

    def _sifted(self, data: bytes, names: Sequence[str], place: Place) -> Chunk:
        """Of a block that cannot be read as a whole: what can be, and the lines that cannot."""
        import pyarrow as pa

        lines = [line for line in data.split(b"\n") if line.strip()]
        why = {i: said for i, line in enumerate(lines) if (said := _no_object(line))}
        objects = [i for i in range(len(lines)) if i not in why]

        def works(low: int, high: int) -> bool:
            data = b"\n".join(lines[i] for i in objects[low:high])
            try:
                self._parsed(data, names, place, part=True)
            except pa.ArrowInvalid as error:
                said = str(error).removeprefix("JSON parse error: ").partition(" in row ")[0]
            except DataError as error:  # a type that no tensor is made of
                said = error.message.partition(": ")[2]
            else:
                return True
            if high - low == 1:
                why[objects[low]] = said
            return False

        odd = sorted({*why, *(objects[i] for i in failing(0, len(objects), works))})
        good = np.setdiff1d(np.arange(len(lines)), odd)
        bad = [
            BadLine(
                i,
                partial("row {1} cannot be used: {0}".format, why[i]),
                lines[i].decode(errors="replace"),
            )
            for i in odd
        ]
        if len(good):
            table = self._parsed(b"\n".join(lines[i] for i in good), names, place, part=True)
        else:
            table = pa.table(
                {name: pa.array([], self._types.get(name, _nothing())) for name in names}
            )
        return Chunk(_batch(table), len(lines), good, bad)

    def _parsed(
        self, data: bytes, names: Sequence[str], place: Place, *, part: bool = False
    ) -> pa.Table:
        """Lines as a table of these columns, of the types known so far or wider ones.

        Arguments:
            part: whether these lines may lack a column that was not seen yet.

        Raises:
            ArrowInvalid: they are not of these types, or no JSON.
            DataError: a column is not there, or of a type that no tensor is made of.
        """
        import pyarrow as pa

        if all(name in self._types for name in names):
            try:
                return self._read(data, {name: self._types[name] for name in names})
            except pa.ArrowInvalid:
                pass  # a type may be wider than it was
        found = self._read(data, None).schema
        types = dict(self._types)
        for name in names:
            kind = found.field(name).type if name in found.names else pa.null()
            known = types.get(name, pa.null())
            if not pa.types.is_null(kind):
                types[name] = _wider(known, kind)
                column_type(pa.schema(list(types.items())), replace(place, column=name))
            elif name not in types and name not in found.names and not part:
                column_type(found, replace(place, column=name))
        table = self._read(data, {name: types.get(name, _nothing()) for name in names})
        self._types = types
        return table

    def _read(self, data: bytes, types: dict[str, pa.DataType] | None) -> pa.Table:
        import pyarrow as pa
        from pyarrow import json as arrow_json

        options = {} if types is None else {"explicit_schema": pa.schema(list(types.items()))}
        return arrow_json.read_json(
            pa.BufferReader(data),
            read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1),
            parse_options=arrow_json.ParseOptions(
                unexpected_field_behavior="infer" if types is None else "ignore", **options
            ),
        )


def _nothing() -> pa.DataType:
    """Of a column that has only had nulls."""
    import pyarrow as pa

    return pa.float64()


def _no_object(line: bytes) -> str:
    """What is wrong with a line that is no JSON object; empty if nothing is."""
    try:
        found = json.loads(line, strict=False)
    except ValueError as error:
        return f"it is no JSON: {error}"
    return "" if isinstance(found, dict) else f"it is {type(found).__name__}: expected an object"


def _wider(known: pa.DataType, found: pa.DataType) -> pa.DataType:
    """The type that has the values of both; the known one if there is none."""
    import pyarrow as pa

    if pa.types.is_null(known):
        return found
    if pa.types.is_int64(known) and pa.types.is_float64(found):
        return found
    if pa.types.is_list(known) and pa.types.is_list(found):
        return pa.list_(_wider(known.value_type, found.value_type))
    return known


def _batch(table: pa.Table) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.RecordBatch.from_arrays(
        [column.combine_chunks() for column in table.columns], names=table.schema.names
    )
