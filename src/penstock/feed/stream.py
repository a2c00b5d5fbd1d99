"""Records that a function gives for as long as it gives them: nobody knows how many beforehand."""

from __future__ import annotations

import functools
import secrets
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from penstock.errors import DataError
from penstock.feed.converter import Values
from penstock.feed.filling import Filling, filling, key_of
from penstock.feed.manifest import Manifest, Part, Piece
from penstock.feed.source import Records, Source
from penstock.feed.spooled import SpoolRecords


def stream(function: Callable[[int], Iterable[tuple[Any, Any]]], *, partitions: int) -> Source:
    """Records that a function gives, partition by partition: a stream, a database, a generator.

    They are read once, by a thread of the worker that trains on them, and kept in a spool: training
    begins with the first of them, and later epochs read the spool. How many there are is known
    after the first epoch. A worker that is started anew reads its partitions from the beginning,
    so a function must give the same records again. It may use the memory of its arrays anew.

    Arguments:
        function: called with the number of a partition; gives pairs (features, target) of arrays
            whose first dim is the record, any number of records each, all of one dtype and shape.
            Must be picklable. It may never end, if the run is stopped otherwise.
        partitions: how many there are; partition p is shard p mod shards' own.

    Raises:
        DataError: there are no partitions; in training, for what the function gives or raises.
    """
    if partitions < 1:
        raise DataError(f"stream: {partitions} partitions: expected 1 or more")
    if not callable(function):
        raise DataError(
            f"stream: {function!r} is not a function",
            hint="give a function of a partition's number that gives pairs of arrays",
        )
    return StreamSource(function, partitions)


@dataclass(frozen=True)
class StreamSource:
    """A function of a partition's number."""

    function: Callable[[int], Iterable[tuple[Any, Any]]]
    partitions: int
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Its own: functions of one name may give other rows."""

    def manifest(self) -> Manifest:
        return Manifest((), whole=True, open=True)

    def open(self, pieces: Sequence[Piece]) -> Records:
        raise DataError("stream: its records are read shard by shard", hint="open_shard")

    def describe(self) -> None:
        return None

    def open_shard(self, shard: int, shards: int) -> SpoolRecords:
        numbers = self._numbers(shard, shards)

        @functools.cache
        def spool(n: int) -> Filling:
            where = f"stream: partition {numbers[n]}"
            key = key_of("stream", self.token, numbers[n])
            return filling(key, where, None, functools.partial(self._read, numbers[n], where))

        def folder(n: int) -> Path | None:
            return spool(n).folder if n < len(numbers) else None

        return SpoolRecords(folder, "stream")

    def parts(self, shard: int, shards: int, records: SpoolRecords) -> list[Part]:
        return records.parts(self._numbers(shard, shards))

    @property
    def _name(self) -> str:
        function = self.function
        if isinstance(function, functools.partial):
            function = function.func
        return str(getattr(function, "__qualname__", type(function).__qualname__))

    def _numbers(self, shard: int, shards: int) -> range:
        return range(shard, self.partitions, shards)

    def _pairs(self, partition: int, where: str) -> Iterator[Any]:
        try:
            yield from self.function(partition)
        except Exception as error:
            stack = "".join(traceback.format_exception(error)).rstrip()
            raise DataError(
                f"{where}: {self._name} raised {type(error).__name__}: {error}\n{stack}"
            ) from error

    def _read(self, partition: int, where: str) -> Generator[Values, None, None]:
        for number, pair in enumerate(self._pairs(partition, where)):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise DataError(
                    f"{where}: {self._name} gave a {type(pair).__name__}: expected a pair "
                    "(features, target)",
                    hint="both are arrays whose first dim is the record",
                )
            x, y = (np.array(half, order="C") for half in pair)  # a copy: it is written later
            if not x.ndim or not y.ndim or len(x) != len(y):
                raise DataError(
                    f"{where}: pair {number} of {self._name} has features {x.shape} and target "
                    f"{y.shape}: expected as many of both",
                    hint="the first dim of both counts the records",
                )
            yield {"x": x, "y": y}
