"""Arrow, CSV, JSON lines and text files as records, and what is said of bad files and lines."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_feed_parquet import everything, opened

from penstock import feed
from penstock.errors import DataError
from penstock.feed import lines


def csv_file(path: Path, ids: Sequence[int]) -> None:
    rows = [f'{i},"a ""word"",\nand more",{i + 0.5}' for i in ids]
    path.with_suffix(".csv").write_text("\n".join(["y,words,x", *rows]) + "\n")


def jsonl_file(path: Path, ids: Sequence[int]) -> None:
    rows = [json.dumps({"x": i + 0.5, "y": i, "words": f"line {i}\n"}) for i in ids]
    path.with_suffix(".jsonl").write_text("".join(row + "\n" for row in rows))


def table(ids: Sequence[int]) -> pa.Table:
    halves = [None if i is None else i + 0.5 for i in ids]
    return pa.table({"x": pa.array(halves, pa.float64()), "y": pa.array(ids, pa.int64())})


def arrow_file(path: Path, ids: Sequence[int]) -> None:
    data = table(ids)
    with (
        pa.OSFile(str(path.with_suffix(".arrow")), "wb") as file,
        pa.ipc.new_file(file, data.schema) as writer,
    ):
        writer.write_table(data, 3)


def arrow_stream(path: Path, ids: Sequence[int]) -> None:
    data = table(ids)
    with (
        pa.OSFile(str(path.with_suffix(".arrows")), "wb") as file,
        pa.ipc.new_stream(file, data.schema) as writer,
    ):
        writer.write_table(data, 3)


def parquet_file(path: Path, ids: Sequence[int]) -> None:
    pq.write_table(table(ids), path.with_suffix(".parquet"), row_group_size=3)


WRITERS: dict[str, tuple[Callable[[Path, Sequence[int]], None], Callable[..., feed.Source]]] = {
    "csv": (csv_file, feed.csv),
    "jsonl": (jsonl_file, feed.jsonl),
    "arrow": (arrow_file, feed.arrow),
    "stream": (arrow_stream, feed.arrow),
    "parquet": (parquet_file, feed.parquet),
}


@pytest.mark.parametrize("kind", WRITERS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    files=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    shards=st.integers(1, 6),
    block=st.sampled_from([1, 40, 200]),
    mode=st.sampled_from(["error", "skip"]),
)
def test_every_record_comes_once_in_the_order_of_the_files(
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    files: list[int],
    shards: int,
    block: int,
    mode: str,
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    folder = tmp_path_factory.mktemp("files")
    write, make = WRITERS[kind]
    ids = iter(range(100))
    for number, rows in enumerate(files):
        write(folder / f"part-{number}", list(itertools.islice(ids, rows)))
    source = make(folder, features="x", target="y", on_bad_record=mode)
    manifest = source.manifest()
    assert manifest.rows == sum(files)
    found: list[int] = []
    for shard in range(shards):
        pieces = manifest.share(shard, shards)
        records = opened(source, pieces)
        assert len(records) == sum(piece.rows for piece in pieces)
        x, y = records.take(np.arange(len(records)))
        assert (x == y + 0.5).all()
        found += y.tolist()
    assert found == list(range(sum(files)))


def test_lines_are_cut_into_blocks_between_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64)
    csv_file(tmp_path / "a", range(20))
    source = feed.csv(tmp_path, features="x", target="y")
    names = [partition.name for partition in source.manifest().partitions]
    assert names[:2] == ["a.csv#0", "a.csv#1"]
    assert len(names) > 5
    assert everything(source)[1].tolist() == list(range(20))
    # A quote that stands for itself does not hide the line ends after it.
    (tmp_path / "a.csv").write_text("x,size,y\n" + '1,5" pipe,2\n' * 20)
    assert len(everything(feed.csv(tmp_path, features="x", target="y"))[1]) == 20


@pytest.mark.parametrize("kind", ["csv", "jsonl", "arrow", "stream"])
def test_other_file_systems_serve(tmp_path: Path, kind: str) -> None:
    write, make = WRITERS[kind]
    write(tmp_path / "a", range(5))
    (path,) = tmp_path.iterdir()
    root = f"memory://tables-of-{kind}"
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/tables-of-{kind}/{path.name}", path.read_bytes())
    for url in [root, f"{root}/*", f"{root}/{path.name}"]:
        assert everything(make(url, features="x", target="y"))[1].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"no such file.*holds: a\."):
        make(f"{root}/gone.{kind}", features="x", target="y").manifest()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_compressed_files_serve(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 50)
    write, make = WRITERS[kind]
    write(tmp_path / "a", range(9))
    (path,) = tmp_path.iterdir()
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    source = make(tmp_path, features="x", target="y")
    manifest = source.manifest()
    assert len(manifest.partitions) > 1
    assert opened(source, manifest.share(1, 2)).take(np.arange(2))[1].tolist() == [4, 5]


def test_columns_of_csv_are_whole_numbers_numbers_or_booleans(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("w,h,b,y\n1,1,true, 5 \n2,2.5,false,6\n")
    for name, dtype, values in [("w", "int64", [1, 2]), ("b", "bool", [True, False])]:
        x, y = everything(feed.csv(path, features=name, target="y"))
        assert (str(x.dtype), x.tolist()) == (f"torch.{dtype}", values)
        assert y.tolist() == [5, 6]
    x, _ = everything(feed.csv(path, features=["w", "h"], target="y"))
    assert x.tolist() == [[1, 1], [2, 2.5]]
    # A value far down, in another file, decides too.
    (tmp_path / "b.csv").write_text("y,w\n7,99999999999999999999\n")
    x, y = everything(feed.csv(tmp_path, features="w", target="y"))
    assert x.tolist() == [1.0, 2.0, float(np.float32(1e20))]
    assert y.tolist() == [5, 6, 7]
    (tmp_path / "c.tsv").write_text("1;2\n3;4\n")
    source = feed.csv(tmp_path / "c.tsv", features="f0", target="f1", delimiter=";", header=False)
    assert everything(source)[1].tolist() == [2, 4]
    assert source.describe() == {
        "csv": {
            "url": str(tmp_path / "c.tsv"),
            "features": "f0",
            "target": "f1",
            "delimiter": ";",
            "header": False,
        }
    }


def test_json_numbers_widen_in_lists_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": [[1, 2]], "y": true}\n\n{"x": [[3, 4.5]], "y": false, "z": {}}')
    for block in (10, 1000):
        monkeypatch.setattr(lines, "BLOCK_BYTES", block)
        x, y = everything(feed.jsonl(path, features="x", target="y"))
        assert x.tolist() == [[[1, 2]], [[3, 4.5]]]
        assert y.tolist() == [True, False]


BAD_LINES: dict[str, tuple[str, dict[int, str]]] = {
    "csv": (
        "x,y\n1,0\n2\n3,2\nfour,3\n5,4\n6,\n7,6\n8,7,7\n9,eight\n10,9\n",
        {
            1: "row 1 has 1 values: expected 2",
            3: "column 'x': row 3 holds 'four': expected a number",
            5: "column 'y': null in row 5",
            7: "row 7 has 3 values: expected 2",
            8: "column 'y': row 8 holds 'eight': expected a number",
        },
    ),
    "jsonl": (
        '{"x": [1, 1], "y": 0}\n{"x": [1, "a"], "y": 1}\n{"x": [3, 3], "y": 2}\nno json\n'
        '{"x": [3, 5], "y": 4}\n{"x": [6, 6]}\n{"x": [7, 7], "y": 6}\n{"x": [7], "y": 7}\n'
        '{"x": [7, null], "y": 7}\n{"y": 9, "x": [1, 1]}\n',
        {
            1: "row 1 cannot be used: Column(/x/[]) changed from number to string",
            3: "row 3 cannot be used: Invalid value",
            5: "column 'y': null in row 5",
            7: "column 'x': row 7 holds 1 values, the first row 2",
            8: "column 'x': null in row 8",
        },
    ),
}
GOOD = [0, 2, 4, 6, 9]


@pytest.mark.parametrize("block", [1, 60, 10_000])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    monkeypatch.setenv("PENSTOCK_QUARANTINE", str(tmp_path / "quarantine"))
    text, reasons = BAD_LINES[kind]
    path = tmp_path / f"a.{kind}"
    path.write_text(text)
    make = WRITERS[kind][1]
    with pytest.raises(DataError) as caught:
        make(path, features="x", target="y").manifest()
    assert str(path) in str(caught.value)
    assert any(reason in str(caught.value) for reason in reasons.values())

    for mode in ("skip", "quarantine"):
        source: Any = make(path, features="x", target="y", on_bad_record=mode)
        manifest = source.manifest()
        assert manifest.rows == len(GOOD)
        found: list[int] = []
        for shard in range(3):
            records = opened(source, manifest.share(shard, 3))
            found += records.take(np.arange(len(records)))[1].tolist()
        assert found == GOOD
        assert source.bad.count == len(reasons)  # by the manifest; the records do not count again
        assert f"{len(reasons)} bad records left out" in source.bad.line()
        assert (tmp_path / "quarantine").exists() == (mode == "quarantine")
    (kept,) = (tmp_path / "quarantine").iterdir()
    told = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(entry["row"] for entry in told) == sorted(reasons)
    for entry in told:
        # A line that is by itself in its block has nothing to differ from.
        if block == 10_000 or "null" in entry["reason"]:
            assert reasons[entry["row"]].split("cannot be used")[0] in entry["reason"]
        assert entry["where"] == str(path)
        assert entry["record"]


@pytest.mark.parametrize("kind", ["arrow", "stream", "parquet"])
def test_bad_rows_of_tables(tmp_path: Path, kind: str) -> None:
    write, make = WRITERS[kind]
    write(tmp_path / "a", [0, 1, None, 3, 4, None, 6])  # type: ignore[list-item]
    source: Any = make(tmp_path, features="y", target="y")
    with pytest.raises(DataError, match="null in row 2"):
        everything(source)
    skipping: Any = make(tmp_path, features="y", target="y", on_bad_record="skip")
    assert everything(skipping)[1].tolist() == [0, 1, 3, 4, 6]
    assert [record.row for record in skipping.bad.sample] == [2, 5]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("csv", "x,y\nNaN,1\n1,2,3\n,\n"),
        ("jsonl", '{"x": null, "y": 1}\nno\n{"x": 1, "y": null}'),
    ],
)
def test_when_every_record_is_bad(tmp_path: Path, kind: str, text: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_text(text)
    with pytest.raises(DataError, match=r"every record is bad: 3 of 3, the first in .*a\."):
        WRITERS[kind][1](path, features="x", target="y", on_bad_record="skip").manifest()


def test_columns_that_cannot_be_are_errors_always(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("amount,region,region,when,y\n1,a,b,2020-01-01,1\n")
    line = {"amount": 1, "region": "a", "when": "2020-01-01", "y": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    for mode in ("error", "skip"):
        for name in ("csv", "jsonl"):
            path, make = tmp_path / f"a.{name}", WRITERS[name][1]
            for column, words in [
                ("amuont", r"no column 'amuont'; it has: amount(.|\n)*did you mean 'amount'"),
                ("when", "column 'when' is (string|timestamp).*expected numbers"),
            ]:
                with pytest.raises(DataError, match=words):
                    make(path, features=column, target="y", on_bad_record=mode).manifest()
    with pytest.raises(DataError, match="'region' is there 2 times"):
        feed.csv(tmp_path / "a.csv", features="region", target="y").manifest()
    with pytest.raises(DataError, match=r"'region' is string(.|\n)*integer codes"):
        feed.jsonl(tmp_path / "a.jsonl", features="region", target="y").manifest()
    with pytest.raises(DataError, match="on_bad_record: received 'no'"):
        feed.csv(tmp_path, features="x", target="y", on_bad_record="no")
    with pytest.raises(DataError, match="delimiter ', '"):
        feed.csv(tmp_path, features="x", target="y", delimiter=", ")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write, make = WRITERS["arrow"]
    write(tmp_path / "a", range(9))
    path = tmp_path / "a.arrow"
    whole = path.read_bytes()
    for data in [whole[:-20], b"text", b""]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.arrow: cannot be read as Arrow"):
            make(tmp_path, features="x", target="y").manifest()
    path.write_bytes(whole)
    source = make(tmp_path, features="x", target="y")
    pieces = source.manifest().share(0, 1)
    write(tmp_path / "a", range(4))
    with pytest.raises(DataError, match=r"a\.arrow has [\d,]+ bytes where it had [\d,]+"):
        opened(source, pieces)


def test_arrow_files_of_other_schemas_and_dictionaries_are_refused(tmp_path: Path) -> None:
    def write(name: str, x: Any) -> None:
        data = pa.table({"x": x, "y": [0, 1]})
        with (
            pa.OSFile(str(tmp_path / name), "wb") as file,
            pa.ipc.new_file(file, data.schema) as writer,
        ):
            writer.write_table(data)

    source = feed.arrow(tmp_path, features="x", target="y")
    write("a.arrow", pa.array(["north", "south"]).dictionary_encode())
    write("b.arrow", pa.array(["north", "south"]).dictionary_encode())
    assert everything(source)[0].tolist() == [0, 1, 0, 1]
    write("b.arrow", pa.array(["north", "west"]).dictionary_encode())
    manifest = source.manifest()
    with pytest.raises(DataError, match=r"b\.arrow: column 'x': value 1 of the dictionary is 'wes"):
        opened(source, manifest.share(1, 2))  # by whoever reads it, without the first file
    write("b.arrow", [0, 1])
    with pytest.raises(DataError, match=r"b\.arrow: column 'x' is int64, but dictionary.*a\.arrow"):
        source.manifest()


def test_only_the_columns_of_arrow_files_that_are_named_are_read(tmp_path: Path) -> None:
    wide = pa.array(np.zeros((8, 10_000)).tolist(), pa.list_(pa.float64()))
    data = pa.table({"x": np.arange(8), "wide": wide, "y": np.arange(8)})
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, data.schema) as writer,
    ):
        writer.write_table(data)
    whole = (tmp_path / "a.arrow").read_bytes()
    zeros = whole.index(b"\0" * 600_000)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(
        "/pruned/a.arrow", whole[: zeros + 300_000] + b"\xff" + whole[zeros + 300_001 :]
    )
    assert everything(feed.arrow("memory://pruned", features="x", target="y"))[1].tolist() == [
        *range(8)
    ]


def test_text_is_cut_into_records_that_stay_in_their_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(10)))
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.md").write_bytes(bytes(range(100, 104)))
    (tmp_path / "d.txt").write_bytes(bytes(range(200, 203)))
    source: Any = feed.text(tmp_path, length=3)
    assert [partition.rows for partition in source.manifest().partitions] == [3, 0, 1, 0]
    x, y = everything(source)
    (stage,) = source.stages
    rows = stage.apply(feed.Rows(x, y, np.arange(4)), np.random.default_rng(0))
    assert str(rows.x.dtype) == str(rows.y.dtype) == "torch.int64"
    assert rows.x.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [100, 101, 102]]
    assert rows.y.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [101, 102, 103]]
    overlapping = feed.text(tmp_path / "a.txt", length=3, stride=2)
    assert everything(overlapping)[0][:, 0].tolist() == [0, 2, 4, 6]
    assert overlapping.describe() == {
        "text": {"url": str(tmp_path / "a.txt"), "length": 3, "stride": 2}
    }
    for options in ({"length": 0}, {"length": 3, "stride": 0}, {"length": True}):
        with pytest.raises(DataError, match="expected a whole number of bytes"):
            feed.text(tmp_path, **options)
    pieces = source.manifest().share(0, 1)
    (tmp_path / "a.txt").write_bytes(b"short")
    with pytest.raises(DataError, match=r"a\.txt ends at byte 5: it had 10"):
        opened(feed_again(source), pieces)


def feed_again(source: Any) -> Any:
    """With what its manifest said, and no spool of it."""
    source.url = f"{source.url}/"
    return source
