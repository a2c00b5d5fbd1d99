"""Arrow batches to what a spool keeps: features as `x` and target as `y`, row for row.

    converter = Converter(selection, Place("a.parquet", ""))
    writer.write(converter.convert(batch))

What the first rows are like (types, lengths, sizes, dictionaries) all others must be like; that is
`Known`, which goes from one converter to the next where several read parts of one source. Bad rows
are found by masks: each check of `dense` names all rows that fail it, they are taken out, and the
rest is looked at again, so that there are as many passes as kinds of badness, whatever the rows.

pyarrow is imported inside the functions that use it, as in `columns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock.feed.bad import BadRecords
from penstock.feed.columns import BadRows, Image, Place, Selection, dense, ragged
from penstock.feed.segment import Ragged

if TYPE_CHECKING:
    import pyarrow as pa

Values = dict[str, "NDArray[Any] | Ragged"]
"""Rows of a spool: x and y."""


@dataclass
class Known:
    """What the columns of a source are like, as its first rows have it.

    Arguments:
        types: by column.
        places: by column, the file or partition that the rest was learnt from, for messages.
        shapes: by column, of a row.
        dictionaries: by column of strings kept as codes, the strings.
        empty: features and target with no rows; nothing as long as there was no good row.
    """

    types: dict[str, pa.DataType] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dictionaries: dict[str, pa.Array] = field(default_factory=dict)
    empty: Values = field(default_factory=dict)

    @property
    def row_bytes(self) -> int | None:
        """Of a row in a spool; None where rows are of unequal length."""
        total = 0
        for value in self.empty.values():
            if isinstance(value, Ragged):
                return None
            total += value.dtype.itemsize * int(np.prod(value.shape[1:], dtype=np.int64))
        return total


class Converter:
    """Converts the batches of one place after the other.

    Arguments:
        selection: of the columns.
        place: of the first row (its column is left open).
        bad: what becomes of bad records; None: they are errors.
        known: of the same source; more is added to it. None: the first rows tell.
        single: whether float64 becomes float32: where numbers are text, nobody has chosen it.
    """

    def __init__(
        self,
        selection: Selection,
        place: Place,
        bad: BadRecords | None = None,
        known: Known | None = None,
        *,
        single: bool = False,
    ) -> None:
        self.known = known or Known()
        self._selection, self._place = selection, place
        self._bad, self._single = bad or BadRecords(), single
        self._schema: pa.Schema | None = None

    def at(self, place: Place) -> None:
        """The next batch comes from here."""
        self._place, self._schema = place, None

    def convert(self, batch: pa.RecordBatch, numbers: NDArray[np.int64] | None = None) -> Values:
        """Features and target of a batch's good rows, in their order: views where they can be.

        Arguments:
            batch: with the selected columns, and maybe others.
            numbers: of its rows, counted from the place's first, where rows are missing between
                them (they follow on each other otherwise).

        Raises:
            DataError: a bad row, where that is an error; a missing column, or one of a type that no
                array is made of; another type or dictionary than before.
        """
        import pyarrow as pa

        place = replace(self._place, numbers=numbers)
        if self._schema is None or not batch.schema.equals(self._schema):
            self._check(batch.schema)
        columns = {name: batch.column(name) for name in self._selection.names}
        rows = np.arange(batch.num_rows) if numbers is None else numbers
        self._advance(batch.num_rows, numbers)
        if not self.known.empty:
            self._learn(columns, place)
        while True:
            try:
                return self._values(columns, place)
            except BadRows as error:
                bad = error
            numbered = [place.first_row + int(row) for row in rows[bad.rows]]
            record = partial(_record, columns, bad.rows)
            self._bad.add(place.where, numbered, bad.reason, record, bad.hint)
            keep = np.ones(len(rows), bool)
            keep[bad.rows] = False
            rows, mask = rows[keep], pa.array(keep)
            columns = {name: column.filter(mask) for name, column in columns.items()}
            place = replace(place, numbers=rows)

    def _advance(self, num_rows: int, numbers: NDArray[np.int64] | None) -> None:
        if numbers is not None:
            num_rows = int(numbers[-1]) + 1 if len(numbers) else 0
        self._place = replace(self._place, first_row=self._place.first_row + num_rows)

    def _learn(self, columns: Mapping[str, pa.Array], place: Place) -> None:
        """Takes the first row that is good by itself as the one that all others must be like."""
        for row in range(len(columns[self._selection.target])):
            one = {name: column.slice(row, 1) for name, column in columns.items()}
            try:
                values = self._values(one, replace(place, numbers=None))
            except BadRows:
                if self._bad.stops:
                    return
                continue
            self.known.empty = {name: _none_of(value) for name, value in values.items()}
            return

    def _check(self, schema: pa.Schema) -> None:
        known, where = self.known, self._place.where
        for name, found in self._selection.check(schema, self._place).items():
            if found != known.types.setdefault(name, found):
                raise replace(self._place, column=name).error(
                    f" is {found}, but {known.types[name]} {self._elsewhere(name)}",
                    f"all must have the same columns; make them so {self._place.mend}",
                )
            known.places.setdefault(name, where)
        self._schema = schema

    def _elsewhere(self, name: str) -> str:
        there = self.known.places[name]
        return "before" if there == self._place.where else f"in {there}"

    def _values(self, columns: Mapping[str, pa.Array], place: Place) -> Values:
        known, features = self.known, self._selection.features
        arrays: dict[str, Any] = {}
        for name, column in columns.items():
            at = replace(place, column=name)
            if hasattr(column, "dictionary"):
                self._same_codes(column.dictionary, at)
            if isinstance(features, Image) and name == features.column:
                arrays[name] = Ragged(*ragged(column, at))
            else:
                arrays[name] = dense(column, at, known.shapes.get(name))
        rows = len(columns[self._selection.target])
        if rows and not known.empty:
            shaped = {n: array for n, array in arrays.items() if not isinstance(array, Ragged)}
            known.shapes = {name: array.shape[1:] for name, array in shaped.items()}
        return self._joined(arrays, rows) if rows or not known.empty else dict(known.empty)

    def _joined(self, arrays: Mapping[str, Any], rows: int) -> Values:
        features = [arrays[name] for name in self._selection.feature_names]
        x, y = features[0], arrays[self._selection.target]
        stacked = isinstance(self._selection.features, tuple)
        if stacked and all(array.ndim == 1 for array in features):
            wide = any(array.dtype == np.float64 for array in features)
            x = np.empty((rows, len(features)), np.float64 if wide else np.float32)
            for i, array in enumerate(features):
                x[:, i] = array
        if self._single:
            x, y = (_single(value) for value in (x, y))
        return {"x": x, "y": y}

    def _same_codes(self, found: pa.Array, place: Place) -> None:
        """A dictionary that is the first so many values of the known one has the same codes."""
        from pyarrow import types

        if types.is_floating(found.type) or types.is_integer(found.type):
            return  # numbers stand for themselves
        known = self.known.dictionaries.setdefault(place.column, found)
        if found.equals(known.slice(0, len(found))):
            return
        values, others = found.to_pylist(), known.to_pylist()
        i = next(i for i, value in enumerate(values) if i >= len(others) or value != others[i])
        there = f"{others[i]!r}" if i < len(others) else "nothing"
        raise place.error(
            f": value {i} of the dictionary is {values[i]!r}, but {there} "
            f"{self._elsewhere(place.column)}: a code must mean the same everywhere",
            f"give all the same dictionary (pyarrow.Table.unify_dictionaries) {place.mend}",
        )


def _single(value: Any) -> Any:
    return value.astype(np.float32) if getattr(value, "dtype", None) == np.float64 else value


def _none_of(value: NDArray[Any] | Ragged) -> NDArray[Any] | Ragged:
    if isinstance(value, Ragged):
        return Ragged(np.zeros(1, np.int64), np.empty(0, np.uint8))
    return np.empty((0, *value.shape[1:]), value.dtype)


def _record(columns: Mapping[str, pa.Array], rows: NDArray[np.int64], i: int) -> dict[str, Any]:
    """The i-th of these rows as Python values; as Arrow's storage where a type has none."""
    row = int(rows[i])
    return {
        name: getattr(column, "storage", column)[row].as_py() for name, column in columns.items()
    }
