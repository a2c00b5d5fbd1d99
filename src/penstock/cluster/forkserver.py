"""A process that has imported what workers need, and forks them.

Started as `python -m penstock.cluster.forkserver FD MODULE...`; FD is its end of a socket to the
driver. It imports the modules, runs one thread and no tensor operation, and forks each worker from
its main thread (a parent that has run a parallel region would hang its children). Workers cannot
outlive it (parent-death signal), and it ends with them when the driver's end of the socket closes.

Requests and replies are JSON lines. A start carries file descriptors: a file with the worker's
environment, folder and target ("module:function") as JSON, the payload (a file with what the
worker runs), and the worker's output.

    driver -> server   {"start": rank}
                       {"kill": pid}
    server -> driver   {"started": rank, "pid": pid}
                       {"exited": rank, "pid": pid, "status": status as of os.waitpid}
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1
MAX_REQUEST_BYTES = 4096


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when the parent's forking thread ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def kill_group(pid: int) -> None:
    """Kills a worker and what it has started."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        except PermissionError:
            continue


class ForkServer:
    """The server's loop: requests from the driver, ends of workers."""

    def __init__(self, driver: socket.socket) -> None:
        self._driver = driver
        self._ranks: dict[int, int] = {}  # by pid
        self._pidfds: dict[int, int] = {}  # by pid
        self._selector = selectors.DefaultSelector()
        self._selector.register(driver, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Returns when the driver is gone; all workers are dead then."""
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    self._reap(key.data)
                elif not self._answer():
                    self._end()
                    return

    def _answer(self) -> bool:
        try:
            request, fds, _, _ = socket.recv_fds(self._driver, MAX_REQUEST_BYTES, 4)
        except OSError:
            return False
        if not request:
            return False
        values = json.loads(request)
        if "start" in values:
            self._start(values["start"], fds)
        elif values["kill"] in self._ranks:
            kill_group(values["kill"])
        return True

    def _start(self, rank: int, fds: list[int]) -> None:
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._selector.close()
            self._driver.close()
            for pidfd in self._pidfds.values():
                os.close(pidfd)
            run_worker(server, *fds)
        for fd in fds:
            os.close(fd)
        self._ranks[pid] = rank
        self._pidfds[pid] = os.pidfd_open(pid)
        self._selector.register(self._pidfds[pid], selectors.EVENT_READ, pid)
        self._reply({"started": rank, "pid": pid})

    def _reap(self, pid: int) -> None:
        kill_group(pid)  # what the worker may have left in its group, while the number is its own
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(self._pidfds[pid])
        os.close(self._pidfds.pop(pid))
        self._reply({"exited": self._ranks.pop(pid), "pid": pid, "status": status})

    def _reply(self, values: dict[str, Any]) -> None:
        try:
            self._driver.sendall(json.dumps(values).encode() + b"\n")
        except OSError:
            self._end()
            os._exit(0)

    def _end(self) -> None:
        for pid in self._ranks:
            kill_group(pid)
        for pid in self._ranks:
            os.waitpid(pid, 0)


def run_worker(server: int, start: int, payload: int, output: int) -> None:
    """The forked child: becomes a worker, runs the target, never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(server)
        for fd in (1, 2):
            os.dup2(output, fd)
        os.close(output)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with open(start) as file:
            request: dict[str, Any] = json.load(file)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        gc.enable()
        module, _, name = request["target"].partition(":")
        code = getattr(importlib.import_module(module), name)(payload)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(arguments: list[str]) -> None:
    """Imports the modules, then serves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    driver = socket.socket(fileno=int(arguments[0]))
    gc.disable()  # imports are a quarter faster
    for module in arguments[1:]:
        importlib.import_module(module)
    gc.freeze()  # what is imported stays shared between the workers
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise RuntimeError(f"the fork server runs {threads} threads; it must be alone to fork")
    ForkServer(driver).serve()


if __name__ == "__main__":
    main(sys.argv[1:])
