"""`Launcher`: the agents of a run, one for each rank, which start its worker processes.

An agent holds a rank: it keeps the rank's data, starts and ends its worker, passes on what the
worker prints, and tells how it ended. On this machine the driver plays all agents; on Spark each is
a task. An agent that is lost may come again, as another attempt; who holds a rank is not decided
here but in `runtime.membership`.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class AgentJoined:
    """An agent is there.

    Arguments:
        agent: its number, never used twice in a run.
        attempt: grows with each attempt at the rank.
        facts: of its node, as `environment.facts` gives them; empty on this machine.
    """

    agent: int
    rank: int
    attempt: int
    host: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AgentReady:
    """An agent can start its rank's worker."""

    agent: int


@dataclass(frozen=True)
class AgentRead:
    """An agent has read all that it was given.

    Arguments:
        bad: of sources with bad records that were left out: the source, their number, and a line
            for people.
    """

    agent: int
    bad: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class AgentHeard:
    """An agent is alive."""

    agent: int


@dataclass(frozen=True)
class AgentFailed:
    """An agent cannot do its work, for a reason that would come again, such as bad data.

    Arguments:
        kind: name of an error of `penstock.errors`, or of another.
    """

    agent: int
    kind: str
    message: str
    hint: str


@dataclass(frozen=True)
class AgentLost:
    """An agent is gone."""

    agent: int
    cause: str


@dataclass(frozen=True)
class ClusterFailed:
    """No agent will come any more."""

    cause: str


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
AgentEvent = (
    AgentJoined | AgentReady | AgentRead | AgentHeard | AgentFailed | AgentLost | ClusterFailed
)


@dataclass(frozen=True)
class OfWorker:
    """What an agent tells of its worker in a generation."""

    agent: int
    generation: int
    event: Event


class Launcher(Protocol):
    """The agents of one run. Nothing of them and their workers is left after `close`."""

    where: str
    """In words: "on this machine"."""
    keep: bool
    """Whether what agents have read is to outlive them, for a run that goes on from there."""

    def gather(self, ranks: int) -> None:
        """Asks for an agent for each of ranks 0 to ranks - 1; `poll` tells when they come."""
        ...

    def start(
        self,
        agent: int,
        generation: int,
        payload: Sequence[bytes | memoryview],
        target: str,
        environment: Mapping[str, str],
    ) -> None:
        """Has an agent start its rank's worker, which calls `target` on the payload.

        The function ("module:function") receives the descriptor of a file with the payload's
        parts, one after the other, that it may map but whose offset it shares with others; it
        returns an exit code.
        """
        ...

    def end(self, agent: int) -> None:
        """Has an agent kill its worker at once, and all it has started; `poll` tells its exit."""
        ...

    def wait(self, agent: int) -> None:
        """Has an agent stand by: another holds its rank."""
        ...

    def leave(self, agent: int, reason: str) -> None:
        """Has an agent end, and its worker with it; nothing more is told of it."""
        ...

    def filenos(self) -> list[int]:
        """What to wait on: readable when `poll` has something to tell."""
        ...

    def poll(self) -> list[AgentEvent | OfWorker]:
        """What has happened since the last call; does not wait."""
        ...

    def preparing(self) -> bool:
        """Whether what the agents take in is still being made."""
        ...

    def missing(self) -> str:
        """Why agents may be missing, as far as the cluster tells: facts and the fix, or nothing."""
        ...

    def close(self) -> None:
        """Ends all agents and their workers and waits until they are gone."""
        ...
