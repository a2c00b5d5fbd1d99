"""Who is in a run: all short interleavings of events, and long random ones."""

from __future__ import annotations

import math
import pickle
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_membership import OF_WORKERS, new

from penstock.runtime import membership
from penstock.runtime.membership import (
    AgentHeard,
    AgentJoined,
    AgentLost,
    AgentReady,
    EndWorker,
    Event,
    GiveUp,
    Instruction,
    Leave,
    Membership,
    Row,
    StartWorker,
    StopAsked,
    TimePassed,
    Wait,
    WorkerEnded,
    WorkerFailed,
    WorkerFinished,
    WorkerLost,
    WorkerStarted,
)

# All short interleavings


@dataclass
class Witness:
    """What is known of a run from its events and instructions alone, to judge it by."""

    joined: dict[int, tuple[int, int]] = field(default_factory=dict)  # rank and attempt by agent
    ready: set[int] = field(default_factory=set)
    working: dict[int, int] = field(default_factory=dict)  # rank by agent with a worker
    barred: dict[int, int] = field(default_factory=dict)  # newest attempt seen, by rank
    generation: int = 0
    stopping: bool = False
    over: bool = False

    def sees(self, event: Event, told: list[Instruction], ranks: int) -> None:
        """Asserts that the instructions are right after the event."""
        was_over = self.over
        if not isinstance(event, AgentJoined) and hasattr(event, "agent"):
            known = event.agent in self.joined
            assert known or not told, f"agent {event.agent} is not in the run: {told}"
            now = getattr(event, "generation", self.generation) == self.generation
            assert now or not told, f"{event} is old: {told}"
        match event:
            case AgentJoined(agent, rank, attempt) if agent not in self.joined:
                if attempt <= self.barred.get(rank, -1) or was_over:
                    assert [type(i) for i in told] == [Leave], f"{event} was let in: {told}"
                else:
                    self.joined[agent] = rank, attempt
                    self.barred[rank] = attempt
            case AgentReady(agent) if agent in self.joined:
                self.ready.add(agent)
            case AgentLost(agent):
                self._gone(agent)
            case StopAsked():
                self.stopping = True
            case WorkerFinished(agent, generation) | WorkerEnded(agent, generation):
                self._ended(agent, generation)
            case WorkerLost(agent, generation) | WorkerFailed(agent, generation):
                self._ended(agent, generation)
        started: list[StartWorker] = []
        for n, instruction in enumerate(told):
            assert not was_over or isinstance(instruction, Leave), f"{told} after the verdict"
            match instruction:
                case StartWorker(agent, rank):
                    assert agent in self.joined, f"agent {agent} is gone and starts"
                    assert agent in self.ready, f"agent {agent} has no data and starts"
                    assert self.joined[agent][0] == rank, f"agent {agent} starts as rank {rank}"
                    assert rank not in self.working.values(), f"rank {rank} runs twice"
                    self.working[agent] = rank
                    started.append(instruction)
                case EndWorker(agent, generation):
                    assert agent in self.working, f"agent {agent} is to end nothing"
                    assert generation == self.generation
                case Wait(agent):
                    assert agent in self.joined, f"agent {agent} is gone and waits"
                case Leave(agent):
                    self._gone(agent)
                case GiveUp():
                    assert n == len(told) - 1, f"more after a verdict: {told}"
                    self.over = True
        if started:
            self.generation += 1
            assert not self.stopping, "a generation begins after a stop"
            assert {start.generation for start in started} == {self.generation}
            assert sorted(s.rank for s in started) == list(range(ranks)), "not all ranks start"
        if isinstance(event, WorkerFailed) and told:
            assert self.over, "a failure is not the end"

    def _ended(self, agent: int, generation: int) -> None:
        if generation == self.generation:
            self.working.pop(agent, None)

    def _gone(self, agent: int) -> None:
        self.joined.pop(agent, None)
        self.working.pop(agent, None)
        self.ready.discard(agent)


World = tuple[Membership, Witness, float]
"""With the time."""


def key(world: World) -> object:
    """Equal for worlds that go on equally: ranks have no names, and times are relative."""
    members, witness, now_s = world
    if members.verdict is not None:
        return "over"

    def of(agent: membership._Agent | None) -> tuple[object, ...]:
        if agent is None:
            return ()
        waits = agent.condition in ("starting", "ending")
        return (
            agent.number % 10,
            agent.condition,
            now_s - agent.since_s if waits else 0.0,
            now_s - agent.heard_s,
            agent.number in witness.ready,
            agent.number in witness.working,
        )

    ranks = sorted(
        (of(holder), of(standby), members._newest[rank], witness.barred.get(rank, -1))
        for rank, (holder, standby) in enumerate(zip(members._holders, members._standbys))
    )
    loss, stop = members._loss, members._stop
    return (
        members.generation,
        witness.generation,
        tuple(ranks),
        now_s if members.generation == 0 else 0.0,
        loss and now_s - loss.at_s,
        stop and now_s - stop[1],
    )


def step(world: World, event: Event) -> World:
    """The world after an event, judged."""
    members, witness, now_s = world
    if isinstance(event, TimePassed):
        now_s = max(now_s, members.deadline_s or 0.0)
    told = members.handle(event, now_s)
    members.validate()
    witness.sees(event, told, len(members.table()))
    return members, witness, now_s


def events_of(world: World, attempts: int) -> Iterator[Event]:
    """Everything that can come: agent 10 r + a is attempt a at rank r."""
    members = world[0]
    agents = [10 * row.rank + attempt for row in members.table() for attempt in range(attempts)]
    for agent in agents:
        yield AgentJoined(agent, agent // 10, agent % 10, "host")
        yield AgentReady(agent)
        yield AgentHeard(agent)
        yield AgentLost(agent, "lost")
        if members.generation:
            for kind, *rest in OF_WORKERS:
                yield kind(agent, members.generation, *rest)
    if members.generation > 1:
        yield WorkerLost(0, members.generation - 1, "lost")
        yield WorkerFinished(10, members.generation - 1)
    yield StopAsked("stop")
    if members.deadline_s != math.inf:
        yield TimePassed()


def verdict_comes(members: Membership) -> None:
    """Asserts that time alone brings a verdict, unless all that is waited for is workers' work."""
    most_steps = 5 * len(members.table())
    for _ in range(most_steps):
        if members.verdict is not None or members.deadline_s == math.inf:
            return
        before = members.deadline_s
        assert before is not None
        members.handle(TimePassed(), before)
        members.validate()
        assert members.deadline_s is None or members.deadline_s > before, "time stands still"
    raise AssertionError(f"no verdict after {most_steps} deadlines: {members.table()}")


def explore(
    kind: type[Membership] = Membership,
    *,
    attempts: int,
    depth: int,
    begin: tuple[Event, ...] = (),
) -> int:
    """Judges every sequence of at most `depth` events after the first ones; how many worlds."""
    first: World = new(2, 1, kind), Witness(), 0.0
    for event in begin:
        first = step(first, event)
    seen = {key(first)}
    frontier = deque([(0, pickle.dumps(first))])
    while frontier:
        length, packed = frontier.popleft()
        verdict_comes(pickle.loads(packed)[0])
        world: World = pickle.loads(packed)
        own = key(world)
        for event in list(events_of(world, attempts)):
            world = step(world, event)
            after = key(world)
            if after == own:
                continue
            if after not in seen:
                seen.add(after)
                if length + 1 < depth:
                    frontier.append((length + 1, pickle.dumps(world)))
            world = pickle.loads(packed)
    return len(seen)


READY = (
    AgentJoined(0, 0, 0, "a"),
    AgentJoined(10, 1, 0, "b"),
    AgentReady(0),
    AgentReady(10),
)
RUNNING = (*READY, AgentHeard(0), WorkerStarted(0, 1, 1), WorkerStarted(10, 1, 2))
AGAIN = (*RUNNING, WorkerLost(10, 1, "lost"), WorkerEnded(0, 1), WorkerStarted(0, 2, 1))


@pytest.mark.parametrize(
    ("begin", "attempts", "depth", "at_least"),
    [
        pytest.param((), 2, 8, 1500, id="beginning"),
        pytest.param((), 3, 6, 1000, id="attempts"),
        pytest.param(RUNNING, 2, 6, 1000, id="running"),
        pytest.param(AGAIN, 2, 5, 500, id="again"),
    ],
)
def test_all_short_interleavings(
    begin: tuple[Event, ...], attempts: int, depth: int, at_least: int
) -> None:
    assert explore(begin=begin, attempts=attempts, depth=depth) > at_least


# Negative controls: machines with one fault each, which the exploration must find


class Forgetful(Membership):
    """A lost attempt may come back."""

    def _remove(self, agent: membership._Agent) -> None:
        super()._remove(agent)
        self._newest[agent.rank] = -1


class Usurped(Membership):
    """A newer attempt takes the rank though its holder is well."""

    def _join(self, event: AgentJoined) -> None:
        super()._join(event)
        if (standby := self._standbys[event.rank]) is not None:
            self._holders[event.rank], self._standbys[event.rank] = standby, None


class Hasty(Membership):
    """Does not wait for the ranks that are absent."""

    def table(self) -> list[Row]:
        return [row for row in super().table() if row.condition != "absent"] or super().table()


class Careless(Membership):
    """Takes workers that were told to end for ended."""

    def _move(self, agent: membership._Agent, after: membership.Condition, cause: str = "") -> None:
        super()._move(agent, after, cause)
        if after == "ending":
            super()._move(agent, "ready")


class Outdated(Membership):
    """Takes what is told of an older generation for news."""

    def _hear(self, event: membership.AgentEvent | membership.WorkerEvent) -> None:
        if isinstance(event, membership.WorkerEvent):
            event = replace(event, generation=self.generation)
        super()._hear(event)


class Relentless(Membership):
    """Restarts more often than it may."""

    def _lose(self, rank: int, cause: str) -> None:
        self.max_restarts += 1
        super()._lose(rank, cause)
        self.max_restarts -= 1


class Restless(Membership):
    """Goes on after it was asked to stop."""

    def _settle(self) -> None:
        stop, self._stop = self._stop, None
        super()._settle()
        self._stop = stop


class Undecided(Membership):
    """Takes its verdict back."""

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        self.verdict = None
        return super().handle(event, now_s)


class Unbounded(Membership):
    """Has forgotten a deadline."""

    forgotten: str

    def __init__(self, *args: int, **kwargs: float) -> None:
        super().__init__(*args, **kwargs | {self.forgotten: math.inf})


class NoGather(Unbounded):
    forgotten = "gather_s"


class NoRegather(Unbounded):
    forgotten = "regather_s"


class NoStart(Unbounded):
    forgotten = "start_s"


class NoStop(Unbounded):
    forgotten = "stop_s"


class NoSilence(Unbounded):
    forgotten = "silence_s"


@pytest.mark.parametrize(
    ("kind", "begin", "found"),
    [
        (Forgetful, (), "was let in|newer than the newest"),
        (Usurped, RUNNING, "has no place"),
        (Hasty, (), "not all ranks start"),
        (Careless, RUNNING, "runs twice"),
        (Outdated, AGAIN, "is old"),
        (Relentless, AGAIN, "too many restarts"),
        (Restless, RUNNING, "after a stop|nothing stops"),
        (Undecided, RUNNING, "after the verdict|unnoticed"),
        (NoGather, (), "without a deadline"),
        (NoRegather, RUNNING, "without a deadline"),
        (NoStart, READY, "without a deadline"),
        (NoStop, RUNNING, "without a deadline"),
        (NoSilence, RUNNING, "without a deadline"),
    ],
)
def test_a_faulty_machine_is_found(
    kind: type[Membership], begin: tuple[Event, ...], found: str
) -> None:
    with pytest.raises(AssertionError, match=found):
        explore(kind, begin=begin, attempts=2, depth=6)


def test_a_failure_that_is_taken_for_a_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {(WorkerFailed, "running"): "ready"}
    monkeypatch.setattr(membership, "TRANSITIONS", {**membership.TRANSITIONS, **wrong})
    with pytest.raises(AssertionError, match="a failure is not the end"):
        explore(begin=RUNNING, attempts=1, depth=2)


def test_time_that_stands_still_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "_pass_deadlines", lambda self: None)
    with pytest.raises(AssertionError, match="time stands still"):
        explore(attempts=1, depth=1)


# Long random runs


def next_step(members: Membership, rank: int) -> Event | None:
    """What comes next for a rank where nothing goes wrong."""
    row = members.table()[rank]
    match row.condition:
        case "absent":
            attempt = members._newest[rank] + 1
            return AgentJoined(1000 * rank + attempt, rank, attempt, "host")
        case "joined":
            return AgentReady(row.agent)
        case "starting":
            return WorkerStarted(row.agent, members.generation, 1)
        case "running":
            return WorkerFinished(row.agent, members.generation)
        case "ending":
            return WorkerEnded(row.agent, members.generation)
    return None


CHOICES = st.tuples(st.integers(0, 13), st.integers(0, 2), st.integers(0, 2), st.floats(0, 12))


def event_of(members: Membership, choice: int, rank: int, back: int) -> Event | None:
    """The right event half of the time, else any; of one of the last three attempts."""
    attempt = max(0, members._newest[rank] + 1 - back)
    agent, generation = 1000 * rank + attempt, members.generation
    wrong: list[Event] = [
        AgentJoined(agent, rank, attempt, "host"),
        AgentReady(agent),
        AgentHeard(agent),
        AgentLost(agent, "lost"),
        WorkerLost(agent, generation - back // 2, "lost"),
        WorkerEnded(agent, generation - back // 2),
        TimePassed(),
    ]
    return wrong[choice] if choice < len(wrong) else next_step(members, rank)


@settings(max_examples=150, deadline=None)
@given(st.lists(CHOICES, min_size=20, max_size=100), st.booleans())
def test_long_random_runs_end_well_if_nothing_more_goes_wrong(
    choices: list[tuple[int, int, int, float]], stop: bool
) -> None:
    world: World = new(3, 6), Witness(), 0.0
    for choice, rank, back, later_s in choices:
        members, witness, now_s = world
        if (event := event_of(members, choice, rank, back)) is not None:
            world = step((members, witness, now_s + later_s), event)
    verdict_comes(pickle.loads(pickle.dumps(members)))
    was_over = members.verdict is not None
    if stop:
        world = step(world, StopAsked("stop"))
    for _ in range(6):  # all that is left of a generation, and a whole one
        for rank in range(3):
            if (event := next_step(members, rank)) is not None:
                world = step(world, event)
    assert members.verdict is not None
    if not was_over:
        assert members.verdict.kind == ("stopped" if stop else "finished")
