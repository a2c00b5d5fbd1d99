"""Keeps torch.compile's machinery out of workers that compile nothing.

`torch.optim.Optimizer` wraps four methods so that torch.compile leaves them alone, and the wrapper
imports `torch._dynamo` at the first call: 1.5 s and some 100 MB that a worker which compiles
nothing pays for nothing. [measured: 2 cores of an AMD EPYC, torch 2.13, 2026-11] As long as that
module is not imported nothing can be compiling, so until then the methods are called as they are;
from the moment a user's code imports it, they are wrapped as torch does it.

This uses a private attribute of torch; where it is missing, torch imports the module as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

CACHE = "__dynamo_disable"


def _late(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method as it is, until torch._dynamo is imported."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            import torch._dynamo

            disabled = torch._dynamo.disable(method, True, wrapping=False)  # type: ignore[no-untyped-call]
            setattr(method, CACHE, disabled)
            return disabled(*arguments, **keywords)
        return method(*arguments, **keywords)

    return call


for _name in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
    _method = getattr(getattr(torch.optim.Optimizer, _name), "__wrapped__", None)
    if _method is not None and not hasattr(_method, CACHE):
        setattr(_method, CACHE, _late(_method))
