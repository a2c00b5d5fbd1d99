"""Early stopping, precision, callbacks, events, and what an own loop may wish for."""

from __future__ import annotations

import math
import shutil
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import penstock
from penstock import AllReduce, Averaging, Callback, Checkpoint, Events, Job, Run, Stop, feed
from penstock.errors import JobError, UserError
from penstock.testing import assert_same_bits, parameters_of
from penstock.watch import read_events


def points(rows: int, partitions: list[int] | None = None) -> feed.Source:
    """Two classes that a line divides."""
    generator = np.random.default_rng(7)
    x = generator.normal(size=(rows, 4)).astype(np.float32)
    return feed.arrays(x, (x[:, 0] > 0).astype(np.int64), partitions=partitions)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "network": network,
        "loss": "cross_entropy",
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "train": points(60),
        "test": points(20),
        "batch_size": 10,
        "epochs": 3,
        "workers": 2,
    }
    return Job(**values | changes)


def test_patience_ends_a_run_that_no_longer_improves(runs: str) -> None:
    frozen = partial(torch.optim.SGD, lr=0.0)
    stop = Stop(metric="loss", patience=2)
    run = job(optimizer=frozen, epochs=20, stop=stop, runs=runs).run(progress=False)
    # The first evaluation is the best, the second and third are no better.
    assert run.result["step"] == 9
    assert run.result["status"] == "stopped"
    assert run.result["stopped"] == "loss has not improved in 2 evaluations"
    learning = job(epochs=6, stop=stop, runs=runs).run(progress=False)
    assert (learning.result["status"], learning.result["epoch"]) == ("finished", 6)


def test_time_ends_a_run(runs: str) -> None:
    run = job(epochs=100_000, stop=Stop(time=1.0), runs=runs).run(progress=False)
    assert run.result["stopped"] == "time: 1 s have passed"
    assert run.result["seconds"] < 20


class Poisoned(nn.Module):
    """Its output is not finite once it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x) if self.training else self.dense(x) * math.inf


def test_a_score_that_is_not_finite_ends_a_run(runs: str) -> None:
    run = job(network=Poisoned, epochs=50, runs=runs).run(progress=False)
    assert run.result["stopped"] == "the loss on test is nan"
    assert run.result["epoch"] < 3


def test_bfloat16_trains_with_float32_parameters(runs: str) -> None:
    full = job(runs=runs).run(progress=False)
    half = job(runs=runs, precision="bf16").run(progress=False)
    assert {p.dtype for p in parameters_of(half).values()} == {torch.float32}
    losses = [run.scalars("loss").values for run in (full, half)]
    assert not np.array_equal(*losses)
    assert np.allclose(*losses, rtol=0.02)


class Witness(Callback):
    """Reports what it was told."""

    def __init__(self) -> None:
        self.steps = 0

    def started(self, worker: penstock.Worker) -> None:
        print(f"rank {worker.rank} started")

    def stepped(self, worker: penstock.Worker) -> None:
        self.steps += 1

    def evaluated(self, worker: penstock.Worker, evaluation: Any) -> None:
        print(f"rank {worker.rank} evaluated {evaluation.examples}")

    def ended(self, worker: penstock.Worker) -> None:
        worker.report(witnessed=self.steps)


def stop_at_four(worker: penstock.Worker) -> None:
    if worker.global_step == 4 and worker.rank == 1:
        worker.stop("rank 1 has had enough")


def test_callbacks_are_told(runs: str, capfd: pytest.CaptureFixture[str]) -> None:
    run = job(runs=runs, callbacks=[Witness, stop_at_four]).run()
    assert run.result["stopped"] == "rank 1 has had enough"
    assert run.scalars("witnessed").values.tolist() == [run.result["step"]] == [5.0]
    told = capfd.readouterr().err
    for rank in (0, 1):
        assert f"[rank {rank}] rank {rank} started" in told
        assert f"[rank {rank}] rank {rank} evaluated 20" in told


def test_events_show_what_training_did(runs: str) -> None:
    optimizer = partial(torch.optim.SGD, lr=0.1)
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    run = job(
        runs=runs, optimizer=optimizer, schedule=schedule, events=Events(histograms_every=3)
    ).run(progress=False)
    events = read_events(f"{run.url}/events")
    assert events.scalars("loss").steps.tolist() == list(range(1, 10))
    rates = events.scalars("learning_rate").values
    assert rates[:4] == pytest.approx([0.1, 0.1, 0.05, 0.05])
    assert (events.scalars("examples_per_s").values > 0).all()
    assert events.scalars("test/accuracy").steps.tolist() == [3, 6, 9]
    for tag in ("weights/0.weight", "gradients/0.weight", "updates/0.weight"):
        assert [h.step for h in events.histograms(tag)] == [3, 6, 9]
    ratios = events.scalars("log10_update_to_parameter/0.weight")
    assert ratios.steps.tolist() == [3, 6, 9]
    assert (ratios.values < 0).all()


def test_the_best_checkpoint_is_kept(runs: str) -> None:
    run = job(
        runs=runs, epochs=6, checkpoint=Checkpoint(keep=1, best="loss"), optimizer=Worsening
    ).run(progress=False)
    assert run.checkpoints == [3, 18]
    with pytest.raises(JobError, match="metric 'acuracy'"):
        job(runs=runs, checkpoint=Checkpoint(best="acuracy")).run(progress=False)


class Worsening(torch.optim.SGD):
    """Climbs: every epoch is worse than the one before."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.5, maximize=True)


def wishing(worker: penstock.Worker) -> None:
    """Wishes for a checkpoint in a body that only some workers run: the others' shards are dry."""
    module, _ = worker.prepare(network, partial(torch.optim.SGD, lr=0.1))
    seen = []
    for batch in worker.batches("train", epochs=2, batch_size=5):
        before = worker.global_step
        worker.step(nn.functional.cross_entropy(module(batch.x), batch.y))
        seen.append((before, worker.global_step))
        if worker.global_step in (5, 9):
            worker.checkpoint()
    assert all(after == before + 1 for before, after in seen[:: len(worker.shards)])


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=1)])
def test_a_wish_of_one_worker_is_everyones(
    runs: str, workers: int, strategy: AllReduce | Averaging
) -> None:
    run = penstock.launch(
        wishing,
        workers=workers,
        shards=3,
        train=points(60, [30, 10, 20]),
        strategy=strategy,
        runs=runs,
        progress=False,
    )
    assert run.checkpoints == [5, 9, 12]


def leaving(worker: penstock.Worker) -> None:
    module, _ = worker.prepare(network, partial(torch.optim.SGD, lr=0.1))
    for batch in worker.batches("train", epochs=2):
        worker.step(nn.functional.cross_entropy(module(batch.x), batch.y))
        break


def test_a_loop_that_is_left_is_an_error(runs: str) -> None:
    with pytest.raises(UserError, match=r"left in the middle of step 1[^0]*stop\(reason\)"):
        penstock.launch(leaving, train=points(60), runs=runs, progress=False)


def remembering(worker: penstock.Worker) -> None:
    module, _ = worker.prepare(network, partial(torch.optim.SGD, lr=0.1))
    assert worker.resumed == ("visits" in worker.memory)
    worker.memory["visits"] = worker.memory.get("visits", 0) + 1
    for batch in worker.batches("train", epochs=worker.memory["visits"]):
        worker.step(nn.functional.cross_entropy(module(batch.x), batch.y))
    worker.report(visits=worker.memory["visits"])


def test_an_own_loop_is_resumed_with_its_memory(runs: str) -> None:
    run = penstock.launch(remembering, train=points(60), runs=runs, progress=False)
    before = parameters_of(run)
    again = penstock.launch(remembering, train=points(60), resume=run, workers=1, progress=False)
    assert again.url == run.url
    assert again.scalars("visits").values.tolist() == [1, 2]
    assert again.result["epoch"] == 2
    with pytest.raises(AssertionError):
        assert_same_bits(before, parameters_of(again))


def test_a_run_on_a_url(tmp_path: Any) -> None:
    run = job(runs=f"file://{tmp_path}/deep/runs").run(progress=False)
    assert run.url.startswith(f"file://{tmp_path}/deep/runs/network-")
    assert Run(run.url).evaluation == run.evaluation


def test_an_epoch_that_has_begun_keeps_its_batches(runs: str) -> None:
    """Another batch size can begin with an epoch (steps of 6), not within one."""
    every = Checkpoint(every="2 steps", keep=9)
    whole = job(runs=runs, epochs=1, batch_size=5, checkpoint=every).run(progress=False)
    assert whole.checkpoints == [0, 2, 4, 6]
    longer = job(epochs=2, batch_size=10).run(resume=whole, progress=False)
    assert longer.result["step"] == 6 + 3
    for step in longer.checkpoints:
        if step > 4:
            shutil.rmtree(f"{whole.url}/checkpoints/{step:08d}")
    with pytest.raises(JobError, match=r"train: batch_size 10 .* began with 5 and 1, and 4 steps"):
        job(epochs=2, batch_size=10).run(resume=whole, progress=False)
