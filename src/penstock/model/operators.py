"""Operators of our own, beside torch's: `torch.ops.penstock`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import library

_OURS: Any = library.Library("penstock", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(
    schema: str, function: Callable[..., Any], shapes: Callable[..., Any] | None = None
) -> None:
    """Registers an operator for all devices.

    Arguments:
        schema: `name(Tensor x, int n) -> Tensor`, as torch writes it.
        function: what it does; it gives a tensor of its own, and changes none.
        shapes: what it gives on tensors without memory, where `function` would be slow to say.
    """
    _OURS.define(schema)
    name = schema.partition("(")[0]
    _OURS.impl(name, function, "CompositeExplicitAutograd")
    if shapes is not None:
        _OURS.impl(name, shapes, "Meta")


def within(index: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of a whole as those of its part [start, start + size), new memory; and a mask of the
    places that are elsewhere."""
    place = index - start
    return place, (place < 0) | (place >= size)
