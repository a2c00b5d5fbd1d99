"""Spools: sealed and counted segments on disk, and what is said of those that are not whole."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from penstock.errors import DataError
from penstock.feed import spool as spool_module
from penstock.feed.columns import Place
from penstock.feed.spool import Spool, SpoolEnd, SpoolWriter


def batch(first: int, rows: int, kind: pa.DataType | None = None) -> pa.RecordBatch:
    y = np.arange(first, first + rows)
    lists = pa.array([[i, i + 0.5] for i in y.tolist()], kind or pa.list_(pa.float32()))
    return pa.record_batch({"x": lists, "y": pa.array(y)})


def spool(folder: Path, *batches: pa.RecordBatch) -> SpoolEnd:
    writer = SpoolWriter(folder)
    for each in batches:
        writer.write(each)
    return writer.close()


def rows_of(spool: Spool, start: int = 0, stop: int | None = None) -> list[int]:
    return [y for part in spool.batches(start, stop) for y in part.column("y").to_pylist()]


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 2000)


@pytest.mark.usefixtures("small_segments")
def test_what_was_written_is_read(tmp_path: Path) -> None:
    batches = [batch(10 * i, 10) for i in range(20)]
    end = spool(tmp_path / "a", *batches)
    names = sorted(os.listdir(tmp_path / "a"))
    assert len(names) > 3
    assert names == [*(f"{i:06d}.arrow" for i in range(len(names) - 1)), "end.json"]
    assert [segment.name for segment in end.segments] == names[:-1]
    assert end.rows == 200
    assert end.bytes == sum((tmp_path / "a" / name).stat().st_size for name in names[:-1])
    assert end.layout == {"x": ("float32", (2,)), "y": ("int64", ())}
    opened = Spool(tmp_path / "a")
    assert opened.end == end
    assert list(opened.batches()) == batches
    for start, stop in [(0, 200), (0, 0), (7, 7), (7, 9), (9, 131), (10, 20), (199, 200)]:
        assert rows_of(opened, start, stop) == list(range(start, stop))
    assert rows_of(opened, 150) == list(range(150, 200))
    assert {name: array.shape for name, array in end.arrays().items()} == {"x": (0, 2), "y": (0,)}


def test_reading_copies_nothing(tmp_path: Path) -> None:
    spool(tmp_path / "a", batch(0, 50_000))
    before = pa.total_allocated_bytes()
    (part,) = Spool(tmp_path / "a").batches()
    assert pa.total_allocated_bytes() == before
    kept = pa.concat_tables([pa.table(part)]).take(list(range(1000)))
    assert pa.total_allocated_bytes() > before, "the negative control"
    assert kept.num_rows == 1000


def test_an_empty_partition_is_a_spool_without_segments(tmp_path: Path) -> None:
    for name, batches in [("none", []), ("empty", [batch(0, 0)])]:
        end = spool(tmp_path / name, *batches)
        assert (end.rows, end.bytes, end.layout, end.segments) == (0, 0, {}, ())
        assert os.listdir(tmp_path / name) == ["end.json"]
        assert list(Spool(tmp_path / name).batches()) == []


def test_an_abandoned_spool_has_no_end(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "a")
    writer.write(batch(0, 10))
    assert os.listdir(tmp_path / "a") == ["000000.arrow.writing"]
    with pytest.raises(DataError, match=r"end\.json is missing: the spool was never closed"):
        Spool(tmp_path / "a")
    writer.close()
    assert rows_of(Spool(tmp_path / "a")) == list(range(10))
    with pytest.raises(DataError, match="a is there already"):
        SpoolWriter(tmp_path / "a")


@pytest.mark.usefixtures("small_segments")
def test_the_checksum_is_of_values_and_not_of_batches(tmp_path: Path) -> None:
    def checksum(*batches: pa.RecordBatch) -> str:
        checksum.count = getattr(checksum, "count", 0) + 1  # type: ignore[attr-defined]
        return spool(tmp_path / str(checksum.count), *batches).checksum  # type: ignore[attr-defined]

    whole = checksum(batch(0, 300))
    assert len(whole) == 8
    same = [
        [batch(0, 1), batch(1, 0), batch(1, 299)],
        [batch(0, 400).slice(0, 150), batch(100, 300).slice(50, 150)],
        [batch(0, 300, pa.large_list(pa.float32()))],
        [batch(0, 300, pa.list_(pa.float32(), 2))],
        [batch(0, 300).select(["y", "x"])],
    ]
    others = [
        [batch(0, 299)],
        [batch(1, 300)],
        [batch(150, 150), batch(0, 150)],
        [batch(0, 300, pa.list_(pa.float64()))],
        [batch(0, 300).rename_columns(["x", "z"])],
        [batch(0, 300).select(["y"])],
        [],
    ]
    assert {checksum(*batches) for batches in same} == {whole}
    assert len({whole, *(checksum(*batches) for batches in others)}) == len(others) + 1


def test_a_bad_row_is_counted_through_the_partition(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "a", Place("source 1, partition 7", ""))
    writer.write(batch(0, 10))
    bad = pa.record_batch({"x": pa.array([[1, 2], [3]], pa.list_(pa.float32())), "y": [1, 2]})
    with pytest.raises(DataError) as caught:
        writer.write(bad)
    words = "source 1, partition 7: column 'x': row 11 holds 1 values, the first row 2"
    assert words in str(caught.value)
    writer = SpoolWriter(tmp_path / "b")
    with pytest.raises(DataError, match=r"b: column 'y' is string"):
        writer.write(pa.record_batch({"x": [1], "y": ["a"]}))
    writer = SpoolWriter(tmp_path / "c")
    writer.write(batch(0, 10))
    with pytest.raises(DataError, match=r"the schema changes at row 10 from x: list.* to y: int64"):
        writer.write(batch(10, 10).select(["y"]))


def test_a_full_disk_is_an_error_when_it_is_written(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "a", Place("source 0, partition 3", ""))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = 0

    def write() -> None:
        nonlocal written
        for written in range(100):
            writer.write(batch(1000 * written, 1000))

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limit[1]))
        with pytest.raises(DataError) as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert 0 < written < 50
    words = ["source 0, partition 3: cannot write", f"into {tmp_path / 'a'}", "SPARK_LOCAL_DIRS"]
    for word in [*words, f"bytes after row {(written + 1) * 1000}"]:
        assert word in str(caught.value)
    with pytest.raises(AssertionError):
        writer.close()
    assert "end.json" not in os.listdir(tmp_path / "a")


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "000001.arrow").unlink(), r"000001\.arrow is missing: expected \d+ seg"),
        (
            lambda f: (f / "000099.arrow").write_bytes((f / "000000.arrow").read_bytes()),
            r"000099\.arrow is not of this spool",
        ),
        (lambda f: os.truncate(f / "000000.arrow", 1000), r"has 1000 bytes: expected \d+"),
        (lambda f: rewrite(f, "rows", 3), r"000000\.arrow has \d+ rows: expected 3"),
        (lambda f: (f / "000000.arrow").write_bytes(b"\0" * size(f)), r"000000\.arrow cannot be"),
        (lambda f: (f / "end.json").unlink(), r"end\.json is missing"),
        (lambda f: (f / "end.json").write_text("{"), r"end\.json cannot be read"),
        (lambda f: (f / "end.json").write_text("{}"), r"end\.json cannot be read"),
    ],
)
def test_a_damaged_spool_is_refused(tmp_path: Path, damage: Any, words: str) -> None:
    spool(tmp_path / "a", *(batch(10 * i, 10) for i in range(20)))
    assert len(rows_of(Spool(tmp_path / "a"))) == 200
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=words) as caught:
        Spool(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def size(folder: Path) -> int:
    return (folder / "000000.arrow").stat().st_size


def rewrite(folder: Path, key: str, value: int) -> None:
    end = json.loads((folder / "end.json").read_text())
    end["segments"][0][key] = value
    (folder / "end.json").write_text(json.dumps(end))


THREADS = """
import os, sys
import numpy, torch
from penstock.feed.spool import Spool, SpoolWriter
from penstock.feed.dataframe import SpooledSource
from penstock.feed.packing import Unpacker, pack
assert "pyarrow" not in sys.modules
count = lambda: len(os.listdir("/proc/self/task"))
import pyarrow as pa, pyarrow.compute
before = count()
folder = os.environ["PENSTOCK_SPOOL"]
unpacker = Unpacker(folder)
batch = pa.record_batch({"x": [[1.0, 2.0]] * 1000, "y": [1] * 1000})
for packed in pack([batch, batch], 0, 0):
    unpacker.write(packed)
unpacker.close()
source = SpooledSource("train", 0, "x", "y")
assert len(source.open(source.manifest().share(0, 1))) == 2000
assert count() == before, "a spool"
pa.table({"x": ["a"] * 100}).group_by("x").aggregate([("x", "count")])
assert count() > before, "the negative control"
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_neither_writing_nor_reading_starts_a_thread(tmp_path: Path) -> None:
    environment = {**os.environ, "PENSTOCK_SPOOL": str(tmp_path / "spool")}
    subprocess.run([sys.executable, "-c", THREADS], check=True, timeout=60, env=environment)
