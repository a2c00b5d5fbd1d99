"""LeNet on a Spark cluster whose session is up: seconds from the call to the first step, and
examples/s from there on, beside pyspark's TorchDistributor.

    penstock           job.run(on=spark): the images lie in a DataFrame, the agents spool them
    torchdistributor   TorchDistributor(num_processes=2, local_mode=False): DistributedDataParallel
                       on gloo; each process reads the images from the files, as its users do

The cluster is a real one on this machine: a master, two workers of one core each, all JVMs of their
own. Both train on the same images with 32 examples a step on each of 2 workers of 1 thread; they
take turns, and medians are printed.

    python benchmarks/spark.py [--data FOLDER] [--rounds 5] [--steps 300]

FOLDER holds the four idx files of MNIST; without it the 10,000 images of the package serve.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from penstock import AllReduce, Averaging, Job, feed, zoo

CONF = {
    "spark.ui.enabled": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.executor.memory": "1g",
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
    "spark.log.level": "ERROR",
}

BATCH, WORKERS = 32, 2
OPTIMIZER = functools.partial(torch.optim.Adagrad, lr=0.01, weight_decay=5e-4)


class Cluster:
    """A master and two workers on this machine."""

    def __init__(self, folder: str) -> None:
        import pyspark

        home = Path(pyspark.__file__).parent
        self._environment = os.environ | {
            "SPARK_HOME": str(home),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_LOCAL_DIRS": folder,
            "SPARK_DAEMON_MEMORY": "256m",
        }
        self._java, self._folder = str(home / "bin" / "spark-class"), folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.port = 20_000 + os.getpid() % 20_000
        deploy = "org.apache.spark.deploy"
        self._start(f"{deploy}.master.Master", "--port", str(self.port), log="master")
        for n in range(WORKERS):
            size = ["--cores", "1", "--memory", "1500m", "--work-dir", f"{folder}/work"]
            self._start(
                f"{deploy}.worker.Worker", *size, f"spark://127.0.0.1:{self.port}", log=f"w{n}"
            )

    def _start(self, main: str, *arguments: str, log: str) -> None:
        with open(f"{self._folder}/{log}.log", "wb") as out:
            command = [self._java, main, "--host", "127.0.0.1", "--webui-port", "0", *arguments]
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self._environment,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def close(self) -> None:
        for daemon in reversed(self._daemons):
            os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait(30)


def of_rows() -> torch.nn.Module:
    """LeNet on rows of 784 numbers."""
    return torch.nn.Sequential(torch.nn.Unflatten(1, (1, 28, 28)), zoo.lenet())


def penstock(spark: Any, frame: Any, strategy: AllReduce | Averaging, steps: int) -> list[float]:
    """Seconds to the first step, and examples/s."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            network=of_rows,
            loss="cross_entropy",
            optimizer=OPTIMIZER,
            train=feed.dataframe(frame, features="x", target="y"),
            batch_size=BATCH,
            epochs=1 + steps * BATCH * WORKERS // frame.count(),
            workers=WORKERS,
            threads=1,
            strategy=strategy,
            callbacks=[_Clock(f"{folder}/seconds", steps)],
        )
        called = time.time()
        job.run(on=spark, run_dir=f"{folder}/run", progress=False)
        return _seen(Path(f"{folder}/seconds"), called, steps)


class _Clock:
    """Notes when the first step and the last one that counts were made, and stops."""

    def __init__(self, path: str, steps: int) -> None:
        self._path, self._steps = path, steps

    def __call__(self, worker: Any) -> None:
        if worker.rank == 0 and worker.global_step in (1, self._steps):
            with open(self._path, "a") as file:
                file.write(f"{time.time()}\n")
        if worker.global_step == self._steps:
            worker.stop("measured")


def _seen(path: Path, called: float, steps: int) -> list[float]:
    first, last = map(float, path.read_text().split())
    return [first - called, (steps - 1) * BATCH * WORKERS / (last - first)]


def of_ddp(data: str | None, steps: int) -> list[float]:
    """What each process of TorchDistributor runs; when it made its first and its last step."""
    import torch.distributed as dist
    from lenet import arrays, plain  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, y = arrays(data)
    loop = plain(x[rank::WORKERS], y[rank::WORKERS], torch.nn.parallel.DistributedDataParallel)
    next(loop)
    first = time.time()
    for _ in range(steps - 1):
        next(loop)
    last = time.time()
    dist.destroy_process_group()
    return [first, last]


def torchdistributor(spark: Any, data: str | None, steps: int) -> list[float]:
    from pyspark.ml.torch.distributor import TorchDistributor

    called = time.time()
    distributor = TorchDistributor(num_processes=WORKERS, local_mode=False, use_gpu=False)
    first, last = distributor.run(of_ddp, data, steps)
    return [first - called, (steps - 1) * BATCH * WORKERS / (last - first)]


@contextmanager
def session(folder: str, conf: Mapping[str, str] | None = None) -> Iterator[Any]:
    """A session on a cluster of its own on this machine."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    from pyspark.sql import SparkSession

    cluster = Cluster(folder)
    try:
        builder = SparkSession.builder.master(f"spark://127.0.0.1:{cluster.port}")
        for key, value in (CONF | dict(conf or {})).items():
            builder = builder.config(key, value)
        spark = builder.getOrCreate()
        yield spark
        spark.stop()
    finally:
        cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of MNIST's four idx files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    from collectives import hardware  # type: ignore[import-not-found]

    options = parser.parse_args()
    options.data = options.data and str(Path(options.data).resolve())  # executors work elsewhere
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # for the peers' processes
    from lenet import arrays

    with tempfile.TemporaryDirectory() as folder, session(folder) as spark:
        import pyarrow as pa

        x, y = arrays(options.data)
        images = pa.FixedSizeListArray.from_arrays(pa.array(x.numpy().reshape(-1)), 784)
        table = pa.table({"x": images.cast(pa.list_(pa.float32())), "y": y.numpy()})
        import pyarrow.parquet as pq

        pq.write_table(table, f"{folder}/mnist.parquet", row_group_size=len(y) // 4)
        frame = spark.read.parquet(f"{folder}/mnist.parquet").repartition(WORKERS).cache()
        frame.count()
        loops: dict[str, Callable[[], list[float]]] = {
            "torchdistributor": lambda: torchdistributor(spark, options.data, options.steps),
            "penstock, averaging": lambda: penstock(
                spark, frame, Averaging(every=5), options.steps
            ),
            "penstock, all-reduce": lambda: penstock(spark, frame, AllReduce(), options.steps),
        }
        found: dict[str, list[list[float]]] = {name: [] for name in loops}
        for _ in range(options.rounds):
            for name, run in loops.items():
                found[name].append(run())
                print(name, found[name][-1], file=sys.stderr, flush=True)
    print(hardware())
    print(f"{'':24}{'first step':>12}{'examples/s':>12}")
    for name, rounds in found.items():
        firsts, rates = zip(*rounds)
        print(f"{name:24}{statistics.median(firsts):10.2f} s{statistics.median(rates):12,.0f}")


if __name__ == "__main__":
    main()
