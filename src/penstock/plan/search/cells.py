"""What the search decides about: cells, each a few operators that are best split together.

A cell has ports at which it reads values, values that it gives, and choices: a choice says in which
layout it reads at each port, in which it gives each value, and what that costs. Cells are made of
nodes and inputs of the graph one by one, and then joined where nothing is lost by it (see `joins`).

An input is a cell as well: it gives its tensor, and it reads what the graph gives as its new value,
and its gradient, in the same layout; so does the loss's reader, which asks for B. Scalars that only
updates compute (learning rates, numbers of steps) are B and of no cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from penstock.model.graph import Graph, Input, Node, Spec, replaced
from penstock.plan.assignment import Assignment
from penstock.plan.costs.routes import plain
from penstock.plan.layout import B, Layout, P, Placement, S, largest_shape, possible
from penstock.plan.memory.liveness import roots, source_of
from penstock.plan.rules.joins import Cell, Choice, Combination, joined

RANDOM = "penstock.uniform.default"
"""Its second argument tells its numbers apart from others, and says nothing about cost."""


class Prices(Protocol):
    """What the search must know about operators and routes on a mesh of these sizes."""

    @property
    def sizes(self) -> tuple[int, ...]: ...

    def combinations(self, node: Node) -> Sequence[Combination]:
        """All ways in which a node can be split; one of them reads and gives only B."""
        ...

    def units(self, name: str) -> Sequence[Placement]:
        """With units above 1, how a tensor may be cut."""
        ...

    def operator_s(self, node: Node, chosen: Combination) -> float:
        """What the rank with most to do takes for its part."""
        ...

    def way_s(self, spec: Spec, source: Layout, target: Layout) -> float:
        """What a route takes; infinity where there is none, 0 if the layouts are the same."""
        ...


@dataclass(frozen=True, eq=False)
class Cells:
    """A graph as cells.

    Arguments:
        cells: in an order in which each comes after those whose values it reads, apart from what
            inputs read.
        scalars: combinations of the nodes that are of no cell.
        scalars_s: what those take; they are of updates.
    """

    graph: Graph
    cells: tuple[Cell, ...]
    scalars: Mapping[str, Combination]
    scalars_s: float


def cells_of(graph: Graph, prices: Prices) -> Cells:
    """The cells of a graph, joined."""
    return _Builder(graph, prices).build()


def whole(axes: int) -> Layout:
    """B on all axes."""
    return (B,) * axes


def held_bytes(spec: Spec, layout: Layout, sizes: Sequence[int]) -> float:
    """Of the largest part."""
    return float(Spec(largest_shape(spec.shape, layout, sizes), spec.dtype).num_bytes)


def scalars_of(graph: Graph) -> frozenset[str]:
    """Values without dims that are inputs, or that updates compute from such ones alone."""
    found = {i.name for i in graph.inputs if graph.specs[i.name].shape == ()}
    for node in graph.nodes:
        if node.phase == "update" and found.issuperset(node.inputs):
            given = [name for name in node.outputs if name is not None]
            if all(graph.specs[name].shape == () for name in given):
                found.update(given)
    return frozenset(found)


def saved_of(graph: Graph) -> frozenset[str]:
    """Values of forward that are kept for backward, by the tensor in whose memory they lie."""
    root = roots(graph)
    found = set()
    for node in graph.nodes:
        if node.phase == "backward":
            held = {root[name] for name in node.inputs} & graph.producer.keys()
            found |= {name for name in held if graph.producer[name][0].phase == "forward"}
    return frozenset(found)


def lying_in_inputs(graph: Graph) -> frozenset[str]:
    """Inputs, and views of them: where one is asked for in another layout, that is a copy, which
    stays from forward to backward if both read it."""
    given = {item.name for item in graph.inputs}
    return frozenset(name for name, root in roots(graph).items() if root in given)


def gradients_of(graph: Graph) -> Mapping[str, frozenset[str]]:
    """By node of the update, the values of other phases that it is the first of them to read."""
    seen: set[str] = set()
    found: dict[str, frozenset[str]] = {}
    for node in graph.nodes:
        if node.phase == "update":
            new = [n for n in node.inputs if n in graph.producer and n not in seen]
            read = {n for n in new if graph.producer[n][0].phase != "update"}
            seen |= read
            found[node.name] = frozenset(read)
    return found


def key_of(node: Node, specs: Mapping[str, Spec]) -> str:
    """Equal for nodes that call the same operator on tensors of the same shapes and dtypes."""
    args, kwargs = replaced((node.args, dict(node.kwargs)), lambda ref: _Said(specs[ref.name]))
    if node.op == RANDOM:
        args = (args[0], *args[2:])
    computed = [None if name is None else str(specs[name]) for name in node.outputs]
    same = [node.inputs.index(name) for name in node.inputs]
    return f"{node.phase} {node.op}{args}{sorted(kwargs.items())}{computed}{same}"


@dataclass(frozen=True)
class _Said:
    spec: Spec

    def __repr__(self) -> str:
        return str(self.spec)


def assignment_of(cells: Cells, chosen: Sequence[int], sizes: tuple[int, ...]) -> Assignment:
    """Of the graph, if each cell takes the choice of this number."""
    inputs: dict[str, Layout] = {}
    nodes: dict[str, Combination] = dict(cells.scalars)
    given = {item.name for item in cells.graph.inputs}
    for cell, number in zip(cells.cells, chosen, strict=True):
        for name, member in zip(cell.members, cell.choices[number].members, strict=True):
            if name in given:
                inputs[name] = cast(Layout, member)
            else:
                nodes[name] = cast(Combination, member)
    return Assignment(sizes, inputs, nodes)


class _Builder:
    def __init__(self, graph: Graph, prices: Prices) -> None:
        self._graph, self._prices, self._sizes = graph, prices, prices.sizes
        self._scalars, self._saved = scalars_of(graph), saved_of(graph)
        self._gradients = gradients_of(graph)
        self._choices: dict[str, tuple[Choice, ...]] = {}

    def build(self) -> Cells:
        graph = self._graph
        cells = [self._of_input(i) for i in graph.inputs if i.name not in self._scalars]
        scalars = {}
        for node in graph.nodes:
            if self._scalars.issuperset(name for name in node.outputs if name is not None):
                scalars[node.name] = self._whole(node)
            else:
                cells.append(self._of_node(node))
        cells += self._of_results(cells)
        seconds = sum(
            self._prices.operator_s(node, scalars[node.name])
            for node in graph.nodes
            if node.name in scalars
        )
        return Cells(graph, joined(cells, graph.specs), scalars, seconds)

    def _whole(self, node: Node) -> Combination:
        for chosen in self._prices.combinations(node):
            if all(p in (B, None) for s in chosen for p in (*s.inputs, *s.outputs)):
                return chosen
        raise AssertionError(f"{node.op} has no signature of B alone")

    def _of_input(self, item: Input) -> Cell:
        spec, axes = self._graph.specs[item.name], len(self._sizes)
        dims = {"data": min(1, len(spec.shape)), "scalar": 0, "constant": 0}.get(
            item.role, len(spec.shape)
        )
        again = [
            o.name
            for o in self._graph.outputs
            if o.target == item.target
            and (o.role == item.role or (o.role == "gradient" and item.role == "parameter"))
            and o.name != item.name
        ]
        units = [p for p in self._prices.units(item.name) if p.dim < dims]
        key = f"input {item.role} {spec} {len(again)} {units or ''}"
        if key not in self._choices:
            found = {}
            for way in itertools.product((B, *map(S, range(dims)), *units), repeat=axes):
                if possible(spec.shape, way, self._sizes):
                    layout = plain(spec.shape, way, self._sizes)
                    held = held_bytes(spec, layout, self._sizes)
                    found[layout] = Choice(
                        (layout,) * len(again), (layout,), 0.0, 0.0, held, (layout,)
                    )
            self._choices[key] = tuple(found.values())
        return Cell((item.name,), tuple(again), (item.name,), self._choices[key], key,
                    is_update=item.role == "state", is_input=True)  # fmt: skip

    def _of_node(self, node: Node) -> Cell:
        specs = self._graph.specs
        ports = [k for k, name in enumerate(node.inputs) if name not in self._scalars]
        given = [k for k, name in enumerate(node.outputs) if name is not None]
        saved = [k for k in given if node.outputs[k] in self._saved]
        late = self._gradients.get(node.name, frozenset())
        late_ports = [node.inputs.index(name) for name in sorted(late)]
        units = [self._prices.units(name) for name in (*node.inputs, *node.outputs) if name]
        key = f"{key_of(node, specs)} {ports} {saved} {sorted(late_ports)}"
        if any(units):
            key += f" {units}"
        if key not in self._choices:
            self._choices[key] = tuple(self._ways(node, ports, given, saved, late_ports))
        return Cell(
            (node.name,),
            tuple(node.inputs[k] for k in ports),
            tuple(str(node.outputs[k]) for k in given),
            self._choices[key],
            key,
            is_update=node.phase == "update",
            is_view=source_of(node) is not None,
        )

    def _ways(
        self, node: Node, ports: Sequence[int], given: Sequence[int], saved: Sequence[int],
        late_ports: Sequence[int],
    ) -> Iterator[Choice]:  # fmt: skip
        scalar = [k for k in range(len(node.inputs)) if k not in ports]
        for chosen in self._prices.combinations(node):
            if any(one.inputs[k] != B for k in scalar for one in chosen):
                continue
            reads = {
                k: self._plain(node.inputs[k], (one.inputs[k] for one in chosen)) for k in ports
            }
            gives = {
                k: self._plain(node.outputs[k], (one.outputs[k] for one in chosen)) for k in given
            }
            time_s = self._prices.operator_s(node, chosen)
            held = sum(self._held(node.outputs[k], gives[k]) for k in saved)
            held += sum(self._held(node.inputs[k], reads[k]) for k in late_ports)
            yield Choice(
                tuple(reads.values()),
                tuple(gives.values()),
                time_s,
                0.0 if node.phase == "forward" else time_s,
                held,
                (chosen,),
            )

    def _plain(self, name: str | None, placements: Iterable[Placement | None]) -> Layout:
        layout = tuple(p for p in placements if p is not None)
        return plain(self._graph.specs[str(name)].shape, layout, self._sizes)

    def _held(self, name: str | None, layout: Layout) -> float:
        return held_bytes(self._graph.specs[str(name)], layout, self._sizes)

    def _of_results(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Who asks for the loss, on all ranks, and for what the network gives, as no sum."""
        given = {name: (cell, k) for cell in cells for k, name in enumerate(cell.gives)}
        for output in self._graph.outputs:
            if output.role in ("loss", "output") and output.name not in self._scalars:
                asked = {whole(len(self._sizes)): None}
                if output.role == "output":
                    cell, k = given[output.name]
                    made = (choice.gives[k] for choice in cell.choices)
                    asked = {tuple(B if p == P else p for p in layout): None for layout in made}
                choices = tuple(Choice((a,), (), 0.0, 0.0, 0.0, ()) for a in asked)
                key = f"{output.role} {self._graph.specs[output.name]} {list(asked)}"
                yield Cell((), (output.name,), (), choices, key)
