"""What may be split: the rule of every operator, and the signatures that follow from it.

A rule is a formula (`formula` says how to read it), or where dims are arguments a function that
makes one (`dims`); views have theirs (`views`). An operator is known by its name, for all of its
overloads, or by the name of one overload. One without a rule runs on copies alone.

What a rank calls then, where arguments speak of sizes and places, is said by `localize`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch

from penstock.model.graph import Node, Spec
from penstock.plan.layout import B, P, possible
from penstock.plan.rules import dims, views
from penstock.plan.rules.dims import Rule
from penstock.plan.rules.formula import Signature, Specs, Units, read
from penstock.plan.rules.localize import localized
from penstock.plan.rules.views import units_of

__all__ = [
    "Combination", "Signature", "Units", "combinations", "has_rule", "localized", "signatures",
    "units_of",
]  # fmt: skip

Combination = tuple[Signature, ...]
"""A signature for each axis of a mesh."""

TABLE: tuple[tuple[str | Rule, str], ...] = (
    # Products of matrices.
    ("ik, kj -> ij", "mm"),
    ("bik, bkj -> bij", "bmm"),
    ("*ik, *kj -> *ij", "matmul"),
    ("ik, k -> i", "mv"),
    ("k, k -> ()", "dot"),
    # Pointwise, linear in something.
    ("* -> *", "_to_copy alias clone detach expand lift_fresh_copy neg positive"),
    ("* + * -> *", "add lerp.Scalar rsub sub"),
    ("* + *, *! -> *", "addcdiv lerp.Tensor"),
    ("*, * -> *", "mul"),
    ("*, *! -> *", "div gelu_backward hardsigmoid_backward hardswish_backward hardtanh_backward "
                   "leaky_relu_backward mish_backward sigmoid_backward silu_backward "
                   "softplus_backward tanh_backward threshold_backward"),
    ("*, *!, *! -> *", "log_sigmoid_backward"),
    ("*, ()!, ()!, ()!, *! -> *", "elu_backward"),
    ("* + *, * -> *", "addcmul"),
    ("*!, * + * -> *", "where"),
    ("*, *! + * -> *", "masked_fill"),
    ("*!, * -> *", "copy"),
    # Pointwise, not linear.
    ("*! -> *", "abs bitwise_not ceil clamp clamp_max clamp_min cos elu erf exp exp2 expm1 fill "
                "floor gelu hardsigmoid hardswish hardtanh isinf isnan leaky_relu log log10 log1p "
                "log2 logical_not mish nan_to_num pow.Tensor_Scalar reciprocal relu round rsqrt "
                "sigmoid sign silu sin softplus sqrt tan tanh trunc"),
    ("*!, *! -> *", "atan2 bitwise_and bitwise_or bitwise_xor div.Scalar_mode div.Tensor_mode eq "
                    "floor_divide fmod ge gt le logical_and logical_or logical_xor lt maximum "
                    "minimum ne pow.Scalar pow.Tensor_Tensor remainder"),
    ("*! -> *, *", "log_sigmoid_forward"),
    # Reductions, and what knows all of a dim.
    (dims.summed, "sum.dim_IntList"),
    (dims.reduced, "all.dim amax amin any.dim argmax argmin logsumexp max.dim min.dim "
                   "prod.dim_int"),
    (dims.along("* -> *"), "cumsum"),
    (dims.along("* -> *", "dims"), "flip roll"),
    (dims.along("*! -> *"), "_log_softmax _safe_softmax _softmax cumprod glu"),
    (dims.along("*, *! -> *"), "_log_softmax_backward_data _softmax_backward_data glu_backward"),
    (dims.along("*! -> *, *"), "sort topk"),
    # Dims and pieces.
    (dims.permuted, "permute t transpose.int"),
    (dims.taken, "select.int unbind.int"),
    (dims.put_back, "select_backward"),
    (dims.pieces, "slice.Tensor slice_backward split.Tensor split_with_sizes"),
    (dims.joined, "cat stack"),
    (dims.padded, "constant_pad_nd"),
    (dims.repeated, "repeat"),
    ("*rc -> *rc", "tril triu"),
    # Indices.
    ("vw, *! -> *w", "embedding"),
    (dims.embedding_backward, "embedding_dense_backward"),
    (dims.gathered, "gather"),
    (dims.scattered, "scatter.src scatter.value scatter_add"),
    (dims.picked, "index_select"),
    (dims.indexed, "index.Tensor"),
    (dims.put, "index_put"),
    # Layers.
    (dims.convolution, "convolution"),
    (dims.convolution_backward, "convolution_backward"),
    ("*..! -> *.., *..", "max_pool2d_with_indices adaptive_max_pool2d"),
    ("*.., *..!, *..! -> *..", "max_pool2d_with_indices_backward adaptive_max_pool2d_backward"),
    ("*.. -> *..", "avg_pool2d _adaptive_avg_pool2d upsample_bilinear2d upsample_nearest2d "
                   "upsample_bilinear2d_backward upsample_nearest2d_backward"),
    ("*.., *..! -> *..", "avg_pool2d_backward _adaptive_avg_pool2d_backward"),
    ("*... -> *...", "pixel_shuffle pixel_unshuffle"),
    (dims.normalized("*~!, ~!, ~! -> *~, *~, *~"), "native_layer_norm"),
    (dims.normalized("*~, *~!, *~!, *~!, ~!, ~! -> *~, ~(0123), ~(0)"),
     "native_layer_norm_backward"),
    (dims.nll_loss_backward, "nll_loss_backward"),
    # Losses by classes.
    (dims.log_sums, "penstock.log_sums"),
    (dims.log_sum, "penstock.log_sum"),
    ("*, *! -> *", "penstock.put_at"),
    ("*, *!, *!, *!, *! -> *", "penstock.class_gradient"),
    (dims.attention, "_scaled_dot_product_flash_attention_for_cpu"),
    (dims.attention_backward, "_scaled_dot_product_flash_attention_for_cpu_backward"),
    # Made of nothing.
    (dims.filled, "empty empty_like full full_like new_empty new_full new_ones new_zeros ones "
                  "ones_like zeros zeros_like"),
    (dims.counted, "arange"),
    ("-> ()", "scalar_tensor"),
    ("-> ..", "tril_indices triu_indices eye"),
    ("()! -> *", "penstock.uniform"),
)  # fmt: skip

RULES: dict[str, str | Rule] = {
    name if name.startswith("penstock.") else f"aten.{name}": rule
    for rule, names in TABLE
    for name in names.split()
}


def has_rule(op: str) -> bool:
    """Whether an operator of this full name may ever be split."""
    return op in views.VIEWS or _rule(op) is not None


def _rule(op: str) -> str | Rule | None:
    return RULES.get(op) or RULES.get(op.rpartition(".")[0])


def signatures(
    node: Node, specs: Mapping[str, Spec], parts: int, units: Units | None = None
) -> tuple[Signature, ...]:
    """All legal ways to run a node on one axis.

    Arguments:
        specs: of the whole tensors, by name.
        parts: ranks of the axis.
        units: by which dims may be cut, as `units_of` finds them in a graph.

    Returns:
        Each once; the first has B alone.
    """
    whole = Signature(
        (B,) * len(node.inputs), tuple(None if o is None else B for o in node.outputs)
    )
    found = {whole: None}
    for signature in _of_rule(node, specs, parts, units or {}):
        if _can_be_partial(signature, node, specs):
            found[signature] = None
    return tuple(found)


def _of_rule(node: Node, specs: Specs, parts: int, units: Units) -> Iterator[Signature]:
    if node.op in views.VIEWS:
        yield from views.signatures(node, specs, parts, units)
        return
    rule = _rule(node.op)
    formula = read(rule, node, specs) if isinstance(rule, str) else rule and rule(node, specs)
    if formula:
        yield from formula.signatures(node, specs, parts, units)


def _can_be_partial(signature: Signature, node: Node, specs: Specs) -> bool:
    """Whether what is partial has numbers that can be added, and is not rounded to whole ones."""
    given = {specs[n].dtype for n, p in zip(node.inputs, signature.inputs) if p == P}
    made = {specs[n].dtype for n, p in zip(node.outputs, signature.outputs) if n and p == P}
    rounded = any(d.is_floating_point for d in given) and not all(d.is_floating_point for d in made)
    return torch.bool not in given | made and not rounded


def combinations(
    node: Node, specs: Mapping[str, Spec], sizes: Sequence[int], units: Units | None = None
) -> tuple[Combination, ...]:
    """All legal ways to run a node on a mesh.

    Arguments:
        sizes: of the mesh's axes.
        specs, units: as of `signatures`.

    Returns:
        Each once; the first has B alone.
    """
    found = []
    for chosen in itertools.product(*(signatures(node, specs, size, units) for size in sizes)):
        if _fits(node, specs, sizes, chosen):
            found.append(chosen)
    return tuple(found)


def _fits(node: Node, specs: Specs, sizes: Sequence[int], chosen: Combination) -> bool:
    if len(sizes) == 1:
        return True
    given = zip(node.inputs, zip(*(s.inputs for s in chosen)))
    made = zip(node.outputs, zip(*(s.outputs for s in chosen)))
    return all(
        name is None or possible(specs[name].shape, layout, sizes)
        for name, layout in itertools.chain(given, made)
    ) and (node.op not in views.VIEWS or views.agrees(node, specs, chosen, sizes))
