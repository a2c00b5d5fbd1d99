"""Tries a Job on this machine without training: what `penstock validate` does beyond the file."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch

from penstock.cluster.session import has_session, session_of
from penstock.errors import DataError, JobError
from penstock.feed.dataframe import DataFrameSource, HeadSource
from penstock.feed.manifest import Manifest
from penstock.feed.mapped import origin
from penstock.feed.source import Source
from penstock.job import Job
from penstock.runtime import loop, payload
from penstock.runtime.batches import Batch, Feed
from penstock.runtime.shards import preserved, seed
from penstock.runtime.supply import Supply


def check(job: Job) -> list[str]:
    """Opens the data, makes the network, takes one batch forward, backward and through a step.

    Nothing is written, and this process's random state stays as it is.

    Returns:
        What was found, in lines for a person.

    Raises:
        UserError: the first thing that would end a run.
    """
    lines = []
    with preserved():
        seed(job.seed, 0)
        network = job.network.make()
        if job.network.made:
            network = copy.deepcopy(network)  # the user's own stays as it is
        count = sum(p.numel() for p in network.parameters() if p.requires_grad)
        lines.append(f"network  {type(network).__name__}, {count:,} parameters to train")
        loss_of = job.loss.make()
        for name, maker in (("train", job.train), ("test", job.test)):
            if maker is None:
                continue
            source = maker.make()
            if isinstance(origin(source), DataFrameSource):
                lines.append(f"{name:8} a DataFrame: Spark checks its columns when the run begins")
                continue
            manifest = source.manifest()
            if manifest.rows == 0:
                raise DataError(f"{name}: there are no records", hint="is the folder empty?")
            batch, shard = first_batch(job, name, source, manifest)
            loss = loop.loss_of_batch(network, loss_of, batch, f"{name}, shard {shard}")
            lines.append(
                f"{name:8} {manifest.rows:,} records in {len(manifest.partitions)} partitions; "
                f"loss of a first batch {loss.item():.4g}"
            )
            if name == "train":
                optimizer = job.optimizer.make(network.parameters())
                if job.schedule is not None:
                    job.schedule.make(optimizer)
                loss.backward()  # type: ignore[no-untyped-call]
    payload.pack({}, job)
    lines.append(
        f"strategy {type(job.strategy).__name__}, {job.shards} shards on {job.workers} workers"
    )
    return lines


def first_batch(job: Job, name: str, source: Source, manifest: Manifest) -> tuple[Batch, int]:
    """The first batch of the shard with most rows, on the CPU; and that shard."""
    rows = manifest.shard_rows(job.shards)
    shard = max(range(job.shards), key=lambda s: rows[s])
    shards = range(shard, shard + 1)
    device = torch.device("cpu")
    feed = Feed(name, source, manifest, shards, job.shards, job.seed, device)
    with closing(Supply(feed, partial(feed.in_order, 0, job.batch_size))) as supply:
        return next(supply.batches()), shard


def first_rows(frame: DataFrameSource, name: str) -> HeadSource:
    """The first rows of a DataFrame, as a source that is read here.

    Where it is said by a table's name, a query or an RDD, this process's session is asked; if there
    is none, one of its own: of `SPARK_REMOTE`, or on this machine.

    Arguments:
        name: of the source in the job, for messages.

    Raises:
        UserError: there can be no session; or see `DataFrameSource.head`.
    """
    if frame.bound:
        return frame.head(name)
    with _session(name) as session:
        return frame.head(name, session)


@contextmanager
def _session(name: str) -> Iterator[Any]:
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise JobError(
            f"{name} is a Spark DataFrame, and pyspark is not installed: {error}",
            hint="pip install 'penstock[spark]'",
        ) from error
    if has_session():
        yield SparkSession.active()
        return
    on = os.environ.get("SPARK_REMOTE", "local[1]")
    session, _ = session_of(on, "plan", {"spark.ui.showConsoleProgress": "false"})
    try:
        yield session
    finally:
        session.stop()
