"""Spools filled from files by a thread: read while they grow, used again, and let go."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock import feed
from penstock.errors import DataError
from penstock.feed.filling import filled, key_of
from penstock.feed.spool import SpoolWriter

EMPTY: Any = {"x": np.empty((0, 2), np.float32), "y": np.empty(0, np.int64)}


@pytest.fixture(autouse=True)
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where spools are; no thread is left when they are not wanted any more."""
    monkeypatch.setenv("PENSTOCK_SPOOL", str(tmp_path / "spools"))
    yield tmp_path / "spools"
    gc.collect()
    deadline = time.monotonic() + 20
    while any(thread.name == "penstock-fill" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread is left"
        time.sleep(0.01)


def ten(count: int = 10) -> Callable[[], Any]:
    def read() -> Iterator[Any]:
        yield rows(0, count)

    return read


def rows(start: int, stop: int) -> Any:
    y = np.arange(start, stop)
    return {"x": np.stack([y, -y], axis=1).astype(np.float32), "y": y}


def test_records_can_be_taken_while_later_ones_are_read() -> None:
    go = threading.Event()

    def read() -> Iterator[Any]:
        yield rows(0, 70_000)  # more than a window
        assert go.wait(30)
        yield rows(70_000, 70_010)

    records = filled("slow", "here", 70_010, read, EMPTY)
    records.wait(65_536, 30.0)
    assert len(records) == 65_536
    assert not records.whole
    assert records.take(np.array([65_535]))[1].tolist() == [65_535]
    go.set()
    records.wait(70_010, 30.0)
    records.wait(70_011, 30.0)
    assert records.whole
    assert records.take(np.array([70_009, 0]))[0].tolist() == [[70_009, -70_009], [0, 0]]


def test_a_spool_is_filled_once(spools: Path) -> None:
    reads = []

    def read() -> Iterator[Any]:
        reads.append(1)
        yield rows(0, 10)

    for _ in range(3):
        records = filled("once", "here", 10, read, EMPTY)
        records.wait(10, 30.0)
        assert records.take(np.arange(10))[1].tolist() == list(range(10))
    del records
    assert filled("once", "here", 10, read, EMPTY).take(np.array([], np.int64))[0].shape == (0, 2)
    assert len(reads) == 1
    assert [path.name for path in spools.iterdir()] == ["once"]
    # Of other rows than those expected, it is not what was wanted.
    filled("once", "here", 11, ten(11), EMPTY).wait(11, 30.0)
    shutil.rmtree(spools / "once")
    filled("once", "here", 10, read, EMPTY).wait(10, 30.0)
    assert len(reads) == 2


def test_two_that_want_the_same_share_one_thread() -> None:
    go = threading.Event()
    reads = []

    def read() -> Iterator[Any]:
        reads.append(1)
        assert go.wait(30)
        yield rows(0, 10)

    first = filled("shared", "here", 10, read, EMPTY)
    second = filled("shared", "here", 10, read, EMPTY)
    del first  # the other still wants it
    go.set()
    second.wait(10, 30.0)
    assert second.take(np.arange(10))[1].tolist() == list(range(10))
    assert len(reads) == 1


def test_what_another_process_fills_is_read_as_it_grows(spools: Path) -> None:
    writer = SpoolWriter(spools / "theirs", "elsewhere")  # its lock is as that of a process
    records = filled("theirs", "here", 10, ten(), EMPTY)
    writer.write(rows(0, 10))
    writer.close()
    records.wait(10, 30.0)
    assert records.take(np.arange(10))[1].tolist() == list(range(10))


def test_what_goes_wrong_is_raised_by_who_waits() -> None:
    def fails(error: Exception) -> Any:
        def read() -> Iterator[Any]:
            yield rows(0, 10)
            raise error

        return read

    error = DataError("a.csv: row 3 is bad", hint="mend it")
    with pytest.raises(DataError, match=r"a\.csv: row 3 is bad\n  hint: mend it"):
        filled("bad", "here", 20, fails(error), EMPTY).wait(20, 30.0)
    with pytest.raises(DataError, match=r"here: cannot be read: ValueError: what"):
        filled("worse", "here", 20, fails(ValueError("what")), EMPTY).wait(20, 30.0)
    # A failure is not for ever.
    records = filled("bad", "here", 10, ten(), EMPTY)
    records.wait(10, 30.0)
    assert len(records) == 10


def test_a_spool_that_cannot_fit_is_refused_at_once() -> None:
    free = shutil.disk_usage("/").free
    with pytest.raises(DataError, match=r"bytes are needed, [\d,]+ are free"):
        filled("huge", "here", 10, ten(), EMPTY, need_bytes=100 * free)


def test_a_spool_that_nobody_wants_is_given_up() -> None:
    begun, asked = threading.Event(), []

    def endless() -> Iterator[Any]:
        while True:
            asked.append(1)
            begun.set()
            time.sleep(0.005)
            yield rows(0, 10)

    records = filled("endless", "here", 2**60, endless, EMPTY)
    assert begun.wait(30)
    del records  # the fixture sees that the thread ends


def test_keys_say_all_that_rows_depend_on(tmp_path: Path, spools: Path) -> None:
    assert key_of(1, "a") == key_of(1, "a") != key_of("1", "a")
    path = tmp_path / "a.parquet"

    def write(values: list[int]) -> None:
        pq.write_table(pa.table({"x": values, "y": values}), path)

    def taken(**options: Any) -> list[int]:
        source = feed.parquet(path, features="x", target="y", **options)
        records: Any = source.open(source.manifest().share(0, 1))
        records.wait(2**62, 30.0)
        found: list[int] = records.take(np.arange(len(records)))[1].tolist()
        return found

    write([1, 2, 3])
    assert taken() == taken() == [1, 2, 3]
    assert len(list(spools.iterdir())) == 1
    write([4, 5, 6])
    os.utime(path, (1, 1))
    assert taken() == [4, 5, 6]
    assert len(list(spools.iterdir())) == 2
    taken(on_bad_record="skip")
    assert len(list(spools.iterdir())) == 3


ENDS = """
import sys, time
import numpy as np
from penstock.feed.filling import filled
def endless():
    while True:
        yield {"x": np.zeros((100, 50_000), np.float32), "y": np.zeros(100, np.int64)}
records = filled("endless", "here", 2**60, endless, {})
records.wait(64, 30.0)
sys.stdout.write(str(records._spools[0].folder))
"""


def test_a_process_may_end_while_its_thread_reads() -> None:
    env = {key: value for key, value in os.environ.items() if key != "PENSTOCK_SPOOL"}
    done = subprocess.run(
        [sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=60, env=env
    )
    assert (done.returncode, done.stderr) == (0, "")
    folder = Path(done.stdout)
    assert folder.name == "endless"
    assert not folder.parent.exists(), "a process's own spools go with it"
