"""Writes scalars, histograms and texts as TensorBoard event files, on any filesystem.

What is written stays in memory and becomes one whole new segment every few seconds, inside the
caller's own calls: there is no thread. Serialising and checksums are put off until then too,
where they are cheap because there are many.

A run that goes on from a checkpoint supersedes the events written after it. Its first segment
opens with a session log `START` at the first step that is done again; TensorBoard and
`penstock.watch.reader` then drop what came before it with that step or a later one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

from penstock.errors import RunError
from penstock.watch.segments import list_segments, next_segment, pack, write_segment

FILE_VERSION = "brain.Event:2"

_Scalars = tuple[float, int, tuple[str, ...], tuple[float, ...]]  # wall time, step, tags, values


class EventWriter:
    """Writes the events of one run to one folder, of which it is the only writer at a time.

    Arguments:
        url: the folder, on any fsspec filesystem; made if it is missing.
        roll_s: how long events wait in memory, in seconds, before a call writes them. A call that
            writes lasts as long as the filesystem takes.
        resumed_at: the step of the checkpoint that this run goes on from, the last step whose
            events hold; None for a run that starts afresh.

    Raises:
        RunError: the folder cannot be made or written. Events that could not be written are kept,
            and the next call that writes tries again.
    """

    def __init__(self, url: str, *, roll_s: float = 2.0, resumed_at: int | None = None) -> None:
        self.url = url
        self._roll_s = roll_s
        self._pending: list[Event | _Scalars] = []
        self._closed = False
        try:
            self._filesystem, self._folder = fsspec.core.url_to_fs(url)
            self._folder = self._folder.rstrip("/")
            self._filesystem.makedirs(self._folder, exist_ok=True)
            segments = list_segments(self._filesystem, self._folder)
        except OSError as error:
            raise self._unwritable(error) from error
        self._last = segments[-1][0] if segments else None
        if resumed_at is not None:
            start = SessionLog(status=SessionLog.START)
            self._pending.append(
                Event(wall_time=time.time(), step=resumed_at + 1, session_log=start)
            )
        self._rolled_at = time.monotonic()

    def scalars(
        self, step: int, values: Mapping[str, float], wall_time: float | None = None
    ) -> None:
        """Writes a value for each tag at one step.

        Arguments:
            step: the optimizer step.
            values: from tag to a number (kept as float32: the format's), which may be NaN.
            wall_time: seconds since 1970; now by default.
        """
        numbers = tuple(map(float, values.values()))
        self.row(int(step), tuple(values), numbers, wall_time)

    def row(
        self,
        step: int,
        tags: tuple[str, ...],
        values: tuple[float, ...],
        wall_time: float | None = None,
    ) -> None:
        """As `scalars`, for who writes the same tags at every step."""
        self._append((time.time() if wall_time is None else wall_time, step, tags, values))

    def histogram(self, step: int, tag: str, values: torch.Tensor | NDArray[Any]) -> None:
        """Writes how values (any shape) are distributed, in TensorFlow's buckets, 10% wide.

        Values that are not finite fit no bucket: they are left out, and where there are any,
        their number is the scalar `{tag}/non_finite`.
        """
        if isinstance(values, torch.Tensor):
            values = values.detach().to("cpu", torch.float64).numpy()
        histogram, num_left_out = _histogram(np.asarray(values, np.float64).reshape(-1))
        summary = Summary(value=[Summary.Value(tag=tag, histo=histogram)])
        if num_left_out:
            summary.value.add(tag=f"{tag}/non_finite", simple_value=num_left_out)
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def text(self, step: int, tag: str, text: str) -> None:
        """Writes a text (Markdown, where TensorBoard shows it)."""
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        tensor = TensorProto(
            dtype=DT_STRING,
            string_val=[text.encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        value = Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def flush(self) -> None:
        """Writes what is in memory as a segment; without events, nothing."""
        self._rolled_at = time.monotonic()
        if not self._pending:
            return
        first = self._pending[0]
        wall_time = first.wall_time if isinstance(first, Event) else first[0]
        version = Event(wall_time=wall_time, file_version=FILE_VERSION)
        data = pack(_serialise([version, *self._pending]))
        name = next_segment(self._last, wall_time)
        try:
            write_segment(self._filesystem, self._folder, name, data)
        except OSError as error:
            raise self._unwritable(error) from error
        self._last = name
        self._pending.clear()

    def close(self) -> None:
        """Writes what is in memory. Writing after it is an error; closing again is not."""
        if not self._closed:
            self.flush()
            self._closed = True

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, event: Event | _Scalars) -> None:
        if self._closed:
            raise ValueError(f"the event writer of {self.url} is closed")
        self._pending.append(event)
        if time.monotonic() - self._rolled_at >= self._roll_s:
            self.flush()

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"{self.url}: events cannot be written: {error}",
            hint="check that the folder exists or can be made, may be written, and is not full",
        )


def _serialise(events: Sequence[Event | _Scalars]) -> list[bytes]:
    """Events as bytes. Scalars of the same tags share one message, filled in anew for each."""
    shared: dict[tuple[str, ...], Event] = {}
    payloads = []
    for event in events:
        if not isinstance(event, Event):
            wall_time, step, tags, values = event
            if tags not in shared:
                shared[tags] = Event(summary=Summary(value=[Summary.Value(tag=t) for t in tags]))
            event = shared[tags]
            event.wall_time, event.step = wall_time, step
            for slot, value in zip(event.summary.value, values):
                slot.simple_value = value
        payloads.append(event.SerializeToString())
    return payloads


@functools.cache
def _bucket_limits() -> NDArray[np.float64]:
    """Upper limits of TensorFlow's buckets (histogram.cc, InitDefaultBuckets), ascending."""
    positive = []
    limit = 1e-12
    while limit < 1e20:
        positive.append(limit)
        limit *= 1.1
    upper = np.array([*positive, np.finfo(np.float64).max])
    return np.concatenate([-upper[::-1], [0.0], upper])


def _histogram(values: NDArray[np.float64]) -> tuple[HistogramProto, int]:
    """The histogram of the finite ones among values (values,), and how many are not finite.

    As TensorFlow does (histogram.cc, Histogram::EncodeToProto), buckets without values are left
    out, save for the one before each that has some: its limit is that one's lower limit.
    """
    finite = values[np.isfinite(values)]
    num_left_out = values.size - finite.size
    if not finite.size:
        return HistogramProto(), num_left_out
    limits = _bucket_limits()
    chosen = np.searchsorted(limits[:-1], finite, side="right")
    counts = np.bincount(chosen, minlength=limits.size)
    kept = (counts > 0) | np.append(counts[1:] > 0, False)
    histogram = HistogramProto(
        min=finite.min(),
        max=finite.max(),
        num=finite.size,
        sum=finite.sum(),
        sum_squares=finite @ finite,
        bucket_limit=limits[kept],
        bucket=counts[kept],
    )
    return histogram, num_left_out
