"""Training on rows that Spark still computes: it begins with the first, and ends with the last."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_spark_faults import AGENT, PROCESS, ancestor, generation
from torch import nn

from penstock import Callback, Job, Run, feed
from penstock.errors import DataError
from penstock.testing import assert_same_bits

ROW_BYTES = 2**18
"""Of x: 64 rows of it are the first that can be trained on."""
FIRST, LAST = 128, 24
"""Rows of a partition that come at once, and those that come late."""


def coming(
    session: Any, *, partitions: int = 2, pause_s: float = 0.0, then: str = "end", late: str = ""
) -> Any:
    """A DataFrame whose partitions give `FIRST` rows, pause, and give `LAST` more; y is the row.

    Arguments:
        then: "end"; "go on", with no end; or "break", with a row of another length.
        late: a file to be written before the last rows come.
    """
    first, last, row_bytes = FIRST, LAST, ROW_BYTES

    def rows(batches: Iterator[Any]) -> Iterator[Any]:
        import time
        from pathlib import Path

        import numpy as np
        import pyarrow as pa

        number = next(batches).column(0)[0].as_py()

        def some(start: int, stop: int) -> Any:
            y = np.arange(start, stop) + 1000 * number
            x = [(i % 251).to_bytes(1, "big") * row_bytes for i in y.tolist()]
            return pa.record_batch({"x": pa.array(x), "y": pa.array(y)})

        for start in range(0, first, 16):  # Spark keeps the end of each until the next comes
            yield some(start, start + 16)
        time.sleep(pause_s)
        if late:
            Path(late).write_text(str(time.time()))
        if then == "break":
            yield pa.record_batch({"x": pa.array([b"short"]), "y": pa.array([0])})
        yield some(first, first + last)
        while then == "go on":
            yield some(first + last, 2 * first)
            time.sleep(0.2)

    return session.range(0, partitions, 1, partitions).mapInArrow(rows, "x binary, y long")


class Same:
    """The same rows on this machine, for `feed.stream`."""

    def __call__(self, partition: int) -> Iterator[tuple[Any, Any]]:
        y = np.arange(FIRST + LAST) + 1000 * partition
        yield np.repeat((y % 251).astype(np.uint8)[:, None], ROW_BYTES, axis=1), y


class Head(nn.Module):
    """Looks at a few of the values, and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.2), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x[:, :8].float() / 255)
        return out.squeeze(1)


def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(out, (y % 7).float())


def job(train: Any, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "network": Head,
        "loss": loss,
        "optimizer": functools.partial(torch.optim.SGD, lr=0.01),
        "train": train,
        "batch_size": 8,
        "epochs": 2,
        "workers": 2,
        "shards": 2,
        "threads": 1,
        "checkpoint": {"every": "4 steps"},
    }
    return Job(**(values | changes))


def on_spark(frame: Any, on_bad_record: str = "error", **changes: Any) -> Job:
    source = feed.dataframe(frame, features="x", target="y", on_bad_record=on_bad_record)
    return job(source, **changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.checkpoint().tensors("network.safetensors")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of this machine, by one worker."""
    folder = tmp_path_factory.mktemp("whole")
    asked = job(feed.stream(Same(), partitions=2), workers=1)
    return asked.run(run_dir=str(folder / "run"), progress=False)


def test_it_trains_while_rows_are_computed(spark: Any, whole: Run, tmp_path: Path) -> None:
    run = on_spark(coming(spark, pause_s=8)).run(
        on=spark, run_dir=str(tmp_path / "run"), progress=False
    )
    assert run.result["seconds"] - run.result["seconds_to_first_step"] > 2
    assert run.result["examples"] == 2 * 2 * (FIRST + LAST)
    assert_same_bits(weights(run), weights(whole))


@pytest.mark.torture
def test_one_worker_has_the_same_bits(spark: Any, whole: Run, tmp_path: Path) -> None:
    asked = on_spark(coming(spark), workers=1)
    run = asked.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert_same_bits(weights(run), weights(whole))
    other = asked.replace(seed=1).run(on=spark, run_dir=str(tmp_path / "other"), progress=False)
    with pytest.raises(AssertionError):
        assert_same_bits(weights(other), weights(whole))


def test_it_trains_on_what_never_ends_until_it_is_stopped(spark: Any, tmp_path: Path) -> None:
    asked = on_spark(coming(spark, then="go on"), stop={"time": "6 s"})
    began = time.monotonic()
    run = asked.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert run.result["status"] == "stopped"
    assert run.result["epoch"] == 0
    assert run.result["step"] > 16  # 8 of a shard's rows in each: more than came at once
    assert time.monotonic() - began < 40


@pytest.mark.torture
def test_connect_trains_while_rows_are_computed(connect: Any, whole: Run, tmp_path: Path) -> None:
    run = on_spark(coming(connect, pause_s=8)).run(
        on=connect, run_dir=str(tmp_path / "run"), progress=False
    )
    assert run.result["seconds"] - run.result["seconds_to_first_step"] > 2
    assert_same_bits(weights(run), weights(whole))


# What goes wrong meanwhile


def test_a_bad_row_ends_the_run_soon(spark: Any, tmp_path: Path) -> None:
    late = tmp_path / "late"
    asked = on_spark(coming(spark, pause_s=6, then="break", late=str(late)))
    with pytest.raises(DataError, match=rf"train: partition \d: column 'x': row {FIRST} holds 5"):
        asked.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert time.time() - float(late.read_text()) < 8  # 2 s, and then all has to leave
    assert (tmp_path / "run" / "checkpoints").exists()  # it had trained


def test_a_bad_row_is_left_out(spark: Any, whole: Run, tmp_path: Path) -> None:
    asked = on_spark(coming(spark, then="break"), on_bad_record="quarantine")
    run = asked.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert_same_bits(weights(run), weights(whole))
    kept = [path.read_text() for path in (tmp_path / "run" / "quarantine").iterdir()]
    assert len(kept) == 2
    assert all(f'"row": {FIRST}' in text for text in kept)
    assert run.result["bad_records"] == {"train": 2}


class Kills(Callback):
    """Kills what a rank's worker descends from after a step of the first generation."""

    def __init__(self, what: int, rank: int, step: int, note: Path) -> None:
        self.what, self.at, self.note = what, (rank, step), note

    def stepped(self, worker: Any) -> None:
        if generation() == 1 and (worker.rank, worker.global_step) == self.at:
            victim = ancestor(self.what)
            self.note.write_text(str(time.time()))
            os.kill(victim, signal.SIGKILL)
            time.sleep(60)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(PROCESS, id="a worker", marks=pytest.mark.torture),
        pytest.param(AGENT, id="an agent"),
    ],
)
def test_what_dies_while_rows_are_computed(
    spark: Any, whole: Run, tmp_path: Path, what: int, capfd: Any
) -> None:
    kills = Kills(what, 1, 6, tmp_path / "killed")
    asked = on_spark(coming(spark, pause_s=5), callbacks=[kills])
    run = asked.run(on=spark, run_dir=str(tmp_path / "run"))
    assert run.result["restarts"] == 1
    assert "goes on from the checkpoint of step 4" in capfd.readouterr().err
    assert_same_bits(weights(run), weights(whole))


def test_rows_that_come_otherwise_when_read_again(spark: Any, tmp_path: Path) -> None:
    again = tmp_path / "again"

    def otherwise(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        for batch in batches:
            y = batch.column("y")
            if again.exists():
                y = pa.array([value + 1 for value in y.to_pylist()], y.type)
            yield pa.record_batch({"x": batch.column("x"), "y": y})

    kills = Kills(AGENT, 1, 6, again)
    asked = on_spark(
        coming(spark, pause_s=3).mapInArrow(otherwise, "x binary, y long"), callbacks=[kills]
    )
    with pytest.raises(DataError, match=r"train: partition \d was read again, by rank 1"):
        asked.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
