"""LeNet on full MNIST, 32 examples a step on each of 2 workers of 1 thread: examples/s, and seconds
from the call to the first step.

    limit             two plain PyTorch loops that never talk; their sum is the physical limit
    ddp               torch's DistributedDataParallel on gloo
    torchdistributor  the same, started by pyspark's TorchDistributor in local mode
    averaging         Penstock, parameters averaged every 5 steps
    allreduce         Penstock, gradients summed every step

Each measurement is a process of its own; they take turns (limit, ddp, ... limit, ddp, ...), so that
all see the same noise; medians are printed with the ratio to the limit of the same round.

    python benchmarks/lenet.py [--data FOLDER] [--rounds 5] [--only averaging allreduce]

FOLDER holds the four idx files of MNIST; without it the 10,000 images that the package carries
are read six times over.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from penstock import AllReduce, Averaging, Checkpoint, Job, feed, zoo

BATCH, WORKERS, WARM_UP = 32, 2, 50
OPTIMIZER = functools.partial(torch.optim.Adagrad, lr=0.01, weight_decay=5e-4)


def arrays(data: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """60,000 images, float32 (60000, 1, 28, 28), and labels, int64."""
    source = feed.mnist(data, "train")
    manifest = source.manifest()
    records = source.open(manifest.share(0, 1))
    import numpy as np

    x, y = records.take(np.arange(manifest.rows) % manifest.rows)
    repeats = 60_000 // manifest.rows
    return x.repeat(repeats, 1, 1, 1), y.repeat(repeats)  # type: ignore[union-attr]


def loop(
    network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, together: Callable[[], Any]
) -> dict[str, float]:
    """A plain loop over these examples; its rate after the warm-up."""
    optimizer = OPTIMIZER(network.parameters())
    order = torch.randperm(len(x))
    together()
    first = 0.0
    began = time.perf_counter()
    steps = len(x) // BATCH
    for step in range(steps):
        index = order[step * BATCH : (step + 1) * BATCH]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x[index]), y[index]).backward()
        optimizer.step()
        if step == 0:
            first = time.time()
        if step + 1 == WARM_UP:
            began = time.perf_counter()
    rate = (steps - WARM_UP) * BATCH / (time.perf_counter() - began)
    return {"rate": rate, "first": first}


def alone(rank: int, data: str | None, barrier: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    x, y = arrays(data)
    queue.put(loop(zoo.lenet(), x[rank::WORKERS], y[rank::WORKERS], barrier.wait))


def limit(data: str | None) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(WORKERS), context.Queue()
    called = time.time()
    for rank in range(WORKERS):
        context.Process(target=alone, args=(rank, data, barrier, queue)).start()
    found = [queue.get() for _ in range(WORKERS)]
    return {"rate": sum(f["rate"] for f in found), "first_s": found[0]["first"] - called}


def with_ddp(data: str | None) -> dict[str, float]:
    """One rank of DistributedDataParallel; rank and world size come from the environment."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = arrays(data)
    network = torch.nn.parallel.DistributedDataParallel(zoo.lenet())
    found = loop(network, x[rank::WORKERS], y[rank::WORKERS], dist.barrier)
    dist.destroy_process_group()
    return {"rate": found["rate"] * WORKERS, "first": found["first"]}


def ddp_rank(rank: int, data: str | None, port: int, queue: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORKERS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    queue.put(with_ddp(data))


def ddp(data: str | None) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    port = 20_000 + os.getpid() % 20_000
    called = time.time()
    for rank in range(WORKERS):
        context.Process(target=ddp_rank, args=(rank, data, port, queue)).start()
    found = [queue.get() for _ in range(WORKERS)]
    return {
        "rate": statistics.mean(f["rate"] for f in found),
        "first_s": found[0]["first"] - called,
    }


def torchdistributor(data: str | None) -> dict[str, float]:
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
    found = distributor.run(with_ddp, data)
    spark.stop()
    return {"rate": found["rate"], "first_s": found["first"] - called}


def penstock(strategy: AllReduce | Averaging, data: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        source = feed.mnist(data, "train")
        epochs = 60_000 // source.manifest().rows
        job = Job(
            network=zoo.lenet,
            loss="cross_entropy",
            optimizer=OPTIMIZER,
            train=source,
            batch_size=BATCH,
            epochs=epochs,
            workers=WORKERS,
            threads=1,
            strategy=strategy,
            checkpoint=Checkpoint(every=f"{100_000} steps"),
        )
        source = None  # what the manifest cost above is not to be found in a cache
        job = job.replace(train=feed.mnist(data, "train"))
        run = job.run(run_dir=f"{folder}/run", progress=False)
        loss = run.scalars("loss")
        begin = int((loss.steps >= WARM_UP).argmax())
        steps = int(loss.steps[-1] - loss.steps[begin])
        seconds = float(loss.wall_times[-1] - loss.wall_times[begin])
        return {
            "rate": steps * BATCH * WORKERS / seconds,
            "first_s": run.result["seconds_to_first_step"],
        }


PEERS: dict[str, Callable[[str | None], dict[str, float]]] = {
    "limit": limit,
    "ddp": ddp,
    "torchdistributor": torchdistributor,
    "averaging": functools.partial(penstock, Averaging(every=5)),
    "allreduce": functools.partial(penstock, AllReduce()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of MNIST's four idx files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(PEERS[options.one](options.data)))
        return
    names = [n for n in PEERS if n in options.only or n == "limit"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.rounds):
        for name in names:
            command = [sys.executable, str(Path(__file__)), "--one", name]
            command += ["--data", options.data] if options.data else []
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            if done.returncode or not lines:
                print(f"{name}: failed\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            found[name].append(json.loads(lines[-1]) | {"round": number})
            print(
                f"  round {number + 1} {name:17} {found[name][-1]['rate']:8,.0f} examples/s  "
                f"first step {found[name][-1]['first_s']:5.2f} s",
                file=sys.stderr,
            )
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    print(f"{os.cpu_count()} cores, {cpu}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}")
    print(f"{'':18}{'examples/s':>12}{'of the limit':>14}{'first step':>12}")
    limits = {f["round"]: f["rate"] for f in found["limit"]}
    for name, results in found.items():
        if results:
            rate = statistics.median(f["rate"] for f in results)
            share = statistics.median(f["rate"] / limits[f["round"]] for f in results)
            first = statistics.median(f["first_s"] for f in results)
            print(f"{name:18}{rate:12,.0f}{share:14.3f}{first:10.2f} s")


if __name__ == "__main__":
    main()
