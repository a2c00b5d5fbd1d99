"""Who is in a run: which agent holds which rank, when a generation of workers begins and ends.

A pure machine: events and times in, instructions out; it opens, waits for and asks nothing. Every
agent is in one condition, and `TRANSITIONS` says which event leads from which to which:

    joined ──► ready ──► starting ──► running ──► finished
                 ▲           └─────┬─────┘            │
                 │              ending                │      failed: and the run with it
                 └─────────────────┴──────────────────┘      lost: out of the run

A rank has one holder, and beside it at most one agent that stands by with a newer attempt and takes
the rank when the holder is lost. When all holders are ready they start as a generation. When one
of a generation is lost, the workers of the others are ended, and the next generation begins when
all are ready again.
An attempt's number is seen once at most: whoever comes with it again, or with an older one, leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

START_S = 60.0
"""How long a worker's process may take to be there; its fork server imports torch first."""
END_S = 10.0
"""How long a worker that is told to end may take, and the word of it."""
SILENCE_S = 30.0
"""How long an agent may be silent that sends a heartbeat every second."""


@dataclass(frozen=True)
class AgentJoined:
    """An agent is there.

    Arguments:
        agent: its number, never used twice in a run.
        attempt: grows with each attempt at the rank; 0 or more.
    """

    agent: int
    rank: int
    attempt: int
    host: str


@dataclass(frozen=True)
class AgentReady:
    """An agent has its rank's data."""

    agent: int


@dataclass(frozen=True)
class AgentHeard:
    """An agent's heartbeat."""

    agent: int


@dataclass(frozen=True)
class AgentLost:
    """An agent is gone: its connection has ended."""

    agent: int
    cause: str


@dataclass(frozen=True)
class AgentFailed:
    """An agent cannot have its rank's data, for a reason that would come again.

    Arguments:
        kind: name of the error's class.
    """

    agent: int
    kind: str
    message: str

    @property
    def cause(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class ClusterFailed:
    """No agent will come any more."""

    cause: str


@dataclass(frozen=True)
class WorkerStarted:
    """An agent has started its worker."""

    agent: int
    generation: int
    pid: int


@dataclass(frozen=True)
class WorkerFinished:
    """A worker has done all it had to do."""

    agent: int
    generation: int


@dataclass(frozen=True)
class WorkerEnded:
    """A worker has ended as it was asked to."""

    agent: int
    generation: int


@dataclass(frozen=True)
class WorkerLost:
    """A worker has ended before its time, by the machine's doing; its process is gone.

    Of one that hangs its peers tell: they lose it and end, and it is ended as the others are.
    """

    agent: int
    generation: int
    cause: str


@dataclass(frozen=True)
class WorkerFailed:
    """A worker has met an error of its own, which would come again."""

    agent: int
    generation: int
    cause: str


@dataclass(frozen=True)
class StopAsked:
    """The run is to stop."""

    cause: str


@dataclass(frozen=True)
class TimePassed:
    """Nothing but time, up to `Membership.deadline_s` at least."""


AgentEvent = AgentJoined | AgentReady | AgentHeard | AgentFailed | AgentLost
WorkerEvent = WorkerStarted | WorkerFinished | WorkerEnded | WorkerLost | WorkerFailed
Event = AgentEvent | ClusterFailed | WorkerEvent | StopAsked | TimePassed


@dataclass(frozen=True)
class StartWorker:
    """Have an agent start the worker of its rank."""

    agent: int
    rank: int
    generation: int


@dataclass(frozen=True)
class EndWorker:
    """Have an agent end its worker; a `WorkerEnded` or another end of it is to follow."""

    agent: int
    generation: int


@dataclass(frozen=True)
class Wait:
    """Have an agent stand by: another attempt holds its rank and is well."""

    agent: int


@dataclass(frozen=True)
class Leave:
    """Have an agent end, and its worker with it; nothing more of it counts."""

    agent: int
    reason: str


Kind = Literal["finished", "failed", "lost", "missing", "stopped"]


@dataclass(frozen=True)
class Verdict:
    """How a run has ended.

    Arguments:
        kind: finished; failed, by an error that would come again; lost, once more often than it
            may restart, or with the cluster; missing, when ranks were not ready in time; stopped,
            as it was asked to.
        generation: the last one; 0 if none began.
        ranks: to blame, in order; empty if none is.
        cause: in words; of several losses the first of the generation.
    """

    kind: Kind
    generation: int
    ranks: tuple[int, ...] = ()
    cause: str = ""


@dataclass(frozen=True)
class GiveUp:
    """The run is over. Comes once, as the last instruction but for `Leave` to late agents.

    Workers that still run, and agents, are left as they are: closing the launcher ends them.
    """

    verdict: Verdict


Instruction = StartWorker | EndWorker | Wait | Leave | GiveUp

Condition = Literal[
    "joined", "ready", "starting", "running", "finished", "ending", "failed", "lost"
]
TRAINING = ("starting", "running", "finished")
"""In a generation of which nobody is lost."""
WORKING = ("starting", "running", "ending")
"""With a worker process, as far as we know."""

TRANSITIONS: Mapping[tuple[type, Condition], Condition] = {
    (AgentReady, "joined"): "ready",
    (AgentFailed, "joined"): "failed",
    (AgentFailed, "ready"): "failed",
    (AgentFailed, "starting"): "failed",
    (AgentFailed, "running"): "failed",
    (AgentFailed, "ending"): "failed",
    (WorkerStarted, "starting"): "running",
    (WorkerFinished, "starting"): "finished",
    (WorkerFinished, "running"): "finished",
    (WorkerFinished, "ending"): "ready",
    (WorkerEnded, "starting"): "ready",
    (WorkerEnded, "running"): "ready",
    (WorkerEnded, "ending"): "ready",
    (WorkerLost, "starting"): "ready",
    (WorkerLost, "running"): "ready",
    (WorkerLost, "ending"): "ready",
    (WorkerFailed, "starting"): "failed",
    (WorkerFailed, "running"): "failed",
    (WorkerFailed, "ending"): "failed",
    (AgentLost, "joined"): "lost",
    (AgentLost, "ready"): "lost",
    (AgentLost, "starting"): "lost",
    (AgentLost, "running"): "lost",
    (AgentLost, "finished"): "lost",
    (AgentLost, "ending"): "lost",
}
"""What an event makes of an agent in a condition; where there is no entry it is ignored."""


@dataclass(frozen=True)
class Row:
    """A rank, for messages.

    Arguments:
        condition: "absent", or its holder's.
        host, attempt, agent: its holder's; None where there is none.
    """

    rank: int
    condition: str
    host: str | None = None
    attempt: int | None = None
    agent: int | None = None


@dataclass
class _Agent:
    number: int
    rank: int
    attempt: int
    host: str
    since_s: float  # in this condition
    condition: Condition = "joined"
    heard_s: float = math.inf  # from its first heartbeat on


@dataclass(frozen=True)
class _Loss:
    rank: int
    cause: str
    at_s: float


class Membership:
    """Who is in a run.

    Arguments:
        ranks: how many there are.
        max_restarts: how many generations may follow the first.
        gather_s: until all ranks are ready, from the beginning.
        regather_s: until all ranks are ready again, from a loss.
        stop_s: for workers to finish or end by themselves after `StopAsked`.
        now_s: when the run begins, on the clock of all later times, in seconds.
        start_s: from `StartWorker` to `WorkerStarted`; then the worker counts as lost.
        end_s: from `EndWorker` to the worker's end; then its agent counts as lost.
        silence_s: from one event of an agent to the next; then it counts as lost. From its first
            heartbeat on: agents that the driver plays itself send none.

    Attributes:
        generation: the present one; 0 before the first.
        verdict: how the run has ended, or None.
    """

    def __init__(
        self,
        ranks: int,
        *,
        max_restarts: int,
        gather_s: float,
        regather_s: float,
        stop_s: float,
        now_s: float,
        start_s: float = START_S,
        end_s: float = END_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.max_restarts = max_restarts
        self.generation = 0
        self.verdict: Verdict | None = None
        self._gather_s, self._regather_s, self._stop_s = gather_s, regather_s, stop_s
        self._start_s, self._end_s, self._silence_s = start_s, end_s, silence_s
        self._began_s = self._now_s = now_s
        self._agents: dict[int, _Agent] = {}
        self._holders: list[_Agent | None] = [None] * ranks
        self._standbys: list[_Agent | None] = [None] * ranks
        self._newest = [-1] * ranks  # attempt that has ever joined
        self._loss: _Loss | None = None  # the first of this generation
        self._stop: tuple[str, float] | None = None  # cause, and until when
        self._instructions: list[Instruction] = []

    @property
    def restarts(self) -> int:
        """How many generations have followed the first."""
        return max(0, self.generation - 1)

    @property
    def missing(self) -> list[int]:
        """Ranks for which the next generation waits: absent, without their data, or ending."""
        waited_for = ("absent", "joined", "ending")
        return [row.rank for row in self.table() if row.condition in waited_for]

    @property
    def deadline_s(self) -> float | None:
        """When a `TimePassed` must come at the latest; None only after the verdict.

        Infinite while workers train whose agents send no heartbeat.
        """
        if self.verdict is not None:
            return None
        return min(at_s for at_s, _ in self._deadlines())

    @property
    def waits(self) -> bool:
        """Whether ranks are gathered, at first or after a loss."""
        return self.verdict is None and (self.generation == 0 or self._loss is not None)

    def postpone(self, now_s: float) -> None:
        """The time to gather begins anew: what agents are to take in is still being made."""
        self._began_s = max(self._began_s, now_s)
        if self._loss is not None:
            self._loss = replace(self._loss, at_s=max(self._loss.at_s, now_s))

    def table(self) -> list[Row]:
        """Every rank, in order."""
        return [
            Row(rank, "absent")
            if agent is None
            else Row(rank, agent.condition, agent.host, agent.attempt, agent.number)
            for rank, agent in enumerate(self._holders)
        ]

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """What to do, in this order, after an event.

        Events of agents and generations that are not, or no longer, in the run are ignored. A
        deadline passes with `TimePassed` only: hand over what has come before it first. A worker
        that ended because it lost its peers is a `WorkerLost`; the cause of it, where there is one,
        is to come before, for the first loss is what a verdict names.

        Arguments:
            now_s: when it came.
        """
        if self.verdict is not None:
            if isinstance(event, AgentJoined):
                return [Leave(event.agent, "the run is over")]
            return []
        self._instructions = []
        self._now_s = max(self._now_s, now_s)
        match event:
            case AgentJoined():
                self._join(event)
            case ClusterFailed(cause):
                self._lose_cluster(cause)
            case StopAsked(cause):
                self._stop = self._stop or (cause, self._now_s + self._stop_s)
            case TimePassed():
                self._pass_deadlines()
            case _:
                self._hear(event)
        self._settle()
        return self._instructions

    def validate(self) -> None:
        """Asserts what must hold between any two events."""
        placed: list[int] = []
        for rank, pair in enumerate(zip(self._holders, self._standbys, strict=True)):
            holder, standby = pair
            for agent in filter(None, pair):
                placed.append(agent.number)
                assert self._agents.get(agent.number) is agent, f"{agent} is unknown"
                assert agent.rank == rank, f"{agent} at rank {rank}"
                assert agent.attempt <= self._newest[rank], f"{agent} is newer than the newest"
            if standby is not None:
                assert holder is not None, f"rank {rank} is absent while {standby} waits for it"
                assert holder.attempt < standby.attempt, f"{standby} is older than {holder}"
                assert standby.condition in ("joined", "ready"), f"{standby} stands by"
        assert sorted(placed) == sorted(self._agents), "an agent has no place, or two"
        assert self.restarts <= max(0, self.max_restarts), "too many restarts"
        if self.verdict is not None:
            assert self.deadline_s is None, "a deadline after the verdict"
            return
        conditions = [row.condition for row in self.table()]
        training = [condition in TRAINING for condition in conditions]
        if self.generation == 0 or self._loss is not None:
            assert not any(training), "a rank trains in no generation"
        elif self._stop is None:
            assert all(training), "a rank has left its generation unnoticed"
        assert set(conditions) != {"ready"}, "all are ready and nothing begins"
        if self._stop is None:
            assert set(conditions) != {"finished"}, "all have finished and nothing ends"
        else:
            assert set(conditions) & set(WORKING), "nothing runs and nothing stops"
        silent = all(agent.heard_s == math.inf for agent in self._agents.values())
        endless = silent and set(conditions) <= {"running", "finished"} and self._stop is None
        assert self.deadline_s is not None, "no deadline"
        assert self.deadline_s < math.inf or endless, "a wait without a deadline"

    def _join(self, event: AgentJoined) -> None:
        rank, attempt = event.rank, event.attempt
        if event.agent in self._agents:
            return
        if not 0 <= rank < len(self._holders):
            self._leave(event.agent, f"there is no rank {rank} of {len(self._holders)}")
        elif attempt <= self._newest[rank]:
            newest = self._newest[rank]
            self._leave(event.agent, f"rank {rank} is at attempt {newest}, this is {attempt}")
        else:
            self._newest[rank] = attempt
            agent = _Agent(event.agent, rank, attempt, event.host, self._now_s)
            self._agents[agent.number] = agent
            if self._holders[rank] is None:
                self._holders[rank] = agent
                return
            if (older := self._standbys[rank]) is not None:
                self._dismiss(older, f"attempt {attempt} stands by for rank {rank} instead")
            self._standbys[rank] = agent
            self._instructions.append(Wait(agent.number))

    def _hear(self, event: AgentReady | AgentHeard | AgentFailed | AgentLost | WorkerEvent) -> None:
        agent = self._agents.get(event.agent)
        if agent is None:
            return
        if isinstance(event, AgentHeard) or agent.heard_s < math.inf:
            agent.heard_s = self._now_s
        if isinstance(event, WorkerEvent) and event.generation != self.generation:
            return
        after = TRANSITIONS.get((type(event), agent.condition))
        if after is None:
            return
        cause = getattr(event, "cause", "its worker ended unasked")
        if after == "failed" and self._holders[agent.rank] is not agent:
            self._dismiss(agent, cause)  # the rank's holder is well
        else:
            self._move(agent, after, cause)

    def _move(self, agent: _Agent, after: Condition, cause: str = "") -> None:
        """The one place where an agent's condition changes, with all that follows from it."""
        before, agent.condition, agent.since_s = agent.condition, after, self._now_s
        match after:
            case "starting":
                start = StartWorker(agent.number, agent.rank, self.generation)
                self._instructions.append(start)
            case "ending":
                self._instructions.append(EndWorker(agent.number, self.generation))
            case "failed":
                self._give_up("failed", [agent.rank], cause)
            case "lost":
                self._remove(agent)
        left = before in TRAINING and after in ("ready", "ending", "lost")
        if left and self._loss is None and self._stop is None:
            self._lose(agent.rank, cause)

    def _remove(self, agent: _Agent) -> None:
        del self._agents[agent.number]
        if self._holders[agent.rank] is agent:
            self._holders[agent.rank] = self._standbys[agent.rank]
        self._standbys[agent.rank] = None

    def _lose(self, rank: int, cause: str) -> None:
        """The generation has lost a rank: the others' workers end, and the next one is due."""
        self._loss = _Loss(rank, cause, self._now_s)
        if self.restarts >= self.max_restarts:
            self._give_up("lost", [rank], cause)
            return
        for agent in filter(None, self._holders):
            if agent.condition in TRAINING:
                self._move(agent, "ready" if agent.condition == "finished" else "ending")

    def _settle(self) -> None:
        """Begins or ends what is due by the conditions of all ranks together."""
        conditions = {row.condition for row in self.table()}
        if self.verdict is not None:
            return
        if self._stop is not None:
            if not conditions.intersection(WORKING):
                self._give_up("stopped", [], self._stop[0])
        elif conditions == {"finished"}:
            self._give_up("finished", [], "")
        elif conditions == {"ready"}:
            self.generation += 1
            self._loss = None
            for agent in filter(None, self._holders):
                self._move(agent, "starting")

    def _deadlines(self) -> Iterator[tuple[float, Callable[[], None]]]:
        """All that is waited for: until when, and what follows if it has not come by then."""
        for agent in self._agents.values():
            silent = f"its agent was silent for {self._silence_s:g} s"
            yield agent.heard_s + self._silence_s, partial(self._dismiss, agent, silent)
            if agent.condition == "starting":
                late = f"its worker did not start within {self._start_s:g} s"
                yield agent.since_s + self._start_s, partial(self._move, agent, "ending", late)
            if agent.condition == "ending":
                stuck = f"its worker did not end within {self._end_s:g} s"
                yield agent.since_s + self._end_s, partial(self._dismiss, agent, stuck)
        if self._stop is not None:
            cause, by_s = self._stop
            yield by_s, partial(self._give_up, "stopped", [], cause)
        elif self.generation == 0:
            yield self._began_s + self._gather_s, partial(self._miss, self._gather_s)
        elif self._loss is not None:
            yield self._loss.at_s + self._regather_s, partial(self._miss, self._regather_s)

    def _pass_deadlines(self) -> None:
        while self.verdict is None:
            at_s, pass_it = min(self._deadlines(), key=lambda deadline: deadline[0])
            if at_s > self._now_s:
                return
            pass_it()

    def _miss(self, within_s: float) -> None:
        missing = self.missing
        ranks = ", ".join(
            f"rank {row.rank} still {row.condition}" + (f" on {row.host}" if row.host else "")
            for row in self.table()
            if row.rank in missing
        )
        self._give_up("missing", missing, f"{ranks} after {within_s:g} s{self._after_loss()}")

    def _lose_cluster(self, cause: str) -> None:
        if self._stop is not None:  # what asked us to stop may have stopped the cluster as well
            self._give_up("stopped", [], self._stop[0])
        else:
            self._give_up("lost", self.missing, cause + self._after_loss())

    def _after_loss(self) -> str:
        return f", after rank {self._loss.rank} was lost: {self._loss.cause}" if self._loss else ""

    def _dismiss(self, agent: _Agent, reason: str) -> None:
        self._leave(agent.number, reason)
        self._move(agent, "lost", reason)

    def _leave(self, agent: int, reason: str) -> None:
        self._instructions.append(Leave(agent, reason))

    def _give_up(self, kind: Kind, ranks: list[int], cause: str) -> None:
        assert self.verdict is None, f"a second verdict, {kind}, after {self.verdict}"
        self.verdict = Verdict(kind, self.generation, tuple(ranks), cause)
        self._instructions.append(GiveUp(self.verdict))
