"""The parts of a Job: how shards agree, what is kept, when to stop, what is measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from penstock.errors import did_you_mean
from penstock.section import Key, Problem, Problems, Section, problems_of, received
from penstock.spec import fold

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Interval:
    """How often: every `count` steps or epochs."""

    count: int
    unit: Literal["step", "epoch"]

    @classmethod
    def of(cls, value: Any) -> Interval:
        """Of `"200 steps"` or `"1 epoch"`."""
        if isinstance(value, Interval):
            return value
        found = re.fullmatch(
            r"\s*([1-9]\d*)\s*(step|epoch)s?\s*", value if isinstance(value, str) else ""
        )
        if not found:
            raise Problems(Problem((), received(value), "such as '200 steps' or '1 epoch'"))
        return cls(int(found[1]), "step" if found[2] == "step" else "epoch")

    def __str__(self) -> str:
        return f"{self.count} {self.unit}{'s' if self.count > 1 else ''}"


Every = Annotated[InstanceOf[Interval], BeforeValidator(Interval.of)]

_UNITS_S = {"s": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "day": 86400}


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]+)\s*", value)
    number, unit = found.groups() if found else ("", "")
    unit_s = _UNITS_S.get(unit) or _UNITS_S.get(unit.removesuffix("s"))
    if unit_s is None:
        raise Problems(Problem((), received(value), "such as '90 s', '30 minutes' or '2 hours'"))
    return float(number) * unit_s


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def direction(metric: str) -> Literal["min", "max"]:
    """Whether less or more of a metric is better, by its name."""
    low = ("loss", "error", "mse", "rmse", "mae", "perplexity")
    return "min" if any(word in metric.lower() for word in low) else "max"


class AllReduce(Section):
    """Gradients are averaged over all shards before every step, summed along one fixed tree.

    Arguments:
        bucket_bytes: of gradient that are sent together, while backward goes on.
        into_forward: whether sending goes on into the next step's forward, first layers first, and
            each layer is updated as it is needed; null: where workers are on several hosts, and
            network and optimizer allow it. The result is the same, to the bit.
    """

    path: ClassVar[Key] = ("strategy", "allreduce")
    bucket_bytes: Count = 4 * 2**20
    into_forward: bool | None = None


class Averaging(Section):
    """Each shard steps by itself; parameters are averaged over all shards now and then.

    Arguments:
        every: steps between two averagings.
        average_optimizer_state: average the optimizer's tensors too (moments, sums of squares);
            False leaves to each shard its own.
    """

    path: ClassVar[Key] = ("strategy", "averaging")
    every: Count = 5
    average_optimizer_state: bool = True


class Checkpoint(Section):
    """What is kept to go on from.

    Arguments:
        every: how often one is written.
        keep: how many of the newest stay.
        best: a metric of the evaluation; the checkpoint with its best value stays as well.
    """

    path: ClassVar[Key] = ("checkpoint",)
    every: Every = Interval(1, "epoch")
    keep: Count = 3
    best: str | None = None


class Stop(Section):
    """When to end before `epochs` are done: a metric no longer improves, or time is up.

    Arguments:
        metric: of the evaluation, such as "accuracy" or "loss".
        patience: evaluations in a row without improvement after which to stop.
        min_delta: what counts as improvement must be more than this.
        time: of the run, as "30 minutes", "2 hours", "90 s", or in seconds; read as `time_s`.
        mode: "max" or "min" is better; default by the metric's name (loss and error: min).
    """

    path: ClassVar[Key] = ("stop",)
    metric: str | None = None
    patience: Count | None = None
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    time_s: Annotated[float | None, BeforeValidator(_seconds), Field(gt=0)] = Field(
        default=None, alias="time"
    )
    mode: Literal["max", "min"] | None = Field(default=None, validate_default=True)

    @field_validator("mode")
    @classmethod
    def _by_name(cls, mode: Any, info: ValidationInfo) -> Any:
        metric = info.data.get("metric")
        return mode or (direction(metric) if metric else None)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.metric is None and self.time_s is None:
            raise Problems(
                Problem((), "says neither what nor when", "metric with patience, or time")
            )
        if (self.metric is None) != (self.patience is None):
            there, lacks = ("metric", "patience") if self.metric else ("patience", "metric")
            raise Problems(Problem((there,), f"is given without {lacks}", f"{lacks} as well"))
        return self


class Clip(Section):
    """A limit to the gradient, before the optimizer's step: exactly one of the two.

    Arguments:
        norm: of the gradient of all parameters together (L2); a longer one is scaled down to it.
        value: of each element; a larger one is cut to it, with its sign.
    """

    path: ClassVar[Key] = ("clip",)
    norm: Annotated[float, Field(gt=0)] | None = None
    value: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.norm is None) == (self.value is None):
            said = "neither norm nor value" if self.norm is None else "both norm and value"
            raise Problems(Problem((), f"has {said}", "exactly one of them"))
        return self


class Evaluate(Section):
    """How the test source is used.

    Arguments:
        every: how often, besides at the end.
        task: "classification" or "regression"; default by the loss, and None (the loss alone is
            measured) where the loss does not tell.
        top_k: in classification, for each k the share of records whose class is among the k
            likeliest.
        batch_size: examples per shard and step; default the job's.
    """

    path: ClassVar[Key] = ("evaluate",)
    every: Every = Interval(1, "epoch")
    task: Literal["classification", "regression"] | None = None
    top_k: Annotated[tuple[Count, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (1,)
    batch_size: Count | None = None


class Events(Section):
    """What is written to the run's event files.

    Arguments:
        scalars_every: steps between two points of loss and speed.
        histograms_every: steps between two histograms of parameters and gradients; 0: never.
    """

    path: ClassVar[Key] = ("events",)
    scalars_every: Count = 1
    histograms_every: Annotated[int, Field(ge=0)] = 0


STRATEGIES: dict[str, type[AllReduce] | type[Averaging]] = {
    "allreduce": AllReduce,
    "averaging": Averaging,
}


def strategy_of(value: Any) -> Any:
    """Of a strategy, its name, or `{name: {key: value}}`."""
    if isinstance(value, tuple(STRATEGIES.values())):
        return value
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, Mapping) or len(value) != 1:
        text = received(dict(value) if isinstance(value, Mapping) else value)
        raise Problems(
            Problem((), text, f"one of: {', '.join(STRATEGIES)}, with its keys or alone")
        )
    ((name, keys),) = value.items()
    kind = STRATEGIES.get(fold(str(name)))
    if kind is None:
        owners = [word for word, known in STRATEGIES.items() if name in known.known()]
        hint = f"say strategy: {{{owners[0]}: {{{name}: ...}}}}" if owners else ""
        raise Problems(
            Problem(
                (),
                f"unknown strategy {name!r}",
                f"one of: {', '.join(STRATEGIES)}",
                hint or did_you_mean(fold(str(name)), list(STRATEGIES)),
            )
        )
    try:
        return kind.model_validate({} if keys is None else keys)
    except ValidationError as error:
        raise Problems(*(p.under(name) for p in problems_of(error, kind))) from None
