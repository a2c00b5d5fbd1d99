"""Keeps out of an optimizer's step what only compiling and profiling need.

`torch.optim.Optimizer` wraps four methods so that torch.compile leaves them alone, and every
optimizer's `step` so that it runs without gradients; both wrappers import `torch._dynamo` at the
first call: 1.5 s and some 100 MB that a worker which compiles nothing pays for nothing.
[measured: 2 cores of an AMD EPYC, torch 2.13, 2026-11] As long as that module is not imported
nothing can be compiling, so until then the methods are called as they are, `step` without
gradients; from the moment a user's code imports it, they are called as torch wraps them.

torch also wraps `step` for its profiler and for hooks: 50 us a step, where there are neither.

This uses private attributes of torch; where they are missing, torch imports the module as before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from penstock.exchange.late_update import step_hooks

CACHE = "__dynamo_disable"
STEP_WRAPPER = "_use_grad_for_differentiable"
PROFILED = getattr(torch.optim.Optimizer, "profile_hook_step", None)
PROFILING = getattr(torch.autograd, "_profiler_enabled", None)


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


def _late_step(wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer's `step`; what torch's wrapper does without torch._dynamo, until that is there.

    Arguments:
        wrapped: `step` as torch wraps it.
    """
    step = wrapped.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(step)
    def late(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if "torch._dynamo" in sys.modules:
            return wrapped(self, *arguments, **keywords)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *arguments, **keywords)

    if PROFILED is None or PROFILING is None:
        return late
    profiled = PROFILED(late)
    profiling: Callable[[], bool] = PROFILING

    @functools.wraps(step)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        # A step that calls this one has been wrapped itself.
        if type(self).step is call and (profiling() or step_hooks(self)):
            return profiled(self, *arguments, **keywords)
        return late(self, *arguments, **keywords)

    call.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it again
    return call


for _name in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
    _method = getattr(getattr(torch.optim.Optimizer, _name), "__wrapped__", None)
    if _method is not None and not hasattr(_method, CACHE):
        setattr(_method, CACHE, _late(_method))

for _class in vars(torch.optim).values():
    _step: Any = vars(_class).get("step") if isinstance(_class, type) else None
    if hasattr(_step, "__wrapped__") and STEP_WRAPPER in _step.__code__.co_qualname:
        _class.step = _late_step(_step)
