"""The cut of a step into the stages of a pipeline: which stage each operator and parameter is of.

Forward operators, in the graph's order, are cut into contiguous stages so that

    minimize  max over stages of  seconds(forward and backward of the stage) + sends at its two ends

and, of the cuts within `SLACK` of that, what is sent least (`cut`). A cut never goes through what
autograd has recorded as one call, so that a backward operator is of the stage of the forward
operators that it is the backward of. `Stages` has what follows from the cuts:

    repeated    what depends on the batch, the seed or buffers that change: once a micro-batch
    copied      what depends on constants, counters and learning rates alone, and views of
                parameters: each stage computes it for itself, once a step
    late        updates, and sums of gradients from several stages: once, behind all micro-batches
    the rest    what depends on parameters alone: once a step, on its stage

A parameter used by several stages lives in the first of them; the others get its value once a step
and send what they have added up of its gradient, once a step.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.errors import PlanError, UserError
from penstock.model.graph import Graph, Input, Node, Ref
from penstock.plan.memory.liveness import source_of

SLACK = 0.02
"""By so much of the slowest stage a cut may be worse that sends less."""
MAX_PLACES = 1024
"""Where a graph may be cut, at most: of more, the best of each stretch are looked at."""
_Seconds = NDArray[np.float64]
_Bytes = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stages:
    """A graph cut into stages.

    Arguments:
        graph: of a step; its batch is one micro-batch.
        cuts: names of the first forward node of each stage but the first.

    Raises:
        PlanError: a cut is of no forward node, or they are not in order.
    """

    graph: Graph
    cuts: tuple[str, ...]

    def __post_init__(self) -> None:
        order = [name for name in self._places if name in self.cuts]
        if order != list(self.cuts) or (order and self._places[order[0]] == 0):
            raise PlanError(
                f"cuts at {', '.join(self.cuts)}, which are not forward nodes in the graph's order",
                hint="the plan is of another graph: plan again",
            )

    @property
    def count(self) -> int:
        """Of stages."""
        return len(self.cuts) + 1

    def lies_anywhere(self, item: Input) -> bool:
        """Whether every stage that reads an input is given it: the batch, scalars, constants."""
        return item.name not in self.home

    @functools.cached_property
    def repeated(self) -> frozenset[str]:
        """Nodes that run once a micro-batch."""
        return frozenset(_repeated(self.graph))

    @functools.cached_property
    def copied(self) -> frozenset[str]:
        """Nodes that each stage that reads them runs for itself."""
        return frozenset(_copied(self.graph, self.repeated))

    @functools.cached_property
    def late(self) -> frozenset[str]:
        """Nodes that run when all micro-batches have run."""
        graph, outputs = self.graph, {output.name for output in self.graph.outputs}
        found = {node.name for node in graph.nodes if node.phase == "update"}
        origins: dict[str, set[int]] = {}
        for node in graph.nodes:
            makers = [graph.producer[n][0].name for n in node.inputs if n in graph.producer]
            if node.phase == "backward" and _is_sum(node) and len(makers) == 2:
                origins[node.name] = origins[makers[0]] | origins[makers[1]]
            elif node.phase != "update":
                origins[node.name] = {self._running[node.name]}
        for node in reversed(graph.nodes):
            readers = graph.consumers.get(node.name, ())
            if (
                node.phase == "backward"
                and _is_sum(node)
                and node.name in self.repeated
                and (readers or node.name in outputs)
                and found.issuperset(reader.name for reader in readers)
                and len(origins[node.name]) > 1
            ):
                found.add(node.name)
        return frozenset(found)

    @functools.cached_property
    def home(self) -> Mapping[str, int]:
        """The stage of inputs that have one: parameters, their state, buffers that change."""
        found: dict[str, int] = {}
        renewed = _renewed_buffers(self.graph)
        for item in self.graph.inputs:
            if item.role == "parameter":
                found[item.name] = min(self._readers[item.name], default=0)
            elif item.role == "buffer" and item.name in renewed:
                made, _ = self.graph.producer[renewed[item.name]]
                found[item.name] = min(self._readers[item.name] | {self._running[made.name]})
        for item in self.graph.inputs:
            parameter = item.target.rpartition("/")[0]
            if item.role == "state" and parameter in found:
                found[item.name] = found[parameter]
        return found

    @functools.cached_property
    def of(self) -> Mapping[str, int]:
        """The stage of each node that is not copied."""
        found = dict(self._running)
        towards = self._destinations()
        for node in self.graph.nodes:
            if node.name not in self.late or node.name in self.copied:
                continue
            if len(towards[node.name]) == 1:
                (found[node.name],) = towards[node.name]
                continue
            # What many read is made where the last of what it reads is: a norm goes down the line.
            given = [self.home[name] for name in node.inputs if name in self.home]
            makers = [self.graph.producer[n][0] for n in node.inputs if n in self.graph.producer]
            given += [found[maker.name] for maker in makers if maker.name in found]
            found[node.name] = max(given, default=0)
        return {name: stage for name, stage in found.items() if name not in self.copied}

    @functools.cached_property
    def _places(self) -> Mapping[str, int]:
        return {node.name: number for number, node in enumerate(_forward(self.graph))}

    @functools.cached_property
    def _running(self) -> Mapping[str, int]:
        """The stage of each node of forward and backward."""
        starts = [self._places[name] for name in self.cuts]
        found = {name: bisect.bisect(starts, place) for name, place in self._places.items()}
        calls: dict[int, int] = {}
        for node in _forward(self.graph):
            calls[node.call] = max(calls.get(node.call, 0), found[node.name])
        for node in self.graph.nodes:
            if node.phase != "backward":
                continue
            makers = [self.graph.producer[n][0] for n in node.inputs if n in self.graph.producer]
            behind = [
                found[maker.name]
                for maker in makers
                if maker.phase == "backward" and maker.name in self.repeated
            ]
            before = [found[maker.name] for maker in makers if maker.phase == "forward"]
            own = calls.get(node.call) if node.call else None
            if own is None:
                own = min(behind, default=max(before, default=self.count - 1))
            # Gradients go down the stages alone, or two would wait for one another.
            found[node.name] = min([own, *behind])
        return found

    @functools.cached_property
    def _readers(self) -> Mapping[str, set[int]]:
        """Of each input, the stages that read it in forward and backward."""
        found: dict[str, set[int]] = {item.name: set() for item in self.graph.inputs}
        copies: dict[str, set[int]] = {}
        for node in reversed(self.graph.nodes):
            if node.name in self.copied:
                stages = copies.get(node.name, set())
            elif node.name in self.late:
                continue
            else:
                stages = {self._running[node.name]}
            for name in node.inputs:
                if name in found:
                    found[name] |= stages
                elif self.graph.producer[name][0].name in self.copied:
                    copies.setdefault(self.graph.producer[name][0].name, set()).update(stages)
        return found

    def _destinations(self) -> dict[str, set[int]]:
        """Of each late node, the stages that keep what comes of it."""
        given: dict[str, set[int]] = {}
        for output in self.graph.outputs:
            role = "parameter" if output.role == "gradient" else output.role
            if role in ("parameter", "state", "buffer"):
                name = self.graph.input(role, output.target).name
                if name in self.home:
                    given.setdefault(output.name, set()).add(self.home[name])
        found: dict[str, set[int]] = {}
        for node in reversed(self.graph.nodes):
            if node.name in self.late:
                results = [name for name in node.outputs if name is not None]
                readers = {r.name for name in results for r in self.graph.consumers.get(name, ())}
                found[node.name] = set().union(
                    *(given.get(name, set()) for name in results),
                    *(found.get(reader, set()) for reader in readers),
                )
        return found


def cut(
    graph: Graph,
    count: int,
    seconds: Callable[[Node], float],
    send_s: Callable[[float], float],
    num_bytes: Callable[[str], float] | None = None,
) -> Stages:
    """Cuts a graph into stages of about equal time.

    Arguments:
        graph: of a step; its batch is one micro-batch.
        count: of stages.
        seconds: that a node takes.
        send_s: that so many bytes take from a rank to the next.
        num_bytes: of a tensor, what a rank sends of it; all of it if None.

    Raises:
        UserError: there are fewer places to cut than asked for.
    """
    if count == 1:
        return Stages(graph, ())
    places, crossing_s, until_s = _places_to_cut(
        graph, seconds, send_s, _crossing(graph, num_bytes)
    )
    if len(places) < count + 1:
        raise UserError(
            f"a network of {len(places) - 1} steps that can be told apart, in {count} stages",
            hint="fewer stages",
        )
    spans = until_s[None, :] - until_s[:, None] + crossing_s[:, None] + crossing_s[None, :]
    spans[np.tril_indices(len(places))] = np.inf
    least = _best(count, lambda so_far: np.maximum(so_far[:, None], spans))[-1][0][-1]
    sends = np.where(spans <= least * (1 + SLACK), crossing_s[None, :], np.inf)
    rows = _best(count, lambda so_far: so_far[:, None] + sends)
    end, chosen = len(places) - 1, []
    for _, before in reversed(rows[1:]):
        end = int(before[end])
        chosen.append(places[end])
    forward = _forward(graph)
    return Stages(graph, tuple(forward[place].name for place in reversed(chosen)))


def crossing_bytes(
    stages: Stages, num_bytes: Callable[[str], float] | None = None
) -> tuple[tuple[float, float], ...]:
    """By cut, bytes that go over it in forward, and in backward, for each micro-batch.

    Arguments:
        num_bytes: of a tensor, what a rank sends of it; all of it if None.
    """
    sent = _crossing(stages.graph, num_bytes)
    places = {node.name: place for place, node in enumerate(_forward(stages.graph))}
    return tuple((float(a), float(b)) for a, b in (sent[:, places[name]] for name in stages.cuts))


def _best(
    count: int, extended: Callable[[_Seconds], _Seconds]
) -> list[tuple[_Seconds, NDArray[np.intp]]]:
    """By number of stages, for each place to end at, the least, and the place before."""
    matrix = extended(np.array([0.0]))
    size = matrix.shape[1]
    start = np.full(size, np.inf)
    start[0] = 0.0
    rows = []
    for _ in range(count):
        matrix = extended(start)
        before = matrix.argmin(axis=0)
        start = matrix[before, np.arange(size)]
        rows.append((start, before))
    return rows


def _places_to_cut(
    graph: Graph,
    seconds: Callable[[Node], float],
    send_s: Callable[[float], float],
    sent: _Bytes,
) -> tuple[list[int], _Seconds, _Seconds]:
    """Places (a cut at n is before the forward node n), what a micro-batch sends over a cut there,
    forward and back, and the seconds of all before it; the two ends are among the places."""
    forward = _forward(graph)
    spans: dict[int, tuple[int, int]] = {}
    for place, node in enumerate(forward):
        first, _ = spans.get(node.call, (place, place))
        spans[node.call] = first, place
    taken = np.zeros(len(forward) + 1, bool)
    for call, (first, last) in spans.items():
        if call:
            taken[first + 1 : last + 1] = True
    own = np.zeros(len(forward) + 1)
    for place, node in enumerate(forward):
        own[place + 1] += seconds(node)
    for node in graph.nodes:
        if node.phase == "backward" and node.call in spans:
            own[spans[node.call][0] + 1] += seconds(node)
    places = [0, *(p for p in range(1, len(forward)) if not taken[p]), len(forward)]
    costs = [sum(send_s(float(b)) for b in sent[:, p] if b) for p in places]
    if len(places) > MAX_PLACES:
        groups = np.array_split(np.arange(1, len(places) - 1), MAX_PLACES - 2)
        kept = [0, *(min(g.tolist(), key=costs.__getitem__) for g in groups), len(places) - 1]
        places, costs = [places[k] for k in kept], [costs[k] for k in kept]
    return places, np.array(costs), np.cumsum(own)[places]


def _crossing(graph: Graph, num_bytes: Callable[[str], float] | None) -> _Bytes:
    """Of a cut at each place, the bytes that go over it in forward, and in backward."""
    found = np.zeros((2, len(_forward(graph)) + 1))
    for name, (first, last) in _lives(graph).items():
        spec = graph.specs[name]
        size = spec.num_bytes if num_bytes is None else num_bytes(name)
        found[0, first + 1 : last + 1] += size
        found[1, first + 1 : last + 1] += size if spec.dtype.is_floating_point else 0
    return found


def _lives(graph: Graph) -> dict[str, tuple[int, int]]:
    """Of each tensor that a cut may have to send, the forward node that makes it, and the last at
    which it is read, there or in that one's backward."""
    forward = _forward(graph)
    repeated = set(_repeated(graph))
    copied = set(_copied(graph, repeated))
    place_of = {node.name: place for place, node in enumerate(forward)}
    calls = {node.call: place for place, node in enumerate(forward)}
    found: dict[str, tuple[int, int]] = {}
    for name, (maker, _) in graph.producer.items():
        if maker.phase != "forward" or maker.name in copied or maker.name not in repeated:
            continue
        places = [
            place_of[node.name] if node.phase == "forward" else calls.get(node.call, 0)
            for node in graph.consumers.get(name, ())
            if node.phase != "update"
        ]
        found[name] = place_of[maker.name], max(places, default=0)
    return found


def _forward(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.phase == "forward"]


def _renewed_buffers(graph: Graph) -> dict[str, str]:
    """By input, the tensor that takes its place."""
    return {
        graph.input("buffer", output.target).name: output.name
        for output in graph.outputs
        if output.role == "buffer" and output.name in graph.producer
    }


def _repeated(graph: Graph) -> set[str]:
    """See `Stages.repeated`."""
    tensors = {item.name for item in graph.inputs if item.role == "data"}
    tensors |= {
        item.name for item in graph.inputs if (item.role, item.target) == ("scalar", "seed")
    }
    tensors |= set(_renewed_buffers(graph))
    found: set[str] = set()
    for node in graph.nodes:
        if node.phase != "update" and not tensors.isdisjoint(node.inputs):
            found.add(node.name)
            tensors |= {name for name in node.outputs if name is not None}
    return found


def _copied(graph: Graph, repeated: set[str] | frozenset[str]) -> set[str]:
    """See `Stages.copied`."""
    parameters = {item.name for item in graph.inputs if item.role == "parameter"}
    kept = set(_renewed_buffers(graph))
    free = {
        item.name
        for item in graph.inputs
        if item.role in ("constant", "scalar")
        or (item.role == "buffer" and item.name not in kept)
        or (item.role == "state" and item.target.rpartition("/")[0] not in parameters)
    }
    views = set(parameters)
    found: set[str] = set()
    for node in graph.nodes:
        given = {name for name in node.outputs if name is not None}
        if node.name in repeated:
            continue
        if free.issuperset(node.inputs):
            found.add(node.name)
            free |= given
        elif views.issuperset(node.inputs) and source_of(node) is not None:
            found.add(node.name)
            views |= given
    return found


def _is_sum(node: Node) -> bool:
    return (
        node.op == "aten.add.Tensor"
        and not node.kwargs
        and len(node.args) == 2
        and all(isinstance(value, Ref) for value in node.args)
    )
