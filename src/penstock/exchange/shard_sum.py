"""Sums a flat tensor over all shards along the fixed tree, bucket by bucket, between workers.

A worker fills one row per shard it carries and adds its own rows up to the largest subtrees it
holds (see `tree`). The subtrees' sums are then combined with those of the other workers, along the
rest of the tree: the same numbers in the same order, whoever holds them, so the sum has the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.exchange import tree
from penstock.exchange.flat import ALIGNMENT_BYTES
from penstock.exchange.group import Group, Work
from penstock.exchange.reduction import Total


class ShardSum:
    """The sum over shards of a flat tensor (length,).

    For each own shard in order: fill `row(i)`, then `added(i)`; the last own shard's row is sent
    bucket by bucket with `send(b)`, in the same order on all workers; `finish(b)` waits for one,
    whose sum then stands in the first of `rows`, until that is filled anew.

    Arguments:
        own: the shards of this worker, out of `shards`, as `tree.assign` gives them.
        dtype, device: of the flat tensor.
        buckets: borders (start, stop) that cover [0, length) in order.
    """

    def __init__(
        self,
        group: Group,
        own: range,
        shards: int,
        dtype: torch.dtype,
        device: torch.device,
        buckets: Sequence[tuple[int, int]],
    ) -> None:
        self._group, self._own = group, own
        self._buckets, self._length = tuple(buckets), buckets[-1][1]
        covers = [tree.cover(of, shards) for of in tree.assign(shards, group.world_size)]
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
        line = max(1, ALIGNMENT_BYTES // dtype.itemsize)
        stride = -(-self._length // line) * line  # rows are aligned alike
        num_bytes = rows * stride * dtype.itemsize
        if device.type == "cpu" and group.world_size > 1:
            memory = group.allocate(num_bytes)
        else:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._matrix = memory.view(dtype).view(rows, stride)[:, : self._length]
        self.rows: list[torch.Tensor] = list(self._matrix)
        """The flat tensors that `row` hands out, each (length,)."""
        self._parts = [self.rows[0][start:stop] for start, stop in self._buckets]
        self._reduce = [
            group.repeated_all_reduce(part, total)
            for part, total in zip(self._parts, self._totals, strict=True)
        ]
        self._under_way: dict[int, tuple[Work, torch.Tensor | None]] = {}

    def row_index(self, i: int) -> int:
        """Which of `rows` the i-th own shard fills."""
        return self._row_of[i]

    def row(self, i: int) -> torch.Tensor:
        """What the i-th own shard fills: (length,)."""
        return self.rows[self._row_of[i]]

    def added(self, i: int) -> None:
        """The i-th own shard's row is full. For the last one this waits for `send`."""
        if i + 1 < len(self._own):
            self._merge(i, 0, self._length)

    def send(self, bucket: int, *, sync: bool = False) -> None:
        """The last own shard's row is full within this bucket: starts its exchange.

        Arguments:
            sync: it is waited for at once anyway.
        """
        start, stop = self._buckets[bucket]
        self._merge(len(self._own) - 1, start, stop)
        if self._group.world_size == 1:
            return
        if self._most == 1:
            self._under_way[bucket] = self._reduce[bucket](sync), None
        else:
            given = self._matrix[: self._most, start:stop].contiguous()
            output = given.new_empty(self._group.world_size, *given.shape)
            self._under_way[bucket] = self._group.all_gather(output, given, sync=sync), output

    def finish(self, bucket: int) -> None:
        """Waits until the sum of a bucket that was sent stands in the first row; again: does
        nothing."""
        if bucket not in self._under_way:
            return
        work, output = self._under_way[bucket]
        work.wait()
        if output is not None:
            parts = output.flatten(0, 1)
            self._totals[bucket].combine([parts[at] for at in self._places], self._parts[bucket])
        del self._under_way[bucket]

    def total(self) -> torch.Tensor:
        """Sends all buckets and waits for them; the sum, (length,)."""
        for bucket in range(len(self._buckets)):
            self.send(bucket, sync=bucket + 1 == len(self._buckets))
        for bucket in range(len(self._buckets)):
            self.finish(bucket)
        return self.rows[0]

    def _merge(self, i: int, start: int, stop: int) -> None:
        top = self._row_of[i]
        for lower in range(top - 1, top - 1 - self._additions[i], -1):
            self.rows[lower][start:stop].add_(self.rows[lower + 1][start:stop])
