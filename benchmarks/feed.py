"""The feed: records/s and MB/s that come to a training loop, beside peers and the limit.

    python benchmarks/feed.py [--rows mnist,4k,150k] [--megabytes 256] [--rounds 5] [--data FOLDER]

Files, one worker. Rows are MNIST's of 784 bytes, or binary of 4,096 or 150,000, and a label:

    raw gather           `ndarray.take` of a batch of random rows from memory, on one thread: what
                         memory allows
    first epoch          `feed.parquet`: read, checked and spooled while the loop takes batches
    later epochs         ... from the spool
    DataLoader           torch's, 2 processes, over an array that is a mapped file: record by
                         record, as most write it; and batched, by `__getitems__`
    DataLoader, Parquet  ... over row groups, which it reads and shuffles by itself

    python benchmarks/feed.py --spark [--rows ...] [--megabytes 256] [--rounds 3]

A DataFrame, cached on a standalone cluster on this machine (a master, two workers of one core), fed
to two workers:

    raw gather           as above, on two threads
    mapInArrow           a bare pass, which looks at no row: what Spark gives. Also with batches of
                         4 MiB, which suit it better than its defaults, and which Penstock sets
    first epoch          `feed.dataframe`: the rows that came after the first batch was wanted, by
                         the time from then to the epoch's end. (Spark gives rows while workers
                         start; those do not count, for they wait in the spool.)
    later epochs         ... from the spools
    manager queue        as TensorFlowOnSpark feeds: foreachPartition puts record by record into a
                         JoinableQueue of a `multiprocessing` manager, and a process takes them from
                         there. Fewer records, for it is slow
    TorchDistributor     pyspark's own way, `_train_on_dataframe` and its data loader; without the
                         time in which it writes the partition to a file before. Fewer records, too

Petastorm 0.13.1 takes no part: it imports pyarrow.filesystem, which newer Arrows do not have.

    python benchmarks/feed.py --lenet [--rounds 24] [--data FOLDER]

LeNet on two workers of that cluster, 32 examples a step each: one run for each strategy, in which
epochs with images from arrays in memory, from Parquet and from a DataFrame take turns. The first
epoch of each does not count.

The contenders take turns, in rounds; printed are medians, of the ratios in the same round as well.
Penstock's are runs of its own (`penstock.launch`) whose loop takes batches and does nothing with
them; times are taken in the workers.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import penstock
from penstock import AllReduce, Averaging, Worker, feed, zoo
from penstock.runtime.heap import keep_freed_memory

WORKERS = 2  # on Spark, and processes of a DataLoader
LATER = 16
"""Later epochs of a run, for one is over in a blink."""
LEAST = 0.2
"""Of the rows must come after the first batch was wanted, or their rate says nothing."""
REPEATED = 8
"""How often the cached rows come in the DataFrame: starting the workers takes longer than reading
them once."""


@dataclass(frozen=True)
class Kind:
    """Records of one size.

    Arguments:
        row_bytes: of the features; the label is an int64.
        batch: records of a batch.
        few: records that are enough for slow contenders.
    """

    row_bytes: int
    batch: int
    few: int


KINDS = {
    "mnist": Kind(784, 512, 10_000),
    "4k": Kind(4_096, 512, 4_000),
    "150k": Kind(150_000, 32, 300),
}


@dataclass(frozen=True)
class Data:
    """The same records in memory and in a folder: x.npy, rows.parquet."""

    kind: Kind
    x: NDArray[np.uint8]  # (rows, row_bytes)
    y: NDArray[np.int64]  # (rows,)
    folder: str

    @classmethod
    def make(cls, name: str, megabytes: int, mnist: str | None, folder: str) -> Data:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kind = KINDS[name]
        rows = megabytes * 1_000_000 // kind.row_bytes
        if name == "mnist":
            from lenet import arrays  # type: ignore[import-not-found]

            images, labels = (tensor.numpy() for tensor in arrays(mnist))
            pixels = (images * 255).round().astype(np.uint8).reshape(len(images), -1)
            x, y = (np.resize(a, (rows, *a.shape[1:])) for a in (pixels, labels))
        else:
            x = np.random.default_rng(0).integers(0, 256, (rows, kind.row_bytes), np.uint8)
            y = np.arange(rows) % 10
        np.save(f"{folder}/x.npy", x)
        offsets = np.arange(rows + 1, dtype=np.int32) * kind.row_bytes
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(x)]
        table = pa.table({"x": pa.BinaryArray.from_buffers(pa.binary(), rows, buffers), "y": y})
        pq.write_table(table, f"{folder}/rows.parquet", row_group_size=-(-rows // 16))
        return cls(kind, x, y, folder)


Rates = dict[str, float]
"""Records/s, by contender."""


# Files.


def gather(data: Data, threads: int) -> Rates:
    """Each thread its part of the rows, batch by batch in random order."""
    parts = np.array_split(np.random.default_rng().permutation(len(data.x)), threads)

    def run(order: NDArray[np.int64]) -> None:
        for _ in range(LATER):
            for start in range(0, len(order), data.kind.batch):
                data.x.take(order[start : start + data.kind.batch], axis=0)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, parts))
    return {"raw gather": LATER * len(data.x) / (time.perf_counter() - began)}


def take(worker: Worker, folder: str, epochs: int, batch_size: int) -> None:
    """Takes batches and does nothing with them; notes when, and what had come before."""
    worker.prepare(torch.nn.Linear(1, 1), functools.partial(torch.optim.SGD, lr=0.1))
    early = _bytes_come()
    times, epoch, rows = [time.time()], 0, 0
    last = times[0]
    for batch in worker.batches("train", epochs=epochs, batch_size=batch_size):
        if batch.epoch > epoch:
            times.append(last)
            epoch = batch.epoch
        last, rows = time.time(), rows + batch.size
    note = [rows, early / _bytes_come(), *times, last]
    Path(folder, f"{worker.rank}.json").write_text(json.dumps(note))


def _bytes_come() -> int:
    """In this worker's spools."""
    spools = Path(os.environ["PENSTOCK_SPOOL"])
    return sum(
        path.stat().st_size
        for depth in ("*", "*/*")  # here, on Spark: a link may be to where another wrote it
        for path in spools.glob(f"{depth}/*.arrow")
    )


def fed(source: feed.Source, rows: int, kind: Kind, on: Any, workers: int, later: int) -> Rates:
    """A run of Penstock."""
    with tempfile.TemporaryDirectory() as folder:
        called = time.time()
        penstock.launch(
            functools.partial(take, folder=folder, epochs=1 + later, batch_size=kind.batch),
            train=source,
            on=on,
            workers=workers,
            threads=1,
            strategy=Averaging(every=1_000_000),
            run_dir=f"{folder}/run",
            progress=False,
        )
        notes = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(workers)]
    taken, early, wanted, first, *_, end = zip(*notes)
    assert sum(taken) == (1 + later) * rows, "each record comes once an epoch"
    come = 1 - statistics.mean(early)
    print(
        f"  penstock: {min(wanted) - called:.2f} s from the call until batches were wanted, when "
        f"{1 - come:.0%} of the rows had come; {max(first) - called:.2f} s until the first epoch "
        "was over",
        file=sys.stderr,
    )
    rate = come * rows / (max(first) - min(wanted))
    return {
        "penstock, first epoch": rate if come > LEAST else math.nan,
        "penstock, later epochs": later * rows / (max(end) - max(first)),
    }


class Mapped(torch.utils.data.Dataset[Any]):
    """Records of a mapped file, one by one."""

    def __init__(self, data: Data) -> None:
        self._path, self._y = f"{data.folder}/x.npy", data.y

    @functools.cached_property
    def _x(self) -> NDArray[np.uint8]:
        return np.load(self._path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self._x[row].copy()), int(self._y[row])


class Batched(Mapped):
    """A batch of them at once."""

    def __getitems__(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self._x[rows]), torch.from_numpy(self._y[rows])


class Groups(torch.utils.data.IterableDataset[Any]):
    """Batches of row groups of Parquet, shuffled within each; every process reads its own."""

    def __init__(self, data: Data) -> None:
        self._path, self._kind = f"{data.folder}/rows.parquet", data.kind

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        import pyarrow.parquet as pq

        info, file = torch.utils.data.get_worker_info(), pq.ParquetFile(self._path)
        assert info is not None
        for number in range(info.id, file.num_row_groups, info.num_workers):
            group = file.read_row_group(number, use_threads=False)
            values = group["x"].combine_chunks().buffers()[2]
            x = np.frombuffer(values, np.uint8)[: len(group) * self._kind.row_bytes]
            x, y = x.reshape(len(group), -1), group["y"].to_numpy()
            order = np.random.permutation(len(group))
            for start in range(0, len(group), self._kind.batch):
                rows = order[start : start + self._kind.batch]
                yield torch.from_numpy(x[rows]), torch.from_numpy(y[rows])


def loaded(label: str, dataset: Any, data: Data, **options: Any) -> Rates:
    """An epoch of a DataLoader; one before, in which its processes start."""
    loader = torch.utils.data.DataLoader(
        dataset, num_workers=WORKERS, persistent_workers=True, **options
    )
    for _ in range(2):
        began = time.perf_counter()
        rows = sum(len(y) for _, y in loader)
        seconds = time.perf_counter() - began
    assert rows == len(data.x)
    return {label: rows / seconds}


def of_files(data: Data) -> dict[str, Callable[[], Rates]]:
    def from_parquet() -> Rates:
        source = feed.parquet(f"{data.folder}/rows.parquet", features="x", target="y")
        return fed(source, len(data.x), data.kind, "local", 1, LATER)

    each = {"shuffle": True, "batch_size": data.kind.batch}
    return {
        "raw gather": lambda: gather(data, 1),
        "penstock": from_parquet,
        "DataLoader": lambda: loaded("DataLoader", Mapped(data), data, **each),
        "DataLoader, batched": lambda: loaded(
            "DataLoader, batched", Batched(data), data, collate_fn=_same, **each
        ),
        "DataLoader, Parquet": lambda: loaded(
            "DataLoader, Parquet", Groups(data), data, batch_size=None
        ),
    }


def _same(batch: Any) -> Any:
    return batch


# Spark.


def session(folder: str) -> Any:
    """A session on a cluster of its own on this machine, while in its context."""
    import spark  # type: ignore[import-not-found]

    progress, rows = "spark.ui.showConsoleProgress", "spark.sql.parquet.columnarReaderBatchSize"
    return spark.session(folder, {progress: "false", rows: "64"})  # rows: lists of 150,000


def passed(batches: Iterable[Any]) -> Iterator[Any]:
    """A task of a bare pass: when its first batch came, and the last one."""
    import pyarrow as pa

    first, rows = 0.0, 0
    for batch in batches:
        first, rows = first or time.time(), rows + batch.num_rows
    values = {"first": [first or time.time()], "last": [time.time()], "rows": [rows]}
    yield pa.RecordBatch.from_pydict(values)


def bare(spark: Any, frame: Any, label: str, batch_bytes: int | None) -> Rates:
    key = "spark.sql.execution.arrow.maxBytesPerBatch"
    if batch_bytes is not None:
        spark.conf.set(key, str(batch_bytes))
    try:
        tasks = frame.mapInArrow(passed, "first double, last double, rows long").collect()
    finally:
        spark.conf.unset(key)
    seconds = max(task["last"] for task in tasks) - min(task["first"] for task in tasks)
    return {label: sum(task["rows"] for task in tasks) / seconds}


def queued(records: Iterable[Any], folder: str, kind: Kind) -> None:
    """TensorFlowOnSpark's TFManager, TFSparkNode.train and TFNode.DataFeed, in short."""
    from multiprocessing import JoinableQueue, Process
    from multiprocessing.managers import BaseManager

    queue: Any = JoinableQueue()

    class Manager(BaseManager):
        pass

    Manager.register("get_queue", callable=lambda: queue)
    manager: Any = Manager(authkey=b"benchmark")
    manager.start()

    def consume() -> None:
        fed, ended = manager.get_queue(), False
        while not ended:
            items: list[Any] = []
            while len(items) < kind.batch and not ended:
                item = fed.get(block=True)
                ended = item is None
                items += [] if ended else [item]
                fed.task_done()
            if items:
                np.array([np.frombuffer(x, np.uint8) for x, _ in items])
                np.array([y for _, y in items])

    consumer = Process(target=consume)
    consumer.start()
    put, count, began = manager.get_queue(), 0, time.time()
    for record in records:
        put.put((record["x"], record["y"]), block=True)
        count += 1
    put.join()
    ended = time.time()
    put.put(None)
    consumer.join()
    manager.shutdown()
    Path(folder, f"{os.getpid()}.json").write_text(json.dumps([began, ended, count]))


def by_queue(frame: Any, kind: Kind) -> Rates:
    with tempfile.TemporaryDirectory() as folder:
        frame.rdd.foreachPartition(functools.partial(queued, folder=folder, kind=kind))
        return {"manager queue": _overall(folder)}


def of_loader(folder: str, rows: int, batch: int) -> None:
    """What each process of TorchDistributor runs."""
    from pyspark.ml.torch.distributor import _get_spark_partition_data_loader

    loader = _get_spark_partition_data_loader(rows, batch)
    began, count = time.time(), 0
    for _, y in loader:
        count += len(y)
    note = [began, time.time(), count]
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(note))


def by_distributor(frame: Any, kind: Kind) -> Rates:
    from pyspark.ml.torch.distributor import TorchDistributor

    distributor = TorchDistributor(num_processes=WORKERS, local_mode=False, use_gpu=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = kind.few // WORKERS
        with redirect_stdout(sys.stderr):
            distributor._train_on_dataframe(of_loader, frame, folder, rows, kind.batch)
        return {"TorchDistributor": _overall(folder)}


def _overall(folder: str) -> float:
    """Records/s of all whose notes are there."""
    notes = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    began, ended, counts = zip(*notes)
    return float(sum(counts) / (max(ended) - min(began)))


def _listed(data: Data) -> str:
    """A few of the rows as Parquet of the types that pyspark's data loader takes: no bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    few, path = data.kind.few, f"{data.folder}/listed.parquet"
    values = pa.array(data.x[:few].reshape(-1).astype(np.int16))
    lists = pa.FixedSizeListArray.from_arrays(values, data.kind.row_bytes)
    pq.write_table(pa.table({"x": lists.cast(pa.list_(pa.int16())), "y": data.y[:few]}), path)
    return path


def of_spark(data: Data, spark: Any) -> dict[str, Callable[[], Rates]]:
    kind, path = data.kind, f"{data.folder}/rows.parquet"
    cached = spark.read.parquet(path).repartition(2 * WORKERS).cache()
    frame = functools.reduce(type(cached).union, [cached] * REPEATED)
    few = spark.read.parquet(path).limit(kind.few).repartition(WORKERS).cache()
    listed = spark.read.parquet(_listed(data)).repartition(WORKERS).cache()
    for each in (cached, few, listed):
        each.count()

    def from_dataframe() -> Rates:
        source = feed.dataframe(frame, features="x", target="y")
        return fed(source, REPEATED * len(data.x), kind, spark, WORKERS, later=2)

    return {
        "raw gather": lambda: gather(data, WORKERS),
        "mapInArrow": lambda: bare(spark, frame, "mapInArrow", None),
        "mapInArrow, 4 MiB": lambda: bare(spark, frame, "mapInArrow, 4 MiB", 4 << 20),
        "penstock": from_dataframe,
        "manager queue": lambda: by_queue(few, kind),
        "TorchDistributor": lambda: by_distributor(listed, kind),
    }


# LeNet.


def of_rows() -> torch.nn.Module:
    """LeNet on rows of 784 numbers."""
    return torch.nn.Sequential(torch.nn.Unflatten(1, (1, 28, 28)), zoo.lenet())


def alternate(worker: Worker, folder: str, names: Sequence[str], rounds: int) -> None:
    """An epoch of each source in turn; rank 0 notes their seconds."""
    optimizer = functools.partial(torch.optim.Adagrad, lr=0.01, weight_decay=5e-4)
    network, _ = worker.prepare(of_rows, optimizer)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for epoch in range(1, rounds + 2):
        for turn in range(len(names)):
            name = names[(epoch + turn) % len(names)]
            began = time.perf_counter()
            for batch in worker.batches(name, epochs=epoch, batch_size=32):
                loss = torch.nn.functional.cross_entropy(network(batch.x), batch.y)
                worker.step(loss)
            seconds[name].append(time.perf_counter() - began)
    if worker.rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(seconds))


def of_lenet(mnist: str | None, rounds: int, folder: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from lenet import arrays

    x, y = (tensor[:5_000].numpy() for tensor in arrays(mnist))
    x = x.reshape(len(x), -1)
    images = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    table = pa.table({"x": images.cast(pa.list_(pa.float32())), "y": y})
    pq.write_table(table, f"{folder}/mnist.parquet", row_group_size=len(y) // 4)
    with session(folder) as spark:
        frame = spark.read.parquet(f"{folder}/mnist.parquet").repartition(WORKERS).cache()
        frame.count()
        columns = {"features": "x", "target": "y"}
        sources = {
            "arrays": feed.arrays(x, y),
            "parquet": feed.parquet(f"{folder}/mnist.parquet", **columns),
            "dataframe": feed.dataframe(frame, **columns),
        }
        for strategy in (AllReduce(), Averaging(every=5)):
            run = f"{folder}/{type(strategy).__name__}"
            penstock.launch(
                functools.partial(alternate, folder=folder, names=list(sources), rounds=rounds),
                on=spark,
                workers=WORKERS,
                threads=1,
                strategy=strategy,
                run_dir=run,
                progress=False,
                **sources,
            )
            found = json.loads(Path(folder, "seconds.json").read_text())
            print(f"\nLeNet, {type(strategy).__name__}{'':6}{'examples/s':>18}{'of arrays':>12}")
            for name, seconds in found.items():
                ratios = [a / s for a, s in zip(found["arrays"][1:], seconds[1:])]
                low, _, high = statistics.quantiles(ratios, n=4)
                note = "" if name == "arrays" else f"   (aim: 0.97)   {low:.3f} to {high:.3f}"
                rate = len(y) / statistics.median(seconds[1:])
                print(f"{name:28}{rate:12,.0f}{statistics.median(ratios):12.3f}{note}")


# All together.


def measure(contenders: dict[str, Callable[[], Rates]], rounds: int) -> dict[str, list[float]]:
    """Records/s in each round. Who fails is left out from then on, with its message."""
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, run in list(contenders.items()):
            try:
                for label, rate in run().items():
                    found.setdefault(label, []).append(rate)
            except Exception as why:
                print(f"{name} fell out: {type(why).__name__}: {why}", file=sys.stderr)
                del contenders[name]
    return found


def show(name: str, kind: Kind, found: dict[str, list[float]], aims: Sequence[Any]) -> None:
    print(f"\n{name}: rows of {kind.row_bytes:,} bytes, {kind.batch} a batch")
    print(f"{'':30}{'records/s':>12}{'MB/s':>10}{'of gather':>11}   middle half, MB/s")
    for label, rates in found.items():
        low, middle, high = np.nanquantile(
            np.array(rates) * kind.row_bytes / 1e6, [0.25, 0.5, 0.75]
        )
        share = _ratio(found, label, "raw gather")
        print(
            f"{label:30}{np.nanmedian(rates):12,.0f}{middle:10,.1f}{share:11.4f}"
            f"   {low:,.1f} to {high:,.1f}"
        )
    for label, other, aim in aims:
        small = other == "raw gather" and kind.row_bytes < 4096  # there calls are the limit
        if label in found and other in found and not small:
            ratio = _ratio(found, label, other)
            print(f"  {label} is {ratio:.3g} x {other} (aim: {aim})")


def _ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    return float(np.nanmedian([a / b for a, b in zip(found[one], found[other])]))


OF_FILES = [("penstock, later epochs", "raw gather", 0.5)]
OF_SPARK = [
    *OF_FILES,
    ("penstock, first epoch", "mapInArrow", 0.8),
    ("penstock, first epoch", "mapInArrow, 4 MiB", 0.8),
    ("penstock, first epoch", "manager queue", 100),
    ("penstock, later epochs", "manager queue", 100),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--spark", action="store_true", help="a DataFrame instead of files")
    parser.add_argument("--lenet", action="store_true", help="LeNet, fed in three ways")
    parser.add_argument("--rows", default="mnist,4k,150k")
    parser.add_argument("--megabytes", type=int, default=256, help="of each kind of rows")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--data", help="folder of MNIST's four idx files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a worker does: the gather's limit is memory, and not the page table
    from collectives import hardware  # type: ignore[import-not-found]

    print(hardware())
    if options.lenet:
        with tempfile.TemporaryDirectory() as folder:
            of_lenet(options.data, options.rounds or 24, folder)
        return
    with ExitStack() as stack:
        spark = None
        if options.spark:
            spark = stack.enter_context(session(stack.enter_context(tempfile.TemporaryDirectory())))
        for name in options.rows.split(","):
            with tempfile.TemporaryDirectory() as folder:
                data = Data.make(name, options.megabytes, options.data, folder)
                contenders = of_spark(data, spark) if spark else of_files(data)
                found = measure(contenders, options.rounds or (3 if spark else 5))
                if spark:
                    spark.catalog.clearCache()
            show(name, data.kind, found, OF_SPARK if spark else OF_FILES)


if __name__ == "__main__":
    main()
