"""Losses by classes, computed from logits: the logarithm of a softmax is neither made nor kept.

    gather(log_softmax(x), t)                     becomes  gather(x, t) - m - l
    log_softmax_backward(put_at(v, t), ..)        becomes  class_gradient(v, x, m, l, t)

with m and l of `log_sums` and `log_sum` (see `cross_entropy`), which can be split by class; of a
log-softmax that nothing else reads, over classes enough.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from penstock.model.cross_entropy import places_of
from penstock.model.graph import Node, Ref, Spec

SOFTMAX = "aten._log_softmax.default"
BACKWARD = "aten._log_softmax_backward_data.default"
GATHER = "aten.gather.default"
VIEW = "aten.view.default"
PUT = "penstock.put_at.default"
DTYPES = (torch.float32, torch.float64)
"""Those in which torch computes as we do; of fewer digits it computes inside with more."""


def from_logits(
    nodes: Sequence[Node], specs: dict[str, Spec], needed: Collection[str]
) -> list[Node]:
    """The nodes with losses from logits; what nobody reads any more is still among them.

    Arguments:
        specs: of all tensors; those of new ones are added.
        needed: tensors that are read by others than nodes.
    """
    graph = _Given(nodes, specs)
    replaced: dict[str, list[Node]] = {}
    for node in nodes:
        if node.op == SOFTMAX and (loss := graph.loss_of(node, needed)):
            replaced |= loss.replaced()
    return [new for node in nodes for new in replaced.get(node.name, [node])]


class _Given:
    """The nodes as they are."""

    def __init__(self, nodes: Sequence[Node], specs: dict[str, Spec]) -> None:
        self.specs = specs
        self._producers = {name: node for node in nodes for name in node.outputs if name}
        self._readers: dict[str, list[Node]] = {}
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                self._readers.setdefault(name, []).append(node)

    def loss_of(self, softmax: Node, needed: Collection[str]) -> _Loss | None:
        """What reads a log-softmax; None if something else does, or it is none of ours."""
        x, spec = softmax.inputs[0], self.specs[softmax.name]
        if not spec.shape or spec.dtype not in DTYPES or self.specs[x] != spec:
            return None
        dim = softmax.args[1] % len(spec.shape)
        if places_of(spec.shape[dim]) == 1:
            return None
        found = _Loss(self.specs, softmax, x, dim)
        around = softmax.name, *self._views_of(softmax, dim)
        if any(name in needed for name in around):
            return None
        for name in around:
            for reader in self._readers.get(name, ()):
                if reader.name in around:
                    found.views.append(reader)
                elif reader.op == GATHER and self._is_by_row(reader, dim):
                    found.gathers.append(reader)
                elif reader.op == BACKWARD and (put := self._put(reader, softmax, dim)):
                    found.gradients.append((reader, put))
                else:
                    return None
        return found

    def _views_of(self, node: Node, dim: int) -> list[str]:
        """Views of a tensor in which the dims up to this one are the same."""
        return [
            reader.name
            for reader in self._readers.get(node.name, ())
            if reader.op == VIEW and self._keeps(reader, dim)
        ]

    def _keeps(self, view: Node, dim: int) -> bool:
        one, other = self.specs[view.inputs[0]].shape, self.specs[view.name].shape
        return one[: dim + 1] == other[: dim + 1]

    def _is_by_row(self, gather: Node, dim: int) -> bool:
        """Whether it takes one number of each row."""
        source, index = (self.specs[name].shape for name in gather.inputs)
        return gather.args[1] % len(source) == dim and index == _row(source, dim)

    def _put(self, backward: Node, softmax: Node, dim: int) -> Node | None:
        """What makes the gradient of a log-softmax; None if that is no `put_at`."""
        gradient, result = backward.inputs
        if result != softmax.name or self.specs[backward.name] != self.specs[softmax.name]:
            return None
        node = self._producers.get(gradient)
        if node is not None and node.op == VIEW and self._keeps(node, dim):
            node = self._producers.get(node.inputs[0])
        return node if node is not None and node.op == PUT and node.args[2] == dim else None


@dataclass
class _Loss:
    """A log-softmax of x along a dim, and all that reads it.

    Arguments:
        views: of the log-softmax.
        gathers: what takes one number of each row, of it or of a view.
        gradients: backward nodes, with the `put_at` of each.
    """

    specs: dict[str, Spec]
    softmax: Node
    x: str
    dim: int
    views: list[Node] = field(default_factory=list)
    gathers: list[Node] = field(default_factory=list)
    gradients: list[tuple[Node, Node]] = field(default_factory=list)

    def replaced(self) -> dict[str, list[Node]]:
        """By name of a node, what stands in its place."""
        found = {self.softmax.name: self._sums()}
        for view in self.views:
            found[view.name] = [self._on_logits(view, view.name)]
        for gather in self.gathers:
            found[gather.name] = self._gathered(gather)
        for backward, put in self.gradients:
            found[backward.name] = self._gradient(backward, put)
        return found

    @property
    def _row(self) -> str:
        return f"{self.softmax.name}:row"

    def _sums(self) -> list[Node]:
        spec = self.specs[self.x]
        places = places_of(spec.shape[self.dim])
        parts = f"{self.softmax.name}:parts"
        shape = (*spec.shape[: self.dim], places, *spec.shape[self.dim + 1 :])
        args = (Ref(self.x), self.dim, places)
        both = Ref(f"{parts}.0"), Ref(f"{parts}.1")
        return [
            self._made(self.softmax, parts, "penstock.log_sums.default", args, (shape, shape)),
            self._made(
                self.softmax, self._row, "penstock.log_sum.default", (*both, self.dim),
                (_row(shape, self.dim),) * 2,
            ),
        ]  # fmt: skip

    def _on_logits(self, node: Node, name: str) -> Node:
        """The same of x in place of the log-softmax."""
        source = Ref(self.x if node.inputs[0] == self.softmax.name else node.inputs[0])
        self.specs[name] = self.specs[node.name]
        return replace(node, name=name, args=(source, *node.args[1:]), outputs=(name,))

    def _gathered(self, gather: Node) -> list[Node]:
        shape = self.specs[gather.name].shape
        made = [self._on_logits(gather, f"{gather.name}:logit")]
        left = Ref(made[0].name)
        for number, name in enumerate((f"{gather.name}:shifted", gather.name)):
            statistic = self._shaped(f"{self._row}.{number}", shape, gather, made)
            made.append(self._made(gather, name, "aten.sub.Tensor", (left, statistic), (shape,)))
            left = Ref(name)
        return made

    def _gradient(self, backward: Node, put: Node) -> list[Node]:
        shape = self.specs[backward.name].shape
        made: list[Node] = []
        values, index = (
            self._shaped(name, _row(shape, self.dim), backward, made) for name in put.inputs
        )
        row = Ref(f"{self._row}.0"), Ref(f"{self._row}.1")
        args = (values, Ref(self.x), *row, index, self.dim, 0)
        op = "penstock.class_gradient.default"
        return [*made, self._made(backward, backward.name, op, args, (shape,))]

    def _shaped(self, name: str, shape: tuple[int, ...], of: Node, made: list[Node]) -> Ref:
        """A tensor in this shape; a view of it is added to what is made."""
        if self.specs[name].shape == shape:
            return Ref(name)
        view = f"{name}:of {of.name}"
        self.specs[view] = replace(self.specs[name], shape=shape)
        made.append(replace(of, name=view, op=VIEW, args=(Ref(name), shape), outputs=(view,)))
        return Ref(view)

    def _made(
        self, of: Node, name: str, op: str, args: tuple[object, ...],
        shapes: Sequence[tuple[int, ...]],
    ) -> Node:  # fmt: skip
        """A node in place of another, with tensors of its dtype."""
        several = len(shapes) > 1
        outputs = tuple(f"{name}.{k}" if several else name for k in range(len(shapes)))
        dtype = self.specs[of.name].dtype
        self.specs |= {n: Spec(shape, dtype) for n, shape in zip(outputs, shapes, strict=True)}
        return replace(of, name=name, op=op, args=args, kwargs={}, outputs=outputs)


def _row(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """With one place for this dim."""
    return (*shape[:dim], 1, *shape[dim + 1 :])
