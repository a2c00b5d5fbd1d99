"""Windows: where the segments of a spool end depends on its rows, and on nothing else."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.feed import spool as spool_module
from penstock.feed import windows as windows_module
from penstock.feed.order import windowed
from penstock.feed.segment import Ragged, Values
from penstock.feed.spool import Spool, SpoolEnd, SpoolWriter
from penstock.feed.spooled import SpoolRecords
from penstock.feed.windows import Windows

WHERE = "photos"
ROW_BYTES = 16
"""Of `rows_of`, besides the bytes of x: how many they are, and y."""
WINDOW, FEW, SMALLEST, LARGEST, BATCH = 2000, 8000, 5, 40, 500
FILE_BYTES = 20_000
"""What a file of a segment has besides its rows: descriptions, of each batch 500 bytes or so."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 2,000 bytes, or 8,000 of up to five rows, or 40 rows."""
    monkeypatch.setattr(windows_module, "WINDOW_BYTES", WINDOW)
    monkeypatch.setattr(windows_module, "FEW_ROWS_BYTES", FEW)
    monkeypatch.setattr(windows_module, "SMALLEST_WINDOW", SMALLEST)
    monkeypatch.setattr(windows_module, "LARGEST_WINDOW", LARGEST)
    monkeypatch.setattr(spool_module, "BATCH_BYTES", BATCH)


def rows_of(lengths: list[int], start: int = 0, stop: int | None = None) -> Values:
    """Rows of these lengths, of which every byte says which row it is of; and their numbers."""
    own = np.array(lengths[start:stop], np.int64)
    y = start + np.arange(len(own))
    data = np.repeat(y.astype(np.uint8), own)
    # As a cut from something larger is.
    return {
        "x": Ragged(7 + np.cumsum([0, *own]), np.concatenate([np.ones(7, np.uint8), data])),
        "y": y,
    }


def expected(lengths: list[int]) -> list[int]:
    """Rows of each segment, counted one by one."""
    sizes: list[list[int]] = []
    for length in lengths:
        size = length + ROW_BYTES
        window = sizes[-1] if sizes else []
        rows, total = len(window) + 1, sum(window) + size
        if sizes and rows <= LARGEST and total <= (FEW if rows <= SMALLEST else WINDOW):
            window.append(size)
        else:
            sizes.append([size])
    return [len(window) for window in sizes]


def written(folder: Path, lengths: list[int], cuts: list[int]) -> SpoolEnd:
    writer = SpoolWriter(folder, WHERE)
    for start, stop in zip([0, *cuts], [*cuts, len(lengths)], strict=True):
        writer.write(rows_of(lengths, start, stop))
    return writer.close()


def records_of(folder: Path) -> SpoolRecords:
    return SpoolRecords(lambda number: folder if number == 0 else None, WHERE)


def order_of(records: SpoolRecords, seed: int = 7) -> NDArray[np.int64]:
    return windowed(seed, 0, 1, records.windows, 0, len(records))


# Tiny, of a usual size, of nearly a window, larger than that, larger than any window.
LENGTH = st.one_of(
    st.integers(0, 3),
    st.integers(20, 400),
    st.integers(WINDOW - 2 * ROW_BYTES, WINDOW + 2),
    st.sampled_from([WINDOW - ROW_BYTES, FEW // 2 - ROW_BYTES, FEW - ROW_BYTES]),
    st.integers(FEW - 100, FEW + 100),
)
LENGTHS = st.one_of(
    st.lists(LENGTH, max_size=60),
    st.lists(st.integers(0, 60), max_size=300),
    st.builds(lambda first, others: [first, *others], LENGTH, st.lists(st.integers(300, 900))),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(LENGTHS, st.data())
def test_segments_are_a_function_of_the_rows_and_not_of_batches(
    small: None, lengths: list[int], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=20)))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        end = written(root / "cut", lengths, cuts)
        assert [segment.rows for segment in end.segments] == expected(lengths)
        assert end.window_rows == (LARGEST if lengths else 0)
        others = {
            "whole": written(root / "whole", lengths, []),
            "single": written(root / "single", lengths, [*range(1, len(lengths))]),
        }
        for other in others.values():
            sums = [(segment.rows, segment.checksum) for segment in other.segments]
            assert sums == [(segment.rows, segment.checksum) for segment in end.segments]
            assert other.checksum == end.checksum
        first = 0
        for segment in end.segments:
            held = sum(lengths[first : first + segment.rows]) + ROW_BYTES * segment.rows
            allowed = FEW if segment.rows <= SMALLEST else WINDOW
            assert segment.rows == 1 or held <= allowed
            assert held <= segment.bytes <= held + FILE_BYTES
            first += segment.rows
        records = records_of(root / "cut")
        order = order_of(records)
        seen = []
        for start in range(0, len(order), 7):
            x, y = records.take(order[start : start + 7])
            numbers = y.tolist()
            seen += numbers
            for i, number in enumerate(numbers):
                assert x[i].tolist() == [number % 256] * lengths[number]
        assert sorted(seen) == list(range(len(lengths))), "each once"


@settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck])
@given(st.lists(LENGTHS, max_size=6))
def test_batches_are_bounded_by_bytes(small: None, batches: list[list[int]]) -> None:
    windows = None
    for lengths in filter(None, batches):
        values = rows_of(lengths)
        windows = windows or Windows(values, BATCH)
        done = 0
        for start, stop, ends in windows.cuts(values):
            assert start == done
            assert stop > start or ends, "only an end has no rows"
            size = sum(lengths[start:stop]) + ROW_BYTES * (stop - start)
            assert stop <= start + 1 or size <= BATCH
            done = stop
        assert done == len(lengths)


def test_a_row_that_is_larger_than_any_window_has_its_own(small: None, tmp_path: Path) -> None:
    end = written(tmp_path / "a", [10, FEW + 1, 10, 10, FEW - ROW_BYTES, FEW + 1, FEW + 1, 5], [3])
    assert [segment.rows for segment in end.segments] == [1, 1, 2, 1, 1, 1, 1]
    end = written(tmp_path / "b", [WINDOW] * 3 + [10] * 40, [])
    assert [segment.rows for segment in end.segments] == [SMALLEST, 38]


def test_rows_of_no_length_end_by_their_number(tmp_path: Path) -> None:
    end = written(tmp_path / "a", [0] * 140_000, [3, 90_000])
    assert [segment.rows for segment in end.segments] == [65_536, 65_536, 8928]


def test_training_need_not_wait_long_where_the_first_row_is_tiny(tmp_path: Path) -> None:
    """What is there is seen when less than 40 MB have been written, and in batches of 4 MiB."""
    lengths = [10] + [100_000] * 499
    writer = SpoolWriter(tmp_path / "a", WHERE)
    came = []
    for start in range(0, 500, 50):
        writer.write(rows_of(lengths, start, start + 50))
        came.append(Spool(tmp_path / "a", WHERE).rows)
    # 10 bytes and 167 times 100,000, with 16 for each row, are as much as fits 16 MiB.
    assert came == [0, 0, 0, 168, 168, 168, 335, 335, 335, 335]
    end = writer.close()
    assert [segment.rows for segment in end.segments] == [168, 167, 165]
    assert all(segment.bytes <= 16 * 2**20 + FILE_BYTES for segment in end.segments)
    blocks = [b.rows for mapped in Spool(tmp_path / "a", WHERE).mapped for b in mapped.blocks]
    assert sum(blocks) == 500
    assert (max(blocks) - 1) * 100_016 <= 4 * 2**20
    assert len(blocks) <= 2 * end.bytes // 2**20


def test_segments_are_not_small_where_the_first_row_is_large(tmp_path: Path) -> None:
    end = written(tmp_path / "a", [2_000_000] + [100] * 50_000, [])
    assert [segment.rows for segment in end.segments] == [50_001]


def test_few_rows_may_be_more_than_sixteen_mebibytes_but_not_any_number(tmp_path: Path) -> None:
    end = written(tmp_path / "a", [300_000] * 130, [])
    assert [segment.rows for segment in end.segments] == [64, 64, 2]
    end = written(tmp_path / "b", [3_000_000] * 50, [])
    assert [segment.rows for segment in end.segments] == [22, 22, 6]


def test_collected_rows_take_little_memory_where_the_first_was_tiny(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path / "a", WHERE)
    lengths = [10] + [100_000] * 200 + [900_000] * 10
    for row in range(len(lengths)):
        writer.write(rows_of(lengths, row, row + 1))
        assert writer._small_bytes < 4 * 2**20
    writer.close()
    spool = Spool(tmp_path / "a", WHERE)
    blocks = [block.rows for mapped in spool.mapped for block in mapped.blocks]
    assert sum(blocks) == len(lengths)
    assert (max(blocks) - 1) * 100_016 <= 5 * 2**20
    assert [mapped.rows for mapped in spool.mapped] == [168, 43]


FIXED = {
    # bytes of x: rows, rows of a batch; those of segments and of the first one's blocks; checksums
    # of all and of the first segment; digest and beginning of the first epoch's order
    784: (
        (40_000, 701),
        [16_384, 16_384, 7232],
        [5608, 5608, 5168],
        ("7d40341c", "a55342ae"),
        ("1390e5ec24bfc60e", [1300, 15193, 5932, 6611, 9651]),
    ),
    4096: (
        (9000, 1000),
        [2048, 2048, 2048, 2048, 808],
        [1000, 1000, 48],
        ("071bd92d", "e5d39404"),
        ("32b23b4c7e16225e", [1300, 812, 1720, 761, 2017]),
    ),
    300_000: (
        (150, 7),
        [64, 64, 22],
        [7] * 9 + [1],
        ("9cc11611", "8fddb2d3"),
        ("ad78173b88e2607f", [21, 60, 41, 16, 24]),
    ),
    1: (
        (140_000, 50_000),
        [65_536, 65_536, 8928],
        [65_536],
        ("70fcabb2", "ffefc2cb"),
        ("2fec409e10f47ee8", [55043, 1300, 33660, 36247, 55714]),
    ),
}
"""As they were before rows of unequal length had windows of their own: a run that was begun then is
resumed with the same order."""


@pytest.mark.parametrize("width", FIXED)
def test_rows_of_one_size_are_as_they_always_were(tmp_path: Path, width: int) -> None:
    (count, batch), segments, blocks, checksums, (digest, beginning) = FIXED[width]
    writer = SpoolWriter(tmp_path / "a", WHERE)
    for start in range(0, count, batch):
        y = np.arange(start, min(start + batch, count))
        writer.write({"x": np.repeat((y % 251).astype(np.uint8)[:, None], width, axis=1), "y": y})
    end = writer.close()
    assert end.window_rows == segments[0]
    assert [segment.rows for segment in end.segments] == segments
    assert (end.checksum, end.segments[0].checksum) == checksums
    spool = Spool(tmp_path / "a", WHERE)
    assert [block.rows for block in spool.mapped[0].blocks] == blocks
    records = records_of(tmp_path / "a")
    order = order_of(records)
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == digest
    assert records.take(order[:5])[1].tolist() == beginning
