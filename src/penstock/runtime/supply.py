"""Batches for training, in the order in which it takes them: read ahead of it where that pays.

    read ──► the source's stages ──► stage to device ──► training

Rows of spools, stages and other devices are worth threads of their own: a `Pipeline` then reads and
prepares the next batches while training computes. Rows of arrays in memory are not: they are
gathered when training takes them, which costs less than handing them over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from penstock.errors import Fault
from penstock.feed import Rows, Stage
from penstock.feed.source import Tensors
from penstock.runtime.actor import Shares
from penstock.runtime.batches import Batch, Feed, Over, Request
from penstock.runtime.pipeline import COMPUTE, READ, Pipeline, PipelineStage

LONGEST_S = 2 * 3600.0
"""Of one item in a pipeline. Where rows are long in coming, who waits for them says so before."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delivery:
    """What the i-th own shard gets.

    Arguments:
        take: gives the batch; None where the shard has nothing (more) in this step. To be called
            while the process has the shard's random state, from which a source may draw.
        ends_shard: whether it is the shard's last of the step.
        ends_step: whether it is the last of all own shards.
    """

    i: int
    take: Callable[[], Batch | None]
    ends_shard: bool
    ends_step: bool


class Supply:
    """The batches of a feed.

    Arguments:
        requests: what is to be read, in order; called with what tells whether this is closed.
    """

    def __init__(self, feed: Feed, requests: Callable[[Over], Iterator[Request]]) -> None:
        self._feed, self._closed = feed, False
        self.more = True
        """Whether an own shard has rows for another step, as the last step told."""
        stages = [*_staged(feed), *_copied(feed)]
        self._flow: _Flow
        if feed.overlaps:
            items = (self._read(request) for request in requests(self._over))
            self._flow = Pipeline(items, stages, name=feed.name, timeout_s=LONGEST_S)
            self._made: Callable[[_Item], _Item] = lambda item: item
        else:
            self._flow = inline = _Inline(requests(self._over), self._read, stages)
            self._made = inline.make

    def step(self) -> Iterator[Delivery]:
        """What the own shards get in the next step, shard after shard; each gets something."""
        if not self.more:
            num = len(self._feed.own)
            yield from (Delivery(i, lambda: None, True, i == num - 1) for i in range(num))
            return
        ends = False
        while not ends:
            item = next(self._flow)
            request, ends = item.request, item.request.ends_step
            self.more = request.more
            yield Delivery(request.i, partial(self._batch, item), request.ends_shard, ends)

    def batches(self) -> Iterator[Batch]:
        """All batches, whatever the steps."""
        while (item := next(self._flow, None)) is not None:
            if (batch := self._batch(item)) is not None:
                yield batch

    def shares(self) -> dict[str, Shares]:
        """How each stage, and training, has spent its time since this was asked last."""
        return self._flow.shares()

    def close(self) -> None:
        """Ends what reads ahead. A stage that hangs does not undo how training has ended."""
        self._closed = True
        try:
            self._flow.close()
        except Fault as stuck:
            logger.warning("%s", stuck)

    def _over(self) -> bool:
        return self._closed

    def _read(self, request: Request) -> _Item:
        return _Item(request, self._feed.read(request, self._over))

    def _batch(self, item: _Item) -> Batch | None:
        item = self._made(item)
        if item.rows is None or not len(item.rows.ids):
            return None
        if item.copied is not None:
            current = torch.cuda.current_stream(self._feed.device)
            current.wait_event(item.copied)
            for tensor in _leaves(item.rows.x, item.rows.y):
                tensor.record_stream(current)
        return self._feed.batch(item.request, item.rows)


class Bounds:
    """Which stage was busiest over the time that was told."""

    def __init__(self) -> None:
        self._busy_s: dict[str, float] = {}
        self._all_s = 0.0

    def add(self, shares: Mapping[str, Shares], seconds: float) -> None:
        """How the last so many seconds were spent."""
        self._all_s += seconds
        for stage, each in shares.items():
            self._busy_s[stage] = self._busy_s.get(stage, 0.0) + each.busy * seconds

    @property
    def worst(self) -> tuple[str, float] | None:
        """The stage and its busy share; None before any was told."""
        if not self._all_s:
            return None
        stage = max(self._busy_s, key=lambda name: self._busy_s[name])
        return stage, round(self._busy_s[stage] / self._all_s, 3)


@dataclass
class _Item:
    """What flows: a request, the rows that are made of it, and the event of their copy."""

    request: Request
    rows: Rows | None = None
    copied: torch.cuda.Event | None = None


class _Flow(Protocol):
    def __iter__(self) -> Iterator[_Item]: ...

    def __next__(self) -> _Item: ...

    def close(self) -> None: ...

    def shares(self) -> dict[str, Shares]: ...


class _Inline:
    """What comes next is known at once, and made when it is taken."""

    def __init__(
        self,
        requests: Iterator[Request],
        read: Callable[[Request], _Item],
        stages: list[PipelineStage],
    ) -> None:
        self._requests, self._read, self._stages = requests, read, stages
        self._since, self._read_s = time.perf_counter(), 0.0

    def __iter__(self) -> Iterator[_Item]:
        return self

    def __next__(self) -> _Item:
        return _Item(next(self._requests))

    def make(self, item: _Item) -> _Item:
        began = time.perf_counter()
        item = self._read(item.request)
        for stage in self._stages:
            item = stage.function(item)
        self._read_s += time.perf_counter() - began
        return item

    def close(self) -> None:
        pass

    def shares(self) -> dict[str, Shares]:
        now = time.perf_counter()
        read = self._read_s / max(now - self._since, 1e-9)
        self._since, self._read_s = now, 0.0
        return {READ: Shares(read, 0.0, 1 - read), COMPUTE: Shares(1 - read, read, 0.0)}


def _staged(feed: Feed) -> list[PipelineStage]:
    """The source's own stages."""

    def made(number: int, stage: Stage) -> PipelineStage:
        def apply(item: _Item) -> _Item:
            if item.rows is not None and len(item.rows.ids):
                item.rows = stage.apply(item.rows, feed.random(item.request, number))
            return item

        again = sum(other.name == stage.name for other in feed.stages[:number])
        name = f"{stage.name} {again + 1}" if again else stage.name
        return PipelineStage(name, apply, stage.workers)

    return [made(number, stage) for number, stage in enumerate(feed.stages)]


def _copied(feed: Feed) -> list[PipelineStage]:
    """To another device: from pinned memory, in a stream of its own."""
    if feed.device.type != "cuda":
        return []
    stream = torch.cuda.Stream(feed.device)  # type: ignore[no-untyped-call]

    def copy(item: _Item) -> _Item:
        if item.rows is not None:
            with torch.cuda.stream(stream):
                x, y = (_on_device(half, feed.device) for half in (item.rows.x, item.rows.y))
                item.rows = Rows(x, y, item.rows.ids)
                item.copied = stream.record_event()
        return item

    return [PipelineStage("stage to device", copy)]


def _on_device(tensors: Tensors, device: torch.device) -> Any:
    """The same structure on another device; torch keeps and reuses the pinned memory."""
    if isinstance(tensors, torch.Tensor):
        return tensors.pin_memory().to(device, non_blocking=True)
    if isinstance(tensors, dict):
        return {key: _on_device(t, device) for key, t in tensors.items()}
    return tuple(_on_device(t, device) for t in tensors)


def _leaves(*halves: Tensors) -> Iterator[torch.Tensor]:
    for half in halves:
        if isinstance(half, torch.Tensor):
            yield half
        else:
            yield from half.values() if isinstance(half, dict) else half
