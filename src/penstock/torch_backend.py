"""Makes `torch.distributed.init_process_group("penstock")` known to torch.

torch calls `register` when it is imported; nothing else of Penstock is imported before such a group
is made.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """The entry point, of group "torch.backends"."""
    import torch.distributed as dist

    if dist.is_available() and not hasattr(dist.Backend, "PENSTOCK"):
        dist.Backend.register_backend("penstock", _create, extended_api=True, devices=["cpu"])


def _create(*arguments: Any) -> Any:
    from penstock.exchange.process_group import create

    return create(*arguments)
