"""One rank's trace: what its threads did, and what they waited for, in Chrome's format.

The file loads in Perfetto (ui.perfetto.dev) and chrome://tracing: a process for each rank, in it
the thread that trains and the one that exchanges. Format: "Trace Event Format", Google, 2016:
complete events (X) for spans, flow events (s, f) from where a collective is issued to where it
starts, metadata (M) for names.

Times are wall-clock microseconds, taken from the monotonic clock, which all processes of a host
share: so ranks of one host can be compared to about a microsecond, others as their clocks agree.

What a thread has done is kept as tuples in a ring; words are made of them when the file is written.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import deque
from typing import Any, Protocol

FOLDER = "trace"
MAIN, EXCHANGE = 0, 1
THREADS = ("main", "exchange")
MOST_SPANS = 50_000
"""Of each thread; of what is more, the last: 8 MB in memory, 4 to 20 MB in the file, written in
0.3 to 1 s. [measured: AMD EPYC, 2026-11]"""
READINGS = 16
"""Of the two clocks, of which the least disturbed counts."""


class Operation(Protocol):
    """What is said of a collective."""

    @property
    def text(self) -> str: ...


UNFINISHED = -1
"""In place of a number: what had begun and not ended."""

# What it was, the number of the collective (0: it was none), and when it was issued, began and
# ended, in ns of the monotonic clock.
_Span = tuple[str | Operation, int, int, int, int]


class Trace:
    """What one rank does, from now on. An observer of its communicator as well.

    Spans begun by `begin` nest, and are all of the thread that made the trace; what `ran` in
    another thread is the exchange's.

    Arguments:
        rank: whose trace it is; "pid" in the file.
        most_spans: how many to keep of each thread.
    """

    def __init__(self, rank: int, most_spans: int = MOST_SPANS) -> None:
        self._rank, self._main = rank, threading.get_ident()
        self._spans: tuple[deque[_Span], ...] = (deque(maxlen=most_spans), deque(maxlen=most_spans))
        self._recorded = [0, 0]  # each counted by its own thread alone
        self._open: list[tuple[str, int]] = []
        self._wall_ns = _wall_minus_monotonic_ns()

    def step(self, number: int) -> None:
        """A training step begins; whatever has been left open ends."""
        while self._open:
            self.end()
        self.begin(f"step {number}")

    def begin(self, name: str) -> None:
        """Something begins, within what is open."""
        self._open.append((name, time.perf_counter_ns()))

    def then(self, name: str) -> None:
        """What has begun last ends, and something else begins."""
        self.end()
        self.begin(name)

    def end(self) -> None:
        """What has begun last ends."""
        if self._open:
            name, began_ns = self._open.pop()
            self._add(MAIN, (name, 0, 0, began_ns, time.perf_counter_ns()))

    def ran(
        self, operation: Operation, sequence: int, issued_ns: int, began_ns: int, ended_ns: int
    ) -> None:
        """A collective has run, well or not; times from `time.perf_counter_ns`."""
        thread = MAIN if threading.get_ident() == self._main else EXCHANGE
        self._add(thread, (operation, sequence, issued_ns, began_ns, ended_ns))

    def waited(self, operation: Operation, sequence: int, began_ns: int, ended_ns: int) -> None:
        """The training thread has waited for a collective that runs in the other."""
        self._add(MAIN, (operation, sequence, 0, began_ns, ended_ns))

    def to_json(self) -> bytes:
        """The file; what is still open ends in it now, and says that it is unfinished."""
        now_ns = time.perf_counter_ns()
        events = [
            self._named("process_name", f"rank {self._rank} on {socket.gethostname()}"),
            self._of(ph="M", name="process_sort_index", ts=0, tid=MAIN)
            | {"args": {"sort_index": self._rank}},
        ]
        dropped = {}
        for thread, name in enumerate(THREADS):
            spans = list(self._spans[thread])
            dropped[name] = self._recorded[thread] - len(spans)
            events.append(self._named("thread_name", name, thread))
            if dropped[name]:
                events.append(self._gap(thread, dropped[name], spans[0]))
            if thread == MAIN:
                spans += [(name, UNFINISHED, 0, at, now_ns) for name, at in self._open]
            # Of two spans that look the same in microseconds, viewers take the first for the outer.
            spans.sort(key=lambda span: (span[3], -span[4]))
            events += [self._event(thread, span) for span in spans]
            if thread == EXCHANGE:
                events += [event for span in spans for event in self._flow(span)]
        to_text = json.JSONEncoder(separators=(",", ":")).encode
        lines, other = ",\n".join(map(to_text, events)), to_text({"dropped": dropped})
        head = f'{{"displayTimeUnit":"ms","otherData":{other},"traceEvents":[\n'
        return f"{head}{lines}\n]}}\n".encode()

    def _add(self, thread: int, span: _Span) -> None:
        self._spans[thread].append(span)
        self._recorded[thread] += 1

    def _event(self, thread: int, span: _Span) -> dict[str, Any]:
        what, number, issued_ns, began_ns, ended_ns = span
        if isinstance(what, str):
            unfinished = {"unfinished": True} if number == UNFINISHED else {}
            return self._span(thread, what, "step", began_ns, ended_ns, unfinished)
        name, arguments = f"{what.text}, number {number}", {"number": number}
        if thread == MAIN:  # also where it runs there: it has to wait for the others
            return self._span(thread, f"wait for {name}", "wait", began_ns, ended_ns, arguments)
        arguments["queued_us"] = (began_ns - issued_ns) // 1000
        return self._span(thread, name, "exchange", began_ns, ended_ns, arguments)

    def _flow(self, span: _Span) -> list[dict[str, Any]]:
        """An arrow from where a collective was issued to where it began."""
        _, number, issued_ns, began_ns, _ = span
        # Unique among all ranks, whose files may be shown as one.
        one = {"name": "issued", "cat": "exchange", "id": (self._rank << 32) + number}
        return [
            self._of(ph="s", ts=self._us(issued_ns), tid=MAIN, **one),
            self._of(ph="f", ts=self._us(began_ns), tid=EXCHANGE, bp="e", **one),
        ]

    def _gap(self, thread: int, dropped: int, first: _Span) -> dict[str, Any]:
        name = f"{dropped:,} earlier spans were dropped"
        return self._of(ph="i", name=name, s="t", ts=self._us(first[3]), tid=thread)

    def _named(self, what: str, name: str, thread: int = MAIN) -> dict[str, Any]:
        return self._of(ph="M", name=what, ts=0, tid=thread) | {"args": {"name": name}}

    def _span(
        self,
        thread: int,
        name: str,
        category: str,
        began_ns: int,
        ended_ns: int,
        arguments: dict[str, Any],
    ) -> dict[str, Any]:
        # Both ends are rounded, and not the length: so what lies within another still does.
        began_us, ended_us = self._us(began_ns), self._us(ended_ns)
        return self._of(
            ph="X", name=name, cat=category, ts=began_us, dur=ended_us - began_us, tid=thread
        ) | ({"args": arguments} if arguments else {})

    def _of(self, **event: Any) -> dict[str, Any]:
        return event | {"pid": self._rank}

    def _us(self, monotonic_ns: int) -> int:
        return (self._wall_ns + monotonic_ns) // 1000


def _wall_minus_monotonic_ns() -> int:
    readings = []
    for _ in range(READINGS):
        before, wall, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]
