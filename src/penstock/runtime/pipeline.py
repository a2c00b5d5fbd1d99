"""Stages that work at the same time, each in threads of its own: the actors' chain, carried out.

`Chain` (runtime/actor.py) decides who may begin what; a thread waits for the number of an item in
its actor's inbox, works on it, and tells. The first actor, "read", advances the iterator; the last
one, "compute", is whoever takes items from the pipeline, in its own thread.

Whoever tells an event carries out its instructions, under one lock: it puts numbers into inboxes,
which wakes threads, and asks and waits for nothing.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from penstock.errors import Fault
from penstock.runtime.actor import (
    Act,
    Chain,
    Closed,
    Ended,
    Event,
    Failed,
    Finished,
    Ledger,
    Opened,
    Shares,
)

T = TypeVar("T")

READ, COMPUTE = "read", "compute"
CLOSE_S = 5.0
"""How long stages may take to finish what they are at when their pipeline is closed."""
FRAMES = 6
"""Of the stack of a stage that hangs: as many as a message shows."""


@dataclass(frozen=True)
class PipelineStage:
    """A function that every item passes.

    Arguments:
        name: for people, and its own in the pipeline.
        function: of an item; gives what goes on in its place.
        workers: threads that may be in it at once; items leave in the order in which they came.
    """

    name: str
    function: Callable[[Any], Any]
    workers: int = 1


class Pipeline(Generic[T]):
    """Items on their way through stages to whoever iterates over this; in order, each once.

    An error of a stage ends the flow at that item: those before it still come, then the error
    itself is raised, with the stage's own stack. So it comes at the same item every time.

    To be closed when it is no longer wanted, also after the last item; it is a context manager.

    Arguments:
        items: advanced by a thread of its own.
        stages: in order.
        registers: places in a channel between a stage and the next, where each has one worker:
            with 2 they work at the same time, with 1 they take turns. `Chain.of` says how many
            there are for more workers. What is under way is bounded by their sum.
        name: of the whole, for messages.
        timeout_s: how long the next item may take.
    """

    def __init__(
        self,
        items: Iterator[Any],
        stages: Sequence[PipelineStage],
        *,
        registers: int = 2,
        name: str,
        timeout_s: float,
    ) -> None:
        self._flow = _Flow(items, stages, registers, name)
        self._last, self._timeout_s = len(stages) + 1, timeout_s
        self._held: int | None = None  # what was taken last, until the next is asked for
        self._flow.start()
        weakref.finalize(self, self._flow.end_threads)  # should nobody close it

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item; the register of the one before is free from here on.

        Raises:
            Fault: the next item has not come within `timeout_s`.
            RuntimeError: the pipeline has been closed.
        """
        flow = self._flow
        if self._held is not None:
            held, self._held = self._held, None
            flow.tell(Finished(self._last, held))
        try:
            item = flow.inboxes[self._last].get(timeout=self._timeout_s)
        except queue.Empty:
            raise flow.stall(self._timeout_s) from None
        if item is None or flow.closed:
            flow.inboxes[self._last].put(None)  # whoever asks again hears the same
            raise flow.end()
        self._held = item
        value: T = flow.values[self._last - 1].pop(item)
        return value

    def close(self, within_s: float = CLOSE_S) -> None:
        """Stops all stages and waits for their threads to end; a second time does nothing.

        In a process forked from the one that made it, it does nothing: the threads are not there.

        Raises:
            Fault: stages are still at an item after `within_s`; nothing will come of it.
        """
        self._flow.close(within_s)

    def __enter__(self) -> Pipeline[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Fault as stuck:
            if error is None:
                raise
            error.add_note(str(stuck))

    def shares(self) -> dict[str, Shares]:
        """How each stage spent its time since the last call, until now or the end of the flow."""
        return self._flow.shares()


def bounded_by(shares: Mapping[str, Shares]) -> tuple[str, float]:
    """The stage that bounds the flow, which is the busiest, and its busy share."""
    name = max(shares, key=lambda stage: shares[stage].busy)
    return name, shares[name].busy


class _Flow:
    """What the threads share. It knows nothing of the `Pipeline`, so that one may be forgotten.

    Attributes:
        inboxes: of each actor, the items it is to begin, and None for each worker at the end.
        values: of each actor, what it has made of items that the next one has not begun.
    """

    def __init__(
        self, items: Iterator[Any], stages: Sequence[PipelineStage], registers: int, name: str
    ) -> None:
        self.names = [READ, *(stage.name for stage in stages), COMPUTE]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{name}: stages {self.names} do not have each a name of their own")
        workers = [1, *(stage.workers for stage in stages), 1]
        self.inboxes: list[queue.SimpleQueue[int | None]] = [queue.SimpleQueue() for _ in workers]
        self.values: list[dict[int, Any]] = [{} for _ in workers]
        self._name, self._pid, self._lock = name, os.getpid(), threading.Lock()
        self._chain = Chain.of(workers, registers)
        self._ledger = Ledger(self._chain, time.monotonic())
        self._errors: dict[int, BaseException] = {}
        self._threads: list[list[threading.Thread]] = [
            [self._thread(0, lambda item: next(items))],
            *(
                [self._thread(n, self._stage(n, stage.function)) for _ in range(stage.workers)]
                for n, stage in enumerate(stages, start=1)
            ),
            [],
        ]

    @property
    def closed(self) -> bool:
        return isinstance(self._chain.stopped, Closed)

    def start(self) -> None:
        """Starts the threads, and has the first one begin."""
        try:
            for thread in self._all_threads():
                thread.start()
        except RuntimeError:  # the machine has no more threads
            self.end_threads()
            raise
        _FLOWS.add(self)
        self.tell(Opened())

    def tell(self, event: Event) -> None:
        """Hands an event to the chain, and carries out what follows."""
        if os.getpid() != self._pid:
            raise RuntimeError(f"{self._name}: process {self._pid} made it, its threads are there")
        with self._lock:
            instructions = self._chain.handle(event)
            changed = range(len(self.names))
            if isinstance(event, Finished) and self._chain.stopped is None:
                changed = changed[max(0, event.actor - 1) : event.actor + 2]  # its neighbours
            self._ledger.note(changed, time.monotonic())
            for instruction in instructions:
                if isinstance(instruction, Act):
                    self.inboxes[instruction.actor].put(instruction.item)
                else:
                    self.end_threads()

    def end_threads(self) -> None:
        """Has every thread end, and the consumer hear of it. Needs no lock: may come any time."""
        for inbox, workers in zip(self.inboxes, self._chain.workers, strict=True):
            for _ in range(workers):
                inbox.put(None)

    def end(self) -> BaseException:
        """What to raise once the flow has stopped."""
        match self._chain.stopped:
            case Ended():
                return StopIteration()
            case Failed(_, item):
                return self._errors[item]
        return RuntimeError(f"{self._name}: the next item was asked for after it was closed")

    def stall(self, waited_s: float) -> Fault:
        """The error for an item that has not come."""
        with self._lock:
            awaited = self._chain.awaited()
        return Fault(
            f"{self._name}: item {awaited.item} has not come within {waited_s:g} s; "
            f"{self.names[awaited.actor]} is still at it{self._stacks(awaited.actor)}",
            hint="slow storage, a source without new records, or a function that hangs?",
        )

    def close(self, within_s: float) -> None:
        """As `Pipeline.close`."""
        if os.getpid() != self._pid:
            return
        self.tell(Closed())
        self.join(time.monotonic() + within_s)
        stuck = [
            f"{name} is still at an item{self._stacks(actor)}"
            for actor, name in enumerate(self.names)
            if any(thread.is_alive() for thread in self._threads[actor])
        ]
        if stuck:
            raise Fault(
                f"{self._name} was closed, and after {within_s:g} s " + "; ".join(stuck),
                hint="a stage can be stopped between two items only: it should return in seconds",
            )
        for values in self.values:
            values.clear()

    def join(self, by_s: float) -> None:
        """Waits until all threads have ended, or the clock says `by_s`."""
        for thread in self._all_threads():
            thread.join(max(0.0, by_s - time.monotonic()))

    def shares(self) -> dict[str, Shares]:
        """As `Pipeline.shares`."""
        with self._lock:
            shares = self._ledger.shares(time.monotonic())
        return dict(zip(self.names, shares, strict=True))

    def _all_threads(self) -> list[threading.Thread]:
        return [thread for threads in self._threads for thread in threads]

    def _thread(self, actor: int, act: Callable[[int], Any]) -> threading.Thread:
        name = f"{self._name}: {self.names[actor]}"
        return threading.Thread(target=self._work, args=(actor, act), name=name, daemon=True)

    def _stage(self, actor: int, function: Callable[[Any], Any]) -> Callable[[int], Any]:
        def act(item: int) -> Any:
            try:
                return function(self.values[actor - 1].pop(item))
            except StopIteration as error:  # would end the flow as if there were no more items
                raise RuntimeError(f"stage {self.names[actor]} raised StopIteration") from error

        return act

    def _work(self, actor: int, act: Callable[[int], Any]) -> None:
        """A thread's life. It keeps no value while it waits: what it holds has a register."""
        while (item := self.inboxes[actor].get()) is not None and self._chain.stopped is None:
            event: Event = Finished(actor, item)
            try:
                self.values[actor][item] = act(item)
            except StopIteration:
                event = Ended(item)
            except BaseException as error:
                error.add_note(f"{self._name}: stage {self.names[actor]}, item {item}")
                self._errors[item] = error
                event = Failed(actor, item)
            self.tell(event)

    def _stacks(self, actor: int) -> str:
        """What the threads of an actor are doing, for a message."""
        frames = sys._current_frames()
        stacks = [
            "".join(traceback.format_stack(frames[thread.ident])[-FRAMES:]).rstrip()
            for thread in self._threads[actor]
            if thread.ident in frames
        ]
        return "".join(f"\n{stack}" for stack in stacks)


_FLOWS: weakref.WeakSet[_Flow] = weakref.WeakSet()
"""All there are in this process."""


@atexit.register
def _end_flows() -> None:
    """A thread that is in torch when the interpreter goes takes the process down with it."""
    by_s = time.monotonic() + CLOSE_S
    for flow in list(_FLOWS):
        flow.end_threads()
        flow.join(by_s)
