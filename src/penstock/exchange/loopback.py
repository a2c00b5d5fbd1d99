"""A group inside one process, a thread per rank: the in-memory twin of every group."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from penstock.errors import TransportError


def loopback(world_size: int, *, timeout_s: float = 60.0) -> list[LoopbackGroup]:
    """The groups of all ranks; each is to be used by a thread of its own."""
    meeting = _Meeting(world_size, timeout_s)
    return [LoopbackGroup(rank, meeting) for rank in range(world_size)]


@dataclass
class _Meeting:
    world_size: int
    timeout_s: float
    changed: threading.Condition = field(default_factory=threading.Condition)
    brought: dict[int, dict[int, tuple[str, torch.Tensor]]] = field(default_factory=dict)
    taken: dict[int, int] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)


class LoopbackGroup:
    """One rank of a loopback group."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.world_size = meeting.world_size
        self._meeting = meeting
        self._sequence = 0

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> LoopbackWork:
        def take(inputs: dict[int, torch.Tensor]) -> None:
            for rank, tensor in inputs.items():
                output[rank].copy_(tensor)

        return self._start("all_gather", input, take)

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor) -> LoopbackWork:
        def take(inputs: dict[int, torch.Tensor]) -> None:
            for rank, tensor in inputs.items():
                output[rank].copy_(tensor[self.rank])

        return self._start("all_to_all", input, take)

    def broadcast(self, tensor: torch.Tensor, root: int) -> LoopbackWork:
        return self._start("broadcast", tensor, lambda inputs: tensor.copy_(inputs[root]))

    def barrier(self) -> None:
        self._start("barrier", torch.empty(0), lambda inputs: None).wait()

    def close(self) -> None:
        with self._meeting.changed:
            self._meeting.gone.add(self.rank)
            self._meeting.changed.notify_all()

    def _start(
        self, name: str, tensor: torch.Tensor, take: Callable[[dict[int, torch.Tensor]], object]
    ) -> LoopbackWork:
        sequence, self._sequence = self._sequence, self._sequence + 1
        with self._meeting.changed:
            there = self._meeting.brought.setdefault(sequence, {})
            there[self.rank] = (name, tensor.detach().clone())
            self._meeting.changed.notify_all()
        return LoopbackWork(self._meeting, sequence, name, take)


class LoopbackWork:
    """A collective of a loopback group under way."""

    def __init__(
        self,
        meeting: _Meeting,
        sequence: int,
        name: str,
        take: Callable[[dict[int, torch.Tensor]], object],
    ) -> None:
        self._meeting, self._sequence, self._name, self._take = meeting, sequence, name, take

    def wait(self) -> None:
        meeting, deadline = self._meeting, time.monotonic() + self._meeting.timeout_s
        with meeting.changed:
            there = meeting.brought[self._sequence]
            while len(there) < meeting.world_size:
                missing = sorted(set(range(meeting.world_size)) - set(there))
                lost = [rank for rank in missing if rank in meeting.gone]
                remaining_s = deadline - time.monotonic()
                if lost or remaining_s <= 0:
                    why = f"rank {lost[0]} left" if lost else f"{meeting.timeout_s} s passed"
                    raise TransportError(
                        f"{self._name} number {self._sequence}: {why}; missing ranks {missing}"
                    )
                meeting.changed.wait(remaining_s)
            names = {name for name, _ in there.values()}
            if len(names) > 1:
                raise TransportError(
                    f"collective number {self._sequence} differs between ranks: {sorted(names)}"
                )
            self._take({rank: tensor for rank, (_, tensor) in sorted(there.items())})
            meeting.taken[self._sequence] = meeting.taken.get(self._sequence, 0) + 1
            if meeting.taken[self._sequence] == meeting.world_size:
                del meeting.brought[self._sequence], meeting.taken[self._sequence]
