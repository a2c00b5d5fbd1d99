"""Runs with a trace: a file for each rank, and what is in it; without, none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import penstock
from penstock import AllReduce, Callback, Checkpoint, Job, Run, feed
from penstock.errors import RunError, WorkerFailed
from penstock.testing import assert_same_bits

Event = dict[str, Any]


def network() -> torch.nn.Module:
    layers = [torch.nn.Linear(16, 40), torch.nn.Linear(40, 40), torch.nn.Linear(40, 2)]
    return torch.nn.Sequential(*layers)


def job(**changes: Any) -> Job:
    generator = np.random.default_rng(7)
    x = generator.normal(size=(80, 16)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    values: dict[str, Any] = {
        "network": network,
        "loss": "cross_entropy",
        "optimizer": torch.optim.SGD,
        "train": feed.arrays(x, y),
        "test": feed.arrays(x[:20], y[:20]),
        "batch_size": 10,
        "epochs": 1,
        "workers": 2,
        "strategy": AllReduce(bucket_bytes=4096),  # so that there are several
    }
    return Job(**values | changes)


def events(run: Run | Path, rank: int, generation: str = "") -> list[Event]:
    folder = Path(run.url if isinstance(run, Run) else run)
    document = json.loads((folder / "trace" / f"rank-{rank}{generation}.json").read_bytes())
    found: list[Event] = document["traceEvents"]
    for event in found:
        assert {"ph", "ts", "pid", "tid", "name"} <= event.keys(), event
        assert event["pid"] == rank
    return found


def spans(found: list[Event], thread: int) -> list[tuple[int, int, str]]:
    """Begin, end and name."""
    return [
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in found
        if e["ph"] == "X" and e["tid"] == thread
    ]


def assert_nested(found: list[tuple[int, int, str]]) -> None:
    open_ends: list[int] = []
    for began, ended, name in found:
        while open_ends and began >= open_ends[-1]:
            open_ends.pop()
        assert not open_ends or ended <= open_ends[-1], name
        open_ends.append(ended)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("traces") / "run"
    return job().run(run_dir=str(folder), trace=True, progress=False)


def test_every_rank_writes_one(traced: Run) -> None:
    names = sorted(path.name for path in (Path(traced.url) / "trace").iterdir())
    assert names == ["rank-0.json", "rank-1.json"]
    for rank in (0, 1):
        found = events(traced, rank)
        main = spans(found, 0)
        assert_nested(main)
        assert_nested(spans(found, 1))
        names = [name for _, _, name in main]
        assert [n for n in names if n.startswith("step ")] == [f"step {n}" for n in range(1, 5)]
        for name in ("feed", "forward", "backward", "exchange and update", "update"):
            assert names.count(name) == 4, name
        assert names.count("evaluation on test") == 1
        assert "checkpoint" in names


def test_waits_are_named(traced: Run) -> None:
    found = events(traced, 1)
    steps = {name: (began, ended) for began, ended, name in spans(found, 0)}
    began, ended = steps["step 3"]
    waits = {n for at, _, n in spans(found, 0) if n.startswith("wait for") and began <= at < ended}
    exchanged = [n for at, _, n in spans(found, 1) if began <= at < ended]
    whats = {name.partition(" of ")[2].split(",")[0] for name in waits}
    assert whats == {"bucket 1 of 2", "bucket 2 of 2"}
    # The last bucket may run in the thread that waits for it.
    assert " of bucket 1 of 2, sum over shards float32 (" in exchanged[0]
    assert ", number " in exchanged[0]
    assert f"wait for {exchanged[0]}" in waits


def test_ranks_are_shown_at_the_same_time(traced: Run) -> None:
    ranks = [{n: (b, e) for b, e, n in spans(events(traced, rank), 0)} for rank in (0, 1)]
    for step in range(1, 5):
        (began, ended), (other_began, other_ended) = (rank[f"step {step}"] for rank in ranks)
        assert max(began, other_began) < min(ended, other_ended), f"step {step}"


def test_clocks_of_ranks_agree(traced: Run) -> None:
    """No rank has another's part in a collective before that one has begun it."""
    ends, begins = {}, {}
    for rank in (0, 1):
        for event in events(traced, rank):
            number = event.get("args", {}).get("number")
            if event["ph"] == "X" and number is not None and "broadcast" not in event["name"]:
                key = (rank, number)
                begins[key] = min(begins.get(key, event["ts"]), event["ts"])
                ends[key] = max(ends.get(key, 0), event["ts"] + event["dur"])
    assert len(begins) > 20
    for rank, number in begins:
        slack_us = 100
        assert begins[rank, number] <= ends[1 - rank, number] + slack_us


def test_without_there_is_none_and_the_bits_are_the_same(traced: Run, tmp_path: Path) -> None:
    plain = job().run(run_dir=str(tmp_path / "run"), progress=False)
    assert not (tmp_path / "run" / "trace").exists()
    tensors = [run.checkpoint().tensors("network.safetensors")[0] for run in (plain, traced)]
    assert_same_bits(*tensors)


def breaks_down(worker: penstock.Worker) -> None:
    network, _ = worker.prepare(torch.nn.Linear(16, 2), torch.optim.SGD)
    for batch in worker.batches("train", epochs=1, batch_size=10):
        if worker.global_step == 2:
            raise ValueError("this loop is broken")
        worker.step(torch.nn.functional.cross_entropy(network(batch.x), batch.y))


def test_a_run_that_fails_leaves_its_trace(tmp_path: Path) -> None:
    train = feed.arrays(np.zeros((80, 16), np.float32), np.zeros(80, np.int64))
    with pytest.raises(WorkerFailed, match="this loop is broken"):
        penstock.launch(
            breaks_down, train=train, run_dir=str(tmp_path / "run"), trace=True, progress=False
        )
    found = events(tmp_path / "run", 0)
    unfinished = [e["name"] for e in found if e.get("args", {}).get("unfinished")]
    assert unfinished == ["step 3", "forward"]


class Dies(Callback):
    """Rank 1 of the first generation is killed after step 2."""

    def stepped(self, worker: Any) -> None:
        if (worker.global_step, worker.rank, os.environ["PENSTOCK_GENERATION"]) == (2, 1, "1"):
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_generation_does_not_write_over_another(tmp_path: Path) -> None:
    asked = job(callbacks=[Dies()], checkpoint=Checkpoint(every="1 step"))
    run = asked.run(run_dir=str(tmp_path / "run"), trace=True, progress=False)
    assert run.result["restarts"] == 1
    for rank in (0, 1):
        assert events(run, rank)[0]["ph"] == "M"
        names = [name for _, _, name in spans(events(run, rank, ".generation-2"), 0)]
        assert "step 4" in names
        assert "step 1" not in names


def test_a_place_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "trace").write_text("a file, where a folder should be")
    with pytest.raises(RunError, match=r"run/trace/rank-\d\.json cannot be written"):
        job().run(run_dir=str(folder), trace=True, progress=False)
    assert Run(str(folder)).checkpoints == []
    other = tmp_path / "other"
    other.mkdir()
    (other / "trace").write_text("nobody writes there")
    assert job().run(run_dir=str(other), progress=False).result["step"] == 4


def test_the_command_says_where_they_are(tmp_path: Path) -> None:
    lenet = Path(__file__).parents[2] / "examples" / "lenet.yaml"
    small = ["--set", "epochs=1", "--set", "train.mnist.split=test", "--set", "batch_size=500"]
    code = "from penstock.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", lenet, *small, "--run-dir", "here", "--trace"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "open here/trace/rank-*.json in ui.perfetto.dev" in done.stderr
    assert "step 2" in [name for _, _, name in spans(events(tmp_path / "here", 1), 0)]
