"""`plan(job, cluster)`: how a Job's step is best split over a cluster, without running it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from penstock.errors import DataError, JobError, NetworkError
from penstock.feed.dataframe import DataFrameSource
from penstock.feed.mapped import origin, replaced
from penstock.job import AllReduce, Job
from penstock.model.capture import capture
from penstock.model.clipping import Clipping
from penstock.model.graph import Graph
from penstock.plan.costs.hardware import Cluster
from penstock.plan.layout import in_words
from penstock.plan.making import plan_pipeline, plan_step
from penstock.plan.reasons import reason
from penstock.plan.search.pins import Pins
from penstock.plan.search.search import GAP, TIME_LIMIT_S, Search
from penstock.plan.step import StepPlan
from penstock.plan.words import in_bytes, in_time
from penstock.runtime.check import first_batch, first_rows
from penstock.runtime.shards import preserved, seed


def plan(
    job: Job,
    cluster: Cluster | str | Path,
    *,
    pins: Pins | None = None,
    pipelines: bool = True,
    gap: float = GAP,
    time_limit_s: float = TIME_LIMIT_S,
) -> StepPlan:
    """Decides how a job's training step is split over a cluster; runs nothing there.

    The network has shapes and no weights meanwhile, so that one that fits on no machine can be
    planned. Of the data the first records are read, for their shapes.

    Arguments:
        job: with strategy `all_reduce`. Its batch of a step is `batch_size` of each shard: of
            `shards`, or where the job does not say how many, of each device of the cluster.
        cluster: or the name of its file.
        pins: by name of a parameter or module, how it is to lie: `{"classifier.0.weight": "S0"}`.
        pipelines: whether the stages of a pipeline are among what is chosen from. With pins, or
            where a network has statistics of a batch (batch norm), they are only where nothing
            else fits.
        gap: how far above the best there is a plan may be.
        time_limit_s: of the search; pipelines have half as much beside it.

    Raises:
        JobError: the strategy has no common step; or a pin is not possible.
        UserError: the network cannot be captured, the data cannot be read, the cluster's file is
            none; or no plan fits into the memory of its devices.
    """
    where = cluster if isinstance(cluster, Cluster) else Cluster.load(cluster)
    step = _Step(job, where.ranks)
    options: dict[str, Any] = {
        "network": job.name, "pins": pins, "gap": gap, "time_limit_s": time_limit_s
    }  # fmt: skip
    found, refused = None, None
    try:
        found = plan_step(step.graph, where, batch=step.batch, at_batch=step.at, **options)
    except NetworkError as error:
        refused = error
    if pipelines:
        found = plan_pipeline(step.at, where, step.batch, beside=found, **options)
    if found is None:
        assert refused is not None
        raise refused
    return found


class _Step:
    """A job's step, captured at any batch.

    Arguments:
        ranks: shards, where the job does not say how many.

    Attributes:
        batch: examples of a step.
        at: the graph of a step of so many examples, captured once.

    Raises:
        JobError, NetworkError, DataError: see `plan`.
    """

    def __init__(self, job: Job, ranks: int) -> None:
        if not isinstance(job.strategy, AllReduce):
            raise JobError(
                f"strategy {type(job.strategy).__name__}: its replicas have a step each, and none "
                "in common that could be split",
                hint="plan the job with --set strategy=all_reduce",
            )
        said = {"shards", "workers"} & job.model_fields_set
        self.batch = job.batch_size * (job.shards if said else ranks) * job.accumulate
        self._job, self._network, self._first = job, _network(job), _first(job)
        self.at = functools.cache(self._at)

    @property
    def graph(self) -> Graph:
        """Of the whole batch."""
        return self.at(self.batch)

    def _at(self, examples: int) -> Graph:

        def whole(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.new_empty((examples, *tensor.shape[1:]), device="meta")

        job, (x, y) = self._job, self._first
        clip = Clipping() if job.clip is None else Clipping(job.clip.norm, job.clip.value)
        return capture(
            self._network,
            job.loss.make(),
            (pytree.tree_map(whole, x), pytree.tree_map(whole, y)),
            job.optimizer.make,
            autocast=torch.bfloat16 if job.precision == "bfloat16" else None,
            clipping=clip,
        )


def _network(job: Job) -> nn.Module:
    """The job's network without memory; with it, if it cannot be made without."""
    if job.network.made:
        network: nn.Module = copy.deepcopy(job.network.make())
        return network.to("meta")
    with preserved():
        seed(job.seed, 0)
        try:
            with torch.device("meta"):
                made: nn.Module = job.network.make()
        except (NotImplementedError, RuntimeError):  # its constructor looks at values
            made = job.network.make()
    return made


def _first(job: Job) -> tuple[Any, Any]:
    source = job.train.make()
    if isinstance(frame := origin(source), DataFrameSource):
        source = replaced(source, first_rows(frame, "train"))
    manifest = source.manifest()
    if not manifest.open and manifest.rows == 0:
        raise DataError("train: there are no records", hint="is the folder empty?")
    batch, _ = first_batch(job, "train", source, manifest)
    return batch.x, batch.y


def explained(
    job: Job, cluster: Cluster | str | Path, parameter: str, *, pins: Pins | None = None
) -> list[str]:
    """Why a parameter lies as it does, and what its other layouts would cost, in lines.

    Raises:
        UserError: there is no such parameter; or see `plan`.
    """
    where = cluster if isinstance(cluster, Cluster) else Cluster.load(cluster)
    search = Search(_Step(job, where.ranks).graph, where, pins=pins)
    why = reason(search, search.find(), parameter)
    lines = [f"{parameter}  {why.words}"]
    for other in (why.chosen, *why.others):
        price = other.price
        lines.append(
            f"  {in_words(other.layout):12} step {in_time(price.step_s)}: compute "
            f"{in_time(price.compute_s)}, exchange {in_time(price.exchange_s)}, not hidden "
            f"{in_time(price.exposed_s)}, memory {in_bytes(price.held_bytes)}"
        )
    return lines
