"""Spark DataFrames as sources: `dataframe` for the user, and how their rows come to the workers.

    driver       DataFrameSource.frame_of(session): the columns, checked before any job
    map tasks and agents: see `packing`
    driver       manifest_of: what all agents have spooled is the manifest
    worker       SpooledSource: the records of its shards, from the spools of its agent

pyarrow and pyspark are imported inside the functions that use them, as in `columns`.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.errors import DataError, JobError
from penstock.feed.arrays import ArrayRecords
from penstock.feed.columns import Layout, Place, Selection, dense, fill, unsuitable
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.packing import AGAIN, MEND, SpooledPartition, spooled
from penstock.feed.source import Records, Source
from penstock.feed.spool import Spool

if TYPE_CHECKING:
    import pyarrow as pa

SPOOL = "PENSTOCK_SPOOL"
"""The environment variable that names the folder of a worker's spools."""


def dataframe(frame: Any, *, features: str | Sequence[str], target: str) -> Source:
    """Records from a Spark DataFrame, each row a record; for runs on Spark.

    A column of numbers or booleans is a tensor (batch,); arrays of one length, nested or not, are
    (batch, d, ...); binary of one length is uint8 (batch, length); images as Spark reads them are
    uint8 (batch, channels, height, width), in the order RGB(A). Dtypes stay as they are. Only the
    columns named are read, and each partition is trained on as a whole by the worker that has it.

    Arguments:
        frame: a DataFrame, classic or of Spark Connect; an RDD of Rows; the name of a table or
            temporary view; or a SQL query.
        features: a column, taken as its tensor; or several columns of numbers, stacked as float32
            (batch, columns), or as float64 if one of them is. A list of one column of numbers is
            (batch, 1); a list of one other column is that column.
        target: a column, taken as its tensor.

    Raises:
        DataError: `frame` is none of these; before any Spark job for missing columns and columns
            of other types; before training for nulls and for unequal lengths and sizes.
    """
    live = all(hasattr(frame, name) for name in ("mapInArrow", "schema", "sparkSession"))
    named = isinstance(frame, str) and frame.strip()
    if not (named or live or hasattr(frame, "toDF")):
        kind = f"{type(frame).__module__.partition('.')[0]}'s {type(frame).__name__}"
        raise DataError(
            f"dataframe: received {repr(frame) if isinstance(frame, str) else kind}: expected a "
            "Spark DataFrame, an RDD of Rows, the name of a table, or a query",
            hint="spark.createDataFrame makes one of a pandas DataFrame or an Arrow table; "
            "feed.arrays takes arrays",
        )
    return DataFrameSource(frame, Selection.of("dataframe", features, target))


class DataFrameSource:
    """A DataFrame, as the driver knows it: no worker opens it."""

    def __init__(self, frame: Any, selection: Selection) -> None:
        self._frame, self._selection = frame, selection

    def manifest(self) -> Manifest:
        raise self._needs_spark()

    def open(self, pieces: Sequence[Piece]) -> Records:
        raise self._needs_spark()

    def describe(self) -> dict[str, Any] | None:
        if not isinstance(self._frame, str):
            return None
        return {"dataframe": {"frame": self._frame, **self._selection.describe()}}

    def frame_of(self, session: Any) -> Any:
        """The DataFrame of this session, with the selected columns and no others.

        Runs no Spark job (but for an RDD, whose first row tells its columns).

        Arguments:
            session: a SparkSession; a DataFrame keeps its own.

        Raises:
            DataError: no such table, a query that Spark does not understand, a missing column, or
                one of a type that no tensor can be made of.
        """
        from pyspark.errors import PySparkException

        try:
            frame = self._resolved(session)
            fields = list(frame.schema)
        except (PySparkException, TypeError, ValueError) as error:
            raise DataError(
                f"{self._label}: {str(error).strip().splitlines()[0]}",
                hint="expected a table or temporary view of this session, a query (with a space "
                "in it), a DataFrame, or an RDD of Rows",
            ) from error
        place = Place(self._label, self._selection.target, mend=MEND)
        self._selection.check(_arrow_schema(fields, self._selection.names, place), place)
        quoted = [f"`{name.replace('`', '``')}`" for name in self._selection.names]
        try:
            return frame.select(*quoted)
        except PySparkException as error:  # names that differ in case alone
            raise DataError(
                f"{self._label}: {str(error).strip().splitlines()[0]}",
                hint="give every column its own name",
            ) from error

    def spooled(self, name: str, number: int) -> SpooledSource:
        """The same records for workers.

        Arguments:
            name: of the source in the run, for messages.
            number: of the source, as `pack` was told it.
        """
        return SpooledSource(name, number, self._selection.features, self._selection.target)

    def __getstate__(self) -> dict[str, Any]:
        """A Job takes its sources along to the workers, but a DataFrame stays with its session."""
        named = self._frame if isinstance(self._frame, str) else self._label
        return {"_frame": named, "_selection": self._selection}

    @property
    def _label(self) -> str:
        if not isinstance(self._frame, str):
            return "dataframe"
        return f"dataframe {textwrap.shorten(self._frame, 60, placeholder='...')!r}"

    def _resolved(self, session: Any) -> Any:
        frame = self._frame
        if isinstance(frame, str):
            return session.sql(frame) if len(frame.split()) > 1 else session.table(frame.strip())
        return frame if hasattr(frame, "mapInArrow") else session.createDataFrame(frame)

    def _needs_spark(self) -> JobError:
        return JobError(
            f"{self._label} is read by Spark's workers, and this is no run on Spark",
            hint="on=spark, the SparkSession that it belongs to; or feed.parquet for its files",
        )


@dataclass(frozen=True)
class SpooledSource:
    """The rows of a DataFrame, from the spools of this worker's agent.

    Arguments:
        name: of the source in the run.
        number: of the source: its spools are `<folder>/<number>/<partition>`, the folder named by
            the environment variable `SPOOL`.
        features, target: as `dataframe` has them.
    """

    name: str
    number: int
    features: str | tuple[str, ...]
    target: str

    def manifest(self) -> Manifest:
        """Of the partitions spooled here: an error where others have some of them."""
        spools = {int(path.name): Spool(path) for path in self._folder.glob("*")}
        parts = [spooled(self.number, number, spool.end) for number, spool in spools.items()]
        return manifest_of(self.name, parts)

    def open(self, pieces: Sequence[Piece]) -> Records:
        """Records that are a view of a spool where they lie in one batch; else in memory."""
        runs: list[tuple[pa.RecordBatch, Place]] = []
        for piece in pieces:
            runs += self._runs(piece)
        layout = self._layout(pieces)
        if len(runs) == 1 and not layout.stacked:
            ((batch, place),) = runs
            x, y = (
                np.ascontiguousarray(dense(batch.column(name), replace(place, column=name)))
                for name in (*self._selection.feature_names, self.target)
            )
            return ArrayRecords(x, y)
        x, y = layout.empty(sum(piece.rows for piece in pieces))
        for name, out in self._selection.outputs(x, y, layout):
            done = 0
            for batch, place in runs:
                rows = out[done : done + batch.num_rows]
                fill(rows, batch.column(name), replace(place, column=name))
                done += batch.num_rows
        return ArrayRecords(x, y)

    def describe(self) -> None:
        return None

    @property
    def _selection(self) -> Selection:
        return Selection(self.features, self.target)

    @property
    def _folder(self) -> Path:
        folder = os.environ.get(SPOOL)
        if folder is None:
            raise JobError(
                f"{self.name} is a Spark DataFrame: no spool of it is here ({SPOOL} is not set)",
                hint="only workers that Spark has placed can read it: on=spark",
            )
        return Path(folder) / str(self.number)

    def _runs(self, piece: Piece) -> Iterator[tuple[pa.RecordBatch, Place]]:
        spool = Spool(self._folder / str(piece.partition))
        where = f"{self.name}: partition {piece.partition}"
        if piece.stop > spool.end.rows:
            raise DataError(
                f"{where} has {spool.end.rows} rows here: expected at least {piece.stop}",
                hint="the data changed after the run began; start a new run",
            )
        row = piece.start
        for batch in spool.batches(piece.start, piece.stop):
            yield batch, Place(where, "", row, mend=MEND)
            row += batch.num_rows

    def _layout(self, pieces: Sequence[Piece]) -> Layout:
        partitions = [self._folder / str(piece.partition) for piece in pieces]
        # A shard without rows has tensors without rows, as wide as the others' where one is near.
        for path in partitions or sorted(self._folder.glob("*")):
            if arrays := Spool(path).end.arrays():
                return self._selection.layout(arrays)
        nothing = np.dtype(np.float32), ()
        return Layout(nothing, nothing, stacked=False)


def manifest_of(name: str, parts: Sequence[SpooledPartition]) -> Manifest:
    """The manifest of one source, whole partitions numbered from 0.

    Arguments:
        name: of the source, for messages.
        parts: of that source, in any order.

    Raises:
        DataError: a number is missing or there twice, or rows of two partitions differ in layout.
    """
    if not parts:
        raise DataError(f"{name}: no partition was spooled", hint="is the DataFrame empty?")
    found = sorted(parts, key=lambda part: part["partition"])
    count = Counter(part["partition"] for part in found)
    for number in range(min(0, found[0]["partition"]), found[-1]["partition"] + 1):
        if count[number] != 1:
            raise DataError(
                f"{name}: partition {number} was spooled {count[number]} times: expected once, as "
                f"all from 0 to {found[-1]['partition']}",
                hint=AGAIN,
            )
    filled = [part for part in found if part["rows"]]
    for part in filled:
        if part["layout"] != filled[0]["layout"]:
            raise DataError(
                f"{name}: rows of partition {part['partition']} are {part['layout']}, those of "
                f"partition {filled[0]['partition']} {filled[0]['layout']}: expected one size",
                hint=f"pad, cut or resize them to one size {MEND}",
            )
    partitions = (
        Partition(f"partition-{p['partition']} {p['checksum']}", p["rows"]) for p in found
    )
    return Manifest(tuple(partitions), whole=True)


def _arrow_schema(fields: Sequence[Any], wanted: Sequence[str], place: Place) -> pa.Schema:
    """Spark's fields as Arrow has them, those that nobody wants without their types."""
    import pyarrow as pa
    from pyspark.errors import PySparkException
    from pyspark.sql.pandas.types import to_arrow_type

    found = []
    for field in fields:
        kind = pa.null()
        if field.name in wanted:
            try:
                kind = to_arrow_type(field.dataType)
            except (PySparkException, AssertionError) as error:  # assert: times need a zone
                name = field.dataType.simpleString()
                raise unsuitable(name, name, replace(place, column=field.name)) from error
        found.append(pa.field(field.name, kind))
    return pa.schema(found)
