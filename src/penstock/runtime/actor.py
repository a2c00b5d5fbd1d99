"""Which stage may work on which item: a chain of actors, joined by channels with credits.

A pure machine: events in, instructions out; no clock, no thread, no random state. After Yuan et
al., "OneFlow: Redesign the Distributed Deep Learning Framework from Scratch" (2021), section 4.

Between an actor and the next lies a channel with a fixed number of registers, each the place of one
item. A register is the producer's from when it begins to write until the item can be read, then
the reader's until it has finished with the item; then it is free again. An actor begins an item
when

    the item is readable:  item < finished[actor - 1]
    it has credit:         item < done[actor + 1] + registers[actor]
    a worker of it idles:  item < done[actor] + workers[actor]

where `done` counts the items that an actor has finished in any order, and `finished` those without
a gap: items leave an actor in the order in which they entered. (`Chain._begin` is this rule.) So at
most `sum(registers)` items are under way, a slow actor stops those before it, and with one register
the two actors of a channel take turns: it takes two for them to work at the same time.

Items are numbered from 0. The first actor makes them and the last one uses them up. An item that
fails is the end of the flow for it and all later ones, as the last item is; those before it still
go all the way. So what goes wrong comes to light where it would if each item were made, and used,
one after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Opened:
    """The flow begins."""


@dataclass(frozen=True, slots=True)
class Finished:
    """An actor has done with an item what it does."""

    actor: int
    item: int


@dataclass(frozen=True, slots=True)
class Failed:
    """An actor could not."""

    actor: int
    item: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The first actor has found that there is no such item, and will not be another one."""

    item: int


@dataclass(frozen=True, slots=True)
class Closed:
    """No more is wanted."""


Event = Opened | Finished | Failed | Ended | Closed


@dataclass(frozen=True, slots=True)
class Act:
    """Have a worker of an actor work on an item; `Finished`, `Failed` or `Ended` is to follow."""

    actor: int
    item: int


@dataclass(frozen=True, slots=True)
class Stop:
    """It is over: the last actor has used all there is, or no more is wanted. Comes once.

    What actors are still at comes to nothing.

    Arguments:
        cause: the event that set the end.
    """

    cause: Ended | Failed | Closed


Instruction = Act | Stop


class Chain:
    """A chain of actors.

    Arguments:
        workers: of each actor, how many items it may be at at once. The first and the last are at
            one at a time.
        registers: of the channel after each actor but the last.

    Attributes:
        stopped: why it is over, or None.
    """

    def __init__(self, workers: Sequence[int], registers: Sequence[int]) -> None:
        assert len(workers) == len(registers) + 1 >= 2, f"{workers} and {registers} are no chain"
        assert min(*workers, *registers) >= 1, f"{workers} and {registers}: at least 1 of each"
        assert workers[0] == workers[-1] == 1, "the first and the last are at one at a time"
        self.workers, self.registers = tuple(workers), tuple(registers)
        self.stopped: Ended | Failed | Closed | None = None
        self._last = len(workers) - 1
        self._begun = [0] * len(workers)
        self._finished = [0] * len(workers)  # without a gap
        self._early: list[set[int]] = [set() for _ in workers]  # finished before an earlier item
        self._done = [0] * len(workers)  # finished, in any order
        self._limit = sys.maxsize  # the first item that does not go on
        self._cause: Ended | Failed | None = None

    @classmethod
    def of(cls, workers: Sequence[int], registers: int) -> Chain:
        """A chain with so many registers in a channel that joins one worker with one.

        Each further worker that writes or reads holds one more.
        """
        return cls(workers, [registers + a + b - 2 for a, b in pairwise(workers)])

    def handle(self, event: Event) -> list[Instruction]:
        """What to do, in this order, after an event."""
        if self.stopped is not None:
            return []
        if isinstance(event, Closed):
            self.stopped = event
            return [Stop(event)]
        if isinstance(event, Opened):
            return [*self._begin(0)]
        actor = 0 if isinstance(event, Ended) else event.actor
        if not isinstance(event, Finished) and event.item < self._limit:
            self._limit, self._cause = event.item, event
        self._finish(actor, event.item)
        if self._cause is not None and self._finished[self._last] >= self._limit:
            self.stopped = self._cause
            return [Stop(self._cause)]
        # Only a neighbour can have become able to act; the item goes before more are made.
        return [*self._begin(actor + 1), *self._begin(actor), *self._begin(actor - 1)]

    def condition(self, actor: int) -> tuple[int, int, int]:
        """How many workers of an actor are busy, starved and blocked; none once stopped.

        An idle one is starved if there is no item for it, else blocked: its channel has no credit.
        """
        if self.stopped is not None:
            return (0, 0, 0)
        begun = self._begun[actor]
        busy = begun - self._done[actor]
        idle = self.workers[actor] - busy
        return (busy, 0, idle) if begun < self._readable(actor) else (busy, idle, 0)

    def awaited(self) -> Act:
        """What keeps the last actor from its next item: who is at that item."""
        item = self._finished[self._last]
        return Act(max(a for a, begun in enumerate(self._begun) if begun > item or a == 0), item)

    def validate(self) -> None:
        """Asserts what must hold between any two events."""
        for actor, workers in enumerate(self.workers):
            begun, finished, done = self._begun[actor], self._finished[actor], self._done[actor]
            early = self._early[actor]
            assert done == finished + len(early), f"actor {actor} has lost count"
            assert all(finished < item < begun for item in early), f"actor {actor} finished {early}"
            assert 0 <= begun - done <= workers, f"actor {actor} is at {begun - done} items"
            if actor < self._last:
                credit = self.registers[actor] - (begun - self._done[actor + 1])
                assert 0 <= credit <= self.registers[actor], f"actor {actor} has credit {credit}"
                assert self._begun[actor + 1] <= finished, f"actor {actor + 1} is ahead"
        under_way = self._begun[0] - self._done[self._last]
        assert under_way <= sum(self.registers), f"{under_way} items are under way"
        if self.stopped is None:
            assert self._begun[0] == 0 or self._begun != self._done, "all wait for each other"
        elif not isinstance(self.stopped, Closed):
            assert self._finished[self._last] >= self._limit, "it is over too soon"

    def _readable(self, actor: int) -> int:
        """The first item that an actor cannot read yet, or never."""
        return min(self._limit, self._finished[actor - 1]) if actor else self._limit

    def _begin(self, actor: int) -> Sequence[Act]:
        """All that an actor can begin now."""
        if not 0 <= actor <= self._last:
            return ()
        first, until = self._begun[actor], self._readable(actor)
        if first >= until:
            return ()
        if actor < self._last:
            until = min(until, self._done[actor + 1] + self.registers[actor])
        until = min(until, self._done[actor] + self.workers[actor])
        if first >= until:
            return ()
        self._begun[actor] = until
        return [Act(actor, item) for item in range(first, until)]

    def _finish(self, actor: int, item: int) -> None:
        early = self._early[actor]
        assert self._finished[actor] <= item < self._begun[actor], f"{actor} is not at {item}"
        assert item not in early, f"actor {actor} finished item {item} twice"
        self._done[actor] += 1
        early.add(item)
        while self._finished[actor] in early:
            early.remove(self._finished[actor])
            self._finished[actor] += 1


@dataclass(frozen=True, slots=True)
class Shares:
    """How a stage spent its time, as fractions that sum to 1; of several workers the mean.

    Arguments:
        busy: working on an item.
        starved: waiting for one.
        blocked: waiting for a register to put the next one in.
    """

    busy: float
    starved: float
    blocked: float


class Ledger:
    """How long the workers of each actor were in which condition; it is told the time, in seconds.

    Arguments:
        now_s: when it begins, on the clock of all later times.
    """

    def __init__(self, chain: Chain, now_s: float) -> None:
        self._chain = chain
        self._since_s = [now_s] * len(chain.workers)
        self._conditions = [chain.condition(actor) for actor in range(len(chain.workers))]
        self._spent_s = [[0.0, 0.0, 0.0] for _ in chain.workers]

    def note(self, actors: Iterable[int], now_s: float) -> None:
        """These actors' conditions may have changed now."""
        for actor in actors:
            condition = self._chain.condition(actor)
            if condition != self._conditions[actor]:
                self._add(actor, now_s)
                self._conditions[actor] = condition

    def shares(self, now_s: float) -> list[Shares]:
        """Of each actor, from the last call until now, or until the chain stopped."""
        for actor in range(len(self._spent_s)):
            self._add(actor, now_s)
        spent, self._spent_s = self._spent_s, [[0.0, 0.0, 0.0] for _ in self._spent_s]
        return [
            Shares(*(seconds / sum(of) for seconds in of)) if sum(of) > 0 else Shares(0.0, 1.0, 0.0)
            for of in spent
        ]

    def _add(self, actor: int, now_s: float) -> None:
        passed_s, spent_s = now_s - self._since_s[actor], self._spent_s[actor]
        for kind, workers in enumerate(self._conditions[actor]):
            spent_s[kind] += passed_s * workers
        self._since_s[actor] = now_s
