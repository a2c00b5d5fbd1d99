"""The network is measured once in a run, written down, and taken as it was written ever after."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import penstock
from penstock import Run, feed
from penstock.errors import RunError
from penstock.exchange import shm
from penstock.exchange.network import Network

WORKERS = 3


class Apart:
    """A training function whose workers cannot share memory, as if each were on a host of its own:
    they unpickle it before they look for whom they share memory with."""

    def __init__(self, function: Callable[[penstock.Worker], None]) -> None:
        self.function = function

    def __call__(self, worker: penstock.Worker) -> None:
        self.function(worker)

    def __reduce__(self) -> tuple[Any, ...]:
        return _apart, (self.function,)


def _apart(function: Callable[[penstock.Worker], None]) -> Apart:
    shm.possible = lambda: False
    return Apart(function)


def make_network() -> nn.Module:
    return nn.Linear(4, 2)


def train(worker: penstock.Worker, seen: Path, killed: bool = False) -> None:
    """Writes down the network that a worker has, and trains a little."""
    found = worker._group.network  # type: ignore[attr-defined]
    told = seen / f"{len(list(seen.iterdir()))}-rank-{worker.rank}"
    told.write_text(json.dumps(found.to_json() if found else None))
    module, _ = worker.prepare(make_network, partial(torch.optim.SGD, lr=0.1))
    for batch in worker.batches("train", epochs=2, batch_size=4):
        worker.step(nn.functional.cross_entropy(module(batch.x), batch.y))
        if killed and not worker.resumed and worker.global_step == 2:
            worker.checkpoint()
        if killed and not worker.resumed and worker.global_step == 4 and worker.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def start(tmp_path: Path, runs: str) -> Callable[..., tuple[Run, list[Any]]]:
    """Runs; returns the run, and what its workers had as their network."""

    def launch(*, apart: bool = True, killed: bool = False, **how: Any) -> tuple[Run, list[Any]]:
        seen = tmp_path / f"seen-{len(list(tmp_path.iterdir()))}"
        seen.mkdir()
        numbers = np.random.default_rng(1)
        source = feed.arrays(
            numbers.normal(size=(60, 4)).astype(np.float32), numbers.integers(0, 2, 60)
        )
        function: Any = partial(train, seen=seen, killed=killed)
        values = {"workers": WORKERS, "shards": WORKERS, "runs": runs, "name": "apart"} | how
        run = penstock.launch(
            Apart(function) if apart else function, train=source, progress=False, **values
        )
        return run, [json.loads(path.read_text()) for path in seen.iterdir()]

    return launch


def test_workers_on_one_host_measure_nothing(start: Callable[..., Any]) -> None:
    run, seen = start(apart=False)
    assert seen == [None] * WORKERS
    assert not Path(run.url, "network.json").exists()


def test_what_is_measured_is_kept_and_taken_again(start: Callable[..., Any]) -> None:
    run, seen = start()
    written = json.loads(Path(run.url, "network.json").read_text())
    assert seen == [written] * WORKERS, "all ranks have the same, and it is what was written"
    assert Network.from_json(written).table.hosts == ((0,), (1,), (2,))

    # What is written counts, whatever would be measured now.
    written["table"]["topologies"]["all_gather"]["any"] = [
        {"up_to_bytes": None, "topology": "ring"}
    ]
    Path(run.url, "network.json").write_text(json.dumps(written))
    _, seen = start(resume=run)
    assert seen == [written] * WORKERS
    assert json.loads(Path(run.url, "network.json").read_text()) == written

    # Other workers are another network.
    _, seen = start(resume=run, workers=2)
    again = json.loads(Path(run.url, "network.json").read_text())
    assert seen == [again] * 2
    assert len(again["names"]) == 2

    other, seen = start()
    assert seen[0] != written, "another run measures for itself"
    assert other.url != run.url


def test_a_restart_takes_what_was_measured_before(start: Callable[..., Any]) -> None:
    run, seen = start(killed=True)
    assert run.result["restarts"] == 1
    written = json.loads(Path(run.url, "network.json").read_text())
    assert seen == [written] * (2 * WORKERS)


def test_a_file_that_is_none_is_named(start: Callable[..., Any]) -> None:
    run, _ = start()
    path = Path(run.url, "network.json")
    path.write_text(path.read_text().replace("bytes_per_s", "bits_per_s", 1))
    with pytest.raises(RunError, match=r"network\.json: .*links\.near is \['bits_per_s") as caught:
        start(resume=run)
    assert "delete it" in caught.value.hint
