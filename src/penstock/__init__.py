"""Penstock trains one PyTorch model on many machines, with the same bits on however many.

Names are imported when they are first used: `import penstock` alone imports neither torch nor
anything else that takes time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock import errors, feed
    from penstock.job import (
        AllReduce,
        Averaging,
        Checkpoint,
        Clip,
        Evaluate,
        Events,
        Job,
        Stop,
    )
    from penstock.model import zoo
    from penstock.runtime.callbacks import Callback
    from penstock.runtime.driver import launch
    from penstock.runtime.place import Spark
    from penstock.runtime.run import Run
    from penstock.runtime.worker import Worker

__all__ = [
    "AllReduce",
    "Averaging",
    "Callback",
    "Checkpoint",
    "Clip",
    "Evaluate",
    "Events",
    "Job",
    "Run",
    "Spark",
    "Stop",
    "Worker",
    "errors",
    "feed",
    "launch",
    "zoo",
]

_HOMES = {
    "Callback": "penstock.runtime.callbacks",
    "Run": "penstock.runtime.run",
    "Spark": "penstock.runtime.place",
    "Worker": "penstock.runtime.worker",
    "launch": "penstock.runtime.driver",
}
_MODULES = {"errors": "penstock.errors", "feed": "penstock.feed", "zoo": "penstock.model.zoo"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    return getattr(importlib.import_module(_HOMES.get(name, "penstock.job")), name)


def __dir__() -> list[str]:
    return __all__
