"""Where a run takes place: what `on` means, and the launcher of its agents there."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from penstock.cluster import node
from penstock.cluster.environment import (
    environment_file,
    pack_code,
    pack_environment,
    words,
)
from penstock.cluster.launcher import Launcher
from penstock.cluster.local import LocalLauncher, warm
from penstock.cluster.session import facts_of, has_session, is_spark, session_of
from penstock.errors import DataError, Fault, JobError, UserError, did_you_mean
from penstock.exchange import tree
from penstock.feed.dataframe import DataFrameSource
from penstock.feed.manifest import Manifest, counted
from penstock.runtime.batches import UNCHANGED
from penstock.runtime.decisions import devices
from penstock.runtime.preload import PRELOAD

NEED_BYTES = 400 << 20
"""Memory without which a worker cannot even begin. [measured: LeNet, torch 2.13 on CPU, 2026-11]"""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What a place is asked for.

    Arguments:
        name: of the run.
        url: of its directory.
        workers, shards: of the run.
        device: the Job's.
        frames: the DataFrames that it reads, in order.
        manifests: what a run that goes on began with, by source.
        token: of the run.
    """

    name: str
    url: str
    workers: int
    shards: int
    device: str
    frames: Mapping[str, DataFrameSource]
    manifests: Mapping[str, Manifest]
    token: str


@dataclass(frozen=True)
class Spark:
    """A Spark cluster, with what a session of our own is to be made with.

    Arguments:
        on: a master's URL, or "sc://host:port" of a Connect server, or a SparkSession.
        conf: of the session, where it is made here.
        ship_environment: whether this interpreter's whole environment goes to the nodes, packed
            once and kept in `cache`; else they need their own Python with torch and the rest.
        cache: the folder of packed environments.
        gather_s: how long agents may take until all are ready, 120 s if not said. While Spark
            makes what they take in, this time stands still (not over Connect: nobody tells).
    """

    on: Any
    conf: Mapping[str, str] = field(default_factory=dict)
    ship_environment: bool = False
    cache: str = "~/.cache/penstock"
    gather_s: float | None = None


class Place(Protocol):
    """A place for one run.

    Attributes:
        search_path: where workers find modules; None: where the launcher has put them.
        gather_s, regather_s: how long agents may take to be ready at first, and after a loss.
    """

    search_path: list[str] | None
    gather_s: float
    regather_s: float

    def close(self) -> None:
        """What was made for this run alone goes."""
        ...

    def check(self, frames: Mapping[str, DataFrameSource], workers: int, device: str) -> None:
        """What cannot be here, before anything is decided."""
        ...

    @contextmanager
    def opened(self, asked: Asked, say: Say) -> Iterator[Launcher]:
        """The launcher; all it has started is gone afterwards."""
        ...

    @property
    def address(self) -> tuple[str, int]:
        """Where the driver listens for workers; port 0 is any."""
        ...

    def threads(self, shards: int) -> int:
        """Threads of each worker where none are asked for."""
        ...

    def devices(self, facts: Mapping[int, Any]) -> tuple[str, str]:
        """What `device: auto` is, and the backend for tensors there; see `decisions.devices`."""
        ...

    def admit(self, rank: int, facts: Mapping[str, Any]) -> None:
        """What an agent's node lacks is an error, before anything of the run starts on it."""
        ...

    def environment(self, threads: int) -> dict[str, str]:
        """Variables for workers of so many threads."""
        ...


class Here:
    """This machine."""

    gather_s = 60.0
    regather_s = 60.0

    def __init__(self, port: int) -> None:
        self.address = ("127.0.0.1", port)
        self.search_path: list[str] | None = sys.path
        warm(PRELOAD)  # imports while we look at the data

    def check(self, frames: Mapping[str, DataFrameSource], workers: int, device: str) -> None:
        for name in frames:
            raise JobError(
                f"{name} reads a Spark DataFrame, which this machine's workers cannot",
                hint="on=spark, the session that it belongs to; or read its files by feed.parquet",
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device == "cuda" and count < workers:
            raise JobError(
                f"device: cuda, and this machine has {count} GPUs for {workers} workers",
                hint="fewer workers, or device: cpu",
            )

    def close(self) -> None:
        pass

    @contextmanager
    def opened(self, asked: Asked, say: Say) -> Iterator[Launcher]:
        launcher = LocalLauncher(PRELOAD)
        try:
            yield launcher
        finally:
            launcher.close()

    def threads(self, shards: int) -> int:
        return max(1, len(os.sched_getaffinity(0)) // shards)

    def devices(self, facts: Mapping[int, Any]) -> tuple[str, str]:
        there = torch.cuda.is_available() and torch.cuda.device_count() >= len(facts)
        return ("cuda" if there else "cpu"), "nccl"

    def admit(self, rank: int, facts: Mapping[str, Any]) -> None:
        pass  # workers are what the driver is

    def environment(self, threads: int) -> dict[str, str]:
        return {}


class OnSpark:
    """A Spark cluster, by a session of the user's or one of our own."""

    gather_s = 120.0
    regather_s = 60.0

    def __init__(self, spark: Spark, name: str, workers: int) -> None:
        self._environment = (
            environment_file(os.path.expanduser(spark.cache)) if spark.ship_environment else None
        )
        self._session, self._ours = _session(spark, name, self._environment)
        try:
            self._facts = facts_of(self._session, workers)
        except BaseException:
            self.close()
            raise
        if spark.gather_s is not None:
            self.gather_s = spark.gather_s
        self.address = (self._facts.host, 0)
        self.search_path = None

    def check(self, frames: Mapping[str, DataFrameSource], workers: int, device: str) -> None:
        self._facts.check(workers, device)

    @contextmanager
    def opened(self, asked: Asked, say: Say) -> Iterator[Launcher]:
        from penstock.cluster.spark import Input, SparkLauncher

        for note in self._facts.notes():
            say(note)
        owners = [
            worker
            for worker, shards in enumerate(tree.assign(asked.shards, asked.workers))
            for _ in shards
        ]
        inputs, arrivals = [], []
        for name, source in asked.frames.items():
            frame = source.frame_of(self._session)
            known = counted(asked.manifests[name]) if name in asked.manifests else {}
            if known:  # it may not be needed: its partitions are not counted, for Spark may run it
                count, make = len(known), partial(_as_before, frame, name, asked.shards, len(known))
            else:
                frame, count = _spread(frame, name, asked.shards, say)
                make = partial(_given, frame)
            arrival = source.arrival(name, count, asked.shards, f"{asked.url}/quarantine")
            arrivals.append(arrival)
            kept = {number: part for number, part in known.items() if part[0]}
            inputs.append(Input(name, make, arrival.numbers, kept))
        code = pack_code()
        say(words(code, self._environment))
        launcher = SparkLauncher(
            self._session,
            asked.token,
            self._facts,
            code,
            asked.url,
            inputs,
            "penstock.feed.intake:Intake",
            pickle.dumps(arrivals),
            owners,
            PRELOAD,
            f"penstock {asked.name}: {asked.url}",
        )
        try:
            yield launcher
        finally:
            try:
                launcher.close()
            except Fault as error:  # it must not hide how the run has ended
                say(str(error))

    def close(self) -> None:
        """Stops the session, if it is of our making."""
        if self._ours:
            self._session.stop()

    def threads(self, shards: int) -> int:
        return self._facts.task_cpus

    def devices(self, facts: Mapping[int, Any]) -> tuple[str, str]:
        return devices(facts)

    def admit(self, rank: int, facts: Mapping[str, Any]) -> None:
        driver = node.Facts.of(node.facts())
        found = node.problems(node.Facts.of(facts), driver, NEED_BYTES, rank=rank)
        if fatal := [problem for problem in found if problem.fatal]:
            raise UserError(
                f"rank {rank} cannot train on its node: " + "; ".join(p.what for p in fatal),
                hint="; ".join(dict.fromkeys(p.fix for p in fatal)),
            )

    def environment(self, threads: int) -> dict[str, str]:
        # Spark has set them to a task's cpus, which may not be what the plan says.
        return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}


def at(on: Any, name: str, workers: int) -> Here | OnSpark:
    """The place that `on` means.

    Arguments:
        on: "local", "local:PORT", the URL of a Spark master or Connect server, or a SparkSession.
        name, workers: of the run.
    """
    if isinstance(on, str):
        kind, _, port = on.partition(":")
        if kind == "local" and (not port or port.isdigit()):
            return Here(int(port or 0))
    if isinstance(on, Spark) or is_spark(on):
        return OnSpark(on if isinstance(on, Spark) else Spark(on), name, workers)
    raise JobError(
        f"on={on!r}: expected 'local', 'local:PORT', a Spark master such as "
        "'spark://host:7077', or a SparkSession",
        hint=did_you_mean(str(on).partition(":")[0], ["local", "yarn", "spark", "k8s", "sc"])
        or "local is this machine",
    )


def _session(spark: Spark, name: str, environment: Path | None) -> tuple[Any, bool]:
    """The session, and whether it is to be stopped; with an environment, its Python is that one."""
    if (spark.conf or environment) and (not isinstance(spark.on, str) or has_session()):
        raise JobError(
            "conf and ship_environment are for a session that is made here, and this process has "
            "one already",
            hint="stop it first, or make it with these: SparkSession.builder.config(...)",
        )
    conf = {"spark.ui.showConsoleProgress": "false"} | dict(spark.conf)  # ours is shown
    if environment is None:
        return session_of(spark.on, name, conf)
    pack_environment(environment.parent, lambda line: print(line, file=sys.stderr))
    python = "./environment/bin/python"
    archive = f"{environment}#environment"
    if spark.on.startswith("sc://"):
        session, ours = session_of(spark.on, name, conf)
        session.addArtifacts(archive, archive=True)
        session.conf.set("spark.sql.execution.pyspark.python", python)
        return session, ours
    before = os.environ.get("PYSPARK_PYTHON")
    os.environ["PYSPARK_PYTHON"] = python  # a session takes it from here when it is made
    try:
        return session_of(spark.on, name, conf | {"spark.archives": archive})
    finally:
        if before is None:
            del os.environ["PYSPARK_PYTHON"]
        else:
            os.environ["PYSPARK_PYTHON"] = before


def _spread(frame: Any, name: str, shards: int, say: Say) -> tuple[Any, int]:
    """The frame in at least as many partitions as there are shards, and their number.

    Partitions are shared out whole.
    """
    count = partitions(frame)
    if not count:
        raise DataError(
            f"{name}: Spark finds no partitions: the DataFrame is empty",
            hint="does its query, or its filter, leave any rows?",
        )
    if count >= shards:
        return frame, count
    number = f"{count} partition" + ("" if count == 1 else "s")
    say(f"{name}: {number} for {shards} shards: its rows are dealt out anew")
    return frame.repartition(shards), shards


def _given(frame: Any) -> Any:
    return frame


def _as_before(frame: Any, name: str, shards: int, before: int) -> Any:
    """The frame as a run had it whose manifest is known."""
    frame, count = _spread(frame, name, shards, lambda line: None)
    if count != before:
        raise DataError(
            f"{name} has changed since the run began: {count} partitions, {before} then",
            hint=UNCHANGED,
        )
    return frame


def partitions(frame: Any) -> int:
    """How many partitions Spark runs a DataFrame in, adaptive execution included."""
    try:
        return int(frame.rdd.getNumPartitions())
    except Exception:  # Connect has no RDDs
        rows = frame.selectExpr("1 as one").mapInArrow(_one, "one int").collect()
        return len(rows)


def _one(batches: Any) -> Any:
    import pyarrow

    # Nothing is taken of the rows: there may be many, or no end of them. (Spark may compute the
    # first of them nevertheless.)
    yield pyarrow.RecordBatch.from_arrays([pyarrow.array([1], pyarrow.int32())], ["one"])
