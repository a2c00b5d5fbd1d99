"""Spools: what is written is read, segment by segment, and what is not whole is an error."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.errors import DataError, JobError, PenstockError
from penstock.feed import spool as spool_module
from penstock.feed import windows as windows_module
from penstock.feed.spool import (
    Field,
    Ragged,
    Spool,
    SpoolEnd,
    SpoolFolder,
    SpoolWriter,
    segment_name,
    writer_lives,
)
from penstock.feed.spooled import SpoolRecords

Rows = dict[str, Any]
WHERE = "source 0, partition 3"


def rows_of(first: int, count: int) -> Rows:
    """Rows by which any other would be told, of every kind of field."""
    texts = [b"%d" % i * (i * i % 17) for i in range(first, first + count)]
    return {
        "x": np.random.default_rng(0).random((first + count, 2, 3)).astype(np.float32)[first:],
        "y": np.arange(first, first + count),
        "flag": np.arange(first, first + count) % 3 == 0,
        "pixels": np.random.default_rng(1).integers(0, 255, (first + count, 5), np.uint8)[first:],
        "text": Ragged(np.cumsum([0, *map(len, texts)]), np.frombuffer(b"".join(texts), np.uint8)),
    }


def part(rows: Rows, start: int, stop: int) -> Rows:
    return {
        name: Ragged(value.offsets[start : stop + 1], value.data)
        if isinstance(value, Ragged)
        else value[start:stop]
        for name, value in rows.items()
    }


def written(folder: Path, rows: Rows, cuts: list[int]) -> SpoolEnd:
    writer = SpoolWriter(folder, WHERE)
    count = len(next(iter(rows.values())))
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        writer.write(part(rows, start, stop))
    return writer.close()


def numbers(folder: Path, count: int, first: int = 0) -> SpoolEnd:
    """A spool of such rows, all written at once."""
    return written(folder, rows_of(first, count), [])


class Reading(SpoolRecords):
    """The records of one spool."""

    def __init__(self, folder: Path) -> None:
        super().__init__(lambda number: folder if number == 0 else None, WHERE)

    def all(self, name: str) -> Any:
        rows = np.arange(len(self))
        return self._takes[name](rows, self._first.searchsorted(rows, "right"))


def same(found: Any, wanted: NDArray[Any] | Ragged) -> bool:
    if isinstance(wanted, Ragged):
        rows = range(len(wanted))
        return len(found) == len(wanted) and all((found[i] == wanted[i]).all() for i in rows)
    array = found.numpy()
    return array.dtype == wanted.dtype and np.array_equal(array, wanted)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 64 rows, in batches of a few."""
    monkeypatch.setattr(windows_module, "LARGEST_WINDOW", 64)
    monkeypatch.setattr(spool_module, "BATCH_BYTES", 1000)


def test_what_was_written_is_read(tmp_path: Path, small_windows: None) -> None:
    rows = rows_of(0, 200)
    end = written(tmp_path / "a", rows, [1, 1, 2, 70, 131])
    assert sorted(os.listdir(tmp_path / "a")) == [
        *(segment_name(i) for i in range(4)),
        "end.json",
        "lock",
    ]
    assert os.listdir(tmp_path) == ["a"]
    assert (end.rows, end.window_rows) == (200, 64)
    assert [segment.rows for segment in end.segments] == [64, 64, 64, 8]
    files = [(tmp_path / "a" / segment.name).stat().st_size for segment in end.segments]
    assert [segment.bytes for segment in end.segments] == files
    assert end.bytes == sum(files)
    assert end.segments[-1].checksum == end.checksum
    assert end.fields == {
        "x": Field("float32", (2, 3)),
        "y": Field("int64", ()),
        "flag": Field("bool", ()),
        "pixels": Field("uint8", (5,)),
        "text": Field("bytes", ()),
    }
    assert Spool(tmp_path / "a", WHERE).end == SpoolEnd.read(tmp_path / "a") == end
    records = Reading(tmp_path / "a")
    assert all(same(records.all(name), value) for name, value in rows.items())
    assert not same(records.all("y"), rows["y"][::-1]), "the control"


@pytest.mark.parametrize("seed", range(5))
def test_content_and_windows_do_not_depend_on_cuts(
    tmp_path: Path, small_windows: None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(0, 500))
    rows = rows_of(0, count)
    cuts = sorted(rng.integers(0, count + 1, rng.integers(0, 30)).tolist())
    end = written(tmp_path / "a", rows, cuts)
    assert [s.rows for s in end.segments] == [64] * (count // 64) + [count % 64] * (count % 64 > 0)
    records = Reading(tmp_path / "a")
    assert len(records) == count
    if count:
        assert all(same(records.all(name), value) for name, value in rows.items())
    again = written(tmp_path / "b", rows, [])
    assert again.checksum == end.checksum
    assert [s.checksum for s in again.segments] == [s.checksum for s in end.segments]


@pytest.mark.parametrize(
    ("row_bytes", "window"),
    [(1, 65_536), (256, 65_536), (257, 32_768), (784, 16_384), (4096, 4096), (150_000, 64)],
)
def test_the_window_is_a_function_of_the_first_row(
    tmp_path: Path, row_bytes: int, window: int
) -> None:
    for name, count in [("one", 1), ("three", 3)]:
        writer = SpoolWriter(tmp_path / name, WHERE)
        rows = np.zeros((3, row_bytes), np.uint8)
        for start in range(0, 3, count):
            writer.write({"x": rows[start : start + count]})
        assert writer.close().window_rows == window
    writer = SpoolWriter(tmp_path / "ragged", WHERE)
    data = np.zeros(row_bytes + 10, np.uint8)
    writer.write({"x": Ragged(np.array([10, row_bytes + 10]), data)})
    writer.write({"x": Ragged(np.array([0, 1, 1, 10]), data)})
    assert writer.close().window_rows == 65_536, "the first says nothing of the others"


def test_a_row_may_have_any_size(tmp_path: Path) -> None:
    for name, shape in [("none", (0,)), ("large", (5_000_000,))]:
        rows = np.ones((3, *shape), np.float32) * np.arange(3, dtype=np.float32)[:, None]
        writer = SpoolWriter(tmp_path / name, WHERE)
        writer.write({"x": rows, "y": np.arange(3)})
        writer.close()
        assert same(Reading(tmp_path / name).all("x"), rows)


def test_layouts_that_are_not_as_they_are_kept(tmp_path: Path) -> None:
    """Strided, transposed, of the other byte order: the values count."""
    images = np.arange(2 * 4 * 5 * 3, dtype=">i4").reshape(2, 4, 5, 3)[..., ::-1]
    rows = images.transpose(0, 3, 1, 2)
    writer = SpoolWriter(tmp_path / "a", WHERE)
    writer.write({"x": rows})
    end = writer.close()
    assert same(Reading(tmp_path / "a").all("x"), rows.astype(np.int32))
    writer = SpoolWriter(tmp_path / "b", WHERE)
    writer.write({"x": rows.astype(np.int32)})
    assert writer.close().checksum == end.checksum


def test_the_callers_memory_is_its_own_again(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "a", WHERE)
    memory = np.empty((2, 10), np.uint8)
    for i in range(100):
        memory[:] = i
        writer.write({"x": memory})
    writer.close()
    found = Reading(tmp_path / "a").all("x")
    assert found[:, 0].tolist() == [i for i in range(100) for _ in range(2)]


def test_an_empty_partition_is_a_spool_without_segments(tmp_path: Path) -> None:
    for name, batches in [("none", []), ("empty", [rows_of(0, 0)])]:
        writer = SpoolWriter(tmp_path / name, WHERE)
        for batch in batches:
            writer.write(batch)
        end = writer.close()
        assert (end.rows, end.bytes, end.fields, end.segments) == (0, 0, {}, ())
        assert sorted(os.listdir(tmp_path / name)) == ["end.json", "lock"]
        assert Spool(tmp_path / name, WHERE).end == end


def test_the_checksum_is_of_names_dtypes_shapes_and_values(
    tmp_path: Path, small_windows: None
) -> None:
    rows = rows_of(0, 150)
    swapped = np.arange(150)
    swapped[[70, 71]] = [71, 70]
    text = rows["text"]
    moved = Ragged(text.offsets.copy(), text.data)
    row = int(np.flatnonzero(text.lengths[:-1])[5])
    moved.offsets[row + 1] -= 1  # a byte goes to the next row
    others: list[Rows] = [
        part(rows, 0, 149),
        part(rows, 1, 150),
        {**rows, "y": swapped},
        {**rows, "y": rows["y"].astype(np.int32)},
        {**rows, "y": rows["y"].view(np.uint64)},
        {**rows, "x": rows["x"].reshape(150, 3, 2)},
        {**rows, "text": moved},
        {name: value for name, value in rows.items() if name != "flag"},
        {("z" if name == "y" else name): value for name, value in rows.items()},
        part(rows, 0, 0),
    ]
    sums = [written(tmp_path / str(i), other, []).checksum for i, other in enumerate(others)]
    whole = numbers(tmp_path / "whole", 150).checksum
    assert len(whole) == 8
    assert len({whole, *sums}) == len(others) + 1
    turned = dict(reversed(rows.items()))
    assert written(tmp_path / "turned", turned, [9, 100]).checksum == whole


def test_rows_can_be_read_before_the_writer_ends(tmp_path: Path, small_windows: None) -> None:
    rows = rows_of(0, 300)
    reader = Spool(tmp_path / "a", WHERE)
    assert (reader.rows, reader.end) == (0, None)
    assert reader.lives(), "nobody has begun"
    writer = SpoolWriter(tmp_path / "a", WHERE)
    seen = []
    for start in range(0, 300, 50):
        writer.write(part(rows, start, start + 50))
        reader.refresh()
        seen.append(reader.rows)
        assert reader.lives()
    assert seen == [0, 64, 128, 192, 192, 256]
    assert reader.end is None
    end = writer.close()
    reader.refresh()
    assert (reader.rows, reader.end) == (300, end)
    assert reader.lives(), "closed spools need no writer"
    assert [s.checksum for s in reader.segments] == [s.checksum for s in end.segments]


def test_a_thread_reads_what_another_writes(tmp_path: Path, small_windows: None) -> None:
    rows = rows_of(0, 2000)
    borders = np.sort(np.random.default_rng(1).integers(0, 2000, 60)).tolist()
    thread = threading.Thread(target=written, args=(tmp_path / "a", rows, borders))
    records, first = Reading(tmp_path / "a"), 0
    thread.start()
    while not records.whole:
        records.wait(first + 1, timeout_s=30)
        stop = len(records)
        x, y = records.take(np.arange(first, stop))
        assert same(x, rows["x"][first:stop])
        assert same(y, rows["y"][first:stop])
        first = stop
    thread.join(30)
    assert first == 2000


def test_a_spool_has_one_writer_and_is_written_once(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "a", WHERE)
    assert writer_lives(tmp_path / "a")
    with pytest.raises(DataError, match=r"partition 3: .*a is being written: a spool has one"):
        SpoolWriter(tmp_path / "a", WHERE)
    writer.write(rows_of(0, 10))
    writer.close()
    assert writer_lives(tmp_path / "a") is False
    assert writer_lives(tmp_path / "b") is None
    with pytest.raises(DataError, match=r"a is there already: a spool is written once"):
        SpoolWriter(tmp_path / "a", WHERE)
    assert len(Reading(tmp_path / "a")) == 10, "and it is as it was"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(DataError, match=r"other is there already"):
        SpoolWriter(tmp_path / "other", WHERE)
    assert os.listdir(tmp_path / "other") == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["a", "other"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in [tmp_path / "file" / "a", tmp_path / "file"]:
        with pytest.raises(DataError, match=r"partition 3: cannot make .*file"):
            SpoolWriter(folder, WHERE)
    assert os.listdir(tmp_path) == ["file"]
    assert Spool(tmp_path / "file" / "a", WHERE).lives(), "it is not there yet"


def test_what_a_writer_has_left_is_begun_anew(tmp_path: Path, small_windows: None) -> None:
    for name, leave in {
        "dead": lambda writer: writer.abandon(),
        "failed": lambda writer: writer.fail(DataError("no", hint="yes")),
    }.items():
        writer = SpoolWriter(tmp_path / name, WHERE)
        writer.write(rows_of(0, 200))
        leave(writer)
        (tmp_path / name / "000003.arrow.writing").touch()  # as one that was killed leaves it
        assert not (tmp_path / name / "end.json").exists()
        end = numbers(tmp_path / name, 70, first=50)
        assert sorted(os.listdir(tmp_path / name)) == [
            segment_name(0),
            segment_name(1),
            "end.json",
            "lock",
        ]
        assert end.checksum == numbers(tmp_path / f"{name}-control", 70, first=50).checksum
    (tmp_path / "none").mkdir()
    assert numbers(tmp_path / "none", 70).rows == 70


def test_a_writer_that_is_gone_is_no_end(tmp_path: Path, small_windows: None) -> None:
    writer = SpoolWriter(tmp_path / "a", WHERE)
    writer.write(rows_of(0, 130))
    reader = Spool(tmp_path / "a", WHERE)
    assert reader.lives()
    writer.abandon()
    assert not reader.lives()
    assert (reader.rows, reader.end) == (128, None)
    for word in [WHERE, str(tmp_path / "a"), "has died after 128 rows"]:
        assert word in str(reader.died())
    with pytest.raises(AssertionError, match="given up"):
        writer.write(rows_of(0, 1))
    with pytest.raises(AssertionError, match="given up"):
        writer.close()


def test_a_lock_goes_with_a_writer_that_nobody_has(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "a", WHERE)
    writer.write(rows_of(0, 1))
    del writer
    assert writer_lives(tmp_path / "a") is False


@pytest.mark.parametrize("kind", [DataError, JobError, PenstockError])
def test_why_a_writer_gave_up_is_what_its_readers_raise(
    tmp_path: Path, kind: type[PenstockError]
) -> None:
    writer = SpoolWriter(tmp_path / "a", WHERE)
    writer.fail(kind("null in row 17", hint="fill nulls"))
    writer.fail(DataError("another"))
    with pytest.raises(PenstockError) as caught:
        Spool(tmp_path / "a", WHERE).lives()
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint) == ("null in row 17", "fill nulls")


def test_an_error_of_unknown_kind_is_still_one_of_ours(tmp_path: Path) -> None:
    class Other(DataError):
        pass

    SpoolFolder(tmp_path / "a", WHERE).fail(Other("no"))
    with pytest.raises(DataError, match="no"):
        Spool(tmp_path / "a", WHERE).lives()


def test_rows_of_another_kind_are_refused_and_readers_told(tmp_path: Path) -> None:
    for name, other in [
        ("dtype", {"x": np.zeros((1, 4), np.float64)}),
        ("shape", {"x": np.zeros((1, 5), np.float32)}),
        ("name", {"z": np.zeros((1, 4), np.float32)}),
    ]:
        writer = SpoolWriter(tmp_path / name, WHERE)
        writer.write({"x": np.zeros((7, 4), np.float32)})
        with pytest.raises(DataError, match=r"partition 3: row 7 is .*, those before are x: fl"):
            writer.write(other)
        with pytest.raises(DataError, match=r"row 7 is"):
            Spool(tmp_path / name, WHERE).lives()


def test_a_spool_that_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        SpoolWriter(tmp_path / "a", WHERE, need_bytes=10**18)
    for words in [WHERE, "no room", "1,000,000,000,000,000,000 bytes are needed", "are free"]:
        assert words in str(caught.value)
    assert "PENSTOCK_SPOOL" in caught.value.hint
    with pytest.raises(DataError, match="no room in"):
        Spool(tmp_path / "a", WHERE).lives()
    SpoolWriter(tmp_path / "b", WHERE, need_bytes=1000).close()


def test_a_file_that_cannot_grow_is_an_error_when_it_is_written(
    tmp_path: Path, small_windows: None
) -> None:
    writer = SpoolWriter(tmp_path / "a", WHERE, need_bytes=5_000_000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer.write({"x": np.zeros((64, 100))})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
        with pytest.raises(DataError) as caught:
            writer.write({"x": np.zeros((64, 200))[:, ::2]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    words = [WHERE, f"no room in {tmp_path / 'a'}", "5,000,000 bytes are needed in all", "are free"]
    for word in [*words, "are written"]:
        assert word in str(caught.value)
    with pytest.raises(AssertionError):
        writer.close()
    assert "end.json" not in os.listdir(tmp_path / "a")
    with pytest.raises(DataError, match="no room in"):
        Spool(tmp_path / "a", WHERE).lives()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    words = json.loads((folder / "end.json").read_text())
    change(words)
    (folder / "end.json").write_text(json.dumps(words))


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "kept")
    (folder / other).rename(folder / one)
    (folder / "kept").rename(folder / other)


DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "missing",
        lambda f: (f / "000001.arrow").unlink(),
        r"000001\.arrow is missing: expected 4 segments",
    ),
    ("last missing", lambda f: (f / "000003.arrow").unlink(), r"000003\.arrow is missing"),
    ("all missing", lambda f: [p.unlink() for p in f.glob("*.arrow")], r"000000\.arrow is miss"),
    ("truncated", lambda f: os.truncate(f / "000002.arrow", 1000), r"000002\.arrow cannot be read"),
    ("emptied", lambda f: os.truncate(f / "000000.arrow", 0), r"000000\.arrow cannot be read"),
    (
        "zeros",
        lambda f: (f / "000000.arrow").write_bytes(bytes((f / "000000.arrow").stat().st_size)),
        r"000000\.arrow cannot be read",
    ),
    (
        "swapped",
        lambda f: swap(f, "000001.arrow", "000002.arrow"),
        r"000001\.arrow follows other rows than those that were read before it",
    ),
    (
        "first and last swapped",
        lambda f: swap(f, "000000.arrow", "000003.arrow"),
        r"000000\.arrow follows other rows",
    ),
    (
        "twice",
        lambda f: shutil.copy(f / "000000.arrow", f / "000001.arrow"),
        r"000001\.arrow follows other rows",
    ),
    (
        "of another",
        lambda f: shutil.copy(f / "../b/000003.arrow", f / "000003.arrow"),
        r"000003\.arrow follows other rows",
    ),
    (
        "a first of another",
        lambda f: shutil.copy(f / "../b/000000.arrow", f / "000000.arrow"),
        r"000001\.arrow follows other rows",
    ),
    (
        "too many",
        lambda f: shutil.copy(f / "../c/000004.arrow", f / "000004.arrow"),
        r"000004\.arrow (follows other rows|is not of this spool: expected 4)",
    ),
    (
        "end of fewer",
        lambda f: rewrite(f, lambda words: words["segments"].pop()),
        r"000003\.arrow is not of this spool: expected 3 segments",
    ),
    (
        "end of others",
        lambda f: shutil.copy(f / "../b/end.json", f / "end.json"),
        r"000000\.arrow has 64 rows, checksum \w+: expected 64 rows, checksum",
    ),
    ("no JSON", lambda f: (f / "end.json").write_text("{"), r"end\.json cannot be read"),
    ("nothing in it", lambda f: (f / "end.json").write_text("{}"), r"end\.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "words"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_a_damaged_spool_is_refused(
    tmp_path: Path, small_windows: None, damage: Callable[[Path], Any], words: str
) -> None:
    for name, first, count in [("a", 0, 200), ("b", 1, 200), ("c", 0, 300)]:
        numbers(tmp_path / name, count, first)
    assert len(Reading(tmp_path / "a")) == 200
    damage(tmp_path / "a")
    with pytest.raises(DataError, match=words) as caught:
        Spool(tmp_path / "a", WHERE)
    assert str(tmp_path / "a") in str(caught.value)


def test_a_segment_whose_columns_are_shorter_than_they_say(tmp_path: Path) -> None:
    """Rows are read by address: what does not lie within the file is found when it is mapped."""
    import pyarrow as pa

    numbers(tmp_path / "a", 10)
    path = tmp_path / "a" / "000000.arrow"
    reader = pa.ipc.open_file(pa.OSFile(str(path)))
    _, words = reader.get_batch_with_custom_metadata(1)
    x = reader.get_batch(0)
    text = x.column("text")
    offsets = np.frombuffer(text.buffers()[1], np.int64).copy()
    offsets[4] = 10**9
    buffers = [None, pa.py_buffer(offsets), text.buffers()[2]]
    broken = pa.Array.from_buffers(text.type, 10, buffers)
    index = x.schema.get_field_index("text")
    for column, fine in [(text, True), (broken, False)]:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, reader.schema) as writer:
            writer.write_batch(x.set_column(index, reader.schema.field(index), column))
            writer.write_batch(x.slice(0, 0), custom_metadata=words)
        if fine:
            assert len(Reading(tmp_path / "a")) == 10
        else:
            with pytest.raises(DataError, match=r"000000\.arrow cannot be read: field 'text'"):
                Spool(tmp_path / "a", WHERE)


def test_reading_copies_nothing_and_keeps_no_file_open(tmp_path: Path, small_windows: None) -> None:
    import pyarrow as pa

    numbers(tmp_path / "a", 500)
    allocated, files = pa.total_allocated_bytes(), len(os.listdir("/proc/self/fd"))
    spool = Spool(tmp_path / "a", WHERE)
    assert len(spool.mapped) == 8
    assert pa.total_allocated_bytes() == allocated
    assert len(os.listdir("/proc/self/fd")) == files
    maps = Path("/proc/self/maps")
    assert maps.read_text().count(str(tmp_path / "a")) == 8
    del spool
    assert str(tmp_path / "a") not in maps.read_text()


@pytest.fixture
def spools_of_one_source(tmp_path: Path, small_windows: None) -> Iterator[tuple[Path, SpoolWriter]]:
    """A link to a spool whose writer has died after 128 of 300 rows, and the writer of another."""
    dead = SpoolWriter(tmp_path / "first", WHERE)
    dead.write(rows_of(0, 150))
    dead.abandon()
    (tmp_path / "link").symlink_to(tmp_path / "first")
    writer = SpoolWriter(tmp_path / "second", WHERE)
    yield tmp_path / "link", writer
    writer.abandon()


def turn(link: Path, folder: Path) -> None:
    fresh = link.with_name("fresh")
    fresh.symlink_to(folder)
    fresh.replace(link)


def test_a_link_is_turned_to_a_spool_of_the_same_rows(
    spools_of_one_source: tuple[Path, SpoolWriter], tmp_path: Path
) -> None:
    link, writer = spools_of_one_source
    rows = rows_of(0, 300)
    records = Reading(link)
    assert len(records) == 128
    early = records.all("x")
    writer.write(part(rows, 0, 10))  # it has less than was read, as yet
    turn(link, tmp_path / "second")
    assert len(records) == 128
    shutil.rmtree(tmp_path / "first")
    writer.write(part(rows, 10, 200))
    assert len(records) == 192
    writer.write(part(rows, 200, 300))
    writer.close()
    assert records.whole
    assert same(early, rows["x"][:128])
    assert all(same(records.all(name), value) for name, value in rows.items())


@pytest.mark.parametrize("count", [130, 150, 300])
def test_a_link_that_is_turned_to_other_rows_is_an_error(
    spools_of_one_source: tuple[Path, SpoolWriter], tmp_path: Path, count: int
) -> None:
    link, writer = spools_of_one_source
    spool = Spool(link, WHERE)
    assert spool.rows == 128
    writer.write(rows_of(1, count))
    writer.close()
    turn(link, tmp_path / "second")
    with pytest.raises(DataError, match=r"follows other rows"):
        spool.refresh()


def test_a_link_that_is_turned_to_fewer_rows_is_an_error(
    spools_of_one_source: tuple[Path, SpoolWriter], tmp_path: Path
) -> None:
    link, writer = spools_of_one_source
    spool = Spool(link, WHERE)
    writer.write(rows_of(0, 64))
    writer.close()
    turn(link, tmp_path / "second")
    with pytest.raises(DataError, match=r"000001\.arrow is not of this spool: expected 1 segments"):
        spool.refresh()


THREADS = """
import os, sys
import numpy as np, torch
from penstock.feed.spool import SpoolWriter
from penstock.feed.spooled import SpoolRecords
assert "pyarrow" not in sys.modules
count = lambda: len(os.listdir("/proc/self/task"))
import pyarrow as pa, pyarrow.compute
before = count()
writer = SpoolWriter(sys.argv[1], "here")
for _ in range(20):
    writer.write({"x": np.ones((1000, 1000)), "y": np.ones(1000)})
writer.close()
records = SpoolRecords(lambda n: sys.argv[1] if n == 0 else None, "here")
assert len(records) == 20_000
records.take(np.arange(0, 20_000, 100))
assert count() == before, "a spool"
pa.table({"x": ["a"] * 100}).group_by("x").aggregate([("x", "count")])
assert count() > before, "the negative control"
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_neither_writing_nor_reading_starts_a_thread(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", THREADS, str(tmp_path / "a")], check=True, timeout=60)
