"""Operators written by others, so that what is left can be split over ranks.

A mean is a sum and a factor: the factor is of the whole tensor, wherever the sum is taken. Batch
norm is written with sums over the batch, so that statistics of a split batch are those of the
whole. A loss by classes takes one number of each row, and backward puts one there, by an operator
of its own. Random operators become `penstock.uniform`, which is the same however it is split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._decomp import decompositions, get_decompositions

from penstock.model import cross_entropy, randomness

aten: Any = torch.ops.aten
_salts = itertools.count()
"""Tells apart the random tensors of a graph; see `fresh_salts`."""
assert cross_entropy
assert randomness  # they register operators


def fresh_salts() -> None:
    """The next graph numbers its random tensors from zero."""
    global _salts
    _salts = itertools.count()


def _addmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    product = torch.mm(a, b)
    if alpha != 1:
        product = product * alpha
    return product + (bias if beta == 1 else bias * beta)


def _baddbmm(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    product = torch.bmm(a, b)
    if alpha != 1:
        product = product * alpha
    return product if beta == 0 else product + (bias if beta == 1 else bias * beta)


def _mean(
    x: torch.Tensor,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    dims = list(range(x.dim())) if not dim else [d % x.dim() for d in dim]
    count = math.prod(x.shape[d] for d in dims)
    return torch.sum(x, dims, keepdim, dtype=dtype) * (1.0 / count)


def _mean_of_all(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _mean(x, None, dtype=dtype)


def _sum_of_all(x: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.sum(x, list(range(x.dim())), dtype=dtype)


def _moments(x: torch.Tensor, dims: list[int], keepdim: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean, and mean square of the distance from it: two passes, for one loses digits."""
    mean = _mean(x, dims, True)
    distance = x - mean
    square = _mean(distance * distance, dims, keepdim)
    return (mean if keepdim else mean.reshape(square.shape)), square


def _var_mean(
    x: torch.Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    dims = list(range(x.dim())) if not dim else [d % x.dim() for d in dim]
    mean, square = _moments(x, dims, keepdim)
    count = math.prod(x.shape[d] for d in dims)
    left = count - (1 if correction is None else correction)
    return square * (count / left if left > 0 else math.nan), mean


def _var(x: torch.Tensor, dim: Sequence[int] | None = None, **options: Any) -> torch.Tensor:
    return _var_mean(x, dim, **options)[0]


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """(output, mean, 1 / deviation, new running mean, new running variance)."""
    along = [1, -1] + [1] * (x.dim() - 2)
    if training:
        dims = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        mean, variance = _moments(x, dims, False)
        unbiased = variance * (count / (count - 1) if count > 1 else math.nan)
        running_mean = running_mean * (1 - momentum) + mean * momentum
        running_var = running_var * (1 - momentum) + unbiased * momentum
    else:
        mean, variance = running_mean, running_var
    inverse = torch.rsqrt(variance + eps)
    out = (x - mean.view(along)) * inverse.view(along)
    if weight is not None:
        out = out * weight.view(along)
    if bias is not None:
        out = out + bias.view(along)
    saved = (mean, inverse) if training else (x.new_zeros((0,)), x.new_zeros((0,)))
    return out, *saved, running_mean, running_var


def _batch_norm_without_statistics(
    x: torch.Tensor, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[torch.Tensor, ...]:
    zeros = x.new_zeros((x.shape[1],))
    return _batch_norm(x, weight, bias, zeros, zeros, True, momentum, eps)[:3]


NONE, MEAN = 0, 1
"""As torch numbers reductions; 2 is a sum."""


def _nll_loss(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, reduction: int, ignored: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, rows that count)."""
    if weight is not None or x.dim() < 2:
        found: tuple[torch.Tensor, torch.Tensor] = decompositions._nll_loss_forward(
            x, y, weight, reduction, ignored
        )
        return found
    out = y == ignored
    loss = -torch.gather(x, 1, y.masked_fill(out, 0).unsqueeze(1)).squeeze(1)
    loss = loss.masked_fill(out, 0)
    if reduction == NONE:
        return loss, x.new_full((), 0.0)
    count = _sum_of_all(y != ignored).to(x.dtype)
    loss = _sum_of_all(loss)
    return (loss / count if reduction == MEAN else loss), count


def _nll_loss_backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignored: int,
    count: torch.Tensor,
) -> torch.Tensor:
    if weight is not None or x.dim() < 2:
        return cast("torch.Tensor", NotImplemented)  # which leaves it to torch
    values = -(gradient / count if reduction == MEAN else gradient)
    out = y == ignored
    values = values.expand(y.shape).masked_fill(out, 0).unsqueeze(1)
    index = y.masked_fill(out, 0).unsqueeze(1)
    put: torch.Tensor = torch.ops.penstock.put_at(values, index, 1, 0, x.shape[1])
    return put


def _nll_loss2d_backward(
    gradient: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: Any, *options: Any
) -> torch.Tensor:
    if weight is not None:
        weighted: torch.Tensor = decompositions.nll_loss2d_backward(
            gradient, x, y, weight, *options
        )
        return weighted
    return _nll_loss_backward(gradient, x, y, weight, *options)


def _uniform_like(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    seed = torch.zeros((), dtype=torch.int64)  # the graph's own seed takes its place
    size = [int(n) for n in shape]
    drawn: torch.Tensor = torch.ops.penstock.uniform(
        seed, next(_salts), size, [0] * len(size), size, dtype=dtype
    )
    return drawn


def _native_dropout(
    x: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    kept = _uniform_like(x.shape, torch.float32) >= p
    return x * kept * (1.0 / (1.0 - p)), kept


def _native_dropout_backward(
    gradient: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    return gradient * mask * scale


def _bernoulli(x: torch.Tensor, p: float, *, generator: Any = None) -> torch.Tensor:
    return (_uniform_like(x.shape, torch.float32) < p).to(x.dtype)


def _rand_like(x: torch.Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return _uniform_like(x.shape, dtype or x.dtype)


def _rand(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return _uniform_like(size, dtype or torch.get_default_dtype())


def _normal(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """By Box and Muller 1958 (Ann. Math. Statist. 29, 610)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    radius = (-2.0 * torch.log(1.0 - _uniform_like(shape, wide))).sqrt()
    return (radius * torch.cos(2.0 * math.pi * _uniform_like(shape, wide))).to(dtype)


def _randn_like(x: torch.Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return _normal(x.shape, dtype or x.dtype)


def _randn(size: Sequence[int], *, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    return _normal(size, dtype or torch.get_default_dtype())


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **get_decompositions(
        [
            aten.native_batch_norm_backward,
            aten.binary_cross_entropy,
            aten.binary_cross_entropy_with_logits,
            aten.mse_loss,
            aten.mse_loss_backward,
            aten.smooth_l1_loss,
            aten.smooth_l1_loss_backward,
            aten.huber_loss,
            aten.huber_loss_backward,
            aten.l1_loss,
            aten.native_group_norm,
            aten.native_group_norm_backward,
            aten.addcmul,
            aten.addcdiv,
            aten.lerp,
            aten.stack,
            aten.std.correction,
        ]
    ),
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.mean.default: _mean_of_all,
    aten.mean.dim: _mean,
    aten.sum.default: _sum_of_all,
    aten.var_mean.correction: _var_mean,
    aten.var.correction: _var,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_without_statistics,
    aten.nll_loss_forward.default: _nll_loss,
    aten.nll_loss2d_forward.default: _nll_loss,
    aten.nll_loss_backward.default: _nll_loss_backward,
    aten.nll_loss2d_backward.default: _nll_loss2d_backward,
    aten.native_dropout.default: _native_dropout,
    aten.native_dropout_backward.default: _native_dropout_backward,
    aten.bernoulli.p: _bernoulli,
    aten.rand_like.default: _rand_like,
    aten.rand.default: _rand,
    aten.randn_like.default: _randn_like,
    aten.randn.default: _randn,
}
