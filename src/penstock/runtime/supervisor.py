"""Carries out a run: listens to agents and workers, lets the membership decide, does what it says.

The supervisor holds what is not pure: connections, processes, logs, the display. Who is in the run,
when a generation begins, and what ends the run is decided by `membership`.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from penstock import errors
from penstock.cluster import launcher as told
from penstock.cluster.coordinator import Coordinator, Peer
from penstock.cluster.launcher import Launcher, OfWorker
from penstock.errors import (
    Interrupted,
    PenstockError,
    RunError,
    TrainingError,
    UserError,
    WorkerFailed,
    WorkerLost,
)
from penstock.plan import Plan
from penstock.runtime import membership as group
from penstock.runtime.checkpoint import latest
from penstock.runtime.decisions import NETWORK
from penstock.runtime.logs import Logs
from penstock.runtime.membership import Membership, Verdict
from penstock.runtime.preload import TARGET
from penstock.runtime.rendezvous import Keys
from penstock.runtime.store import Store
from penstock.watch.progress import Display

GRACE_S = 1.0
"""How long to wait for the cause after a worker lost its peers."""
LOOK_S = 0.2
PREPARED_S = 1.0
"""How often the launcher is asked whether it still prepares."""

Payload = Sequence[bytes | memoryview]


@dataclass
class Supervisor:
    """One run.

    Arguments:
        launcher: of its agents.
        coordinator: to which its workers connect.
        membership: who is in it.
        admit: looks at the facts of an agent's node; an error of its ends the run.
        prepare: given the facts of each rank's node, what the workers of the next generation run,
            and variables for their environment.
    """

    launcher: Launcher
    coordinator: Coordinator
    membership: Membership
    admit: Callable[[int, dict[str, Any]], None]
    prepare: Callable[[dict[int, dict[str, Any]]], tuple[Payload, dict[str, str]]]
    store: Store
    workers: int
    shown: Display
    began: float
    error: PenstockError | None = None
    stopped: str | None = None
    evaluation: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    checkpointed: int | None = None
    first_step_s: float | None = None

    def __post_init__(self) -> None:
        self._logs = Logs(self.store)
        self._verdict: Verdict | None = None
        self._ranks: dict[int, int] = {}  # by agent
        self._facts: dict[int, dict[str, Any]] = {}  # by agent
        self._agents: dict[int, int] = {}  # by rank: that of the generation
        self._hosts: dict[int, str] = {}  # by agent
        self._keys = Keys()
        self._cause: PenstockError | None = None  # of the first loss in a generation
        self._step = 0  # that a generation is known to have done
        self._finished: set[int] = set()  # ranks
        self._ending: set[int] = set()  # agents whose worker was told to end
        self._consequences: dict[int, dict[str, Any]] = {}  # by rank: it lost its peers
        self._held: dict[int, float] = {}  # by rank: until when its cause may come
        self._left_out: dict[str, dict[str, int]] = {}  # by source, by who has told of it
        self._interrupts, self._asked = 0, False
        self._asked_at = 0.0

    def run(self) -> None:
        """Returns when the run is over; `error` says whether that is a failure."""
        with self._interrupts_counted():
            self.launcher.gather(self.workers)
            while self._verdict is None and self.error is None:
                self._wait()
                with self._writing():
                    for event in self.launcher.poll():
                        self._of_launcher(event)
                    self._hear_workers()
                self._judge()
        if self.error is None and self._verdict is not None:
            self.error = self._of_verdict(self._verdict)

    def leave_out(self, source: str, count: int, line: str, who: str = "the driver") -> None:
        """Some records of a source were bad, and are left out.

        Arguments:
            who: has found them: a rank that begins anew finds them again.
        """
        if count:
            if who not in self._left_out.setdefault(source, {}):
                self.shown.line(f"{source}  {line}")
            self._left_out[source][who] = count

    def close(self) -> None:
        """Takes what workers have printed last, ends the display, writes the logs."""
        with self._writing():
            for event in self.launcher.poll():
                if isinstance(event, OfWorker) and isinstance(event.event, told.WorkerOutput):
                    self._of_process(event)
        self.shown.close()
        with self._writing():
            self._logs.close()

    def write_result(self, resumed_from: int | None) -> None:
        """Writes result.json."""
        status = "failed" if self.error else "stopped" if self.stopped else "finished"
        if isinstance(self.error, Interrupted):
            status = "interrupted"
        result = {
            "status": status,
            "stopped": self.stopped,
            "error": None if self.error is None else str(self.error),
            "workers": self.workers,
            "resumed_from": resumed_from,
            "restarts": self.membership.restarts,
            "checkpoint": self.checkpointed,
            "seconds": round(time.perf_counter() - self.began, 3),
            "seconds_to_first_step": self.first_step_s,
            "evaluation": self.evaluation,
            **{k: self.progress.get(k) for k in ("step", "epoch", "examples", "loss")},
            "bad_records": {name: sum(of.values()) for name, of in self._left_out.items()},
            "bounded_by": self.progress.get("bounded_by"),
        }
        with self._writing():
            self.store.write("result.json", json.dumps(result, indent=1).encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written ends the run, unless something else has ended it before."""
        try:
            yield
        except RunError as error:
            self.error = self.error or error

    def _wait(self) -> None:
        until_s = self.membership.deadline_s
        wait_s = LOOK_S if until_s is None else min(LOOK_S, max(0.0, until_s - time.monotonic()))
        select.select([self.coordinator.fileno(), *self.launcher.filenos()], [], [], wait_s)

    # Events, to the membership

    def _handle(self, event: group.Event) -> None:
        instructions = self.membership.handle(event, time.monotonic())
        starts = [i for i in instructions if isinstance(i, group.StartWorker)]
        for instruction in instructions:
            match instruction:
                case group.EndWorker(agent=agent):
                    self._ending.add(agent)
                    self.launcher.end(agent)
                case group.Wait(agent=agent):
                    self.launcher.wait(agent)
                case group.Leave(agent=agent, reason=reason):
                    self.launcher.leave(agent, reason)
                case group.GiveUp(verdict=verdict):
                    self._verdict = verdict
        if starts:
            self._start(starts)

    def _start(self, starts: list[group.StartWorker]) -> None:
        generation = starts[0].generation
        self._agents = {start.rank: start.agent for start in starts}
        if generation > 1:
            self._say_restart()
        for forgotten in (self._finished, self._ending, self._consequences, self._held):
            forgotten.clear()
        self._keys, self._cause = Keys(), None
        try:
            payload, environment = self.prepare(
                {rank: self._facts[agent] for rank, agent in self._agents.items()}
            )
        except PenstockError as error:
            self.error = error
            return
        environment = environment | {"PENSTOCK_GENERATION": str(generation)}
        for start in starts:
            self.launcher.start(start.agent, generation, payload, TARGET, environment)

    def _of_launcher(self, event: told.AgentEvent | OfWorker) -> None:
        match event:
            case OfWorker():
                self._of_process(event)
            case told.AgentJoined():
                self._ranks[event.agent] = event.rank
                self._facts[event.agent] = event.facts | {"host": event.host}
                self._hosts[event.agent] = event.host
                try:
                    self.admit(event.rank, event.facts)
                except PenstockError as error:
                    self.error = self.error or error
                    return
                self._handle(group.AgentJoined(event.agent, event.rank, event.attempt, event.host))
            case told.AgentReady():
                self._handle(group.AgentReady(event.agent))
            case told.AgentRead():
                who = f"the agent of rank {self._ranks.get(event.agent)}"
                for source, count, line in event.bad:
                    self.leave_out(source, count, line, who)
            case told.AgentHeard():
                self._handle(group.AgentHeard(event.agent))
            case told.AgentLost():
                rank = self._ranks.get(event.agent)
                if rank is not None and self._agents.get(rank) == event.agent:
                    self._cause = self._cause or self._lost_agent(rank, event.cause)
                self._handle(group.AgentLost(event.agent, event.cause))
            case told.AgentFailed():
                self._cause = self._of_agent(event)  # a loss may only follow from it
                self._handle(group.AgentFailed(event.agent, event.kind, event.message))
            case told.ClusterFailed() if self._verdict is None:
                before = f"; before it, {_first_line(self._cause)}" if self._cause else ""
                self._cause = WorkerLost(
                    f"{event.cause}{self._at()}{before}\n{self._table()}",
                    hint=self._how_to_resume(),
                )
                self._handle(group.ClusterFailed(event.cause))

    def _of_agent(self, event: told.AgentFailed) -> PenstockError:
        rank, kind = self._ranks[event.agent], getattr(errors, event.kind, None)
        if kind is None:
            host = self._hosts[event.agent]
            return WorkerFailed(
                f"the agent of rank {rank} on {host} raised {event.kind}: {event.message}"
            )
        error: PenstockError = kind(f"rank {rank}: {event.message}", hint=event.hint)
        return error

    def _of_process(self, told_of: OfWorker) -> None:
        event, agent, generation = told_of.event, told_of.agent, told_of.generation
        if isinstance(event, told.WorkerOutput):
            for line in self._logs.write(event.rank, event.data):
                self.shown.output(event.rank, line)
        elif isinstance(event, told.WorkerStarted):
            self._handle(group.WorkerStarted(agent, generation, event.pid))
        elif generation == self.membership.generation:
            self._hear_workers()  # what it said before it ended
            self._of_exit(event, agent, generation)

    def _of_exit(self, event: told.WorkerExited, agent: int, generation: int) -> None:
        if event.rank in self._finished:
            self._handle(group.WorkerFinished(agent, generation))
        elif agent in self._ending:
            self._handle(group.WorkerEnded(agent, generation))
        elif event.rank in self._consequences:  # its cause may still be on its way
            self._held[event.rank] = time.monotonic() + GRACE_S
        else:
            self._lose(event.rank, str(event), self._lost_process(event))

    def _lose(self, rank: int, cause: str, error: PenstockError) -> None:
        """A worker of this generation is lost, for want of another cause because of this one."""
        self._cause = self._cause or error
        agent = self._agents[rank]
        self._handle(group.WorkerLost(agent, self.membership.generation, cause))

    def _judge(self) -> None:
        """What only time tells: causes that do not come, interrupts, deadlines."""
        now = time.monotonic()
        if self._held and now > min(self._held.values()):
            rank = min(self._held)
            message = self._consequences[rank]
            self._lose(rank, message["message"], self._failed(rank, message))
            self._held.pop(rank, None)
        for rank in sorted(self._held):
            if self._agents[rank] in self._ending:
                del self._held[rank]
                generation = self.membership.generation
                self._handle(group.WorkerEnded(self._agents[rank], generation))
        if self._interrupts and not self._asked:
            self._asked = True
            self.shown.line("stopping: writing a checkpoint (Ctrl-C again to stop at once)")
            self.coordinator.send_all("worker", {"do": "stop"})
            self._handle(group.StopAsked("Ctrl-C or SIGTERM"))
        if self._interrupts > 1 and self.error is None:
            self.error = self._interrupted()
        if self.membership.waits and now > self._asked_at + PREPARED_S:
            self._asked_at = now
            if self.launcher.preparing():
                self.membership.postpone(now)
        deadline_s = self.membership.deadline_s
        if self._verdict is None and deadline_s is not None and now >= deadline_s:
            self._handle(group.TimePassed())

    # Messages of workers

    def _hear_workers(self) -> None:
        for peer, message in self.coordinator.poll():
            if message is None or message is peer.hello:
                continue
            if peer.hello.get("generation") == self.membership.generation:
                self._of_worker(peer, message)

    def _of_worker(self, peer: Peer, message: dict[str, Any]) -> None:
        rank = int(peer.hello["rank"])
        match message.get("event"):
            case "set" | "get":
                for number, answer in self._keys.take(peer.number, message):
                    self.coordinator.send(number, answer)
            case "prepared":
                plan = Plan.from_dict(message["plan"])
                self.store.write("plan.json", json.dumps(plan.to_dict(), indent=1).encode())
                if self.membership.generation == 1:
                    for n, line in enumerate(plan.show(self.workers).splitlines()):
                        self.shown.line(f"{'plan' if n == 0 else '    '}  {line}")
            case "bad_records":
                who = f"rank {rank}"
                self.leave_out(message["source"], message["count"], message["line"], who)
            case "planned":
                self.store.write("plan.json", json.dumps(message["plan"], indent=1).encode())
            case "network":
                self.store.write(NETWORK, json.dumps(message["network"], indent=1).encode())
            case "progress":
                self._step = max(self._step, message["step"])
                if self.first_step_s is None:
                    self.first_step_s = round(time.perf_counter() - self.began, 3)
                self.progress = {k: _number(v) for k, v in message.items()}
                self.shown.progress(self.progress)
            case "evaluated":
                self.evaluation = message["evaluation"]
                values = self.evaluation["metrics"]
                names = [n for n in values if not n.startswith(("micro_", "weighted_"))][:4]
                words = "  ".join(f"{n.replace('_', ' ')} {float(values[n]):.4f}" for n in names)
                self.shown.line(f"step {message['step']:,}  {message['source']}: {words}")
            case "checkpointed":
                self.checkpointed = message["step"]
                self._step = max(self._step, message["step"])
            case "finished":
                self._finished.add(rank)
                self.stopped = message["stopped"]
            case "failed" if message["consequence"]:
                self._consequences[rank] = message
            case "failed":
                if not isinstance(self._cause, UserError | TrainingError):  # a loss only follows
                    self._cause = self._failed(rank, message)
                agent, generation = self._agents[rank], self.membership.generation
                self._handle(group.WorkerFailed(agent, generation, message["message"]))

    # Words

    def _of_verdict(self, verdict: Verdict) -> PenstockError | None:
        match verdict.kind:
            case "finished" if self.stopped == "interrupted":
                return self._interrupted()
            case "finished":
                return None
            case "stopped":
                return self._interrupted()
            case "missing":
                why = self.launcher.missing() or f"their output is in {self.store.url}/logs"
                return WorkerLost(
                    f"{verdict.cause}\n{self._table()}", hint=f"{why}; {self._how_to_resume()}"
                )
        error = self._cause or WorkerLost(verdict.cause, hint=self._how_to_resume())
        if verdict.kind == "lost" and self.membership.restarts:
            error.message += f"\n  after {self.membership.restarts} restarts"
        return error

    def _table(self) -> str:
        lines = [f"  {'rank':>4}  {'state':<10}  host"]
        for row in self.membership.table():
            lines.append(f"  {row.rank:>4}  {row.condition:<10}  {row.host or '-'}")
        return "\n".join(lines)

    def _say_restart(self) -> None:
        cause = _first_line(self._cause) if self._cause else "a worker was lost"
        saved = latest(self.store)
        self._step = 0 if saved is None else saved.step
        at = "the beginning" if saved is None else f"the checkpoint of step {self._step:,}"
        number, most = self.membership.restarts, self.membership.max_restarts
        self.shown.line(f"{cause}; goes on from {at} (restart {number} of {most})")

    def _interrupted(self) -> Interrupted:
        step = self.checkpointed
        at = "without a checkpoint" if step is None else f"with a checkpoint at step {step:,}"
        return Interrupted(f"stopped {at}", hint=self._how_to_resume())

    def _failed(self, rank: int, message: dict[str, Any]) -> PenstockError:
        kind = getattr(errors, message["kind"], None) if message["ours"] else None
        if kind is None:
            return WorkerFailed(
                f"rank {rank} raised {message['kind']}: {message['message']}\n"
                f"{message['traceback'].rstrip()}{self._last_words(rank)}",
                hint=self._how_to_resume(),
            )
        error: PenstockError = kind(f"rank {rank}: {message['message']}", hint=message["hint"])
        return error

    def _lost_process(self, event: told.WorkerExited) -> PenstockError:
        process = f"process {event.pid} on " if event.pid else ""
        host = self._hosts.get(self._agents[event.rank], socket.gethostname())
        memory = "the kernel may have ended it for want of memory (dmesg); "
        return WorkerLost(
            f"rank {event.rank} ({process}{host}) {event}{self._at()}"
            f"{self._last_words(event.rank)}",
            hint=(memory if event.signal == 9 else "") + self._how_to_resume(),
        )

    def _lost_agent(self, rank: int, cause: str) -> PenstockError:
        return WorkerLost(
            f"rank {rank} was lost{self._at()}: {cause}{self._last_words(rank)}",
            hint=self._how_to_resume(),
        )

    def _at(self) -> str:
        return f" after step {self._step:,}" if self._step else ""

    def _last_words(self, rank: int) -> str:
        lines = self._logs.last(rank)
        return (
            "\n  its last output:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""
        )

    def _how_to_resume(self) -> str:
        if self.checkpointed is None and latest(self.store) is None:
            return "there is no checkpoint yet: run it again"
        return f"to go on from the last checkpoint: --resume {self.store.url}"

    @contextmanager
    def _interrupts_counted(self) -> Iterator[None]:
        """Meanwhile Ctrl-C and SIGTERM ask to stop, instead of raising wherever we are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def count(number: int, frame: object) -> None:
            self._interrupts += 1

        before = {s: signal.signal(s, count) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _first_line(error: PenstockError) -> str:
    return error.message.partition("\n")[0]


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and value != value else value
