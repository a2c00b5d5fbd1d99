"""Evaluation over all workers: each scores its shards' records, then all merge the same states."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.exchange import tree
from penstock.exchange.group import Group
from penstock.runtime.batches import Feed
from penstock.runtime.evaluation import Classification, Evaluation, Regression
from penstock.runtime.shards import preserved, seed
from penstock.runtime.supply import Supply

LOSS, EXAMPLES, HEAD = range(3)


def score(
    group: Group,
    network: torch.nn.Module,
    forward: Callable[[Any], torch.Tensor],
    feed: Feed,
    shards: int,
    *,
    loss: Callable[[Any, Any], torch.Tensor] | None,
    task: str | None,
    top_k: tuple[int, ...],
    batch_size: int,
) -> Evaluation:
    """The evaluation of a network on a source, the same on any number of workers. Collective.

    Arguments:
        network: is put in eval mode meanwhile.
        forward: called with a batch's features; gives the output.
        loss: also the mean of this over all records; None for none.
        batch_size: records in one forward.

    Raises:
        DataError: there are no records.
    """
    rows: list[tuple[NDArray[Any] | None, float, int]] = []
    mode = network.training
    network.eval()
    with preserved(), torch.no_grad():
        for i in range(len(feed.own)):
            seed(feed.seed, 2, feed.own[i])  # a source or a network may draw random numbers
            found: Classification | Regression | None = None
            total, examples = 0.0, 0
            with closing(Supply(feed, partial(feed.in_order, i, batch_size))) as supply:
                for batch in supply.batches():
                    output = forward(batch.x)
                    if task is not None:
                        found = found or accumulator(task, output, top_k)
                        found.update(output, batch.y)
                    examples += batch.size
                    if loss is not None:
                        total += loss(output, batch.y).item() * batch.size
            state = None if found is None else found.state()
            rows.append((state, total, examples))
    network.train(mode)
    everyone = _gather(group, rows, shards)
    there = [row for row in everyone if row[EXAMPLES]]
    if not there:
        raise DataError(f"{feed.name}: there are no records to evaluate on")
    examples = int(sum(row[EXAMPLES].item() for row in there))
    mean = sum(row[LOSS].item() for row in there) / examples if loss is not None else None
    if task is None:
        return Evaluation("loss", examples, {}, {}, loss=mean)
    states = [row[HEAD:].numpy() for row in there]
    if task == "classification":
        return Classification.merge([s.astype("int64") for s in states]).result(loss=mean)
    return Regression.merge(states).result(loss=mean)


def accumulator(
    task: str, output: torch.Tensor, top_k: tuple[int, ...]
) -> Classification | Regression:
    """What counts outputs of this shape."""
    if task == "classification":
        return Classification(max(output.shape[1] if output.dim() > 1 else 1, 2), top_k)
    return Regression(output[0].numel())


def _gather(
    group: Group, rows: list[tuple[NDArray[Any] | None, float, int]], shards: int
) -> list[torch.Tensor]:
    """Every shard's row (LOSS, EXAMPLES, state...) in float64, in the order of shards."""
    mine = max((len(state) for state, _, _ in rows if state is not None), default=0)
    widths = torch.empty(group.world_size, 1, dtype=torch.int64)
    group.all_gather(widths, torch.tensor([mine])).wait()
    width = int(widths.max())
    owners = tree.assign(shards, group.world_size)
    most = max(len(own) for own in owners)
    block = torch.full((most, HEAD + width), math.nan, dtype=torch.float64)
    for i, (state, total, examples) in enumerate(rows):
        block[i, :HEAD] = torch.tensor([total, examples], dtype=torch.float64)
        if state is not None:
            block[i, HEAD:] = torch.from_numpy(state).double()
    blocks = torch.empty(group.world_size, *block.shape, dtype=torch.float64)
    group.all_gather(blocks, block).wait()
    return [blocks[rank, i] for rank, own in enumerate(owners) for i in range(len(own))]
