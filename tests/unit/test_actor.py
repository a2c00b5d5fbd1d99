"""A chain of actors: its rules, all interleavings of small ones, and known times."""

from __future__ import annotations

import pickle
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.runtime.actor import (
    Act,
    Chain,
    Closed,
    Ended,
    Event,
    Failed,
    Finished,
    Instruction,
    Ledger,
    Opened,
    Shares,
    Stop,
)
from penstock.runtime.pipeline import bounded_by
from penstock.testing.flow import simulate


class Run:
    """A chain, validated after every event."""

    def __init__(self, workers: Sequence[int], registers: Sequence[int]) -> None:
        self.chain = Chain(workers, registers)

    def __call__(self, *events: Event) -> list[Instruction]:
        """The instructions after several events together."""
        told = []
        for event in events:
            told += self.chain.handle(event)
            self.chain.validate()
        return told


# Each rule


def test_items_pass_all_actors_and_it_ends_with_the_last() -> None:
    run = Run([1, 1, 1], [2, 2])
    assert run(Opened()) == [Act(0, 0)]
    assert run(Finished(0, 0)) == [Act(1, 0), Act(0, 1)]
    assert run(Finished(1, 0)) == [Act(2, 0)]
    assert run(Finished(0, 1)) == [Act(1, 1), Act(0, 2)]
    assert run(Ended(2)) == []
    assert run(Finished(1, 1)) == []  # the last is at item 0
    assert run(Finished(2, 0)) == [Act(2, 1)]
    assert run(Finished(2, 1)) == [Stop(Ended(2))]
    assert run(Closed(), Finished(1, 5)) == []
    assert run.chain.stopped == Ended(2)


def test_without_items_it_ends_at_once() -> None:
    assert Run([1, 1], [1])(Opened(), Ended(0)) == [Act(0, 0), Stop(Ended(0))]


def test_a_slow_actor_stops_those_before_it() -> None:
    run = Run([1, 1, 1], [2, 2])
    begun = run(Opened(), Finished(0, 0), Finished(0, 1), Finished(1, 0), Finished(0, 2))
    assert max(act.item for act in begun if act.actor == 0) == 2  # one each at 1 and 2, one between
    assert run(Finished(1, 1)) == [Act(0, 3)]  # the last still has item 0: item 2 must wait
    assert run(Finished(0, 3)) == []
    assert run(Finished(2, 0)) == [Act(2, 1), Act(1, 2)]


def test_with_one_register_writer_and_reader_take_turns() -> None:
    run = Run([1, 1], [1])
    assert run(Opened(), Finished(0, 0)) == [Act(0, 0), Act(1, 0)]
    assert run(Finished(1, 0)) == [Act(0, 1)]


def test_of_several_workers_items_leave_in_order() -> None:
    run = Run([1, 2, 1], [3, 3])
    run(Opened(), Finished(0, 0))
    assert Act(1, 1) in run(Finished(0, 1))
    assert run(Finished(1, 1)) == []  # item 2 is not there yet, item 0 is before 1
    assert run(Finished(1, 0)) == [Act(2, 0)]
    assert run(Finished(2, 0)) == [Act(2, 1)]


def test_what_precedes_a_failure_still_comes() -> None:
    run = Run([1, 1, 1], [2, 2])
    run(Opened(), Finished(0, 0), Finished(1, 0), Finished(0, 1))
    assert run(Failed(1, 1)) == []  # nothing more is made: item 2 was begun, 3 is not
    assert run(Finished(0, 2)) == []
    assert run(Finished(2, 0)) == [Stop(Failed(1, 1))]


def test_of_several_failures_the_first_item_counts() -> None:
    run = Run([1, 2, 1], [3, 3])
    run(Opened(), Finished(0, 0), Finished(0, 1))
    assert run(Failed(1, 1), Failed(0, 2)) == []
    assert run(Failed(1, 0)) == [Stop(Failed(1, 0))]


def test_closed_at_any_time() -> None:
    run = Run([1, 1], [2])
    assert run(Opened(), Finished(0, 0), Closed()) == [
        Act(0, 0),
        Act(1, 0),
        Act(0, 1),
        Stop(Closed()),
    ]
    assert run(Finished(0, 1), Failed(1, 0), Closed()) == []


def test_who_is_waited_for() -> None:
    run = Run([1, 2, 1, 1], [3, 3, 2])
    assert run.chain.awaited() == Act(0, 0)
    run(Opened(), Finished(0, 0), Finished(0, 1), Finished(1, 1), Finished(0, 2))
    assert run.chain.awaited() == Act(1, 0)
    run(Finished(1, 0))
    assert run.chain.awaited() == Act(2, 0)


def test_registers_for_more_workers() -> None:
    assert Chain.of([1, 3, 2, 1], 2).registers == (4, 5, 3)
    assert Chain.of([1, 1], 1).registers == (1,)


def test_an_item_that_nobody_is_at_cannot_finish() -> None:
    run = Run([1, 2, 1], [3, 3])
    run(Opened(), Finished(0, 0), Finished(0, 1), Finished(1, 1))
    for event in (Finished(2, 0), Finished(1, 2), Failed(0, 0)):
        with pytest.raises(AssertionError, match="is not at"):
            pickle.loads(pickle.dumps(run.chain)).handle(event)
    with pytest.raises(AssertionError, match="twice"):
        run(Finished(1, 1))


# All interleavings of small chains


@dataclass
class Witness:
    """What was told and done, by itself: judges every instruction."""

    workers: Sequence[int]
    registers: Sequence[int]
    items: int
    begun: list[int] = field(default_factory=list)
    acting: set[tuple[int, int]] = field(default_factory=set)
    finished: set[tuple[int, int]] = field(default_factory=set)
    failed: set[tuple[int, int]] = field(default_factory=set)
    limit: int = sys.maxsize
    stop: Stop | None = None

    def sees(self, event: Event, told: list[Instruction]) -> None:
        if not self.begun:
            self.begun = [0] * len(self.workers)
        if isinstance(event, (Finished, Failed)):
            self.acting.remove((event.actor, event.item))
            over = self.finished if isinstance(event, Finished) else self.failed
            over.add((event.actor, event.item))
        elif isinstance(event, Ended):
            self.acting.remove((0, event.item))
        if isinstance(event, (Ended, Failed)):
            self.limit = min(self.limit, event.item)
        for instruction in told:
            assert self.stop is None, f"{instruction} after {self.stop}"
            if isinstance(instruction, Act):
                self.begins(instruction.actor, instruction.item)
            else:
                self.stops(instruction, event)
        if self.stop is None:
            assert self.acting, "deadlock"
            for actor in range(len(self.workers)):
                able = self.why_not(actor, self.begun[actor]) is None
                assert not able, f"actor {actor} idles"

    def why_not(self, actor: int, item: int) -> str | None:
        """What forbids an actor to begin an item."""
        if item >= self.limit:
            return "does not go on"
        if sum(a == actor for a, _ in self.acting) >= self.workers[actor]:
            return "has no worker"
        before = all((actor - 1, i) in self.finished for i in range(item + 1))
        if actor > 0 and not before:
            return "is not readable"
        if actor + 1 < len(self.workers):
            over = self.finished | self.failed
            held = sum((actor + 1, i) not in over for i in range(item))
            if held >= self.registers[actor]:
                return "has no register"
        return None

    def begins(self, actor: int, item: int) -> None:
        assert item == self.begun[actor], f"actor {actor} begins {item}, not {self.begun[actor]}"
        reason = self.why_not(actor, item)
        assert reason is None, f"item {item} of actor {actor} {reason}"
        self.begun[actor] += 1
        self.acting.add((actor, item))

    def stops(self, stop: Stop, event: Event) -> None:
        self.stop = stop
        last = len(self.workers) - 1
        used = sorted(item for actor, item in self.finished if actor == last)
        match stop.cause:
            case Closed():
                assert event == Closed()
            case Ended(item):
                assert not self.failed, "a failure is forgotten"
                assert used == list(range(self.items)), f"of {self.items} items {used} were used"
                assert item == self.items
            case Failed(actor, item):
                assert (actor, item) in self.failed, f"actor {actor} did not fail at {item}"
                assert item == self.limit, "not the first that failed"
                assert used == list(range(item)), f"before item {item} failed, {used} were used"

    def events(self) -> Iterator[Event]:
        """Everything that can come."""
        for actor, item in self.acting:
            if actor == 0 and item == self.items:
                yield Ended(item)
            else:
                yield Finished(actor, item)
            yield Failed(actor, item)
        if self.stop is None:
            yield Closed()


def key(chain: Chain, witness: Witness) -> tuple[object, ...]:
    """What decides about what can still come."""
    sets = (frozenset(s) for s in (witness.acting, witness.finished, witness.failed))
    return (str(vars(chain)), *sets, witness.stop)


def explore(
    workers: Sequence[int], registers: Sequence[int], items: int, kind: type[Chain] = Chain
) -> int:
    """Judges every sequence of events; how many states there are."""
    chain, witness = kind(workers, registers), Witness(workers, registers, items)
    witness.sees(Opened(), chain.handle(Opened()))
    seen = {key(chain, witness)}
    frontier = deque([pickle.dumps((chain, witness))])
    while frontier:
        packed = frontier.popleft()
        for event in list(pickle.loads(packed)[1].events()):
            chain, witness = pickle.loads(packed)
            told = chain.handle(event)
            chain.validate()
            witness.sees(event, told)
            if (state := key(chain, witness)) not in seen:
                seen.add(state)
                if witness.acting:
                    frontier.append(pickle.dumps((chain, witness)))
    return len(seen)


@pytest.mark.parametrize(
    ("actors", "most_items", "at_least"), [(2, 4, 300), (3, 4, 4000), (4, 3, 20000), (5, 2, 30000)]
)
def test_all_interleavings(actors: int, most_items: int, at_least: int) -> None:
    """Of all chains of so many actors, 1 or 2 workers each and 1 or 2 registers between."""
    states = 0
    for between in product((1, 2), repeat=actors - 2):
        for registers in product((1, 2), repeat=actors - 1):
            for items in range(most_items + 1):
                states += explore([1, *between, 1], registers, items)
    assert states > at_least


# Negative controls: machines with one fault each, which the exploration must find


class Generous(Chain):
    """Gives a register back twice."""

    def _finish(self, actor: int, item: int) -> None:
        super()._finish(actor, item)
        self._done[actor] += actor == 1


class Stingy(Chain):
    """Never gives a register back."""

    def _finish(self, actor: int, item: int) -> None:
        super()._finish(actor, item)
        self._done[actor] -= actor == 1


class Spendthrift(Chain):
    """Has more registers than it was given."""

    def __init__(self, workers: Sequence[int], registers: Sequence[int]) -> None:
        super().__init__(workers, [number + 1 for number in registers])


class Miser(Chain):
    """Leaves a register unused."""

    def __init__(self, workers: Sequence[int], registers: Sequence[int]) -> None:
        super().__init__(workers, [max(1, number - 1) for number in registers])


class Unordered(Chain):
    """Takes the number of items that are finished for the items up to that number."""

    def _readable(self, actor: int) -> int:
        return min(self._limit, self._done[actor - 1]) if actor else self._limit


class Overtaken(Chain):
    """Lets a worker begin while it is at another item."""

    def __init__(self, workers: Sequence[int], registers: Sequence[int]) -> None:
        super().__init__(workers, registers)
        self.workers = tuple(2 * number for number in workers)


class Forgetful(Chain):
    """Does not wake the actor that a register has become free for."""

    def handle(self, event: Event) -> list[Instruction]:
        told = super().handle(event)
        back = event.actor - 1 if isinstance(event, Finished) else None
        for act in [act for act in told if isinstance(act, Act) and act.actor == back]:
            self._begun[act.actor] = act.item
            told.remove(act)
        return told


class Deaf(Chain):
    """Takes a failure for a success."""

    def handle(self, event: Event) -> list[Instruction]:
        return super().handle(
            Finished(event.actor, event.item) if isinstance(event, Failed) else event
        )


class Hasty(Chain):
    """Ends with a failure before the items ahead of it have been used."""

    def handle(self, event: Event) -> list[Instruction]:
        told = super().handle(event)
        if isinstance(event, Failed) and self.stopped is None:
            self.stopped = event
            told.append(Stop(event))
        return told


class Late(Chain):
    """Ends with the last failure instead of the first."""

    def handle(self, event: Event) -> list[Instruction]:
        if isinstance(event, Failed) and self.stopped is None:
            self._limit = sys.maxsize
        return super().handle(event)


class Endless(Chain):
    """Goes on after it has stopped."""

    def handle(self, event: Event) -> list[Instruction]:
        self.stopped = None
        return super().handle(event)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Generous, "lost count"),
        (Stingy, "lost count"),
        (Spendthrift, "has no register"),
        (Miser, "idles"),
        (Unordered, "is not readable|is ahead"),
        (Overtaken, "has no worker"),
        (Forgetful, "idles|wait for each other"),
        (Deaf, "forgotten|does not go on|is not readable"),
        (Hasty, "too soon"),
        (Late, "does not go on|not the first"),
        (Endless, "after Stop"),
    ],
)
def test_a_faulty_machine_is_found(kind: type[Chain], found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        explore([1, 2, 1], [2, 2], 3, kind)


@pytest.mark.parametrize(
    ("kind", "found"),
    [(Generous, "has no register"), (Stingy, "idles|deadlock"), (Hasty, "before item")],
)
def test_the_witness_finds_it_without_the_machines_own_eyes(
    kind: type[Chain], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chain, "validate", lambda self: None)
    with pytest.raises(AssertionError, match=found):
        explore([1, 1, 1], [2, 2], 3, kind)


# Times


def test_four_stages_of_20_ms() -> None:
    two, one = simulate([0.02] * 4, 200), simulate([0.02] * 4, 200, registers=1)
    assert two.finished_s == pytest.approx([0.08 + 0.02 * n for n in range(200)])
    assert two.items_per_s >= 0.9 * 50
    assert two.most_under_way == 4
    assert one.items_per_s == pytest.approx(25, rel=0.02)  # neighbours take turns
    assert one.most_under_way == 2
    assert all(shares.busy > 0.97 for shares in two.shares)
    assert all(shares.busy < 0.51 for shares in one.shares)


def test_the_slowest_bounds_and_the_others_wait() -> None:
    flow = simulate([0.005, 0.01, 0.04, 0.02], 500)
    names = ("read", "decode", "to device", "compute")
    assert bounded_by(dict(zip(names, flow.shares, strict=True))) == (
        "to device",
        pytest.approx(1, abs=0.01),
    )
    read, decode, _, compute = flow.shares
    assert read.busy == pytest.approx(0.125, abs=0.01)
    assert read.blocked > 0.85
    assert decode.blocked > 0.7
    assert compute.starved == pytest.approx(0.5, abs=0.01)
    assert compute.blocked == 0
    assert flow.most_under_way == 5  # all 6 registers, of which the slow one holds two for one item


def test_more_workers() -> None:
    times_s = [0.005, 0.04, 0.02]
    assert simulate(times_s, 500).items_per_s == pytest.approx(25, rel=0.02)
    twice = simulate(times_s, 500, workers=[1, 2, 1])
    assert twice.items_per_s == pytest.approx(50, rel=0.02)
    assert twice.shares[1].busy == pytest.approx(1, abs=0.02)


TIMES = st.lists(st.integers(1, 100), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(TIMES, st.integers(1, 4))
def test_what_bounds_a_chain(times: list[int], registers: int) -> None:
    """The slowest actor, or two neighbours that take turns at a channel's registers."""
    items = 300
    flow = simulate(times, items, registers=registers)
    turns = max(a + b for a, b in pairwise(times)) / registers
    period = max(*times, turns)
    passed = flow.finished_s[-1] - flow.finished_s[items // 2 - 1]
    assert passed == pytest.approx(period * items / 2, rel=0.02)
    if registers > 1:
        assert flow.finished_s == [sum(times) + n * period for n in range(items)]
    for shares, time in zip(flow.shares, times, strict=True):
        assert sum((shares.busy, shares.starved, shares.blocked)) == pytest.approx(1)
        assert shares.busy == pytest.approx(time * items / flow.finished_s[-1])


def test_a_ledger_counts_from_call_to_call_and_until_the_end() -> None:
    chain = Chain([1, 1], [1])
    ledger = Ledger(chain, 10.0)

    def at(now_s: float, event: Event) -> None:
        chain.handle(event)
        ledger.note(range(2), now_s)

    at(10.0, Opened())
    at(11.0, Finished(0, 0))
    assert ledger.shares(14.0) == [Shares(0.25, 0, 0.75), Shares(0.75, 0.25, 0)]
    at(15.0, Finished(1, 0))
    at(17.0, Ended(1))
    assert ledger.shares(99.0) == [Shares(2 / 3, 0, 1 / 3), Shares(1 / 3, 2 / 3, 0)]
    assert ledger.shares(100.0) == [Shares(0, 1, 0)] * 2  # there was no time to spend
