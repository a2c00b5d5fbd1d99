"""Spools between processes: read while written, a writer that is killed, a disk that is full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.errors import DataError
from penstock.feed.spool import Spool, SpoolWriter
from penstock.feed.spooled import SpoolRecords

SOON_S = 60.0

WRITER = """
import sys, time
import numpy as np
from penstock.errors import DataError
from penstock.feed.spool import SpoolWriter

folder, count, batch, pause_s, then = sys.argv[1:]
writer = SpoolWriter(folder, "partition 5")
for first in range(0, int(count), int(batch)):
    y = np.arange(first, min(first + int(batch), int(count)))
    writer.write({"x": np.repeat(y[:, None], 500, axis=1), "y": y})
    time.sleep(float(pause_s))
if then == "close":
    writer.close()
elif then == "fail":
    writer.fail(DataError("null in row 17", hint="fill nulls"))
elif then == "stay":
    time.sleep(600)
"""


class Process:
    """Another process that writes a spool of rows of 4,008 bytes, in windows of 4,096 of them."""

    def __init__(self, folder: Path, count: int, batch: int, pause_s: float, then: str) -> None:
        self.folder = folder
        arguments = map(str, (folder, count, batch, pause_s, then))
        self.started = subprocess.Popen([sys.executable, "-c", WRITER, *arguments])
        self.records = SpoolRecords(lambda number: folder if number == 0 else None, "train")

    def check(self, start: int, stop: int) -> None:
        x, y = self.records.take(np.arange(start, stop))
        assert y.tolist() == list(range(start, stop))
        assert torch.equal(x, y[:, None].expand(-1, 500))

    def end(self) -> None:
        self.started.kill()
        self.started.wait(SOON_S)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[type[Process]]:
    started: list[Process] = []

    class Started(Process):
        def __init__(self, count: int, batch: int, pause_s: float, then: str) -> None:
            super().__init__(tmp_path / "spool", count, batch, pause_s, then)
            started.append(self)

    yield Started
    for process in started:
        process.end()


def test_a_process_reads_what_another_writes(start: type[Process]) -> None:
    writer = start(30_000, 700, 0.02, "close")
    writer.records.wait(1, SOON_S)
    assert not writer.records.whole, "the first rows come long before the last"
    done = 0
    while not writer.records.whole:
        writer.records.wait(done + 1, SOON_S)
        stop = len(writer.records)
        writer.check(done, stop)
        done = stop
    assert done == 30_000
    assert writer.records.windows.tolist() == [*range(0, 30_000, 4096), 30_000]
    assert writer.started.wait(SOON_S) == 0


def test_a_writer_that_is_killed_is_an_error_within_two_seconds(start: type[Process]) -> None:
    writer = start(10_000, 1000, 0, "stay")
    writer.records.wait(8192, SOON_S)
    assert len(writer.records) == 8192
    writer.started.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(DataError, match=r"train: the writer of .*spool has died after 8192 rows"):
        writer.records.wait(8193, SOON_S)
    assert time.monotonic() - killed < 2
    assert not writer.records.whole
    writer.check(0, 8192)
    successor = SpoolWriter(writer.folder, "partition 5")  # it begins anew
    successor.write({"x": np.zeros((1, 2)), "y": np.zeros(1)})
    assert successor.close().rows == 1


@pytest.mark.parametrize("then", ["end", "fail"])
def test_a_writer_that_ends_without_an_end(start: type[Process], then: str) -> None:
    writer = start(5000, 1000, 0, then)
    words = "null in row 17" if then == "fail" else "has died after 4096 rows"
    with pytest.raises(DataError, match=words):
        writer.records.wait(10**9, SOON_S)
    assert not writer.records.whole
    writer.check(0, 4096)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_an_error_when_it_is_written(small_disk: Path) -> None:
    rows = {"x": np.zeros((1000, 1024), np.float32), "y": np.arange(1000)}
    with pytest.raises(DataError, match=r"no room in .*: 80,000,000 bytes are needed, [345]"):
        SpoolWriter(small_disk / "large", "partition 5", need_bytes=80_000_000)
    writer = SpoolWriter(small_disk / "spool", "partition 5", need_bytes=30_000_000)
    for _ in range(10):
        writer.write(rows)
    with pytest.raises(DataError) as caught:
        writer.write(rows)
    for words in ["partition 5: no room in", "30,000,000 bytes are needed in all", "written"]:
        assert words in str(caught.value)
    assert "PENSTOCK_SPOOL" in caught.value.hint
    spool = Spool(small_disk / "spool", "train")
    assert spool.rows == 8192, "what was sealed can be read"
    assert spool.end is None
    with pytest.raises(DataError, match="no room in"):
        spool.lives()
    assert not list((small_disk / "spool").glob("*.writing")), "room is given back"
    SpoolWriter(small_disk / "next", "partition 5").close()


def test_what_fits_the_disk_is_written(small_disk: Path) -> None:
    """The control: nothing is reserved beyond what is written."""
    writer = SpoolWriter(small_disk / "spool", "partition 5", need_bytes=36_900_000)
    for _ in range(9):
        writer.write({"x": np.zeros((1000, 1024), np.float32), "y": np.arange(1000)})
    end = writer.close()
    assert 36_900_000 < end.bytes < 37_100_000


MEMORY = """
import os, resource, sys
import numpy as np
from penstock.feed.spool import Ragged, SpoolWriter

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

kinds = [("warm", 784), ("one by one", 4096), ("tiny", 8), ("many", 4096), ("large", 3_000_000)]
for kind, row_bytes in [*kinds, ("ragged", 0), ("tiny first", 0)]:
    writer = SpoolWriter(f"{sys.argv[1]}/{kind}", "partition 5")
    done, before, most = 0, None, 0
    while done < {"warm": 30_000_000, "tiny": 700_000}.get(kind, 300_000_000):
        if kind == "ragged":
            lengths = np.array([100, 0, 50_000, 2_000_000])
            value = Ragged(np.cumsum([0, *lengths]), np.ones(lengths.sum(), np.uint8))
            done += value.data.nbytes
        elif kind == "tiny first":
            lengths = np.array([100_000 if done else 10])
            value = Ragged(np.cumsum([0, *lengths]), np.ones(lengths.sum(), np.uint8))
            done += value.data.nbytes
        else:
            count = {"warm": 3000, "many": 10_000, "large": 3}.get(kind, 1)
            value = np.ones((count, row_bytes), np.uint8)
            done += value.nbytes
        writer.write({"x": value, "y": np.ones(len(value))})
        before = before or resident()
        most = max(most, resident())
    assert writer.close().bytes > done
    grown = most - before
    assert kind == "warm" or grown < 40 * 2**20, f"{kind}: {before:,} bytes grew by {grown:,}"
"""


def test_a_writers_memory_is_bounded_while_no_one_reads(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], check=True, timeout=100)
