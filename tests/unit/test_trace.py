"""Traces: the format holds, spans nest, waits have names, and memory is bounded."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from penstock.errors import TransportError
from penstock.exchange.communicator import Communicator
from penstock.exchange.reduction import SUM
from penstock.exchange.work import DONE, Work
from penstock.testing.group import in_threads
from penstock.watch import trace as traces
from penstock.watch.trace import Trace

Event = dict[str, Any]


def read(trace: Trace) -> list[Event]:
    """The events of a trace's file, each of which has what the format asks of it."""
    document = json.loads(trace.to_json())
    events: list[Event] = document["traceEvents"]
    for event in events:
        assert {"ph", "ts", "pid", "tid", "name"} <= event.keys(), event
        assert event["ph"] in "XMisf"
        assert isinstance(event["ts"], int)
        assert event["tid"] in (traces.MAIN, traces.EXCHANGE)
        if event["ph"] == "X":
            assert event["dur"] >= 0
    return events


def spans(trace: Trace, thread: int = traces.MAIN) -> list[Event]:
    return [e for e in read(trace) if e["ph"] == "X" and e["tid"] == thread]


def paths(found: list[Event]) -> list[str]:
    """Each span below those it lies in; an error where two overlap and neither has the other."""
    paths, open_spans = [], []
    for event in found:
        while open_spans and event["ts"] >= open_spans[-1]["ts"] + open_spans[-1]["dur"]:
            open_spans.pop()
        if open_spans:
            outer = open_spans[-1]
            assert event["ts"] + event["dur"] <= outer["ts"] + outer["dur"], (event, outer)
        open_spans.append(event)
        paths.append("/".join(e["name"] for e in open_spans))
    return paths


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Readings of the monotonic clock are as far apart as one says, in ns."""
    now, tick = [time.perf_counter_ns()], [1_000_000]

    def read_clock() -> int:
        now[0] += tick[0]
        return now[0]

    def set_tick(ns: int) -> None:
        tick[0] = ns

    monkeypatch.setattr(time, "perf_counter_ns", read_clock)
    return set_tick


def two_steps(trace: Trace) -> None:
    for number in (1, 2):
        trace.step(number)
        trace.begin("feed")
        trace.then("forward")
        trace.then("backward")
        trace.end()
        trace.begin("exchange and update")
        trace.begin("update")
        trace.end()
        trace.end()
    trace.end()


def test_spans_nest(clock: Callable[[int], None]) -> None:
    trace = Trace(3)
    two_steps(trace)
    inside = ["", "/feed", "/forward", "/backward", "/exchange and update"]
    inside.append("/exchange and update/update")
    expected = [f"step {number}{path}" for number in (1, 2) for path in inside]
    assert paths(spans(trace)) == expected
    assert {event["pid"] for event in read(trace)} == {3}


def test_an_overlap_would_be_found() -> None:
    first = {"name": "first", "ts": 0, "dur": 10}
    with pytest.raises(AssertionError):
        paths([first, {"name": "second", "ts": 5, "dur": 10}])


@pytest.mark.parametrize("tick_ns", [1, 70, 333, 999])
def test_spans_nest_where_they_are_shorter_than_the_unit(
    clock: Callable[[int], None], tick_ns: int
) -> None:
    """An end that is rounded away from its length would stick out of what encloses it."""
    trace = Trace(0)
    clock(tick_ns)
    for _ in range(50):
        two_steps(trace)
    found = spans(trace)
    paths(found)
    assert [event["name"] for event in found][:3] == ["step 1", "feed", "forward"]


def test_names_of_process_and_threads() -> None:
    named = {
        (event["name"], event["tid"]): event["args"]
        for event in read(Trace(2))
        if event["ph"] == "M"
    }
    assert named["process_name", 0]["name"].startswith("rank 2 on ")
    assert named["process_sort_index", 0] == {"sort_index": 2}
    assert named["thread_name", traces.MAIN] == {"name": "main"}
    assert named["thread_name", traces.EXCHANGE] == {"name": "exchange"}


def test_times_are_microseconds_of_the_wall_clock() -> None:
    before_us = time.time_ns() // 1000
    trace = Trace(0)
    trace.begin("sleep")
    time.sleep(0.01)
    trace.end()
    after_us = time.time_ns() // 1000
    (event,) = spans(trace)
    slack_us = 1000  # the wall clock may be slewed meanwhile
    assert before_us - slack_us <= event["ts"]
    assert event["ts"] + event["dur"] <= after_us + slack_us
    assert event["dur"] >= 10_000


def test_what_is_open_is_unfinished(clock: Callable[[int], None]) -> None:
    trace = Trace(0)
    trace.step(7)
    trace.begin("forward")
    found = spans(trace)
    assert paths(found) == ["step 7", "step 7/forward"]
    assert all(event["args"] == {"unfinished": True} for event in found)
    trace.end()
    assert "args" not in spans(trace)[1]


def test_a_step_ends_what_was_left_open(clock: Callable[[int], None]) -> None:
    trace = Trace(0)
    trace.step(1)
    trace.begin("evaluation on test")  # it raises, and the loop catches that
    trace.step(2)
    trace.end()
    assert paths(spans(trace)) == ["step 1", "step 1/evaluation on test", "step 2"]


def size(trace: Trace) -> int:
    return sum(sys.getsizeof(ring) + sum(map(sys.getsizeof, ring)) for ring in trace._spans)


def test_memory_is_bounded_and_the_last_is_kept(clock: Callable[[int], None]) -> None:
    trace = Trace(0, most_spans=100)
    for number in range(1, 101):
        trace.step(number)
    trace.end()
    full, document = size(trace), json.loads(trace.to_json())
    assert document["otherData"] == {"dropped": {"main": 0, "exchange": 0}}
    assert not any(event["ph"] == "i" for event in read(trace))
    for number in range(101, 1101):
        trace.step(number)
    trace.end()
    assert size(trace) < 1.1 * full
    assert [e["name"] for e in spans(trace)] == [f"step {n}" for n in range(1001, 1101)]
    assert json.loads(trace.to_json())["otherData"]["dropped"] == {"main": 1000, "exchange": 0}
    (gap,) = [event for event in read(trace) if event["ph"] == "i"]
    assert gap["name"] == "1,000 earlier spans were dropped"
    assert gap["ts"] == spans(trace)[0]["ts"]


def both_ways(group: Communicator) -> tuple[Trace, Trace]:
    """One collective that runs in the other thread, one that runs in this; traced, and not."""
    seen, unseen = Trace(group.rank), Trace(group.rank)
    group.observer = seen
    seen.begin("backward")
    work = group.all_reduce(torch.ones(5, 2), SUM)
    seen.end()
    work.wait()
    group.broadcast(torch.ones(3), 0, sync=True)
    group.observer = None
    work = group.all_reduce(torch.ones(7), SUM)
    assert type(work) is Work
    work.wait()
    return seen, unseen


def test_collectives_are_named_where_they_run_and_where_they_are_waited_for() -> None:
    for rank, (seen, unseen) in enumerate(in_threads(2, both_ways)):
        assert spans(unseen) == spans(unseen, traces.EXCHANGE) == []
        names = [event["name"] for event in spans(seen)]
        assert names == [
            "backward",
            "wait for all_reduce of sum float32 (5, 2), number 1",
            "wait for broadcast of float32 (3,), root 0, number 2",
        ]
        (exchanged,) = spans(seen, traces.EXCHANGE)
        assert exchanged["name"] == "all_reduce of sum float32 (5, 2), number 1"
        assert exchanged["args"]["number"] == 1
        issued, began = (e for e in read(seen) if e["ph"] in "sf")
        assert (issued["ph"], issued["tid"]) == ("s", traces.MAIN)
        assert (began["ph"], began["tid"], began["bp"]) == ("f", traces.EXCHANGE, "e")
        assert issued["id"] == began["id"] == (rank << 32) + 1
        assert began["ts"] == exchanged["ts"]
        assert 0 <= began["ts"] - issued["ts"] <= exchanged["args"]["queued_us"] + 1
        backward = spans(seen)[0]
        assert backward["ts"] <= issued["ts"] <= backward["ts"] + backward["dur"]


def one_comes_late(group: Communicator) -> Trace:
    trace = group.observer = Trace(group.rank)
    if group.rank == 1:
        time.sleep(0.2)
    group.all_reduce(torch.ones(1), SUM).wait()
    group.observer = None
    return trace


def test_a_wait_lasts_as_long_as_the_other_is_late() -> None:
    early, late = in_threads(2, one_comes_late)
    assert spans(early)[0]["dur"] > 150_000 > spans(late)[0]["dur"]


def one_leaves(group: Communicator) -> Trace | None:
    if group.rank == 1:
        return None
    trace = group.observer = Trace(group.rank)
    with pytest.raises(TransportError):
        group.all_reduce(torch.ones(4), SUM).wait()
    return trace


def test_what_fails_is_in_the_trace() -> None:
    trace = in_threads(2, one_leaves)[0]
    assert spans(trace)[0]["name"] == "wait for all_reduce of sum float32 (4,), number 1"
    assert len(spans(trace, traces.EXCHANGE)) == 1


def test_what_is_not_observed_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_clock() -> int:
        raise AssertionError("the clock was read")

    def call(group: Communicator) -> bool:
        group.all_reduce(torch.ones(1), SUM).wait()
        return group.all_reduce(torch.ones(1), SUM, sync=True) is DONE

    trace = Trace(0)
    monkeypatch.setattr(time, "perf_counter_ns", read_clock)
    assert in_threads(1, call) == [True]

    def observed(group: Communicator) -> None:
        group.observer = trace
        group.all_reduce(torch.ones(1), SUM, sync=True)

    with pytest.raises(RuntimeError, match="the clock was read"):
        in_threads(1, observed)
