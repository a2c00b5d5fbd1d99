"""Limits to gradients, as nodes of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from penstock.model.graph import Node, Ref, Spec


@dataclass(frozen=True)
class Clipping:
    """Limits to gradients before the optimizer's step.

    Arguments:
        norm: of all of them together (L2): each is divided by max(1, their norm / this one).
        value: of each element.
    """

    norm: float | None = None
    value: float | None = None

    def nodes(self, gradients: Mapping[str, str], specs: Mapping[str, Spec]) -> Clipped:
        """What limits these gradients.

        Arguments:
            gradients: their names, by parameter.
            specs: of all tensors.
        """
        made = Clipped([], dict(gradients), {})

        def call(name: str, op: str, spec: Spec, *args: Any, **kwargs: Any) -> Ref:
            made.nodes.append(Node(name, f"aten.{op}", args, kwargs, (name,), "update"))
            made.specs[name] = spec
            return Ref(name)

        def each(what: str, op: str, *args: Any) -> None:
            for target, name in made.gradients.items():
                spec = specs[gradients[target]]
                made.gradients[target] = call(f"{target}:{what}", op, spec, Ref(name), *args).name

        if self.value is not None:
            each("cut", "clamp.default", -self.value, self.value)
        if self.norm is not None and gradients:
            total: Ref | None = None
            for target, name in made.gradients.items():
                spec, wide = specs[gradients[target]], Spec((), torch.float64)
                square = call(f"{target}:square", "mul.Tensor", spec, Ref(name), Ref(name))
                dims = tuple(range(len(spec.shape)))
                what = f"{target}:squared norm"
                part = call(what, "sum.dim_IntList", wide, square, dims, False, dtype=torch.float64)
                if total is not None:
                    part = call(f"{target}:with those before", "add.Tensor", wide, total, part)
                total = part
            assert total is not None
            norm = call("gradient:norm", "sqrt.default", wide, total)
            scaled = call("gradient:norm / limit", "mul.Tensor", wide, norm, 1 / self.norm)
            over = call("gradient:excess", "clamp.default", wide, scaled, 1.0)
            each("clipped", "div.Tensor", over)
        return made


@dataclass(frozen=True)
class Clipped:
    """Nodes that limit gradients, the limited ones by parameter, and specs of what nodes give."""

    nodes: list[Node]
    gradients: dict[str, str]
    specs: dict[str, Spec]
