"""Events: what is written is read back, by us and by stock TensorBoard, on any filesystem."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import (
    STORE_EVERYTHING_SIZE_GUIDANCE,
    EventAccumulator,
)
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as slow_crc32c
from tensorboard.data_compat import migrate_event
from tensorboard.util.tensor_util import make_ndarray

from penstock.errors import DataError, RunError
from penstock.watch.events import EventWriter
from penstock.watch.reader import read_events
from penstock.watch.segments import crc32c, next_segment, pack, unpack


def stock(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance=STORE_EVERYTHING_SIZE_GUIDANCE).Reload()


def write(url: str, steps: range, resumed_at: int | None = None, offset: float = 0.0) -> None:
    """A run of these steps; a segment for every two of them."""
    with EventWriter(url, roll_s=1e9, resumed_at=resumed_at) as writer:
        for step in steps:
            writer.scalars(step, {"loss": step + offset, "rate": -step}, wall_time=1e9 + step)
            if step % 2:
                writer.histogram(step, "weights", torch.full((3,), step + offset))
                writer.flush()


@pytest.fixture
def memory_url() -> str:
    url = "memory://events-test/run"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(url):
        filesystem.rm(url, recursive=True)
    return url


def test_crc32c_is_the_standard_one() -> None:
    random = np.random.default_rng(0)
    messages = [random.bytes(n) for n in [*range(70), 4_093, 4_096, 200_001]]
    assert crc32c([b"123456789"]).tolist() == [0xE3069283]
    assert crc32c(messages[:-1]).tolist() == [slow_crc32c(m) for m in messages[:-1]]
    flipped = bytearray(messages[-1])
    flipped[100_000] ^= 1
    assert crc32c([messages[-1]]) != crc32c([bytes(flipped)])
    assert crc32c([messages[-1]]).tolist() == [slow_crc32c(messages[-1])]


def test_records_round_trip() -> None:
    payloads = [b"", b"a", bytes(300), b"x" * 5_000]
    data = pack(payloads)
    assert [payload for _, payload in unpack(data, "f")] == payloads
    assert [offset for offset, _ in unpack(data, "f")] == [0, 16, 33, 349]
    assert pack([]) == b""
    assert unpack(b"", "f") == []


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_what_is_written_is_read(where: str, tmp_path: Path, memory_url: str) -> None:
    url = memory_url if where == "memory" else str(tmp_path / "run" / "events")
    with EventWriter(url) as writer:
        writer.scalars(0, {"loss": 0.5, "rate": 0.1}, wall_time=1_700_000_000.25)
        writer.scalars(1, {"loss": math.nan}, wall_time=1_700_000_001.5)
        writer.flush()
        writer.scalars(300, {"loss": np.float32(0.25), "rate": 1e-3}, wall_time=1_700_000_002)
        writer.histogram(300, "weights", torch.tensor([[1.0, 2.0], [2.0, -4.0]]))
        writer.text(300, "note", "größer")
    events = read_events(url)
    assert events.tags == {
        "loss": "scalar",
        "note": "text",
        "rate": "scalar",
        "weights": "histogram",
    }
    loss = events.scalars("loss")
    assert loss.steps.tolist() == [0, 1, 300]
    assert (loss.steps.dtype, loss.values.dtype) == (np.int64, np.float64)
    np.testing.assert_array_equal(loss.values, [0.5, math.nan, 0.25])
    assert loss.wall_times.tolist() == [1_700_000_000.25, 1_700_000_001.5, 1_700_000_002]
    assert events.scalars("rate").values.tolist() == [float(np.float32(v)) for v in (0.1, 1e-3)]
    (weights,) = events.histograms("weights")
    assert (weights.step, weights.num, weights.min, weights.max) == (300, 4, -4, 2)
    assert (weights.sum, weights.sum_squares, weights.buckets.sum()) == (1, 25, 4)
    (note,) = events.texts("note")
    assert (note.step, note.text) == (300, "größer")


def test_buckets_hold_what_lies_between_their_limits(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal(10_000) * 1e-3
    values[:3] = [0.0, 1e30, -1e30]
    with EventWriter(str(tmp_path)) as writer:
        writer.histogram(0, "grads", values)
    (found,) = read_events(str(tmp_path)).histograms("grads")
    limits = np.concatenate([[-np.inf], found.bucket_limits])
    assert (np.diff(limits) > 0).all()
    counts = [((values >= a) & (values < b)).sum() for a, b in pairwise(limits)]
    assert found.buckets.tolist() == counts
    assert found.sum_squares == pytest.approx((values**2).sum(), rel=1e-12)


def test_values_that_are_not_finite_are_counted_apart(tmp_path: Path) -> None:
    with EventWriter(str(tmp_path)) as writer:
        writer.histogram(0, "good", torch.tensor([1.0, 2.0]))
        writer.histogram(0, "some", torch.tensor([1.0, math.nan, math.inf]))
        writer.histogram(0, "none", torch.tensor([-math.inf]))
        writer.histogram(0, "empty", torch.empty(0))
    events = read_events(str(tmp_path))
    (some,), (none,) = events.histograms("some"), events.histograms("none")
    assert (some.num, some.max, some.sum, none.num, len(none.buckets)) == (1, 1, 1, 0, 0)
    assert events.scalars("some/non_finite").values.tolist() == [2]
    assert events.scalars("none/non_finite").values.tolist() == [1]
    assert "good/non_finite" not in events.tags
    assert "empty/non_finite" not in events.tags
    assert len(stock(tmp_path).Histograms("none")) == 1


def test_stock_tensorboard_reads_the_same(tmp_path: Path) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    with EventWriter(str(tmp_path)) as writer:
        for step in range(5):
            writer.scalars(step, {"loss": 1 / (step + 1)})
            writer.histogram(step, "weights", values * step)
            writer.text(step, "note", "hello")
            writer.flush()
    ours, theirs = read_events(str(tmp_path)), stock(tmp_path)
    assert theirs.file_version == 2
    loss = ours.scalars("loss")
    assert [(e.step, e.value, e.wall_time) for e in theirs.Scalars("loss")] == list(
        zip(loss.steps, loss.values, loss.wall_times)
    )
    histograms = ours.histograms("weights")
    assert len(histograms) == len(theirs.Histograms("weights")) == 5
    for mine, event in zip(histograms, theirs.Histograms("weights")):
        its = event.histogram_value
        assert (mine.step, mine.num, mine.min, mine.max, mine.sum, mine.sum_squares) == (
            event.step, its.num, its.min, its.max, its.sum, its.sum_squares,
        )  # fmt: skip
        assert mine.bucket_limits.tolist() == list(its.bucket_limit)
        assert mine.buckets.tolist() == list(its.bucket)
    assert theirs.SummaryMetadata("note").plugin_data.plugin_name == "text"
    assert make_ndarray(theirs.Tensors("note")[0].tensor_proto).tolist() == [b"hello"]


def test_tensorboard_can_draw_the_histogram(tmp_path: Path) -> None:
    with EventWriter(str(tmp_path)) as writer:
        writer.histogram(0, "weights", np.array([-1.0, 0.5, 0.5, 3.0]))
    (segment,) = tmp_path.iterdir()
    event = Event.FromString(unpack(segment.read_bytes(), "f")[1][1])
    drawn = make_ndarray(migrate_event(event).summary.value[0].tensor)
    assert (drawn[0, 0], drawn[-1, 1], drawn[:, 2].sum()) == (-1, 3, 4)
    assert (drawn[:, 0] <= drawn[:, 1]).all()


def test_a_resumed_run_supersedes_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write(str(tmp_path), range(10))
    write(str(tmp_path), range(6, 12), resumed_at=5, offset=0.5)
    write(str(tmp_path), range(9, 14), resumed_at=8, offset=0.25)
    expected = [0, 1, 2, 3, 4, 5, 6.5, 7.5, 8.5, 9.25, 10.25, 11.25, 12.25, 13.25]
    events, theirs = read_events(str(tmp_path)), stock(tmp_path)
    assert events.scalars("loss").steps.tolist() == list(range(14))
    assert events.scalars("loss").values.tolist() == expected
    assert [e.step for e in theirs.Scalars("loss")] == list(range(14))
    assert [e.value for e in theirs.Scalars("loss")] == expected
    maxima = [(1, 1), (3, 3), (5, 5), (7, 7.5), (9, 9.25), (11, 11.25), (13, 13.25)]
    assert [(h.step, h.max) for h in events.histograms("weights")] == maxima
    assert [(h.step, h.histogram_value.max) for h in theirs.Histograms("weights")] == maxima


def test_resuming_before_an_earlier_resume_supersedes_that_too(tmp_path: Path) -> None:
    write(str(tmp_path), range(8))
    write(str(tmp_path), range(6, 9), resumed_at=5)
    with EventWriter(str(tmp_path), resumed_at=2):
        pass  # ended before its first step: the steps after 2 are undone all the same
    assert read_events(str(tmp_path)).scalars("loss").steps.tolist() == [0, 1, 2]
    assert [e.step for e in stock(tmp_path).Scalars("loss")] == [0, 1, 2]


def test_without_the_start_event_steps_are_doubled(tmp_path: Path) -> None:
    write(str(tmp_path), range(4))
    write(str(tmp_path), range(2, 5))
    doubled = [0, 1, 2, 3, 2, 3, 4]
    assert read_events(str(tmp_path)).scalars("loss").steps.tolist() == doubled
    assert [e.step for e in stock(tmp_path).Scalars("loss")] == doubled


def test_a_tag_whose_every_event_is_superseded_is_gone(tmp_path: Path) -> None:
    write(str(tmp_path), range(4))
    write(str(tmp_path), range(0), resumed_at=-1)
    assert read_events(str(tmp_path)).tags == {}


def test_a_resume_within_one_file_supersedes_too(tmp_path: Path) -> None:
    """Other writers append: what came before a START in the same file is dropped as well."""
    for folder, resumed_at in (("a", None), ("b", 1)):
        write(str(tmp_path / folder), range(4 if folder == "a" else 1), resumed_at)
    joined = tmp_path / "joined"
    joined.mkdir()
    data = b"".join(p.read_bytes() for f in "ab" for p in sorted((tmp_path / f).iterdir()))
    (joined / "events.out.tfevents.1000000000.host").write_bytes(data)
    assert read_events(str(joined)).scalars("loss").steps.tolist() == [0, 1, 0]
    assert [e.step for e in stock(joined).Scalars("loss")] == [0, 1, 0]


def test_segments_sort_in_the_order_they_were_written(tmp_path: Path) -> None:
    write(str(tmp_path), range(6))
    before = sorted(path.name for path in tmp_path.iterdir())
    with EventWriter(str(tmp_path)) as writer:
        writer.scalars(6, {"loss": 0}, wall_time=5.0)  # a clock that went back
    (new,) = {path.name for path in tmp_path.iterdir()} - set(before)
    assert new > before[-1]
    assert before[0] == "events.out.tfevents.1000000000.000000.penstock"
    assert new.split(".")[4] == "000003"


def test_a_name_sorts_after_any_other_writers() -> None:
    other = "run/events.out.tfevents.1700000000.host.4711.0"
    assert next_segment(other, 1.6e9) > other.rpartition("/")[2]
    last = "events.out.tfevents.1700000000.999999.penstock"
    assert last < next_segment(last, 1.7e9) < next_segment(next_segment(last, 1.7e9), 1.7e9)


def test_calls_roll_by_the_clock(tmp_path: Path) -> None:
    with EventWriter(str(tmp_path / "slow"), roll_s=1e9) as writer:
        writer.scalars(0, {"loss": 1})
        assert list((tmp_path / "slow").iterdir()) == []
    with EventWriter(str(tmp_path / "fast"), roll_s=0) as writer:
        for step in range(3):
            writer.scalars(step, {"loss": step})
            assert len(list((tmp_path / "fast").iterdir())) == step + 1
            assert len(read_events(str(tmp_path / "fast")).scalars("loss")) == step + 1
    assert all("tfevents" in path.name for path in tmp_path.glob("*/*"))
    with pytest.raises(ValueError, match="closed"):
        writer.scalars(3, {"loss": 3})


def test_a_live_folder_may_be_missing_or_empty(tmp_path: Path, memory_url: str) -> None:
    (tmp_path / "empty").mkdir()
    for url in (str(tmp_path / "missing"), str(tmp_path / "empty"), memory_url):
        events = read_events(url)
        assert events.tags == {}
        with pytest.raises(RunError, match="no scalar 'loss'; it has none yet"):
            events.scalars("loss")


def test_reading_again_reads_only_new_segments(tmp_path: Path) -> None:
    write(str(tmp_path), range(4))
    known = read_events(str(tmp_path))
    first = min(tmp_path.iterdir())
    first.write_bytes(bytes(len(first.read_bytes())))  # would be an error if it were read again
    write(str(tmp_path), range(3, 5), resumed_at=2)
    assert read_events(str(tmp_path), known).scalars("loss").steps.tolist() == [0, 1, 2, 3, 4]
    assert known.scalars("loss").steps.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError):
        read_events(str(tmp_path))


def test_an_unknown_tag_says_what_was_meant(tmp_path: Path) -> None:
    write(str(tmp_path), range(1))
    with pytest.raises(RunError, match=r"no scalar 'los'; it has loss, rate") as caught:
        read_events(str(tmp_path)).scalars("los")
    assert caught.value.hint == "did you mean 'loss'?"
    with pytest.raises(RunError, match="no histogram 'loss'"):
        read_events(str(tmp_path)).histograms("loss")


@pytest.mark.parametrize("part", ["length", "payload"])
def test_a_flipped_bit_is_found(tmp_path: Path, part: str) -> None:
    write(str(tmp_path), range(2))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    offset = unpack(bytes(data), "f")[2][0]
    data[offset + (0 if part == "length" else 20)] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: the record at byte {offset} .*{part}"):
        read_events(str(tmp_path))


def test_a_huge_length_is_damage_not_a_cut(tmp_path: Path) -> None:
    data = bytearray(pack([b"abc", b"def"]))
    data[19:27] = struct.pack("<Q", 1 << 62)
    with pytest.raises(DataError, match="byte 19 is damaged: the length's checksum"):
        unpack(bytes(data), "f")


def test_a_cut_file_is_found_at_any_length() -> None:
    data = pack([b"abc", b"defg"])
    for length in range(1, len(data)):
        if length == 19:
            continue  # the border between the records: nothing is missing
        with pytest.raises(DataError, match=f"byte {19 * (length > 19)} .* after {length} bytes"):
            unpack(data[:length], "f")


def test_a_record_that_is_no_event_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(pack([b"\xff\xff\xff"]))
    with pytest.raises(DataError, match=r"tfevents\.1\.host: the record at byte 0 is not an event"):
        read_events(str(tmp_path))


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="events cannot be written"):
        EventWriter(str(tmp_path / "file" / "events"))


def test_events_that_could_not_be_written_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    writer = EventWriter(str(folder), roll_s=1e9)
    writer.scalars(0, {"loss": 1})
    folder.rmdir()
    with pytest.raises(RunError):
        writer.flush()
    folder.mkdir()
    writer.close()
    assert read_events(str(folder)).scalars("loss").steps.tolist() == [0]


def test_importing_starts_no_thread_and_no_tensorflow() -> None:
    code = (
        "import sys, threading, penstock.watch.events, penstock.watch.reader\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert not {'tensorflow', 'tensorboard.compat.tensorflow_stub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
