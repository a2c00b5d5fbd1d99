"""Random numbers that depend on where an element lies, and on nothing else.

`penstock.uniform(seed, salt, shape, start, size)` gives the part [start, start + size) of a tensor
of that shape, of numbers in [0, 1). The element at flat position i has

    u = (mix(mix(seed + salt * K1) + i * K2) >> 40) / 2^24

with splitmix64's finalizer as mix (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014) on int64, which wraps. So a tensor can be computed by whoever needs any
part of it, as often as need be, and is the same however it is split: dropout that is split over
ranks drops what one process would, and a recomputed mask is the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from penstock.model.operators import define

K1, K2 = -7046029254386353131, -4658895280553007687  # 2^64 / golden ratio; a unit of the mixer
"""As int64."""
M1, M2 = -4658895280553007687, -7723592293110705685


def uniform(
    seed: torch.Tensor,
    salt: int,
    shape: Sequence[int],
    start: Sequence[int],
    size: Sequence[int],
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A part of a tensor of random numbers.

    Arguments:
        seed: int64, no dims.
        salt: tells apart the tensors of one seed.
        shape: of the whole tensor.
        start, size: the part, by dim.
        dtype: float; the numbers have 24 bits (fewer where the dtype has fewer).

    Returns:
        Of this size and dtype, in [0, 1).
    """
    device = seed.device
    position = torch.zeros([1] * len(shape), dtype=torch.int64, device=device)
    stride = 1
    for dim in reversed(range(len(shape))):
        along = torch.arange(start[dim], start[dim] + size[dim], device=device) * stride
        position = position + along.reshape([-1] + [1] * (len(shape) - dim - 1))
        stride *= shape[dim]
    bits = _mix(position.mul_(K2).add_(_mix(seed + salt * K1 % 2**63)))
    # In a dtype of fewer than 24 bits a number next to 1 would be rounded to it.
    digits = min(24, {torch.float16: 11, torch.bfloat16: 8}.get(dtype, 24))
    top = bits.bitwise_right_shift_(64 - digits).bitwise_and_(2**digits - 1)
    return top.to(dtype).mul_(2.0**-digits)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """In place."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(M1)
    x.bitwise_xor_(_shifted(x, 27)).mul_(M2)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros from the left, as for an unsigned number."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


define(
    "uniform(Tensor seed, int salt, int[] shape, int[] start, int[] size, *, "
    "ScalarType dtype) -> Tensor",
    uniform,
)
