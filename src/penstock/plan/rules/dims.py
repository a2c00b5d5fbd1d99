"""Formulas of operators that are told by arguments which dims they are about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from penstock.model.graph import Node
from penstock.plan.layout import S
from penstock.plan.rules.formula import (
    Formula,
    Labels,
    Signature,
    Specs,
    Units,
    argument,
    product,
    read,
    total,
)

Rule = Callable[[Node, Specs], Formula | None]


def along(text: str, name: str = "dim") -> Rule:
    """All tensors have the dims of the first; those of this argument are whole."""

    def rule(node: Node, specs: Specs) -> Formula | None:
        formula, dims = read(text, node, specs), _dims_of(node, specs)
        whole = _numbers(argument(node, name), dims)
        return formula and formula.whole(*(f"*{dims - 1 - dim}" for dim in whole))

    return rule


def _labels(dims: int) -> Labels:
    """As a star's."""
    return tuple(f"*{dim}" for dim in reversed(range(dims)))


def _dims_of(node: Node, specs: Specs) -> int:
    return len(specs[node.inputs[0]].shape)


def _without(labels: Labels, gone: int) -> Labels:
    return tuple(None if dim == gone else label for dim, label in enumerate(labels))


def _numbers(given: Any, dims: int) -> list[int]:
    """Dims as an argument has them: one, several, or none, which is all."""
    if given is None or given == [] or given == ():
        return list(range(dims))
    return [dim % dims for dim in ([given] if isinstance(given, int) else given)] if dims else []


def summed(node: Node, specs: Specs) -> Formula:
    """A sum over dims."""
    labels = _labels(_dims_of(node, specs))
    gone = _numbers(argument(node, "dim"), len(labels))
    return product([labels], [_reduced(labels, gone, bool(argument(node, "keepdim")))])


def reduced(node: Node, specs: Specs) -> Formula:
    """What is not a sum, over dims."""
    labels = _labels(_dims_of(node, specs))
    gone = _numbers(argument(node, "dim"), len(labels))
    kept = tuple(None if dim in gone else label for dim, label in enumerate(labels))
    output = _reduced(kept, gone, bool(argument(node, "keepdim")))
    return product([kept], [output] * len(node.outputs), nonlinear=[0])


def _reduced(labels: Labels, gone: Sequence[int], keeps: bool) -> Labels:
    if keeps:
        return tuple(None if dim in gone else label for dim, label in enumerate(labels))
    return tuple(label for dim, label in enumerate(labels) if dim not in gone)


def permuted(node: Node, specs: Specs) -> Formula:
    """Dims in another order."""
    labels = _labels(_dims_of(node, specs))
    order = list(range(len(labels)))
    match node.op:
        case "aten.t.default":
            order.reverse()
        case "aten.transpose.int":
            a, b = (argument(node, name) % len(order) for name in ("dim0", "dim1"))
            order[a], order[b] = order[b], order[a]
        case _:
            order = [dim % len(order) for dim in argument(node, "dims")]
    return product([labels], [tuple(labels[dim] for dim in order)])


def taken(node: Node, specs: Specs) -> Formula:
    """One of a dim's places, or each of them."""
    labels = _labels(_dims_of(node, specs))
    gone = argument(node, "dim") % len(labels)
    left = (*labels[:gone], *labels[gone + 1 :])
    return product([_without(labels, gone)], [left] * len(node.outputs))


def put_back(node: Node, specs: Specs) -> Formula:
    """Zeros, and at one place of a dim what is given."""
    (output,) = node.outputs
    labels = _labels(len(specs[str(output)].shape))
    place = argument(node, "dim") % len(labels)
    return product([(*labels[:place], *labels[place + 1 :])], [_without(labels, place)])


def pieces(node: Node, specs: Specs) -> Formula:
    """Ranges of a dim, or zeros around one: the other dims are the same."""
    (output, *_) = (name for name in node.outputs if name is not None)
    labels = _labels(_dims_of(node, specs))
    dim = argument(node, "dim") % len(labels)
    if specs[output].shape[dim] != specs[node.inputs[0]].shape[dim]:
        labels = _without(labels, dim)
    return product([labels], [labels] * len(node.outputs))


def padded(node: Node, specs: Specs) -> Formula:
    """Dims with numbers before and behind them, from the last dim on."""
    pad = argument(node, "pad")
    labels = list(_labels(_dims_of(node, specs)))
    for number in range(len(pad) // 2):
        if pad[2 * number] or pad[2 * number + 1]:
            labels[-1 - number] = None
    nonlinear = [0] if argument(node, "value") else []
    return product([tuple(labels)], [tuple(labels)], nonlinear)


def repeated(node: Node, specs: Specs) -> Formula:
    """Dims several times over, and new ones in front."""
    times = argument(node, "repeats")
    labels = _labels(_dims_of(node, specs))
    new = len(times) - len(labels)
    kept = tuple(a if n == 1 else None for a, n in zip(labels, times[new:], strict=True))
    return product([kept], [(None,) * new + kept])


def joined(node: Node, specs: Specs) -> Formula | None:
    """Tensors one behind the other, along a dim that is there (cat) or new (stack)."""
    (output,) = node.outputs
    labels = _labels(len(specs[str(output)].shape))
    dim = argument(node, "dim") % len(labels)
    held = _without(labels, dim)
    given = held if node.op.startswith("aten.cat.") else (*labels[:dim], *labels[dim + 1 :])
    if any(len(specs[name].shape) != len(given) for name in node.inputs):
        return None
    return total([given] * len(node.inputs), [held])


def gathered(node: Node, specs: Specs) -> Formula | None:
    """At each place of the index, one of the numbers along a dim of the tensor."""
    if not _dims_of(node, specs):
        return None
    source, index = _aligned(node, specs)
    dim = argument(node, "dim") % len(source)
    # A rank with some places of the dim finds what is there: of what all find, the sum is right.
    return product([(*source[:dim], "place", *source[dim + 1 :]), index], [index], nonlinear=[1])


def scattered(node: Node, specs: Specs) -> Formula | None:
    """The tensor, with other numbers at places along a dim, or with numbers added to them."""
    if not _dims_of(node, specs):
        return None
    source, index = _aligned(node, specs)
    adds = node.op.startswith("aten.scatter_add.")
    if not adds:
        # Of two ranks that write to the same place, which has the last word?
        index = _without(index, argument(node, "dim") % len(index))
    if not adds and not node.op.endswith(".src"):
        value = argument(node, "value")
        return product([source, index], [source], nonlinear=[1] if value == 0 else [0, 1])
    if specs[node.inputs[1]].shape != specs[node.inputs[2]].shape:
        return None
    formula = total([source, index, index], [source], nonlinear=[1])
    return replace(formula, terms=((frozenset({0}), frozenset({1, 2})),))


def _aligned(node: Node, specs: Specs) -> tuple[Labels, Labels]:
    """Labels of a tensor and of an index into one of its dims, the first and the second input."""
    source, index = (specs[name].shape for name in node.inputs[:2])
    dim = argument(node, "dim") % len(source)
    same = [a == b and d != dim for d, (a, b) in enumerate(zip(source, index, strict=True))]
    labels = _labels(len(source))
    ours = tuple(label if kept else None for label, kept in zip(labels, same, strict=True))
    return ours, (*ours[:dim], labels[dim], *ours[dim + 1 :])


def log_sums(node: Node, specs: Specs) -> Formula:
    """What parts of a dim have, at as many places of the results' dim as there are parts."""
    labels = _labels(_dims_of(node, specs))
    dim = argument(node, "dim")
    kept = _without(labels, dim)
    formula = product([kept], [kept, kept], nonlinear=[0])
    return Apart(formula.inputs, formula.outputs, formula.terms, formula.linear, dim=dim)


@dataclass(frozen=True)
class Apart(Formula):
    """A formula, and a dim by which input and outputs are split though it has other sizes."""

    dim: int = 0

    def signatures(self, node: Node, specs: Specs, parts: int, units: Units) -> Iterator[Signature]:
        yield from super().signatures(node, specs, parts, units)
        tensors = *node.inputs, *(name for name in node.outputs if name is not None)
        if all(specs[name].shape[self.dim] >= parts for name in tensors):
            outputs = tuple(None if name is None else S(self.dim) for name in node.outputs)
            yield Signature((S(self.dim),) * len(self.inputs), outputs)


def log_sum(node: Node, specs: Specs) -> Formula:
    """Of all places of a dim."""
    kept = _without(_labels(_dims_of(node, specs)), argument(node, "dim"))
    return product([kept, kept], [kept, kept], nonlinear=[0, 1])


def picked(node: Node, specs: Specs) -> Formula | None:
    """Rows of a dim, by a vector of their numbers (index_select)."""
    labels = _labels(_dims_of(node, specs))
    dim = argument(node, "dim") % len(labels)
    output = (*labels[:dim], "row", *labels[dim + 1 :])
    return product([_without(labels, dim), ("row",)], [output], nonlinear=[1])


def indexed(node: Node, specs: Specs) -> Formula | None:
    """`x[:, i, j]`: index tensors, broadcast together, for some dims."""
    labels, at, places = _indices(node, specs)
    if any(specs[name].dtype == torch.bool for name in node.inputs[1:]):
        return None
    left = [label for dim, label in enumerate(labels) if dim not in at]
    if list(at) == list(range(at[0], at[0] + len(at))):
        output = (*labels[: at[0]], *_longest(places), *labels[at[-1] + 1 :])
    else:
        output = (*_longest(places), *left)
    source = tuple(None if dim in at else label for dim, label in enumerate(labels))
    return product([source, *places], [output], nonlinear=range(1, len(places) + 1))


def put(node: Node, specs: Specs) -> Formula | None:
    """`x[:, i, j] = values`, or `+=`."""
    read_back = indexed(replace(node, args=node.args[:2]), specs)
    if read_back is None:
        return None
    source, *places = read_back.inputs
    (values,) = read_back.outputs
    assert values is not None
    number = len(places) + 1
    if len(specs[node.inputs[number]].shape) != len(values):
        return None
    formula = total([source, *places, values], [source], nonlinear=range(1, number))
    if argument(node, "accumulate"):
        # The tensor itself is a term without places.
        terms = (frozenset({0}), frozenset(range(1, number + 1)))
        return replace(formula, terms=(terms,))
    return formula.whole(*(label for place in places for label in place if label is not None))


def _indices(node: Node, specs: Specs) -> tuple[Labels, tuple[int, ...], list[Labels]]:
    """Labels of the tensor, the dims that are indexed, and labels of each index."""
    labels = _labels(len(specs[node.inputs[0]].shape))
    given = [(dim, ref) for dim, ref in enumerate(argument(node, "indices")) if ref is not None]
    places: list[Labels] = []
    for _, ref in given:
        dims = len(specs[ref.name].shape)
        places.append(tuple(f"place{dims - 1 - dim}" for dim in range(dims)))
    return labels, tuple(dim for dim, _ in given), places


def _longest(places: Sequence[Labels]) -> Labels:
    return max(places, key=len)


def convolution(node: Node, specs: Specs) -> Formula | None:
    area = "." * (_dims_of(node, specs) - 2)
    if argument(node, "groups") != 1:
        return read(f"n.{area}, ..{area} + . -> n.{area}", node, specs)
    weight = "co" if argument(node, "transposed") else "oc"
    return read(f"nc{area}, {weight}{area} + o -> no{area}", node, specs)


def convolution_backward(node: Node, specs: Specs) -> Formula | None:
    """Gradients of the input, the weight and the bias."""
    area = "." * (_dims_of(node, specs) - 2)
    if argument(node, "groups") != 1:
        text = "n.~, n.~, ..~ -> n.~(02), ..~(01), .(0)"
    elif argument(node, "transposed"):
        text = "no~, nc~, co~ -> nc~(02), co~(01), o(0)"
    else:
        text = "no~, nc~, oc~ -> nc~(02), oc~(01), o(0)"
    return read(text.replace("~", area), node, specs)


def normalized(text: str) -> Rule:
    """With `~` for the dims that are normalized."""

    def rule(node: Node, specs: Specs) -> Formula | None:
        return read(text.replace("~", "." * len(argument(node, "normalized_shape"))), node, specs)

    return rule


def nll_loss_backward(node: Node, specs: Specs) -> Formula | None:
    """Numbers of a row's classes are not known to a rank with some of the classes alone."""
    gradient = "n" if argument(node, "reduction") == 0 else "()"
    return read(f"{gradient}, n.!, n!, .!, ()! -> n.", node, specs)


def attention(node: Node, specs: Specs) -> Formula | None:
    """Queries are independent of each other, unless each knows by its number what it may see."""
    q, mask = _queries(node, specs)
    return read(f"bh{q}.!, bh..!, bh.., {mask}! -> bh{q}.(0123), bh{q}(013)", node, specs)


def attention_backward(node: Node, specs: Specs) -> Formula | None:
    """Gradients of queries, keys and values."""
    q, mask = _queries(node, specs)
    text = f"bhq., bhq.!, bh..!, bh..!, bhq.!, bhq!, {mask}! -> bhq., bh.., bh.."
    return read(text.replace("q", q), node, specs)


def _queries(node: Node, specs: Specs) -> tuple[str, str]:
    """The letter of queries, and the word of the mask."""
    q, mask = "." if argument(node, "is_causal") else "q", argument(node, "attn_mask")
    return q, f"bh{q}." if mask is None or len(specs[mask.name].shape) == 4 else f"{q}."


def embedding_backward(node: Node, specs: Specs) -> Formula | None:
    """A rank with some rows adds up what is theirs."""
    if argument(node, "scale_grad_by_freq"):  # counts rows in all of the batch
        return None
    return read("*w, *! -> vw", node, specs)


def filled(node: Node, specs: Specs) -> Formula:
    """Made of one number; of a tensor that is given, shape and dtype count alone."""
    (output,) = node.outputs
    labels = _labels(len(specs[str(output)].shape))
    alike = "_like." in node.op
    given = [labels if alike else (None,) * len(specs[n].shape) for n in node.inputs]
    every = range(len(given))
    value = argument(node, "fill_value") if "full" in node.op else "zeros" not in node.op
    formula = product(given, [labels], nonlinear=every)
    return replace(formula, unread=frozenset(every), zeros=value == 0)


def counted(node: Node, specs: Specs) -> Formula | None:
    """Numbers from a start on, by a step: of integers, any part begins at a number of its own."""
    whole = all(isinstance(value, int) for value in node.args)
    return product([], [("a" if whole else None,)])
