"""Operators of a loss by classes, written so that logits can be split by class.

With logits x of a row, and its class t, the loss and its gradient are

    m = max x,  l = log sum exp(x - m)           log_sums, log_sum
    loss = l + m - x_t                           gather
    d loss / d x_j = exp(x_j - m - l) - [j = t]  class_gradient

A rank with some of the classes has m and l of its part. Those of all ranks, a few numbers a row,
give the row's (Shoeybi et al. 2019, arXiv:1909.08053, section 3, sums up exp and takes the maximum
by itself); x_t is the sum of what all ranks find, zero where t is elsewhere. Nothing of the size of
the logits is exchanged, and nothing of their size is kept beside them.

    penstock.log_sums(x, dim, places)       (.., classes, ..) -> 2 x (.., places, ..)
    penstock.log_sum(maxima, logs, dim)     2 x (.., places, ..) -> 2 x (.., 1, ..)
    penstock.gather_part(x, dim, index, start)
    penstock.put_at(values, index, dim, start, size)
    penstock.class_gradient(values, x, maximum, log, index, dim, start)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from penstock.model.operators import define, within

PLACES = 16
"""The most ranks of an axis among which logits are split by class. A row's statistics are twice as
many numbers, and travel: little beside the activations of which a row's logits are made."""
CLASSES = 64
"""Of a place, at least. With fewer than two places' there is little to split, and on a CPU torch's
own kernels take less [measured, torch 2.13, 8192 rows of 32: 0.3 ms; ours 0.6 ms; 2026-11]."""
BLOCK = 1 << 17
"""Numbers that a CPU computes with at a time, so that they remain in its cache: at 256 rows of
50,257 a third of the time of all at once [measured, as above]."""


def places_of(classes: int) -> int:
    """Into how many parts so many classes may be split; 1 where it is not worth while."""
    return max(1, min(PLACES, classes // CLASSES))


def log_sums(x: torch.Tensor, dim: int, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum, and logarithm of the sum of exp(x - maximum), along a dim.

    Of several places the first has them; the others have those of nothing, -inf and 0. So a rank
    with some of x and some of the places puts what it has where it may, and what all places have
    together is the same: only `log_sum` gives it a meaning.

    Returns:
        Maxima and logarithms, both with `places` for the dim.
    """
    maxima, logs = _places(x, dim, places)
    maxima.fill_(-math.inf)
    logs.zero_()
    tensors = x, maxima.narrow(dim, 0, 1), logs.narrow(dim, 0, 1)
    for block, maximum, log in _blocks(dim, *tensors):
        torch.amax(block, dim, keepdim=True, out=maximum)
        # Of x - m - l the largest is -l: torch has one fast pass for it, as for nothing by hand.
        top = _log_softmax(block, dim).amax(dim, keepdim=True)
        log.copy_(top.neg_().masked_fill_(maximum == -math.inf, 0))
    return maxima, logs


def _log_softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Along the last dim if numbers lie so, which is faster."""
    if x.stride(dim) == 1:
        return x.movedim(dim, -1).log_softmax(-1).movedim(-1, dim)
    return x.log_softmax(dim)


def _places(x: torch.Tensor, dim: int, places: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*x.shape[:dim], places, *x.shape[dim + 1 :])
    return x.new_empty(shape), x.new_empty(shape)


def log_sum(
    maxima: torch.Tensor, logs: torch.Tensor, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of all, of which `log_sums` has given those of parts.

    Returns:
        Maximum and logarithm, both with 1 for the dim.
    """
    maximum = maxima.amax(dim, keepdim=True)
    return maximum, (maxima - maximum + logs).exp_().sum(dim, keepdim=True).log_()


def gather_part(x: torch.Tensor, dim: int, index: torch.Tensor, start: int) -> torch.Tensor:
    """As `aten.gather`; zeros for what is not here.

    Arguments:
        x: places `start` and following of the dim.
        index: int64, of places of the whole.
    """
    place, elsewhere = within(index, start, x.shape[dim])
    return x.gather(dim, place.masked_fill_(elsewhere, 0)).masked_fill_(elsewhere, 0)


def put_at(
    values: torch.Tensor, index: torch.Tensor, dim: int, start: int, size: int
) -> torch.Tensor:
    """Zeros, and in each row one value: at one place of a dim.

    Arguments:
        values, index: (.., 1, ..); places of the whole, int64.
        start, size: of the places that are here.
    """
    shape = (*values.shape[:dim], size, *values.shape[dim + 1 :])
    return _add_at(values.new_zeros(shape), values, index, dim, start)


def _add_at(
    x: torch.Tensor, values: torch.Tensor, index: torch.Tensor, dim: int, start: int
) -> torch.Tensor:
    place, elsewhere = within(index, start, x.shape[dim])
    place.masked_fill_(elsewhere, 0)
    return x.scatter_add_(dim, place, values.masked_fill(elsewhere, 0))


def class_gradient(
    values: torch.Tensor,
    x: torch.Tensor,
    maximum: torch.Tensor,
    log: torch.Tensor,
    index: torch.Tensor,
    dim: int,
    start: int,
) -> torch.Tensor:
    """The gradient of x, of which the logarithm of the softmax has one in each row: `put_at`.

    Arguments:
        values, index: (.., 1, ..), as of `put_at`.
        x: places `start` and following of the dim.
        maximum, log: (.., 1, ..), of `log_sum`.
    """
    gradient = torch.empty_like(x)
    rows = -values, maximum, log
    for block, given, factor, top, rest in _blocks(dim, gradient, x, *rows):
        torch.sub(given, top, out=block)
        block.sub_(rest).exp_().mul_(factor)
    return _add_at(gradient, values, index, dim, start)


def _blocks(dim: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors, cut alike along the longest dim but one, so that the first's are of few numbers."""
    first = tensors[0]
    others = [d for d in range(first.dim()) if d != dim]
    if not others or first.numel() <= BLOCK or first.device.type != "cpu":
        yield tensors
        return
    along = max(others, key=lambda d: first.shape[d])
    rows = max(1, BLOCK * first.shape[along] // first.numel())
    yield from zip(*(torch.split(tensor, rows, along) for tensor in tensors), strict=True)


define("log_sums(Tensor x, int dim, int places) -> (Tensor, Tensor)", log_sums, _places)
define("log_sum(Tensor maxima, Tensor logs, int dim) -> (Tensor, Tensor)", log_sum)
define("gather_part(Tensor x, int dim, Tensor index, int start) -> Tensor", gather_part)
define("put_at(Tensor values, Tensor index, int dim, int start, int size) -> Tensor", put_at)
define(
    "class_gradient(Tensor values, Tensor x, Tensor maximum, Tensor log, Tensor index, int dim, "
    "int start) -> Tensor",
    class_gradient,
    lambda values, x, *_: torch.empty_like(x),
)
