"""What every group promises (`penstock.exchange.group.Group`), and how it tells what went wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock.errors import TransportError
from penstock.exchange import tree
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.exchange.group import Group
from penstock.exchange.reduction import Total
from penstock.testing.group import GONE, in_processes, in_threads

pytestmark = pytest.mark.usefixtures("deadline", "nothing_left")

Run = Callable[..., list[Any]]

WORLD_SIZES = [1, 2, 3, 4]
OURS = {
    "loopback": in_threads,
    "memory": partial(in_processes, through="memory"),
    "tcp": partial(in_processes, through="tcp"),
    "hosts": partial(in_processes, through="hosts"),
}
ALL = OURS | {"gloo": partial(in_processes, through="gloo")}


@pytest.fixture(params=list(ALL))
def run(request: pytest.FixtureRequest) -> Run:
    return ALL[request.param]


@pytest.fixture(params=list(OURS))
def ours(request: pytest.FixtureRequest) -> Run:
    return OURS[request.param]


@pytest.fixture(params=["memory", "tcp", "hosts"])
def processes(request: pytest.FixtureRequest) -> Run:
    return OURS[request.param]


def values(rank: int, length: int) -> torch.Tensor:
    """float32 numbers that differ between ranks and between elements."""
    return (torch.arange(length) * 7 + 31 * rank + 1) % 101 / 7


def total(world_size: int) -> Total:
    return Total([(rank, rank + 1) for rank in range(world_size)], world_size)


def ranks(group: Group) -> tuple[int, int]:
    group.barrier()  # gloo: one that ends at once breaks the others' joining
    return group.rank, group.world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_count_from_0(world_size: int, run: Run) -> None:
    assert run(world_size, ranks) == [(rank, world_size) for rank in range(world_size)]


def come_late(group: Group) -> tuple[float, float]:
    time.sleep(0.1 * group.rank)
    came = time.monotonic()
    group.barrier()
    return came, time.monotonic()


@pytest.mark.parametrize("world_size", [1, 3])
def test_nobody_passes_a_barrier_before_the_last_has_come(world_size: int, run: Run) -> None:
    times = run(world_size, come_late)
    assert min(went for _, went in times) >= max(came for came, _ in times)


def many_at_once(group: Group) -> None:
    world_size, rank = group.world_size, group.rank
    started = []
    for n in range(12):
        length = 1 + 9000 * n
        gathered = torch.zeros(world_size, length)
        first = group.all_gather(gathered, values(rank + n, length))
        summed = values(rank - n, length)
        second = group.all_reduce(summed, total(world_size))
        sent = values(rank, length)
        third = group.broadcast(sent, n % world_size)
        started.append((length, gathered, summed, sent, first, second, third))
    for n, (length, gathered, summed, sent, *works) in enumerate(started):
        for work in works:
            work.wait()
        for other in range(world_size):
            assert torch.equal(gathered[other], values(other + n, length))
        parts = [values(other - n, length) for other in range(world_size)]
        assert torch.equal(summed, tree.tree_sum(parts)), "not along the fixed tree"
        assert torch.equal(sent, values(n % world_size, length))
    group.barrier()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_several_are_under_way_at_once(world_size: int, run: Run) -> None:
    assert run(world_size, many_at_once) == [None] * world_size


def collectives(group: Group) -> dict[str, Callable[[], object]]:
    """Each collective, waited for."""
    tensor = torch.zeros(1000)
    gathered = torch.zeros(group.world_size, 1000)
    return {
        "all_reduce": lambda: group.all_reduce(tensor, total(group.world_size)).wait(),
        "all_gather": lambda: group.all_gather(gathered, tensor).wait(),
        "broadcast": lambda: group.broadcast(tensor, 1).wait(),
        "barrier": group.barrier,
    }


def without_rank_1(group: Group, name: str, how: str) -> tuple[str, float] | None:
    """What the others are told when rank 1 takes no part in a collective, and after how long."""
    group.barrier()
    if group.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "stopped":
            wake = f"sleep 2.5; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", wake], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "leaves":
            group.close()
        else:
            time.sleep(2.5)
        return None
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        collectives(group)[name]()
    waited_s = time.monotonic() - began
    group.close()  # waits for nobody
    return str(caught.value), waited_s


NAMES = ["all_reduce", "all_gather", "broadcast", "barrier"]


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_leaves_is_an_error_for_the_others(name: str, run: Run) -> None:
    told = run(3, partial(without_rank_1, name=name, how="leaves"))
    assert told[1] is None
    for rank in (0, 2):
        text, _ = told[rank]
        if run is ALL["gloo"]:  # it knows that a connection is gone, and not whose it was
            assert f"rank {rank}: " in text
        else:
            assert name in text
            assert "rank 1 on " in text
            assert "left" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_is_killed_is_named_within_a_second(name: str, processes: Run) -> None:
    told = processes(3, partial(without_rank_1, name=name, how="killed"))
    assert told[1] is GONE
    for text, waited_s in (told[0], told[2]):
        assert name in text
        assert "rank 1 on " in text
        assert waited_s < 1.5


@pytest.mark.parametrize("how", ["stopped", "late"])
@pytest.mark.parametrize("name", ["all_reduce"])
def test_a_rank_that_does_not_come_is_named_at_the_deadline(
    name: str, how: str, processes: Run
) -> None:
    told = processes(3, partial(without_rank_1, name=name, how=how), timeout_s=1.0)
    for text, waited_s in (told[0], told[2]):
        assert name in text
        assert "rank 1 (on " in text
        assert "rank 0 (on " not in text, "it was there"
        assert "number 2" in text
        assert "after 1 s" in text
        assert 0.7 < waited_s < 2.5


def late_in_threads(group: Group) -> str | None:
    if group.rank == 1:
        time.sleep(1.0)
        return None
    with pytest.raises(TransportError) as caught:
        group.barrier()
    return str(caught.value)


def test_a_thread_that_does_not_come_is_named() -> None:
    told = in_threads(3, late_in_threads, timeout_s=0.5)
    assert "barrier, number 1: after 0.5 s rank 1 (on this process) had not come" in told[0]


def in_another_order(group: Group) -> str:
    names = list(collectives(group))
    with pytest.raises(TransportError) as caught:
        collectives(group)[names[group.rank]]()
    return str(caught.value)


def test_ranks_that_disagree_on_what_comes_next_are_told(ours: Run) -> None:
    for told in ours(2, in_another_order):
        assert "number 1 differs between ranks: rank 0 (" in told
        assert "is at all_reduce of sum over shards float32 (1000,); rank 1" in told
        assert "is at all_gather of float32 1000 each" in told


def aborted_while_waiting(group: Communicator) -> tuple[str, float]:
    """What rank 2 and others are told when rank 0 aborts; and how long after."""
    group.barrier()
    if group.rank == 0:
        time.sleep(0.5)
        at = time.monotonic()
        group.abort("the test says so")
        with pytest.raises(TransportError) as caught:
            group.barrier()
        return str(caught.value), time.monotonic() - at
    work = group.barrier(sync=False)  # in the communicator's thread
    began = time.monotonic()
    with pytest.raises(TransportError) as caught:
        work.wait()
    return str(caught.value), time.monotonic() - began - 0.5


def test_an_abort_releases_all_that_wait(ours: Run) -> None:
    for rank, (text, after_s) in enumerate(ours(3, aborted_while_waiting)):
        assert rank == 0 or "barrier, number 2: " in text
        assert "the group was aborted: the test says so" in text
        assert after_s < 0.5  # 0.1 s, on a machine that has other work


def own_abort(group: Communicator) -> float:
    """How long after an abort by another thread of this process a waiting one is released."""
    group.barrier()
    if group.rank == 1:
        time.sleep(1.0)
        return 0.0
    at = []

    def abort() -> None:
        at.append(time.monotonic())
        group.abort("enough")

    threading.Timer(0.3, abort).start()
    with pytest.raises(TransportError, match="aborted: enough"):
        group.barrier()
    return time.monotonic() - at[0]


def test_an_abort_from_another_thread_releases_this_one(ours: Run) -> None:
    assert ours(2, own_abort)[0] < 0.5


def again_without_rank_1(group: Communicator, folder: str) -> float | str | None:
    """Rank 1 dies in the middle; the others form the next generation's group and go on."""
    tensor = torch.full((300_000,), float(group.rank))

    def on() -> None:
        """Some of the first may still end well, as far as what rank 1 sent has come."""
        works = [group.all_reduce(tensor.clone()) for _ in range(4)]
        works[0].wait()
        if group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        group.all_reduce(tensor, sync=True)

    with pytest.raises(TransportError):
        on()
    tensor.fill_(float(group.rank))
    group.close()
    store = dist.FileStore(f"{folder}/next", 2)  # type: ignore[attr-defined]
    survivor = {0: 0, 2: 1}[group.rank]
    near = group.through == "memory"
    following = connect(store, survivor, 2, timeout_s=10.0, share_memory=near)
    following.all_reduce(tensor, sync=True)
    following.close()
    return tensor[0].item()


def test_survivors_form_the_next_group_in_the_same_processes(processes: Run, tmp_path: Any) -> None:
    results = processes(3, partial(again_without_rank_1, folder=str(tmp_path)))
    assert results[0] == results[2] == 2.0


def leftovers(group: Communicator) -> list[str]:
    group.allocate(1 << 20)
    group.barrier()
    with open("/proc/self/maps") as file:
        return [line.split(maxsplit=5)[5] for line in file if "/dev/shm/" in line]


def test_segments_have_no_names() -> None:
    for mapped in in_processes(3, leftovers):
        assert len(mapped) == 2 * 3
        assert all(name.strip().endswith("(deleted)") for name in mapped)


def raises(group: Group) -> None:
    group.barrier()  # gloo: one that ends at once breaks the others' joining
    raise ValueError(f"rank {group.rank}")


def test_a_failing_rank_fails_the_test(run: Run) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 0 raised:.*ValueError: rank 0") as caught:
        run(2, raises)
    assert "Traceback" in str(caught.value)
