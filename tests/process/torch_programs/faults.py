"""What goes wrong between ranks, and what each is told."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch_programs.ranks import join

from penstock.exchange.process_group import monitored_barrier


def told(call: Callable[[], object]) -> tuple[str, float]:
    """The error's type and text, and after how many seconds it came."""
    since = time.monotonic()
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - since
    return "nothing", time.monotonic() - since


def missing(store: dist.Store, rank: int, world_size: int) -> tuple[str, float]:
    """Only rank 0 comes to the second barrier."""
    join(store, rank, world_size, "penstock")
    monitored_barrier(timeout=datetime.timedelta(seconds=10))
    answer = ("did not come", 0.0)
    if rank == 0:
        answer = told(lambda: monitored_barrier(timeout=datetime.timedelta(seconds=0.5)))
        store.set("told", "")
    store.wait(["told"], datetime.timedelta(seconds=10))
    dist.destroy_process_group()
    return answer


def aborted(store: dist.Store, rank: int, world_size: int) -> dict[str, tuple[str, float]]:
    """Rank 0 aborts while all others wait, one way or another; then all meet anew."""
    join(dist.PrefixStore("before", store), rank, world_size, "penstock")
    dist.barrier()
    group, answers = dist.group.WORLD, {}
    assert group is not None
    if rank == 0:
        threading.Timer(0.5, lambda: group.abort("rank 0 has had enough")).start()
        answers["recv"] = told(lambda: dist.recv(torch.zeros(1), 1))
    elif rank == 1:
        answers["sync"] = told(lambda: dist.all_reduce(torch.zeros(1)))
    else:
        work = dist.all_reduce(torch.zeros(1), async_op=True)
        future = work.get_future()
        answers["future"] = told(future.wait)
        answers["work"] = told(work.wait)
        assert work.is_completed()
        assert not work.is_success()
        assert "enough" in str(work.exception())
    answers["afterwards"] = told(lambda: dist.all_reduce(torch.zeros(1)))
    dist.destroy_process_group()
    join(dist.PrefixStore("after", store), rank, world_size, "penstock")
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == world_size
    dist.destroy_process_group()
    return answers


def refused() -> dict[str, tuple[str, float]]:
    """What cannot be, told before it harms anything; the group goes on."""
    x = torch.zeros(3)
    answers = {
        "device": told(lambda: dist.all_reduce(torch.zeros(3, device="meta"))),
        "sparse": told(lambda: dist.all_reduce(torch.eye(3).to_sparse())),
        "parts": told(lambda: dist.reduce_scatter_tensor(torch.zeros(1), x)),
        "splits": told(lambda: dist.all_to_all_single(torch.zeros(3), x, [1, 1], [1, 2])),
        "avg": told(lambda: dist.all_reduce(torch.zeros(3, dtype=torch.int32), dist.ReduceOp.AVG)),
    }
    dist.all_reduce(x)
    return answers
