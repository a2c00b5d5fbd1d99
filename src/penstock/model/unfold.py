"""Products of matrices over several batch dims, taken for what they are.

torch folds (batch, heads, i, k) to (batch * heads, i, k) for `bmm` and unfolds what comes out. In
what is folded the heads cannot be told from the batch, and a split by heads cannot be said. So

    view(bmm(fold(a), fold(b)))  becomes  matmul(a, b)

where `fold` is a view, or the transpose of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from penstock.model.graph import Node, Ref, Spec

FOLDS = {"aten.view.default", "aten._unsafe_view.default"}
PRODUCT = "aten.matmul.default"


def unfolded(nodes: Sequence[Node], specs: dict[str, Spec]) -> list[Node]:
    """The nodes with unfolded products; folds that nobody reads any more are still among them.

    Arguments:
        specs: of all tensors; those of new ones are added.
    """
    return _Unfolding(nodes, specs).nodes()


class _Unfolding:
    def __init__(self, nodes: Sequence[Node], specs: dict[str, Spec]) -> None:
        self._given, self._specs = nodes, specs
        self._producers = {name: node for node in nodes for name in node.outputs if name}
        self._readers: dict[str, list[Node]] = {}
        for node in nodes:
            for name in node.inputs:
                self._readers.setdefault(name, []).append(node)

    def nodes(self) -> list[Node]:
        found: list[Node] = []
        for node in self._given:
            if node.op in FOLDS and (product := self._producers.get(node.inputs[0])):
                found += self._in_place_of(node, product)
            else:
                found.append(node)
        return found

    def _in_place_of(self, view: Node, product: Node) -> list[Node]:
        """What gives what the view of a product gives; the view itself, if that is not a fold's."""
        shape = self._specs[view.name].shape
        if product.op != "aten.bmm.default" or len(self._readers[product.name]) > 1:
            return [view]
        if len(shape) < 4 or shape[-2:] != self._specs[product.name].shape[-2:]:
            return [view]
        made: list[Node] = []
        operands = [self._operand(name, shape[:-2], product, made) for name in product.inputs]
        if None in operands:
            for node in made:
                del self._specs[node.name]
            return [view]
        args = tuple(Ref(name) for name in operands if name is not None)
        return [
            *made,
            replace(product, name=view.name, op=PRODUCT, args=args, outputs=view.outputs),
        ]

    def _operand(
        self, name: str, batch: tuple[int, ...], product: Node, made: list[Node]
    ) -> str | None:
        """A tensor (*batch, i, k) from which this one is folded; None if there is none."""
        node = self._producers.get(name)
        if node is None:
            return None
        if node.op in FOLDS:
            shape, whole = self._specs[name].shape, self._specs[node.inputs[0]].shape
            return node.inputs[0] if whole == (*batch, *shape[-2:]) else None
        if node.op != "aten.transpose.int" or sorted(a % 3 for a in node.args[1:]) != [1, 2]:
            return None
        source = self._operand(node.inputs[0], batch, product, made)
        if source is None:
            return None
        spec = self._specs[source]
        turned = f"{name}:unfolded"
        if turned not in self._specs:
            shape = (*spec.shape[:-2], spec.shape[-1], spec.shape[-2])
            self._specs[turned] = replace(spec, shape=shape)
            args = (Ref(source), -2, -1)
            made.append(replace(node, name=turned, args=args, outputs=(turned,)))
        return turned
