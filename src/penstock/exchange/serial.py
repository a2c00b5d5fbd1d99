"""Copies and arithmetic on one thread.

torch spreads what has `GRAIN` elements or more over its threads. All ranks of a host would do so at
once, beside those that wait for them: with two threads each, two ranks on two cores took 4 ms for
an all-reduce of 64 KiB and 257 ms for one of 64 MiB; on one thread 14 us and 6 ms.
[measured: AMD EPYC, 2 cores, 2026-11]
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

GRAIN = 32_768
"""torch's at::internal::GRAIN_SIZE."""

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
        numpy: the same for many.
    """

    def __init__(self, torch: Callable[..., torch.Tensor], numpy: Any) -> None:
        self._torch, self._numpy = torch, numpy

    def __call__(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if len(out) < GRAIN or out.dtype not in _NUMPY:
            return self._torch(left, right, out=out)
        self._numpy(left.numpy(), right.numpy(), out.numpy())
        return out


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
