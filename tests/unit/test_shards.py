"""Random state and buffers belong to shards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penstock.exchange import tree
from penstock.exchange.group import Group
from penstock.runtime.shards import RandomState, ShardBuffers, merged_buffers, preserved, seed
from penstock.testing import assert_same_bits
from penstock.testing.group import in_threads


@pytest.fixture(autouse=True)
def _generators_as_before() -> Any:
    with preserved():
        yield


def draw() -> list[float]:
    """Numbers of all three generators, of every kind that they keep something for."""
    return [
        *torch.rand(3).tolist(),
        torch.randn(()).item(),
        *np.random.random(3).tolist(),
        float(np.random.normal()),  # one of a pair: numpy keeps the other
        random.random(),
        random.gauss(0, 1),  # so does Python
    ]


def through_tensors(state: RandomState) -> RandomState:
    return RandomState.from_tensors({k: t.clone() for k, t in state.to_tensors().items()})


@pytest.mark.parametrize("way", [lambda state: state, through_tensors], ids=["as is", "tensors"])
@pytest.mark.parametrize("draws_before", [0, 1, 2, 63, 400])
def test_restored_generators_go_on_alike(
    way: Callable[[RandomState], RandomState], draws_before: int
) -> None:
    """With one half of a pair of gaussians kept, and without; at any place of the key."""
    seed(1, 2)
    for _ in range(draws_before):
        draw()
    state = RandomState.capture()
    kept = state.numpy["has_gauss"], state.python[2] is not None
    assert kept == (draws_before % 2, bool(draws_before % 2))
    expected = [draw() for _ in range(5)]
    assert [draw() for _ in range(5)] != expected
    way(state).restore()
    assert [draw() for _ in range(5)] == expected


def test_a_capture_stays_what_it_was() -> None:
    seed(1)
    state = RandomState.capture()
    expected = draw()
    for _ in range(2):
        state.restore()
        assert draw() == expected


def test_tensors_hold_every_bit() -> None:
    seed(5)
    np.random.normal()
    random.gauss(0, 1)
    state = RandomState.capture()
    again = through_tensors(state)
    assert again.python == state.python
    assert again.numpy["gauss"] == state.numpy["gauss"] != 0
    assert again.numpy["state"]["pos"] == state.numpy["state"]["pos"]
    assert (again.numpy["state"]["key"] == state.numpy["state"]["key"]).all()
    assert_same_bits(again.to_tensors(), state.to_tensors())


def test_seeded_leaves_the_generators_alone() -> None:
    seed(7)
    expected = [draw(), draw()]
    seed(7)
    first = draw()
    state = RandomState.seeded(8, 1, 0)
    assert [first, draw()] == expected
    state.restore()
    of_key = draw()
    seed(8, 1, 0)
    assert draw() == of_key


def test_keys_give_unlike_numbers() -> None:
    keys = [(0,), (0, 1), (1, 0), (1, 1), (1, 1, 0), (1, 1, 1), (2**32 + 1, 0)]
    drawn = []
    for key in keys:
        seed(*key)
        drawn.append(tuple(draw()))
    assert len(set(sum(drawn, ()))) == len(keys) * len(drawn[0])


WIDTH = 32
SEVEN = 7
"""Shards for which the sum of equal numbers, divided, is not always that number."""


class Net(nn.Module):
    """Buffers of several kinds: shared between modules, none, of no dim, not floating."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.a, self.b = nn.Module(), nn.Module()
        shared = torch.zeros(2)
        self.a.register_buffer("table", shared)
        self.b.register_buffer("same", shared, persistent=False)
        self.register_buffer("nothing", None)
        self.register_buffer("count", torch.tensor(0))

    def step(self, value: float) -> None:
        """Changes buffers in place, and one by putting another in its place."""
        with torch.no_grad():
            self.norm.running_mean.add_(value)
            self.a.table.add_(value)
            self.count = self.count + 1


def seen(net: Net) -> list[float]:
    return [net.norm.running_mean[0].item(), net.a.table[0].item(), float(net.count)]


def test_each_shard_has_its_buffers() -> None:
    net = Net()
    buffers = ShardBuffers(net, 3)
    assert buffers.names == [
        "count",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "a.table",
    ]
    for i, value in [(0, 1.0), (1, 10.0), (0, 2.0), (2, 100.0), (1, 20.0), (1, 30.0)]:
        buffers.activate(i)
        net.step(value)
        assert net.b.same is net.a.table
    for i, expected in enumerate([[3.0, 3.0, 2], [60.0, 60.0, 3], [100.0, 100.0, 1]]):
        assert buffers.of(i)["a.table"].tolist() == expected[:1] * 2
        buffers.activate(i)
        assert seen(net) == expected
        assert net.b.same is net.a.table
    assert net.nothing is None


def test_replaced_gives_back_what_was_there() -> None:
    net = Net()
    buffers = ShardBuffers(net, 2)
    buffers.activate(1)
    net.step(5.0)
    others = {name: torch.full_like(t, 9) for name, t in buffers.of(0).items()}
    with contextlib.suppress(KeyError), buffers.replaced(others):
        assert seen(net) == [9.0, 9.0, 9.0]
        assert net.b.same is net.a.table
        raise KeyError
    assert seen(net) == [5.0, 5.0, 1.0]
    assert net.b.same is net.a.table
    buffers.activate(0)
    assert seen(net) == [0.0, 0.0, 0.0]


def test_loaded_buffers_are_the_networks() -> None:
    net = Net()
    buffers = ShardBuffers(net, 2)
    for i in (0, 1):  # the first is active, the other is not
        values = {name: torch.full_like(t, 4 + i) for name, t in buffers.of(i).items()}
        buffers.load(i, values)
        values["a.table"].zero_()
    assert seen(net) == [4.0, 4.0, 4.0]
    buffers.activate(1)
    assert seen(net) == [5.0, 5.0, 5.0]


def merged(group: Group, shards: int, fill: Callable[[Net, int], None]) -> dict[str, torch.Tensor]:
    own = tree.assign(shards, group.world_size)[group.rank]
    net = Net()
    buffers = ShardBuffers(net, len(own))
    for i, shard in enumerate(own):
        buffers.activate(i)
        fill(net, shard)
    before = [{k: t.clone() for k, t in buffers.of(i).items()} for i in range(len(own))]
    result = merged_buffers(group, buffers, own, shards)
    for i, values in enumerate(before):
        assert_same_bits(buffers.of(i), values)
    return result


def alike(net: Net, shard: int) -> None:
    for tensor in (net.norm.running_mean, net.norm.running_var, net.a.table):
        tensor.copy_(torch.rand(len(tensor), generator=torch.Generator().manual_seed(3)) / 3)


def unlike(net: Net, shard: int) -> None:
    alike(net, shard)
    net.norm.running_mean.mul_(shard)
    net.a.table.add_(torch.tensor([0.0, shard]))
    net.count = net.count + 10 + shard


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("shards", [3, SEVEN])
def test_equal_buffers_stay_as_they_are_to_the_bit(shards: int, workers: int) -> None:
    net = Net()
    alike(net, 0)
    expected = ShardBuffers(net, 1).of(0)
    plain_mean = tree.tree_sum([expected["norm.running_mean"]] * shards) / shards
    assert torch.equal(plain_mean, expected["norm.running_mean"]) == (shards != SEVEN)
    for result in in_threads(workers, lambda group: merged(group, shards, alike)):
        assert_same_bits(result, expected)


@pytest.mark.parametrize("shards", [3, 4])
def test_merged_buffers_are_the_mean_of_all_shards(shards: int) -> None:
    nets = [Net() for _ in range(shards)]
    for shard, net in enumerate(nets):
        unlike(net, shard)
    (alone,) = in_threads(1, lambda group: merged(group, shards, unlike))
    means = torch.stack([net.norm.running_mean for net in nets]).mean(0)
    torch.testing.assert_close(alone["norm.running_mean"], means)
    tables = torch.stack([net.a.table for net in nets]).mean(0)
    torch.testing.assert_close(alone["a.table"], tables)
    assert alone["count"].item() == 10  # no mean of whole numbers: the first shard's
    for workers in range(2, shards + 1):
        for result in in_threads(workers, lambda group: merged(group, shards, unlike)):
            assert_same_bits(result, alone)
