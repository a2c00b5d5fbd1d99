"""Runs that are fed while their data is still read: each record once, the same bits always."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import penstock
from penstock import AllReduce, Averaging, Callback, Job, Run, Worker, feed
from penstock.errors import DataError, Interrupted, WorkerFailed
from penstock.testing import assert_same_bits, parameters_of

SHARDS = 4
SIZES = [150, 0, 1, 73, 260, 31]
"""Of partitions: the second shard has 31 rows, the third one; all run dry at different steps."""
WIDTH = 6


def rows_of(partition: int) -> tuple[Any, Any]:
    """Rows that say where they are from: the second feature counts all rows."""
    first, size = sum(SIZES[:partition]), SIZES[partition]
    x = np.random.default_rng(partition).normal(size=(size, WIDTH)).astype(np.float32)
    x[:, 1] = np.arange(first, first + size)
    return x, (x[:, 0] > 0).astype(np.int64)


def counted(partition: int, pause_s: float = 0.0, fail_after: int | None = None) -> Iterator[Any]:
    """The rows of a partition in pieces of uneven sizes."""
    x, y = rows_of(partition)
    start = 0
    for size in itertools.cycle([1, 7, 0, 20]):
        if start >= len(x):
            return
        if fail_after is not None and start >= fail_after:
            raise ValueError("the tape is torn")
        time.sleep(pause_s)
        yield x[start : start + size], y[start : start + size]
        start += size


def endless(partition: int) -> Iterator[Any]:
    """Never comes to an end."""
    for number in itertools.count():
        x = np.random.default_rng([partition, number]).normal(size=(100, WIDTH))
        yield x.astype(np.float32), (x[:, 0] > 0).astype(np.int64)


def fewer(partition: int) -> Iterator[Any]:
    """Under the name of another."""
    yield rows_of(partition)[0][:7], rows_of(partition)[1][:7]


fewer.__qualname__ = counted.__qualname__


def streamed(**options: Any) -> feed.Source:
    return feed.stream(partial(counted, **options), partitions=len(SIZES))


def table(folder: Path, group: int = 40) -> feed.Source:
    """The same rows as Parquet, in two files."""
    for number, partitions in enumerate([range(3), range(3, len(SIZES))]):
        halves = [rows_of(p) for p in partitions]
        x, y = (np.concatenate([half[i] for half in halves]) for i in (0, 1))
        lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), WIDTH)
        folder.mkdir(exist_ok=True)
        pq.write_table(
            pa.table({"x": lists, "y": y}), folder / f"{number}.parquet", row_group_size=group
        )
    return feed.parquet(folder, features="x", target="y")


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 2))


class Slow(Callback):
    """Takes its time, so that a run can be hit."""

    def stepped(self, worker: Any) -> None:
        time.sleep(0.03)


class Early(Callback):
    """Stops after the first step."""

    def stepped(self, worker: Any) -> None:
        worker.stop("enough")


def job(train: feed.Source, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "network": network(),
        "loss": "cross_entropy",
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01),
        "train": train,
        "batch_size": 8,
        "epochs": 2,
        "shards": SHARDS,
        "threads": 1,
        "seed": 5,
        "strategy": AllReduce(),
        "checkpoint": {"every": "4 steps", "keep": 100},
    }
    return Job(**(values | changes))


def note(worker: Worker, folder: str, epochs: int = 2) -> None:
    """Writes down what comes, batch by batch."""
    net, _ = worker.prepare(network(), partial(torch.optim.SGD, lr=0.1))
    seen = []
    for batch in worker.batches("train", epochs=epochs, batch_size=8):
        seen.append((batch.epoch, batch.shard, batch.ids.tolist(), batch.x[:, 1].tolist()))
        worker.step(nn.functional.cross_entropy(net(batch.x), batch.y))
    steps = worker.steps_per_epoch("train", 8)
    Path(folder, f"{worker.world_size}-{worker.rank}.json").write_text(json.dumps([steps, seen]))


def noted(folder: Path, workers: int) -> dict[tuple[int, int], list[Any]]:
    """By epoch and shard, the batches in order."""
    found: dict[tuple[int, int], list[Any]] = {}
    for rank in range(workers):
        _, seen = json.loads((folder / f"{workers}-{rank}.json").read_text())
        for epoch, shard, ids, values in seen:
            found.setdefault((epoch, shard), []).append((ids, values))
    return found


@pytest.fixture(params=["stream", "parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> feed.Source:
    return streamed() if request.param == "stream" else table(tmp_path / "table")


def test_each_record_comes_once_an_epoch_in_the_same_order_on_any_number_of_workers(
    source: feed.Source, tmp_path: Path, runs: str
) -> None:
    everyone = []
    for workers in (1, 2, 4):
        penstock.launch(
            partial(note, folder=str(tmp_path)),
            train=source,
            workers=workers,
            shards=SHARDS,
            threads=1,
            runs=runs,
        )
        found = noted(tmp_path, workers)
        for epoch in (0, 1):
            batches = [b for (e, _), batches in found.items() if e == epoch for b in batches]
            values = Counter(value for _, values in batches for value in values)
            assert values == Counter(range(sum(SIZES)))
            assert len({i for ids, _ in batches for i in ids}) == sum(SIZES)
        everyone.append(found)
    assert everyone[0] == everyone[1] == everyone[2]
    assert {shard: [i for i, _ in found[0, shard]] for _, shard in found} != {
        shard: [i for i, _ in found[1, shard]] for _, shard in found
    }, "two epochs have one order"


@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=3)])
def test_streams_have_the_same_bits_on_any_number_of_workers(strategy: Any, runs: str) -> None:
    streams = {
        "train": streamed(),
        "test": feed.stream(fewer, partitions=len(SIZES)),
        "evaluate": {"every": "1 epoch"},
        "schedule": partial(torch.optim.lr_scheduler.StepLR, step_size=1),
        "schedule_every": "epoch",
    }
    found = [job(strategy=strategy, runs=runs, **streams).run(workers=n) for n in (1, 2, 4)]
    for other in found[1:]:
        assert_same_bits(parameters_of(found[0]), parameters_of(other))
        assert found[0].evaluation == other.evaluation
    assert found[0].plan.manifests["train"].rows == sum(SIZES)
    assert found[0].result["epoch"] == 2
    assert found[0].evaluation is not None
    assert found[0].evaluation.examples == sum(min(size, 7) for size in SIZES)
    control = job(strategy=strategy, runs=runs, **(streams | {"seed": 6})).run(workers=1)
    with pytest.raises(AssertionError):
        assert_same_bits(parameters_of(found[0]), parameters_of(control))


@pytest.mark.parametrize("resumed_on", [1, 2])
def test_a_run_stopped_while_it_is_read_goes_on_at_the_next_record(
    resumed_on: int, runs: str, tmp_path: Path
) -> None:
    undisturbed = job(streamed(), runs=runs).run(workers=2)

    class Stop(Callback):
        def stepped(self, worker: Any) -> None:
            if worker.global_step == 7 and worker.rank == 0:
                worker.stop("interrupted")

    slow = streamed(pause_s=0.01)
    stopped = job(slow, callbacks=[Stop()], runs=runs)
    folder = str(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        stopped.run(workers=2, run_dir=folder)
    assert Run(folder).plan.manifests["train"].open, "all had been read: nothing is shown"
    assert Run(folder).checkpoints[-1] in (7, 8)
    resumed = job(streamed(), runs=runs).run(workers=resumed_on, resume=folder)
    assert_same_bits(parameters_of(undisturbed), parameters_of(resumed))


def test_a_worker_killed_while_its_partition_is_read_is_replaced(runs: str, tmp_path: Path) -> None:
    undisturbed = job(streamed(), runs=runs).run(workers=2)

    class Die(Callback):
        def stepped(self, worker: Any) -> None:
            mark = tmp_path / "died"
            if worker.global_step == 6 and worker.rank == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    killed = job(streamed(pause_s=0.01), callbacks=[Die()], runs=runs).run(workers=2)
    assert killed.result["restarts"] == 1
    assert_same_bits(parameters_of(undisturbed), parameters_of(killed))


def test_the_first_batch_comes_before_the_source_ends(runs: str) -> None:
    began = time.monotonic()
    run = job(
        feed.stream(endless, partitions=2), shards=2, runs=runs, stop={"time": "1 s"}, epochs=1
    ).run(workers=2)
    assert run.result["stopped"].startswith("time")
    assert run.result["step"] > 0
    assert time.monotonic() - began < 60


def test_what_a_stream_raises_ends_the_run_and_names_the_partition(runs: str) -> None:
    with pytest.raises(
        DataError, match=r"(?s)partition 0: counted raised ValueError: the tape is torn.*in counted"
    ):
        job(streamed(fail_after=100), runs=runs).run(workers=2)


def noisy(x: torch.Tensor, y: torch.Tensor, random: np.random.Generator) -> tuple[Any, Any]:
    return x + torch.from_numpy(random.normal(size=x.shape).astype(np.float32)), y


def doubled(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, Any]:
    time.sleep(0.001)
    return 2 * x, y


def torn(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, Any]:
    raise ZeroDivisionError("on purpose")


def stuck(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, Any]:
    global calls
    calls += 1
    if calls > 3:
        time.sleep(7)  # more than a pipeline that is closed waits
    return x, y


calls = 0


def shorter(x: torch.Tensor, y: torch.Tensor) -> tuple[Any, Any]:
    return x[1:], y


def test_a_function_is_a_stage_and_draws_the_same_wherever_it_runs(
    source: feed.Source, runs: str
) -> None:
    mapped = feed.map(feed.map(source, noisy, workers=2), doubled, workers=3)
    found = [job(mapped, runs=runs).run(workers=n) for n in (1, 2)]
    assert_same_bits(parameters_of(found[0]), parameters_of(found[1]))
    plain = job(feed.map(source, doubled), runs=runs).run(workers=1)
    with pytest.raises(AssertionError):
        assert_same_bits(parameters_of(found[0]), parameters_of(plain))


def test_what_a_stage_raises_ends_the_run_with_its_own_stack(
    source: feed.Source, runs: str
) -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)ZeroDivisionError: on purpose.*in torn"):
        job(feed.map(source, torn), runs=runs).run(workers=2)
    with pytest.raises(DataError, match="shorter gave x of 7 rows for a batch of 8"):
        job(feed.map(source, shorter), runs=runs).run(workers=1)


def test_a_stage_that_hangs_does_not_undo_how_a_run_has_ended(runs: str) -> None:
    run = job(feed.map(streamed(), stuck), shards=1, runs=runs, callbacks=[Early()]).run()
    assert run.result["status"] == "stopped"
    assert run.result["stopped"] == "enough"


def test_events_say_what_bounded_the_run(source: feed.Source, runs: str) -> None:
    run = job(feed.map(source, doubled), runs=runs).run(workers=1)
    shares = {
        stage: [
            run.scalars(f"feed/{stage}/{what}").values for what in ("busy", "starved", "blocked")
        ]
        for stage in ("read", "doubled", "compute")
    }
    for stage, values in shares.items():
        assert all(len(v) for v in values), stage
        assert np.allclose(np.sum(values, axis=0), 1, atol=0.01), stage
    stage, busy = run.result["bounded_by"]
    assert stage in shares
    assert 0 < busy <= 1


def test_spools_go_with_the_run_and_stay_for_one_that_is_resumed(tmp_path: Path, runs: str) -> None:
    source = table(tmp_path / "table")

    def spools() -> dict[str, int]:
        """When each was closed; a worker's environment says where they are."""
        folder = os.environ.get("PENSTOCK_SPOOL")
        here = Path(folder).glob("*") if folder else Path(tempfile.gettempdir()).glob("*/*/*")
        ends = [path / "end.json" for path in here if (path / "end.json").exists()]
        return {str(end): end.stat().st_mtime_ns for end in ends}

    class Stop(Callback):
        def stepped(self, worker: Any) -> None:
            if worker.global_step == 20 and worker.rank == 0:
                worker.stop("interrupted")

    folder = str(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        job(source, callbacks=[Stop()]).run(workers=2, run_dir=folder)
    kept = spools()
    assert len(kept) == SHARDS

    class Look(Callback):
        def started(self, worker: Any) -> None:
            Path(folder, f"looked-{worker.rank}").write_text(str(spools() == kept))

    resumed = job(source, callbacks=[Look()]).run(workers=1, resume=folder)
    assert Path(folder, "looked-0").read_text() == "True", "written anew"
    assert not spools()
    undisturbed = job(source, runs=runs).run(workers=1)
    assert_same_bits(parameters_of(undisturbed), parameters_of(resumed))


def test_fewer_records_than_shards(tmp_path: Path, runs: str) -> None:
    few = table(tmp_path / "table")
    row = {"x": pa.array([[0.0] * WIDTH], pa.list_(pa.float32())), "y": [1]}
    pq.write_table(pa.table(row), tmp_path / "one.parquet")
    one = feed.parquet(tmp_path / "one.parquet", features="x", target="y")
    for workers in (2, 4):
        run = job(few, test=one, runs=runs, epochs=1).run(workers=workers)
        assert run.evaluation is not None
        assert run.evaluation.examples == 1


def test_data_that_has_changed_is_noticed_in_an_evaluation_too(runs: str, tmp_path: Path) -> None:
    class Stop(Callback):
        def stepped(self, worker: Any) -> None:
            if worker.global_step == 25 and worker.rank == 0:
                worker.stop("interrupted")

    folder = str(tmp_path / "stopped")
    test = feed.stream(fewer, partitions=len(SIZES))
    values: dict[str, Any] = {"evaluate": {"every": "20 steps"}, "runs": runs}
    with pytest.raises(Interrupted):
        job(streamed(), test=test, callbacks=[Stop()], **values).run(workers=2, run_dir=folder)
    other = feed.stream(partial(counted), partitions=len(SIZES))
    with pytest.raises(DataError, match="test has changed since the run began"):
        job(streamed(), test=other, **values).run(workers=2, resume=folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_left_out_counted_and_kept(
    workers: int, tmp_path: Path, runs: str, capfd: pytest.CaptureFixture[str]
) -> None:
    x, y = rows_of(4)
    lists: list[Any] = x.tolist()
    lists[17], lists[200] = None, lists[200][:-1]
    folder = tmp_path / "bad"
    folder.mkdir()
    pq.write_table(
        pa.table({"x": pa.array(lists, pa.list_(pa.float32())), "y": y}), folder / "a.parquet", 50
    )
    row = 17 if workers == 1 else r"(17|200)"  # whichever is read first
    with pytest.raises(DataError, match=rf"a.parquet.*row {row}"):
        job(feed.parquet(folder, features="x", target="y"), runs=runs).run(workers=workers)
    kept = feed.parquet(folder, features="x", target="y", on_bad_record="quarantine")
    run = job(kept, runs=runs, epochs=1).run(workers=workers)
    assert run.result["bad_records"] == {"train": 2}
    assert run.result["examples"] == len(x) - 2
    assert "2 bad records left out" in capfd.readouterr().err
    lines = [
        json.loads(line)
        for path in Path(run.url, "quarantine").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert sorted(line["row"] for line in lines) == [17, 200]
    assert all(line["reason"] for line in lines)
