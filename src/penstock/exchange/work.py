"""Collectives under way: what is waited for, and how they end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from penstock.errors import TransportError
from penstock.exchange.operation import Operation, Turn

log = logging.getLogger(__name__)

Ended = Callable[[TransportError | None], None]


class Work:
    """A collective, or a message, under way.

    Arguments:
        what: it is, for errors.
    """

    source: int | None = None
    """The rank that a received message came from."""

    def __init__(self, what: str = "") -> None:
        self.what = what
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._error: TransportError | None = None
        self._calls: list[Ended] = []

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when it is done; raises TransportError when it has failed, or is not done in time
        (it goes on then: its own deadline ends it)."""
        if not self._done.wait(timeout_s):
            raise TransportError(f"{self.what}: not done after {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def when_done(self, call: Ended) -> None:
        """Calls with the error, or None, when it has ended: once, from any thread, or here."""
        with self._lock:
            if not self._done.is_set():
                self._calls.append(call)
                return
        call(self._error)

    def end(self, error: TransportError | None = None) -> None:
        """It has ended, well or so. Doing it again does nothing."""
        with self._lock:
            if self._done.is_set():
                return
            self._error = error
            self._done.set()
        for call in self._calls:
            try:
                call(error)
            except Exception:  # one caller's mistake is not to end the others' collectives
                log.exception("what was to be called after %s failed", self.what)


DONE = Work()
"""What has run in the caller, without an error."""
DONE.end()


class Observer(Protocol):
    """Hears of a communicator's collectives; times in ns, from `time.perf_counter_ns`."""

    def ran(
        self, operation: Operation, sequence: int, issued_ns: int, began_ns: int, ended_ns: int
    ) -> None:
        """A collective has run, well or not, in the thread that calls this."""
        ...

    def waited(self, operation: Operation, sequence: int, began_ns: int, ended_ns: int) -> None:
        """The thread that calls this has waited for a collective."""
        ...


class ObservedWork(Work):
    """A collective under way, of whose waits an observer hears."""

    def __init__(self, observer: Observer, turn: Turn) -> None:
        super().__init__(turn.what)
        self._observer, self._of = observer, (turn.operation, turn.sequence)

    def wait(self, timeout_s: float | None = None) -> None:
        began_ns = time.perf_counter_ns()
        try:
            super().wait(timeout_s)
        finally:
            self._observer.waited(*self._of, began_ns, time.perf_counter_ns())
