"""`Assignment`: how every tensor of a step lies, and how every operator is split, over a mesh.

It is what a search decides, and all that lowering needs to know: the layouts of the graph's inputs,
and of every node one signature for each axis of the mesh. The rest follows: a tensor lies as its
producer gives it, and where a consumer reads it in another layout, it goes there by a `Change`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from penstock.errors import PlanError
from penstock.model.graph import Graph, Node, Output
from penstock.plan.costs.routes import Routes, Way, plain
from penstock.plan.layout import B, Layout, P, in_words

if TYPE_CHECKING:
    from penstock.plan.rules.signatures import Signature


@dataclass(frozen=True)
class Change:
    """A tensor that goes from the layout in which it lies to another.

    Arguments:
        tensor: its name.
        source, target: the layouts.
        way: between them.
        consumers: the nodes that read it in the other layout, in the graph's order.
        outputs: the graph's outputs that are asked in it.
    """

    tensor: str
    source: Layout
    target: Layout
    way: Way
    consumers: tuple[Node, ...]
    outputs: tuple[Output, ...]

    @property
    def awaiting(self) -> tuple[Node, ...]:
        """The nodes of forward and backward that wait for it."""
        return tuple(node for node in self.consumers if node.phase != "update")


class Readers(NamedTuple):
    """Who asks for a tensor in a layout: nodes in the graph's order, each once, and outputs."""

    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]


@dataclass(frozen=True)
class Assignment:
    """How a graph is split.

    Arguments:
        sizes: of the mesh's axes, outermost first.
        inputs: layouts of the graph's inputs, by name; one that is not there is copied.
        nodes: by name of a node, its signature on each axis.
        outputs: layouts asked of outputs, by name of the tensor, where they are not as
            `output_layout` has them.
    """

    sizes: tuple[int, ...]
    inputs: Mapping[str, Layout]
    nodes: Mapping[str, tuple[Signature, ...]]
    outputs: Mapping[str, Layout] = field(default_factory=dict)

    @property
    def copied(self) -> Layout:
        """The layout in which every rank has all."""
        return (B,) * len(self.sizes)

    def layout_of(self, graph: Graph, name: str) -> Layout:
        """How a tensor lies where it is made, or given."""
        if name not in graph.producer:
            return self._plain(graph, name, self.inputs.get(name, self.copied))
        node, number = graph.producer[name]
        placements = tuple(signature.outputs[number] for signature in self.nodes[node.name])
        assert None not in placements, f"{node.name} has no signature for its output {name}"
        return self._plain(graph, name, tuple(p for p in placements if p is not None))

    def read_as(self, graph: Graph, node: Node, number: int) -> Layout:
        """How a node reads the tensor `node.inputs[number]`."""
        placements = tuple(signature.inputs[number] for signature in self.nodes[node.name])
        return self._plain(graph, node.inputs[number], placements)

    def output_layout(self, graph: Graph, output: Output) -> Layout:
        """How an output is to lie.

        New values lie as the old ones, gradients as their parameters; the loss is copied; what the
        network gives stays as it is, but for sums.
        """
        name = output.name
        if name in self.outputs:
            return self._plain(graph, name, self.outputs[name])
        if output.role == "loss":
            return self.copied
        if output.role == "output":
            return tuple(B if p == P else p for p in self.layout_of(graph, name))
        role = "parameter" if output.role == "gradient" else output.role
        return self.layout_of(graph, graph.input(role, output.target).name)

    def ways(self, graph: Graph, routes: Routes) -> Iterator[Change]:
        """All that must be brought into another layout: each tensor once for each target.

        In the order in which tensors are made, those of one tensor in order of their first reader.

        Raises:
            PlanError: there is no way, as a tensor cannot lie as it is asked to.
        """
        asked = self.asked(graph)
        for name in (*(item.name for item in graph.inputs), *graph.producer):
            source, spec = self.layout_of(graph, name), graph.specs[name]
            for target, readers in asked.get(name, {}).items():
                if target == source:
                    continue
                way = routes.way(spec.shape, spec.dtype.itemsize, source, target)
                if way is None:
                    raise PlanError(
                        f"{name} {spec} cannot go from {in_words(source)} to {in_words(target)} "
                        f"on a mesh of {self.sizes}",
                        hint="the assignment asks for a layout in which the tensor cannot lie",
                    )
                yield Change(name, source, target, way, *readers)

    def asked(self, graph: Graph) -> dict[str, dict[Layout, Readers]]:
        """Of each tensor that is read, the layouts that are asked of it, in order of their first
        reader, and who asks; outputs come after nodes."""
        found: dict[str, dict[Layout, tuple[dict[str, Node], list[Output]]]] = {}
        for node in graph.nodes:
            for number, name in enumerate(node.inputs):
                layouts = found.setdefault(name, {})
                layouts.setdefault(self.read_as(graph, node, number), ({}, []))[0][node.name] = node
        for output in graph.outputs:
            layouts = found.setdefault(output.name, {})
            layouts.setdefault(self.output_layout(graph, output), ({}, []))[1].append(output)
        return {
            name: {
                target: Readers(tuple(nodes.values()), tuple(outputs))
                for target, (nodes, outputs) in layouts.items()
            }
            for name, layouts in found.items()
        }

    @property
    def copies_all(self) -> bool:
        """Whether every rank computes all, and nothing is split."""
        return all(
            placement in (B, None)
            for chosen in self.nodes.values()
            for signature in chosen
            for placement in (*signature.inputs, *signature.outputs)
        )

    def _plain(self, graph: Graph, name: str, layout: Layout) -> Layout:
        return plain(graph.specs[name].shape, layout, self.sizes)
