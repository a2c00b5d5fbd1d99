"""A bucket: the gradients that are sent together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from penstock.exchange.flat import Layout
from penstock.exchange.shard_sum import ShardSum


@dataclass(frozen=True)
class Bucket:
    """Some parameters' part of a flat tensor.

    Arguments:
        sum, index: of which sum it is a part, and which.
        parameters: whose gradients.
        totals: by parameter, where its gradient's sum will be.
        gradients: by row of the sum, (elements,): all of them.
        rows: by row: those and, in the last bucket, the header.
    """

    sum: ShardSum
    index: int
    parameters: list[torch.nn.Parameter]
    totals: list[torch.Tensor]
    gradients: list[torch.Tensor]
    rows: list[torch.Tensor]

    def send(self, *, sync: bool = False) -> None:
        """As `ShardSum.send`."""
        self.sum.send(self.index, sync=sync)

    def finish(self) -> None:
        """As `ShardSum.finish`."""
        self.sum.finish(self.index)


def cut(
    parameters: Sequence[torch.nn.Parameter],
    totals: Sequence[torch.Tensor],
    layouts: Sequence[Layout],
    borders: Mapping[str, Sequence[Sequence[int]]],
    sums: Sequence[ShardSum],
) -> list[Bucket]:
    """The buckets of all flat tensors in order, and one of the header alone where it has a sum of
    its own.

    Arguments:
        parameters: their numbers are the names in the layouts.
        totals: by parameter, its view in the sums' first rows.
        borders: by dtype.
    """
    found = []
    for layout, s in zip(layouts, sums, strict=False):
        done = 0
        for index, (start, stop) in enumerate(borders[str(layout.dtype)]):
            last = stop == layout.length
            until = sum(slot.start < stop or last for slot in layout.slots)
            numbers = [int(slot.name) for slot in layout.slots[done:until]]
            of, views = [parameters[n] for n in numbers], [totals[n] for n in numbers]
            gradients = [row[start:stop] for row in s.rows]
            rows = [row[start:] for row in s.rows] if last else gradients
            found.append(Bucket(s, index, of, views, gradients, rows))
            done = until
    for s in sums[len(layouts) :]:
        found.append(Bucket(s, 0, [], [], [row[:0] for row in s.rows], s.rows))
    return found
