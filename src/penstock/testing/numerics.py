"""Trained parameters compared, to the bit or to a tolerance; and training in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.feed.manifest import Manifest
from penstock.feed.order import epoch_order, steps_per_epoch
from penstock.feed.source import Records
from penstock.job import Job
from penstock.runtime.run import Run
from penstock.runtime.shards import seed

Tensors = Mapping[str, torch.Tensor]


def parameters_of(run: Run) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, as a run's last checkpoint has them.

    Raises:
        RunError: the run has no checkpoint.
    """
    tensors, _ = run.checkpoint().tensors("network.safetensors")
    return dict(sorted(tensors.items()))


def assert_same_bits(a: Tensors, b: Tensors) -> None:
    """Asserts that all tensors are equal to the bit; a NaN equals a NaN of the same bits.

    Raises:
        AssertionError: names the first tensor that differs, and by how much.
    """
    for name, x, y in _pairs(a, b):
        different = x.reshape(-1, 1).view(torch.uint8) != y.reshape(-1, 1).view(torch.uint8)
        elements = int(different.any(1).sum())
        assert not elements, f"{name}: {elements} of {x.numel()} elements differ{_most(x, y)}"


def assert_close(a: Tensors, b: Tensors, tolerance: float) -> None:
    """Asserts that no element of any tensor differs by more than `tolerance`.

    Raises:
        AssertionError: names the first tensor that differs, and by how much.
    """
    for name, x, y in _pairs(a, b):
        near = (x.double() - y.double()).abs() <= tolerance  # False for NaN
        assert near.all(), f"{name}: more than {tolerance} apart{_most(x, y)}"


def _pairs(a: Tensors, b: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    assert a.keys() == b.keys(), f"other names: {sorted(a.keys() ^ b.keys())}"
    for name, x in a.items():
        x, y = x.detach().cpu().contiguous(), b[name].detach().cpu().contiguous()
        kinds = [f"{tuple(t.shape)} {t.dtype}" for t in (x, y)]
        assert kinds[0] == kinds[1], f"{name}: {kinds[0]} and {kinds[1]}"
        yield name, x, y


def _most(x: torch.Tensor, y: torch.Tensor) -> str:
    difference = (x.double() - y.double()).abs().reshape(-1)
    at = int(difference.nan_to_num(nan=torch.inf).argmax())
    values = x.reshape(-1)[at].item(), y.reshape(-1)[at].item()
    return f", most by {difference[at].item():.3g}: {values[0]!r} and {values[1]!r}, element {at}"


@dataclass
class Trained:
    """What plain PyTorch made of a Job: the network, and the mean loss of every step."""

    network: torch.nn.Module
    losses: list[float] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name."""
        return dict(self.network.state_dict())


def serial(job: Job) -> Trained:
    """Trains a Job in this process by a plain PyTorch loop, one batch a step.

    A step's batch is that of all shards, one after the other: `AllReduce` must give the same up to
    rounding, where the network has neither batch statistics nor random numbers. A parameter that
    the loss does not depend on has a gradient of zeros, as it has there. Features and target must
    be tensors; test source, evaluation, checkpoints and early stopping are left out.
    """
    seed(job.seed, 0)
    network = copy.deepcopy(job.network.target) if job.network.made else job.network.make()
    network.train()
    optimizer = job.optimizer.make(network.parameters())
    schedule = None if job.schedule is None else job.schedule.make(optimizer)
    loss_of, source = job.loss.make(), job.train.make()
    manifest: Manifest = source.manifest()
    records = [source.open(manifest.share(s, job.shards)) for s in range(job.shards)]
    rows, per_step = manifest.shard_rows(job.shards), job.batch_size * job.accumulate
    trained = Trained(network)
    for epoch in range(job.epochs):
        orders = [epoch_order(job.seed, epoch, s, n) for s, n in enumerate(rows)]
        for step in range(steps_per_epoch(rows, per_step)):
            x, y = _batch(
                [
                    (shard, order[step * per_step : (step + 1) * per_step])
                    for shard, order in zip(records, orders, strict=True)
                ]
            )
            optimizer.zero_grad()
            loss = loss_of(network(x), y)
            loss.backward()
            trained.losses.append(loss.item())
            trainable = [p for p in network.parameters() if p.requires_grad]
            for p in trainable:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if job.clip is not None and job.clip.norm is not None:
                torch.nn.utils.clip_grad_norm_(trainable, job.clip.norm)
            if job.clip is not None and job.clip.value is not None:
                torch.nn.utils.clip_grad_value_(trainable, job.clip.value)
            optimizer.step()
            if schedule is not None and job.schedule_every == "step":
                schedule.step()
        if schedule is not None and job.schedule_every == "epoch":
            schedule.step()
    return trained


def _batch(reads: list[tuple[Records, NDArray[np.int64]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The records of all shards that have any in this step, as one batch."""
    features, targets = [], []
    for records, rows in reads:
        if len(rows):
            x, y = records.take(rows)
            assert isinstance(x, torch.Tensor), "serial takes features that are one tensor"
            assert isinstance(y, torch.Tensor), "serial takes a target that is one tensor"
            features.append(x)
            targets.append(y)
    return torch.cat(features), torch.cat(targets)
