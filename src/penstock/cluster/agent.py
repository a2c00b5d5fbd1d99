"""An agent on Spark: a task that holds a rank, in Spark's own Python worker process.

It joins the driver, starts the rank's worker in a process of its own when told so, passes on what
that prints and how it ends, and leaves when told so. Meanwhile a thread takes in the partitions
that Spark gives it, and others exchange what is taken in with other agents (`ferry`), as the driver
says who is to have what (`directory`). It dies with its worker and the worker with it: the worker's
fork server ends when this process's socket closes; the agent ends when the driver's connection
does, or when Spark kills it. No tensor library is imported here.

    agent -> driver    hello: role, rank, attempt, first, host, job, facts
                       {"event": "heard"}                        every second, from a thread
                       {"event": "serving" | "kept" | "reading" | "sum" | "read", ...}: see
                                                                 `directory`
                       {"event": "ready"}                        the first rows are there, or none
                                                                 will be: its worker may start
                       {"event": "failed", "kind", "message", "hint"}
                       {"event": "worker", "generation", "what": started | output | exited, ...}
    driver -> agent    {"do": "start", "generation", "target", "environment", "folder"} and payload
                       {"do": "take" | "drop" | "empty", ...}: see `directory`
                       {"do": "end"}
                       {"do": "leave", "keep"}                   true: what it has read is to
                                                                 outlive it; false: nothing of the
                                                                 run is; null: nothing of its own
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib
import os
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from penstock.cluster.channel import Channel, Message
from penstock.cluster.ferry import Copy, Giver, Taker
from penstock.cluster.forkserver import PR_SET_PDEATHSIG
from penstock.cluster.launcher import WorkerExited, WorkerOutput, WorkerStarted
from penstock.cluster.local import LocalWorkers, close_servers, in_memory
from penstock.cluster.node import facts
from penstock.errors import DataError, PenstockError, TransportError

HEARD_EVERY_S = 1.0
LEAVE_S = 10.0
"""How long an agent that leaves waits for the next rows, which Spark may be computing still."""
SPOOL = "PENSTOCK_SPOOL"
"""The environment variable that names the spool to a worker."""
PREFIX = "penstock-agent-"
SWEEP_S = 60.0
"""How old a folder must be to be taken for left behind."""


class Sink(Protocol):
    """What an agent puts its partitions into, and shares them from; see `Orders.sink`."""

    nonce: str

    def resume(self, place: str, run: str, wanted: Sequence[tuple[int, int, int, str]]) -> None:
        """Takes what is kept in this place of a run before in the same directory; see `Orders`."""
        ...

    def leave(self, keep: bool) -> None:
        """Keeps there what was read to its end, or removes what is kept of the run."""
        ...

    def write(self, batch: Any) -> None:
        """Takes an Arrow batch."""
        ...

    def close(self) -> dict[str, Any]:
        """All have come; returns what the driver is to know of them, as JSON values."""
        ...

    def fail(self, error: PenstockError) -> None:
        """No more come, for this reason."""
        ...

    def abandon(self) -> None:
        """No more come, and nobody asks for them."""
        ...

    def touch(self) -> None:
        """Lets the worker see that this agent is at work."""
        ...

    def find(self, source: int, partition: int, number: int) -> tuple[str, Path] | None:
        """See `ferry.Find`."""
        ...

    def is_here(self, folder: str, nonce: str) -> bool:
        """Whether another agent's folder, with this nonce, is on this host."""
        ...

    def link(self, source: int, partition: int, folder: str) -> None:
        """The worker is to have what another agent of this host, or this one, reads."""
        ...

    def copying(self, source: int, partition: int) -> bool:
        """Whether a copy was begun, or is whole."""
        ...

    def copy(self, source: int, partition: int) -> Copy | None:
        """The copy of what one elsewhere reads; None if it is whole."""
        ...

    def drop(self, source: int, partition: int) -> None:
        """Who read it is gone."""
        ...

    def empty(self, source: int, partitions: Sequence[int]) -> None:
        """They have no rows."""
        ...


@dataclass(frozen=True)
class Orders:
    """What an agent is sent with.

    Arguments:
        address, token: of the driver.
        preload: modules for the worker's fork server.
        sink: "module:class", called with the agent's folder, `arrivals`, `columns`, and a function
            by which it tells the driver.
        arrivals: what the sink is to know of the sources, pickled.
        columns: by source, what its columns are called in the batches.
        owners: the rank that carries each shard.
        folder: the driver's working folder; the worker's as well, where there is such a one.
        run: the run's directory.
        kept: source, partition, rows and checksum of what an earlier run in this directory has
            read, and nobody is given to read as long as it is kept.
        job: which of the run's jobs this is; Spark may start a task of an ended one even now.
    """

    address: tuple[str, int]
    token: str
    preload: tuple[str, ...]
    sink: str
    arrivals: bytes
    columns: tuple[tuple[str, ...], ...]
    owners: tuple[int, ...]
    folder: str
    run: str
    kept: tuple[tuple[int, int, int, str], ...] = ()
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
        "first": context.attemptNumber() == 0,  # of its stage's attempt
        "host": socket.gethostname(),
        "job": orders.job,
        "facts": facts() | {"gpus": addresses, "cpus": context.cpus()},
    }
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{code}:{before}" if before else code  # for the fork server too
    environment = {}
    if addresses:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(addresses)
    agent = None
    try:
        with (
            contextlib.closing(Channel(orders.address, orders.token, hello)) as channel,
            _folder() as folder,
        ):
            spool = {SPOOL: str(folder / "spool")}
            workers = LocalWorkers(orders.preload, environment | spool)
            agent = _Agent(channel, workers, rank, orders, str(folder))
            try:
                with agent.heard(), agent.reading(batches):
                    agent.serve()  # a driver that is gone fails the task: Spark tries it anew
            finally:
                workers.close()
                close_servers()
        if agent is not None:
            agent.wait_for_spark()
    finally:
        os.environ["PYTHONPATH"] = before or ""
        _die_with_daemon(False)
    yield from ()


class _Told(Exception):
    """The driver has been told why nothing more is read."""


class _Agent:
    def __init__(
        self,
        channel: Channel,
        workers: LocalWorkers,
        rank: int,
        orders: Orders,
        folder: str,
    ) -> None:
        self._channel, self._workers, self._rank = channel, workers, rank
        self._orders, self._folder = orders, folder
        self._generation = 0
        self._over = threading.Event()
        self._errors: list[BaseException] = []  # that have ended a thread
        self._broken = os.eventfd(0)  # readable when there are any
        self._takers: dict[tuple[str, int], Taker] = {}
        self._keep: bool | None = True  # the driver may be killed, and then say nothing
        self._sink: Sink | None = None
        self._reader: threading.Thread | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Meanwhile the driver hears of this agent every second."""

        def beat() -> None:
            while not self._over.wait(HEARD_EVERY_S):
                try:
                    self._channel.send({"event": "heard"})
                    if self._sink is not None:
                        self._sink.touch()
                except OSError:
                    self._over.set()

        thread = threading.Thread(target=beat, name="penstock-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(2 * HEARD_EVERY_S)

    @contextlib.contextmanager
    def reading(self, batches: Iterator[Any]) -> Iterator[None]:
        """Meanwhile a thread takes in what Spark gives, and others may have it."""
        try:
            module, _, name = self._orders.sink.partition(":")
            make: Callable[..., Sink] = getattr(importlib.import_module(module), name)
            sink = make(self._folder, self._orders.arrivals, self._orders.columns, self._tell_of)
        except (PenstockError, OSError, ImportError) as error:
            self._fail(error)
            yield
            return
        self._sink = sink
        giver = Giver(self._orders.token, self._channel.local_address, sink.find, self._break)
        where = {"address": giver.address, "folder": self._folder, "nonce": sink.nonce}
        self._send({"event": "serving", **where})
        sink.resume(str(_lasting(_local_disk())), self._orders.run, self._orders.kept)
        self._send({"event": "kept"})
        self._reader = threading.Thread(
            target=self._read, args=(batches, sink), name="penstock-reader", daemon=True
        )
        self._reader.start()
        try:
            yield
        finally:
            self._over.set()
            if self._keep is not None:
                sink.leave(self._keep)
            for taker in self._takers.values():
                taker.close()
            giver.close()
            self._reader.join(HEARD_EVERY_S)

    def serve(self) -> None:
        """Does as told until told to leave."""
        while not self._over.is_set():
            waited_for = [self._channel.fileno(), self._broken, *self._workers.filenos()]
            ready, _, _ = select.select(waited_for, [], [], 0.5)
            if self._broken in ready:
                self._channel.close()  # the driver knows at once; Spark may have begun another
                raise self._errors[0]
            if self._told_to_leave():
                return
            self._tell_of_worker()
        raise TransportError("the driver cannot be told that this agent is alive")

    def wait_for_spark(self) -> None:
        """Returns when the thread that reads has seen that nothing more is to be read.

        Raises:
            TransportError: Spark gives nothing for so long. Only the end of this process ends that.
        """
        if self._reader is not None:
            self._reader.join(LEAVE_S)
            if self._reader.is_alive():
                raise TransportError(
                    f"rank {self._rank} is to leave, and Spark has computed no more rows for "
                    f"{LEAVE_S:g} s"
                )
        os.close(self._broken)

    def _read(self, batches: Iterator[Any], sink: Sink) -> None:
        ready = {"event": "ready", "report": None}
        try:
            for batch in batches:  # what is raised here is Spark's, and fails the task
                if self._over.is_set():
                    sink.abandon()
                    return
                if ready:
                    self._send(ready)
                    ready = {}
                with self._failing(sink):
                    sink.write(batch)
            if ready:
                self._send(ready)
            with self._failing(sink):
                self._send({"event": "read", **sink.close()})
        except _Told:
            return
        except BaseException as error:
            sink.abandon()
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """A thread has ended by an error, and this task with it, unless it would come again."""
        if isinstance(error, DataError):
            self._fail(error)
        else:
            self._errors.append(error)
            os.eventfd_write(self._broken, 1)

    @contextlib.contextmanager
    def _failing(self, sink: Sink) -> Iterator[None]:
        """What would come again at another attempt is told, and ends the run."""
        try:
            yield
        except TransportError:
            raise
        except (PenstockError, OSError, ImportError) as error:
            if not self._over.is_set():  # else its folder is gone
                sink.fail(error if isinstance(error, PenstockError) else DataError(str(error)))
                self._fail(error)
            raise _Told from error

    def _fail(self, error: Exception) -> None:
        self._send(
            {
                "event": "failed",
                "kind": type(error).__name__,
                "message": error.message if isinstance(error, PenstockError) else str(error),
                "hint": error.hint if isinstance(error, PenstockError) else "",
            }
        )

    def _tell_of(self, message: Message) -> None:
        """Tells the driver of a partition; if it is this rank's own, its worker has it at once."""
        if message["event"] == "reading":
            key = message["source"], message["partition"]
            owners = self._orders.owners
            if self._sink is not None and owners[key[1] % len(owners)] == self._rank:
                self._sink.link(*key, self._folder)
        self._send(message)

    def _told_to_leave(self) -> bool:
        return any(list(map(self._leaves_after, self._channel.receive())))  # all of them heard

    def _leaves_after(self, message: Message) -> bool:
        match message["do"]:
            case "start":
                self._start(message)
            case "end":
                self._workers.kill(self._rank)
            case "take" | "drop" | "empty" if self._sink is not None:
                self._share(self._sink, message)
            case "leave":
                self._keep = message["keep"]
                return True
        return False

    def _share(self, sink: Sink, message: Message) -> None:
        """Has the worker have what others read, or no longer."""
        source = message["source"]
        if message["do"] == "empty":
            sink.empty(source, message["partitions"])
            return
        key = source, message["partition"]
        for taker in self._takers.values():
            taker.drop(*key)
        if message["do"] == "drop":
            sink.drop(*key)
        elif sink.is_here(message["folder"], message["nonce"]) and not sink.copying(*key):
            sink.link(*key, message["folder"])
        else:
            address = (str(message["address"][0]), int(message["address"][1]))
            if address not in self._takers:
                hello = {"role": "agent", "rank": self._rank}
                self._takers[address] = Taker(
                    address, self._orders.token, hello, sink.copy, self._break
                )
            self._takers[address].take(*key)

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

    def _tell_of_worker(self) -> None:
        for event in self._workers.poll():
            values = asdict(event)
            if isinstance(event, WorkerOutput):
                values["data"] = event.data.decode("latin-1")
            what = {WorkerStarted: "started", WorkerOutput: "output", WorkerExited: "exited"}
            head = {"event": "worker", "generation": self._generation, "what": what[type(event)]}
            self._send(head | values)

    def _send(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise TransportError(f"the driver is gone: {error}") from error


def _local_disk() -> Path:
    places = os.environ.get("SPARK_LOCAL_DIRS") or os.environ.get("LOCAL_DIRS") or ""
    return Path(places.split(",")[0] or tempfile.gettempdir())


def _lasting(place: Path) -> Path:
    """The folder above those that Spark, or YARN, makes for an application and removes with it."""
    made = r"(spark|executor|blockmgr)-[-0-9a-f]{36}|appcache|application_\d+_\d+"
    while re.fullmatch(made, place.name):
        place = place.parent
    return place


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A new folder on the executor's local disk, locked while this process lives.

    Folders whose process was killed are removed.
    """
    place = _local_disk()
    for left in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), open(left / "lock", "rb") as lock:
            if time.time() - os.fstat(lock.fileno()).st_mtime > SWEEP_S:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        with open(folder / "lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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
