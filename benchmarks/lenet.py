"""LeNet on full MNIST, 32 examples a step on each of 2 workers of 1 thread: examples/s beside
peers, and seconds from the call to the first step.

    limit       two plain PyTorch loops that never talk; their sum is the physical limit
    meeting 5   the same loops, waiting for each other every 5 steps, with nothing to say: what
    meeting 1   noise alone costs those who must agree, every 5 steps or every step
    ddp         torch's DistributedDataParallel on gloo, and on the backend "penstock"
    averaging   Penstock, parameters averaged every 5 steps
    allreduce   Penstock, gradients summed every step

Rates: the same two processes take turns with all of them, 50 steps each, some 40 times over, so
that all see the same noise of a shared machine; printed are medians, and the median of the ratio
to the limit in the same turn. First steps: each measured in a fresh process, in rounds, beside
pyspark's TorchDistributor in local mode (a session is up already).

    python benchmarks/lenet.py [--data FOLDER] [--turns 40] [--rounds 5]

FOLDER holds the four idx files of MNIST; without it the 10,000 images that the package carries
serve.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penstock import AllReduce, Averaging, Job, Worker, feed, zoo
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.plan import Plan
from penstock.runtime import optimizers  # noqa: F401  as in a worker
from penstock.runtime.heap import keep_freed_memory
from penstock.runtime.store import Store
from penstock.runtime.worker import Settings

BATCH, WORKERS, STEPS_A_TURN = 32, 2, 50
OPTIMIZER = functools.partial(torch.optim.Adagrad, lr=0.01, weight_decay=5e-4)


def arrays(data: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The training images, float32 (N, 1, 28, 28), and labels, int64 (N,)."""
    source = feed.mnist(data)
    manifest = source.manifest()
    x, y = source.open(manifest.share(0, 1)).take(np.arange(manifest.rows))
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    return x, y


def plain(x: torch.Tensor, y: torch.Tensor, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """A plain loop that pauses after each step."""
    network = wrap(zoo.lenet())
    optimizer = OPTIMIZER(network.parameters())
    while True:
        order = torch.randperm(len(x))
        for step in range(len(x) // BATCH):
            index = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[index]), y[index]).backward()
            optimizer.step()
            yield


def meeting(loop: Iterator[None], every: int, group: Communicator) -> Iterator[None]:
    """A loop that waits for the other process every so many steps."""
    said, heard = torch.zeros(1), torch.zeros(WORKERS, 1)
    for step, _ in enumerate(loop, 1):
        if step % every == 0:
            group.all_gather(heard, said, sync=True)
        yield


def of_penstock(
    strategy: AllReduce | Averaging, source: feed.Source, group: Communicator, folder: str
) -> Iterator[None]:
    """A worker's loop that pauses after each step."""
    plan = Plan(WORKERS, 1, 0, None, "cpu", {"train": source.manifest()})
    store = Store(f"{folder}/{type(strategy).__name__}")
    settings = Settings(strategy)
    worker = Worker(group, plan, {"train": source}, settings, store, None, json.dumps, list)
    network, _ = worker.prepare(zoo.lenet, OPTIMIZER)
    for batch in worker.batches("train", epochs=1_000, batch_size=BATCH):
        worker.step(torch.nn.functional.cross_entropy(network(batch.x), batch.y))
        yield


def take_turns(rank: int, data: str | None, turns: int, folder: str, queue: Any) -> None:
    """One of two processes that run all loops in turn; puts the seconds of each turn.

    They are set up as workers are, by which the plain loops gain as well.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    x, y = arrays(data)
    x, y = x[rank::WORKERS], y[rank::WORKERS]
    source = feed.mnist(data)
    store = torch.distributed.FileStore(f"{folder}/rendezvous", WORKERS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    ours = torch.distributed.new_group(backend="penstock")
    prefixed = torch.distributed.PrefixStore("benchmark", store)
    group = connect(prefixed, rank, WORKERS, timeout_s=300.0)
    ddp = torch.nn.parallel.DistributedDataParallel
    loops = {
        "limit": plain(x, y, lambda network: network),
        "meeting 5": meeting(plain(x, y, lambda network: network), 5, group),
        "meeting 1": meeting(plain(x, y, lambda network: network), 1, group),
        "ddp": plain(x, y, ddp),
        "ddp, penstock": plain(x, y, functools.partial(ddp, process_group=ours)),
        "averaging": of_penstock(Averaging(every=5), source, group, folder),
        "allreduce": of_penstock(AllReduce(), source, group, folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(turns + 1):
        for name, loop in loops.items():
            group.barrier()
            began = time.perf_counter()
            for _ in range(STEPS_A_TURN):
                next(loop)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    queue.put(seconds)
    group.barrier()


def rates(data: str | None, turns: int) -> dict[str, list[float]]:
    """Examples/s of both processes together, in each turn, by loop."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=take_turns, args=(rank, data, turns, folder, queue))
            for rank in range(WORKERS)
        ]
        for process in processes:
            process.start()
        found = [queue.get(timeout=60 + 20 * turns) for _ in processes]
        for process in processes:
            process.join(60)
    examples = STEPS_A_TURN * BATCH
    return {
        name: [sum(examples / s for s in both) for both in zip(*(f[name] for f in found))]
        for name in found[0]
    }


def first_of_ddp(data: str | None) -> float:
    """When a rank of DistributedDataParallel had made its first step; the environment names it."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    next(plain(*arrays(data), torch.nn.parallel.DistributedDataParallel))
    first = time.time()
    dist.destroy_process_group()
    return first


def ddp_rank(rank: int, data: str | None, port: int, queue: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORKERS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    queue.put(first_of_ddp(data))


def ddp(data: str | None) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = 20_000 + os.getpid() % 20_000
    called = time.time()
    for rank in range(WORKERS):
        context.Process(target=ddp_rank, args=(rank, data, port, queue)).start()
    return max(queue.get(timeout=500) for _ in range(WORKERS)) - called


def torchdistributor(data: str | None) -> float:
    os.environ["OMP_NUM_THREADS"] = "1"
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

    spark = (
        SparkSession.builder.master(f"local[{WORKERS}]")
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    called = time.time()
    distributor = TorchDistributor(num_processes=WORKERS, local_mode=True, use_gpu=False)
    first = distributor.run(first_of_ddp, data)
    spark.stop()
    return float(first - called)


def penstock(strategy: AllReduce | Averaging, data: str | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            network=zoo.lenet,
            loss="cross_entropy",
            optimizer=OPTIMIZER,
            train=feed.mnist(data, "train"),
            batch_size=BATCH,
            epochs=1,
            workers=WORKERS,
            threads=1,
            strategy=strategy,
        )
        run = job.run(run_dir=f"{folder}/run", progress=False)
        return float(run.result["seconds_to_first_step"])


PEERS: dict[str, Callable[[str | None], float]] = {
    "ddp": ddp,
    "torchdistributor": torchdistributor,
    "averaging": functools.partial(penstock, Averaging(every=5)),
    "allreduce": functools.partial(penstock, AllReduce()),
}


def first_steps(data: str | None, rounds: int) -> dict[str, list[float]]:
    """Seconds from the call to the first step, each in a fresh process, in turn."""
    found: dict[str, list[float]] = {name: [] for name in PEERS}
    for _ in range(rounds):
        for name in PEERS:
            command = [sys.executable, str(Path(__file__)), "--one", name]
            command += ["--data", data] if data else []
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
            else:
                found[name].append(float(done.stdout.split()[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of MNIST's four idx files")
    parser.add_argument("--turns", type=int, default=40, help="of 50 steps, for rates")
    parser.add_argument("--rounds", type=int, default=5, help="of processes, for first steps")
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    from collectives import hardware  # type: ignore[import-not-found]

    options = parser.parse_args()
    if options.one:
        print(PEERS[options.one](options.data))
        return
    print(hardware())
    if options.turns:
        found = rates(options.data, options.turns)
        print(f"{'':18}{'examples/s':>12}{'of the limit':>14}   quarter to three quarters")
        for name, values in found.items():
            shares = sorted(v / limit for v, limit in zip(values, found["limit"]))
            low, high = shares[len(shares) // 4], shares[3 * len(shares) // 4]
            print(
                f"{name:18}{statistics.median(values):12,.0f}{statistics.median(shares):14.3f}"
                f"   {low:.3f} to {high:.3f}"
            )
    if options.rounds:
        print(f"{'':18}{'first step':>12}")
        for name, values in first_steps(options.data, options.rounds).items():
            if values:
                print(f"{name:18}{statistics.median(values):10.2f} s")


if __name__ == "__main__":
    main()
