"""What a rank calls for its part: arguments that speak of sizes and places are of the part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from penstock.model import cross_entropy, randomness
from penstock.model.graph import Node, Spec
from penstock.plan.layout import Coordinates, part
from penstock.plan.rules import embedding_part
from penstock.plan.rules.formula import Signature, argument, place_of
from penstock.plan.rules.views import VIEWS

assert cross_entropy
assert embedding_part
assert randomness  # they register operators


def localized(
    node: Node,
    specs: Mapping[str, Spec],
    chosen: Sequence[Signature],
    sizes: Sequence[int],
    coordinates: Coordinates,
) -> Node:
    """A node as the rank at these coordinates calls it.

    Arguments:
        specs: of the whole tensors, by name.
        chosen: the signature on each axis of the mesh.
        sizes: of the axes.

    Returns:
        A node of the same name, inputs and outputs, which are parts now.
    """
    rule = RULES.get(node.op) or RULES.get(node.op.rpartition(".")[0])
    if rule is None:
        return node
    return rule(_Part(node, specs, chosen, sizes, coordinates))


@dataclass(frozen=True)
class _Part:
    """Of a node: see `localized`."""

    node: Node
    specs: Mapping[str, Spec]
    chosen: Sequence[Signature]
    sizes: Sequence[int]
    coordinates: Coordinates

    def given(self, number: int) -> tuple[tuple[int, int], ...]:
        """The range of each dim of an input."""
        layout = tuple(signature.inputs[number] for signature in self.chosen)
        shape = self.specs[self.node.inputs[number]].shape
        return part(shape, layout, self.sizes, self.coordinates)

    def made(self, number: int = 0) -> tuple[tuple[int, int], ...]:
        """The range of each dim of an output."""
        layout = tuple(
            placement for s in self.chosen if (placement := s.outputs[number]) is not None
        )
        shape = self.specs[str(self.node.outputs[number])].shape
        return part(shape, layout, self.sizes, self.coordinates)

    def shape(self) -> list[int]:
        """Of the first output."""
        return [stop - start for start, stop in self.made()]

    def with_arguments(self, **values: Any) -> Node:
        """The node, given these for the arguments of these names."""
        args, kwargs = list(self.node.args), dict(self.node.kwargs)
        for name, value in values.items():
            place = place_of(self.node.op, name)
            if place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return replace(self.node, args=tuple(args), kwargs=kwargs)


def _sized(name: str) -> Callable[[_Part], Node]:
    """The argument of this name is the shape of the output."""
    return lambda it: it.with_arguments(**{name: it.shape()})


def _viewed(it: _Part) -> Node:
    """Copied if need be: a part may lie otherwise in memory than the whole."""
    args = (it.node.args[0], it.shape())
    return replace(it.node, op="aten.reshape.default", args=args, kwargs={})


def _convolution_backward(it: _Part) -> Node:
    if not argument(it.node, "output_mask")[2]:
        return it.node
    start, stop = it.given(0)[1]
    return it.with_arguments(bias_sizes=[stop - start])


def _embedding(it: _Part) -> Node:
    """Ranks with some of the rows."""
    (start, stop), _ = it.given(0)
    if stop - start == it.specs[it.node.inputs[0]].shape[0]:
        return it.node
    args = (*it.node.args[:2], start)
    return replace(it.node, op="penstock.embedding_part.default", args=args, kwargs={})


def _embedding_backward(it: _Part) -> Node:
    (start, stop), _ = it.made()
    if stop - start == argument(it.node, "num_weights"):
        return it.node
    args = (*it.node.args[:2], start, stop - start, argument(it.node, "padding_idx"))
    return replace(it.node, op="penstock.embedding_part_backward.default", args=args, kwargs={})


def _gathered(it: _Part) -> Node:
    """Ranks with some places of the dim."""
    dim = argument(it.node, "dim")
    shape = it.specs[it.node.inputs[0]].shape
    if not shape:
        return it.node
    start, stop = it.given(0)[dim]
    if stop - start == shape[dim]:
        return it.node
    args = (*it.node.args[:3], start)
    return replace(it.node, op="penstock.gather_part.default", args=args, kwargs={})


def _log_sums(it: _Part) -> Node:
    start, stop = it.made()[argument(it.node, "dim")]
    return it.with_arguments(places=stop - start)


def _put_at(it: _Part) -> Node:
    start, stop = it.made()[argument(it.node, "dim")]
    return it.with_arguments(start=start, size=stop - start)


def _class_gradient(it: _Part) -> Node:
    return it.with_arguments(start=it.made()[argument(it.node, "dim")][0])


def _uniform(it: _Part) -> Node:
    return it.with_arguments(start=[start for start, _ in it.made()], size=it.shape())


def _arange(it: _Part) -> Node:
    ((first, last),) = it.made()
    overload = it.node.op.rpartition(".")[2]
    start = 0 if overload == "default" else argument(it.node, "start")
    step = argument(it.node, "step") if overload == "start_step" else 1
    args = (start + first * step, start + last * step, step)
    kwargs = {k: v for k, v in it.node.kwargs.items() if k not in ("start", "end", "step")}
    return replace(it.node, op="aten.arange.start_step", args=args, kwargs=kwargs)


def _triangle(it: _Part) -> Node:
    """Row r and column c of the part are r + row and c + column of the whole."""
    (row, _), (column, _) = it.given(0)[-2:]
    return it.with_arguments(diagonal=argument(it.node, "diagonal") + row - column)


RULES: dict[str, Callable[[_Part], Node]] = {
    **{op: _viewed for op in VIEWS if "unsqueeze" not in op},
    "aten.expand": _sized("size"),
    "aten.full": _sized("size"),
    "aten.zeros": _sized("size"),
    "aten.ones": _sized("size"),
    "aten.empty": _sized("size"),
    "aten.new_full": _sized("size"),
    "aten.new_zeros": _sized("size"),
    "aten.new_ones": _sized("size"),
    "aten.new_empty": _sized("size"),
    "aten.select_backward": _sized("input_sizes"),
    "aten.slice_backward": _sized("input_sizes"),
    "aten.upsample_nearest2d_backward": _sized("input_size"),
    "aten.upsample_bilinear2d_backward": _sized("input_size"),
    "aten.arange": _arange,
    "aten.convolution_backward": _convolution_backward,
    "aten.embedding": _embedding,
    "aten.embedding_dense_backward": _embedding_backward,
    "aten.gather": _gathered,
    "aten.tril": _triangle,
    "aten.triu": _triangle,
    "penstock.class_gradient": _class_gradient,
    "penstock.log_sums": _log_sums,
    "penstock.put_at": _put_at,
    "penstock.uniform": _uniform,
}
