"""Real processes that stand by as the ranks of one group after another."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

ANSWER_S = 40.0
"""How long a program of one test may take."""
COLLECTIVE_S = 20.0


class Ranks:
    """Starts processes when they are first needed, and again where one was killed."""

    def __init__(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        self._runs = 0

    def run(
        self,
        program: Callable[..., Any],
        *arguments: Any,
        world_size: int = 2,
        backend: str | None = "penstock",
    ) -> list[Any]:
        """What `program(*arguments)` returned on each rank; None where it was killed.

        Arguments:
            program: of a module that the processes can import.
            backend: the default group that stands while it runs; None: the program gets
                store, rank and world size as its first arguments, and makes its own.
        """
        self._runs += 1
        self._start(world_size)
        for rank in range(world_size):
            place = (self._store.port, f"run{self._runs}", rank, world_size)
            self._ends[rank].send((program, arguments, backend, place))
        answers = []
        for rank in range(world_size):
            if not self._ends[rank].poll(ANSWER_S):
                self.close()
                raise TimeoutError(f"rank {rank} of {program.__name__}: no answer")
            try:
                answers.append(self._ends[rank].recv())
            except EOFError:
                self._processes[rank].join(ANSWER_S)
                answers.append(("killed", None))
        failed = [f"rank {r}:\n{a[1]}" for r, a in enumerate(answers) if a[0] == "failed"]
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return [answer for _, answer in answers]

    def exit_code(self, rank: int) -> int | None:
        """None while it lives."""
        return self._processes[rank].exitcode

    @property
    def pids(self) -> set[int]:
        """Of the processes and of multiprocessing's own that watches over their resources."""
        from multiprocessing import resource_tracker

        tracker = resource_tracker._resource_tracker._pid
        return {p.pid for p in self._processes} | ({tracker} if tracker else set())

    def close(self) -> None:
        """Ends all processes, whatever they are at; another run would start others."""
        for process in self._processes:
            process.kill()
            process.join(10)

    def _start(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(world_size):
            if rank < len(self._processes) and self._processes[rank].is_alive():
                continue
            mine, its = context.Pipe()
            process = context.Process(target=_stand_by, args=(its,), daemon=True)
            process.start()
            its.close()
            if rank < len(self._processes):
                self._processes[rank], self._ends[rank] = process, mine
            else:
                self._processes.append(process)
                self._ends.append(mine)


def _stand_by(end: Connection) -> None:
    import penstock.exchange.process_group  # noqa: F401  registers the backend

    torch.set_num_threads(1)
    while True:
        try:
            program, arguments, backend, (port, prefix, rank, world_size) = end.recv()
        except EOFError:
            return
        # A rank that hangs shows where, before the test gives it up.
        faulthandler.dump_traceback_later(ANSWER_S - 5)
        try:
            client = dist.TCPStore("127.0.0.1", port, is_master=False)
            store = dist.PrefixStore(prefix, client)
            if backend is None:
                end.send(("done", program(store, rank, world_size, *arguments)))
                continue
            join(store, rank, world_size, backend)
            try:
                answer = program(*arguments)
            finally:
                dist.destroy_process_group()
            end.send(("done", answer))
        except BaseException:
            end.send(("failed", traceback.format_exc()))
        finally:
            faulthandler.cancel_dump_traceback_later()


def join(
    store: dist.Store, rank: int, world_size: int, backend: str, timeout_s: float = COLLECTIVE_S
) -> None:
    """Makes the default group."""
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
