"""Rules of operators, proved by numbers.

`check` gives an operator random inputs, and gives each rank of a mesh its parts of them, for every
signature that the rules offer: what the ranks return, joined, must be what the whole returns. All
is in float64, so that sums in another order differ by less than the tolerance.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from penstock.model.cross_entropy import log_sum
from penstock.model.graph import Graph, Node, Ref, Spec
from penstock.plan.layout import (
    B,
    Layout,
    P,
    everyone,
    in_words,
    join,
    local_shape,
    rank_of,
    split,
)
from penstock.plan.rules.formula import argument
from penstock.plan.rules.signatures import (
    Combination,
    Signature,
    Units,
    combinations,
    localized,
)

aten = torch.ops.aten
TOLERANCE = 1e-9
"""Relative to the largest number of a result, or to 1."""

Ways = Callable[[Node, Mapping[str, Spec], Sequence[int], Units], Sequence[Combination]]


def check(
    node: Node,
    specs: Mapping[str, Spec],
    sizes: Sequence[int],
    units: Units | None = None,
    at_most: int | None = None,
    ways: Ways = combinations,
) -> int:
    """Checks the signatures of a node on a mesh.

    Arguments:
        specs: of its tensors, by name.
        sizes: of the mesh's axes.
        units: by which dims may be cut.
        at_most: a sample of so many signatures is checked, where there are more.
        ways: what gives the signatures, in place of the rules.

    Returns:
        How many have been checked.

    Raises:
        AssertionError: names the operator, the signature, the rank, and what is wrong there.
    """
    node, specs = _in_double(node, specs)
    offered = list(ways(node, specs, sizes, units or {}))
    if at_most is not None and len(offered) > at_most:
        offered = random.Random(node.name).sample(offered, at_most)
    generator = torch.Generator().manual_seed(0)
    inputs = _consistent(node, [_random(specs[name], generator) for name in node.inputs])
    expected = _called(node, inputs)
    for chosen in offered:
        words = f"{node.op} of {', '.join(str(specs[n]) for n in node.inputs)} on {tuple(sizes)}: "
        words += " | ".join(map(str, chosen))
        _check_one(node, specs, sizes, chosen, inputs, expected, words, generator)
    return len(offered)


def distinct(graphs: Iterable[Graph]) -> list[tuple[Node, Graph]]:
    """The nodes of graphs, of those that differ in names alone the first."""
    found: dict[str, tuple[Node, Graph]] = {}
    for graph in graphs:
        for node in graph.nodes:
            args = node.with_tensors([Ref(str(graph.specs[name])) for name in node.inputs])
            made = [None if name is None else str(graph.specs[name]) for name in node.outputs]
            # A salt changes the numbers, and not what they depend on.
            salt = node.op.startswith("penstock.uniform")
            key = f"{node.op} {args[0][2:] if salt else args} {made}"
            found.setdefault(key, (node, graph))
    return list(found.values())


def _check_one(
    node: Node,
    specs: Mapping[str, Spec],
    sizes: Sequence[int],
    chosen: Combination,
    inputs: Sequence[torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    words: str,
    generator: torch.Generator,
) -> None:
    given = [
        _parts(whole, tuple(s.inputs[number] for s in chosen), sizes, generator)
        for number, whole in enumerate(inputs)
    ]
    results = []
    for rank, coordinates in enumerate(everyone(sizes)):
        call = localized(node, specs, chosen, sizes, coordinates)
        try:
            results.append(_called(call, [parts[rank] for parts in given]))
        except (RuntimeError, IndexError, ValueError) as error:
            raise AssertionError(f"{words}: rank {rank} cannot call {call}: {error}") from error
    if "empty" in node.op:
        return  # of no numbers in particular
    if node.op in MEANINGS:
        expected, results = _by_meaning(node, specs, sizes, chosen, expected, results, words)
        chosen = tuple(Signature(s.inputs, (B,) * len(s.outputs)) for s in chosen)
    for number, name in enumerate(node.outputs):
        if name is not None:
            layout = tuple(s.outputs[number] or B for s in chosen)
            parts = [result[name] for result in results]
            _compare(expected[name], parts, layout, sizes, f"{words}: output {number}")


def _by_meaning(
    node: Node,
    specs: Mapping[str, Spec],
    sizes: Sequence[int],
    chosen: Combination,
    expected: Mapping[str, torch.Tensor],
    results: Sequence[Mapping[str, torch.Tensor]],
    words: str,
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Of whole and of joined results what they mean, as if on all ranks; parts and copies are
    checked for themselves."""
    names = [str(name) for name in node.outputs]
    joined: dict[str, torch.Tensor] = {}
    for number, name in enumerate(names):
        layout = tuple(s.outputs[number] or B for s in chosen)
        assert P not in layout, f"{words}: what has a meaning of its own is no sum"
        parts = [result[name] for result in results]
        shapes = [local_shape(specs[name].shape, layout, sizes, at) for at in everyone(sizes)]
        found = [tuple(part.shape) for part in parts]
        assert found == shapes, f"{words}: output {number} is {found}, not {shapes}"
        joined[name] = join(parts, layout, sizes, specs[name].shape)
        for part, at in zip(parts, everyone(sizes), strict=True):
            same = torch.equal(part, split(joined[name], layout, sizes, at))
            assert same, f"{words}: output {number}: copies differ"
    meant = [
        dict(zip(names, MEANINGS[node.op](node, [of[n] for n in names]), strict=True))
        for of in (expected, joined)
    ]
    return meant[0], [meant[1]] * len(results)


def _compare(
    whole: torch.Tensor,
    parts: Sequence[torch.Tensor],
    layout: Layout,
    sizes: Sequence[int],
    words: str,
) -> None:
    """Every part with what it should be; where they are partial, their sum."""
    summed, rest = _partial(layout)
    finite = whole[whole.isfinite()].double().abs()
    largest = max(1.0, float(finite.max())) if finite.numel() else 1.0
    for coordinates in everyone(sizes):
        if any(coordinates[axis] for axis in summed):
            continue
        total = None
        for along in itertools.product(*(range(sizes[axis]) for axis in summed)):
            there = list(coordinates)
            for axis, index in zip(summed, along, strict=True):
                there[axis] = index
            part = parts[rank_of(sizes, tuple(there))]
            shape = local_shape(whole.shape, layout, sizes, tuple(there))
            found = tuple(part.shape)
            assert found == shape, f"{words} at {there} is {found}, not {shape}"
            total = part if total is None else total + part
        assert total is not None
        wanted = split(whole, rest, sizes, coordinates)
        assert total.dtype == wanted.dtype, f"{words} is {total.dtype}, not {wanted.dtype}"
        if wanted.dtype.is_floating_point:
            near = torch.allclose(total, wanted, rtol=0, atol=TOLERANCE * largest, equal_nan=True)
        else:
            near = torch.equal(total, wanted)
        assert near, f"{words} at {coordinates} lies as {in_words(layout)}, and has other numbers"


def _parts(
    whole: torch.Tensor, layout: Layout, sizes: Sequence[int], generator: torch.Generator
) -> list[torch.Tensor]:
    """What each rank is given; where it is partial, random numbers whose sum is the whole."""
    summed, rest = _partial(layout)
    places = list(itertools.product(*(range(sizes[axis]) for axis in summed)))
    addends = [_random(Spec.of(whole), generator) for _ in places[1:]]
    first = whole.clone()
    for addend in addends:
        first -= addend
    of = dict(zip(places, [first, *addends], strict=True))
    return [
        split(of[tuple(coordinates[axis] for axis in summed)], rest, sizes, coordinates)
        for coordinates in everyone(sizes)
    ]


def _partial(layout: Layout) -> tuple[list[int], Layout]:
    """The axes on which it is partial, and the layout without that."""
    axes = [axis for axis, placement in enumerate(layout) if placement == P]
    return axes, tuple(B if placement == P else placement for placement in layout)


def _called(node: Node, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    args, kwargs = node.with_tensors(tensors)
    with torch.no_grad():
        return node.results(node.function(*args, **kwargs))


def _in_double(node: Node, specs: Mapping[str, Spec]) -> tuple[Node, dict[str, Spec]]:
    def wide(value: Any) -> Any:
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return torch.float64
        if isinstance(value, tuple | list):
            return type(value)(map(wide, value))
        return value

    names = [name for name in (*node.inputs, *node.outputs) if name is not None]
    dtypes = {name: wide(specs[name].dtype) for name in names}
    kwargs = {key: wide(value) for key, value in node.kwargs.items()}
    args = tuple(map(wide, node.args))
    widened = replace(node, args=args, kwargs=kwargs)
    return widened, {name: Spec(specs[name].shape, dtype) for name, dtype in dtypes.items()}


def _random(spec: Spec, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype.is_floating_point:
        return torch.randn(spec.shape, dtype=spec.dtype, generator=generator)
    if spec.dtype == torch.bool:
        return torch.rand(spec.shape, generator=generator) < 0.5
    return torch.randint(0, 5, spec.shape, dtype=spec.dtype, generator=generator)


MEANINGS: dict[str, Callable[[Node, Sequence[torch.Tensor]], Sequence[torch.Tensor]]] = {
    "penstock.log_sums.default": lambda node, of: log_sum(of[0], of[1], argument(node, "dim")),
}
"""Operators that may give other numbers where they are split, which mean the same."""

POSITIVE = {
    "aten.sqrt": 0, "aten.rsqrt": 0, "aten.log": 0, "aten.log1p": 0, "aten.pow": 0,
    "aten.reciprocal": 0, "aten.div": 1, "aten.addcdiv": 2, "aten.nll_loss_backward": -1,
}  # fmt: skip
"""Inputs that are positive, so that results are numbers, and not so large that they hide others."""


def _consistent(node: Node, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Random inputs, of which some are made as other operators make them."""
    op = node.op.rpartition(".")[0]
    if op in POSITIVE and POSITIVE[op] < len(inputs):
        inputs[POSITIVE[op]] = inputs[POSITIVE[op]].abs() + 0.5
    match op:
        case "aten.embedding":
            inputs[1] %= inputs[0].shape[0]
        case "aten.embedding_dense_backward":
            inputs[1] %= argument(node, "num_weights")
        case "aten.gather" | "aten.scatter" | "aten.scatter_add" | "aten.index_select":
            shape = inputs[0].shape or (1,)
            inputs[1] %= shape[argument(node, "dim")]
        case "aten.index" | "aten.index_put":
            indices = argument(node, "indices")
            dims = [dim for dim, index in enumerate(indices) if index is not None]
            for number, dim in enumerate(dims, start=1):
                inputs[number] %= inputs[0].shape[dim]
        case "penstock.put_at":
            inputs[1] = inputs[1] * 5 % argument(node, "size")  # in all parts
        case "penstock.class_gradient":
            inputs[4] = inputs[4] * 5 % inputs[1].shape[argument(node, "dim")]
        case "aten.nll_loss_backward":
            inputs[2] %= inputs[1].shape[1]
        case "aten.max_pool2d_with_indices_backward":
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            how = [argument(node, name) for name in names]
            inputs[2] = aten.max_pool2d_with_indices(inputs[1], *how)[1]
        case "aten.adaptive_max_pool2d_backward":
            inputs[2] = aten.adaptive_max_pool2d(inputs[1], inputs[0].shape[-2:])[1]
        case "aten._softmax_backward_data":
            inputs[1] = inputs[1].softmax(argument(node, "dim"))
        case "aten._log_softmax_backward_data":
            inputs[1] = inputs[1].log_softmax(argument(node, "dim"))
        case "aten.native_layer_norm_backward":
            normal = argument(node, "normalized_shape")
            inputs[2:4] = aten.native_layer_norm(inputs[1], normal, None, None, 1e-5)[1:]
        case "aten._scaled_dot_product_flash_attention_for_cpu_backward":
            causal, scale = argument(node, "is_causal"), argument(node, "scale")
            mask = inputs[6] if len(inputs) > 6 else None
            inputs[4:6] = aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs[1:4], 0.0, causal, attn_mask=mask, scale=scale
            )
    return inputs
