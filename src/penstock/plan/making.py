"""From a captured step and a cluster to its plan: the search, what a rank holds, and the words.

    search ──► assignment ──► rank 0's program ──► memory ──► does it fit?
       ▲                                                        │ no
       └── with forward run again in backward, cheapest first ◄─┘

The rank with most has its parts at the ends of uneven cuts, which are largest at the last one: so
memory is that of the last rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from penstock.errors import NetworkError
from penstock.model.graph import Graph, Node
from penstock.plan.assignment import Assignment, Change
from penstock.plan.costs.hardware import Cluster
from penstock.plan.costs.operators import flops
from penstock.plan.layout import in_words, largest_shape
from penstock.plan.memory.footprint import footprint
from penstock.plan.memory.liveness import pack
from penstock.plan.memory.recompute import AGAIN, Recomputation
from penstock.plan.memory.shortage import Remedy, Shortage, recomputed, smaller_batch
from penstock.plan.pipelines.inside import Insides
from penstock.plan.pipelines.model import Candidate, inside_of
from penstock.plan.pipelines.search import SEARCHED, choose
from penstock.plan.pipelines.stages import crossing_bytes
from penstock.plan.programs.lower import lower
from penstock.plan.rules.signatures import has_rule
from penstock.plan.search.pins import Pins
from penstock.plan.search.price import ClusterPrices, Price
from penstock.plan.search.search import GAP, TIME_LIMIT_S, Found, Search
from penstock.plan.step import Layer, Memory, Route, Stages, StepPlan, Times
from penstock.plan.words import in_bytes, in_time

POINTS = 240
"""Of a memory timeline that is written down."""
TRIES = 4
"""Budgets that are tried for what runs again."""
PIPELINES_SHARE = 0.5
"""Of the time limit of the search, what pipelines may have beside it."""


def plan_step(
    graph: Graph,
    cluster: Cluster,
    *,
    network: str = "network",
    batch: int = 0,
    sizes: Sequence[int] | None = None,
    pins: Pins | None = None,
    gap: float = GAP,
    time_limit_s: float = TIME_LIMIT_S,
    at_batch: Callable[[int], Graph] | None = None,
) -> StepPlan:
    """Decides how a step is split.

    Arguments:
        graph: the captured step.
        network, batch: its name and examples, for people.
        sizes: of the mesh's axes; those of the cluster.
        pins: what has been decided about parameters; see `pins`.
        gap, time_limit_s: of the search.
        at_batch: the graph of a step of so many examples, to say what batch would fit.

    Raises:
        JobError: a pin is not possible.
        NetworkError: no plan fits into the memory of a device; says what would.
    """
    search = Search(graph, cluster, sizes, pins=pins)
    found = search.find(gap=gap, time_limit_s=time_limit_s)
    prices = search.prices
    assert isinstance(prices, ClusterPrices)
    options = {"sizes": sizes, "pins": pins, "gap": gap, "time_limit_s": time_limit_s}
    peak_at = None if at_batch is None else functools.partial(_peak_at, at_batch, cluster, options)
    split = _Split(graph, found.assignment, cluster, prices)
    split = _fitting(split, found.price.step_s, batch, peak_at)
    times = _times(found.price)
    notes = [*_of_search(found), *split.notes()]
    return StepPlan(
        network=network,
        batch=batch,
        graph=graph.fingerprint,
        cluster=cluster,
        assignment=split.assignment,
        origin=found.origin,
        times=replace(
            times,
            step_s=times.step_s + split.again_s,
            compute_s=times.compute_s + split.again_s,
            peak_bytes=split.lifetimes.peak_bytes,
        ),
        beside={name: _times(priced) for name, (_, priced) in found.presets.items()},
        layers=split.layers(),
        routes=split.routes(),
        memory=split.memory(),
        recomputed=split.recomputed,
        notes=tuple(notes),
    )


def _peak_at(
    at_batch: Callable[[int], Graph], cluster: Cluster, options: dict[str, Any], batch: int
) -> int | None:
    try:
        return plan_step(at_batch(batch), cluster, **options).times.peak_bytes
    except NetworkError:
        return None


def plan_pipeline(
    capture_at: Callable[[int], Graph],
    cluster: Cluster,
    batch: int,
    *,
    beside: StepPlan | None = None,
    network: str = "network",
    pins: Pins | None = None,
    gap: float = GAP,
    time_limit_s: float = TIME_LIMIT_S,
) -> StepPlan | None:
    """Decides whether a step is better cut into the stages of a pipeline, and how.

    Arguments:
        capture_at: the graph of a step of so many examples.
        batch: examples of a step, cut into micro-batches.
        beside: the plan without a pipeline, if one fits.
        time_limit_s: of all of it, about; `PIPELINES_SHARE` of it, if there is a plan already.

    Returns:
        The best pipeline, if one fits and takes less than `beside`; else that plan, with a note of
        what was looked at; None if there is neither.
    """
    if beside is not None:
        why = _without_pipelines(capture_at(batch), pins)
        if why:
            return replace(beside, notes=(*beside.notes, f"no pipeline was tried: {why}"))
        time_limit_s *= PIPELINES_SHARE

    limit_s = time_limit_s / (2 * SEARCHED)
    insides = Insides(capture_at, batch, pins=pins, gap=gap, time_limit_s=limit_s)
    below_s = math.inf if beside is None else beside.times.step_s
    choice = choose(
        insides.micro_batch,
        cluster,
        batch,
        insides.searched,
        known=insides.known,
        below_s=below_s,
        time_limit_s=time_limit_s,
    )
    found = choice.best
    if found is None or not found.fits or found.step_s >= below_s:
        if beside is None:
            return None
        return replace(beside, notes=(*beside.notes, f"no pipeline is faster: {choice.words}"))
    part = inside_of(cluster, found.sizes[0])
    prices = ClusterPrices(found.graph, part, part.mesh)
    split = _Split(found.graph, found.assignment, part, prices)
    compute_s, exchange_s = split.times_in(found)
    return StepPlan(
        network=network,
        batch=batch,
        graph=found.graph.fingerprint,
        cluster=cluster,
        assignment=found.assignment,
        origin="pipeline",
        times=Times(
            found.step_s,
            compute_s,
            exchange_s,
            found.exposed_s,
            int(max(found.held_bytes)),
        ),
        beside={} if beside is None else {"without a pipeline": beside.times, **beside.beside},
        layers=split.layers(),
        routes=split.routes(),
        stages=Stages(
            number=found.sizes[0],
            chunks=found.schedule.chunks,
            micro_batches=found.micro_batches,
            cuts=found.stages.cuts,
            bubble=found.bubble,
            timeline=tuple(
                tuple(
                    (span.task.micro_batch, span.task.direction, span.start_s, span.end_s)
                    for span in rank
                )
                for rank in found.timeline.ranks
            ),
        ),
        notes=(_of_pipeline(found, beside), choice.words, *split.notes()),
    )


def _without_pipelines(graph: Graph, pins: Pins | None) -> str:
    """Why a step that fits is not cut into micro-batches unasked; nothing if it may be."""
    if pins:
        return "pins are of the whole mesh"
    for output in graph.outputs:
        computed = output.role == "buffer" and output.name in graph.producer
        if computed and graph.specs[output.name].dtype.is_floating_point:
            return f"{output.target} is of the whole batch, and would be of a micro-batch"
    return ""


def _of_pipeline(found: Candidate, beside: StepPlan | None) -> str:
    """Why it is a pipeline."""
    sent = [max(both) for both in crossing_bytes(found.stages)]
    of = (
        f"a pipeline: {found.micro_batches} micro-batches send at most {in_bytes(max(sent))} over "
        f"a cut each way, and ranks wait {found.bubble:.0%} of a step"
    )
    if beside is None:
        return f"{of}; without one no plan fits"
    times = beside.times
    waited = in_time(times.exchange_s + times.exposed_s)
    return f"{of}; without one {waited} of {in_time(times.step_s)} are exchanges not hidden"


def _times(found: Price) -> Times:
    return Times(found.step_s, found.compute_s, found.exchange_s, found.exposed_s)


def _of_search(found: Found) -> list[str]:
    best = min(found.presets.values(), key=lambda one: one[1].step_s)[1].step_s
    words = [
        f"found in {found.seconds:.1f} s, at most {found.gap:.1%} above the best there is "
        f"(of {found.binaries:,} choices, for {found.classes:,} places that are unlike)"
    ]
    if found.timed_out:
        words.append("the time limit came before the search was done: a longer one may find better")
    if found.origin != "search":
        words.append(f"the known way {found.origin.replace('_', ' ')} is the best")
    elif best > found.price.step_s * 1.001:
        words.append(
            f"the best of the known ways takes {best / found.price.step_s:.2f} times as long"
        )
    return words


class _Split:
    """A graph in an assignment, and all that follows from it.

    Arguments:
        recomputed: forward nodes that run again in backward, where `graph` is that step.
        again_s: what they take.
    """

    def __init__(
        self,
        graph: Graph,
        assignment: Assignment,
        cluster: Cluster,
        prices: ClusterPrices,
        recomputed: tuple[str, ...] = (),
        again_s: float = 0.0,
    ) -> None:
        self.graph, self.assignment, self.cluster, self.prices = graph, assignment, cluster, prices
        self.recomputed, self.again_s = recomputed, again_s
        self._first = {n.name: n for n in graph.nodes if not n.name.endswith(AGAIN)}
        self._changes = list(assignment.ways(graph, prices.routes))
        last = math.prod(assignment.sizes) - 1
        (self._program,) = lower(graph, assignment, prices.routes, ranks=[last])
        self.lifetimes = footprint(self._program)

    @property
    def given_bytes(self) -> int:
        """Parameters, buffers, state and batch."""
        return sum(self._program.values[name].spec.num_bytes for name in self._program.inputs)

    def seconds(self, node: Node) -> float:
        """What a node takes on the rank with most of it; a second time as at the first."""
        first = self._first[node.name.removesuffix(AGAIN)]
        return self.prices.operator_s(first, self.assignment.nodes[first.name])

    def times_in(self, pipeline: Candidate) -> tuple[float, float]:
        """Of operators, and of exchanges that they wait for, each on the rank of the pipeline with
        most; of all micro-batches."""
        stages, schedule = pipeline.stages, pipeline.schedule
        compute_s, exchange_s = ([0.0] * len(schedule.ranks) for _ in range(2))

        def count(seconds: list[float], node: Node, once_s: float) -> None:
            if node.name not in stages.copied:
                times = pipeline.micro_batches if node.name in stages.repeated else 1
                seconds[schedule.rank_of(stages.of[node.name])] += times * once_s

        for node in self.graph.nodes:
            count(compute_s, node, self.seconds(node))
        for change in self._changes:
            if change.awaiting:
                count(exchange_s, change.awaiting[0], change.way.cost_s)
        return max(compute_s), max(exchange_s)

    def with_again(self, budget_bytes: int) -> _Split | None:
        """With so much of forward run again that a step should fit; None: not possible."""
        graph, sizes = self.graph, self.assignment.sizes
        specs = {
            name: replace(spec, shape=largest_shape(spec.shape, layout, sizes))
            for name, spec in graph.specs.items()
            for layout in [self.assignment.layout_of(graph, name)]
        }
        candidate = Recomputation(graph, self.seconds, specs).within(budget_bytes)
        if candidate is None:
            return None
        nodes = dict(self.assignment.nodes)
        for node in candidate.graph.nodes:
            if node.name not in nodes:
                nodes[node.name] = nodes[node.name.removesuffix(AGAIN)]
        return _Split(
            candidate.graph,
            replace(self.assignment, nodes=nodes),
            self.cluster,
            self.prices,
            tuple(sorted(candidate.names)),
            candidate.extra_s,
        )

    def notes(self) -> list[str]:
        """What a person should know of it."""
        told = []
        whole_s = sum(map(self.seconds, self.graph.nodes)) or 1.0
        unruled: dict[str, float] = {}
        for node in self.graph.nodes:
            if not has_rule(node.op):
                unruled[node.op] = unruled.get(node.op, 0.0) + self.seconds(node)
        for op, seconds in unruled.items():
            cost = f"{seconds / whole_s:.1%} of computing"
            told.append(f"{op} has no rule: every rank computes all of it, {cost}")
        if math.prod(self.assignment.sizes) > 1 and self.assignment.copies_all:
            told.append(
                "every rank computes all of it: on these links any exchange takes longer than what "
                "it saves"
            )
        if self.recomputed:
            told.append(
                f"{len(self.recomputed)} operators of forward run again in backward, so that a "
                f"step fits: {self.again_s / whole_s:.0%} more computing"
            )
        return told

    def layers(self) -> tuple[Layer, ...]:
        """A layer for each module that computes, in the order of forward."""
        graph = self.graph
        of: dict[str, list[Node]] = {}
        for node in graph.nodes:
            of.setdefault(node.module, []).append(node)
        parameters: dict[str, dict[str, tuple[str, str]]] = {}
        for item in graph.inputs:
            if item.role == "parameter":
                words = in_words(self.assignment.layout_of(graph, item.name))
                of.setdefault(item.target.rpartition(".")[0], [])
                parameters.setdefault(item.target.rpartition(".")[0], {})[item.target] = (
                    str(graph.specs[item.name]),
                    words,
                )
        exchanged: dict[str, list[Change]] = {}
        for change in self._changes:
            exchanged.setdefault(_module_of(change), []).append(change)
        return tuple(
            Layer(
                module,
                parameters.get(module, {}),
                sum(map(self.seconds, nodes)),
                sum(c.way.cost_s for c in exchanged.get(module, ()) if c.awaiting),
                sum(c.way.sent_bytes for c in exchanged.get(module, ())),
                self._splits(nodes),
            )
            for module, nodes in of.items()
        )

    def _splits(self, nodes: Sequence[Node]) -> str:
        """How the heaviest forward operator reads and gives: `[S0] x [B] -> [S0]`."""
        forward = [node for node in nodes if node.phase == "forward"] or list(nodes)
        if not forward:
            return ""
        specs = self.graph.specs
        node = max(forward, key=lambda n: (flops(n, specs), self.seconds(n)))
        reads = [in_words(self.assignment.read_as(self.graph, node, n)) for n in
                 range(len(node.inputs))]  # fmt: skip
        gives = next(name for name in node.outputs if name is not None)
        return f"{' x '.join(reads)} -> {in_words(self.assignment.layout_of(self.graph, gives))}"

    def routes(self) -> tuple[Route, ...]:
        """Everything that goes between ranks, in the order in which it is made."""
        return tuple(
            Route(
                change.tensor,
                _module_of(change),
                in_words(change.source),
                in_words(change.target),
                change.way.sent_bytes,
                change.way.cost_s,
                not change.awaiting,
            )
            for change in self._changes
            if change.way.sent_bytes
        )

    def memory(self) -> Memory:
        """What the rank with most holds."""
        lifetimes, peak = self.lifetimes, self.lifetimes.peak
        every = max(1, len(lifetimes.timeline) // POINTS)
        line = lifetimes.timeline
        return Memory(
            limit_bytes=int(self.cluster.device.memory_bytes),
            resident_bytes=self.given_bytes,
            peak_bytes=lifetimes.peak_bytes,
            arena_bytes=pack(lifetimes).arena_bytes,
            timeline=tuple(int(max(line[n : n + every])) for n in range(0, len(line), every)),
            largest=tuple(map(str, peak.storages[:8])),
        )


def _fitting(
    split: _Split, step_s: float, batch: int, peak_at: Callable[[int], int | None] | None
) -> _Split:
    """The split, with as much run again as memory asks for.

    Arguments:
        step_s, batch: of the step, for the words of an error.
        peak_at: what a rank holds at another batch, if it fits.

    Raises:
        NetworkError: there is not enough, whatever runs again.
    """
    limit = int(split.cluster.device.memory_bytes)
    least, budget = split, limit
    for _ in range(TRIES):
        if least.lifetimes.peak_bytes <= limit:
            return least
        found = split.with_again(budget)
        if found is None:
            break
        # What routes hold beside is not in the budget of the first try.
        budget -= max(found.lifetimes.peak_bytes - limit, limit // 100)
        if found.lifetimes.peak_bytes < least.lifetimes.peak_bytes:
            least = found
    if least.lifetimes.peak_bytes <= limit:
        return least
    remedies: list[Remedy | None] = []
    if least is not split:
        count, peak = len(least.recomputed), least.lifetimes.peak_bytes
        remedies.append(recomputed(count, peak, least.again_s, step_s, fits=False))
    if peak_at is not None:
        remedies.append(smaller_batch(batch, peak_at, limit))
    ordered = sorted((r for r in remedies if r is not None), key=lambda remedy: not remedy.fits)
    raise Shortage(limit, split.lifetimes.peak, split.given_bytes, tuple(ordered)).error()


def _module_of(change: Change) -> str:
    """Of the first that reads it; of the parameter whose new value it is."""
    if change.consumers:
        return change.consumers[0].module
    return change.outputs[0].target.partition("/")[0].rpartition(".")[0]
