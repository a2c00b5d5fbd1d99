"""Workers as processes of this machine, forked by a fork server."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from penstock.cluster.launcher import Event, WorkerExited, WorkerOutput, WorkerStarted
from penstock.errors import Fault

END_S = 5.0
"""How long killed workers may take to be gone."""

_servers: dict[tuple[str, ...], LocalServer] = {}


class LocalServer:
    """The driver's end of a fork server; one is kept for the driver's life."""

    def __init__(self, preload: Sequence[str]) -> None:
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # numpy's OpenBLAS would start threads at import, and a fork would lose them.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "penstock.cluster.forkserver", str(theirs.fileno()), *preload],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is the driver's alone
        )
        theirs.close()

    @property
    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def close(self) -> None:
        """Ends the server and every worker of it."""
        if self.owner != os.getpid():
            return
        self.socket.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def warm(preload: Sequence[str]) -> LocalServer:
    """The fork server with these modules; started now if there is none. Does not wait for it."""
    key = tuple(preload)
    server = _servers.get(key)
    if server is None or not server.usable:
        server = _servers[key] = LocalServer(preload)
    return server


@atexit.register
def close_servers() -> None:
    """Ends all fork servers of this process."""
    while _servers:
        _servers.popitem()[1].close()


class LocalLauncher:
    """The workers of one run on this machine.

    Arguments:
        preload: modules that the fork server imports once.
        environment: variables for the workers, beside the driver's own.
    """

    def __init__(self, preload: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._server = warm(preload)
        self._environment = dict(os.environ) | (environment or {})
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server.socket, selectors.EVENT_READ, None)
        self._pids: dict[int, int] = {}
        self._outputs: dict[int, int] = {}  # rank by file descriptor
        self._running: set[int] = set()

    def start(self, payload: Sequence[bytes | memoryview], target: str, workers: int) -> None:
        file = os.memfd_create("penstock-job")
        try:
            with open(os.dup(file), "wb") as stream:
                stream.writelines(payload)
            for rank in range(workers):
                self._start(rank, file, target)
        finally:
            os.close(file)

    def _start(self, rank: int, payload: int, target: str) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        request = {
            "start": rank,
            "environment": self._environment | {"PENSTOCK_RANK": str(rank)},
            "folder": os.getcwd(),
            "target": target,
        }
        try:
            socket.send_fds(self._server.socket, [json.dumps(request).encode()], [payload, write])
        except OSError as error:
            raise Fault(
                f"the fork server of this machine is gone: {error}",
                hint="its message is above; a second try starts a new one",
            ) from error
        finally:
            os.close(write)
        os.set_blocking(read, False)
        self._outputs[read] = rank
        self._selector.register(read, selectors.EVENT_READ, rank)
        self._running.add(rank)

    def filenos(self) -> list[int]:
        return [self._server.socket.fileno(), *self._outputs]

    def poll(self) -> list[Event]:
        events: list[Event] = []
        for key, _ in self._selector.select(timeout=0):
            if key.data is None:
                events += self._replies()
            else:
                events += self._read(key.fd)
        return events

    def kill(self, rank: int) -> None:
        if rank in self._running and rank in self._pids:
            self._server.socket.send(json.dumps({"kill": self._pids[rank]}).encode())

    def close(self) -> None:
        deadline = time.monotonic() + END_S
        asked: set[int] = set()
        while self._running and self._server.usable and time.monotonic() < deadline:
            for rank in self._running & set(self._pids) - asked:
                self.kill(rank)
                asked.add(rank)
            self._selector.select(timeout=0.1)
            self.poll()
        if self._running:
            self._server.close()  # workers cannot outlive it
        for fd in list(self._outputs):
            self._close_output(fd)
        self._selector.close()

    def _replies(self) -> list[Event]:
        events: list[Event] = []
        try:
            data = self._server.socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:  # the server is gone, and so are its workers
            self._selector.unregister(self._server.socket)
            lost = [WorkerExited(r, self._pids.get(r, 0), None, 9) for r in sorted(self._running)]
            self._running.clear()
            return [*lost]
        for line in data.splitlines():
            reply = json.loads(line)
            rank, pid = reply.get("started", reply.get("exited")), reply["pid"]
            if "started" in reply:
                self._pids[rank] = pid
                events.append(WorkerStarted(rank, pid, socket.gethostname()))
            elif self._pids.get(rank) == pid:  # not one of an earlier run
                self._running.discard(rank)
                events += self._drain(rank)
                status = reply["status"]
                killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
                code = None if killed else os.WEXITSTATUS(status)
                events.append(WorkerExited(rank, pid, code, killed))
        return events

    def _drain(self, rank: int) -> list[Event]:
        return [e for fd, of in list(self._outputs.items()) if of == rank for e in self._read(fd)]

    def _read(self, fd: int) -> list[Event]:
        if fd not in self._outputs:
            return []
        events: list[Event] = []
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return events
            if not data:
                self._close_output(fd)
                return events
            events.append(WorkerOutput(self._outputs[fd], data))

    def _close_output(self, fd: int) -> None:
        self._selector.unregister(fd)
        del self._outputs[fd]
        os.close(fd)
