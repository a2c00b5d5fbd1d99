"""Sums over shards have the same bits on any number of workers."""

from __future__ import annotations

import threading

import pytest
import torch

from penstock.exchange import tree
from penstock.exchange.communicator import Communicator
from penstock.exchange.loopback import loopback
from penstock.exchange.shard_sum import ShardSum


@pytest.mark.parametrize("shards", range(1, 18))
def test_tree_has_every_shard_once_and_is_deep_as_a_binary_tree(shards: int) -> None:
    assert len(tree.nodes(shards)) == 2 * shards - 1
    for workers in range(1, shards + 1):
        owners = tree.assign(shards, workers)
        assert [s for own in owners for s in own] == list(range(shards))
        for own in owners:
            cover = tree.cover(own, shards)
            assert [s for low, high in cover for s in range(low, high)] == list(own)
            assert set(cover) <= tree.nodes(shards)


def test_tree_order_is_fixed() -> None:
    values = [torch.tensor([v], dtype=torch.float32) for v in (1e8, 1.0, -1e8, 1.0)]
    assert tree.tree_sum(values).item() == 0.0  # (1e8 + 1) + (-1e8 + 1) in float32
    assert sum(v.item() for v in values) == 2.0


def summed(
    values: torch.Tensor, workers: int, buckets: list[tuple[int, int]]
) -> list[torch.Tensor]:
    shards, order = len(values), list(range(len(buckets)))[::-1]
    results: list[torch.Tensor] = [None] * workers  # type: ignore[list-item]

    def work(group: Communicator) -> None:
        own = tree.assign(shards, workers)[group.rank]
        sums = ShardSum(group, own, shards, values.dtype, torch.device("cpu"), buckets)
        for _ in range(2):  # a second round must not see anything of the first
            for i, shard in enumerate(own):
                sums.row(i).copy_(values[shard])
                sums.added(i)
            for b in order:
                sums.send(b)
            for b in range(len(buckets)):
                sums.finish(b)
            total = sums.rows[0]
        results[group.rank] = total.clone()

    ends = [Communicator(end, timeout_s=30.0) for end in loopback(workers)]
    threads = [threading.Thread(target=work, args=(t,)) for t in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [32, 96 * 1024])
@pytest.mark.parametrize("shards", [1, 3, 4, 5, 8])
def test_same_bits_on_any_number_of_workers(shards: int, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(shards, length).mul_(10 ** torch.randn(shards, 1)).to(dtype)
    expected = tree.tree_sum(list(values))
    buckets = [(0, 32)] if length == 32 else [(0, 16), (16, 70_000), (70_000, length)]
    for workers in range(1, shards + 1):
        for total in summed(values, workers, buckets):
            assert torch.equal(total, expected)
    if shards >= 3 and dtype != torch.float64:  # another order of sums has other bits
        assert not torch.equal(values.flip(0).cumsum(0)[-1], expected)
