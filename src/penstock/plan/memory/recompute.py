"""What of the forward pass is kept for backward, and what runs again when it is needed.

    minimize   extra_s                        of the operators that run a second time
    so that    peak_bytes <= budget           by liveness of the whole step (`liveness`)

`segments` has the mixtures to choose from, for long and short segments of the forward pass, each
from keeping all to keeping little. What each peaks at is computed, as it does not always fall; the
cheapest that fits is taken.

An operator runs at most once more, directly before the first that needs it, and gives the same
numbers to the bit: it is the same operator on the same tensors, and random numbers are by position.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from penstock.model.graph import Graph, Node, Ref, Spec, replaced
from penstock.plan.memory.liveness import in_place, roots, source_of
from penstock.plan.memory.scratch import scratch_bytes
from penstock.plan.memory.segments import Call, Stored, mixtures

AGAIN = "@again"
"""What follows the name of an operator that runs a second time."""
Seconds = Callable[[Node], float]
FEMTO = 10**15
"""Costs are counted in femtoseconds."""
STEPS = 16
"""Mixtures of one length of segments that a sweep looks at."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A choice of what runs again.

    Arguments:
        names: of the forward nodes that may run again; views do as they must.
        peak_bytes: of the step, with what is resident.
        extra_s: what running them again takes.
    """

    source: Graph
    names: frozenset[str]
    peak_bytes: int
    extra_s: float

    @functools.cached_property
    def graph(self) -> Graph:
        """The step with them in backward a second time; the step itself if there are none."""
        return again(self.source, self.names)


def again(graph: Graph, names: Collection[str]) -> Graph:
    """The same step, with nodes of forward run again in backward in place of keeping their results.

    Arguments:
        names: of nodes of forward. What a view shows runs again only if the view's source does.

    Returns:
        A graph in which no node of backward reads what those nodes have given, but that of
        `name@again`, which stands before the first that reads it. It gives the same, to the bit.
    """
    if not names:
        return graph
    nodes: list[Node] = []
    specs = dict(graph.specs)
    renamed: dict[str, str] = {}
    for node, second in _in_order(graph, frozenset(names)):
        if not second and node.phase == "forward":
            nodes.append(node)
            continue
        args, kwargs = replaced(
            (node.args, dict(node.kwargs)), lambda ref: Ref(renamed.get(ref.name, ref.name))
        )
        node = replace(node, args=args, kwargs=kwargs)
        if second:
            for name in filter(None, node.outputs):
                renamed[name] = node.name + AGAIN + name.removeprefix(node.name)
                specs[renamed[name]] = graph.specs[name]
            outputs = tuple(None if name is None else renamed[name] for name in node.outputs)
            name = node.name + AGAIN
            node = replace(node, name=name, outputs=outputs, phase="backward")
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes), specs=specs)


def _in_order(graph: Graph, names: frozenset[str]) -> Iterator[tuple[Node, bool]]:
    """The nodes with those that run again; whether it is the second time."""
    producer = graph.producer
    number = {node.name: n for n, node in enumerate(graph.nodes)}
    dropped: set[int] = set()  # whose results are not kept; views are as what they show
    for position, node in enumerate(graph.nodes):
        if node.phase != "forward":
            continue
        source = source_of(node)
        if source is None:
            drops = node.name in names
        else:
            drops = source in producer and number[producer[source][0].name] in dropped
        if drops:
            dropped.add(position)

    def needs(position: int) -> set[int]:
        makers = (
            number[producer[n][0].name] for n in graph.nodes[position].inputs if n in producer
        )
        return dropped.intersection(makers)

    ran: set[int] = set()
    for position, node in enumerate(graph.nodes):
        if node.phase != "forward":
            for again in _wanted(position, ran, needs):
                yield graph.nodes[again], True
        yield node, False


class _Step:
    """A graph in numbers: where its storages are made and read, views left out.

    Storages that instructions make are numbered; the second making of number s is s + `many`.
    """

    def __init__(
        self,
        graph: Graph,
        seconds: Seconds,
        specs: Mapping[str, Spec],
        scratch: Callable[[Node, Mapping[str, Spec]], int],
    ) -> None:
        root, places = roots(graph), in_place(graph)
        self.nodes = [node for node in graph.nodes if source_of(node) is None]
        self._forward = [node.phase == "forward" for node in self.nodes]
        self._number: dict[str, int] = {}
        self._maker: list[int] = []
        self._bytes: list[int] = []
        self._makes: list[list[int]] = []
        for position, node in enumerate(self.nodes):
            made = [name for name in node.outputs if name is not None and name not in places]
            self._makes.append(list(range(len(self._bytes), len(self._bytes) + len(made))))
            for name in made:
                self._number[name] = len(self._bytes)
                self._bytes.append(specs[name].num_bytes)
                self._maker.append(position)
        self._many = len(self._bytes)
        read = [dict.fromkeys(root[name] for name in node.inputs) for node in self.nodes]
        self._reads = [[self._number[n] for n in of if n in self._number] for of in read]
        self._scratch = [scratch(node, specs) for node in self.nodes]
        self._seconds = [seconds(node) if node.phase == "forward" else 0.0 for node in self.nodes]
        kept = {root[output.name] for output in graph.outputs}
        self._kept = [self._number[name] for name in kept if name in self._number]
        self._resident_bytes = sum(specs[item.name].num_bytes for item in graph.inputs)

    def calls(self) -> list[Call]:
        """Those of forward."""
        needed = {
            number
            for forward, reads in zip(self._forward, self._reads)
            if not forward
            for number in reads
        }
        free = {*self._kept}
        return [
            Call(
                position,
                tuple(
                    Stored(number, 0 if number in free else self._bytes[number], number in needed)
                    for number in self._makes[position]
                ),
                tuple(self._reads[position]),
                max(1, round(self._seconds[position] * FEMTO)),
            )
            for position, forward in enumerate(self._forward)
            if forward
        ]

    def measures(self, again: frozenset[int]) -> tuple[int, float]:
        """Peak in bytes, and extra seconds, if these nodes run again."""
        order = list(self._in_order(again))
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for at, (position, second) in enumerate(order):
            for number in self._makes[position]:
                number += self._many if second else 0
                first[number] = last[number] = at
            later = second or not self._forward[position]
            for number in self._reads[position]:
                last[number + self._many if later and self._maker[number] in again else number] = at
        last.update(dict.fromkeys(self._kept, len(order) - 1))
        change = [0] * (len(order) + 1)
        for number, at in first.items():
            num_bytes = self._bytes[number % self._many]
            change[at] += num_bytes
            change[last[number] + 1] -= num_bytes
        held = itertools.accumulate(change)
        peak = max((h + self._scratch[p] for h, (p, _) in zip(held, order)), default=0)
        extra_s = sum(self._seconds[position] for position, second in order if second)
        return peak + self._resident_bytes, extra_s

    def _in_order(self, again: frozenset[int]) -> Iterator[tuple[int, bool]]:
        """Positions of nodes; whether it is the second time."""

        def needs(position: int) -> frozenset[int]:
            return again.intersection(self._maker[number] for number in self._reads[position])

        ran: set[int] = set()
        for position, forward in enumerate(self._forward):
            if not forward:
                for needed in _wanted(position, ran, needs):
                    yield needed, True
            yield position, False


def _wanted(begin: int, ran: set[int], needs: Callable[[int], Collection[int]]) -> list[int]:
    """What has to run before `begin` and has not, in order; adds it to `ran`."""
    found: set[int] = set()
    waiting = [begin]
    while waiting:
        fresh = {*needs(waiting.pop())} - ran - found
        found |= fresh
        waiting += fresh
    ran |= found
    return sorted(found)


class Recomputation:
    """The choices of what runs again in a step.

    Arguments:
        graph: the step.
        seconds: what a node of forward takes.
        specs: of a rank's parts of the tensors; the graph's own if None.
        scratch: bytes that a node takes for itself.
    """

    def __init__(
        self,
        graph: Graph,
        seconds: Seconds,
        specs: Mapping[str, Spec] | None = None,
        scratch: Callable[[Node, Mapping[str, Spec]], int] = scratch_bytes,
    ) -> None:
        self._graph = graph
        self._step = _Step(graph, seconds, graph.specs if specs is None else specs, scratch)
        self._found: dict[frozenset[int], Candidate] = {}

    def sweep(self) -> tuple[Candidate, ...]:
        """From keeping all to least memory: those that no other betters in both."""
        for mixture in self._mixtures:
            stride = max(1, len(mixture) // STEPS)
            for again in (*mixture[::stride], mixture[-1]):
                self._candidate(again)
        front: list[Candidate] = []
        for found in sorted(self._found.values(), key=lambda c: (c.extra_s, c.peak_bytes)):
            if not front or found.peak_bytes < front[-1].peak_bytes:
                front.append(found)
        return tuple(front)

    def within(self, budget_bytes: int) -> Candidate | None:
        """The cheapest found with a peak of at most the budget; None if there is none."""
        self.sweep()
        for mixture in self._mixtures:
            looked = [number for number, again in enumerate(mixture) if again in self._found]
            for low, high in itertools.pairwise(looked):
                # Where the budget is crossed, the first that fits.
                while high - low > 1 and self._fits(mixture[high], budget_bytes):
                    middle = (low + high) // 2
                    if self._fits(mixture[middle], budget_bytes):
                        high = middle
                    else:
                        low = middle
        fitting = [c for c in self._found.values() if c.peak_bytes <= budget_bytes]
        return min(fitting, key=lambda c: (c.extra_s, c.peak_bytes), default=None)

    @functools.cached_property
    def _mixtures(self) -> list[list[frozenset[int]]]:
        return mixtures(self._step.calls())

    def _candidate(self, again: frozenset[int]) -> Candidate:
        if again not in self._found:
            names = frozenset(self._step.nodes[position].name for position in again)
            self._found[again] = Candidate(self._graph, names, *self._step.measures(again))
        return self._found[again]

    def _fits(self, again: frozenset[int], budget_bytes: int) -> bool:
        return self._candidate(again).peak_bytes <= budget_bytes
