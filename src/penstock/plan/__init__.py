"""What is decided before a run.

`penstock.plan` is this package, and a function as well: `penstock.plan(job, cluster)`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from penstock.plan.plan import Borders, Plan

if TYPE_CHECKING:
    from penstock.plan.costs.hardware import Cluster
    from penstock.plan.step import StepPlan

__all__ = ["Borders", "Cluster", "Plan", "StepPlan"]

_HOMES = {"Cluster": "penstock.plan.costs.hardware", "StepPlan": "penstock.plan.step"}


class _Planning(ModuleType):
    """A package that can be called: what it does is the one thing that its name says."""

    def __call__(self, *args: Any, **kwargs: Any) -> StepPlan:
        # A Job is opened by the layer above, which this one knows only here.
        planning = importlib.import_module("penstock.runtime.planning")
        found: StepPlan = planning.plan(*args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        raise AttributeError(f"module 'penstock.plan' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Planning
