"""How replicas agree: collectives, the transports below them, and what is agreed by them.

What a PyTorch program uses by name; both are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.exchange.process_group import PenstockGroup, monitored_barrier

__all__ = ["PenstockGroup", "monitored_barrier"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'penstock.exchange' has no attribute {name!r}")
    return getattr(importlib.import_module("penstock.exchange.process_group"), name)


def __dir__() -> list[str]:
    return __all__
