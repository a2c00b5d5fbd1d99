"""A function on every rank of a group: in threads of this process, or in processes of their own."""

from __future__ import annotations

import os
import pickle
import select
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from penstock.cluster.launcher import WorkerExited, WorkerOutput
from penstock.cluster.local import LocalWorkers
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.exchange.group import Group
from penstock.exchange.loopback import loopback
from penstock.exchange.torch_group import TorchGroup
from penstock.runtime.payload import Payload, pack
from penstock.runtime.preload import PRELOAD

Function = Callable[[Group], Any]
GONE = object()
"""The result of a rank that ended without one, as one that is killed does."""
END_S = 30.0
"""How long a function may take beside what it waits for a peer."""


def in_threads(world_size: int, function: Function, *, timeout_s: float = 30.0) -> list[Any]:
    """Calls a function with each rank of a loopback group, in a thread of its own.

    Arguments:
        timeout_s: how long a collective may wait for a peer.

    Returns:
        What each rank returned.

    Raises:
        RuntimeError: a rank raised, with its traceback; or did not end.
    """
    results: list[Any] = [GONE] * world_size
    failures: dict[int, str] = {}

    def call(group: Group) -> None:
        try:
            results[group.rank] = function(group)
        except BaseException:  # pytest's own failures among them
            failures[group.rank] = traceback.format_exc()
        finally:
            group.close()

    groups = [Communicator(end, timeout_s=timeout_s) for end in loopback(world_size)]
    threads = [threading.Thread(target=call, args=(t,), daemon=True) for t in groups]
    for thread in threads:
        thread.start()
    give_up = time.monotonic() + timeout_s + END_S
    for thread in threads:
        thread.join(max(0.0, give_up - time.monotonic()))
    _raise_first(failures, [r for r, thread in enumerate(threads) if thread.is_alive()])
    return results


def in_processes(
    world_size: int, function: Function, *, through: str = "memory", timeout_s: float = 30.0
) -> list[Any]:
    """Calls a function with each rank of a group, in a process of its own.

    Arguments:
        function: is pickled, as its results are.
        through: what moves the bytes: "memory" that the ranks share, "tcp", torch's "gloo", or, in
            "hosts", memory between the ranks of each of `as_hosts`, and TCP between the others.
        timeout_s: how long a collective may wait for a peer.

    Returns:
        What each rank returned, or GONE.

    Raises:
        RuntimeError: a rank raised, with its traceback; or did not end.
    """
    results: list[Any] = [GONE] * world_size
    failures: dict[int, str] = {}
    running, printed = set(range(world_size)), bytearray()
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        task = _Task(function, world_size, folder, through, timeout_s)
        launcher = LocalWorkers(PRELOAD, {"GLOO_SOCKET_IFNAME": "lo"})
        try:
            launcher.start(pack({"search_path": sys.path}, task), f"{__name__}:main", world_size)
            give_up = time.monotonic() + timeout_s + END_S
            while running and time.monotonic() < give_up:
                select.select(launcher.filenos(), [], [], 0.2)
                for event in launcher.poll():
                    if isinstance(event, WorkerExited):
                        running.discard(event.rank)
                    elif isinstance(event, WorkerOutput):
                        printed += event.data
        finally:
            launcher.close()
        for rank in range(world_size):
            if (path := task.result_of(rank)).exists():
                failed, value = pickle.loads(path.read_bytes())
                if failed:
                    failures[rank] = value
                else:
                    results[rank] = value
    sys.stderr.write(printed.decode(errors="replace"))
    _raise_first(failures, sorted(running))
    return results


def as_hosts(world_size: int) -> list[list[int]]:
    """Ranks in pairs, as if on hosts: of an odd number, and of two, the first is alone.

    So sums over 4 can be taken host by host, and those over 3 and 5 not: see `Combine.grouped`.
    """
    alone = 1 if world_size % 2 or world_size == 2 else 0
    pairs = [[rank, rank + 1] for rank in range(alone, world_size - 1, 2)]
    return [[rank] for rank in range(world_size)] if world_size == 2 else [[0]] * alone + pairs


@dataclass(frozen=True)
class _Task:
    function: Function
    world_size: int
    folder: str
    through: str
    timeout_s: float

    def result_of(self, rank: int) -> Path:
        return Path(self.folder) / f"result-{rank}"


def main(fd: int) -> int:
    """A rank's process."""
    rank = int(os.environ["PENSTOCK_RANK"])
    packed = Payload(fd)
    sys.path[:] = packed.head["search_path"]
    task: _Task = packed.load()
    try:
        store = dist.FileStore(  # type: ignore[attr-defined]
            f"{task.folder}/rendezvous", task.world_size
        )
        group: Group
        if task.through == "gloo":
            group = TorchGroup("gloo", store, rank, task.world_size, task.timeout_s)
        else:
            near: bool | list[list[int]] = task.through == "memory"
            if task.through == "hosts":
                near = as_hosts(task.world_size)
            group = connect(
                store, rank, task.world_size, timeout_s=task.timeout_s, share_memory=near
            )
        try:
            result = (False, task.function(group))
        finally:
            if isinstance(group, Communicator):  # says goodbye: others may be a step behind
                group.close()
    except BaseException:  # pytest's own failures among them
        result = (True, traceback.format_exc())
    task.result_of(rank).write_bytes(pickle.dumps(result))
    return 0


def _raise_first(failures: dict[int, str], running: list[int]) -> None:
    for rank, text in sorted(failures.items()):
        raise RuntimeError(f"rank {rank} raised:\n{text}")
    if running:
        raise RuntimeError(f"ranks {running} did not end")
