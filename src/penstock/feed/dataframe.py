"""Spark DataFrames as sources: `dataframe` for the user, and how their rows come to the workers.

    driver    DataFrameSource.frame_of(session): the columns, checked before any job
    agents    `intake`: rows of Spark's partitions into spools, as they come
    worker    SpooledSource: the records of its shards, from those spools as they grow
    planner   HeadSource: the first rows, on the driver, for their shapes

pyarrow and pyspark are imported inside the functions that use them, as in `columns`.
"""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import DataError, JobError
from penstock.feed.bad import BadRecords
from penstock.feed.columns import Features, Image, Place, Selection, unsuitable
from penstock.feed.converter import Converter, Values
from penstock.feed.decode import stages_of
from penstock.feed.filling import SPOOL
from penstock.feed.intake import MEND, Arrival, numbers
from penstock.feed.manifest import NO_CHECKSUM, Manifest, Part, Partition, Piece, partition_of
from penstock.feed.shelf import ALIVE, partitions_of
from penstock.feed.source import Records, Source, Stage
from penstock.feed.spool import SpoolWriter
from penstock.feed.spooled import SpoolRecords

if TYPE_CHECKING:
    import pyarrow as pa

LOST_S = 30.0
"""How long the driver may take to end a worker whose data was lost with another agent."""
HEAD_ROWS = 32
"""How many rows tell what all are like: more than one, for the first may be bad."""
NO_ROWS = "does its query, or its filter, leave any rows?"


def dataframe(
    frame: Any, *, features: Features, target: str, on_bad_record: str = "error"
) -> Source:
    """Records from a Spark DataFrame, each row a record; for runs on Spark.

    A column of numbers or booleans is a tensor (batch,); arrays of one length, nested or not, are
    (batch, d, ...); binary of one length is uint8 (batch, length); images as Spark reads them are
    uint8 (batch, channels, height, width), in the order RGB(A). Dtypes stay as they are. Only the
    columns named are read, each partition is trained on as a whole by one shard, and training
    begins with the first rows. A partition may never end, if the run is stopped otherwise.

    Arguments:
        frame: a DataFrame, classic or of Spark Connect; an RDD of Rows; the name of a table or
            temporary view; or a SQL query.
        features: a column, taken as its tensor; or several columns of numbers, stacked as float32
            (batch, columns), or as float64 if one of them is. A list of one column of numbers is
            (batch, 1); a list of one other column is that column. Or a `feed.Image`: encoded
            images.
        target: a column, taken as its tensor.
        on_bad_record: what becomes of rows with nulls, or of unequal lengths and sizes: "error",
            "skip" (left out and counted), or "quarantine" (also written to the run directory).

    Raises:
        DataError: `frame` is none of these; before any Spark job for missing columns and columns
            of other types; as they come for nulls and for unequal lengths and sizes.
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
    return DataFrameSource(frame, Selection.of("dataframe", features, target), on_bad_record)


class DataFrameSource:
    """A DataFrame, as the driver knows it: no worker opens it."""

    def __init__(self, frame: Any, selection: Selection, on_bad_record: str = "error") -> None:
        self._frame, self._selection = frame, selection
        self.bad = BadRecords(on_bad_record)

    def manifest(self) -> Manifest:
        raise self._needs_spark()

    def open(self, pieces: Sequence[Piece]) -> Records:
        raise self._needs_spark()

    def describe(self) -> dict[str, Any] | None:
        if not isinstance(self._frame, str):
            return None
        values = {"frame": self._frame, **self._selection.describe()}
        if not self.bad.stops:
            values["on_bad_record"] = self.bad.on_bad_record
        return {"dataframe": values}

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

    @property
    def bound(self) -> bool:
        """Whether it is a DataFrame, and so of a session; else one must be given."""
        return hasattr(self._frame, "mapInArrow")

    def head(self, name: str, session: Any = None) -> HeadSource:
        """Its first rows, which are tensors as those of workers are. Runs one Spark job.

        Nothing is told of bad records here, and none are kept.

        Arguments:
            name: of the source in the run, for messages.
            session: a SparkSession, where it is not `bound`.

        Raises:
            DataError: as `frame_of`; Spark cannot compute the rows; there are none, or none that
                is good; a bad row, where that is an error.
        """
        frame = self.frame_of(session)
        try:
            table = frame.limit(HEAD_ROWS).toArrow()
        except Exception as error:  # what a query, a function or the JVM raises
            raise DataError(
                f"{name}: Spark cannot compute the first rows of {self._label}: {_said(error)}",
                hint="does frame.show() work?",
            ) from error
        if not table.num_rows:
            raise DataError(f"{name}: there are no rows in {self._label}", hint=NO_ROWS)
        bad = BadRecords("error" if self.bad.stops else "skip")
        converter = Converter(self._selection, Place(name, "", mend=MEND), bad)
        values = [converter.convert(batch) for batch in table.to_batches()]
        if not converter.known.empty:
            raise bad.every(f"{name}, its first rows")
        return HeadSource(name, self._selection.features, tuple(values), bad)

    def spooled(self, name: str, number: int) -> SpooledSource:
        """The same records for workers.

        Arguments:
            name: of the source in the run, for messages.
            number: of the source among those that agents take in.
        """
        selection = self._selection
        return SpooledSource(name, number, selection.features, selection.target, self.bad)

    def arrival(self, name: str, partitions: int, shards: int, quarantine: str) -> Arrival:
        """The same records for agents.

        Arguments:
            name: of the source in the run, for messages.
            partitions: how many Spark runs the DataFrame in.
            shards: of the run.
            quarantine: the folder of bad records.
        """
        on_bad_record = self.bad.on_bad_record
        dealt = numbers(partitions, shards)
        return Arrival(name, self._selection, dealt, on_bad_record, quarantine)

    def __getstate__(self) -> dict[str, Any]:
        """A Job takes its sources along to the workers, but a DataFrame stays with its session."""
        named = self._frame if isinstance(self._frame, str) else self._label
        return {"_frame": named, "_selection": self._selection, "bad": self.bad}

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
    """The rows of a DataFrame, from the spools of this worker's agent, which grow meanwhile.

    Arguments:
        name: of the source in the run.
        number: of the source: its spools are `<folder>/<number>/<partition>`, the folder named by
            the environment variable `SPOOL`.
        features, target: as `dataframe` has them.
        bad: what becomes of images that cannot be decoded.
    """

    name: str
    number: int
    features: str | tuple[str, ...] | Image
    target: str
    bad: BadRecords = field(default_factory=BadRecords, compare=False)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What decodes encoded images, if there are any."""
        return stages_of(self.features, self.name, self.bad)

    def manifest(self) -> Manifest:
        return Manifest((), whole=True, open=True)

    def open(self, pieces: Sequence[Piece]) -> Records:
        raise DataError(f"{self.name}: its records are read shard by shard", hint="open_shard")

    def describe(self) -> None:
        return None

    def open_shard(self, shard: int, shards: int) -> SpoolRecords:
        """The records of a shard: those of its partitions, in order of their numbers."""
        mine, folder = self._numbers(shard, shards), self._folder

        def spool(n: int) -> Path | None:
            return folder / str(mine[n]) if n < len(mine) else None

        return SpoolRecords(spool, self.name, grace_s=LOST_S, alive=folder.parent / ALIVE)

    def parts(self, shard: int, shards: int, records: SpoolRecords) -> list[Part]:
        """What the shard's partitions held. As many for each shard: empty ones fill it up."""
        found = records.parts(self._numbers(shard, shards))
        most = -(-len(partitions_of(self._folder)) // shards)
        for number in range(shard + len(found) * shards, most * shards, shards):
            found.append(Part(partition=number, rows=0, checksum=NO_CHECKSUM, layout=""))
        return found

    @property
    def _folder(self) -> Path:
        folder = os.environ.get(SPOOL)
        if folder is None:
            raise JobError(
                f"{self.name} is a Spark DataFrame: no spool of it is here ({SPOOL} is not set)",
                hint="only workers that Spark has placed can read it: on=spark",
            )
        return Path(folder) / str(self.number)

    def _numbers(self, shard: int, shards: int) -> list[int]:
        return [p for p in partitions_of(self._folder) if p % shards == shard]


@dataclass(frozen=True)
class HeadSource:
    """Rows of a DataFrame that are here already, read as a worker reads its spools.

    Arguments:
        name: of the source in the run.
        features: as `dataframe` has them.
        values: the rows, as an agent spools them.
        bad: what becomes of images that cannot be decoded.
    """

    name: str
    features: str | tuple[str, ...] | Image
    values: tuple[Values, ...]
    bad: BadRecords

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What decodes encoded images, if there are any."""
        return stages_of(self.features, self.name, self.bad)

    def manifest(self) -> Manifest:
        rows = sum(len(each["y"]) for each in self.values)
        return Manifest((Partition("first rows", rows),), whole=True)

    def open(self, pieces: Sequence[Piece]) -> SpoolRecords:
        """All of them: there is one partition, and it is whole."""
        with tempfile.TemporaryDirectory(prefix="penstock-head-") as folder:
            spool = Path(folder) / "0"
            writer = SpoolWriter(spool, self.name)
            for values in self.values:
                writer.write(values)
            writer.close()
            records = SpoolRecords(lambda n: spool if n == 0 else None, self.name)
            assert records.whole  # and so mapped: the folder can go
            return records

    def describe(self) -> None:
        return None


def manifest_of(name: str, parts: Sequence[Part]) -> Manifest:
    """The manifest of one source, whole partitions numbered from 0.

    Arguments:
        name: of the source, for messages.
        parts: of all shards, in any order.

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
                hint="run again, and report it if it comes again",
            )
    filled = [part for part in found if part["rows"]]
    for part in filled:
        if part["layout"] != filled[0]["layout"]:
            raise DataError(
                f"{name}: rows of partition {part['partition']} are {part['layout']}, those of "
                f"partition {filled[0]['partition']} {filled[0]['layout']}: expected one size",
                hint=f"pad, cut or resize them to one size {MEND}",
            )
    return Manifest(tuple(map(partition_of, found)), whole=True)


def _arrow_schema(fields: Sequence[Any], wanted: Sequence[str], place: Place) -> pa.Schema:
    """Spark's fields as Arrow has them, those that nobody wants without their types."""
    import pyarrow as pa
    from pyspark.errors import PySparkException
    from pyspark.sql.pandas.types import to_arrow_type

    found = []
    for each in fields:
        kind = pa.null()
        if each.name in wanted:
            try:
                kind = to_arrow_type(each.dataType)
            except (PySparkException, AssertionError) as error:  # assert: times need a zone
                name = each.dataType.simpleString()
                raise unsuitable(name, name, replace(place, column=each.name)) from error
        found.append(pa.field(each.name, kind))
    return pa.schema(found)


def _said(error: Exception) -> str:
    """What an error says first; of a Java exception, which Python is told of at length, that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    java = next((line.removeprefix(": ") for line in lines if line.startswith(": ")), None)
    return java or next(iter(lines), type(error).__name__)
