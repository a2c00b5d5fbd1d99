"""A source whose batches pass a function of the user's, beside training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from penstock.errors import DataError
from penstock.feed.manifest import Manifest, Piece
from penstock.feed.source import Records, Rows, Source, Stage


def map(source: Source, function: Callable[..., tuple[Any, Any]], *, workers: int = 1) -> Source:
    """The source, with a function applied to each batch while training computes on others.

    Arguments:
        source: any source, also a mapped one: functions are applied in order.
        function: called as `function(x, y)` with features and target of a batch, as CPU tensors
            that it may change; gives both, with as many rows. If it takes a third argument, that
            is a `numpy.random.Generator` of the batch's own: what it draws from there is the same
            on any number of workers, which what it draws from global generators is not. Must be
            picklable.
        workers: threads that may be in it at once; batches keep their order.

    Raises:
        DataError: `function` cannot be called, or `workers` is below 1; in training, for a
            function that does not give what it should.
    """
    name = getattr(function, "__name__", type(function).__name__).strip("<>")
    if not callable(function):
        raise DataError(
            f"feed.map: {function!r} is not a function",
            hint="feed.map(source, function, workers=2)",
        )
    if workers < 1:
        raise DataError(f"feed.map: workers {workers}: expected 1 or more")
    return MappedSource(source, Stage(name, partial(_apply, name, function), workers))


@dataclass(frozen=True)
class MappedSource:
    """A source with one more stage."""

    source: Source
    stage: Stage

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (*getattr(self.source, "stages", ()), self.stage)

    def manifest(self) -> Manifest:
        return self.source.manifest()

    def open(self, pieces: Sequence[Piece]) -> Records:
        return self.source.open(pieces)

    def describe(self) -> None:
        return None


def origin(source: Source) -> Source:
    """The source itself, without what it is mapped by."""
    return origin(source.source) if isinstance(source, MappedSource) else source


def replaced(source: Source, other: Source) -> Source:
    """Another source, mapped by what this one is mapped by."""
    if isinstance(source, MappedSource):
        return MappedSource(replaced(source.source, other), source.stage)
    return other


def _apply(
    name: str, function: Callable[..., Any], rows: Rows, random: np.random.Generator
) -> Rows:
    given = function(rows.x, rows.y, random) if _draws(function) else function(rows.x, rows.y)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise DataError(
            f"feed.map: {name} gave a {type(given).__name__}: expected a pair (x, y)",
            hint="return both, features and target",
        )
    for half, value in zip("xy", given, strict=True):
        for leaf in value.values() if isinstance(value, dict) else _leaves(value):
            if len(leaf) != len(rows.ids):
                raise DataError(
                    f"feed.map: {name} gave {half} of {len(leaf)} rows for a batch of "
                    f"{len(rows.ids)}",
                    hint="a function keeps the rows of a batch; on_bad_record leaves bad ones out",
                )
    return Rows(given[0], given[1], rows.ids)


def _leaves(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def _draws(function: Callable[..., Any]) -> bool:
    """Whether it takes a generator as well."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in functions do not tell
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) > 2
