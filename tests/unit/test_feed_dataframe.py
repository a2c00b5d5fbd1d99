"""DataFrames: from a partition's Arrow batches to a worker's records, and what is refused."""

from __future__ import annotations

import importlib
import json
import pickle
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from penstock import feed
from penstock.errors import DataError, JobError
from penstock.feed.dataframe import (
    SPOOL,
    DataFrameSource,
    SpooledSource,
    manifest_of,
)
from penstock.feed.packing import PACKED, SpooledPartition, Unpacker, pack
from penstock.spec import SOURCE, Maker

module = importlib.import_module("penstock.feed.packing")

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


def packed(
    columns: dict[str, pa.Array], sizes: Sequence[int] = SIZES, source: int = 0
) -> list[list[pa.RecordBatch]]:
    """Each partition, in packed batches; Spark gives batches of up to 4 rows here."""
    table, start, partitions = pa.table({**columns, "y": Y}), 0, []
    for number, rows in enumerate(sizes):
        batches = table.slice(start, rows).to_batches(max_chunksize=4)
        partitions.append(list(pack(batches, number, source)))
        start += rows
    return partitions


def interleaved(partitions: Sequence[Sequence[pa.RecordBatch]], seed: int) -> list[pa.RecordBatch]:
    """In an order of no order, save that of each partition."""
    turns = [i for i, batches in enumerate(partitions) for _ in batches]
    random.Random(seed).shuffle(turns)
    left = [iter(batches) for batches in partitions]
    return [next(left[turn]) for turn in turns]


def unpacked(folder: Path, batches: Iterable[pa.RecordBatch]) -> list[SpooledPartition]:
    unpacker = Unpacker(folder)
    for batch in batches:
        unpacker.write(batch)
    return unpacker.close()


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SPOOL, str(tmp_path / "spool"))
    return tmp_path / "spool"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_become_the_records_of_arrays(spool: Path, kind: str, seed: int) -> None:
    columns, features, expected = KINDS[kind]
    parts = unpacked(spool, interleaved(packed(columns), seed))
    source = SpooledSource("train", 0, features, "y")
    source = pickle.loads(pickle.dumps(source))
    manifest = manifest_of("train", json.loads(json.dumps(parts)))
    assert manifest == source.manifest()
    twin = feed.arrays(expected, Y.to_numpy(), partitions=SIZES)
    for shards in (1, 2, 3, 7):
        for shard in range(shards):
            pieces = manifest.share(shard, shards)
            assert pieces == twin.manifest().share(shard, shards)
            for some in (pieces, pieces[::-1]):
                records, wanted = source.open(some), twin.open(some)
                assert len(records) == len(wanted)
                rows = np.random.default_rng(shard).permutation(len(wanted))
                for ours, theirs in zip(records.take(rows), wanted.take(rows), strict=True):
                    assert isinstance(ours, torch.Tensor)
                    assert isinstance(theirs, torch.Tensor)
                    assert ours.dtype == theirs.dtype
                    assert torch.equal(ours, theirs)


def test_pieces_may_be_parts_of_partitions(spool: Path) -> None:
    columns, features, expected = KINDS["list"]
    unpacked(spool, interleaved(packed(columns), 0))
    pieces = (feed.Piece(3, 2, 7, 10), feed.Piece(0, 4, 5, 4), feed.Piece(3, 5, 6, 13))
    records = SpooledSource("train", 0, features, "y").open(pieces)
    x, y = records.take(np.arange(len(records)))
    ids = [10, 11, 12, 13, 14, 4, 13]
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    assert torch.equal(x, torch.from_numpy(expected[ids]))
    assert y.tolist() == Y.to_numpy()[ids].tolist()


def test_what_lies_in_one_batch_is_not_copied(spool: Path) -> None:
    columns, features, _ = KINDS["list"]
    unpacked(spool, interleaved(packed(columns), 0))
    source = SpooledSource("train", 0, features, "y")

    def is_view(piece: feed.Piece) -> bool:
        records = source.open([piece])
        return not records._x.flags.writeable  # type: ignore[attr-defined]

    assert is_view(feed.Piece(2, 0, 3, 5))
    assert is_view(feed.Piece(3, 4, 8, 12))
    assert not is_view(feed.Piece(3, 3, 8, 11))


def test_batches_are_cut_small_and_rows_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pa.record_batch({"x": [b"a" * 10] * 50 + [b"b" * 5000] + [b"c" * 10] * 49})
    whole = list(pack([batch], 0, 0))
    assert [each.column("rows")[0].as_py() for each in whole] == [100, 100]
    monkeypatch.setattr(module, "BATCH_BYTES", 200)
    bodies = list(pack([batch], 6, 3))
    rows = [each.column("rows")[0].as_py() for each in bodies]
    assert sum(rows[:-1]) == rows[-1] == 100
    assert max(rows[:-1]) < 20
    assert [each.column("batch")[0].as_py() for each in bodies] == list(range(len(bodies)))
    assert {
        (each.column("source")[0].as_py(), each.column("partition")[0].as_py()) for each in bodies
    } == {(3, 6)}
    monkeypatch.setattr(module, "ROW_BYTES", 4000)
    with pytest.raises(DataError, match=r"source 3, partition 6: row 50 takes 5,0\d\d bytes"):
        list(pack([batch], 6, 3))


def test_what_is_packed_has_the_schema_that_spark_is_told() -> None:
    kinds = {"int32": "int", "int64": "bigint", "binary": "binary"}
    (mark,) = pack([], 4, 1)
    said = ", ".join(f"{field.name} {kinds[str(field.type)]}" for field in mark.schema)
    assert said == PACKED
    assert mark.to_pylist() == [{"source": 1, "partition": 4, "batch": 0, "rows": 0, "body": b""}]


def test_empty_partitions_and_sources_are_no_rows(spool: Path) -> None:
    parts = unpacked(spool, [each for p in (1, 0) for each in pack([], p, 0)])
    assert [(part["partition"], part["rows"], part["layout"]) for part in parts] == [
        (0, 0, ""),
        (1, 0, ""),
    ]
    source = SpooledSource("train", 0, "x", "y")
    assert source.manifest().rows == 0
    records = source.open(())
    assert len(records) == 0
    assert [len(each) for each in records.take(np.array([], np.int64))] == [0, 0]
    with pytest.raises(DataError, match="train: no partition was spooled"):
        manifest_of("train", [])


def test_sources_do_not_mix(spool: Path) -> None:
    both = packed(KINDS["float"][0]) + packed(KINDS["bool"][0], [ROWS], source=1)
    parts = unpacked(spool, interleaved(both, 0))
    assert [(part["source"], part["partition"]) for part in parts] == [
        *((0, p) for p in range(5)),
        (1, 0),
    ]
    for number, kind in enumerate(("float", "bool")):
        source = SpooledSource(kind, number, "x", "y")
        records = source.open(source.manifest().share(0, 1))
        x, _ = records.take(np.arange(ROWS))
        assert isinstance(x, torch.Tensor)
        assert torch.equal(x, torch.from_numpy(KINDS[kind][2]))


def test_other_columns_and_nobodys_rows_are_passed_over(spool: Path) -> None:
    (data, *_), end = packed(KINDS["float"][0], [4])[0][:1], packed(KINDS["float"][0], [4])[0][1:]
    seed = {"agent": 0, "source": -1, "partition": 0, "batch": 0, "rows": 0, "body": None}
    seeds = pa.RecordBatch.from_pylist([seed], pa.schema([("agent", pa.int32()), *data.schema]))
    many = [each.add_column(0, "agent", pa.array([0], pa.int32())) for each in (data, *end)]
    together = pa.Table.from_batches([seeds, *many]).combine_chunks().to_batches()
    assert len(together) == 1
    assert [part["rows"] for part in unpacked(spool, together)] == [4]


def changed(one: pa.RecordBatch, **values: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{**one.to_pylist()[0], **values}], one.schema)


MISFITS: dict[str, tuple[Any, str]] = {
    "a gap": (lambda b: [b[0], b[2], b[3]], "received batch 2: expected batch 1"),
    "a missing beginning": (lambda b: b[1:], "received batch 1: expected batch 0"),
    "a double": (lambda b: [b[0], b[0], *b[1:]], "received batch 0: expected batch 1"),
    "another order": (lambda b: [b[1], b[0], *b[2:]], "received batch 1: expected batch 0"),
    "all twice": (lambda b: [*b, *b], "received batch 0 after the end mark: expected no more"),
    "two ends": (lambda b: [*b, b[-1]], "received batch 3 after the end mark"),
    "no end": (lambda b: b[:-1], "received 3 batches and no end mark: expected batch 3 or"),
    "a missing last batch": (lambda b: [*b[:2], b[3]], "received batch 3: expected batch 2"),
    "an early end": (
        lambda b: [*b[:2], changed(b[3], batch=2)],
        "received 8 rows and the end mark: expected 9",
    ),
    "other rows": (
        lambda b: [changed(b[0], rows=5), *b[1:]],
        "received 4 rows in batch 0: expected 5",
    ),
    "a damaged body": (lambda b: [b[0], changed(b[1], body=b"no Arrow"), *b[2:]], "batch 1 cannot"),
    "half a body": (
        lambda b: [changed(b[0], body=b[0].to_pylist()[0]["body"][:-100]), *b[1:]],
        "batch 0 cannot be read",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_is_lost_or_doubled_is_refused(tmp_path: Path, what: str) -> None:
    partitions = packed(KINDS["list"][0], source=2)
    assert len(unpacked(tmp_path / "good", interleaved(partitions, 0))) == len(SIZES)
    change, words = MISFITS[what]
    partitions[3] = change(partitions[3])
    with pytest.raises(DataError) as caught:
        unpacked(tmp_path / "bad", interleaved(partitions, 0))
    assert f"source 2, partition 3: {words}" in caught.value.message.replace("\n", " ")
    assert "run again" in caught.value.hint
    assert not (tmp_path / "bad/2/3/end.json").exists() or "after the end mark" in words


def test_a_bad_row_is_found_before_training(tmp_path: Path) -> None:
    rows = GRID[:, 0].tolist()
    good = pa.array(rows, pa.list_(pa.float32()))
    assert len(unpacked(tmp_path / "good", interleaved(packed({"x": good}), 0))) == 5
    for bad, words in [
        (rows[:14] + [None] + rows[15:], "null in row 6"),
        (rows[:14] + [[1.0, None, 2.0]] + rows[15:], "null in row 6"),
        (rows[:14] + [[1.0]] + rows[15:], "row 6 holds 1 values, the first row 3"),
    ]:
        partitions = packed({"x": pa.array(bad, pa.list_(pa.float32()))}, source=1)
        with pytest.raises(DataError) as caught:
            unpacked(tmp_path / words / str(len(bad[14] or [])), interleaved(partitions, 0))
        assert f"source 1, partition 3: column 'x': {words}" in str(caught.value)
        assert "in the DataFrame" in caught.value.hint


def part(partition: int, rows: int = 3, checksum: str = "0" * 8, layout: str = "x float32 (2,)"):  # type: ignore[no-untyped-def]
    return SpooledPartition(
        source=0, partition=partition, rows=rows, checksum=checksum, layout=layout
    )


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
            [part(0, 0, layout=""), part(1), part(2, layout="x float32 (3,)")],
            "rows of partition 2 are x float32 (3,), those of partition 1 x float32 (2,)",
        ),
    ]:
        with pytest.raises(DataError) as caught:
            manifest_of("train", parts)
        assert words in str(caught.value)
        assert caught.value.hint


def test_a_spool_of_other_data_is_refused(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked(spool, interleaved(packed(KINDS["float"][0]), 0))
    source = SpooledSource("train", 0, "x", "y")
    with pytest.raises(DataError, match="train: partition 2 has 3 rows here: expected at least 4"):
        source.open([feed.Piece(2, 0, 4, 5)])
    with pytest.raises(DataError, match=r"0/9/end\.json is missing"):
        source.open([feed.Piece(9, 0, 4, 5)])
    monkeypatch.delenv(SPOOL)
    with pytest.raises(
        JobError, match=r"train is a Spark DataFrame(.|\n)*PENSTOCK_SPOOL is not set"
    ):
        source.open([feed.Piece(2, 0, 3, 5)])


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
