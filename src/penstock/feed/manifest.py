"""Which shard owns which rows: pure functions of the manifest.

Rows are numbered through all partitions in order. With N rows and S shards, shard s owns rows
[floor(N s / S), floor(N (s+1) / S)): sizes differ by at most one whatever the partitions' sizes,
empty ones included. A manifest of `whole` partitions (data that lies where it is worked on) is
not cut: partition p belongs to shard p mod S. An `open` one tells of data that nobody has counted
yet: its partitions are known once they have been read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, TypedDict


@dataclass(frozen=True)
class Partition:
    """A named run of rows: a file, a row group, a Spark partition, an array."""

    name: str
    rows: int


NO_CHECKSUM = "0" * 8
"""Of a number that no partition has; that of a partition without rows is another."""


class Part(TypedDict):
    """What a partition held that nobody had counted before: JSON values.

    Arguments:
        partition: its number.
        rows: of the partition.
        checksum: of its tensors; see `SpoolEnd`.
        layout: of a row, in words; empty where there are no rows.
    """

    partition: int
    rows: int
    checksum: str
    layout: str


def partition_of(part: Part) -> Partition:
    """As a manifest has it: its name changes with its rows."""
    return Partition(f"partition-{part['partition']} {part['checksum']}", part["rows"])


def counted(manifest: Manifest) -> dict[int, tuple[int, str]]:
    """Of a manifest that `partition_of` has made: its partitions' rows and checksums, by number.

    Of an open one there are none.
    """
    found = ((p.rows, p.name.rpartition(" ")[2]) for p in manifest.partitions)
    return {number: each for number, each in enumerate(found) if each[1] != NO_CHECKSUM}


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of partition number `partition`; the first has record id `first_id`."""

    partition: int
    start: int
    stop: int
    first_id: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Manifest:
    """The partitions of a source, in order. Recorded in the run: it fixes the order of records."""

    partitions: tuple[Partition, ...]
    whole: bool = False
    open: bool = False

    @property
    def rows(self) -> int:
        return sum(partition.rows for partition in self.partitions)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        partitions = tuple(Partition(**p) for p in values["partitions"])
        return cls(partitions, values["whole"], values.get("open", False))

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when a partition's name or rows change."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:16]

    def share(self, shard: int, shards: int) -> tuple[Piece, ...]:
        """The pieces that `shard` (0 to shards - 1) owns, in order; empty pieces are left out."""
        pieces = []
        if self.whole:
            low, high = 0, self.rows
        else:
            low, high = self.rows * shard // shards, self.rows * (shard + 1) // shards
        first = 0
        for number, partition in enumerate(self.partitions):
            start, stop = max(low - first, 0), min(high - first, partition.rows)
            if start < stop and (not self.whole or number % shards == shard):
                pieces.append(Piece(number, start, stop, first + start))
            first += partition.rows
        return tuple(pieces)

    def shard_rows(self, shards: int) -> tuple[int, ...]:
        """How many rows each shard owns."""
        return tuple(sum(p.rows for p in self.share(s, shards)) for s in range(shards))
