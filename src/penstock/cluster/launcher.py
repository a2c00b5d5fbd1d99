"""`Launcher`: starts the worker processes of a run and tells of their ends."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class WorkerStarted:
    """A worker process has begun."""

    rank: int
    pid: int
    host: str


@dataclass(frozen=True)
class WorkerOutput:
    """Bytes that a worker wrote to its standard output or error."""

    rank: int
    data: bytes


@dataclass(frozen=True)
class WorkerExited:
    """A worker process has ended.

    Arguments:
        pid: 0 where it was never told.
        code, signal: its exit code, or what killed it.
        cause: what ended it, in words, where that is known.
    """

    rank: int
    pid: int
    code: int | None
    signal: int | None
    cause: str = ""

    def __str__(self) -> str:
        return how_ended(self.code, self.signal) + (f", {self.cause}" if self.cause else "")


def how_ended(code: int | None, number: int | None) -> str:
    """A process's end in words, by its exit code or the signal that killed it."""
    if number is None:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {number}"


Event = WorkerStarted | WorkerOutput | WorkerExited


class Launcher(Protocol):
    """The worker processes of one run. Nothing of them is left after `close`."""

    def start(self, payload: Sequence[bytes | memoryview], target: str, workers: int) -> None:
        """Starts ranks 0 to workers - 1, each calling `target` ("module:function") on the payload.

        The function receives the descriptor of a file with the payload's parts, one after the
        other, that it may map but whose offset it shares with others; it returns an exit code.
        """
        ...

    def filenos(self) -> list[int]:
        """What to wait on: readable when `poll` has something to tell."""
        ...

    def poll(self) -> list[Event]:
        """What has happened since the last call; does not wait."""
        ...

    def kill(self, rank: int) -> None:
        """Kills a worker at once, and all it has started."""
        ...

    def close(self) -> None:
        """Kills all that still run and waits for their end."""
        ...
