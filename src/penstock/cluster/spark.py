"""Spark as a launcher: an agent for each rank, as a task of a non-barrier `mapInArrow`.

The agents take in the DataFrames that the job reads, each the partitions that Spark gives it:

    agents = union of the sources' columns .coalesce(ranks) .mapInArrow(agent)

Every row says of which source and partition it is: `spark_partition_id()`, taken below the
`coalesce`, numbers a source's own partitions. Columns of the same type in several sources are one
column of the union, so that nothing is null where sources are alike. The first source, which is
trained on, comes whole; the others are made one partition before, so that the `coalesce`, which
deals blocks out where it sees no places, deals out the first source evenly. An agent is ready when
Spark gives it the first rows: its worker waits for more by itself. What agents read and others
need, they share as `Directory` says.

The agents take all slots they need and keep them until the run is over. Spark starts a task that it
lost once more, but none that ever ended well. A double of an agent ends well when it makes room
(after an executor was lost, Spark runs the others' tasks a second time as well), and so does an
agent that was told to leave. Where such a rank loses its agent, all agents leave and come anew, as
another job. A double that makes room takes seconds to end, its fork server's imports: nothing is
told of it, or it would be given the rank that it is about to leave.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from penstock.cluster.agent import Orders
from penstock.cluster.bootstrap import by_value, with_code
from penstock.cluster.channel import Message
from penstock.cluster.coordinator import Coordinator, Peer
from penstock.cluster.directory import Directory, Told
from penstock.cluster.environment import Code
from penstock.cluster.launcher import (
    AgentEvent,
    AgentFailed,
    AgentHeard,
    AgentJoined,
    AgentLost,
    AgentRead,
    AgentReady,
    ClusterFailed,
    Event,
    OfWorker,
    WorkerExited,
    WorkerOutput,
    WorkerStarted,
)
from penstock.cluster.session import Facts, facts_of
from penstock.errors import Fault

END_S = 5.0
"""How long agents may take to leave before Spark is asked to kill them, and then to be gone."""
STEADY_S = 3.0
"""How long an agent reads, or less if that is all, until it is taken for ready after a loss: with
an executor go the shuffle's files there, and Spark finds that out when the next task asks for them,
which then has failed as well."""
READ_S = 1.0
"""How long agents may take to leave while Spark still computes rows for them."""
BATCH_BYTES = "spark.sql.execution.arrow.maxBytesPerBatch"
INT_MAX = 2**31 - 1
BATCH = str(4 << 20)
"""Of Arrow from Spark to an agent: else up to 10,000 rows, 1.5 GB where a row has 150 KB.
[measured: 4 KB rows 530 MB/s at 4 MiB, 420 at 16, 290 at 64; MNIST rows 370, 350, 230; Xeon,
2026-11]"""


@dataclass(frozen=True)
class Input:
    """A DataFrame whose rows the agents take in.

    Arguments:
        name: of the source.
        frame: gives the DataFrame, whose columns are those that are wanted. It may take its time
            where all that it has may be kept; then it is called in a thread, when it is not.
        partitions: the numbers of its partitions.
        kept: rows and checksum of those of which an earlier run may have left spools; of all that
            have rows, or none.
    """

    name: str
    frame: Callable[[], Any]
    partitions: tuple[int, ...]
    kept: Mapping[int, tuple[int, str]] = field(default_factory=dict)


class SparkLauncher:
    """The agents of one run on a Spark cluster.

    Arguments:
        session: a SparkSession, classic or Connect.
        token: of the run.
        facts: what is known of the session.
        code: is shipped to the nodes.
        run: its directory.
        inputs: what the agents take in.
        sink, arrivals: where they put it; see `Orders`.
        owners: the rank that carries each shard.
        preload: modules for the workers' fork servers.
        description: for Spark's UI.

    Attributes:
        keep: whether what agents have read is to outlive them, for a run that goes on from there.
    """

    def __init__(
        self,
        session: Any,
        token: str,
        facts: Facts,
        code: Code,
        run: str,
        inputs: Sequence[Input],
        sink: str,
        arrivals: bytes,
        owners: Sequence[int],
        preload: Sequence[str],
        description: str,
    ) -> None:
        self.where = facts.where
        self._session, self._facts, self._code = session, facts, code
        self._inputs, self._description = inputs, description
        self._coordinator = Coordinator(token, host=facts.host)
        self._orders = Orders(
            self._coordinator.address,
            token,
            tuple(preload),
            sink,
            arrivals,
            (),
            tuple(owners),
            os.getcwd(),
            run,
            tuple(
                (source, partition, *each)
                for source, given in enumerate(inputs)
                for partition, each in given.kept.items()
            ),
        )
        self.keep = True
        self._directory = Directory(
            owners,
            {each.name: each.partitions for each in inputs},
            [kept[:2] for kept in self._orders.kept],
        )
        self._batches = _Batches(session)
        self._jobs: list[_Job] = []  # the last one is the present one
        self._told_ended = False
        self._woken, self._wake = socket.socketpair()
        self._ranks: dict[int, int] = {}  # by agent that is there
        self._ready: set[int] = set()
        self._steady_s: dict[int, float] = {}  # when an agent that reads is taken for ready
        self._lost = False  # any agent
        self._excused: set[int] = set()  # ranks of which a task may end well before the run does
        self._gone: set[int] = set()  # told to leave: nothing more is told of them

    def gather(self, ranks: int) -> None:
        self._num_ranks = ranks
        frame = self._frame(0)
        self._begin(lambda: frame)

    def _begin(self, make: Callable[[], Any]) -> None:
        self._batches.limit()
        facts, description = self._facts, self._description
        self._jobs.append(_Job(self._session, facts.classic, make, description, self._wake))

    def _frame(self, job: int) -> Any:
        """The agents of a job, as a DataFrame."""
        columns, rows = self._rows(self._num_ranks)
        unpack = by_value("penstock.cluster.environment", "unpack_code")
        orders = replace(self._orders, columns=columns, job=job)
        agent = with_code(
            self._code.data,
            self._code.digest,
            unpack,
            "penstock.cluster.agent:run",
            asdict(orders),  # as plain values: what needs Penstock comes after its code
        )
        return rows.mapInArrow(agent, "rank int")

    def start(
        self,
        agent: int,
        generation: int,
        payload: Sequence[bytes | memoryview],
        target: str,
        environment: Mapping[str, str],
    ) -> None:
        values = {"generation": generation, "target": target, "environment": dict(environment)}
        self._coordinator.send(agent, {"do": "start", **values}, payload)

    def end(self, agent: int) -> None:
        self._coordinator.send(agent, {"do": "end"})

    def wait(self, agent: int) -> None:
        """It does so untold: it has no worker, and ends when it is told to."""

    def leave(self, agent: int, reason: str) -> None:
        self._excuse(agent)
        self._forget(agent)
        self._coordinator.send(agent, {"do": "leave", "keep": None, "reason": reason})

    def filenos(self) -> list[int]:
        return [self._coordinator.fileno(), self._woken.fileno()]

    def poll(self) -> list[AgentEvent | OfWorker]:
        events: list[AgentEvent | OfWorker] = []
        for peer, message in self._coordinator.poll():
            if peer.hello.get("job") != len(self._jobs) - 1:
                self._forget(peer.number)
                self._coordinator.drop(peer.number)
            if peer.number in self._gone:
                continue
            if message is peer.hello:
                rank = int(message["rank"])
                held = rank in self._ranks.values()
                self._ranks[peer.number] = rank
                if held and message["first"]:
                    # Spark runs the stage again for the sake of another rank, which may need this
                    # very slot.
                    self.leave(peer.number, f"rank {rank} is held")
                    continue
                self._say(self._directory.joined(peer.number, rank))
            elif message is None:
                self._lost = True
                self._forget(peer.number)
            else:
                self._say(self._directory.heard(peer.number, message))
                self._hear_of_readiness(peer.number, message["event"])
            events += _events(peer, message)
        if self._directory.lacks or self._excused - set(self._ranks.values()):
            events += self._gather_again()
        now = time.monotonic() if self._directory.looked else 0.0
        for agent in [agent for agent, at_s in self._steady_s.items() if at_s <= now]:
            del self._steady_s[agent]
            self._ready.add(agent)
            events.append(AgentReady(agent))
        while self._directory.conflicts:
            agent, error = self._directory.conflicts.pop()
            events.append(AgentFailed(agent, type(error).__name__, error.message, error.hint))
        if not self._told_ended and self._jobs and self._jobs[-1].ended:
            self._told_ended = True
            events.append(ClusterFailed(self._jobs[-1].cause))
        return events

    def preparing(self) -> bool:
        if set(self._ranks) - self._ready:  # it has no rows yet; its heartbeat tells of itself
            return True
        if not self._inputs or not self._facts.classic:
            return False
        try:
            tracker = self._session.sparkContext.statusTracker()
            jobs = map(tracker.getJobInfo, tracker.getJobIdsForGroup(self._jobs[-1].tag))
            stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
        except Exception:  # the session is gone: the job's end tells it
            return False
        return bool(sum(stage.numActiveTasks for stage in stages if stage) > len(self._ranks))

    def missing(self) -> str:
        return facts_of(self._session, 0).missing()  # executors may have gone since the beginning

    def close(self) -> None:
        leave = {"do": "leave", "keep": self.keep, "reason": "the run is over"}
        self._coordinator.send_all("agent", leave)
        self._batches.restore()
        if not self._left(END_S):
            for job in self._jobs:
                job.cancel()
            self._left(END_S)
        self._coordinator.close()  # an agent that is still there ends by this
        for end in (self._woken, self._wake):
            end.close()
        if left := [job.tag for job in self._jobs if job.thread.is_alive()]:
            raise Fault(
                f"Spark did not end the job {left[0]} within {2 * END_S:.0f} s",
                hint="its tasks hold slots until Spark's UI or the session's stop ends them",
            )

    def _excuse(self, agent: int) -> None:
        if agent in self._ranks:
            self._excused.add(self._ranks[agent])

    def _forget(self, agent: int) -> None:
        self._gone.add(agent)
        self._ranks.pop(agent, None)
        self._steady_s.pop(agent, None)
        self._say(self._directory.gone(agent))

    def _hear_of_readiness(self, agent: int, event: str) -> None:
        now = time.monotonic()
        if event == "ready":
            self._steady_s[agent] = now + (STEADY_S if self._lost else 0.0)
        elif event == "read" and agent in self._steady_s:
            self._steady_s[agent] = now

    def _say(self, told: Told) -> None:
        for agent, message in told:
            self._coordinator.send(agent, message)

    def _gather_again(self) -> list[AgentEvent]:
        """All agents anew, as another job that reads everything.

        To Spark, a rank that has none is done; and where something is lacking that was kept,
        nobody was given it to read.
        """
        left: list[AgentEvent] = []
        for agent in list(self._ranks):
            self._forget(agent)
            self._coordinator.send(agent, {"do": "leave", "keep": None})
            left.append(AgentLost(agent, "Spark starts all agents anew"))
        self._excused.clear()
        self._directory.again()
        self._orders = replace(self._orders, kept=())
        self._jobs[-1].cancel()
        self._begin(functools.partial(self._frame, len(self._jobs)))
        return left

    def _left(self, within_s: float) -> bool:
        """Whether the jobs end in time, or cannot since Spark still computes rows for agents."""
        give_up = time.monotonic() + within_s
        while (running := [job.thread for job in self._jobs if job.thread.is_alive()]) and (
            time.monotonic() < give_up
        ):
            for peer, message in self._coordinator.poll():
                if message is peer.hello:  # Spark starts doubles even now
                    self._coordinator.send(peer.number, {"do": "leave", "keep": self.keep})
                elif message is None:
                    self._ranks.pop(peer.number, None)
            if not self._ranks and not self._directory.all_read:
                give_up = min(give_up, time.monotonic() + READ_S)
            running[0].join(0.02)
        return not running

    def _rows(self, ranks: int) -> tuple[tuple[tuple[str, ...], ...], Any]:
        """What the agents are given to read, and by source what its columns are called there."""
        kept = {source for source, *_ in self._orders.kept}
        given = {s: each.frame() for s, each in enumerate(self._inputs) if s not in kept}
        called = dict(zip(given, _columns(list(given.values())), strict=True))
        columns = tuple(called.get(source, ()) for source in range(len(self._inputs)))
        if not given:
            seeds = self._session.range(0, ranks, 1, ranks)
            return columns, seeds.selectExpr("-1 as source", "cast(id as int) as partition")
        frames = []
        for source, frame in given.items():
            names = zip(frame.columns, columns[source], strict=True)
            renamed = (f"`{name.replace('`', '``')}` as {column}" for name, column in names)
            numbers = f"{source} as source", "spark_partition_id() as partition"
            frames.append(frame.selectExpr(*numbers, *renamed))
        if len(frames) > 1:
            frames[1:] = [functools.reduce(_union, frames[1:]).coalesce(1)]
        return columns, functools.reduce(_union, frames).coalesce(ranks)


def _union(one: Any, other: Any) -> Any:
    return one.unionByName(other, allowMissingColumns=True)


def _columns(frames: Sequence[Any]) -> list[tuple[str, ...]]:
    """What the columns of each frame are called in the union: one name for columns of one type,
    of which a frame has each once.
    """
    types: list[str] = []
    columns = []
    for frame in frames:
        taken: list[int] = []
        for column in frame.schema:
            kind = column.dataType.simpleString()
            fits = (n for n, known in enumerate(types) if known == kind and n not in taken)
            number = next(fits, len(types))
            types[number:] = types[number:] or [kind]
            taken.append(number)
        columns.append(tuple(f"c{number}" for number in taken))
    return columns


class _Batches:
    """The session's limit for Arrow's batches while a run goes on, unless the user has set one."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._ours = False

    def limit(self) -> None:
        try:
            conf = self._session.conf
            if not self._ours and int(conf.get(BATCH_BYTES, str(INT_MAX))) == INT_MAX:
                conf.set(BATCH_BYTES, BATCH)
                self._ours = True
        except Exception:  # the session is gone: the job tells
            return

    def restore(self) -> None:
        if self._ours:
            with contextlib.suppress(Exception):  # gone
                self._session.conf.unset(BATCH_BYTES)


class _Job:
    """A Spark job, begun in a thread of its own.

    Arguments:
        make: gives what it computes; nothing of it is kept. Jobs that this needs are of this one.
        wake: is written to when it has ended.

    Attributes:
        tag: by which Spark knows it.
        ended, cause: whether it has, and why where it should not have.
    """

    def __init__(
        self,
        session: Any,
        classic: bool,
        make: Callable[[], Any],
        description: str,
        wake: socket.socket,
    ) -> None:
        self.tag = f"penstock-{secrets.token_hex(4)}"
        self.ended = False
        self.cause = "Spark's job ended before the run did"
        self._session, self._classic, self._wake = session, classic, wake
        self.thread = threading.Thread(
            target=self._collect, args=(make, description), name="penstock-spark", daemon=True
        )
        self.thread.start()

    def cancel(self) -> None:
        """Has Spark end it, and kill its tasks."""
        try:
            if self._classic:
                self._session.sparkContext.cancelJobGroup(self.tag)
            else:
                self._session.interruptTag(self.tag)
        except Exception:  # the session is gone, and its tasks with it
            return

    def _collect(self, make: Callable[[], Any], description: str) -> None:
        try:
            if self._classic:
                context = self._session.sparkContext
                context.setJobGroup(self.tag, description, interruptOnCancel=True)
            else:
                self._session.addTag(self.tag)
            make().collect()
        except BaseException as raised:
            self.cause = f"Spark's {'session' if self._is_gone() else 'job'} ended: {_said(raised)}"
        self.ended = True
        try:
            self._wake.send(b".")
        except OSError:  # nobody waits any more
            return

    def _is_gone(self) -> bool:
        """Whether the session is, whichever part of Spark was the first to stumble over that."""
        try:
            if self._classic:
                java = self._session.sparkContext._jsc
                return java is None or bool(java.sc().isStopped())
            return bool(self._session.is_stopped)
        except Exception:  # the JVM is
            return True


def _events(peer: Peer, message: Message | None) -> list[AgentEvent | OfWorker]:
    agent = peer.number
    if message is None:
        return [AgentLost(agent, f"its agent on {peer.hello['host']} is gone")]
    if message is peer.hello:
        rank, attempt = int(message["rank"]), int(message["attempt"])
        return [AgentJoined(agent, rank, attempt, message["host"], message["facts"])]
    match message["event"]:
        case "heard":
            return [AgentHeard(agent)]
        case "read":
            bad = tuple((each["source"], each["count"], each["line"]) for each in message["bad"])
            return [AgentRead(agent, bad)]
        case "failed":
            return [AgentFailed(agent, message["kind"], message["message"], message["hint"])]
        case "worker":
            return [OfWorker(agent, int(message["generation"]), _of_worker(message))]
    return []


def _of_worker(message: Message) -> Event:
    rank = int(message["rank"])
    match message["what"]:
        case "started":
            return WorkerStarted(rank, int(message["pid"]), message["host"])
        case "output":
            return WorkerOutput(rank, message["data"].encode("latin-1"))
    return WorkerExited(
        rank, int(message["pid"]), message["code"], message["signal"], message["cause"]
    )


def _said(error: BaseException) -> str:
    """What a job raised, in one line where Spark gives a page."""
    if isinstance(error, AttributeError):  # pyspark stumbles over a context that has been stopped
        error = error.__context__ or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of what a Python worker raised the last line says it; of a Java exception the first does.
    lines = [line.removeprefix(": ") for line in lines]  # py4j's
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (raised[-1:] or lines[:1] or [type(error).__name__])[0][:500]
