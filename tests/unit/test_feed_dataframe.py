"""DataFrames: from a partition's Arrow batches to a worker's records, and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from penstock import feed
from penstock.errors import DataError, JobError
from penstock.feed.bad import bad_of
from penstock.feed.columns import Selection
from penstock.feed.dataframe import (
    SPOOL,
    DataFrameSource,
    SpooledSource,
    manifest_of,
)
from penstock.feed.intake import Arrival, Intake, numbers
from penstock.feed.manifest import Part
from penstock.spec import SOURCE, Maker

SIZES = [5, 0, 3, 9, 1]
"""Rows of each partition."""
ROWS = sum(SIZES)
Y = pa.array(np.arange(ROWS) % 4)


def images() -> tuple[pa.Array, np.ndarray[Any, Any]]:
    tensors = np.random.default_rng(0).integers(0, 256, (ROWS, 3, 2, 2), dtype=np.uint8)
    rows = [
        {"origin": f"file-{i}", "height": 2, "width": 2, "nChannels": 3, "mode": 16}
        | {"data": image[::-1].transpose(1, 2, 0).tobytes()}
        for i, image in enumerate(tensors)
    ]
    fields = [(name, pa.int32()) for name in ("height", "width", "nChannels", "mode")]
    kind = pa.struct([("origin", pa.string()), *fields, ("data", pa.binary())])
    return pa.array(rows, kind), tensors


GRID = np.random.default_rng(1).normal(size=(ROWS, 2, 3)).astype(np.float32)
BYTES = np.random.default_rng(2).integers(0, 256, (ROWS, 4), dtype=np.uint8)
FLAGS = np.arange(ROWS) % 3 == 0
KINDS: dict[str, tuple[dict[str, pa.Array], str | tuple[str, ...], np.ndarray[Any, Any]]] = {
    "float": ({"x": pa.array(GRID[:, 0, 0])}, "x", GRID[:, 0, 0]),
    "bool": ({"x": pa.array(FLAGS)}, "x", FLAGS),
    "list": ({"x": pa.array(GRID[:, 0].tolist(), pa.list_(pa.float32()))}, "x", GRID[:, 0]),
    "nested list": (
        {"x": pa.array(GRID.tolist(), pa.large_list(pa.list_(pa.float32())))},
        "x",
        GRID,
    ),
    "fixed list": (
        {"x": pa.array(GRID[:, 0].tolist(), pa.list_(pa.float32(), 3))},
        "x",
        GRID[:, 0],
    ),
    "tensor": ({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(GRID)}, "x", GRID),
    "binary": ({"x": pa.array([row.tobytes() for row in BYTES])}, "x", BYTES),
    "large binary": (
        {"x": pa.array([row.tobytes() for row in BYTES], pa.large_binary())},
        "x",
        BYTES,
    ),
    "image": ({"x": images()[0]}, "x", images()[1]),
    "stacked": (
        {"a": pa.array(GRID[:, 0, 0]), "b": pa.array(FLAGS)},
        ("b", "a"),
        np.stack([FLAGS.astype(np.float32), GRID[:, 0, 0]], axis=1),
    ),
    "target alone": ({}, ("y",), Y.to_numpy()[:, None].astype(np.float32)),
}


COLUMNS = ("c0", "c3", "c1")
"""What the columns of a source are called in Spark's batches, those that it has."""


def arrival(features: Any = "x", sizes: Sequence[int] = SIZES, **changes: Any) -> Arrival:
    values = {"numbers": numbers(len(sizes), len(sizes)), **changes}
    return Arrival(values.pop("name", "train"), Selection(features, "y"), **values)


def coming(
    columns: dict[str, pa.Array],
    names: Sequence[str],
    sizes: Sequence[int] = SIZES,
    source: int = 0,
    at_once: int = 4,
) -> list[pa.RecordBatch]:
    """All rows, partition after partition, in batches that hold rows of several."""
    places = pa.array(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    sources = pa.array(np.full(len(places), source, np.int32))
    values = {slot: columns[name] for name, slot in zip(names, COLUMNS, strict=False)}
    table = pa.table({"source": sources, "partition": places, **values})
    return table.to_batches(max_chunksize=at_once)


class Taken:
    """An intake as its agent has it: links to the worker's folder, and what it tells."""

    def __init__(self, folder: Path, *arrivals: Arrival) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.told = folder, list[dict[str, Any]]()
        columns = [COLUMNS[: len(each.selection.names)] for each in arrivals]
        self.intake = Intake(str(folder), pickle.dumps(list(arrivals)), columns, self.tell)

    def tell(self, message: dict[str, Any]) -> None:
        self.told.append(json.loads(json.dumps(message)))
        if message["event"] == "reading":
            self.intake.link(message["source"], message["partition"], str(self.folder))

    def all(self, *batches: Iterable[pa.RecordBatch]) -> dict[str, Any]:
        """Takes them in, as those of a whole task."""
        for batch in itertools.chain(*batches):
            self.intake.write(batch)
        done = self.intake.close()
        for source in range(len(self.intake._arrivals)):
            read = {m["partition"] for m in self.told if m["source"] == source}
            self.intake.empty(source, sorted({*self.intake._arrivals[source].numbers} - read))
        return done

    def sums(self, of: str = "rows") -> list[str]:
        return [m["sum"] for m in self.told if m["event"] == "sum" and m["of"] == of]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Taken]:
    def make(*arrivals: Arrival, name: str = "agent") -> Taken:
        monkeypatch.setenv(SPOOL, str(tmp_path / name / "spool"))
        return Taken(tmp_path / name, *arrivals)

    return make


def test_partitions_are_numbered_in_blocks_of_shards() -> None:
    assert numbers(4, 4) == numbers(4, 1) == (0, 1, 2, 3)
    assert numbers(6, 2) == (0, 2, 4, 1, 3, 5)
    assert numbers(5, 4) == (0, 1, 2, 3, 7)
    for count, shards in itertools.product(range(1, 40), range(1, 9)):
        found = numbers(count, shards)
        assert len({*found}) == count
        dealt = [[p for p in found if p % shards == shard] for shard in range(shards)]
        assert [p for some in dealt for p in some] == list(found)  # blocks, in order
        for shard, some in enumerate(dealt):
            assert some == [shard + k * shards for k in range(len(some))]
            assert len(some) - count // shards in (0, 1)


@pytest.mark.parametrize("at_once", [1, 4, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_become_the_records_of_shards(
    agent: Callable[..., Taken], kind: str, at_once: int
) -> None:
    columns, features, expected = KINDS[kind]
    here = arrival(features, numbers=numbers(len(SIZES), 2))
    taken = agent(here)
    taken.all(coming({**columns, "y": Y}, here.selection.names, at_once=at_once))
    source = pickle.loads(pickle.dumps(SpooledSource("train", 0, features, "y")))
    assert isinstance(source, feed.Stream)
    assert source.manifest() == feed.Manifest((), whole=True, open=True)
    seen, parts = 0, []
    for shard in range(2):
        records = source.open_shard(shard, 2)
        records.wait(ROWS, 5.0)
        assert records.whole
        x, y = records.take(np.arange(len(records)))
        rows = slice(seen, seen + len(records))  # blocks of partitions, in Spark's order
        seen += len(records)
        assert x.dtype == torch.from_numpy(expected).dtype
        assert torch.equal(x, torch.from_numpy(expected[rows]))
        assert y.tolist() == Y.to_numpy()[rows].tolist()
        parts += source.parts(shard, 2, records)
    assert seen == ROWS
    manifest = manifest_of("train", parts)
    assert manifest.whole
    assert not manifest.open
    # Partitions 0, 1 | 2, 3, 4 are 0, 2 and 1, 3, 5; there is no 4, which counts as empty.
    assert [partition.rows for partition in manifest.partitions] == [5, 3, 0, 9, 0, 1]


def test_sums_are_of_rows_and_not_of_batches(agent: Callable[..., Taken]) -> None:
    columns = {**KINDS["list"][0], "y": Y}
    one, other, third = (agent(arrival(), name=name) for name in "abc")
    one.all(coming(columns, ["x", "y"], at_once=1))
    other.all(coming(columns, ["x", "y"], at_once=100))
    assert one.sums() == other.sums()
    assert one.sums("first rows") == other.sums("first rows")
    swapped = {name: column.take([1, 0, *range(2, ROWS)]) for name, column in columns.items()}
    third.all(coming(swapped, ["x", "y"]))
    assert third.sums()[0] != one.sums()[0]
    assert third.sums()[1:] == one.sums()[1:]


def test_a_partition_can_be_read_before_it_ends(agent: Callable[..., Taken]) -> None:
    taken = agent(arrival(sizes=[1000]))
    wide = {"x": pa.array([bytes(2**18)] * 100), "y": pa.array(range(100))}
    records = SpooledSource("train", 0, "x", "y").open_shard(0, 1)
    assert len(records) == 0
    for batch in coming(wide, ["x", "y"], [100]):
        taken.intake.write(batch)
    assert len(records) == 64  # a window
    assert not records.whole
    assert taken.sums("first rows")
    assert not taken.sums()
    taken.intake.close()
    records.wait(101, 5.0)
    assert len(records) == 100
    assert records.whole


def test_a_worker_waits_no_longer_for_what_failed(agent: Callable[..., Taken]) -> None:
    taken = agent(arrival(sizes=[9]))
    taken.intake.write(coming({"x": Y, "y": Y}, ["x", "y"], [ROWS])[0])
    records = SpooledSource("train", 0, "x", "y").open_shard(0, 1)
    taken.intake.fail(DataError("train: row 9 is bad", hint="mend it"))
    with pytest.raises(DataError, match="train: row 9 is bad"):
        records.wait(10, 5.0)


def test_empty_partitions_and_sources_are_no_rows(agent: Callable[..., Taken]) -> None:
    taken = agent(arrival(sizes=[0, 0]))
    assert taken.all([]) == {"bad": []}
    source = SpooledSource("train", 0, "x", "y")
    records = source.open_shard(1, 2)
    assert len(records) == 0
    assert records.whole
    assert [len(each) for each in records.take(np.array([], np.int64))] == [0, 0]
    assert [part["rows"] for part in source.parts(1, 2, records)] == [0]
    with pytest.raises(DataError, match="train: no partition was spooled"):
        manifest_of("train", [])


def test_sources_do_not_mix_and_nobodys_rows_are_passed_over(agent: Callable[..., Taken]) -> None:
    taken = agent(arrival(), arrival(sizes=[ROWS], name="test"))
    first = coming({**KINDS["float"][0], "y": Y}, ["x", "y"], at_once=100)
    second = coming({**KINDS["bool"][0], "y": Y}, ["x", "y"], [ROWS], source=1)
    nobody = coming({**KINDS["float"][0], "y": Y}, ["x", "y"], source=-1)
    taken.all(nobody, first, second)
    for number, (kind, shards) in enumerate([("float", len(SIZES)), ("bool", 1)]):
        source = SpooledSource(kind, number, "x", "y")
        all_x = []
        for shard in range(shards):
            records = source.open_shard(shard, shards)
            all_x.append(records.take(np.arange(len(records)))[0])
            assert records.whole
        have = torch.cat([x for x in all_x if len(x)])
        assert torch.equal(have, torch.from_numpy(KINDS[kind][2]))


def test_a_bad_row_is_found_with_its_partition(agent: Callable[..., Taken]) -> None:
    rows = GRID[:, 0].tolist()
    for number, (bad, words) in enumerate(
        [
            ([*rows[:14], None, *rows[15:]], "null in row 6"),
            ([*rows[:14], [1.0, None, 2.0], *rows[15:]], "null in row 6"),
            ([*rows[:14], [1.0], *rows[15:]], "row 6 holds 1 values, the first row 3"),
        ]
    ):
        batches = coming({"x": pa.array(bad, pa.list_(pa.float32())), "y": Y}, ["x", "y"])
        with pytest.raises(DataError) as caught:
            agent(arrival(), name=f"error-{number}").all(batches)
        assert f"train: partition 3: column 'x': {words}" in str(caught.value)
        assert "in the DataFrame" in caught.value.hint
        skipping = agent(arrival(on_bad_record="skip"), name=f"skip-{number}")
        (told,) = skipping.all(batches)["bad"]
        assert (told["source"], told["count"]) == ("train", 1)
        assert words in told["line"]
        records = SpooledSource("train", 0, "x", "y").open_shard(3, len(SIZES))
        assert len(records) == SIZES[3] - 1


def test_bad_rows_are_kept_in_quarantine(agent: Callable[..., Taken], tmp_path: Path) -> None:
    place = {"on_bad_record": "quarantine", "quarantine": str(tmp_path / "bad")}
    x = pa.array([1.0, None, 3.0] * 6)
    agent(arrival(**place)).all(coming({"x": x, "y": Y}, ["x", "y"]))
    kept = [
        json.loads(line)
        for path in (tmp_path / "bad").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert len(kept) == 6
    assert {(each["where"], each["row"]) for each in kept} >= {("train: partition 0", 1)}


def test_a_partition_that_was_not_counted(agent: Callable[..., Taken]) -> None:
    batches = coming({"x": Y, "y": Y}, ["x", "y"])
    with pytest.raises(DataError, match="train: partition 3: expected 0 to 2") as caught:
        agent(arrival(sizes=SIZES[:3])).all(batches)
    assert "adaptive execution" in caught.value.hint


# What is taken from elsewhere


def test_a_copy_is_what_it_is_of(agent: Callable[..., Taken]) -> None:
    wide = {"x": pa.array([bytes([n]) * 2**18 for n in range(100)]), "y": pa.array(range(100))}
    reader = agent(arrival(sizes=[9]), name="reader")
    owner = agent(arrival(sizes=[9]), name="owner")
    for batch in coming(wide, ["x", "y"], [100]):
        reader.intake.write(batch)
    records = SpooledSource("train", 0, "x", "y").open_shard(0, 1)
    copy = owner.intake.copy(0, 0)
    assert copy is not None
    put_all(reader, copy)
    assert (len(records), copy.number, copy.whole) == (64, 1, False)
    assert owner.intake.copy(0, 0) is copy
    reader.intake.close()
    put_all(reader, copy)
    assert copy.whole
    assert owner.intake.copy(0, 0) is None
    records.wait(100, 5.0)
    assert records.whole
    x, y = records.take(np.arange(100))
    assert y.tolist() == list(range(100))
    assert x[:, 0].tolist() == list(range(100))
    owner.intake.drop(0, 0)
    owner.intake.link(0, 0, str(reader.folder))  # it stays
    assert len(SpooledSource("train", 0, "x", "y").open_shard(0, 1)) == 100


def put_all(reader: Taken, copy: Any) -> None:
    """Copies what there is as yet."""
    while not copy.whole and (found := reader.intake.find(0, 0, copy.number)):
        what, path = found
        assert copy.put(what, copy.number, path.read_bytes()) == (what != "segment")
        copy.put(what, 0, b"that comes again")


def test_a_link_goes_with_its_reader_and_comes_with_the_next(agent: Callable[..., Taken]) -> None:
    first, second = (agent(arrival(sizes=[9]), name=name) for name in ("first", "second"))
    owner = agent(arrival(sizes=[9]), name="owner")
    path = owner.folder / "spool/0/0"
    batches = coming({"x": Y, "y": Y}, ["x", "y"], [ROWS])
    assert owner.intake.is_here(str(first.folder), first.intake.nonce)
    assert not owner.intake.is_here(str(first.folder), second.intake.nonce)
    assert not owner.intake.is_here("/there/is/no/such/folder", first.intake.nonce)
    first.intake.write(batches[0])
    owner.intake.link(0, 0, str(first.folder))
    records = SpooledSource("train", 0, "x", "y").open_shard(0, 1)
    assert len(records) == 0
    first.intake.abandon()
    owner.intake.drop(0, 0)
    assert not path.exists()
    second.all(batches)
    owner.intake.link(0, 0, str(second.folder))
    assert len(records) == ROWS
    assert not owner.intake.copying(0, 0)


def part(partition: int, rows: int = 3, checksum: str = "0" * 8, layout: str = "x") -> Part:
    return Part(partition=partition, rows=rows, checksum=checksum, layout=layout)


def test_the_manifest_has_whole_partitions_in_order() -> None:
    manifest = manifest_of("train", [part(2, 4, "1a2b3c4d"), part(0), part(1, 0, layout="")])
    assert manifest.whole
    names = [(partition.name, partition.rows) for partition in manifest.partitions]
    assert names == [
        ("partition-0 00000000", 3),
        ("partition-1 00000000", 0),
        ("partition-2 1a2b3c4d", 4),
    ]
    again = manifest_of("train", [part(0), part(2, 4, "1a2b3c4d"), part(1, 0, layout="")])
    assert again.fingerprint == manifest.fingerprint
    other = manifest_of("train", [part(0), part(2, 4, "1a2b3c4e"), part(1, 0, layout="")])
    assert other.fingerprint != manifest.fingerprint
    for parts, words in [
        ([part(0), part(2)], "train: partition 1 was spooled 0 times: expected once"),
        ([part(1)], "train: partition 0 was spooled 0 times"),
        ([part(0), part(1), part(0)], "train: partition 0 was spooled 2 times"),
        (
            [part(0, 0, layout=""), part(1), part(2, layout="y")],
            "rows of partition 2 are y, those of partition 1 x",
        ),
    ]:
        with pytest.raises(DataError) as caught:
            manifest_of("train", parts)
        assert words in str(caught.value)
        assert caught.value.hint


def test_only_a_worker_of_an_agent_has_spools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPOOL, raising=False)
    source = SpooledSource("train", 0, "x", "y")
    with pytest.raises(
        JobError, match=r"train is a Spark DataFrame(.|\n)*PENSTOCK_SPOOL is not set"
    ):
        source.open_shard(0, 1)


class Frame:
    """A DataFrame's surface around a schema of Spark's own; without a JVM there are no others."""

    def __init__(self, schema: Any, name: str = "") -> None:
        self.schema, self.sparkSession, self.name = schema, None, name

    def mapInArrow(self) -> None: ...

    def select(self, *columns: str) -> Frame:
        return Frame(self.schema, ", ".join(columns))


class Session:
    """Gives a frame for whatever is asked, and says how it was asked."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self.asked: list[tuple[str, Any]] = []

    def __getattr__(self, how: str) -> Any:
        def ask(what: Any) -> Frame:
            self.asked.append((how, what))
            return Frame(self.schema)

        return ask


class Rows:
    """The mark of an RDD."""

    def toDF(self) -> None: ...


@pytest.fixture
def schema() -> Any:
    types = pytest.importorskip("pyspark.sql.types")
    image = types.StructType(
        [
            types.StructField("origin", types.StringType()),
            *(
                types.StructField(name, types.IntegerType())
                for name in ("height", "width", "nChannels", "mode")
            ),
            types.StructField("data", types.BinaryType()),
        ]
    )
    kinds = {
        "amount": types.FloatType(),
        "age": types.ShortType(),
        "paid": types.BooleanType(),
        "image": image,
        "grid": types.ArrayType(types.ArrayType(types.DoubleType())),
        "region": types.StringType(),
        "when": types.TimestampType(),
        "price": types.DecimalType(10, 2),
        "since": types.YearMonthIntervalType(),
        "twice": types.LongType(),
        "a.`b": types.LongType(),
    }
    fields = [types.StructField(name, kind) for name, kind in kinds.items()]
    return types.StructType([*fields, fields[-2]])


def test_a_frame_is_resolved_and_cut_to_its_columns(schema: Any) -> None:
    session = Session(schema)
    rows, frame = Rows(), Frame(schema)
    for given, asked in [
        ("claims", [("table", "claims")]),
        ("select * from claims", [("sql", "select * from claims")]),
        ("select 1\n", [("sql", "select 1\n")]),
        (rows, [("createDataFrame", rows)]),
        (frame, []),
    ]:
        source = feed.dataframe(given, features="image", target="age")
        assert isinstance(source, DataFrameSource)
        assert source.frame_of(session).name == "`image`, `age`"
        assert session.asked == asked
        session.asked.clear()
    source = feed.dataframe("t", features=["a.`b", "paid", "a.`b"], target="paid")
    assert isinstance(source, DataFrameSource)
    assert source.frame_of(session).name == "`a.``b`, `paid`"


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("amuont", ["no column 'amuont'; it has: amount, age", "did you mean 'amount'?"]),
        ("region", ["column 'region' is string", "integer codes in the DataFrame"]),
        ("when", ["column 'when' is timestamp", "cast it"]),
        ("since", ["column 'since' is interval", "cast it"]),
        ("price", ["column 'price' is decimal", "cast it"]),
        ("twice", ["column 'twice' is there 2 times"]),
        (["amount", "grid"], ["column 'grid' is list", "features: grid"]),
    ],
)
def test_a_wrong_column_is_refused_by_the_schema(
    schema: Any, features: str | list[str], words: list[str]
) -> None:
    source = feed.dataframe("select * from claims", features=features, target="age")
    assert isinstance(source, DataFrameSource)
    with pytest.raises(DataError) as caught:
        source.frame_of(Session(schema))
    for word in ["dataframe 'select * from claims': ", *words]:
        assert word in str(caught.value)


def test_what_spark_refuses_is_said_in_a_line(schema: Any) -> None:
    from pyspark.errors import AnalysisException

    class Refusing(Session):
        def table(self, name: str) -> Frame:
            raise AnalysisException(f"[NOT_FOUND] The table `{name}` cannot be found.\nat line 1")

    source = feed.dataframe("claims", features="x", target="y")
    assert isinstance(source, DataFrameSource)
    with pytest.raises(DataError) as caught:
        source.frame_of(Refusing(schema))
    assert caught.value.message == (
        "dataframe 'claims': [NOT_FOUND] The table `claims` cannot be found."
    )


def test_without_spark_it_is_refused() -> None:
    source = feed.dataframe("claims", features="x", target="y")
    assert isinstance(source, feed.Source)
    for use in (source.manifest, lambda: source.open(())):
        with pytest.raises(JobError, match=r"dataframe 'claims' is read by Spark's(.|\n)*on=spark"):
            use()


def test_a_job_file_says_it() -> None:
    said = {"dataframe": {"frame": "claims", "features": ["a", "b"], "target": "label"}}
    maker = Maker.of(said, SOURCE)
    assert maker.describe() == said
    source = maker.make()
    assert isinstance(source, DataFrameSource)
    spooled = source.spooled("train", 2)
    assert spooled == SpooledSource("train", 2, ("a", "b"), "label")
    assert isinstance(spooled, feed.Source)
    assert spooled.describe() is None
    assert feed.dataframe(Rows(), features="a", target="b").describe() is None


@pytest.mark.parametrize("given", ["", "  ", np.zeros(3), {"x": [1]}, None, pa.table({"x": [1]})])
def test_what_is_no_frame_is_refused(given: Any) -> None:
    with pytest.raises(DataError, match=r"dataframe: received .*: expected a Spark DataFrame"):
        feed.dataframe(given, features="x", target="y")


def test_where_bad_records_go_is_known_to_workers() -> None:
    source = feed.dataframe("t", features="x", target="y", on_bad_record="quarantine")
    bad_of(source).folder = "memory://run/quarantine"
    assert isinstance(source, DataFrameSource)
    assert source.spooled("train", 0).bad.folder == "memory://run/quarantine"


class Here:
    """A DataFrame whose first rows are a table; what it was asked for is `limits`."""

    def __init__(self, table: Any, schema: Any, limits: list[int] | None = None) -> None:
        self.table, self.schema, self.sparkSession = table, schema, None
        self.limits = [] if limits is None else limits

    def mapInArrow(self) -> None: ...

    def select(self, *columns: str) -> Here:
        return Here(self.table.select([c.strip("`") for c in columns]), self.schema, self.limits)

    def limit(self, rows: int) -> Here:
        self.limits.append(rows)
        return Here(self.table.slice(0, rows), self.schema)

    def toArrow(self) -> Any:
        return self.table


def first(columns: dict[str, Any], target: str = "age", **options: Any) -> DataFrameSource:
    """A source of a frame with a column "x" of arrays, or of bytes, and one of numbers."""
    types = pytest.importorskip("pyspark.sql.types")
    table = pa.table(columns)
    binary = pa.types.is_binary(table.schema.field("x").type)
    kind = types.BinaryType() if binary else types.ArrayType(types.FloatType())
    schema = types.StructType(
        [types.StructField("x", kind), types.StructField("age", types.ShortType())]
    )
    source = feed.dataframe(Here(table, schema), **{"features": "x", "target": target, **options})
    assert isinstance(source, DataFrameSource)
    return source


def read(source: Any) -> feed.Rows:
    """All records of a source, after its stages."""
    records = source.open(source.manifest().share(0, 1))
    ids = np.arange(len(records))
    rows = feed.Rows(*records.take(ids), ids)
    for stage in source.stages:
        rows = stage.apply(rows, np.random.default_rng(0))
    return rows


def test_the_first_rows_are_tensors_as_those_of_workers(tmp_path: Path) -> None:
    x = pa.array([[float(i), 2.0] for i in range(50)], pa.list_(pa.float32()))
    source = first({"x": x, "age": pa.array(range(50), pa.int16())})
    assert source.bound
    found = source.head("train")
    assert isinstance(found, feed.Source)
    assert found.manifest().shard_rows(3) == (32, 0, 0)
    rows = read(found)
    assert (rows.x.dtype, rows.y.dtype) == (torch.float32, torch.int16)
    assert rows.x.tolist() == [[float(i), 2.0] for i in range(32)]
    assert rows.y.tolist() == list(range(32))
    assert source._frame.limits == [32]  # more is not asked of Spark
    assert not feed.dataframe("claims", features="x", target="y").bound  # type: ignore[attr-defined]


def test_the_first_rows_may_be_bad() -> None:
    columns = {
        "x": pa.array([[1.0], None, [1.0, 2.0], [3.0]], pa.list_(pa.float32())),
        "age": pa.array([4, 5, 6, 7], pa.int16()),
    }
    with pytest.raises(DataError, match=r"train: column 'x': null in row 1(.|\n)*hint"):
        first(columns).head("train")
    source = first(columns, on_bad_record="skip")
    assert read(source.head("train")).y.tolist() == [4, 7]
    assert bad_of(source).count == 0  # a run tells of them
    nulls = {"x": pa.nulls(3, pa.list_(pa.float32())), "age": pa.array([1, 2, 3], pa.int16())}
    with pytest.raises(DataError, match="every record is bad: 3 of 3"):
        first(nulls, on_bad_record="skip").head("train")
    with pytest.raises(DataError, match=r"train: there are no rows in dataframe(.|\n)*its filter"):
        first({name: column[:0] for name, column in columns.items()}).head("train")


def test_the_first_rows_of_encoded_images_are_decoded() -> None:
    pillow = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    pillow.new("RGB", (6, 4), (255, 0, 0)).save(file, "PNG")
    columns = {"x": pa.array([file.getvalue()]), "age": pa.array([1], pa.int16())}
    rows = read(first(columns, features=feed.Image("x", 3, 2)).head("train"))
    assert rows.x.shape == (1, 3, 3, 2)
    assert rows.x[0, :, 0, 0].tolist() == [255, 0, 0]
