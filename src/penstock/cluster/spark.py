"""Spark as a launcher: an agent for each rank, as a task of a non-barrier `mapInArrow`.

The frame that the agents take in has one row for each rank, so that every one of them is called,
and the packed batches of the DataFrames that the job reads, each sent to the rank that trains on
it. Packing runs where a partition lies, as any Spark job; then the agents take all slots they need
and keep them until the run is over.

Spark starts a task that it lost once more, but none that ever ended well. A double of an agent ends
well when it makes room (after an executor was lost, Spark runs the others' tasks a second time as
well), and so does an agent that was told to leave. Where such a rank loses its agent, all agents
leave and come anew, as another job.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from penstock.cluster.agent import Orders
from penstock.cluster.bootstrap import by_value, with_code
from penstock.cluster.channel import Message
from penstock.cluster.coordinator import Coordinator, Peer
from penstock.cluster.environment import Code
from penstock.cluster.launcher import (
    AgentEvent,
    AgentFailed,
    AgentHeard,
    AgentJoined,
    AgentLost,
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
PACKED = "agent int, source int, partition int, batch int, rows bigint, body binary"


@dataclass(frozen=True)
class Input:
    """A DataFrame whose rows the agents take in.

    Arguments:
        frame: the DataFrame.
        pack: "module:function" that a map task calls with the folder of the code, `arguments`, and
            the partition's batches; it gives batches of the columns of `PACKED`.
    """

    frame: Any
    pack: str
    arguments: tuple[Any, ...]


class SparkLauncher:
    """The agents of one run on a Spark cluster.

    Arguments:
        session: a SparkSession, classic or Connect.
        token: of the run.
        facts: what is known of the session.
        code: is shipped to the nodes.
        inputs: what the agents take in.
        sink: "module:class" into which they put it.
        preload: modules for the workers' fork servers.
        description: for Spark's UI.
    """

    def __init__(
        self,
        session: Any,
        token: str,
        facts: Facts,
        code: Code,
        inputs: Sequence[Input],
        sink: str,
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
            os.getcwd(),
        )
        self._jobs: list[_Job] = []  # the last one is the present one
        self._told_ended = False
        self._woken, self._wake = socket.socketpair()
        self._ranks: dict[int, int] = {}  # by agent that is there
        self._excused: set[int] = set()  # ranks of which a task may end well before the run does
        self._gone: set[int] = set()  # told to leave: nothing more is told of them

    def gather(self, ranks: int) -> None:
        self._num_ranks = ranks
        rows = self._rows(ranks)
        unpack = by_value("penstock.cluster.environment", "unpack_code")
        orders = replace(self._orders, job=len(self._jobs))
        agent = with_code(
            self._code.data,
            self._code.digest,
            unpack,
            "penstock.cluster.agent:run",
            asdict(orders),  # as plain values: what needs Penstock comes after its code
        )
        frame = rows.mapInArrow(agent, "rank int")
        job = _Job(self._session, self._facts.classic, frame, self._description, self._wake)
        self._jobs.append(job)

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
        self._excuse(agent)
        self._coordinator.send(agent, {"do": "wait"})

    def leave(self, agent: int, reason: str) -> None:
        self._excuse(agent)
        self._forget(agent)
        self._coordinator.send(agent, {"do": "leave", "reason": reason})

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
                self._ranks[peer.number] = int(message["rank"])
            elif message is None:
                self._forget(peer.number)
            events += _events(peer, message)
        if self._excused - set(self._ranks.values()):
            events += self._gather_again()
        if not self._told_ended and self._jobs and self._jobs[-1].ended:
            self._told_ended = True
            events.append(ClusterFailed(_cause(self._jobs[-1].error)))
        return events

    def preparing(self) -> bool:
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
        self._coordinator.send_all("agent", {"do": "leave", "reason": "the run is over"})
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

    def _gather_again(self) -> list[AgentEvent]:
        """All agents anew, as another job: to Spark, a rank that has none is done."""
        left: list[AgentEvent] = []
        for agent in list(self._ranks):
            self._forget(agent)
            self._coordinator.drop(agent)  # it ends by this
            left.append(AgentLost(agent, "Spark starts all agents anew"))
        self._excused.clear()
        self._jobs[-1].cancel()
        self.gather(self._num_ranks)
        return left

    def _left(self, within_s: float) -> bool:
        give_up = time.monotonic() + within_s
        while (running := [job.thread for job in self._jobs if job.thread.is_alive()]) and (
            time.monotonic() < give_up
        ):
            for peer, message in self._coordinator.poll():
                if message is peer.hello:  # Spark starts doubles even now
                    self._coordinator.send(peer.number, {"do": "leave"})
            running[0].join(0.02)
        return not running

    def _rows(self, ranks: int) -> Any:
        # Of two partitions at least: a union of frames of one partition each is one partition.
        seeds = self._session.range(0, ranks, 1, max(2, ranks)).selectExpr(
            "cast(id as int) as agent",
            "-1 as source",
            "0 as partition",
            "0 as batch",
            "0L as rows",
            "cast(null as binary) as body",
        )
        if not self._inputs:
            return seeds.repartitionById(ranks, "agent") if ranks == 1 else seeds
        unpack = by_value("penstock.cluster.environment", "unpack_code")
        packed = [
            each.frame.mapInArrow(
                with_code(self._code.data, self._code.digest, unpack, each.pack, *each.arguments),
                PACKED,
            )
            for each in self._inputs
        ]
        everything = functools.reduce(lambda a, b: a.unionAll(b), [*packed, seeds])
        return everything.repartitionById(ranks, "agent")


class _Job:
    """A Spark job, begun in a thread of its own.

    Arguments:
        frame: what it computes; nothing of it is kept.
        wake: is written to when it has ended.

    Attributes:
        tag: by which Spark knows it.
        ended, error: whether it has, and what it raised.
    """

    def __init__(
        self, session: Any, classic: bool, frame: Any, description: str, wake: socket.socket
    ) -> None:
        self.tag = f"penstock-{secrets.token_hex(4)}"
        self.ended = False
        self.error: BaseException | None = None
        self._session, self._classic, self._wake = session, classic, wake
        self.thread = threading.Thread(
            target=self._collect, args=(frame, description), name="penstock-spark", daemon=True
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

    def _collect(self, frame: Any, description: str) -> None:
        try:
            if self._classic:
                context = self._session.sparkContext
                context.setJobGroup(self.tag, description, interruptOnCancel=True)
            else:
                self._session.addTag(self.tag)
            frame.collect()
        except BaseException as raised:
            self.error = raised
        self.ended = True
        try:
            self._wake.send(b".")
        except OSError:  # nobody waits any more
            return


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
        case "ready":
            return [AgentReady(agent, message["report"])]
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


def _cause(error: BaseException | None) -> str:
    """Why the job has ended, in one line where Spark gives a page."""
    if error is None:
        return "Spark's job ended before the run did"
    if isinstance(error, AttributeError):  # pyspark stumbles over a context that has been stopped
        error = error.__context__ or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Of what a Python worker raised the last line says it; of a Java exception the first does.
    lines = [line.removeprefix(": ") for line in lines]  # py4j's
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    said = (raised[-1:] or lines[:1] or [type(error).__name__])[0]
    return f"Spark's job ended: {said[:500]}"
