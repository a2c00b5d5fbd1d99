"""What to train and how: the `Job`, in Python or YAML, checked in both alike."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from penstock import jobfile
from penstock.parts import (
    STRATEGIES,
    AllReduce,
    Averaging,
    Checkpoint,
    Clip,
    Count,
    Evaluate,
    Events,
    Interval,
    Stop,
    as_tuple,
    direction,
    strategy_of,
)
from penstock.section import Problem, Problems, Section, label, problems_of, received
from penstock.spec import CALLBACK, LOSS, NETWORK, OPTIMIZER, SCHEDULE, SOURCE, Maker, Role, fold

if TYPE_CHECKING:
    from penstock.runtime.run import Run

__all__ = [
    "AllReduce",
    "Averaging",
    "Checkpoint",
    "Clip",
    "Evaluate",
    "Events",
    "Interval",
    "Job",
    "Maker",
    "Stop",
    "direction",
]


def _maker(role: Role, *, optional: bool = False) -> BeforeValidator:
    def read(value: Any, info: ValidationInfo) -> Maker | None:
        if value is None and optional:
            return None
        return Maker.of(value, role, (info.context or {}).get("folder"))

    return BeforeValidator(read)


_TASKS: dict[str, Literal["classification", "regression"]] = {
    **dict.fromkeys(("crossentropy", "nll", "multimargin"), "classification"),
    **dict.fromkeys(("mse", "l1", "smoothl1", "huber"), "regression"),
}


class Job(Section):
    """What to train and how. Immutable; every value is checked when it is made.

    Arguments:
        network: an `nn.Module`, or a function or class that makes one (under `seed`); by name, as
            `penstock.zoo:lenet` or `{package.module:name: {keyword: value}}`. A module given
            ready-made brings its own weights.
        loss: a name of torch.nn.functional (`cross_entropy`, `mse`), or any callable
            `(output, target) -> scalar` that gives the mean over its examples.
        optimizer: what makes it from parameters: a class, `functools.partial(torch.optim.SGD,
            lr=0.1)`, or by name, `{adagrad: {lr: 0.01}}`.
        schedule: of the learning rate: what makes it from the optimizer, likewise
            (`{cosine_annealing: {T_max: 1000}}`).
        schedule_every: what it counts: "step" or "epoch".
        train, test: where records come from: a `Source` (`feed.mnist()`, `feed.arrays(x, y)`), or
            by name, `{mnist: {split: train}}`, `package.module:function`.
        batch_size: examples per shard and step.
        epochs: times that every training record is used.
        workers: processes.
        shards: logical replicas; the result depends on their number and not on that of the
            workers. Default: as many as workers, and never fewer.
        threads: of each worker. Default: chosen by measurement when the run begins.
        seed: of weights, order and everything random.
        strategy: how shards agree: `AllReduce()` or `Averaging()`.
        checkpoint, stop, clip, evaluate, events: see their classes.
        accumulate: batches whose gradients are summed up to one step.
        precision: of the forward pass: "float32", or "bfloat16" (autocast; parameters and sums
            stay float32).
        recovery: what happens when a worker is lost: "restart" goes on from the last checkpoint by
            itself, up to `max_restarts` times; "none" ends the run (it can be resumed).
        max_restarts: how many losses a run gets over.
        callbacks: objects or functions that the run tells what happens.
        device: "cpu", "cuda", or "auto": a GPU where there is one.
        runs: the folder, on any fsspec URL, in which the run makes its directory.
        name: of the run; default from the network, in lower case.

    Raises:
        JobError: everything that is wrong, each with its key.
    """

    network: Annotated[InstanceOf[Maker], _maker(NETWORK)]
    loss: Annotated[InstanceOf[Maker], _maker(LOSS)]
    optimizer: Annotated[InstanceOf[Maker], _maker(OPTIMIZER)]
    schedule: Annotated[InstanceOf[Maker] | None, _maker(SCHEDULE, optional=True)] = None
    schedule_every: Literal["step", "epoch"] = "step"
    train: Annotated[InstanceOf[Maker], _maker(SOURCE)]
    test: Annotated[InstanceOf[Maker] | None, _maker(SOURCE, optional=True)] = None
    batch_size: Count
    epochs: Count
    workers: Count = 1
    shards: int = Field(default=None, validate_default=True)
    threads: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    strategy: Annotated[AllReduce | Averaging, BeforeValidator(strategy_of)] = AllReduce()
    checkpoint: Checkpoint = Checkpoint()
    stop: Stop | None = None
    clip: Clip | None = None
    accumulate: Count = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    evaluate: Evaluate = Field(default=Evaluate(), validate_default=True)
    events: Events = Events()
    recovery: Literal["restart", "none"] = "restart"
    max_restarts: Annotated[int, Field(ge=0)] = 3
    callbacks: Annotated[
        tuple[Annotated[InstanceOf[Maker], _maker(CALLBACK)], ...], BeforeValidator(as_tuple)
    ] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    runs: Annotated[str, Field(min_length=1)] = "runs"
    name: str = Field(default=None, validate_default=True)

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @field_validator("shards", mode="before")
    @classmethod
    def _as_workers(cls, shards: Any, info: ValidationInfo) -> Any:
        return info.data.get("workers", 1) if shards is None else shards

    @field_validator("precision", mode="before")
    @classmethod
    def _full_word(cls, precision: Any) -> Any:
        return "bfloat16" if precision == "bf16" else precision

    @field_validator("device", mode="before")
    @classmethod
    def _by_make(cls, device: Any) -> Any:
        if device == "gpu":
            hint = "did you mean 'cuda'?"
            raise Problems(Problem((), received(device), "one of: auto, cpu, cuda", hint))
        return device

    @field_validator("runs", mode="before")
    @classmethod
    def _as_text(cls, runs: Any) -> Any:
        return os.fspath(runs) if isinstance(runs, Path) else runs

    @field_validator("name", mode="before")
    @classmethod
    def _by_network(cls, name: Any, info: ValidationInfo) -> Any:
        network = info.data.get("network")
        return name if name is not None else (network.word if network else "") or "job"

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise Problems(
                Problem((), received(name), "letters, digits and . _ -: it names a folder")
            )
        return name

    @field_validator("evaluate")
    @classmethod
    def _task_by_loss(cls, evaluate: Evaluate, info: ValidationInfo) -> Evaluate:
        loss = info.data.get("loss")
        if evaluate.task is not None or loss is None:
            return evaluate
        task = _TASKS.get(fold(loss.word).removesuffix("loss"))
        return Evaluate.model_construct(
            evaluate.model_fields_set, **{**dict(evaluate), "task": task}
        )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problems: list[Problem] = []
        if self.shards < self.workers:
            text = f"{self.shards} shards for {self.workers} workers"
            hint = "a worker carries one shard or more: raise shards or lower workers"
            problems.append(Problem(("shards",), text, f"{self.workers} or more", hint))
        for section, key, metric in (
            ("stop", "metric", self.stop and self.stop.metric),
            ("checkpoint", "best", self.checkpoint.best),
        ):
            if metric and self.test is None:
                text = f"{metric!r} is measured on test, and there is none"
                problems.append(Problem((section, key), text, hint="add test: what to evaluate on"))
        if self.loss.keywords.get("reduction", "mean") != "mean":
            text = received(self.loss.keywords["reduction"])
            hint = "shards are weighed by their examples, which needs the mean over them"
            problems.append(Problem(("loss", self.loss.key, "reduction"), text, "mean", hint))
        if self.evaluate.task == "regression" and "top_k" in self.evaluate.model_fields_set:
            problems.append(Problem(("evaluate", "top_k"), "is for classification, not regression"))
        if problems:
            raise Problems(*problems)
        return self

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Self:
        """The Job of a file.

        Names are looked up, and with them modules imported, in the file's folder, the current
        folder and among what is installed. Relative paths of sources start from the file's folder.

        Arguments:
            path: of the file, on this machine.
            overrides: `batch_size=64`, `strategy.averaging.every=10`: each put over the file's
                value, its own value read as YAML. Relative paths start from the current folder.

        Raises:
            JobError: everything that is wrong with the file, each with its line.
        """
        document = jobfile.read(path).override(overrides)
        folder = os.path.dirname(os.path.abspath(path))
        try:
            job = cls.model_validate(document.values, context={"folder": folder})
        except ValidationError as error:
            raise document.error(problems_of(error, cls)) from None
        if document.problems:
            raise document.error([])
        return job

    def to_yaml(self) -> str:
        """As resolved: every default is there, paths are absolute, and reading it gives this Job.

        What was given in Python and cannot be said is null, with a comment that tells what it was;
        a module of `zoo` is said by what made it, without its weights.
        """
        fields = {
            "name": self.name,
            **{name: getattr(self, name) for name in type(self).model_fields},
        }
        return jobfile.write({name: _said(value) for name, value in fields.items()})

    def replace(self, **changes: Any) -> Self:
        """Another Job with these values, checked anew; defaults follow what they depend on."""
        values = self.given()
        if "evaluate" in values:
            values["evaluate"] = self.evaluate.given()
        return type(self)(**{**values, **changes})

    def run(
        self,
        on: Any = "local",
        *,
        workers: int | None = None,
        resume: Any = None,
        run_dir: str | None = None,
        progress: bool = True,
        trace: bool = False,
    ) -> Run:
        """Train.

        Arguments:
            on: where the workers live: "local" is this machine; "spark://host:7077", "yarn",
                "k8s://...", "sc://host:port" or a SparkSession a cluster; `penstock.Spark` says
                more about one.
            workers: how many, in place of the job's.
            resume: a run, or its directory, to go on from. Its shards, threads and seed stay as
                they were, and so does its data.
            run_dir: the run's directory; default a new one in `runs`.
            progress: whether to show how the run goes on standard error.
            trace: whether every rank writes what it did and what it waited for as
                `trace/rank-N.json` in the run's directory, for ui.perfetto.dev.

        Returns:
            The Run.
        """
        # The one import that points upward, when it is called: a Job knows how it is run only by
        # handing itself over.
        from penstock.runtime.driver import run_job

        return run_job(
            self,
            on=on,
            workers=workers,
            resume=resume,
            run_dir=run_dir,
            progress=progress,
            trace=trace,
        )


def _said(value: Any) -> Any:
    if isinstance(value, Maker):
        said = value.describe()
        return jobfile.Unsaid(label(value.target)) if said is None else said
    if isinstance(value, Section):
        fields = type(value).model_fields.items()
        keys = {info.alias or name: _said(getattr(value, name)) for name, info in fields}
        return {value.path[-1]: keys} if type(value) in STRATEGIES.values() else keys
    if isinstance(value, tuple):
        return [_said(item) for item in value]
    return str(value) if isinstance(value, Interval) else value
