"""The records of a shard: rows of several spools in order, some of which come while it is read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.errors import DataError, JobError
from penstock.feed import spool as spool_module
from penstock.feed import windows as windows_module
from penstock.feed.order import epoch_order, windowed
from penstock.feed.spool import Ragged, SpoolEnd, SpoolWriter
from penstock.feed.spooled import NotYet, SpoolRecords

WHERE = "train"
SOON_S = 30.0
"""What happens within milliseconds is waited for so long, on a busy machine."""


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows_module, "LARGEST_WINDOW", 64)
    monkeypatch.setattr(spool_module, "BATCH_BYTES", 1000)


def rows_of(first: int, count: int) -> dict[str, np.ndarray]:
    """Rows that say their numbers."""
    y = np.arange(first, first + count)
    return {"x": (y[:, None] * 10 + np.arange(3)).astype(np.float32), "y": y}


def written(folder: Path, first: int, count: int) -> SpoolEnd:
    writer = SpoolWriter(folder, WHERE)
    writer.write(rows_of(first, count))
    return writer.close()


def folders(folder: Path, count: int) -> Callable[[int], Path | None]:
    return lambda number: folder / str(number) if number < count else None


def check(records: SpoolRecords, rows: np.ndarray) -> None:
    x, y = records.take(rows)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert y.tolist() == rows.tolist()
    assert x.tolist() == (rows[:, None] * 10.0 + np.arange(3)).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_rows_of_several_spools_are_one_behind_the_other(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0, 0, 1, 2, 63, 64, 65, 128, 300], rng.integers(1, 9)).tolist()
    first = np.cumsum([0, *sizes]).tolist()
    ends = [written(tmp_path / str(i), first[i], n) for i, n in enumerate(sizes)]
    records = SpoolRecords(folders(tmp_path, len(sizes)), WHERE)
    assert (len(records), records.whole) == (first[-1], True)
    assert records.ends() == ends
    windows = [first[i] + start for i, n in enumerate(sizes) for start in range(0, n, 64)]
    assert records.windows.tolist() == [*windows, first[-1]]
    if first[-1]:
        check(records, rng.permutation(first[-1]))
        check(records, rng.integers(0, first[-1], 1000))
        check(records, np.arange(0))
    order = windowed(seed, 0, 1, records.windows, 0, first[-1])
    ids = np.concatenate(
        [records.take(order[i : i + 7])[1] for i in range(0, len(order), 7)] or [[]]
    )
    assert sorted(ids) == list(range(first[-1])), "each once"


def test_what_is_taken_is_fresh(tmp_path: Path) -> None:
    written(tmp_path / "0", 0, 10)
    records = SpoolRecords(folders(tmp_path, 1), WHERE)
    x, y = records.take(np.array([1, 2]))
    assert x.is_contiguous()
    x.zero_()
    y.zero_()
    check(records, np.array([1, 2]))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "float64", "uint32"])
def test_dtypes_and_shapes(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.random((100, 2, 1, 3)) * 3).astype(dtype)
    y = (rng.random((100, 0)) * 3).astype(dtype)
    writer = SpoolWriter(tmp_path / "0", WHERE)
    writer.write({"x": x, "y": y})
    writer.close()
    rows = rng.permutation(100)
    found_x, found_y = SpoolRecords(folders(tmp_path, 1), WHERE).take(rows)
    assert torch.equal(found_x, torch.from_numpy(x[rows]))
    assert (found_y.shape, found_y.dtype) == ((100, 0), found_x.dtype)


def test_rows_of_unequal_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.bytes(n) for n in rng.integers(0, 50, 300) * rng.integers(0, 2, 300)]
    assert b"" in texts
    for number, part in enumerate([texts[:100], texts[100:]]):
        data = np.frombuffer(b"".join(part), np.uint8)
        writer = SpoolWriter(tmp_path / str(number), WHERE)
        writer.write({"x": Ragged(np.cumsum([0, *map(len, part)]), data), "y": np.ones(len(part))})
        writer.close()
    records = SpoolRecords(folders(tmp_path, 2), WHERE)
    rows = rng.permutation(300)
    x, y = records.take(rows)
    assert [x[i].tobytes() for i in range(300)] == [texts[row] for row in rows]
    assert len(x) == len(y) == 300
    x.data[:] = 0
    assert records.take(rows[:20])[0].data.any(), "it is fresh"
    empty = int(rows[np.flatnonzero(x.lengths == 0)[0]])
    assert records.take(np.array([empty, empty]))[0].offsets.tolist() == [0, 0, 0]
    assert len(records.take(np.arange(0))[0]) == 0


def test_a_shard_without_rows(tmp_path: Path) -> None:
    written(tmp_path / "0", 0, 0)
    for count in (0, 1):
        records = SpoolRecords(folders(tmp_path, count), WHERE)
        records.wait(1, timeout_s=0)
        assert (len(records), records.whole) == (0, True)
        assert records.windows.tolist() == [0]
        x, y = records.take(np.arange(0))
        assert (x.shape, y.shape) == ((0,), (0,))
        with pytest.raises(IndexError, match="rows 0 to 0: 0 have come"):
            records.take(np.array([0]))


def test_rows_come_in_order_and_without_gaps(tmp_path: Path) -> None:
    known = 1

    def folder(number: int) -> Path | None:
        if number >= known:
            raise NotYet
        return tmp_path / str(number) if number < 3 else None

    records = SpoolRecords(folder, WHERE)
    assert (len(records), records.whole) == (0, False)
    first = SpoolWriter(tmp_path / "0", WHERE)
    written(tmp_path / "1", 100, 10)  # before the first, and not known yet
    first.write(rows_of(0, 99))
    assert len(records) == 64
    check(records, np.arange(64))
    for rows in ([64], [5, 1000], [-1], [-64]):
        with pytest.raises(IndexError, match=r"train: rows .*: 64 have come"):
            records.take(np.array(rows))
    known = 2
    assert len(records) == 64
    first.write(rows_of(99, 1))
    first.close()
    check(records, np.array([109, 0, 99, 100]))  # without a look before
    assert (len(records), records.whole) == (110, False)
    assert records.windows.tolist() == [0, 64, 100, 110]
    with pytest.raises(AssertionError):
        records.ends()
    known = 4
    assert (len(records), records.whole) == (110, False), "the third is not there"
    written(tmp_path / "2", 110, 3)
    assert (len(records), records.whole) == (113, True)
    assert [end.rows for end in records.ends()] == [100, 10, 3]
    check(records, epoch_order(0, 1, 0, 113))


def test_waiting_ends_when_enough_rows_have_come_or_all(tmp_path: Path) -> None:
    records = SpoolRecords(folders(tmp_path, 1), WHERE)

    def write() -> None:
        time.sleep(0.1)
        writer = SpoolWriter(tmp_path / "0", WHERE)
        for first in range(0, 300, 50):
            time.sleep(0.01)
            writer.write(rows_of(first, 50))
        writer.close()

    thread = threading.Thread(target=write)
    began = time.monotonic()
    thread.start()
    records.wait(0, timeout_s=0)
    assert len(records) == 0
    records.wait(65, timeout_s=SOON_S)
    assert time.monotonic() - began > 0.1
    assert len(records) >= 65
    check(records, np.arange(65))
    records.wait(10**9, timeout_s=SOON_S)
    assert (len(records), records.whole) == (300, True)
    thread.join(SOON_S)


@pytest.mark.parametrize("there", [False, True])
def test_waiting_has_a_deadline(tmp_path: Path, there: bool) -> None:
    writer = None
    if there:
        writer = SpoolWriter(tmp_path / "0", WHERE)
        writer.write(rows_of(0, 100))
    records = SpoolRecords(folders(tmp_path, 1), WHERE)
    began = time.monotonic()
    with pytest.raises(DataError) as caught:
        records.wait(65, timeout_s=0.2)
    assert 0.2 <= time.monotonic() - began < SOON_S
    rows = 64 if there else 0
    for words in ["train: ", "0.2 s", "expected 65", f"{tmp_path / '0'} has {rows}"]:
        assert words in str(caught.value)
    records.wait(rows, timeout_s=0)
    if writer is not None:
        writer.abandon()


def test_waiting_for_a_spool_that_nobody_knows_has_a_deadline() -> None:
    def folder(number: int) -> Path | None:
        raise NotYet

    with pytest.raises(DataError, match="no spool is known yet"):
        SpoolRecords(folder, WHERE).wait(1, timeout_s=0.05)


def test_waiting_ends_when_nobody_wants_it(tmp_path: Path) -> None:
    over = threading.Event()
    records = SpoolRecords(folders(tmp_path, 1), WHERE)
    threading.Timer(0.1, over.set).start()
    began = time.monotonic()
    records.wait(1, timeout_s=10 * SOON_S, over=over.is_set)
    assert 0.1 <= time.monotonic() - began < SOON_S
    assert len(records) == 0


def test_a_writer_that_dies_is_an_error_and_no_short_epoch(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "0", WHERE)
    writer.write(rows_of(0, 100))
    records = SpoolRecords(folders(tmp_path, 1), WHERE)
    threading.Timer(0.1, writer.abandon).start()
    with pytest.raises(DataError, match=r"train: the writer of .*/0 has died after 64 rows"):
        records.wait(65, timeout_s=SOON_S)
    assert (len(records), records.whole) == (64, False)
    records.wait(64, timeout_s=0)
    check(records, np.arange(64))


@pytest.mark.parametrize("kind", [DataError, JobError])
def test_a_writer_that_gives_up_says_why(tmp_path: Path, kind: type[DataError]) -> None:
    writer = SpoolWriter(tmp_path / "0", WHERE)
    writer.write(rows_of(0, 100))
    error = kind("null in row 17", hint="fill nulls")
    records = SpoolRecords(folders(tmp_path, 1), WHERE, grace_s=SOON_S)
    threading.Timer(0.1, writer.fail, [error]).start()
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        records.wait(65, timeout_s=10 * SOON_S)
    assert time.monotonic() - began < SOON_S
    assert (caught.value.message, caught.value.hint) == ("null in row 17", "fill nulls")


def test_another_may_take_the_place_of_a_writer_that_has_died(tmp_path: Path) -> None:
    dead = SpoolWriter(tmp_path / "dead", WHERE)
    dead.write(rows_of(0, 100))
    dead.abandon()
    (tmp_path / "0").symlink_to(tmp_path / "dead")
    patient = SpoolRecords(folders(tmp_path, 1), WHERE, grace_s=SOON_S)
    with pytest.raises(DataError, match="has died after 64 rows"):
        SpoolRecords(folders(tmp_path, 1), WHERE, grace_s=0.1).wait(100, timeout_s=SOON_S)

    def turn() -> None:
        written(tmp_path / "other", 0, 100)
        (tmp_path / "link").symlink_to(tmp_path / "other")
        (tmp_path / "link").replace(tmp_path / "0")

    threading.Timer(0.1, turn).start()
    patient.wait(100, timeout_s=SOON_S)
    assert (len(patient), patient.whole) == (100, True)
    check(patient, np.arange(100))


def test_spools_whose_rows_look_different(tmp_path: Path) -> None:
    written(tmp_path / "0", 0, 10)
    written(tmp_path / "1", 0, 0)
    writer = SpoolWriter(tmp_path / "2", WHERE)
    writer.write({"x": np.zeros((3, 4), np.float32), "y": np.arange(3)})
    writer.close()
    records = SpoolRecords(folders(tmp_path, 3), WHERE)
    with pytest.raises(DataError) as caught:
        records.wait(13, timeout_s=SOON_S)
    for words in [
        f"train: rows of {tmp_path / '2'}",
        "x: float32[4]",
        "those before x: float32[3]",
    ]:
        assert words in str(caught.value)
    for _ in range(2):
        with pytest.raises(DataError, match="rows of"):  # and never a short epoch
            len(records)


def test_one_thread_takes_while_another_looks(tmp_path: Path) -> None:
    """As a reader and whoever asks how far it has come."""
    count = 3000
    records = SpoolRecords(folders(tmp_path, 3), WHERE)
    failed: list[BaseException] = []

    def look() -> None:
        try:
            while not records.whole:
                assert records.windows[-1] <= len(records)
        except BaseException as error:
            failed.append(error)

    def write() -> None:
        for number in range(3):
            writer = SpoolWriter(tmp_path / str(number), WHERE)
            for first in range(0, 1000, 10):
                writer.write(rows_of(1000 * number + first, 10))
            writer.close()

    threads = [threading.Thread(target=look), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(0)
    while not records.whole:
        records.wait(1, timeout_s=SOON_S)
        check(records, rng.integers(0, len(records), 20))
    for thread in threads:
        thread.join(SOON_S)
    assert not failed
    check(records, rng.permutation(count))


@pytest.mark.parametrize("rows_each", [64, 1], ids=["segment by segment", "without any segment"])
def test_the_deadline_is_for_rows_that_do_not_come_not_for_many_that_do(
    tmp_path: Path, rows_each: int
) -> None:
    writer = SpoolWriter(tmp_path / "0", WHERE)

    def write() -> None:
        for number in range(12):
            time.sleep(0.2)
            writer.write(rows_of(number * rows_each, rows_each))
        writer.close()

    records = SpoolRecords(folders(tmp_path, 1), WHERE)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        records.wait(12 * rows_each, 1.5)  # they take 2.4 s
    finally:
        thread.join(SOON_S)
    assert len(records) == 12 * rows_each


def test_a_file_that_is_touched_keeps_the_deadline_away(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    records = SpoolRecords(folders(tmp_path, 1), WHERE, alive=alive)
    over = threading.Event()

    def touch() -> None:
        for _ in range(10):
            alive.touch()
            time.sleep(0.2)
        over.set()

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        records.wait(1, 1.0, over.is_set)
    finally:
        thread.join(SOON_S)
    assert over.is_set(), "the deadline came first"
    with pytest.raises(DataError, match=r"no more in 0\.2 s"):
        records.wait(1, 0.2)
