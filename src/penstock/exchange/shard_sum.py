"""Sums a flat tensor over all shards along the fixed tree, bucket by bucket, between workers.

A worker fills one row per shard it carries and adds its own rows up to the largest subtrees it
holds (see `tree`). The subtrees' sums are then combined with those of the other workers, along the
rest of the tree: the same numbers in the same order, whoever holds them, so the sum has the same
bits. A few float64 numbers per shard (the header) follow the last bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.exchange import tree
from penstock.exchange.group import Group, Work
from penstock.exchange.reduction import Total


class ShardSum:
    """The sum over shards of a flat tensor (length,).

    For each own shard in order: fill `row(i)`, then `added(i)`; the last own shard's row is sent
    bucket by bucket with `send(b)` in order of b; `finish()` waits and returns the sum.

    Arguments:
        own: the shards of this worker, out of `shards`, as `tree.assign` gives them.
        length, dtype, device: of the flat tensor.
        buckets: borders (start, stop) that cover [0, length) in order.
        header_size: float64 numbers that each shard adds to `header`.
    """

    def __init__(
        self,
        group: Group,
        own: range,
        shards: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        buckets: Sequence[tuple[int, int]],
        header_size: int,
    ) -> None:
        self._group, self._own = group, own
        self._buckets, self._length = tuple(buckets), length
        self._owners = tree.assign(shards, group.world_size)
        covers = [tree.cover(shards_of, shards) for shards_of in self._owners]
        self._most = max(len(cover) for cover in covers)
        nodes, number = [node for cover in covers for node in cover], len(self._buckets)
        # Each bucket is named in errors and in traces.
        self._totals = [
            Total(nodes, shards, f"bucket {b + 1} of {number}, sum over shards")
            for b in range(number)
        ]
        self._places = [
            rank * self._most + i for rank, cover in enumerate(covers) for i in range(len(cover))
        ]
        _, self._additions = tree.merges(own, shards)
        self._row_of, depth = [], 0
        for additions in self._additions:
            self._row_of.append(depth)
            depth += 1 - additions
        rows = max(max(self._row_of) + 1, self._most)
        num_bytes = rows * length * dtype.itemsize
        if device.type == "cpu" and group.world_size > 1:
            memory = group.allocate(num_bytes)
        else:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._rows = memory.view(dtype).view(rows, length)
        slots = max(len(shards_of) for shards_of in self._owners)
        self._header = torch.zeros(slots, header_size, dtype=torch.float64, device=device)
        self._headers = self._header.new_zeros(group.world_size, slots, header_size)
        self.header = self._header[: len(own)]
        """(own shards, header_size) float64: to be filled before the last bucket is sent."""
        self.headers = self._header.new_zeros(shards, header_size)
        """(shards, header_size) float64: everyone's headers after `finish`."""
        self._under_way: list[Work] = []
        self._gathered: list[tuple[int, Work, torch.Tensor]] = []

    @property
    def rows(self) -> list[torch.Tensor]:
        """The flat tensors that `row` hands out, each (length,)."""
        return list(self._rows)

    def row_index(self, i: int) -> int:
        """Which of `rows` the i-th own shard fills."""
        return self._row_of[i]

    def row(self, i: int) -> torch.Tensor:
        """What the i-th own shard fills: (length,)."""
        return self._rows[self._row_of[i]]

    def added(self, i: int) -> None:
        """The i-th own shard's row is full. For the last one this waits for `send`."""
        if i + 1 < len(self._own):
            self._merge(i, 0, self._length)

    def send(self, bucket: int) -> None:
        """The last own shard's row is full within this bucket: starts its exchange."""
        start, stop = self._buckets[bucket]
        self._merge(len(self._own) - 1, start, stop)
        if self._group.world_size == 1:
            return
        last = bucket + 1 == len(self._buckets)  # and so waited for at once
        if self._most == 1:
            part = self._rows[0, start:stop]
            self._under_way.append(self._group.all_reduce(part, self._totals[bucket], sync=last))
        else:
            given = self._rows[: self._most, start:stop].contiguous()
            output = given.new_empty(self._group.world_size, *given.shape)
            work = self._group.all_gather(output, given, sync=last)
            self._gathered.append((bucket, work, output))
        if last:
            headers = self._group.all_gather(self._headers, self._header, sync=True)
            self._under_way.append(headers)

    def finish(self) -> torch.Tensor:
        """Waits for all buckets; returns the sum, (length,), valid until `row(0)` is filled."""
        if self._group.world_size == 1:
            self.headers.copy_(self.header)
            return self._rows[0]
        for bucket, work, output in self._gathered:
            work.wait()
            parts, (start, stop) = output.flatten(0, 1), self._buckets[bucket]
            here = self._rows[0, start:stop]
            self._totals[bucket].combine([parts[at] for at in self._places], here)
        for work in self._under_way:
            work.wait()
        self._gathered.clear()
        self._under_way.clear()
        for rank, shards_of in enumerate(self._owners):
            own = self._headers[rank, : len(shards_of)]
            self.headers[shards_of.start : shards_of.stop] = own
        return self._rows[0]

    def _merge(self, i: int, start: int, stop: int) -> None:
        top = self._row_of[i]
        for lower in range(top - 1, top - 1 - self._additions[i], -1):
            self._rows[lower, start:stop].add_(self._rows[lower + 1, start:stop])
