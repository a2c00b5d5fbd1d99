"""What a reduction does to the tensors of all ranks.

Parts are combined along the fixed binary tree over ranks (see `tree`), whatever way they have come,
so that the result has the same bits on every rank, through every topology that brings all parts
together. Half precision is combined in float32 and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from penstock.errors import UserError
from penstock.exchange import tree
from penstock.exchange.serial import GRAIN, Operator, copy, divide, many_at_once

PIECE_BYTES = 128 << 10
"""So much is combined at a time, so that sums within the tree stay in the cache.
[measured: 1 MiB of L2 a core, AMD EPYC, 2026-11]"""

_ADD = Operator(torch.add, np.add)

_OPERATORS: dict[str, Operator] = {
    "sum": _ADD,
    "avg": _ADD,
    "premul_sum": _ADD,
    "product": Operator(torch.mul, np.multiply),
    "min": Operator(torch.minimum, np.minimum),
    "max": Operator(torch.maximum, np.maximum),
    "band": Operator(torch.bitwise_and, np.bitwise_and),
    "bor": Operator(torch.bitwise_or, np.bitwise_or),
    "bxor": Operator(torch.bitwise_xor, np.bitwise_xor),
}

_BITWISE = {"band", "bor", "bxor"}
_NARROW = {torch.float16, torch.bfloat16}
_NO_ARITHMETIC = {torch.uint16, torch.uint32, torch.uint64}
"""torch 2.13 can store them, and not add them on CPUs."""


class Combine(Protocol):
    """Makes one tensor of those of all ranks, each element of the elements at its place."""

    def combine(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None: ...

    def grouped(
        self, groups: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> tuple[list[Combine], Combine] | None:
        """Takes it apart: what combines each group's parts, and what then combines the groups'.

        Arguments:
            groups: of ranks; each rank is in one of them.

        Returns:
            None where the result would not have the same bits.
        """
        ...


@dataclass(frozen=True)
class _Ordered:
    """Combines parts in one order, in their own dtype."""

    operator: Operator
    order: tree.Order
    divisor: int = 1

    def combine(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        for pieces, piece in _pieces(parts, out):
            _fold(self.operator, self.order, pieces, piece)
            if self.divisor > 1:
                divide(piece, self.divisor)

    def grouped(
        self, groups: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> tuple[list[Combine], Combine] | None:
        if (orders := tree.grouped(self.order, groups)) is None:
            return None
        inner: list[Combine] = [_Ordered(self.operator, order) for order in orders[0]]
        return inner, _Ordered(self.operator, orders[1], self.divisor)


@dataclass(frozen=True)
class Reduction:
    """One of torch's reductions.

    Arguments:
        op: "sum", "avg", "product", "min", "max", "band", "bor", "bxor" or "premul_sum".
        factor: of "premul_sum": what each rank multiplies its own tensor by, a number or a tensor
            of one element.
    """

    op: str = "sum"
    factor: float | torch.Tensor | None = None

    def check(self, dtype: torch.dtype) -> None:
        """Raises UserError where torch has no such reduction of the dtype."""
        floating = dtype.is_floating_point or dtype.is_complex
        if (
            dtype in _NO_ARITHMETIC
            or (dtype.is_floating_point and dtype.itemsize < 2)
            or (self.op in _BITWISE and floating)
            or (self.op in ("min", "max") and dtype.is_complex)
            or (self.op in ("avg", "premul_sum") and not floating)
        ):
            name = str(dtype).removeprefix("torch.")
            raise UserError(f"{self.op} of {name}: there is no such reduction")

    def premultiplied(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a rank brings: its tensor, or a new one, times the factor."""
        if self.op != "premul_sum":
            return tensor
        return torch.mul(tensor, 1.0 if self.factor is None else self.factor).to(tensor.dtype)

    def combine(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Reduces what all ranks have brought.

        Arguments:
            parts: by rank, each (n,), contiguous, of out's dtype; they stay as they are.
            out: (n,); may be one of the parts.
        """
        ordered = _ordered(self.op, len(parts))
        if out.dtype not in _NARROW:
            ordered.combine(parts, out)
            return
        for pieces, piece in _pieces(parts, out):
            wide = [part.float() for part in pieces]
            ordered.combine(wide, wide[0])
            piece.copy_(wide[0])

    def grouped(
        self, groups: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> tuple[list[Combine], Combine] | None:
        """As `Combine.grouped`; half precision would be rounded twice."""
        exact = not (dtype.is_floating_point or dtype.is_complex)
        if exact or self.op in ("min", "max"):  # the same in any order
            inner: list[Combine] = [_ordered(self.op, len(group)) for group in groups]
            return inner, _ordered(self.op, len(groups))
        if dtype in _NARROW:
            return None
        return _ordered(self.op, sum(map(len, groups))).grouped(groups, dtype)


SUM = Reduction()


class Total(_Ordered):
    """The sum over shards along their fixed tree, of which each rank brings one subtree.

    Arguments:
        covers: by rank, the subtree that it has summed.
        shards: in all.
        op: how it is called.
    """

    def __init__(
        self, covers: Sequence[tree.Node], shards: int, op: str = "sum over shards"
    ) -> None:
        super().__init__(_ADD, tree.order_of(covers, shards))
        self.op = op

    def check(self, dtype: torch.dtype) -> None:
        """Parameters and gradients can be added."""

    def premultiplied(self, tensor: torch.Tensor) -> torch.Tensor:
        """What a rank brings: its tensor."""
        return tensor


@lru_cache(maxsize=64)
def _ordered(op: str, parts: int) -> _Ordered:
    """So many parts in the order of their tree."""
    return _Ordered(_OPERATORS[op], tree.order(parts), parts if op == "avg" else 1)


def _pieces(
    parts: Sequence[torch.Tensor], out: torch.Tensor
) -> Iterator[tuple[Sequence[torch.Tensor], torch.Tensor]]:
    """The parts and the result, so much at a time."""
    many = many_at_once(out.dtype)
    step = PIECE_BYTES // out.itemsize if many else GRAIN - 64
    if len(out) <= step or (many and len(parts) == 2):  # nothing is kept on the way
        yield parts, out
        return
    for start in range(0, len(out), step):
        stop = start + step
        yield [part[start:stop] for part in parts], out[start:stop]


def _fold(
    operator: Operator,
    order: tree.Order,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor | None,
) -> torch.Tensor:
    """All parts combined in this order: in `out`, else in a tensor that may be one of the parts."""
    if isinstance(order, int):
        if out is None:
            return parts[order]
        copy(parts[order], out)
        return out
    left = _fold(operator, order[0], parts, None)
    right = _fold(operator, order[1], parts, None)
    if out is None:
        out = torch.empty_like(left)
    return operator(left, right, out)
