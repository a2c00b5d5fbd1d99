"""Parallel equals serial: a job on shards and workers gives what plain PyTorch gives.

Networks and data are float64, so that what remains between two orders of the same sum is some
1e-15 a step; TOLERANCE leaves room for the steps that it grows over.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penstock import AllReduce, Averaging, Clip, Job, Run, feed
from penstock.feed.order import epoch_order, steps_per_epoch
from penstock.runtime.shards import seed
from penstock.testing import assert_close, parameters_of, serial

TOLERANCE = 1e-10
FEATURES, CLASSES = 7, 4
LOSS_RELATIVE = 1e-7
"""Events hold losses as float32."""


class Network(nn.Module):
    """Two layers, one of them used twice, and one that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
        self.last = nn.Linear(FEATURES, CLASSES, dtype=torch.float64)
        self.unused = nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


def records(rows: int, partitions: list[int] | None = None) -> feed.Source:
    generator = np.random.default_rng(rows)
    x = generator.normal(size=(rows, FEATURES))
    y = (x @ generator.normal(size=(FEATURES, CLASSES))).argmax(1)
    return feed.arrays(x, y, partitions=partitions)


SGD = partial(torch.optim.SGD, lr=0.3)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
ADAGRAD = partial(torch.optim.Adagrad, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.02)
OPTIMIZERS = {"sgd": SGD, "momentum": MOMENTUM, "adagrad": ADAGRAD, "adam": ADAM}


@pytest.fixture
def job(runs: str) -> Callable[..., Job]:
    """A Job of these values."""

    def make(**values: Any) -> Job:
        default: dict[str, Any] = {
            "network": Network,
            "loss": "cross_entropy",
            "optimizer": SGD,
            "train": records(101),
            "batch_size": 8,
            "epochs": 2,
            "seed": 5,
            "threads": 1,
            "runs": runs,
        }
        return Job(**default | values)

    return make


def assert_equals_serial(job: Job, workers: int) -> Run:
    run: Run = job.run(workers=workers)
    expected = serial(job)
    assert len(expected.losses) >= 8
    assert_close(parameters_of(run), expected.parameters, TOLERANCE)
    assert run.result["loss"] == pytest.approx(expected.losses[-1], rel=TOLERANCE)
    shown = run.scalars("loss")
    assert shown.steps.tolist() == list(range(1, len(expected.losses) + 1))
    np.testing.assert_allclose(shown.values, expected.losses, rtol=LOSS_RELATIVE)
    return run


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_all_reduce(optimizer: Any, job: Callable[..., Job]) -> None:
    run = assert_equals_serial(job(optimizer=optimizer, shards=3), 2)
    other = serial(job(optimizer=optimizer, shards=3, seed=6))
    with pytest.raises(AssertionError, match=r"first\.bias: more than 1e-10 apart, most by"):
        assert_close(parameters_of(run), other.parameters, TOLERANCE)


@pytest.mark.parametrize(("shards", "workers"), [(1, 1), (2, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize(
    "partitions",
    [None, [37, 0, 50], [0, 0, 61], [3, 50, 40, 8]],
    ids=["even", "empty", "one", "more"],
)
def test_all_reduce_on_uneven_shards(
    shards: int, workers: int, partitions: list[int] | None, job: Callable[..., Job]
) -> None:
    """Also a shard that never has a record, a short last batch, and drained shards."""
    rows = 101 if partitions is None else sum(partitions)
    assert_equals_serial(job(train=records(rows, partitions), shards=shards), workers)


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM], ids=["sgd", "momentum"])
@pytest.mark.parametrize("partitions", [None, [37, 0, 50]])
def test_averaging_every_step_is_all_reduce(
    optimizer: Any, partitions: list[int] | None, job: Callable[..., Job]
) -> None:
    """With a linear optimizer; a shard without examples has no say in mean or momentum."""
    source = records(96 if partitions is None else sum(partitions), partitions)
    averaging = job(train=source, optimizer=optimizer, strategy=Averaging(every=1), shards=3)
    assert_equals_serial(averaging, 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("average_state", [True, False])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # a replica without data
def test_averaging(optimizer: Any, average_state: bool, job: Callable[..., Job]) -> None:
    strategy = Averaging(every=5, average_optimizer_state=average_state)
    averaging = job(
        train=records(147, [47, 0, 100]),
        optimizer=optimizer,
        strategy=strategy,
        shards=3,
        schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.97),
    )
    run: Run = averaging.run(workers=2)
    expected = averaged(averaging)
    assert_close(parameters_of(run), expected, TOLERANCE)
    with pytest.raises(AssertionError, match="more than 1e-10 apart"):
        assert_close(parameters_of(run), serial(averaging).parameters, TOLERANCE)
    if optimizer is not SGD:
        other = averaging.replace(
            strategy=Averaging(every=5, average_optimizer_state=not average_state)
        )
        with pytest.raises(AssertionError, match="more than 1e-10 apart"):
            assert_close(parameters_of(run), averaged(other), TOLERANCE)


def averaged(job: Job) -> dict[str, torch.Tensor]:
    """Parameter averaging in plain PyTorch: a replica for each shard, trained by itself.

    Every k steps, and once more at the end, all replicas take the mean of their parameters and
    (if asked) of their optimizer's state, weighted by the examples seen since the last time.
    """
    strategy = job.strategy
    assert isinstance(strategy, Averaging)
    source = job.train.make()
    manifest, loss_of = source.manifest(), job.loss.make()
    rows = manifest.shard_rows(job.shards)
    shards = [source.open(manifest.share(s, job.shards)) for s in range(job.shards)]
    seed(job.seed, 0)
    first = job.network.make()
    networks = [copy.deepcopy(first) for _ in shards]
    optimizers = [job.optimizer.make(network.parameters()) for network in networks]
    assert job.schedule is not None
    schedules = [job.schedule.make(optimizer) for optimizer in optimizers]
    seen, step = [0] * len(shards), 0
    for epoch in range(job.epochs):
        orders = [epoch_order(job.seed, epoch, s, n) for s, n in enumerate(rows)]
        for start in range(
            0, steps_per_epoch(rows, job.batch_size) * job.batch_size, job.batch_size
        ):
            for s, records_of in enumerate(shards):
                order = orders[s][start : start + job.batch_size]
                if len(order):
                    x, y = records_of.take(order)
                    optimizers[s].zero_grad()
                    loss_of(networks[s](x), y).backward()
                    for p in networks[s].parameters():
                        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    optimizers[s].step()
                    seen[s] += len(order)
            for schedule in schedules:
                schedule.step()
            step += 1
            if step % strategy.every == 0:
                take_mean(networks, optimizers, seen, strategy.average_optimizer_state)
                seen = [0] * len(shards)
    if sum(seen):
        take_mean(networks, optimizers, seen, strategy.average_optimizer_state)
    return dict(networks[0].state_dict())


def take_mean(
    networks: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    weights: list[int],
    state_too: bool,
) -> None:
    def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
        parts = [t * w for t, w in zip(tensors, weights, strict=True) if w]
        return sum(parts[1:], parts[0]) / sum(weights)

    for replicas in zip(*(network.parameters() for network in networks), strict=True):
        states = [o.state[p] for o, p in zip(optimizers, replicas, strict=True)]
        keys = {key for state, w in zip(states, weights, strict=True) if w for key in state}
        for key in keys if state_too else ():
            known = next(s[key] for s, w in zip(states, weights, strict=True) if w)
            if known is not None:
                value = mean([s.get(key, torch.zeros_like(known)) for s in states])
                for state in states:
                    state[key] = value.clone()
        value = mean([p.data for p in replicas])
        for p in replicas:
            p.data = value.clone()


@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=1)])
def test_accumulation_is_a_larger_batch(
    strategy: AllReduce | Averaging, job: Callable[..., Job]
) -> None:
    small = job(batch_size=4, accumulate=2, shards=2, strategy=strategy, optimizer=MOMENTUM)
    run = assert_equals_serial(small, 2)
    large = serial(small.replace(batch_size=8, accumulate=1))
    assert_close(parameters_of(run), large.parameters, TOLERANCE)
    with pytest.raises(AssertionError, match="more than 1e-10 apart"):
        assert_close(parameters_of(run), serial(small.replace(accumulate=1)).parameters, TOLERANCE)


@pytest.mark.parametrize("clip", [Clip(norm=0.3), Clip(value=0.02)])
def test_clipping(clip: Clip, job: Callable[..., Job]) -> None:
    run = assert_equals_serial(job(clip=clip, shards=3), 2)
    with pytest.raises(AssertionError, match="more than 1e-10 apart"):
        assert_close(parameters_of(run), serial(job(shards=3)).parameters, TOLERANCE)


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_schedule(every: str, job: Callable[..., Job]) -> None:
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=5)
    scheduled = job(shards=2, schedule=schedule, schedule_every=every, epochs=4)
    run = assert_equals_serial(scheduled, 2)
    rates = run.scalars("learning_rate").values
    steps = len(rates)
    counts = [n if every == "step" else n // (steps // 4) for n in range(steps)]
    expected = [0.15 * (1 + math.cos(math.pi * n / 5)) for n in counts]
    np.testing.assert_allclose(rates, expected, atol=1e-7)
    other = scheduled.replace(schedule_every="epoch" if every == "step" else "step")
    with pytest.raises(AssertionError, match="more than 1e-10 apart"):
        assert_close(parameters_of(run), serial(other).parameters, TOLERANCE)
