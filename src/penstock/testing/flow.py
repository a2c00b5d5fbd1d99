"""A chain of actors on a virtual clock: what stages of known times give together.

The machine is `runtime.actor.Chain`, the one that threads carry out; here every act takes the time
that it is said to take, and nothing else does.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.runtime.actor import (
    Act,
    Chain,
    Ended,
    Finished,
    Instruction,
    Ledger,
    Opened,
    Shares,
)


@dataclass(frozen=True)
class Flow:
    """What came of it.

    Arguments:
        finished_s: when the last actor had finished each item.
        shares: of each actor, from the beginning until the last item was finished.
        most_under_way: items that were begun and not used up, at most.
    """

    finished_s: list[float]
    shares: list[Shares]
    most_under_way: int

    @property
    def items_per_s(self) -> float:
        """Over all, filling and draining of the chain included."""
        return len(self.finished_s) / self.finished_s[-1]


def simulate(
    times_s: Sequence[float],
    items: int,
    *,
    registers: int = 2,
    workers: Sequence[int] | None = None,
) -> Flow:
    """So many items, one or more, through a chain.

    Arguments:
        times_s: what each actor takes for an item; the first one makes it, the last uses it up.
        registers: of a channel, as of `Chain.of`.
        workers: of each actor; 1 by default.
    """
    chain = Chain.of(workers or [1] * len(times_s), registers)
    ledger = Ledger(chain, 0.0)
    due: list[tuple[float, int, Finished | Ended]] = []
    finished_s: list[float] = []
    last, now_s, acts, begun, most_under_way = len(times_s) - 1, 0.0, 0, 0, 0
    instructions: list[Instruction] = chain.handle(Opened())
    while True:
        for act in instructions:
            if isinstance(act, Act) and act.item < items:
                over: Finished | Ended = Finished(act.actor, act.item)
                heapq.heappush(due, (now_s + times_s[act.actor], acts, over))
                begun += act.actor == 0
            elif isinstance(act, Act):
                heapq.heappush(due, (now_s, acts, Ended(act.item)))
            acts += 1
        ledger.note(range(last + 1), now_s)
        most_under_way = max(most_under_way, begun - len(finished_s))
        if not due:
            break
        now_s, _, event = heapq.heappop(due)
        if isinstance(event, Finished) and event.actor == last:
            finished_s.append(now_s)
        instructions = chain.handle(event)
        chain.validate()
    return Flow(finished_s, ledger.shares(now_s), most_under_way)
