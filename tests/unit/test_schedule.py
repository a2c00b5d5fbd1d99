"""Schedules of pipelines: their order, their time beside the known formulas, what they hold."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from penstock.errors import PlanError, UserError
from penstock.plan.pipelines.schedule import Schedule, Task, interleaved, one_f_one_b, simulate

CASES = [(p, 1, k) for p in (1, 2, 3, 4, 8) for k in (1, 2, 3, 5, 8, 16)] + [
    (p, v, p * groups) for p in (2, 3, 4, 8) for v in (2, 3, 4) for groups in (1, 2, 4)
]


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), CASES)
def test_every_task_runs_once_and_none_waits_for_ever(
    ranks: int, chunks: int, micro_batches: int
) -> None:
    schedule = interleaved(ranks, chunks, micro_batches)
    schedule.validate()
    assert sum(map(len, schedule.ranks)) == 2 * ranks * chunks * micro_batches


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), CASES)
def test_the_bubble_is_as_the_formula_has_it(ranks: int, chunks: int, micro_batches: int) -> None:
    schedule = interleaved(ranks, chunks, micro_batches)
    forward_s, backward_s = 1.0 / chunks, 2.0 / chunks
    times = [forward_s] * schedule.stages, [backward_s] * schedule.stages
    timeline = simulate(schedule, *times)
    step_s = (micro_batches + (ranks - 1) / chunks) * 3.0
    assert timeline.step_s == pytest.approx(step_s)
    for rank in range(ranks):
        expected = (ranks - 1) / (micro_batches * chunks + ranks - 1)
        assert timeline.idle_share(rank) == pytest.approx(expected)


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), CASES)
def test_ranks_hold_no_more_than_the_formula_has(
    ranks: int, chunks: int, micro_batches: int
) -> None:
    schedule = interleaved(ranks, chunks, micro_batches)
    for rank in range(ranks):
        ahead = ranks - rank if chunks == 1 else 2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1
        assert schedule.in_flight(rank) == min(ahead, micro_batches * chunks)


def test_what_is_held_counts_by_stage() -> None:
    schedule = interleaved(2, 2, 2)
    held = [1.0, 10.0, 100.0, 1000.0]
    assert schedule.in_flight(0, held) == 202.0
    assert schedule.in_flight(1, held) == 1020.0


def test_one_f_one_b_in_full() -> None:
    first, last = one_f_one_b(2, 3).ranks
    words = ["f0", "f1", "b0", "f2", "b1", "b2"]
    assert [f"{task.direction[0]}{task.micro_batch}" for task in first] == words
    words = ["f0", "b0", "f1", "b1", "f2", "b2"]
    assert [f"{task.direction[0]}{task.micro_batch}" for task in last] == words


def test_no_schedule_is_shorter_than_its_stages_and_its_longest_way() -> None:
    """And none longer than everything one after the other."""
    numbers = random.Random(3)
    for _ in range(60):
        ranks, chunks = numbers.randint(1, 5), numbers.randint(1, 3)
        micro_batches = ranks * numbers.randint(1, 4)
        schedule = interleaved(ranks, chunks, micro_batches)
        forward, backward, send = (
            [numbers.uniform(0.1, 3) for _ in range(schedule.stages)] for _ in range(3)
        )
        timeline = simulate(schedule, forward, backward, send)
        whole = micro_batches * (sum(forward) + sum(backward))
        for rank in range(ranks):
            own = sum(forward[s] + backward[s] for s in schedule.stages_of(rank)) * micro_batches
            assert timeline.busy_s(rank) == pytest.approx(own)
            assert timeline.step_s >= own - 1e-9
        way = sum(forward) + sum(backward) + (2 * sum(send[:-1]) if ranks > 1 else 0)
        assert way - 1e-9 <= timeline.step_s <= whole + 2 * micro_batches * sum(send) + 1e-9
        for rank, spans in enumerate(timeline.ranks):
            assert [span.task for span in spans] == list(schedule.ranks[rank])
            ends = {s.task: s.end_s for of_rank in timeline.ranks for s in of_rank}
            for span in spans:
                assert all(ends[one] <= span.start_s for one in schedule.needs(span.task))


def test_sending_takes_time_between_ranks_alone() -> None:
    schedule = one_f_one_b(2, 1)
    assert simulate(schedule, [1.0, 1.0], [2.0, 2.0], 0.5).step_s == 7.0
    assert simulate(interleaved(1, 2, 1), [1.0, 1.0], [2.0, 2.0], 0.5).step_s == 6.0


def test_what_is_sent_one_way_goes_one_after_the_other() -> None:
    """Two forwards in a row, of which each takes less than a link has for what comes of it."""
    timeline = simulate(one_f_one_b(3, 3), [1.0] * 3, [2.0] * 3, [5.0, 0.0, 0.0])
    starts = {span.task: span.start_s for rank in timeline.ranks for span in rank}
    assert [starts[Task("forward", 1, m)] for m in (0, 1)] == [6.0, 11.0]
    # Back there is another way: the first is sent while the second still comes.
    assert starts[Task("backward", 0, 0)] == starts[Task("backward", 1, 0)] + 2.0 + 5.0


def test_what_is_no_schedule() -> None:
    good = one_f_one_b(2, 2)
    first, last = good.ranks

    def broken(*ranks: tuple[Task, ...]) -> Schedule:
        return replace(good, ranks=ranks)

    with pytest.raises(PlanError, match="1 tasks are on no rank"):
        broken(first[:-1], last).validate()
    with pytest.raises(PlanError, match="a second time"):
        broken((*first, first[0]), last).validate()
    with pytest.raises(PlanError, match="of another rank"):
        broken(last, first).validate()
    back_first = sorted(first, key=lambda task: (task.micro_batch, task.direction == "forward"))
    with pytest.raises(PlanError, match="wait for one another: rank 0 in backward of stage 0"):
        broken(tuple(back_first), last).validate()
    with pytest.raises(PlanError, match="before that of 0"):
        broken(first, (last[2], last[3], last[0], last[1])).validate()


def test_interleaved_wants_groups_of_as_many_micro_batches_as_ranks() -> None:
    with pytest.raises(UserError, match="3 micro-batches for 2 ranks of 2 stages each"):
        interleaved(2, 2, 3)
    with pytest.raises(UserError, match="at least one"):
        one_f_one_b(2, 0)
