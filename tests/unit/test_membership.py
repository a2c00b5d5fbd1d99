"""Who is in a run: each rule; `test_membership_explored` has all of them together."""

from __future__ import annotations

import math

import pytest

from penstock.runtime.membership import (
    AgentFailed,
    AgentHeard,
    AgentJoined,
    AgentLost,
    AgentReady,
    ClusterFailed,
    EndWorker,
    Event,
    GiveUp,
    Instruction,
    Leave,
    Membership,
    Row,
    StartWorker,
    StopAsked,
    TimePassed,
    Verdict,
    Wait,
    WorkerEnded,
    WorkerFailed,
    WorkerFinished,
    WorkerLost,
    WorkerStarted,
)

GATHER_S, REGATHER_S, STOP_S, START_S, END_S, SILENCE_S = 50.0, 40.0, 30.0, 20.0, 10.0, 70.0
RESTARTS = 2
OF_WORKERS: list[tuple] = [
    (WorkerStarted, 1),
    (WorkerFinished,),
    (WorkerEnded,),
    (WorkerLost, "lost"),
    (WorkerFailed, "failed"),
]


def new(
    ranks: int = 2, max_restarts: int = RESTARTS, kind: type[Membership] = Membership
) -> Membership:
    return kind(
        ranks,
        max_restarts=max_restarts,
        gather_s=GATHER_S,
        regather_s=REGATHER_S,
        stop_s=STOP_S,
        now_s=0.0,
        start_s=START_S,
        end_s=END_S,
        silence_s=SILENCE_S,
    )


class Run:
    """A membership, validated after every event. Agent 10 r + a is attempt a at rank r."""

    def __init__(self, ranks: int = 2, max_restarts: int = RESTARTS) -> None:
        self.members = new(ranks, max_restarts)
        self.now_s = 0.0

    def __call__(self, *events: Event) -> list[Instruction]:
        """The instructions after several events together."""
        told = []
        for event in events:
            told += self.members.handle(event, self.now_s)
            self.members.validate()
        return told

    def joins(self, *agents: int) -> list[Instruction]:
        return self(*(AgentJoined(a, a // 10, a % 10, f"host{a}") for a in agents))

    def are_ready(self, *agents: int) -> list[Instruction]:
        return self.joins(*agents) + self(*map(AgentReady, agents))

    def start(self, *agents: int) -> list[Instruction]:
        return self(*(WorkerStarted(a, self.members.generation, 1000 + a) for a in agents))

    def finish(self, *agents: int) -> list[Instruction]:
        return self(*(WorkerFinished(a, self.members.generation) for a in agents))

    def end(self, *agents: int) -> list[Instruction]:
        return self(*(WorkerEnded(a, self.members.generation) for a in agents))

    def lose(self, agent: int, cause: str = "killed") -> list[Instruction]:
        return self(WorkerLost(agent, self.members.generation, cause))

    def wait(self, seconds: float) -> list[Instruction]:
        self.now_s += seconds
        return self(TimePassed())

    @property
    def conditions(self) -> list[str]:
        return [row.condition for row in self.members.table()]


@pytest.fixture
def running() -> Run:
    """Generation 1 of ranks 0 to 2 runs, in agents 0, 10 and 20."""
    run = Run(3)
    run.are_ready(0, 10, 20)
    run.start(0, 10, 20)
    assert run.conditions == ["running"] * 3
    return run


def starts(generation: int, *agents: int) -> list[Instruction]:
    return [StartWorker(agent, agent // 10, generation) for agent in agents]


def verdict_of(instructions: list[Instruction]) -> Verdict:
    assert isinstance(instructions[-1], GiveUp), instructions
    return instructions[-1].verdict


# A run without faults


def test_a_run() -> None:
    run = Run()
    assert run.members.deadline_s == GATHER_S
    assert run.joins(0, 10) == []
    assert run.members.missing == [0, 1]
    assert run(AgentReady(10)) == []
    assert run.members.table() == [
        Row(0, "joined", "host0", 0, 0),
        Row(1, "ready", "host10", 0, 10),
    ]
    assert run(AgentReady(0)) == starts(1, 0, 10)
    assert run.members.missing == []
    assert run.members.deadline_s == START_S
    assert run.start(0, 10) == []
    assert run.members.deadline_s == math.inf  # the driver plays them
    assert run.finish(10) == []
    assert run.conditions == ["running", "finished"]
    assert verdict_of(run.finish(0)) == Verdict("finished", 1)
    assert run.members.deadline_s is None
    assert run.members.restarts == 0


def test_after_the_verdict_new_agents_leave_and_nothing_else_happens(running: Run) -> None:
    running.finish(0, 10, 20)
    assert running.joins(1) == [Leave(1, "the run is over")]
    assert running(AgentLost(0, "gone"), StopAsked("now"), WorkerFailed(10, 1, "error")) == []
    assert running.wait(1000) == []
    assert running.members.verdict == Verdict("finished", 1)


# Who holds a rank


def test_an_attempt_that_is_not_newer_leaves() -> None:
    run = Run()
    run.joins(2)
    assert run(AgentJoined(7, 0, 2, "b")) == [Leave(7, "rank 0 is at attempt 2, this is 2")]
    assert run(AgentJoined(8, 0, 1, "b")) == [Leave(8, "rank 0 is at attempt 2, this is 1")]
    assert run(AgentJoined(9, 2, 0, "b")) == [Leave(9, "there is no rank 2 of 2")]
    assert run(AgentJoined(9, -1, 0, "b")) == [Leave(9, "there is no rank -1 of 2")]
    assert run.joins(2) == []  # a second hello of the same
    run(AgentReady(7), AgentReady(8), AgentReady(9), AgentReady(10))
    assert run.conditions == ["joined", "absent"]


def test_a_newer_attempt_stands_by_and_takes_over(running: Run) -> None:
    assert running.joins(11) == [Wait(11)]
    assert running(AgentReady(11)) == []
    assert running.members.table()[1].agent == 10
    assert running(AgentLost(10, "gone")) == [EndWorker(0, 1), EndWorker(20, 1)]
    assert running.members.table()[1] == Row(1, "ready", "host11", 1, 11)
    assert running.end(0) == []
    assert running.end(20) == starts(2, 0, 11, 20)
    assert running.members.restarts == 1


def test_the_newest_stands_by() -> None:
    run = Run()
    run.joins(0, 1)
    assert run.joins(3) == [Leave(1, "attempt 3 stands by for rank 0 instead"), Wait(3)]
    assert run.joins(2) == [Leave(2, "rank 0 is at attempt 3, this is 2")]
    run(AgentReady(1), AgentLost(0, "gone"))
    assert run.members.table()[0] == Row(0, "joined", "host3", 3, 3)


def test_one_that_stands_by_is_lost_or_fails_without_harm(running: Run) -> None:
    running.joins(11)
    assert running(AgentLost(11, "gone")) == []
    running.joins(12)
    assert running(AgentFailed(12, "DataError", "bad row")) == [Leave(12, "DataError: bad row")]
    assert running.conditions == ["running"] * 3
    assert running.joins(11) == [Leave(11, "rank 1 is at attempt 2, this is 1")]


def test_a_lost_attempt_never_comes_back() -> None:
    run = Run()
    run.are_ready(1)
    run(AgentLost(1, "gone"))
    assert run.conditions == ["absent", "absent"]
    assert run.joins(1) == [Leave(1, "rank 0 is at attempt 1, this is 1")]
    assert run.joins(0) == [Leave(0, "rank 0 is at attempt 1, this is 0")]
    assert run.joins(2) == []


def test_before_the_first_generation_a_loss_is_no_restart() -> None:
    run = Run(max_restarts=0)
    run.are_ready(0)
    run(AgentLost(0, "gone"))
    run.are_ready(1)
    assert run.are_ready(10) == starts(1, 1, 10)
    assert run.members.restarts == 0


# Losses


def test_a_lost_worker_restarts_all(running: Run) -> None:
    assert running.lose(10) == [EndWorker(0, 1), EndWorker(20, 1)]
    assert running.conditions == ["ending", "ready", "ending"]
    assert running.members.missing == [0, 2]
    assert running.end(0) == []
    assert running.end(20) == starts(2, 0, 10, 20)
    assert running.start(0, 10, 20) == []
    assert running.members.generation == 2


def test_those_told_to_end_may_end_in_any_way(running: Run) -> None:
    running.are_ready(21)
    running.lose(0)
    assert running.lose(10, "its peers were gone") == []
    assert running(AgentLost(20, "gone")) == starts(2, 0, 10, 21)
    running.lose(0)
    running.end(21)
    assert running(WorkerFinished(10, 2)) == starts(3, 0, 10, 21)


def test_a_lost_agent_is_waited_for(running: Run) -> None:
    assert running(AgentLost(10, "gone")) == [EndWorker(0, 1), EndWorker(20, 1)]
    assert running.end(0, 20) == []
    assert running.conditions == ["ready", "absent", "ready"]
    assert running.joins(11) == []
    assert running(AgentReady(11)) == starts(2, 0, 11, 20)


def test_those_that_had_finished_begin_again(running: Run) -> None:
    running.finish(0)
    assert running.lose(10) == [EndWorker(20, 1)]
    assert running.conditions == ["ready", "ready", "ending"]
    assert running.end(20) == starts(2, 0, 10, 20)


def test_a_lost_agent_takes_its_finished_worker_along(running: Run) -> None:
    running.finish(0)
    assert running(AgentLost(0, "gone")) == [EndWorker(10, 1), EndWorker(20, 1)]
    assert running.conditions == ["absent", "ending", "ending"]


@pytest.mark.parametrize(
    ("kind", "rest", "condition"),
    [
        (WorkerFinished, (), "finished"),
        (WorkerEnded, (), "ready"),
        (WorkerLost, ("lost",), "ready"),
        (WorkerFailed, ("failed",), "failed"),
    ],
)
def test_a_worker_may_be_over_before_it_is_said_to_have_started(
    kind: type, rest: tuple[str, ...], condition: str
) -> None:
    run = Run()
    run.are_ready(0, 10)
    run(kind(0, 1, *rest))
    assert run.conditions[0] == condition


def test_a_worker_that_ends_unasked_is_lost(running: Run) -> None:
    assert running.end(10) == [EndWorker(0, 1), EndWorker(20, 1)]


def test_the_first_cause_is_named_after_the_last_restart() -> None:
    run = Run(max_restarts=1)
    run.are_ready(0, 10)
    run.lose(0, "an earlier one")
    run.end(10)
    assert run.members.generation == 2
    assert verdict_of(run.lose(10, "killed by SIGKILL")) == Verdict(
        "lost", 2, (1,), "killed by SIGKILL"
    )
    assert run.lose(0, "lost its peers") == []


def test_without_restarts_the_first_loss_is_the_last(running: Run) -> None:
    run = Run(max_restarts=0)
    run.are_ready(0, 10)
    assert run(AgentLost(10, "gone")) == [GiveUp(Verdict("lost", 1, (1,), "gone"))]


def test_a_failure_ends_the_run_at_once(running: Run) -> None:
    told = running(WorkerFailed(10, 1, "ValueError: no"))
    assert told == [GiveUp(Verdict("failed", 1, (1,), "ValueError: no"))]


def test_a_failure_of_one_told_to_end_counts(running: Run) -> None:
    running.lose(0)
    assert verdict_of(running(WorkerFailed(10, 1, "ValueError"))).kind == "failed"


def test_an_agent_without_its_data_ends_the_run() -> None:
    run = Run()
    run.joins(10)
    told = run(AgentFailed(10, "DataError", "row 3 of part 7"))
    assert told == [GiveUp(Verdict("failed", 0, (1,), "DataError: row 3 of part 7"))]


def test_without_a_cluster_the_run_is_lost(running: Run) -> None:
    running(AgentLost(10, "its executor is gone"))
    verdict = verdict_of(running(ClusterFailed("the job was aborted")))
    assert verdict.kind == "lost"
    assert verdict.ranks == (0, 1, 2)
    assert "aborted, after rank 1 was lost: its executor is gone" in verdict.cause
    stopping = Run()
    stopping.are_ready(0, 10)
    stopping(StopAsked("Ctrl-C"))
    assert verdict_of(stopping(ClusterFailed("aborted"))) == Verdict("stopped", 1, (), "Ctrl-C")


def test_what_is_old_or_unknown_is_ignored(running: Run) -> None:
    running.lose(10)
    running.end(0, 20)
    assert running.members.generation == 2
    running.start(0, 10, 20)
    before = running.members.table()
    old = [
        kind(agent, generation, *rest)
        for agent, generation in ((0, 1), (0, 3), (99, 2))
        for kind, *rest in OF_WORKERS
    ]
    unknown = [AgentReady(99), AgentHeard(99), AgentLost(99, "gone"), AgentFailed(99, "E", "m")]
    assert running(*old, *unknown) == []
    assert running(AgentReady(0), WorkerStarted(0, 2, 1)) == []  # and what is told twice
    assert running.members.table() == before


# Stopping


def test_stopping_while_nothing_runs() -> None:
    run = Run()
    run.are_ready(0)
    assert run(StopAsked("Ctrl-C")) == [GiveUp(Verdict("stopped", 0, (), "Ctrl-C"))]


def test_running_workers_may_finish(running: Run) -> None:
    assert running(StopAsked("Ctrl-C")) == []
    assert running.members.deadline_s == STOP_S
    assert running.finish(0) == []
    assert running.end(10) == []
    running.now_s = STOP_S / 2
    assert running(StopAsked("again")) == []
    assert running.members.deadline_s == STOP_S
    assert verdict_of(running.finish(20)) == Verdict("stopped", 1, (), "Ctrl-C")


def test_a_stop_does_not_wait_for_ever(running: Run) -> None:
    running(StopAsked("Ctrl-C"))
    running.finish(0)
    assert running.wait(STOP_S - 1) == []
    assert verdict_of(running.wait(1)).kind == "stopped"


def test_no_generation_begins_after_a_stop(running: Run) -> None:
    running.lose(10)
    running.end(0)
    assert running(StopAsked("Ctrl-C")) == []
    assert verdict_of(running.end(20)).kind == "stopped"


def test_a_loss_while_stopping_is_no_loss(running: Run) -> None:
    running(StopAsked("Ctrl-C"))
    assert running.lose(10) == []
    assert running(AgentLost(0, "gone")) == []
    assert verdict_of(running.finish(20)).kind == "stopped"


# Deadlines


def test_missing_ranks_are_named() -> None:
    run = Run(3)
    run.are_ready(20)
    run.joins(10)
    assert run.wait(GATHER_S - 1) == []
    verdict = verdict_of(run.wait(1))
    assert verdict == Verdict(
        "missing", 0, (0, 1), "rank 0 still absent, rank 1 still joined on host10 after 50 s"
    )


def test_after_a_loss_the_missing_are_waited_for_but_not_for_ever(running: Run) -> None:
    running(AgentLost(10, "gone"))
    running.end(0, 20)
    running.wait(REGATHER_S / 2)
    running.joins(11)
    running(AgentLost(11, "gone as well"))  # no further time for it
    assert running.members.deadline_s == REGATHER_S
    verdict = verdict_of(running.wait(REGATHER_S / 2))
    assert (verdict.kind, verdict.ranks) == ("missing", (1,))
    assert verdict.cause == "rank 1 still absent after 40 s, after rank 1 was lost: gone"


def test_who_does_not_end_is_lost(running: Run) -> None:
    running.lose(10)
    running.end(0)
    assert running.members.deadline_s == END_S
    assert running.wait(END_S) == [Leave(20, "its worker did not end within 10 s")]
    assert running.conditions == ["ready", "ready", "absent"]
    assert running.joins(20) == [Leave(20, "rank 2 is at attempt 0, this is 0")]
    assert running.are_ready(21) == starts(2, 0, 10, 21)


def test_who_does_not_start_is_ended_with_the_others() -> None:
    run = Run()
    run.are_ready(0, 10)
    run.start(0)
    assert run.wait(START_S) == [EndWorker(10, 1), EndWorker(0, 1)]
    assert run.end(0) == []
    assert run.start(10) == []  # too late: it was told to end
    assert run.end(10) == starts(2, 0, 10)


def test_silence(running: Run) -> None:
    running(AgentHeard(0), AgentHeard(10))  # the driver plays agent 20
    running.wait(SILENCE_S - 1)
    running(AgentHeard(0))
    assert running.wait(1) == [
        Leave(10, "its agent was silent for 70 s"),
        EndWorker(0, 1),
        EndWorker(20, 1),
    ]
    running(AgentHeard(10), AgentReady(10))
    assert running.conditions == ["ending", "absent", "ending"]


def test_whatever_an_agent_tells_is_a_heartbeat() -> None:
    run = Run()
    run.joins(0, 10)
    run(AgentHeard(0))
    run.now_s = 30.0
    run(AgentReady(0), AgentReady(10))
    run.start(0, 10)
    assert run.members.deadline_s == 30 + SILENCE_S


def test_time_may_have_passed_several_deadlines(running: Run) -> None:
    running(AgentHeard(0), AgentHeard(10), AgentHeard(20))
    told = running.wait(1000)  # a driver that slept: the first silent one takes the others along
    assert [type(i) for i in told] == [Leave, EndWorker, EndWorker, Leave, Leave]
    assert running.members.deadline_s == 1000 + REGATHER_S
    assert verdict_of(running.wait(REGATHER_S)).ranks == (0, 1, 2)
