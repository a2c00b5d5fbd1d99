"""Sums a flat tensor over all shards along the fixed tree, bucket by bucket, between workers.

A worker fills one row per shard it carries and adds its own rows up to the largest subtrees it
holds (see `tree`). The subtrees' sums then go to the other workers, and everyone finishes the tree:

* small buckets are gathered whole and finished by every worker: one exchange, p n bytes received;
* large ones are cut in p parts, each worker finishes one part and the results are gathered: two
  exchanges, about 2 n bytes received (reduce-scatter and all-gather, with a fixed order of sums).

Both add the same numbers in the same order, so the sum has the same bits. A few float64 numbers per
shard (the header) ride on the last bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from penstock.exchange import tree
from penstock.exchange.group import Group, Work

SCATTER_BYTES = 256 * 1024
"""Buckets of at least this size are cut between workers when there are more than two.
[measured: gloo on loopback, 2 cores, 2026-11: a second exchange costs about 0.7 ms]"""


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
        self._group, self._own, self._shards = group, own, shards
        self._buckets = tuple(buckets)
        owners = tree.assign(shards, group.world_size)
        self._covers = [tree.cover(shards_of, shards) for shards_of in owners]
        self._owners = owners
        self._most = max(len(cover) for cover in self._covers)
        self._held, self._additions = tree.merges(own, shards)
        self._row_of, depth = [], 0
        for additions in self._additions:
            self._row_of.append(depth)
            depth += 1 - additions
        slots = max(len(shards_of) for shards_of in owners) * header_size
        self._header_length = -(-slots * 8 // dtype.itemsize)
        rows = max(max(self._row_of) + 1, self._most)
        self._rows = torch.zeros(rows, length + self._header_length, dtype=dtype, device=device)
        tail = self._rows[0, length:].view(torch.uint8)[: slots * 8].view(torch.float64)
        self._length = length
        self._header_slots = tail.view(-1, header_size)
        self.header = self._header_slots[: len(own)]
        """(own shards, header_size) float64: to be filled before the last bucket is sent."""
        self.headers = torch.zeros(shards, header_size, dtype=torch.float64, device=device)
        """(shards, header_size) float64: everyone's headers after `finish`."""
        self._under_way: list[_Bucket] = []
        self._buffers: dict[tuple[str, int, tuple[int, ...]], torch.Tensor] = {}

    @property
    def rows(self) -> list[torch.Tensor]:
        """The flat tensors that `row` hands out, each (length,)."""
        return [row[: self._length] for row in self._rows]

    def row_index(self, i: int) -> int:
        """Which of `rows` the i-th own shard fills."""
        return self._row_of[i]

    def row(self, i: int) -> torch.Tensor:
        """What the i-th own shard fills: (length,)."""
        return self._rows[self._row_of[i], : self._length]

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
        with_header = bucket + 1 == len(self._buckets)
        n_bytes = (stop - start) * self._rows.element_size()
        if self._group.world_size > 2 and n_bytes >= SCATTER_BYTES:
            self._under_way.append(self._scatter(start, stop))
            if with_header:
                self._under_way.append(self._gather(stop, stop, with_header))
        else:
            self._under_way.append(self._gather(start, stop, with_header))

    def finish(self) -> torch.Tensor:
        """Waits for all buckets; returns the sum, (length,), valid until `row(0)` is filled."""
        if self._group.world_size == 1:
            self.headers.copy_(self.header)
        for bucket in self._under_way:
            bucket.work.wait()
            if bucket.scattered:
                self._finish_part(bucket)
            else:
                self._finish_gathered(bucket)
        for bucket in self._under_way:
            if bucket.scattered:
                bucket.work.wait()
                parts = bucket.output.view(-1)
                self._rows[0, bucket.start : bucket.stop] = parts[: bucket.stop - bucket.start]
        self._under_way.clear()
        return self._rows[0, : self._length]

    def _merge(self, i: int, start: int, stop: int) -> None:
        top = self._row_of[i]
        for lower in range(top - 1, top - 1 - self._additions[i], -1):
            self._rows[lower, start:stop].add_(self._rows[lower + 1, start:stop])

    def _gather(self, start: int, stop: int, with_header: bool) -> _Bucket:
        world_size = self._group.world_size
        n, header = stop - start, self._header_length if with_header else 0
        if self._most == 1:
            input = self._rows[0, start : stop + header]
        else:
            input = self._kept("input", start, (self._most * n + header,))
            input[: self._most * n].view(self._most, n).copy_(self._rows[: self._most, start:stop])
            if header:
                input[self._most * n :] = self._rows[0, self._length :]
        output = self._kept("gathered", start, (world_size, len(input)))
        work = self._group.all_gather(output, input)
        return _Bucket(start, stop, work, input, output, False, with_header)

    def _finish_gathered(self, bucket: _Bucket) -> None:
        n = bucket.stop - bucket.start
        if n:
            tree.combine(
                {
                    node: bucket.output[rank, i * n : (i + 1) * n]
                    for rank, cover in enumerate(self._covers)
                    for i, node in enumerate(cover)
                },
                self._shards,
                self._rows[0, bucket.start : bucket.stop],
            )
        if bucket.with_header:
            size = self.headers.shape[1]
            for rank, shards_of in enumerate(self._owners):
                tail = bucket.output[rank, self._most * n :].clone().view(torch.uint8)
                numbers = tail[: self._header_slots.numel() * 8].view(torch.float64)
                self.headers[shards_of.start : shards_of.stop] = numbers.view(-1, size)[
                    : len(shards_of)
                ]

    def _kept(self, use: str, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A buffer for this use and bucket, the same one in every step."""
        key = (use, start, shape)
        if key not in self._buffers:
            self._buffers[key] = self._rows.new_zeros(shape)
        return self._buffers[key]

    def _scatter(self, start: int, stop: int) -> _Bucket:
        world_size, n = self._group.world_size, stop - start
        part = -(-n // world_size)
        input = self._kept("parts", start, (world_size, self._most, part))
        for row in range(len(self._held)):
            padded = torch.nn.functional.pad(
                self._rows[row, start:stop], (0, part * world_size - n)
            )
            input[:, row] = padded.view(world_size, part)
        output = self._kept("scattered", start, (world_size, self._most, part))
        work = self._group.all_to_all(output, input)
        return _Bucket(start, stop, work, input, output, True, False)

    def _finish_part(self, bucket: _Bucket) -> None:
        part = bucket.output.shape[2]
        mine = self._kept("mine", bucket.start, (part,))
        tree.combine(
            {
                node: bucket.output[rank, i]
                for rank, cover in enumerate(self._covers)
                for i, node in enumerate(cover)
            },
            self._shards,
            mine,
        )
        bucket.input = mine
        bucket.output = self._kept("whole", bucket.start, (self._group.world_size, part))
        bucket.work = self._group.all_gather(bucket.output, mine)


@dataclass
class _Bucket:
    start: int
    stop: int
    work: Work
    input: torch.Tensor
    output: torch.Tensor
    scattered: bool
    with_header: bool
