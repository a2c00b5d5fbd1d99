"""What a communicator promises beside the collectives: order, interrupts, forks, and its end."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock.errors import TransportError, UserError
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.exchange.reduction import Reduction
from penstock.testing.group import in_processes, in_threads

pytestmark = pytest.mark.usefixtures("deadline")


def interrupted(group: Communicator) -> tuple[str, float]:
    """Rank 0 is interrupted in a collective that waits, and goes on as if nothing had been."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    group.barrier()
    if group.rank == 0:
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            group.all_reduce(torch.ones(1), sync=True)
    else:
        time.sleep(0.8)
    value = torch.full((1,), 10.0**group.rank)
    with pytest.raises(TransportError) as caught:
        _ = [group.all_reduce(value, sync=True) for _ in range(2)]
    return str(caught.value), value.item()


@pytest.mark.parametrize("through", ["memory", "tcp"])
def test_an_interrupted_collective_ends_the_group(through: str) -> None:
    told = in_processes(2, interrupted, through=through)
    assert all("KeyboardInterrupt" in text for text, _ in told)
    assert told[1][1] in (10.0, 11.0), "the sum of another collective's numbers"


def chained(group: Communicator) -> list[float]:
    """A callback issues a collective and waits for it, as torch's PowerSGD hook does."""
    first, second, third = torch.ones(1), torch.full((1,), 2.0), torch.full((1,), 3.0)
    ended = threading.Event()

    def follow(error: TransportError | None) -> None:
        group.all_reduce(second).wait()
        group.all_reduce(third, sync=True)
        ended.set()

    group.all_reduce(first).when_done(follow)
    assert ended.wait(10)
    group.barrier()
    return [first.item(), second.item(), third.item()]


def test_a_callback_may_wait_for_another_collective() -> None:
    assert in_threads(2, chained) == [[2.0, 4.0, 6.0]] * 2


def failing_callback(group: Communicator) -> float:
    value = torch.ones(1)

    def fail(error: TransportError | None) -> None:
        raise ValueError("a user's mistake")

    group.barrier(sync=False).when_done(fail)
    group.all_reduce(value).wait(10)
    return value.item()


def test_a_callback_that_fails_stops_nobody(caplog: pytest.LogCaptureFixture) -> None:
    assert in_threads(2, failing_callback) == [2.0, 2.0]
    assert "a user's mistake" in caplog.text


def after_close(group: Communicator) -> str:
    group.barrier(sync=False).wait()  # its thread has started
    group.close()
    group.close()
    with pytest.raises(TransportError) as caught:
        group.all_reduce(torch.ones(1)).wait(5)
    return str(caught.value)


def test_nothing_waits_in_a_group_that_was_left() -> None:
    assert in_threads(1, after_close) == ["rank 0 has left the group"]


def forked(group: Communicator) -> tuple[int, float]:
    """A child that was forked after the group formed uses it, and ends; it must not matter."""
    group.barrier(sync=False).wait()
    child = os.fork()
    if child == 0:
        try:
            group.all_reduce(torch.ones(1))
        except TransportError as error:
            group.close()
            os._exit(7 if "forked process has no part" in str(error) else 1)
        os._exit(2)
    _, status = os.waitpid(child, 0)
    value = torch.ones(1)
    group.all_reduce(value, sync=True)
    return os.waitstatus_to_exitcode(status), value.item()


@pytest.mark.parametrize("through", ["memory", "tcp"])
def test_a_forked_child_has_no_part_in_the_group(through: str) -> None:
    assert in_processes(2, forked, through=through) == [(7, 2.0)] * 2


def killed_with_a_child(group: Communicator) -> tuple[str, float] | None:
    group.barrier()
    if group.rank == 1:
        if os.fork() == 0:
            time.sleep(4)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        group.all_reduce(torch.ones(1), sync=True)
    return str(caught.value), time.monotonic() - began


def test_a_child_does_not_hide_its_parents_death() -> None:
    text, waited_s = in_processes(2, killed_with_a_child)[0]
    assert "died" in text
    assert waited_s < 1.5


def deadline(group: Communicator) -> float:
    """A barrier of 1 s to which the ranks come 0.4 s after each other."""
    group.barrier()
    began = time.monotonic()
    time.sleep(0.5 * group.rank)
    with contextlib.suppress(TransportError):  # the last finds that all have been there
        group.barrier(timeout_s=1.0)
    return time.monotonic() - began


def test_a_deadline_is_of_the_whole_collective() -> None:
    assert in_processes(4, deadline)[0] < 1.4  # 1.5 s if each wait had a deadline of its own


def refused(group: Communicator) -> None:
    one, whole = torch.ones(1), torch.ones(1, dtype=torch.int32)
    for call, text in (
        (lambda: group.gather_all([one], whole), "float32 and of int32 in one collective"),
        (lambda: group.exchange([one], [whole]), "in one collective"),
        (lambda: group.all_reduce(torch.ones(1).expand(4)), "several of its elements are one"),
        (lambda: group.all_reduce(torch.ones(2, device="meta")), "on meta: this group moves"),
        (lambda: group.all_reduce(one.to(torch.float8_e5m2)), "no such reduction"),
        (lambda: group.all_reduce(one.to(torch.uint16), Reduction("max")), "no such reduction"),
        (lambda: group.send(one, 5), "rank 5: expected a rank from 0 to 0"),
    ):
        with pytest.raises(UserError, match=text):
            call()
    group.all_reduce(one, sync=True)  # the group is as it was


def test_what_cannot_be_is_refused_when_it_is_issued() -> None:
    assert in_threads(1, refused) == [None]


def overlapping(group: Communicator) -> list[float]:
    """The input is where another rank's part goes."""
    output = torch.arange(2.0) + 10 * group.rank
    group.all_gather(output.view(2, 1), output[1 - group.rank : 2 - group.rank], sync=True)
    with torch.inference_mode():
        tensor = torch.ones(3)
        group.all_reduce(tensor).wait()
        assert tensor.tolist() == [2.0] * 3
    return output.tolist()


@pytest.mark.parametrize("through", ["memory", "tcp"])
def test_inputs_where_outputs_go(through: str) -> None:
    assert in_processes(2, overlapping, through=through) == [[1.0, 10.0]] * 2


def test_a_group_that_nobody_holds_is_gone() -> None:
    """Neither its thread nor its sockets stay."""
    store = dist.HashStore()  # type: ignore[attr-defined]

    def form() -> None:
        groups: list[Any] = [None, None]

        def join(rank: int) -> None:
            groups[rank] = connect(store, rank, 2, timeout_s=10.0, address="127.0.0.1")
            groups[rank].barrier(sync=False).wait()

        both(join)
        groups.clear()
        gc.collect()

    form()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        form()
    give_up = time.monotonic() + 5
    while time.monotonic() < give_up and any(
        thread.name == "penstock-group" for thread in threading.enumerate()
    ):
        time.sleep(0.01)
    assert not [t for t in threading.enumerate() if t.name == "penstock-group"]
    assert len(os.listdir("/proc/self/fd")) <= before


def both(function: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=function, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


def test_a_process_may_end_in_the_middle_of_a_collective(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch, torch.distributed as dist\n"
        "from penstock.exchange.connect import connect\n"
        "rank = int(sys.argv[1])\n"
        "group = connect(dist.FileStore(sys.argv[2], 2), rank, 2, timeout_s=20.0)\n"
        "group.barrier()\n"
        "if rank: group.all_reduce(torch.ones(1))\n"
        "else:\n"
        "    try: group.all_reduce(torch.ones(1)); group.barrier(); group.barrier()\n"
        "    except RuntimeError: pass\n"
    )
    path = str(tmp_path / "store")
    for _ in range(3):
        processes = [
            subprocess.Popen([sys.executable, "-c", code, str(rank), path], stderr=-1)
            for rank in range(2)
        ]
        for process in processes:
            _, text = process.communicate(timeout=30)
            assert process.returncode == 0, text.decode()
        Path(path).unlink(missing_ok=True)
