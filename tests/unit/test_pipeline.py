"""A pipeline's threads: order, ends, errors, bounds and times."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.errors import DataError, Fault
from penstock.runtime.actor import Shares
from penstock.runtime.pipeline import Pipeline, PipelineStage, bounded_by

TIMEOUT_S = 60.0


def pipeline(
    items: Iterator[Any],
    *functions: Callable[[Any], Any],
    workers: int = 1,
    registers: int = 2,
    timeout_s: float = TIMEOUT_S,
) -> Pipeline[Any]:
    stages = [PipelineStage(f"stage {n}", f, workers) for n, f in enumerate(functions, start=1)]
    return Pipeline(items, stages, registers=registers, name="feed", timeout_s=timeout_s)


def threads() -> list[str]:
    """The names of the threads of pipelines."""
    return sorted(thread.name for thread in threading.enumerate() if "feed: " in thread.name)


def gone(what: Callable[[], Any], within_s: float = 20.0) -> bool:
    """Whether it is empty or false at last."""
    by_s = time.monotonic() + within_s
    while what() and time.monotonic() < by_s:
        time.sleep(0.005)
    return not what()


def in_function(name: str) -> bool:
    """Whether a thread is in it now."""
    stacks = map(traceback.extract_stack, sys._current_frames().values())
    return any(frame.name == name for stack in stacks for frame in stack)


@pytest.fixture(autouse=True)
def _no_thread_is_left(deadline: None) -> Iterator[None]:
    yield
    assert gone(threads), threads()


# What comes out


@pytest.mark.parametrize("registers", [1, 2, 5])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_item_once_and_in_order(registers: int, workers: int) -> None:
    def uneven(item: int) -> int:
        time.sleep(item % 3 * 0.002)
        return item * 10

    with pipeline(
        iter(range(60)), uneven, lambda item: item + 1, workers=workers, registers=registers
    ) as flow:
        assert list(flow) == [item * 10 + 1 for item in range(60)]
        assert list(flow) == []  # and nothing again


def test_workers_work_at_the_same_time() -> None:
    """Two are in the function at once (each waits for the other), and never three."""
    pair = threading.Barrier(2)

    def meet(item: int) -> int:
        pair.wait(TIMEOUT_S)
        return item

    with pipeline(iter(range(10)), meet, workers=2) as flow:
        assert len([name for name in threads() if "stage 1" in name]) == 2
        assert list(flow) == list(range(10))


def test_without_stages_and_without_items() -> None:
    with pipeline(iter("abc")) as flow:
        assert list(flow) == ["a", "b", "c"]
    with pipeline(iter(()), str) as flow:
        assert list(flow) == []


def test_none_is_an_item() -> None:
    with pipeline(iter([None, 0, None]), lambda item: item) as flow:
        assert list(flow) == [None, 0, None]


def test_stages_have_each_a_name() -> None:
    for names in (["a", "a"], ["read"], ["compute"]):
        with pytest.raises(ValueError, match="a name of their own"):
            Pipeline(iter(()), [PipelineStage(n, str) for n in names], name="feed", timeout_s=1)


# Errors


def decode(item: int) -> int:
    if item == 5:
        raise DataError(f"record {item} is no image", hint="look at it")
    return item


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stage_that_fails(workers: int) -> None:
    """What precedes the failure comes; then the error itself, with its own stack; nothing else."""
    came = []
    with (
        pytest.raises(DataError, match="record 5 is no image") as caught,
        pipeline(iter(range(100)), str, int, decode, str, workers=workers) as flow,
    ):
        came.extend(flow)
    assert came == ["0", "1", "2", "3", "4"]
    assert caught.value.hint == "look at it"
    assert caught.value.__notes__ == ["feed: stage stage 3, item 5"]
    assert "decode" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(DataError) as again:
        next(flow)  # never a short epoch
    assert again.value is caught.value


def test_a_source_that_fails() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise OSError("the disk is gone")

    with pipeline(items(), str) as flow:
        assert next(flow) == "0"
        with pytest.raises(OSError, match="disk is gone") as caught:
            next(flow)
    assert caught.value.__notes__ == ["feed: stage read, item 1"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_error_of_any_kind(error: type[BaseException]) -> None:
    def stage(item: int) -> int:
        raise error("stop")

    with pipeline(iter(range(9)), stage) as flow, pytest.raises(error, match="stop"):
        next(flow)


def test_a_stage_cannot_end_the_flow_as_if_there_were_no_more_items() -> None:
    def stage(item: int) -> int:
        if item == 2:
            next(iter(()))
        return item

    with pipeline(iter(range(9)), stage) as flow:
        assert [next(flow), next(flow)] == [0, 1]
        with pytest.raises(RuntimeError, match="stage 1 raised StopIteration"):
            next(flow)


def test_of_two_failures_the_first_item_counts_whoever_is_faster() -> None:
    def late(item: int) -> int:
        if item == 3:
            time.sleep(0.05)
            raise ValueError("item 3")
        if item == 4:
            raise ValueError("item 4")
        return item

    with pipeline(iter(range(9)), late, workers=2) as flow:
        assert [next(flow), next(flow), next(flow)] == [0, 1, 2]
        with pytest.raises(ValueError, match="item 3"):
            next(flow)


# Deadlines


def test_an_item_that_does_not_come() -> None:
    """The error names the stage that all wait for, and shows where it is."""
    come = threading.Event()

    def hangs(item: int) -> int:
        if item == 2:
            come.wait(TIMEOUT_S)
        return item

    with pipeline(iter(range(9)), lambda item: item, hangs, timeout_s=0.2) as flow:
        assert [next(flow), next(flow)] == [0, 1]
        with pytest.raises(Fault, match=r"item 2 has not come within 0\.2 s; stage 2") as error:
            next(flow)
        assert "in hangs" in str(error.value)
        assert "come.wait(TIMEOUT_S)" in str(error.value)
        assert "hint: " in str(error.value)
        come.set()
        while True:  # it may come in the end
            try:
                assert next(flow) == 2
                break
            except Fault:
                continue
        assert next(flow) == 3


def test_a_stage_that_does_not_end_in_time_is_named_when_it_is_closed() -> None:
    come = threading.Event()

    def hangs(item: int) -> int:
        come.wait(TIMEOUT_S)
        return item

    flow = pipeline(iter(range(9)), hangs, lambda item: item)
    assert gone(lambda: not in_function("hangs"))
    with pytest.raises(Fault, match=r"after 0.1 s stage 1 is still at an item") as caught:
        flow.close(0.1)
    assert "in hangs" in str(caught.value)
    assert "stage 2" not in str(caught.value)
    assert gone(lambda: len(threads()) > 1)  # all others have ended
    with pytest.raises(RuntimeError, match="feed: the next item was asked for after"):
        next(flow)
    come.set()
    flow.close()


def test_the_error_of_a_block_is_not_hidden_by_a_stage_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pipeline.close, "__defaults__", (0.1,))
    come = threading.Event()

    def hangs(item: int) -> int:
        come.wait(TIMEOUT_S)
        return item

    def train() -> None:
        with pipeline(iter(range(9)), hangs):
            assert gone(lambda: not in_function("hangs"))
            raise ValueError("the user's")

    with pytest.raises(ValueError, match="the user's") as caught:
        train()
    assert "stage 1 is still at an item" in caught.value.__notes__[0]
    come.set()


# Ends


def test_close_leaves_no_thread() -> None:
    endless = iter(int, 1)
    flow = pipeline(endless, str, str, workers=2)
    assert next(flow) == "0"
    assert len(threads()) == 5
    flow.close()
    assert threads() == []
    flow.close()
    with pytest.raises(RuntimeError, match="after it was closed"):
        next(flow)


def test_closed_with_an_item_that_nobody_took() -> None:
    flow = pipeline(iter(range(9)), str)
    assert gone(flow._flow.inboxes[-1].empty)
    flow.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="after it was closed"):
            next(flow)


def test_close_closes_a_generator() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from iter(int, 1)
        finally:
            closed.set()

    with pipeline(items(), str) as flow:
        next(flow)
        assert not closed.is_set()
    assert closed.is_set()


def test_one_that_is_forgotten_ends() -> None:
    flow = pipeline(iter(int, 1), str)
    next(flow)
    assert len(threads()) == 2
    del flow
    gc.collect()
    assert gone(threads)


def test_a_process_that_ends_with_an_open_pipeline() -> None:
    code = """
        import sys, torch
        from penstock.runtime.pipeline import Pipeline, PipelineStage

        def items():
            while True:
                yield torch.rand(100, 1000)

        stages = [PipelineStage("multiply", lambda x: x @ x.T, 2)]
        flow = Pipeline(items(), stages, name="feed", timeout_s=60)
        next(flow)
        sys.exit(7)
    """
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, timeout=TIMEOUT_S
        )
        assert (done.returncode, done.stderr) == (7, b"")


def test_a_forked_process_leaves_the_threads_alone() -> None:
    """A child has the pipeline without its threads: it hangs nowhere, and the parent goes on."""
    with pipeline(iter(int, 1), str) as flow:
        next(flow)
        flow._flow._lock.acquire()  # as a thread might at the moment of a fork
        child = os.fork()
        if child == 0:
            try:
                flow.close()
                next(flow)
            except RuntimeError as error:
                os._exit(0 if "its threads are there" in str(error) else 1)
            os._exit(2)
        flow._flow._lock.release()
        by_s = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < by_s:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)
        assert next(flow) == "0"


# What is under way


class Item:
    """Counts how many of it there are."""

    def __init__(self, number: int, live: set[int]) -> None:
        self.number, self._live = number, live
        self.buffer = np.full(4096, number % 256, np.uint8)
        live.add(number)

    def __del__(self) -> None:
        self._live.discard(self.number)


def test_a_slow_stage_stops_those_before_it() -> None:
    """Read makes as many as there are registers, and no more, however long it takes."""
    made, proceed = [], threading.Event()

    def slow(item: int) -> int:
        proceed.wait(TIMEOUT_S)
        return item

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with pipeline(items(), lambda item: item, slow) as flow:
        assert gone(lambda: len(made) < 4)
        time.sleep(0.2)
        # Item 0 in `slow`, 1 before it, 2 and 3 before stage 1, which has no place to put them.
        assert len(made) == 4
        proceed.set()
        assert list(flow) == list(range(100))
    assert len(made) == 100


def test_a_slow_consumer_stops_all() -> None:
    live: set[int] = set()
    with pipeline((Item(n, live) for n in range(1000)), lambda item: item) as flow:
        for n, item in enumerate(flow):
            assert item.number == n
            if n % 100 == 0:
                time.sleep(0.02)
            assert len(live) <= 5  # 4 registers, and what the loop's variable held before
    del item
    assert live == set()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_flat() -> None:
    """100,000 items of 4 KB, 400 MB in all."""
    live: set[int] = set()
    most = early = 0
    stages = [lambda item: item, lambda item: item]
    with pipeline((Item(n, live) for n in range(100_000)), *stages) as flow:
        for item in flow:
            most = max(most, len(live))
            if item.number == 10_000:
                early = _resident_bytes()
        grown = _resident_bytes() - early
    assert item.number == 99_999
    assert most <= 7  # 6 registers, and what the loop's variable held before
    assert grown < 4e6


# Times


def rate(registers: int, items: int = 40) -> float:
    """Items per second of four stages of 20 ms: read, two more, and the consumer."""

    def work(item: int) -> int:
        time.sleep(0.02)
        return item

    with pipeline(map(work, range(items)), work, work, registers=registers) as flow:
        began_s = time.monotonic()
        for item in flow:
            work(item)
        return items / (time.monotonic() - began_s)


def test_four_stages_of_20_ms() -> None:
    """50 a second at most with 2 registers, 25 with 1. A busy machine can only slow it down."""
    two = one = 0.0
    for _ in range(3):
        two, one = max(two, rate(2)), max(one, rate(1))
        if two > 45:
            break
    assert two > 35
    assert one < 26
    assert two > 1.4 * one


def test_shares_say_what_bounds_the_flow() -> None:
    def slow(item: int) -> int:
        time.sleep(0.02)
        return item

    with pipeline(iter(range(30)), slow, lambda item: item) as flow:
        assert len(list(flow)) == 30
        shares = flow.shares()
        assert list(shares) == ["read", "stage 1", "stage 2", "compute"]
        for of in shares.values():
            assert sum((of.busy, of.starved, of.blocked)) == pytest.approx(1)
        name, busy = bounded_by(shares)
        assert name == "stage 1"
        assert busy > 0.8
        assert shares["read"].blocked > 0.6
        assert shares["stage 2"].starved > 0.6
        assert shares["compute"].starved > 0.6
        time.sleep(0.05)  # nothing is spent after the end
        assert flow.shares() == dict.fromkeys(shares, Shares(0, 1, 0))


def test_shares_of_a_slow_consumer_and_of_half_the_workers() -> None:
    def slow(item: int) -> int:
        time.sleep(0.02)
        return item

    with pipeline(iter(int, 1), slow, workers=2) as flow:
        next(flow)
        flow.shares()
        for _ in range(20):
            time.sleep(0.02)
            next(flow)
        shares = flow.shares()
        assert bounded_by(shares)[0] == "compute"
        assert shares["compute"].busy > 0.8
        assert 0.25 < shares["stage 1"].busy < 0.8  # two, of whom one would do
        assert shares["stage 1"].blocked > 0.15
