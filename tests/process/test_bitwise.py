"""A job's shards fix its result: on 1, 2, 3 or 4 workers it has the same bits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import penstock
from penstock import AllReduce, Averaging, Callback, Clip, Evaluate, Job, Run, Worker, feed
from penstock.errors import JobError
from penstock.testing import assert_same_bits, parameters_of

SHARDS = 4


def images(rows: int, size: int, partitions: list[int] | None = None) -> feed.Source:
    """Noise in which the class can be seen."""
    generator = np.random.default_rng(rows)
    y = generator.integers(0, 10, rows)
    x = generator.normal(size=(rows, 1, size, size)).astype(np.float32)
    x[np.arange(rows), 0, y % size, y // 2] += 3
    return feed.arrays(x, y, partitions=partitions)


class Small(nn.Module):
    """Convolution, batch norm and dropout: everything that a shard has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.dense = nn.Linear(8 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.dense(self.dropout(x.flatten(1)))


UNEVEN = [70, 0, 55, 78]
"""Whole partitions: the second shard never has a record, the others run dry at different steps."""

SMALL: dict[str, Any] = {
    "network": Small,
    "loss": "cross_entropy",
    "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "schedule": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=12),
    "test": images(53, 12),
    "batch_size": 8,
    "epochs": 2,
}
LENET: dict[str, Any] = {
    "network": penstock.zoo.lenet,
    "loss": "cross_entropy",
    "test": images(53, 28),
    "batch_size": 5,
    "epochs": 2,
}
CASES: dict[str, dict[str, Any]] = {
    "small, all-reduce in many buckets": SMALL
    | {"train": images(203, 12), "accumulate": 2, "strategy": AllReduce(bucket_bytes=1024)},
    "small, averaging": SMALL
    | {"train": images(203, 12, UNEVEN), "strategy": Averaging(every=3), "clip": Clip(norm=0.5)},
    "small, averaging parameters alone": SMALL
    | {
        "train": images(203, 12, UNEVEN),
        "strategy": Averaging(every=4, average_optimizer_state=False),
        "schedule_every": "epoch",
        "schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=1),
    },
    "lenet, all-reduce": LENET
    | {
        "train": images(111, 28, [37, 0, 50, 24]),
        "optimizer": partial(torch.optim.Adagrad, lr=0.005),
        "strategy": AllReduce(),
        "clip": Clip(value=0.02),
    },
    "lenet, averaging": LENET
    | {
        "train": images(203, 28),
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
        "strategy": Averaging(every=3),
        "accumulate": 2,
    },
}


@pytest.fixture
def train(runs: str) -> Callable[..., Run]:
    """Runs a Job of these values on so many workers."""

    def run(values: dict[str, Any], workers: int, **changes: Any) -> Run:
        values = {"shards": SHARDS, "threads": 1, "seed": 3, "runs": runs} | values | changes
        done: Run = Job(**values, workers=workers).run()
        assert done.result["status"] == "finished"
        return done

    return run


def assert_same_run(a: Run, b: Run, but: str = "") -> None:
    """Parameters, buffers, loss of every step, evaluation, and whole checkpoints (but for one of
    their files) are equal."""
    assert_same_bits(parameters_of(a), parameters_of(b))
    for tag in ("loss", "learning_rate"):
        assert a.scalars(tag).steps.tolist() == b.scalars(tag).steps.tolist()
        assert a.scalars(tag).values.tobytes() == b.scalars(tag).values.tobytes()
    assert a.evaluation is not None
    assert b.evaluation is not None
    assert a.evaluation.to_dict() == b.evaluation.to_dict()
    assert a.result["loss"] == b.result["loss"]
    # With random state, optimizer state and batch statistics of every shard:
    assert checksums(a, but) == checksums(b, but)


def checksums(run: Run, but: str) -> dict[str, str]:
    """SHA-256 of every file of the last checkpoint but one."""
    folder = run.checkpoint().folder
    manifest = json.loads(run.store.read(f"{folder}/manifest.json"))
    return {file["name"]: file["sha256"] for file in manifest["files"] if file["name"] != but}


@pytest.mark.parametrize("case", CASES)
def test_same_bits_on_any_number_of_workers(case: str, train: Callable[..., Run]) -> None:
    alone = train(CASES[case], 1)
    losses = alone.scalars("loss").values
    assert len(losses) >= 4
    assert losses[-2:].mean() < losses[:2].mean()
    for workers in (2, 3, 4):
        assert_same_run(train(CASES[case], workers), alone)


def test_same_bits_with_more_threads(train: Callable[..., Run]) -> None:
    case = CASES["lenet, all-reduce"] | {"threads": 2}
    assert_same_run(train(case, 2), train(case, 1))


def test_another_seed_or_number_of_shards_has_other_bits(train: Callable[..., Run]) -> None:
    case = CASES["small, all-reduce in many buckets"]
    one = parameters_of(train(case, 2))
    for change in ({"seed": 4}, {"shards": 3}):
        with pytest.raises(AssertionError, match=r"conv1\.bias: \d+ of 6 elements differ"):
            assert_same_bits(one, parameters_of(train(case, 2, **change)))


class Odd(nn.Module):
    """Parameters and buffers of other layouts and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.dense = nn.Linear(4 * 100, 10)
        self.turned = nn.Parameter(torch.rand(10, 400).t())
        self.register_buffer("mask", torch.rand(10) < 0.9)
        self.register_buffer("count", torch.tensor(3, dtype=torch.int16))
        self.register_buffer("phase", torch.ones(4, dtype=torch.complex64))
        self.register_buffer("table", torch.rand(4, 3).half().t())
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(1)
        return (self.dense(x) + x @ self.turned) * self.mask + self.table.sum() * self.count


@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=2)])
def test_layouts_and_dtypes_make_no_difference(
    strategy: AllReduce | Averaging, train: Callable[..., Run]
) -> None:
    case = CASES["small, averaging"] | {"network": Odd, "strategy": strategy, "epochs": 1}
    assert_same_run(train(case, 3), train(case, 1))


class Noisy(Dataset[tuple[torch.Tensor, int]]):
    """Records with noise from all three generators, new every time they are read."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if not 0 <= i < self._rows:
            raise IndexError(i)
        noise = [torch.rand(()).item(), np.random.normal(), random.gauss(0, 1)]
        return torch.tensor(noise) + i % 3, i % 3


NOISY: dict[str, Any] = {
    "network": partial(nn.Linear, 3, 3),
    "loss": "cross_entropy",
    "optimizer": partial(torch.optim.SGD, lr=0.1),
    "train": feed.dataset(Noisy(50)),
    "test": feed.dataset(Noisy(21)),
    "batch_size": 5,
    "epochs": 2,
}


@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=2)])
def test_random_numbers_of_a_dataset_belong_to_the_shard(
    strategy: AllReduce | Averaging, train: Callable[..., Run]
) -> None:
    alone = train(NOISY, 1, strategy=strategy)
    for workers in (2, 4):
        assert_same_run(train(NOISY, workers, strategy=strategy), alone)
    with pytest.raises(AssertionError):
        assert_same_run(train(NOISY, 1, strategy=strategy, seed=4), alone)


class Drawing(Callback):
    """Draws random numbers whenever it is told something, as a callback may."""

    def stepped(self, worker: Worker) -> None:
        torch.rand(3), np.random.normal(), random.gauss(0, 1)

    def evaluated(self, worker: Worker, evaluation: Any) -> None:
        self.stepped(worker)


def test_what_callbacks_draw_does_not_change_training(train: Callable[..., Run]) -> None:
    case = CASES["small, averaging"] | {"evaluate": Evaluate(every="4 steps")}
    alone = train(case, 1)
    for workers in (1, 4):
        assert_same_run(train(case, workers, callbacks=[Drawing]), alone)


def own_loop(worker: Worker) -> None:
    network, _ = worker.prepare(Small(), SMALL["optimizer"], SMALL["schedule"])
    for batch in worker.batches("train", epochs=2, batch_size=8, accumulate=2):
        worker.step(functional.cross_entropy(network(batch.x), batch.y))
    worker.conclude()
    worker.evaluate("test", loss=functional.cross_entropy, batch_size=8)


def own_loop_of_habit(worker: Worker) -> None:
    """As one writes it elsewhere: gradients are set to None before each backward."""
    network, optimizer = worker.prepare(Small, SMALL["optimizer"], SMALL["schedule"])
    for batch in worker.batches("train", epochs=2, batch_size=8, accumulate=2):
        optimizer.zero_grad()
        worker.step(functional.cross_entropy(network(batch.x), batch.y))
    worker.conclude()
    worker.evaluate("test", loss=functional.cross_entropy, batch_size=8)


@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=3)])
@pytest.mark.parametrize("function", [own_loop, own_loop_of_habit])
def test_an_own_loop_has_the_bits_of_the_job(
    function: Callable[[Worker], None],
    strategy: AllReduce | Averaging,
    train: Callable[..., Run],
    runs: str,
) -> None:
    case = CASES["small, all-reduce in many buckets"] | {"strategy": strategy}
    job = train(case, 2)
    own = penstock.launch(
        function,
        workers=3,
        shards=SHARDS,
        threads=1,
        seed=3,
        strategy=strategy,
        runs=runs,
        train=case["train"],
        test=case["test"],
    )
    assert_same_bits(parameters_of(own), parameters_of(job))
    assert own.scalars("loss").values.tobytes() == job.scalars("loss").values.tobytes()
    assert own.evaluation is not None
    assert job.evaluation is not None
    assert own.evaluation.to_dict() == job.evaluation.to_dict()


def test_an_exchange_that_goes_on_into_forward_changes_no_bit(train: Callable[..., Run]) -> None:
    """With a schedule, evaluation, checkpoints and several micro-batches between."""
    values = CASES["small, all-reduce in many buckets"]
    alone = train(values, 1, strategy=AllReduce(bucket_bytes=1024, into_forward=False))
    for workers in (1, 2, 3):
        strategy = AllReduce(bucket_bytes=1024, into_forward=True)
        run = train(values, workers, strategy=strategy)
        assert_same_run(run, alone, but="state.json")  # which names the strategy


def test_what_cannot_go_on_into_forward_says_so(train: Callable[..., Run]) -> None:
    strategy = AllReduce(into_forward=True)
    values = CASES["lenet, all-reduce"] | {"clip": Clip(norm=1.0), "strategy": strategy}
    with pytest.raises(JobError, match="into_forward: gradients are clipped by the norm"):
        train(values, 2)
