"""What a pipeline takes and holds, and how it is cut: `pipelines`.

For p ranks of the pipeline, contiguous blocks of the cluster's ranks, each a smaller cluster of its
own, and k micro-batches, the graph at batch / k is split inside by the search as any other is, and
cut into p v stages by time under that split. Then (`_modelled`)

    step = once + the schedule's time + exposed gradients + updates         of the slowest rank
    stage's forward, backward = its operators + the exchanges that they wait for
    held = parameters, state, buffers, sums of gradients of the rank's stages
           + what backward reads of a micro-batch, by stage, for as many as are in flight there

with `schedule.simulate` for the schedule's time, in which sends go on beside computing but are
waited for: latency + the bytes that cross a cut / the link's rate (of a host's link, its devices'
together). Gradients are exchanged when they have been added up: what of it does not fit beside the
last micro-batch's backward is exposed. `held` counts as `cells.held_bytes` does: as if all were
held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from penstock.errors import UserError
from penstock.model.graph import Graph, Node
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster
from penstock.plan.memory.liveness import roots
from penstock.plan.pipelines.schedule import Schedule, Timeline, interleaved, simulate
from penstock.plan.pipelines.stages import Stages, crossing_bytes, cut
from penstock.plan.search.cells import held_bytes
from penstock.plan.search.price import ClusterPrices

CHUNKS = (1, 2)

Inside = Callable[[Graph, Cluster], Assignment]
"""How a graph is split on a cluster, whose device has the memory that it may use."""


@dataclass(frozen=True)
class NodeTimes:
    """What the nodes of a graph take.

    Arguments:
        seconds: of an operator, and of the exchanges that it waits for in each micro-batch.
        num_bytes: of a tensor's largest part.
        late: of each tensor that only updates read in another layout, the seconds of its way.
        once: by name of a node, the seconds of ways of what is given that it is the first to wait
            for.
    """

    seconds: Callable[[Node], float]
    num_bytes: Callable[[str], float]
    late: Mapping[str, float]
    once: Mapping[str, float]


class Step(NamedTuple):
    """What a pipeline takes: see `Candidate`."""

    timeline: Timeline
    step_s: float
    exposed_s: float


@dataclass(frozen=True, eq=False)
class Candidate:
    """A pipeline, and what is predicted of it.

    Arguments:
        micro_batches: that the batch is cut into.
        sizes: of the mesh: ranks of the pipeline, and the mesh inside a stage.
        graph: of a micro-batch.
        assignment: of it, over the mesh inside a stage.
        stages, schedule: of the pipeline.
        timeline: of the schedule, without what is once a step.
        step_s: of the whole.
        exposed_s: of the exchange of gradients, what is not hidden on the slowest rank.
        held_bytes: of each rank of the pipeline, on its rank with most.
        fits: whether that is within the memory of a device.
    """

    micro_batches: int
    sizes: tuple[int, ...]
    graph: Graph
    assignment: Assignment
    stages: Stages
    schedule: Schedule
    timeline: Timeline
    step_s: float
    exposed_s: float
    held_bytes: tuple[float, ...]
    fits: bool

    @property
    def bubble(self) -> float:
        """Of the schedule, the share in which a rank waits, in the mean of all."""
        ranks = range(len(self.schedule.ranks))
        return sum(map(self.timeline.idle_share, ranks)) / len(ranks)


def pipelines(
    graph: Graph,
    cluster: Cluster,
    ranks: int,
    micro_batches: int,
    search: Inside,
    chunks: tuple[int, ...] = CHUNKS,
) -> Iterator[Candidate]:
    """The pipelines of so many ranks, one for each number of chunks that there can be.

    Arguments:
        graph: of a micro-batch.
    """
    inside = inside_of(cluster, ranks)
    assignment = search(graph, inside_with_memory(cluster, ranks))
    prices = ClusterPrices(graph, inside, inside.mesh)
    times = _times(graph, assignment, prices)
    for number in chunks:
        if number > 1 and micro_batches % ranks:
            continue
        schedule = interleaved(ranks, number, micro_batches)
        try:
            stages = cut_for(schedule, graph, cluster, times)
        except UserError:
            continue
        yield _modelled(stages, schedule, assignment, cluster, times)


def cut_for(schedule: Schedule, graph: Graph, cluster: Cluster, times: NodeTimes) -> Stages:
    """A micro-batch's graph, cut into the stages of a schedule.

    Raises:
        UserError: there are fewer places to cut than asked for.
    """
    ranks = len(schedule.ranks)
    return cut(
        graph,
        schedule.stages,
        times.seconds,
        lambda num_bytes: send_s(cluster, ranks, num_bytes),
        times.num_bytes,
    )


def stage_counts(cluster: Cluster) -> tuple[int, ...]:
    """Numbers of ranks of a pipeline: whole hosts in each stage, or parts of one host."""
    found = {n for n in range(2, cluster.hosts + 1) if cluster.hosts % n == 0}
    devices = cluster.devices
    found |= {cluster.hosts * n for n in range(2, devices + 1) if devices % n == 0}
    return tuple(sorted(found))


def inside_of(cluster: Cluster, ranks: int) -> Cluster:
    """The cluster of one stage.

    Raises:
        UserError: the ranks divide neither the hosts nor the devices of each.
    """
    if cluster.hosts % ranks == 0:
        return replace(cluster, hosts=cluster.hosts // ranks)
    parts, rest = divmod(ranks, cluster.hosts)
    if rest or cluster.devices % parts:
        raise UserError(
            f"{ranks} stages on {cluster.hosts} hosts of {cluster.devices} devices",
            hint=f"stages of equal clusters: {', '.join(map(str, stage_counts(cluster)))}",
        )
    return replace(cluster, hosts=1, devices=cluster.devices // parts)


def inside_with_memory(cluster: Cluster, ranks: int) -> Cluster:
    """The cluster of one stage, as it is split: what a search counts as held is that of all."""
    device = replace(cluster.device, memory_bytes=cluster.device.memory_bytes * ranks)
    return replace(inside_of(cluster, ranks), device=device)


def send_s(cluster: Cluster, ranks: int, num_bytes: float, sender: int | None = None) -> float:
    """Seconds from the devices of a stage to those of the next, for so many bytes of each.

    Arguments:
        ranks: of the pipeline.
        sender: of them, the one before the cut; None: one whose next is on another host, if any is.
    """
    stages_of_host = max(1, ranks // cluster.hosts)
    link, sharing = cluster.near, 1
    if cluster.hosts > 1 and (sender is None or (sender + 1) % stages_of_host == 0):
        link, sharing = cluster.far, inside_of(cluster, ranks).devices
    return link.latency_s + link.message_s + num_bytes * sharing / link.bytes_per_s


def _times(graph: Graph, assignment: Assignment, prices: ClusterPrices) -> NodeTimes:
    """Under an assignment."""
    late: dict[str, float] = {}
    once: dict[str, float] = {}
    ways: dict[str, float] = {}
    for change in assignment.ways(graph, prices.routes):
        readers = change.awaiting
        if not readers:
            late[change.tensor] = late.get(change.tensor, 0.0) + change.way.cost_s
        elif change.tensor in graph.producer:
            ways[readers[0].name] = ways.get(readers[0].name, 0.0) + change.way.cost_s
        else:
            once[readers[0].name] = once.get(readers[0].name, 0.0) + change.way.cost_s

    def seconds(node: Node) -> float:
        own_s = prices.operator_s(node, assignment.nodes[node.name])
        return own_s + ways.get(node.name, 0.0)

    def num_bytes(name: str) -> float:
        layout = assignment.layout_of(graph, name)
        return held_bytes(graph.specs[name], layout, assignment.sizes)

    return NodeTimes(seconds, num_bytes, late, once)


def _modelled(
    stages: Stages, schedule: Schedule, assignment: Assignment, cluster: Cluster, times: NodeTimes
) -> Candidate:
    """What a pipeline takes and holds; see the module.

    Arguments:
        assignment: of the stages' graph, inside a stage.
        cluster: the whole.
        times: of nodes.
    """
    held = _held(stages, schedule, times.num_bytes)
    return Candidate(
        schedule.micro_batches,
        (len(schedule.ranks), *assignment.sizes),
        stages.graph,
        assignment,
        stages,
        schedule,
        *step_of(stages, schedule, cluster, times),
        held,
        max(held) <= cluster.device.memory_bytes,
    )


def step_of(stages: Stages, schedule: Schedule, cluster: Cluster, times: NodeTimes) -> Step:
    """What a pipeline takes; see the module."""
    graph, ranks = stages.graph, len(schedule.ranks)
    running = {"forward": [0.0] * stages.count, "backward": [0.0] * stages.count}
    once, updates, late = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    for node in graph.nodes:
        if node.name in stages.copied:
            continue
        stage, own = stages.of[node.name], times.seconds(node)
        rank = schedule.rank_of(stage)
        once[rank] += times.once.get(node.name, 0.0)
        late[rank] += sum(times.late.get(name, 0.0) for name in node.outputs if name is not None)
        if node.name in stages.late:
            updates[rank] += own
        elif node.name in stages.repeated:
            running[node.phase][stage] += own
        else:
            once[rank] += own
    sends = [
        send_s(cluster, ranks, max(both), schedule.rank_of(stage))
        for stage, both in enumerate(crossing_bytes(stages, times.num_bytes))
    ]
    timeline = simulate(schedule, running["forward"], running["backward"], [*sends, 0.0])
    ends = []
    for rank in range(ranks):
        hides_s = sum(running["backward"][stage] for stage in schedule.stages_of(rank))
        exposed_s = max(0.0, late[rank] - hides_s)
        ends.append((timeline.end_s(rank) + exposed_s + updates[rank], exposed_s))
    end_s, exposed_s = max(ends)
    return Step(timeline, end_s + max(once), exposed_s)


def _held(
    stages: Stages, schedule: Schedule, num_bytes: Callable[[str], float]
) -> tuple[float, ...]:
    """By rank of the pipeline; see the module."""
    graph, root = stages.graph, roots(stages.graph)
    always = [0.0] * len(schedule.ranks)
    read: dict[tuple[str, int], bool] = {}  # of a stage, a value that backward reads there
    for name, stage in stages.home.items():
        always[schedule.rank_of(stage)] += num_bytes(name)
    data = {item.name for item in graph.inputs if item.role == "data"}
    for node in graph.nodes:
        if node.name not in stages.of:
            continue
        stage = stages.of[node.name]
        for name in node.inputs:
            if name in data:
                read[name, stage] = False
            maker = graph.producer.get(root[name])
            if node.phase == "backward" and maker and maker[0].phase == "forward":
                read[root[name], stage] = maker[0].name in stages.repeated
    for name in {name for node in graph.nodes if node.phase == "update" for name in node.inputs}:
        if name in graph.producer and graph.producer[name][0].phase == "backward":
            maker = graph.producer[name]
            always[schedule.rank_of(stages.of.get(maker[0].name, 0))] += num_bytes(name)
    by_stage = [0.0] * stages.count
    for (name, stage), is_in_flight in read.items():
        if is_in_flight:
            by_stage[stage] += num_bytes(name)
        else:
            times = schedule.micro_batches if name in data else 1
            always[schedule.rank_of(stage)] += num_bytes(name) * times
    return tuple(held + schedule.in_flight(rank, by_stage) for rank, held in enumerate(always))


def order(candidate: Candidate, cluster: Cluster) -> tuple[float, float]:
    """First what fits, by time; then what holds least."""
    over = max(0.0, max(candidate.held_bytes) - cluster.device.memory_bytes)
    return over, candidate.step_s
