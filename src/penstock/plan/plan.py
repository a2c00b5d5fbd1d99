"""`Plan`: every decision taken before the run and kept for its life, however often it resumes."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from penstock.errors import RunError
from penstock.feed.manifest import Manifest

Borders = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Plan:
    """What fixes the arithmetic of a run. Equal plans give equal bits on any number of workers.

    Arguments:
        shards: logical replicas.
        threads: threads of each worker's kernels (another number adds in another order).
        seed: of order, initialization and random state.
        strategy: the Job's strategy as its file would say it.
        device: "cpu" or "cuda".
        manifests: the partitions of each source, by name: with the seed they fix the order.
        borders: where the flat buffers are cut into buckets, by dtype; None until the network is
            known to the workers.
        parameters, exchange_bytes: their number, and what each shard gives to an exchange.
        versions: of Python, torch and the processor's instruction set that kernels chose.
    """

    shards: int
    threads: int
    seed: int
    strategy: Any
    device: str
    manifests: dict[str, Manifest]
    borders: Borders | None = None
    parameters: int | None = None
    exchange_bytes: int | None = None
    versions: dict[str, str] = field(
        default_factory=lambda: {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        }
    )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = asdict(self)
        values["manifests"] = {name: m.to_dict() for name, m in self.manifests.items()}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """What `to_dict` gave."""
        try:
            manifests = {n: Manifest.from_dict(m) for n, m in values["manifests"].items()}
            return cls(**(values | {"manifests": manifests}))
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(f"this is not a plan of this version: {error}") from error

    def with_network(self, borders: Borders, parameters: int, exchange_bytes: int) -> Plan:
        """The plan once the network is known; frozen borders of an earlier run stay."""
        return replace(self, borders=borders, parameters=parameters, exchange_bytes=exchange_bytes)

    def show(self, workers: int) -> str:
        """A few lines for a terminal."""
        shard_rows = {n: m.shard_rows(self.shards) for n, m in self.manifests.items() if not m.open}
        read = [f"{name} as it is read" for name, m in self.manifests.items() if m.open]
        rows = ", ".join(
            f"{name} {sum(r):,} records ({min(r):,} to {max(r):,} a shard)"
            if min(r) != max(r)
            else f"{name} {sum(r):,} records ({r[0]:,} a shard)"
            for name, r in shard_rows.items()
        )
        rows = ", ".join(filter(None, [rows, *read]))
        lines = [
            f"{_count(self.shards, 'shard')} on {_count(workers, 'worker')} "
            f"of {_count(self.threads, 'thread')}, {self.device}",
            rows,
        ]
        if self.parameters is not None and self.exchange_bytes is not None:
            buckets = sum(len(b) for b in (self.borders or {}).values())
            lines.append(
                f"{self.parameters:,} parameters; an exchange moves "
                f"{self.exchange_bytes / 1e6:.2f} MB per shard in {_count(buckets, 'bucket')}"
            )
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
