"""When which rank of a pipeline runs which stage on which micro-batch: pure lists, and their time.

A network that is cut into n stages lies on p ranks (each of which may be a mesh): stage s on rank
s mod p, so that with n = p v a rank has v stages, its chunks. A step has k micro-batches; each goes
through all stages forward, and back. With equal stages, t a rank's time for a micro-batch:

    1F1B         step = (k + p - 1) t,        idle share (p - 1) / (k + p - 1)
    interleaved  step = (k + (p - 1) / v) t,  idle share (p - 1) / (k v + p - 1)

1F1B is Narayanan et al. 2019 ("PipeDream", SOSP, and its flush), interleaved Narayanan et al. 2021
(arXiv:2104.04473, section 2.2). 1F1B's rank r holds at most p - r micro-batches at once, however
many there are; interleaved at most 2 (p - r - 1) + (v - 1) p + 1 chunks' worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from penstock.errors import PlanError, UserError

Direction = Literal["forward", "backward"]


class Task(NamedTuple):
    """A stage's forward or backward of one micro-batch."""

    direction: Direction
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.direction} of stage {self.stage}, micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """The order of tasks on each rank.

    Arguments:
        chunks: stages of each rank.
        micro_batches: of a step.
        ranks: of each rank, its tasks in order.
    """

    chunks: int
    micro_batches: int
    ranks: tuple[tuple[Task, ...], ...]

    @property
    def stages(self) -> int:
        """Of all ranks."""
        return len(self.ranks) * self.chunks

    def rank_of(self, stage: int) -> int:
        """Where a stage lies."""
        return stage % len(self.ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """What lies on a rank."""
        return tuple(range(rank, self.stages, len(self.ranks)))

    def in_flight(self, rank: int, held: Sequence[float] | None = None) -> float:
        """The most that a rank holds at once for backwards that are still to come.

        Arguments:
            held: by stage, what a micro-batch leaves there from its forward to its backward; None:
                1 everywhere, so that chunks' worths of micro-batches are counted.
        """
        now = most = 0.0
        for task in self.ranks[rank]:
            worth = 1.0 if held is None else held[task.stage]
            now += worth if task.direction == "forward" else 0.0
            most = max(most, now)
            now -= worth if task.direction == "backward" else 0.0
        return most

    def needs(self, task: Task) -> tuple[Task, ...]:
        """The tasks that a task follows."""
        direction, stage, micro_batch = task
        if direction == "forward":
            return (Task("forward", stage - 1, micro_batch),) if stage else ()
        if stage == self.stages - 1:
            return (Task("forward", stage, micro_batch),)
        return (Task("backward", stage + 1, micro_batch), Task("forward", stage, micro_batch))

    def validate(self) -> None:
        """Every task once and on its rank, every stage's backwards in order, and none waits for
        ever for what it needs where a rank waits in each task for the one that it needs.

        Raises:
            PlanError: names rank and task.
        """
        seen: set[Task] = set()
        for rank, tasks in enumerate(self.ranks):
            latest: dict[tuple[Direction, int], int] = {}
            for task in tasks:
                direction, stage, micro_batch = task
                _check(self.rank_of(stage) == rank, f"rank {rank} has {task}, of another rank")
                _check(task not in seen, f"rank {rank} has {task} a second time")
                expected = latest.get((direction, stage), -1) + 1
                _check(micro_batch == expected, f"rank {rank} has {task} before that of {expected}")
                latest[direction, stage] = micro_batch
                seen.add(task)
        missing = 2 * self.stages * self.micro_batches - len(seen)
        _check(missing == 0, f"{missing} tasks are on no rank")
        zeros = (0.0,) * self.stages
        simulate(self, zeros, zeros)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """One forward, one backward: rank r begins with p - 1 - r forwards, and from then on runs the
    backward of the oldest micro-batch after each forward.

    Arguments:
        ranks: of the pipeline, each with one stage.
    """
    return interleaved(ranks, 1, micro_batches)


def interleaved(ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """1F1B of ranks with several stages each: micro-batches go in groups of as many as ranks, and a
    rank runs a chunk for a whole group before it takes up its next chunk.

    Arguments:
        chunks: stages of each rank; 1 is plain 1F1B.
        micro_batches: with several chunks a multiple of the ranks.

    Raises:
        UserError: they are not.
    """
    if min(ranks, chunks, micro_batches) < 1:
        raise UserError(
            f"a pipeline of {ranks} ranks, {chunks} chunks, {micro_batches} micro-batches",
            hint="there is at least one of each",
        )
    if chunks > 1 and micro_batches % ranks:
        raise UserError(
            f"{micro_batches} micro-batches for {ranks} ranks of {chunks} stages each",
            hint=f"a multiple of {ranks} micro-batches, or one stage on each rank",
        )
    return Schedule(
        chunks,
        micro_batches,
        tuple(_tasks(ranks, chunks, micro_batches, rank) for rank in range(ranks)),
    )


def _tasks(ranks: int, chunks: int, micro_batches: int, rank: int) -> tuple[Task, ...]:
    """Narayanan et al. 2021's order. One chunk has groups of any size."""
    group = ranks if chunks > 1 else micro_batches
    order = [
        (chunk, micro_batch)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, first + group)
    ]
    forwards = [Task("forward", chunk * ranks + rank, number) for chunk, number in order]
    backwards = [
        Task("backward", (chunks - 1 - chunk) * ranks + rank, number) for chunk, number in order
    ]
    ahead = ranks - 1 - rank if chunks == 1 else 2 * (ranks - 1 - rank) + (chunks - 1) * ranks
    ahead = min(ahead, len(forwards))
    tasks = forwards[:ahead]
    for number, forward in enumerate(forwards[ahead:]):
        tasks += [forward, backwards[number]]
    return (*tasks, *backwards[len(forwards) - ahead :])


class Span(NamedTuple):
    """When a task runs, in seconds from the step's begin."""

    task: Task
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """When everything runs.

    Arguments:
        ranks: of each rank, its tasks in order.
    """

    ranks: tuple[tuple[Span, ...], ...]

    @property
    def step_s(self) -> float:
        """From the first task's begin to the last's end."""
        return max(self.end_s(rank) for rank in range(len(self.ranks)))

    def end_s(self, rank: int) -> float:
        """When a rank's last task is done."""
        return self.ranks[rank][-1].end_s

    def busy_s(self, rank: int) -> float:
        """What a rank computes."""
        return sum(span.end_s - span.start_s for span in self.ranks[rank])

    def idle_share(self, rank: int) -> float:
        """Of the step, the share in which a rank computes nothing: its bubble."""
        return 1 - self.busy_s(rank) / self.step_s if self.step_s else 0.0


def simulate(
    schedule: Schedule,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: Sequence[float] | float = 0.0,
) -> Timeline:
    """When everything runs, if each rank begins each task as soon as what it needs is there.

    Arguments:
        forward_s, backward_s: of a micro-batch, by stage.
        send_s: that a result takes to the next rank: by the lower stage of the two, or the same
            everywhere. A rank computes meanwhile, but what it sends one way goes one after the
            other. On one rank it is 0.

    Raises:
        PlanError: tasks wait for one another in a circle; names what each rank waits for.
    """
    ends: dict[Task, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.ranks]

    sent_s: dict[Task, float] = {}  # by what was sent, when it is there
    free_s: dict[tuple[int, Direction], float] = {}  # by link, when it has sent all so far

    def there_s(task: Task, needed: Task) -> float:
        if schedule.rank_of(task.stage) == schedule.rank_of(needed.stage):
            return ends[needed]
        return sent_s[needed]

    def send(task: Task) -> None:
        link = schedule.rank_of(task.stage), task.direction
        between = task.stage if task.direction == "forward" else task.stage - 1
        if 0 <= between < schedule.stages - 1:
            own_s = send_s if isinstance(send_s, float | int) else send_s[between]
            free_s[link] = max(ends[task], free_s.get(link, 0.0)) + own_s
            sent_s[task] = free_s[link]

    moved = True
    while moved:
        moved = False
        for rank, tasks in enumerate(schedule.ranks):
            own = spans[rank]
            while len(own) < len(tasks):
                task = tasks[len(own)]
                needed = schedule.needs(task)
                if not all(one in ends for one in needed):
                    break
                done_s = own[-1].end_s if own else 0.0
                start_s = max([done_s, *(there_s(task, one) for one in needed)])
                times_s = forward_s if task.direction == "forward" else backward_s
                ends[task] = start_s + times_s[task.stage]
                send(task)
                own.append(Span(task, start_s, ends[task]))
                moved = True
    stuck = [
        f"rank {rank} in {tasks[len(spans[rank])]}"
        for rank, tasks in enumerate(schedule.ranks)
        if len(spans[rank]) < len(tasks)
    ]
    _check(not stuck, f"tasks wait for one another: {', '.join(stuck)}")
    return Timeline(tuple(map(tuple, spans)))


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise PlanError(f"not a schedule: {message}", hint="a defect of Penstock: report it")
