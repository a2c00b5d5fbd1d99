"""Reads a run's events from its folder, live, wherever it lies.

Segments never change, so reading again only reads what is new: `read_events(url, known=events)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import fsspec
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from penstock.errors import DataError, RunError, did_you_mean
from penstock.watch.segments import list_segments, unpack


@dataclass(frozen=True)
class Scalars:
    """One tag's values, in the order they were written.

    Attributes:
        steps: optimizer steps, int64 (values,).
        values: float64 (values,), to float32's precision.
        wall_times: seconds since 1970, float64 (values,).
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    wall_times: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Histogram:
    """How a tensor's finite values were distributed at one step.

    Attributes:
        num, min, max, sum, sum_squares: of the values.
        bucket_limits: upper limits, float64 (buckets,); the lower one is the limit before it.
        buckets: number of values in each, float64 (buckets,).
    """

    step: int
    wall_time: float
    num: float
    min: float
    max: float
    sum: float
    sum_squares: float
    bucket_limits: NDArray[np.float64]
    buckets: NDArray[np.float64]


@dataclass(frozen=True)
class Text:
    """A text written at one step."""

    step: int
    wall_time: float
    text: str


@dataclass
class _Segment:
    """What one segment holds, each kind by tag; superseding inside it is already done."""

    first_redone: int | None = None
    scalars: dict[str, Scalars] = field(default_factory=dict)
    histograms: dict[str, list[Histogram]] = field(default_factory=dict)
    texts: dict[str, list[Text]] = field(default_factory=dict)


_Item = TypeVar("_Item", Histogram, Text)


class Events:
    """The events of one run, without those that a resumed run superseded.

    Attributes:
        tags: from tag to what was written under it: "scalar", "histogram" or "text".
    """

    def __init__(self, url: str, segments: dict[tuple[str, int], _Segment]) -> None:
        self.url = url
        self._segments = segments
        self.tags: dict[str, str] = {}
        for segment, limit in self._newest_first():
            for tag, series in segment.scalars.items():
                if limit is None or (series.steps < limit).any():
                    self.tags[tag] = "scalar"
            for kind, items in (("histogram", segment.histograms), ("text", segment.texts)):
                for tag, written in items.items():
                    if any(limit is None or item.step < limit for item in written):
                        self.tags[tag] = kind
        self.tags = dict(sorted(self.tags.items()))

    def scalars(self, tag: str) -> Scalars:
        """The values of a tag.

        Raises:
            RunError: there is no such scalar (yet).
        """
        parts = []
        for segment, limit in self._newest_first():
            series = segment.scalars.get(tag)
            if series is not None and limit is not None:
                kept = series.steps < limit
                series = Scalars(series.steps[kept], series.values[kept], series.wall_times[kept])
            if series:
                parts.append(series)
        if not parts:
            raise self._unknown(tag, "scalar")
        parts.reverse()
        return Scalars(
            np.concatenate([part.steps for part in parts]),
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.wall_times for part in parts]),
        )

    def histograms(self, tag: str) -> list[Histogram]:
        """The histograms of a tag, in the order they were written.

        Raises:
            RunError: there is no such histogram (yet).
        """
        return self._items(tag, "histogram", lambda segment: segment.histograms)

    def texts(self, tag: str) -> list[Text]:
        """The texts of a tag, in the order they were written.

        Raises:
            RunError: there is no such text (yet).
        """
        return self._items(tag, "text", lambda segment: segment.texts)

    def _items(
        self, tag: str, kind: str, by_tag: Callable[[_Segment], dict[str, list[_Item]]]
    ) -> list[_Item]:
        parts = [
            [item for item in by_tag(segment).get(tag, ()) if limit is None or item.step < limit]
            for segment, limit in self._newest_first()
        ]
        items = [item for part in reversed(parts) for item in part]
        if not items:
            raise self._unknown(tag, kind)
        return items

    def _newest_first(self) -> Iterator[tuple[_Segment, int | None]]:
        """Each segment, and the step from which later segments supersede it."""
        limit: int | None = None
        for segment in reversed(self._segments.values()):
            yield segment, limit
            if segment.first_redone is not None:
                limit = segment.first_redone if limit is None else min(limit, segment.first_redone)

    def _unknown(self, tag: str, kind: str) -> RunError:
        known = [name for name, its_kind in self.tags.items() if its_kind == kind]
        listed = f"it has {', '.join(known)}" if known else "it has none yet"
        return RunError(
            f"{self.url}: no {kind} {tag!r}; {listed}",
            hint=did_you_mean(tag, known) or "tags appear when they are first written",
        )


def read_events(url: str, known: Events | None = None) -> Events:
    """The events in a folder; none where it is empty or does not exist yet.

    Arguments:
        url: the folder, on any fsspec filesystem.
        known: what an earlier call returned: its segments are not read again.

    Raises:
        DataError: a segment is cut off or damaged: names the file and the byte.
        RunError: the folder cannot be read.
    """
    before = known._segments if known is not None else {}
    segments: dict[tuple[str, int], _Segment] = {}
    try:
        filesystem, folder = fsspec.core.url_to_fs(url)
        for path, size in list_segments(filesystem, folder.rstrip("/")):
            segment = before.get((path, size))
            if segment is None:
                name = filesystem.unstrip_protocol(path) if "://" in url else path
                segment = _parse(filesystem.cat_file(path), name)
            segments[path, size] = segment
    except OSError as error:
        raise RunError(f"{url}: events cannot be read: {error}") from error
    return Events(url, segments)


def _before(step: int, by_tag: dict[str, list[_Item]]) -> dict[str, list[_Item]]:
    return {tag: [item for item in items if item.step < step] for tag, items in by_tag.items()}


def _parse(data: bytes, name: str) -> _Segment:
    segment = _Segment()
    rows: dict[str, list[tuple[int, float, float]]] = {}
    for offset, payload in unpack(data, name):
        try:
            event = Event.FromString(payload)
        except DecodeError as error:
            raise DataError(
                f"{name}: the record at byte {offset:,} is not an event: {error}",
                hint="was this file written by something else than an event writer?",
            ) from error
        step, wall_time = event.step, event.wall_time
        if event.session_log.status == SessionLog.START:
            rows = {tag: [row for row in kept if row[0] < step] for tag, kept in rows.items()}
            segment.histograms = _before(step, segment.histograms)
            segment.texts = _before(step, segment.texts)
            past = segment.first_redone
            segment.first_redone = step if past is None else min(past, step)
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                rows.setdefault(value.tag, []).append((step, value.simple_value, wall_time))
            elif kind == "histo":
                histo = value.histo
                segment.histograms.setdefault(value.tag, []).append(
                    Histogram(
                        step,
                        wall_time,
                        histo.num,
                        histo.min,
                        histo.max,
                        histo.sum,
                        histo.sum_squares,
                        np.array(histo.bucket_limit, np.float64),
                        np.array(histo.bucket, np.float64),
                    )
                )
            elif kind == "tensor" and value.tensor.string_val:
                text = value.tensor.string_val[0].decode(errors="replace")
                segment.texts.setdefault(value.tag, []).append(Text(step, wall_time, text))
    for tag, kept in rows.items():
        if kept:
            steps, values, wall_times = zip(*kept)
            segment.scalars[tag] = Scalars(
                np.array(steps, np.int64),
                np.array(values, np.float64),
                np.array(wall_times, np.float64),
            )
    return segment
