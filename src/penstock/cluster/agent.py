"""An agent on Spark: a task that holds a rank, in Spark's own Python worker process.

It joins the driver, spools its partition, starts the rank's worker in a process of its own when
told so, passes on what it prints and how it ends, and leaves when told so. It dies with its worker
and the worker with it: the worker's fork server ends when this process's socket closes; the agent
ends when the driver's connection does, or when Spark kills it. No tensor library is imported here.

    agent -> driver    hello: role, rank, attempt, host, job, facts
                       {"event": "heard"}                        every second, from a thread
                       {"event": "ready", "report": what the sink gave}
                       {"event": "failed", "kind", "message", "hint"}
                       {"event": "worker", "generation", "what": started | output | exited, ...}
    driver -> agent    {"do": "start", "generation", "target", "environment", "folder"} and payload
                       {"do": "end"}  {"do": "wait"}  {"do": "leave"}
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from penstock.cluster.channel import Channel, Message
from penstock.cluster.forkserver import PR_SET_PDEATHSIG
from penstock.cluster.launcher import WorkerExited, WorkerOutput, WorkerStarted
from penstock.cluster.local import LocalWorkers, close_servers, in_memory
from penstock.cluster.node import facts
from penstock.errors import PenstockError, TransportError

HEARD_EVERY_S = 1.0
LEAVE_S = 10.0
"""How long an agent that has failed waits to be told to leave."""
SPOOL = "PENSTOCK_SPOOL"
"""The environment variable that names the spool to a worker."""
PREFIX = "penstock-agent-"
SWEEP_S = 60.0
"""How old a folder must be to be taken for left behind."""


class Sink(Protocol):
    """What an agent puts its partition's batches into."""

    def write(self, batch: Any) -> None:
        """Takes an Arrow batch."""
        ...

    def close(self) -> Any:
        """All have come; returns the report, as JSON values."""
        ...


@dataclass(frozen=True)
class Orders:
    """What an agent is sent with.

    Arguments:
        address, token: of the driver.
        preload: modules for the worker's fork server.
        sink: "module:class", called with the spool's folder.
        folder: the driver's working folder; the worker's as well, where there is such a one.
        job: which of the run's jobs this is; Spark may start a task of an ended one even now.
    """

    address: tuple[str, int]
    token: str
    preload: tuple[str, ...]
    sink: str
    folder: str
    job: int = 0


def run(code: str, ordered: dict[str, Any], batches: Iterator[Any]) -> Iterator[Any]:
    """The task: takes its partition's batches, gives none.

    Arguments:
        code: the folder in which the shipped code lies.
        ordered: the values of `Orders`.
    """
    from pyspark import TaskContext

    orders = Orders(**ordered)
    context = TaskContext.get()
    assert context is not None
    _die_with_daemon(True)
    addresses = [a for r in context.resources().values() if r.name == "gpu" for a in r.addresses]
    rank = context.partitionId()
    hello = {
        "role": "agent",
        "rank": rank,
        "attempt": context.taskAttemptId(),
        "host": socket.gethostname(),
        "job": orders.job,
        "facts": facts() | {"gpus": addresses, "cpus": context.cpus()},
    }
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{code}:{before}" if before else code  # for the fork server too
    environment = {}
    if addresses:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(addresses)
    with _folder() as folder:
        workers = LocalWorkers(orders.preload, environment | {SPOOL: str(folder / "spool")})
        try:
            with contextlib.closing(Channel(orders.address, orders.token, hello)) as channel:
                agent = _Agent(channel, workers, rank, orders, context.attemptNumber() == 0)
                with agent.heard():  # a driver that is gone fails the task: Spark tries it anew
                    if agent.spool(batches, folder / "spool"):
                        agent.serve()
        finally:
            workers.close()
            close_servers()
            os.environ["PYTHONPATH"] = before or ""
            _die_with_daemon(False)
    yield from ()


class _Agent:
    def __init__(
        self, channel: Channel, workers: LocalWorkers, rank: int, orders: Orders, first: bool
    ) -> None:
        self._channel, self._workers, self._rank = channel, workers, rank
        self._orders, self._first = orders, first
        self._generation = 0
        self._over = threading.Event()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Meanwhile the driver hears of this agent every second."""

        def beat() -> None:
            while not self._over.wait(HEARD_EVERY_S):
                try:
                    self._channel.send({"event": "heard"})
                except OSError:
                    self._over.set()

        thread = threading.Thread(target=beat, name="penstock-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(2 * HEARD_EVERY_S)

    def spool(self, batches: Iterator[Any], folder: Path) -> bool:
        """Takes the partition in; whether that went well."""
        try:
            module, _, name = self._orders.sink.partition(":")
            sink: Sink = getattr(importlib.import_module(module), name)(str(folder))
            for batch in batches:
                sink.write(batch)
                if self._told_to_leave():
                    return False
            self._channel.send({"event": "ready", "report": sink.close()})
        except TransportError:
            raise
        except (PenstockError, OSError, ImportError) as error:  # it would come again
            self._channel.send(
                {
                    "event": "failed",
                    "kind": type(error).__name__,
                    "message": error.message if isinstance(error, PenstockError) else str(error),
                    "hint": error.hint if isinstance(error, PenstockError) else "",
                }
            )
            give_up = time.monotonic() + LEAVE_S
            while time.monotonic() < give_up and not self._told_to_leave():
                select.select([self._channel], [], [], 0.2)
            return False
        return True

    def serve(self) -> None:
        """Does as told until told to leave."""
        while not self._over.is_set():
            select.select([self._channel.fileno(), *self._workers.filenos()], [], [], 0.5)
            if self._told_to_leave():
                return
            self._tell()
        raise TransportError("the driver cannot be told that this agent is alive")

    def _told_to_leave(self) -> bool:
        return any(list(map(self._leaves_after, self._channel.receive())))  # all of them heard

    def _leaves_after(self, message: Message) -> bool:
        match message["do"]:
            case "start":
                self._start(message)
            case "end":
                self._workers.kill(self._rank)
            case "wait":
                # A first attempt at a rank that is held: Spark runs the stage again for the sake
                # of another rank, which may need this very slot.
                return self._first
            case "leave":
                return True
        return False

    def _start(self, message: Message) -> None:
        self._generation = int(message["generation"])
        folder = self._orders.folder
        payload = in_memory([message["body"]])
        try:
            self._workers.start_rank(
                self._rank,
                payload,
                message["target"],
                message["environment"],
                folder if os.path.isdir(folder) else None,
            )
        finally:
            os.close(payload)

    def _tell(self) -> None:
        for event in self._workers.poll():
            values = asdict(event)
            if isinstance(event, WorkerOutput):
                values["data"] = event.data.decode("latin-1")
            what = {WorkerStarted: "started", WorkerOutput: "output", WorkerExited: "exited"}
            head = {"event": "worker", "generation": self._generation, "what": what[type(event)]}
            try:
                self._channel.send(head | values)
            except OSError as error:
                raise TransportError(f"the driver is gone: {error}") from error


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A new folder on the executor's local disk, locked while this process lives.

    Folders whose process was killed are removed.
    """
    places = os.environ.get("SPARK_LOCAL_DIRS") or os.environ.get("LOCAL_DIRS") or ""
    place = Path(places.split(",")[0] or tempfile.gettempdir())
    for left in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), open(left / "lock", "rb") as lock:
            if time.time() - os.fstat(lock.fileno()).st_mtime > SWEEP_S:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        with open(folder / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "spool").mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _die_with_daemon(yes: bool) -> None:
    """Has the kernel kill this process with the Spark daemon that forked it, or no longer."""
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    if b"daemon" not in parent:  # started by a Java thread, which may end before its process
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if yes else 0, 0, 0, 0)


if sys.platform != "linux":
    raise ImportError("agents run on Linux")
