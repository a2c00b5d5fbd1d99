"""What a step takes, and what a rank must hold, if a graph is split in a certain way.

    step      = compute + exchange + exposed
    compute   = sum over nodes of time on the largest part
    exchange  = sum over changes that something waits for
    exposed   = max(0, late - hides)
    late      = sum over changes that only updates and the next step wait for
    hides     = beside (compute of backward and updates)
    held      = parameters, state, buffers, the batch, gradients, activations that backward reads,
                and inputs, or views of them, once more for each other layout that is asked

A change is a tensor that goes from the layout in which it is made to another that is asked of it,
once however many ask. What updates have computed changes when all else is done, and is waited for.
This is what the integer program minimizes (`integer`), counted once more from the graph and the
assignment: by it the search, presets and brute force are compared. Liveness finds a lower peak
(`penstock.plan.memory`): `held` takes all as held at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from penstock.model.graph import Graph, Node, Spec
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster
from penstock.plan.costs.operators import Measured, Operator
from penstock.plan.costs.routes import Routes, plain
from penstock.plan.layout import Layout, Placement
from penstock.plan.rules.joins import Combination
from penstock.plan.rules.signatures import combinations
from penstock.plan.search.cells import (
    Prices,
    gradients_of,
    held_bytes,
    key_of,
    lying_in_inputs,
    saved_of,
)
from penstock.plan.search.units import of_sizes, of_tensors


@dataclass(frozen=True)
class Price:
    """Of a step; see the module.

    Arguments:
        compute_s: of operators.
        exchange_s: of changes that something waits for.
        late_s: of the others.
        hides_s: how long those can go on beside operators.
        held_bytes: on the rank with most.
    """

    compute_s: float
    exchange_s: float
    late_s: float
    hides_s: float
    held_bytes: float

    @property
    def exposed_s(self) -> float:
        """Of the late changes, what is not hidden."""
        return max(0.0, self.late_s - self.hides_s)

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exchange_s + self.exposed_s


class ClusterPrices:
    """Prices of operators and routes on a cluster, each computed once.

    Arguments:
        graph: whose nodes and tensors are asked about.
        sizes: of the mesh's axes.
        measured: times of operators that come before what is computed.
    """

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        sizes: Sequence[int],
        measured: Measured | None = None,
    ) -> None:
        self.sizes = tuple(sizes)
        self.routes = Routes(cluster, self.sizes)
        self._specs, self._cluster, self._measured = graph.specs, cluster, measured
        self._units = of_sizes(graph, self.sizes)
        self._units_by_tensor = of_tensors(graph, self.sizes, self._units)
        self._keys: dict[str, str] = {}
        self._combinations: dict[str, tuple[Combination, ...]] = {}
        self._operators: dict[str, Operator] = {}
        self._times: dict[tuple[str, Combination], float] = {}

    def _key(self, node: Node) -> str:
        if node.name not in self._keys:
            units = [self.units(name) for name in (*node.inputs, *node.outputs) if name]
            self._keys[node.name] = f"{key_of(node, self._specs)} {units if any(units) else ''}"
        return self._keys[node.name]

    def combinations(self, node: Node) -> Sequence[Combination]:
        """See `Prices`."""
        key = self._key(node)
        if key not in self._combinations:
            ways = combinations(node, self._specs, self.sizes, self._units)
            self._combinations[key] = tuple(self._different(node, ways)) if self._units else ways
        return self._combinations[key]

    def units(self, name: str) -> Sequence[Placement]:
        """See `Prices`."""
        return self._units_by_tensor.get(name, ())

    def _different(self, node: Node, ways: Sequence[Combination]) -> Iterator[Combination]:
        """The ways with only such units as the tensors may have, each once."""
        names = [*node.inputs, *node.outputs]
        seen = set()
        for chosen in ways:
            cuts = [*zip(*((*one.inputs, *one.outputs) for one in chosen), strict=True)]
            if all(
                p is None or p.unit == 1 or p in self.units(str(name))
                for name, layout in zip(names, cuts, strict=True)
                for p in layout
            ):
                same = tuple(
                    name and plain(self._specs[name].shape, layout, self.sizes)
                    for name, layout in zip(names, cuts, strict=True)
                )
                if same not in seen:
                    seen.add(same)
                    yield chosen

    def operator_s(self, node: Node, chosen: Combination) -> float:
        """See `Prices`."""
        key = self._key(node)
        if (key, chosen) not in self._times:
            if key not in self._operators:
                self._operators[key] = Operator(node, self._specs, self._cluster, self._measured)
            self._times[key, chosen] = self._operators[key].seconds(chosen, self.sizes)
        return self._times[key, chosen]

    def way_s(self, spec: Spec, source: Layout, target: Layout) -> float:
        """See `Prices`."""
        if source == target:
            return 0.0
        way = self.routes.way(spec.shape, spec.dtype.itemsize, source, target)
        return math.inf if way is None else way.cost_s


def price(graph: Graph, assignment: Assignment, prices: Prices, beside: float = 1.0) -> Price:
    """What a step takes and holds.

    Arguments:
        assignment: of all nodes and inputs.
        beside: how much of the time of backward and updates late changes can run beside.
    """
    seconds = {"forward": 0.0, "backward": 0.0, "update": 0.0}
    for node in graph.nodes:
        seconds[node.phase] += prices.operator_s(node, assignment.nodes[node.name])
    exchange_s = late_s = held = 0.0
    of_inputs = lying_in_inputs(graph)
    for name, targets in assignment.asked(graph).items():
        spec, source = graph.specs[name], assignment.layout_of(graph, name)
        is_new = name in graph.producer and graph.producer[name][0].phase == "update"
        for target, readers in targets.items():
            if target == source:
                continue
            way_s = prices.way_s(spec, source, target)
            if is_new or any(node.phase != "update" for node in readers.nodes):
                exchange_s += way_s
            else:
                late_s += way_s
            if name in of_inputs and spec.shape:
                held += held_bytes(spec, target, prices.sizes)
    held += _held(graph, assignment, prices.sizes)
    hides_s = beside * (seconds["backward"] + seconds["update"])
    return Price(math.fsum(seconds.values()), exchange_s, late_s, hides_s, held)


def _held(graph: Graph, assignment: Assignment, sizes: Sequence[int]) -> float:
    def of(name: str, layout: Layout) -> float:
        return held_bytes(graph.specs[name], layout, sizes)

    held = sum(
        of(item.name, assignment.layout_of(graph, item.name))
        for item in graph.inputs
        if graph.specs[item.name].shape
    )
    held += sum(of(name, assignment.layout_of(graph, name)) for name in saved_of(graph))
    gradients = gradients_of(graph)
    for node in graph.nodes:
        for name in gradients.get(node.name, ()):
            number = node.inputs.index(name)
            held += of(name, assignment.read_as(graph, node, number))
    return held
