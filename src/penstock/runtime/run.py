"""`Run`: a run directory, read back. Everything in it is a file that anyone may read, live.

job.yaml        the Job as resolved
plan.json       what was decided before the run
events/         TensorBoard event files
logs/           what each rank printed, in segments
trace/          if asked for: what each rank did and waited for, see `watch.trace`
checkpoints/    see `checkpoint`
result.json     how it ended
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from penstock.errors import RunError
from penstock.exchange.connect import alone
from penstock.feed import Source
from penstock.job import Job
from penstock.plan import Plan
from penstock.runtime import checkpoint, saving
from penstock.runtime.batches import Feed
from penstock.runtime.checkpoint import Checkpoint
from penstock.runtime.evaluation import Evaluation
from penstock.runtime.recorder import FOLDER as EVENTS
from penstock.runtime.scoring import score
from penstock.runtime.store import Store
from penstock.watch import Scalars, read_events


class Run:
    """A run, under way or ended.

    Arguments:
        url: its directory.
        job: the Job, where it is at hand (one given in Python may not be in job.yaml whole).

    Raises:
        RunError: there is no run.
    """

    def __init__(self, url: str, job: Job | None = None) -> None:
        self.url = url.rstrip("/")
        self.store = Store(self.url)
        if not self.store.exists("plan.json") and not self.store.exists("job.yaml"):
            raise RunError(
                f"{url} is no run directory: it has neither plan.json nor job.yaml",
                hint="give the folder that a run printed, such as runs/lenet-20261121-101500",
            )
        self._job = job

    def __repr__(self) -> str:
        return f"Run({self.url!r}, {self.result.get('status', 'under way')})"

    @property
    def job(self) -> Job:
        """The Job.

        Raises:
            RunError: it was an own loop, or given in Python with parts that no file can say.
        """
        if self._job is None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "job.yaml"
                path.write_bytes(self.store.read("job.yaml"))
                try:
                    self._job = Job.from_yaml(path)
                except Exception as error:
                    raise RunError(
                        f"{self.url}/job.yaml cannot be made a Job again: {error}",
                        hint="it was given in Python: use Run(directory, job)",
                    ) from error
        return self._job

    @property
    def plan(self) -> Plan:
        """What was decided before the run."""
        return Plan.from_dict(json.loads(self.store.read("plan.json")))

    @property
    def result(self) -> dict[str, Any]:
        """How it ended: status, steps, seconds and more; empty while it goes on."""
        if not self.store.exists("result.json"):
            return {}
        values: dict[str, Any] = json.loads(self.store.read("result.json"))
        return values

    @property
    def evaluation(self) -> Evaluation | None:
        """The last evaluation on the test source, if there was one."""
        values = self.result.get("evaluation")
        return None if values is None else Evaluation.from_dict(values)

    def scalars(self, tag: str) -> Scalars:
        """What TensorBoard would show: steps, values, wall times."""
        return read_events(f"{self.url}/{EVENTS}").scalars(tag)

    @property
    def checkpoints(self) -> list[int]:
        """The steps after which there is a checkpoint, in order."""
        return checkpoint.sealed_steps(self.store)

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """A checkpoint; the last one by default.

        Raises:
            RunError: there is none.
        """
        steps = self.checkpoints
        if not steps or (step is not None and step not in steps):
            raise RunError(f"{self.url} has no checkpoint{'' if step is None else f' {step}'}")
        return Checkpoint(self.store, steps[-1] if step is None else step)

    @property
    def network(self) -> torch.nn.Module:
        """The network with the parameters of the last checkpoint, in eval mode."""
        return self.load(self.job.network.make())

    def load(self, network: torch.nn.Module, step: int | None = None) -> torch.nn.Module:
        """Gives a network the parameters and buffers of a checkpoint; returns it in eval mode."""
        tensors, _ = self.checkpoint(step).tensors("network.safetensors")
        saving.load_network(network, tensors)
        return network.eval()

    def evaluate(self, source: Source | None = None) -> Evaluation:
        """Scores the network here, in this process, with the Job's loss and metrics.

        Arguments:
            source: what on; the Job's test source by default.
        """
        job, plan = self.job, self.plan
        if source is None:
            if job.test is None:
                raise RunError(f"{self.url}: its job has no test source", hint="give a source")
            source = job.test.make()
        threads = torch.get_num_threads()
        torch.set_num_threads(plan.threads)
        try:
            feed = Feed(
                "test",
                source,
                source.manifest(),
                range(plan.shards),
                plan.shards,
                plan.seed,
                torch.device("cpu"),
            )
            network = self.network
            with torch.autocast("cpu", torch.bfloat16, job.precision == "bfloat16"):
                return score(
                    alone(),
                    network,
                    network,
                    feed,
                    plan.shards,
                    loss=job.loss.make(),
                    task=job.evaluate.task,
                    top_k=job.evaluate.top_k,
                    batch_size=job.evaluate.batch_size or job.batch_size,
                )
        finally:
            torch.set_num_threads(threads)
