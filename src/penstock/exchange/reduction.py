"""What a reduction does to the tensors of all ranks.

Parts are combined along the fixed binary tree over ranks (see `tree`), whatever way they have come,
so that the result has the same bits on every rank, through every topology that brings all parts
together. Half precision is combined in float32 and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import numpy as np
import torch

from penstock.errors import UserError
from penstock.exchange import tree
from penstock.exchange.serial import GRAIN, Function, Operator, copy, many_at_once

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

    def ready(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> Callable[[], None]:
        """What combines these tensors, now and whenever there is something new in them."""
        ...

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
        self.ready(parts, out)()

    def ready(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> Callable[[], None]:
        if isinstance(self.order, int):
            return partial(copy, parts[self.order], out)
        length, step = len(out), _at_once(out)
        function, pieces, piece = self.operator.ready(parts, out)
        if length <= step or (len(parts) == 2 and many_at_once(out.dtype)):  # nothing is kept
            return partial(self._combine, function, pieces, piece)

        def by_pieces() -> None:
            for start in range(0, length, step):
                stop = start + step
                self._combine(function, [each[start:stop] for each in pieces], piece[start:stop])

        return by_pieces

    def _combine(self, function: Function, parts: Sequence[Any], out: Any) -> None:
        _fold(function, self.order, parts, out)
        if self.divisor > 1:
            out /= self.divisor

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
        step = _at_once(out)
        for start in range(0, len(out), step):
            wide = [part[start : start + step].float() for part in parts]
            ordered.combine(wide, wide[0])
            out[start : start + step].copy_(wide[0])

    def ready(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> Callable[[], None]:
        """As `Combine.ready`."""
        return partial(self.combine, parts, out)

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


def _at_once(tensor: torch.Tensor) -> int:
    """How many elements are combined at a time."""
    return min(PIECE_BYTES // tensor.itemsize, GRAIN - 64)


def _fold(function: Function, order: tree.Order, parts: Sequence[Any], out: Any = None) -> Any:
    """All parts combined in this order: in `out`, else in what may be one of the parts."""
    if isinstance(order, int):
        return parts[order]
    left, right = _fold(function, order[0], parts), _fold(function, order[1], parts)
    return function(left, right, out=out)
