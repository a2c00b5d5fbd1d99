"""Copies and arithmetic on one thread.

torch spreads what has `GRAIN` elements or more over its threads. All ranks of a host would do so at
once, beside those that wait for them: with two threads each, two ranks on two cores took 4 ms for
an all-reduce of 64 KiB and 257 ms for one of 64 MiB; on one thread 14 us and 6 ms.
[measured: AMD EPYC, 2 cores, 2026-11]
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

GRAIN = 32_768
"""torch's at::internal::GRAIN_SIZE."""

Function = Callable[..., Any]
"""`function(left, right, out=...)` of tensors or of arrays; None for `out` is new memory."""

_NUMPY = {
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
}


def many_at_once(dtype: torch.dtype) -> bool:
    """Whether an `Operator` stays on one thread for any number of elements; else below `GRAIN`."""
    return dtype in _NUMPY


class Operator:
    """An elementwise operation of two tensors (n,), on one thread.

    Arguments:
        torch: for few elements, and for what numpy does not know, as bfloat16.
        numpy: the same for many, and for many a piece at a time, since a slice of an array costs a
            tenth of one of a tensor.
    """

    def __init__(self, torch: Function, numpy: Function) -> None:
        self._torch, self._numpy = torch, numpy

    def ready(
        self, parts: Sequence[torch.Tensor], out: torch.Tensor
    ) -> tuple[Function, Sequence[Any], Any]:
        """The function for such tensors, all of one size, and what it takes in their place, or
        slices of: the same memory."""
        if len(out) < GRAIN or out.dtype not in _NUMPY:
            return self._torch, parts, out
        return self._numpy, [part.numpy() for part in parts], out.numpy()


def divide(tensor: torch.Tensor, divisor: int) -> None:
    """Divides (n,) of a floating or complex dtype in place."""
    if len(tensor) < GRAIN or tensor.dtype not in _NUMPY:
        tensor.div_(divisor)
    else:
        array = tensor.numpy()
        np.divide(array, divisor, out=array)


def copy(source: torch.Tensor, out: torch.Tensor) -> None:
    """Copies contiguous tensors of one dtype and size, unless they are one."""
    here, there = source.data_ptr(), out.data_ptr()
    if here != there:
        ctypes.memmove(there, here, source.nbytes)
