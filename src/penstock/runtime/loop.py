"""A Job's training loop: an own loop like any other, written with `Worker` alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from penstock.errors import DataError, NetworkError
from penstock.job import Interval, Job, direction
from penstock.runtime.batches import Batch
from penstock.runtime.callbacks import Callback
from penstock.runtime.evaluation import Evaluation
from penstock.runtime.shards import preserved
from penstock.runtime.worker import Worker


def train(job: Job, worker: Worker) -> None:
    """Trains as the Job says, on this worker."""
    loss_of = job.loss.make()
    network, _ = worker.prepare(
        job.network.target if job.network.made else job.network.make,
        job.optimizer.make,
        None if job.schedule is None else job.schedule.make,
        1 if job.schedule_every == "step" else "epoch",
    )

    def autocast() -> AbstractContextManager[Any]:
        enabled = job.precision == "bfloat16"
        return torch.autocast(worker.device.type, torch.bfloat16, enabled)

    between = _Between(job, worker, loss_of, autocast)
    worker.after_step.append(between)
    between.tell("started")
    worker.stopped = worker.memory.get("stopped")  # a run that has stopped early has ended for good
    for batch in worker.batches(
        "train", epochs=job.epochs, batch_size=job.batch_size, accumulate=job.accumulate
    ):
        with autocast():
            where = f"step {worker.global_step + 1}, shard {batch.shard}"
            loss = loss_of_batch(network, loss_of, batch, where)
        worker.step(loss)
    worker.conclude()
    if job.test is not None and between.evaluated_at != worker.global_step:
        between.evaluate()
    between.tell("ended")


def loss_of_batch(network: torch.nn.Module, loss_of: Any, batch: Batch, where: str) -> torch.Tensor:
    """The loss of a batch; what the network or the loss raises names the records."""
    output = None
    try:
        output = network(batch.x)
        loss: torch.Tensor = loss_of(output, batch.y)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        place = (
            f"{where}, records {_few(batch.ids)}: features {_shape(batch.x)}, "
            f"target {_shape(batch.y)}"
        )
        if output is None:
            raise NetworkError(
                f"the network cannot take this batch: {error}\n  {place}",
                hint="compare the network's first layer with the shape of the features",
            ) from error
        if bad := _out_of_range(output, batch):
            raise bad from error
        raise NetworkError(
            f"the loss cannot take this output: {error}\n  {place}, output {_shape(output)}",
            hint="compare the network's last layer with the target and the loss",
        ) from error
    return loss


def _out_of_range(output: Any, batch: Batch) -> DataError | None:
    """The error for class labels that the network has no output for, if that is what is wrong."""
    y = batch.y
    if not (isinstance(y, torch.Tensor) and isinstance(output, torch.Tensor)):
        return None
    if y.is_floating_point() or y.dim() != 1 or output.dim() != 2:
        return None
    classes = output.shape[1]
    for row, label in enumerate(y.tolist()):
        if not 0 <= label < classes:
            return DataError(
                f"record {batch.ids[row]} of train has label {label}; the network has {classes} "
                f"outputs, for labels 0 to {classes - 1}",
                hint="a network with more outputs, or labels that count from 0",
            )
    return None


def _few(ids: Any) -> str:
    words = [str(i) for i in ids[:4]]
    return ", ".join(words) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


class _Between:
    """What happens between steps: evaluation, checkpoints, early stopping, callbacks."""

    settles = True
    """It waits itself for what it reads."""

    def __init__(
        self,
        job: Job,
        worker: Worker,
        loss_of: Any,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._job, self._worker = job, worker
        self._loss_of, self._autocast = loss_of, autocast
        self._callbacks = [callback.make() for callback in job.callbacks]
        self._began = time.monotonic()
        self.evaluated_at = -1

    def __call__(self, worker: Worker) -> None:
        self.tell("stepped")
        metric = None
        if self._job.test is not None and self._due(self._job.evaluate.every):
            found = self.evaluate()
            metric = self._better(found)
            self._stop_early(found)
        if self._due(self._job.checkpoint.every) or metric is not None:
            worker.checkpoint(metric)
        stop = self._job.stop
        if stop is not None and stop.time_s is not None:
            elapsed_s = time.monotonic() - self._began
            if elapsed_s > stop.time_s:
                worker.stop(f"time: {stop.time_s:g} s have passed")

    def tell(self, what: str, *arguments: Any) -> None:
        """Calls this method of every callback; what it draws is not a shard's."""
        if self._callbacks:
            self._worker.settle()
        for callback in self._callbacks:
            with preserved():
                if isinstance(callback, Callback):
                    getattr(callback, what)(self._worker, *arguments)
                elif what == "stepped":
                    callback(self._worker)

    def evaluate(self) -> Evaluation:
        """Scores the network on the test source."""
        evaluate, worker = self._job.evaluate, self._worker
        with self._autocast():
            found = worker.evaluate(
                "test",
                loss=self._loss_of,
                task=evaluate.task,
                top_k=evaluate.top_k,
                batch_size=evaluate.batch_size or self._job.batch_size,
            )
        self.evaluated_at = worker.global_step
        self.tell("evaluated", found)
        return found

    def _due(self, every: Interval) -> bool:
        done = self._worker.global_step
        if every.unit == "epoch":
            epochs = self._worker.epochs_done("train")
            if epochs is None:
                return False
            done = epochs
        return done % every.count == 0

    def _better(self, found: Evaluation) -> float | None:
        """The metric by which the best checkpoint is kept, so that higher is better."""
        best = self._job.checkpoint.best
        if best is None:
            return None
        value = found.metric(best)
        return -value if direction(best) == "min" else value

    def _stop_early(self, found: Evaluation) -> None:
        stop, memory = self._job.stop, self._worker.memory
        if found.loss is not None and not math.isfinite(found.loss):
            self._stop(f"the loss on test is {found.loss}")
        if stop is None or stop.metric is None or stop.patience is None:
            return
        value = found.metric(stop.metric)
        if not math.isfinite(value):
            self._stop(f"{stop.metric} is {value}")
        better = value if stop.mode == "max" else -value
        if memory.get("best") is None or better > memory["best"] + stop.min_delta:
            memory["best"], memory["waited"] = better, 0
        else:
            memory["waited"] += 1
        if memory["waited"] >= stop.patience:
            self._stop(f"{stop.metric} has not improved in {stop.patience} evaluations")

    def _stop(self, reason: str) -> None:
        """Ends training now: all workers know the same scores."""
        self._worker.memory["stopped"] = self._worker.stopped = reason
