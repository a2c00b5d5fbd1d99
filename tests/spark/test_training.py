"""The same job on a Spark cluster: the same bits, every record once, clear words if it cannot."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

import penstock
from penstock import AllReduce, Averaging, Job, Run, feed, zoo
from penstock.errors import DataError, JobError, UserError, WorkerLost
from penstock.testing import assert_same_bits

SIZES = [170, 0, 150, 80]
"""Rows of the partitions: uneven, and one is empty."""


@functools.cache
def digits(split: str = "train", rows: int = sum(SIZES)) -> tuple[Any, Any]:
    """The first MNIST images, float32 (rows, 784), and labels, int64 (rows,)."""
    source = feed.mnist(split=split)
    x, y = source.open(source.manifest().share(0, 1)).take(np.arange(rows))
    return x.numpy().reshape(rows, -1), y.numpy()


def frame(session: Any, x: Any, y: Any, sizes: list[int]) -> Any:
    """A DataFrame with partitions of these sizes, rows in order."""
    part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    images = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    columns = {"x": images.cast(pa.list_(pa.float32())), "y": y, "part": part}
    table = pa.table(columns | {"row": np.arange(len(y))})
    by_id = session.createDataFrame(table).repartitionById(len(sizes), "part")
    return by_id.sortWithinPartitions("row")


class Rows:
    """The same rows on this machine, partition by partition, for `feed.stream`."""

    def __init__(self, x: Any, y: Any, sizes: list[int]) -> None:
        self.x, self.y, self.ends = x, y, np.cumsum([0, *sizes])

    def __call__(self, partition: int) -> Iterator[tuple[Any, Any]]:
        rows = slice(self.ends[partition], self.ends[partition + 1])
        yield self.x[rows], self.y[rows]


def here(x: Any, y: Any, sizes: list[int]) -> Any:
    """A source of this machine whose records come in the order of a DataFrame's.

    There must be as many shards as partitions: then partition p is shard p's here and there.
    """
    return feed.stream(Rows(x, y, sizes), partitions=len(sizes))


class Flat(nn.Module):
    """LeNet on rows of 784."""

    def __init__(self) -> None:
        super().__init__()
        self.lenet = zoo.lenet()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lenet(x.view(-1, 1, 28, 28))
        return out


class Seen:
    """Writes the ids of the records of every batch that a worker trains on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, worker: penstock.Worker) -> None:
        network, _ = worker.prepare(
            lambda: nn.Linear(784, 10), functools.partial(torch.optim.SGD, lr=0.1)
        )
        with open(self.folder / f"rank-{worker.rank}", "a") as file:
            for batch in worker.batches("train", epochs=2, batch_size=16):
                file.write(json.dumps([batch.epoch, batch.ids.tolist()]) + "\n")
                worker.step(nn.functional.cross_entropy(network(batch.x), batch.y))


def lenet(train: Any, test: Any, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "network": Flat,
        "loss": "cross_entropy",
        "optimizer": functools.partial(torch.optim.Adagrad, lr=0.01),
        "train": train,
        "test": test,
        "batch_size": 16,
        "epochs": 2,
        "workers": 2,
        "shards": 4,
        "threads": 1,
        "strategy": AllReduce(),
    }
    return Job(**(values | changes))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.checkpoint().tensors("network.safetensors")[0]


@pytest.fixture(autouse=True)
def _by_value() -> Any:
    """Executors need not have this module: it goes along as the user's own code would."""
    return sys.modules[__name__]


@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=3)], ids=["sum", "average"])
def test_lenet_on_a_dataframe_has_the_bits_of_a_local_run(
    spark: Any, tmp_path: Path, strategy: Any
) -> None:
    x, y = digits()
    tx, ty = digits("test", 100)
    there = lenet(
        feed.dataframe(frame(spark, x, y, SIZES), features="x", target="y"),
        feed.dataframe(frame(spark, tx, ty, [30, 0, 50, 20]), features="x", target="y"),
        strategy=strategy,
    )
    test = here(tx, ty, [30, 0, 50, 20])
    same = lenet(here(x, y, SIZES), test, strategy=strategy)
    on_spark = there.run(on=spark, run_dir=str(tmp_path / "spark"), progress=False)
    local = same.run(run_dir=str(tmp_path / "local"), progress=False)
    assert_same_bits(weights(on_spark), weights(local))
    assert on_spark.evaluation.to_dict() == local.evaluation.to_dict()
    assert [p.rows for p in on_spark.plan.manifests["train"].partitions] == SIZES
    alone = there.replace(workers=1).run(on=spark, run_dir=str(tmp_path / "one"), progress=False)
    assert_same_bits(weights(alone), weights(local))
    other = same.replace(seed=1).run(run_dir=str(tmp_path / "other"), progress=False)
    with pytest.raises(AssertionError):
        assert_same_bits(weights(other), weights(local))


def test_every_record_once_an_epoch_and_resumed_here_as_well(spark: Any, tmp_path: Path) -> None:
    x, y = digits()
    source = feed.dataframe(frame(spark, x, y, SIZES), features="x", target="y")
    run = penstock.launch(
        Seen(tmp_path), on=spark, workers=2, shards=3, train=source, progress=False,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    assert run.result["status"] == "finished"
    lines = [
        json.loads(line)
        for rank in (0, 1)
        for line in (tmp_path / f"rank-{rank}").read_text().splitlines()
    ]
    once = [Counter(i for e, ids in lines if e == epoch for i in ids) for epoch in (0, 1)]
    assert once[0] == once[1]
    assert once[0].total() == len(once[0]) == sum(SIZES)


def test_files_of_a_job_file_on_a_master_url(cluster: Any, session: Any, tmp_path: Path) -> None:
    """`penstock run --on spark://...` as a process that makes and stops its session."""
    job = tmp_path / "job.yaml"
    job.write_text(
        textwrap.dedent("""
        network: penstock.zoo:lenet
        loss: cross_entropy
        optimizer: {adagrad: {lr: 0.01}}
        train: {mnist: {split: train}}
        batch_size: 64
        epochs: 1
        workers: 2
        threads: 1
        """)
    )
    command = [str(Path(sys.executable).with_name("penstock")), "run", str(job), "--run-dir"]
    environment = dict(cluster.environment) | {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    environment.pop("PENSTOCK_TEST_CLUSTER")
    there = subprocess.run(
        [*command, str(tmp_path / "spark"), "--on", cluster.url],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert there.returncode == 0, there.stderr
    assert f"2 workers on {cluster.url}" in there.stderr
    local = Job.from_yaml(job).run(run_dir=str(tmp_path / "local"), progress=False)
    assert_same_bits(weights(Run(str(tmp_path / "spark"))), weights(local))


def test_connect_gives_the_same_bits_and_outlives_idle_sessions(
    connect_server: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends idle sessions after 3 s does not end one with a run under way."""
    from pyspark.sql import SparkSession

    manager = "spark.connect.session.manager"
    url = connect_server(
        **{f"{manager}.defaultSessionTimeout": "3s", f"{manager}.maintenanceInterval": "1s"}
    )
    monkeypatch.setenv("SPARK_CONNECT_MODE_ENABLED", "1")
    connect = SparkSession.builder.remote(url).create()
    x, y = digits()
    changes = {"callbacks": [lambda worker: time.sleep(0.1)], "epochs": 4}
    there = lenet(
        feed.dataframe(frame(connect, x, y, SIZES), features="x", target="y"), None, **changes
    )
    same = lenet(here(x, y, SIZES), None, epochs=4)
    on_spark = there.run(on=connect, run_dir=str(tmp_path / "spark"), progress=False)
    assert on_spark.result["seconds"] - on_spark.result["seconds_to_first_step"] > 4
    local = same.run(run_dir=str(tmp_path / "local"), progress=False)
    assert_same_bits(weights(on_spark), weights(local))
    connect.stop()


def test_nodes_without_penstock_and_with_a_module_of_the_users(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nodes' Python has torch and the rest, but neither Penstock nor the job's own module."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_network.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    python = python_without(tmp_path, "penstock", "_editable", "__editable", "_penstock")
    check = [str(python), "-c", "import torch, penstock"]
    assert (
        "No module named 'penstock'" in subprocess.run(check, capture_output=True).stderr.decode()
    )
    monkeypatch.setenv("PYSPARK_PYTHON", str(python))
    spark = session()
    x, y = digits()
    source = feed.dataframe(frame(spark, x, y, SIZES), features="x", target="y")
    job = small(source, network="my_network:make")
    run = job.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert run.result["status"] == "finished"
    monkeypatch.delitem(sys.modules, "my_network", raising=False)


def python_without(folder: Path, *names: str) -> Path:
    """A Python with all that this one has installed, but for distributions that begin so."""
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not entry.name.startswith(names):
            (packages / entry.name).symlink_to(entry)
    python = folder / "python"
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="{packages}:$PYTHONPATH"\nexec {base} "$@"\n')
    python.chmod(0o755)
    return python


# What cannot be, and what is mended


class Linear(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 10))


def small(train: Any, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "network": Linear,
        "loss": "cross_entropy",
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1),
        "train": train,
        "batch_size": 16,
        "epochs": 1,
        "workers": 2,
        "threads": 1,
    }
    return Job(**(values | changes))


def test_more_workers_than_slots(spark: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from penstock.cluster import session

    monkeypatch.setattr(session, "SLOTS_S", 1.0)
    began = time.monotonic()
    with pytest.raises(JobError, match=r"3 workers need 3 slots at once; the cluster has 2") as e:
        small(feed.mnist(), workers=3).run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert "spark.cores.max=2" in str(e.value)
    assert "workers: 2" in e.value.hint
    assert time.monotonic() - began < 5
    assert not (tmp_path / "run").exists()


def test_slots_that_others_hold(spark: Any, tmp_path: Path) -> None:
    """As many slots as workers, but a job of the session's holds one: a table when time is up."""
    import threading

    def sleep(batches: Any) -> Any:
        import time

        time.sleep(14)
        yield from batches

    busy = spark.range(0, 1, 1, 1).mapInArrow(sleep, "id long")
    thread = threading.Thread(target=busy.count)
    thread.start()
    time.sleep(3)
    with pytest.raises(WorkerLost, match=r"rank . still absent after 6 s") as caught:
        small(feed.mnist()).run(
            on=penstock.Spark(spark, gather_s=6), run_dir=str(tmp_path / "run"), progress=False
        )
    assert "absent" in str(caught.value)
    assert "slots" in caught.value.hint
    thread.join(30)


SHAPES: dict[str, Callable[[Any], Any]] = {
    "one partition": lambda f: f.coalesce(1),
    "a limit": lambda f: f.limit(90),
    "adaptive execution": lambda f: (
        f.groupBy("row").agg({"x": "first", "y": "first"}).toDF("row", "x", "y")
    ),
}


@pytest.mark.torture
def test_frames_with_fewer_partitions_than_shards(session: Any, tmp_path: Path, capfd: Any) -> None:
    """As are those of one partition, after a `limit` and after adaptive execution."""
    spark = session(**{"spark.sql.shuffle.partitions": "8"})
    x, y = digits()
    for what, change in SHAPES.items():
        source = feed.dataframe(change(frame(spark, x, y, SIZES)), features="x", target="y")
        run = small(source).run(on=spark, run_dir=str(tmp_path / what))
        assert "1 partition for 2 shards: its rows are dealt out anew" in capfd.readouterr().err
        shard_rows = run.plan.manifests["train"].shard_rows(2)
        assert sum(shard_rows) == (90 if what == "a limit" else len(y))
        assert min(shard_rows) > 0


@pytest.mark.torture
def test_speculation_and_dynamic_allocation(session: Any, tmp_path: Path, capfd: Any) -> None:
    """Neither is in the way; dynamic allocation's upper bound counts as slots."""
    spark = session(
        **{
            "spark.speculation": "true",
            "spark.dynamicAllocation.enabled": "true",
            "spark.dynamicAllocation.shuffleTracking.enabled": "true",
            "spark.dynamicAllocation.maxExecutors": "2",
            "spark.dynamicAllocation.initialExecutors": "1",
        }
    )
    x, y = digits()
    source = feed.dataframe(frame(spark, x, y, SIZES), features="x", target="y")
    with pytest.raises(JobError, match=r"3 workers need 3 slots at once; the cluster has 2"):
        small(source, workers=3).run(on=spark, run_dir=str(tmp_path / "three"), progress=False)
    run = small(source).run(on=spark, run_dir=str(tmp_path / "run"))
    assert run.result["status"] == "finished"
    said = capfd.readouterr().err
    assert "spark.speculation is on" in said
    assert "spark.dynamicAllocation is on" in said


def test_torch_missing_on_the_executors(
    session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agents' Python has pyarrow but no torch: named before any worker starts."""
    python = python_without(tmp_path, "torch", "functorch")
    monkeypatch.setenv("PYSPARK_PYTHON", str(python))
    spark = session()
    with pytest.raises(UserError, match=r"torch not installed for") as caught:
        small(feed.mnist()).run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert f"pip install torch=={torch.__version__.partition('+')[0]}" in caught.value.hint


def test_frames_of_one_partition_for_one_worker(spark: Any, tmp_path: Path) -> None:
    """Spark makes one partition of a union of single ones."""
    x, y = digits()
    train = feed.dataframe(frame(spark, x, y, SIZES).coalesce(1), features="x", target="y")
    test = feed.dataframe(frame(spark, x, y, SIZES).limit(40), features="x", target="y")
    job = small(train, test=test, workers=1)
    run = job.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert [m.rows for m in run.plan.manifests.values()] == [sum(SIZES), 40]


@pytest.mark.torture
def test_a_dataframe_that_takes_longer_than_gathering(spark: Any, tmp_path: Path) -> None:
    """While Spark makes what the agents take in, their deadline stands still."""
    x, y = digits()

    def slow(batches: Any) -> Any:
        import time

        time.sleep(4)
        yield from batches

    rows = frame(spark, x, y, SIZES).mapInArrow(slow, "x array<float>, y long, part int, row long")
    source = feed.dataframe(rows, features="x", target="y")
    run = small(source).run(
        on=penstock.Spark(spark, gather_s=7), run_dir=str(tmp_path / "run"), progress=False
    )
    assert run.result["seconds_to_first_step"] > 8


def test_columns_that_cannot_be(spark: Any, tmp_path: Path) -> None:
    x, y = digits()
    rows = frame(spark, x, y, SIZES)
    with pytest.raises(DataError, match="no column 'labels'") as caught:
        small(feed.dataframe(rows, features="x", target="labels")).run(
            on=spark, run_dir=str(tmp_path / "a"), progress=False
        )
    assert not (tmp_path / "a").exists() or not (tmp_path / "a" / "plan.json").exists()
    ragged = rows.selectExpr("case when row = 7 then slice(x, 1, 5) else x end as x", "y")
    with pytest.raises(DataError, match=r"partition 0.*column 'x'.*7|row 7") as caught:
        small(feed.dataframe(ragged, features="x", target="y")).run(
            on=spark, run_dir=str(tmp_path / "b"), progress=False
        )
    assert caught.value.hint


def test_a_dataframe_needs_spark(spark: Any, tmp_path: Path) -> None:
    source = feed.dataframe(spark.range(3), features="id", target="id")
    with pytest.raises(JobError, match="train reads a Spark DataFrame") as caught:
        small(source).run(run_dir=str(tmp_path / "run"), progress=False)
    assert "on=spark" in caught.value.hint


# Columns


def pixels(height: int, width: int, fill: int) -> dict[str, Any]:
    """An image as Spark's reader gives it, blue 0, green 1, red `fill`."""
    data = bytes([0, 1, fill]) * (height * width)
    names = ("origin", "height", "width", "nChannels", "mode", "data")
    return dict(zip(names, ("here", height, width, 3, 16, data), strict=True))


def kinds(session: Any) -> dict[str, tuple[Any, Any, Any, Any]]:
    """A frame or RDD of six rows of each kind, features, and the tensors that its x and y are."""
    from pyspark.ml.image import ImageSchema
    from pyspark.sql import Row

    y = torch.arange(6)
    image = session.createDataFrame(
        [(pixels(2, 4, n), n) for n in range(6)],
        f"image {ImageSchema.columnSchema.simpleString()}, y long",
    )
    red = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 2, 4)
    rgb = torch.cat([red, torch.ones_like(red), torch.zeros_like(red)], dim=1)
    binary = session.createDataFrame([(bytes([n, 7]), n) for n in range(6)], "x binary, y long")
    numbers = session.createDataFrame([(n, n / 2, n) for n in range(6)], "a int, b double, y long")
    rows = session.sparkContext.parallelize([Row(x=[1.0 * n, 2.0 * n], y=n) for n in range(6)], 3)
    return {
        "images": (image, "image", rgb, y),
        "binary": (binary, "x", torch.stack([y, torch.full((6,), 7)], 1).to(torch.uint8), y),
        "numbers": (numbers, ["a", "b"], torch.stack([y, y / 2], 1).double(), y),
        "an RDD of rows": (rows, "x", torch.stack([y, 2 * y], 1).double(), y),
    }


class Kept:
    """Writes each batch of each source with its ids, and trains on nothing of it."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names

    def __call__(self, worker: penstock.Worker) -> None:
        network, _ = worker.prepare(
            lambda: nn.Linear(1, 1), functools.partial(torch.optim.SGD, lr=0.1)
        )
        for number, name in enumerate(self.names):
            for batch in worker.batches(name, epochs=1, batch_size=2):
                path = self.folder / f"{number}-{worker.rank}-{batch.ids[0]}"
                torch.save((torch.from_numpy(batch.ids), batch.x, batch.y), path)
                worker.step(network(torch.ones(1, 1)).sum())


def test_kinds_of_columns(spark: Any, tmp_path: Path) -> None:
    wanted = kinds(spark)
    sources = {
        f"source{n}": feed.dataframe(frame, features=features, target="y")
        for n, (frame, features, _, _) in enumerate(wanted.values())
    }
    penstock.launch(
        Kept(tmp_path, list(sources)), on=spark, workers=2, progress=False,
        run_dir=str(tmp_path / "run"), **sources,
    )  # fmt: skip
    for number, (what, (_, _, x, y)) in enumerate(wanted.items()):
        parts = [torch.load(path) for path in tmp_path.glob(f"{number}-*")]
        ids, xs, ys = (torch.cat(column) for column in zip(*parts, strict=True))
        order = ys.argsort()
        assert len(set(ids.tolist())) == 6, what
        assert torch.equal(ys[order], y), what
        assert torch.equal(xs[order], x), what
        assert xs.dtype == x.dtype, what
