"""What an operator takes from torch's allocator for itself, and gives back before it returns.

Of those operators that are found near the peaks of the zoo's networks on a CPU; all others are
taken to need none. [measured, torch 2.13, Intel Xeon with AVX-512, 2026-11]

    convolution     oneDNN (float32) computes in tensors whose channels lie in blocks of 16:
                    x, w and y in blocks at once, then y in blocks beside y; backward likewise.
                    Else the columns of im2col: channels x kernel x positions.
    uniform         two tensors of int64
    softmax         where it is not over the last dim, its input in another order
    pointwise       operands that are computed in another dtype than they have

A library's memory that does not come from torch's allocator is not in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from penstock.model.graph import Node, Ref, Spec, operator_of

BLOCK = 16
"""Channels that lie together in oneDNN's blocks with AVX-512."""
PLAIN_CHANNELS = 4
"""With at most as many, oneDNN reads images as they are."""
WORD_BYTES = 8
"""Of an int64."""


@functools.cache
def pointwise(op: str) -> bool:
    """Whether each element of the result is of the elements at its place in the arguments."""
    return torch.Tag.pointwise in getattr(operator_of(op), "tags", ())


def scratch_bytes(node: Node, specs: Mapping[str, Spec]) -> int:
    """Bytes that a node takes on a CPU, above those of its results.

    Arguments:
        node: whose arguments are whole tensors, or those of a rank's parts.
        specs: at least those of what it reads and makes.
    """
    made = next((specs[name] for name in node.outputs if name is not None), None)
    if made is None:
        return 0
    match node.op:
        case "penstock.uniform.default":
            return 2 * WORD_BYTES * made.numel - made.num_bytes
        case "aten._safe_softmax.default":
            return made.numel  # where a row is all -inf
        case "aten._log_softmax.default" | "aten._softmax.default":
            last = not made.shape or node.args[1] % len(made.shape) == len(made.shape) - 1
            return 0 if last else made.num_bytes
        case "aten.convolution.default":
            return _convolution(node, specs, node.args[:2], node.args[3:], made, forward=True)
        case "aten.convolution_backward.default":
            given = specs[node.args[0].name]
            return _convolution(node, specs, node.args[1:3], node.args[4:], given, forward=False)
    return _converted(node, specs) if pointwise(node.op) else 0


def _converted(node: Node, specs: Mapping[str, Spec]) -> int:
    """Operands in another dtype than their common one, but numbers without dims."""
    names = node.inputs[1:] if node.op.startswith("aten.where.") else node.inputs
    read = [specs[name] for name in names if specs[name].shape]
    if not read:
        return 0
    common = functools.reduce(torch.promote_types, (spec.dtype for spec in read))
    return sum(spec.numel * common.itemsize for spec in read if spec.dtype != common)


def _convolution(
    node: Node,
    specs: Mapping[str, Spec],
    operands: tuple[Ref, Ref],
    options: tuple[Any, ...],
    y: Spec,
    *,
    forward: bool,
) -> int:
    """Arguments: operands are (x, w); options (stride, padding, dilation, transposed, .., groups);
    y is the result, or its gradient."""
    x, w = (specs[ref.name] for ref in operands)
    stride, _, dilation, _, _, groups = options[:6]
    kernel = w.shape[2:]
    steps = any(n != 1 for n in (*stride, *dilation))
    if not _by_onednn(x, kernel, steps, groups):
        if all(n == 1 for n in kernel) and not steps:
            return 0
        positions = y.shape[0] * math.prod(y.shape[2:])
        columns: int = x.shape[1] // groups * math.prod(kernel) * positions
        return columns * x.dtype.itemsize
    x_bytes = 0 if x.shape[1] <= PLAIN_CHANNELS else _in_blocks(x)
    if forward:
        return max(x_bytes + w.num_bytes + _in_blocks(y) - y.num_bytes, _in_blocks(y))
    return x_bytes + _in_blocks(y)


def _in_blocks(spec: Spec) -> int:
    channels = -(-spec.shape[1] // BLOCK) * BLOCK
    return spec.num_bytes // spec.shape[1] * channels


def _by_onednn(x: Spec, kernel: tuple[int, ...], steps: bool, groups: int) -> bool:
    """As torch chooses: aten/src/ATen/native/Convolution.cpp, `use_mkldnn`."""
    single = all(n == 1 for n in kernel)
    large = groups > 1 or min(kernel) > 3 or x.shape[0] > 1 or x.numel > 20480
    worth = steps or x.shape[0] >= 16 or not single or torch.get_num_threads() > 1
    return x.dtype == torch.float32 and worth and large
