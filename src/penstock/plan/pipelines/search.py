"""Which pipeline: how many stages, chunks and micro-batches, and what is split inside a stage.

There are many (`MICRO_BATCHES` x `CHUNKS` for each number of stages that a cluster can be cut
into), and each has a graph to capture, to split and to cut. So which are looked at (`choose`) is
decided in steps, the cheap ones first:

    least_s, about_s   from the whole batch's graph alone (`promise`): none that takes at least as
                       long as what is known, which is proven, nor any that only looks so
    guessed            the most promising first: that graph cut into its stages
    modelled           the graph of a micro-batch, split inside in the known ways
    searched           the best of those, split inside by the search
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from penstock.errors import UserError
from penstock.model.graph import Graph
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster
from penstock.plan.pipelines.model import (
    CHUNKS,
    Candidate,
    Inside,
    cut_for,
    inside_of,
    inside_with_memory,
    order,
    pipelines,
    send_s,
    stage_counts,
    step_of,
)
from penstock.plan.pipelines.promise import Promise
from penstock.plan.pipelines.schedule import interleaved

MICRO_BATCHES = (1, 2, 4, 8)
"""Of each rank of the pipeline, what is tried: the bubble of 8 is 11% at most."""
MAX_TASKS = 50_000
"""Of a schedule, which is simulated and written into the plan."""
MODELLED = 6
"""Numbers of stages and micro-batches that are split and cut, where there is a plan without."""
SEARCHED = 2
"""Of those, how many the search splits inside."""

Known = Callable[[Graph, Cluster], Sequence[Assignment]]
"""Known ways to split a graph on a cluster, which take no search."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What has come of looking for a pipeline.

    Arguments:
        best: of those that fit the fastest, or, if none does, what holds least; None where there is
            nothing to cut, or nothing that could be faster.
        impossible: numbers of stages and micro-batches (pairs of them) that take longer than what
            is known, however they are cut and split, or cannot be made.
        unlikely: pairs that take longer than that, as far as a guess says.
        modelled: pairs that were cut and split.
        left: pairs that were not: their schedule is too long, there were more promising ones, or
            there was no more time.
        timed_out: whether it was time.
    """

    best: Candidate | None
    impossible: int = 0
    unlikely: int = 0
    modelled: int = 0
    left: int = 0
    timed_out: bool = False

    @property
    def words(self) -> str:
        """What was looked at, and what was not."""
        total = self.impossible + self.unlikely + self.modelled + self.left
        why = "no time" if self.timed_out else "less promising"
        counts = {
            "ruled out by a bound": self.impossible,
            "by a guess": self.unlikely,
            "tried": self.modelled,
            f"left out ({why})": self.left,
        }
        parts = ", ".join(f"{words} {count}" for words, count in counts.items() if count)
        if not total:
            return "there is nothing to cut"
        return f"of {total} numbers of stages and micro-batches: {parts}"


@dataclass(frozen=True)
class _Pair:
    """Ranks of a pipeline and micro-batches, and what is thought of them."""

    ranks: int
    micro_batches: int
    chunks: tuple[int, ...]
    least_s: float
    about_s: float


def choose(
    capture_at: Callable[[int], Graph],
    cluster: Cluster,
    batch: int,
    search: Inside,
    *,
    known: Known | None = None,
    below_s: float = math.inf,
    time_limit_s: float = math.inf,
    micro_batches: tuple[int, ...] = MICRO_BATCHES,
    chunks: tuple[int, ...] = CHUNKS,
) -> Choice:
    """The best pipeline, of those that may take less than what is known.

    To be compared with the plan without a pipeline by whoever asks. The answer is the same in every
    process, unless the time limit was what ended the looking.

    Arguments:
        capture_at: the graph of a step of so many examples.
        batch: examples of a step.
        search: splits a graph inside a stage.
        known: ways to split it by which pipelines are compared before `search` is asked, for the
            `SEARCHED` best; each but the first counts where none before it fits. None: `search` is
            asked for all.
        below_s: a step that is known; infinite: none is, and then there is no end but time to how
            many are looked at.
        time_limit_s: of all, of which comparing has half. Nothing is begun behind it.
        micro_batches: of each rank of the pipeline, what is tried.
        chunks: of each rank, what is tried.
    """
    began = time.perf_counter()
    counts = [(ranks, ranks * times) for ranks in stage_counts(cluster) for times in micro_batches]
    counts = [(ranks, count) for ranks, count in counts if batch % count == 0]
    if not counts:
        return Choice(None)
    capture = functools.cache(capture_at)
    promise = Promise(capture(batch), batch, cluster)
    # A stage is at least an operator.
    counts = [(ranks, count) for ranks, count in counts if ranks <= promise.places]
    pairs = [_pair(promise, cluster, ranks, count, chunks) for ranks, count in counts]
    hopeful = sorted(
        (pair for pair in pairs if pair.least_s < below_s and pair.about_s < below_s),
        key=lambda pair: (pair.about_s, pair.ranks, pair.micro_batches),
    )
    impossible = sum(pair.least_s >= below_s for pair in pairs)
    unlikely = len(pairs) - impossible - len(hopeful)
    hopeful = [pair for pair in hopeful if 2 * pair.ranks * pair.micro_batches <= MAX_TASKS]
    found: list[tuple[_Pair, Candidate]] = []
    modelled, timed_out = 0, False
    for number, pair in enumerate(hopeful):
        timed_out = number > 0 and time.perf_counter() - began > time_limit_s / 2
        if timed_out or (below_s < math.inf and modelled == MODELLED):
            break
        bar_s = min([below_s, *(one.step_s for _, one in found if one.fits)])
        if pair.least_s >= bar_s:
            impossible += 1
            continue
        if bar_s < math.inf and _guessed_s(promise, pair, cluster) >= bar_s:
            unlikely += 1
            continue
        try:
            one = _modelled_best(pair, capture(batch // pair.micro_batches), cluster, search, known)
        except UserError:  # a batch so small that it cannot be captured, a pin of another mesh
            one = None
        if one is None:
            impossible += 1
        else:
            found.append((pair, one))
            modelled += 1
    left = len(pairs) - impossible - unlikely - modelled
    found.sort(key=lambda one: (order(one[1], cluster), one[0].about_s))
    best, took_s = [one for _, one in found], 0.0
    for pair, _ in found[:SEARCHED] if known is not None else ():
        begun = time.perf_counter()
        if begun + took_s > began + time_limit_s:
            break
        graph = capture(batch // pair.micro_batches)
        best += pipelines(graph, cluster, pair.ranks, pair.micro_batches, search, pair.chunks)
        took_s = time.perf_counter() - begun
    fastest = min(best, key=lambda one: order(one, cluster), default=None)
    return Choice(fastest, impossible, unlikely, modelled, left, timed_out)


def _pair(
    promise: Promise, cluster: Cluster, ranks: int, micro_batches: int, chunks: tuple[int, ...]
) -> _Pair:
    inside = inside_of(cluster, ranks)
    possible = tuple(
        number
        for number in chunks
        if number == 1
        or (
            micro_batches % ranks == 0
            and number * ranks <= promise.places
            and 2 * number * ranks * micro_batches <= MAX_TASKS
        )
    )
    least_s = [promise.least_s(ranks, micro_batches, number, inside) for number in possible]
    about_s = [
        promise.about_s(
            ranks,
            micro_batches,
            number,
            inside,
            functools.partial(send_s, cluster, ranks),
        )
        for number in possible
    ]
    shortest = min(least_s, default=math.inf), min(about_s, default=math.inf)
    return _Pair(ranks, micro_batches, possible, *shortest)


def _guessed_s(promise: Promise, pair: _Pair, cluster: Cluster) -> float:
    """What a pair may take, if the graph of the whole batch is cut as that of a micro-batch."""
    guess = promise.guess(pair.micro_batches, inside_of(cluster, pair.ranks))
    least_s = math.inf
    for number in pair.chunks:
        schedule = interleaved(pair.ranks, number, pair.micro_batches)
        try:
            stages = cut_for(schedule, promise.graph, cluster, guess)
        except UserError:
            continue
        least_s = min(least_s, step_of(stages, schedule, cluster, guess).step_s)
    return least_s


def _modelled_best(
    pair: _Pair, graph: Graph, cluster: Cluster, search: Inside, known: Known | None
) -> Candidate | None:
    """The best of a pair, as far as known ways to split it go; see `choose`."""
    ways: list[Inside] = [search]
    if known is not None:
        ways = [_given(way) for way in known(graph, inside_with_memory(cluster, pair.ranks))]
    found: list[Candidate] = []
    for way in ways:
        if not any(one.fits for one in found):
            found += pipelines(graph, cluster, pair.ranks, pair.micro_batches, way, pair.chunks)
    return min(found, key=lambda one: order(one, cluster), default=None)


def _given(assignment: Assignment) -> Inside:
    return lambda *_: assignment
