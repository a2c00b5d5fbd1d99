"""Workers as processes of this machine, forked by a fork server."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from penstock.cluster.forkserver import kill_group
from penstock.cluster.launcher import (
    AgentEvent,
    AgentJoined,
    AgentReady,
    Event,
    OfWorker,
    WorkerExited,
    WorkerOutput,
    WorkerStarted,
    how_ended,
)

END_S = 5.0
"""How long killed workers may take to be gone."""

READS = 16
"""How often a worker's output is read in one `poll`, 64 KiB each."""

_idle: dict[tuple[str, ...], LocalServer] = {}
"""The server that waits for the next run, by what it has imported."""
_lock = threading.Lock()


class LocalServer:
    """The driver's end of a fork server. It serves one run at a time."""

    def __init__(self, preload: tuple[str, ...]) -> None:
        self.preload = preload
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
        if self.owner == os.getpid():
            self.end()

    def end(self) -> str:
        """Waits for its end, which the closed socket asks for; tells how it ended, in words."""
        self.socket.close()
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if code >= 0:
            return f"{how_ended(code, None)}: its message is above"
        return how_ended(None, -code)


def warm(preload: Sequence[str]) -> None:
    """Starts a fork server with these modules for the next run, unless one waits already."""
    release(acquire(preload))


def acquire(preload: Sequence[str]) -> LocalServer:
    """A fork server with these modules for one run. Does not wait until it has imported them."""
    key = tuple(preload)
    with _lock:
        server = _idle.pop(key, None)
    if server is None or not server.usable:
        if server is not None:
            server.close()
        server = LocalServer(key)
    return server


def release(server: LocalServer) -> None:
    """Keeps a server for the next run, if it is of use and none waits yet; else ends it."""
    with _lock:
        kept = server.usable and _idle.setdefault(server.preload, server) is server
    if not kept:
        server.close()


@atexit.register
def close_servers() -> None:
    """Ends the fork servers that wait for a run."""
    while _idle:
        _idle.popitem()[1].close()


class LocalWorkers:
    """Worker processes of one run on this machine.

    Arguments:
        preload: modules that the fork server imports once.
        environment: variables for the workers, beside the driver's own.
    """

    def __init__(self, preload: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._server = acquire(preload)
        self._environment = dict(os.environ) | (environment or {})
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server.socket, selectors.EVENT_READ, None)
        self._pids: dict[int, int] = {}
        self._outputs: dict[int, int] = {}  # rank by file descriptor
        self._running: set[int] = set()
        self._doomed: set[int] = set()

    def start(self, payload: Sequence[bytes | memoryview], target: str, workers: int) -> None:
        """Starts ranks 0 to workers - 1, each calling `target` ("module:function") on the payload.

        The function receives the descriptor of a file with the payload's parts, one after the
        other, that it may map but whose offset it shares with others; it returns an exit code.
        """
        file = in_memory(payload)
        try:
            for rank in range(workers):
                self.start_rank(rank, file, target)
        finally:
            os.close(file)

    def start_rank(
        self,
        rank: int,
        payload: int,
        target: str,
        environment: Mapping[str, str] | None = None,
        folder: str | None = None,
    ) -> None:
        """Starts one rank on a payload that lies in a file (its descriptor; `in_memory`).

        Where the fork server has ended, as `poll` told, on a new one.
        """
        if self._server_ended:
            self._server = acquire(self._server.preload)
            self._selector.register(self._server.socket, selectors.EVENT_READ, None)
        read, write = os.pipe2(os.O_CLOEXEC)
        values = {
            "environment": self._environment
            | {"PENSTOCK_RANK": str(rank)}
            | dict(environment or {}),
            "folder": folder or os.getcwd(),
            "target": target,
        }
        request = in_memory([json.dumps(values).encode()])  # too long for a message
        with contextlib.suppress(OSError):  # the server is gone: `poll` tells, and of this worker
            socket.send_fds(
                self._server.socket,
                [json.dumps({"start": rank}).encode()],
                [request, payload, write],
            )
        os.close(request)
        os.close(write)
        os.set_blocking(read, False)
        self._outputs[read] = rank
        self._selector.register(read, selectors.EVENT_READ, rank)
        self._pids.pop(rank, None)  # of an earlier generation
        self._running.add(rank)

    def filenos(self) -> list[int]:
        """What to wait on: readable when `poll` has something to tell."""
        server = [] if self._server_ended else [self._server.socket.fileno()]
        return [*server, *self._outputs]

    def poll(self) -> list[Event]:
        """What has happened since the last call; does not wait."""
        events: list[Event] = []
        for key, _ in self._selector.select(timeout=0):
            if key.data is None:
                events += self._replies()
            else:
                events += self._read(key.fd)
        return events

    def kill(self, rank: int) -> None:
        """Kills a worker at once, and all it has started."""
        if rank in self._running and rank not in self._pids:
            self._doomed.add(rank)  # as soon as it is told of
        elif rank in self._running:
            with contextlib.suppress(OSError):  # the server is gone, and its workers with it
                self._server.socket.send(json.dumps({"kill": self._pids[rank]}).encode())

    def close(self) -> None:
        """Kills all that still run and waits for their end."""
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
        else:
            release(self._server)
        for fd in list(self._outputs):
            self._close_output(fd)
        self._selector.close()

    @property
    def _server_ended(self) -> bool:
        return self._server.socket.fileno() < 0

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
            cause = f"with its fork server, which {self._server.end()}"
            lost = [
                WorkerExited(rank, self._pids.get(rank, 0), None, signal.SIGKILL, cause)
                for rank in sorted(self._running)
            ]
            for event in lost:
                if event.pid:
                    kill_group(event.pid)  # what the worker has started does not die with it
            self._running.clear()
            return [*lost]
        for line in data.splitlines():
            reply = json.loads(line)
            rank, pid = reply.get("started", reply.get("exited")), reply["pid"]
            if "started" in reply:
                self._pids[rank] = pid
                events.append(WorkerStarted(rank, pid, socket.gethostname()))
                if rank in self._doomed:
                    self._doomed.discard(rank)
                    self.kill(rank)
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
        for _ in range(READS):  # one that prints without end must not hold up the others
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                return events
            if not data:
                self._close_output(fd)
                return events
            events.append(WorkerOutput(self._outputs[fd], data))
        return events

    def _close_output(self, fd: int) -> None:
        self._selector.unregister(fd)
        del self._outputs[fd]
        os.close(fd)


class LocalLauncher:
    """This machine as a launcher: the driver plays all agents; number and rank are the same."""

    where = "on this machine"
    keep = False
    """These agents read nothing."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._workers = LocalWorkers(preload)
        self._generations: dict[int, int] = {}
        self._events: list[AgentEvent | OfWorker] = []
        self._payload: tuple[int, int] | None = None  # generation and descriptor

    def gather(self, ranks: int) -> None:
        for rank in range(ranks):
            self._events += [AgentJoined(rank, rank, 0, socket.gethostname()), AgentReady(rank)]

    def start(
        self,
        agent: int,
        generation: int,
        payload: Sequence[bytes | memoryview],
        target: str,
        environment: Mapping[str, str],
    ) -> None:
        if self._payload is None or self._payload[0] != generation:  # one file for all ranks
            self._forget_payload()
            self._payload = generation, in_memory(payload)
        self._generations[agent] = generation
        self._workers.start_rank(agent, self._payload[1], target, environment)

    def end(self, agent: int) -> None:
        self._workers.kill(agent)

    def wait(self, agent: int) -> None:
        raise AssertionError("an agent of this machine has no rival")

    def leave(self, agent: int, reason: str) -> None:
        self._workers.kill(agent)

    def filenos(self) -> list[int]:
        return self._workers.filenos()

    def poll(self) -> list[AgentEvent | OfWorker]:
        events, self._events = self._events, []
        for event in self._workers.poll():
            events.append(OfWorker(event.rank, self._generations[event.rank], event))
        return events

    def preparing(self) -> bool:
        return False

    def missing(self) -> str:
        return ""

    def close(self) -> None:
        self._forget_payload()
        self._workers.close()

    def _forget_payload(self) -> None:
        if self._payload is not None:
            os.close(self._payload[1])
            self._payload = None


def in_memory(parts: Sequence[bytes | memoryview]) -> int:
    """A file in memory with these parts, to be read from its beginning."""
    file = os.memfd_create("penstock")
    with open(os.dup(file), "wb") as stream:
        stream.writelines(parts)
    os.lseek(file, 0, os.SEEK_SET)
    return file
