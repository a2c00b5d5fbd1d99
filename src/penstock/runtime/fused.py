"""Optimizers whose update of all parameters is one kernel.

torch's own choice on CPUs, where nothing is said, is a Python loop over the parameters with some
ten kernels for each. The fused form takes half the time: 120 us instead of 230 for LeNet's eight
parameters and Adagrad. [measured: 1 thread, AMD EPYC, torch 2.13, 2026-11] It rounds otherwise than
the loop in the last bit, and alike on any number of workers and threads; a checkpoint keeps the
choice.
"""

from __future__ import annotations

import torch

_HAVE = (torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_DTYPES = (torch.float32, torch.float64)


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Has torch's own optimizers make the fused update of parameters on the CPU; leaves alone what
    the user has chosen (`fused`, `foreach`) and what cannot be fused."""
    if type(optimizer) not in _HAVE:
        return
    for group in optimizer.param_groups:
        chosen = group["fused"] is not None or group["foreach"] is not None
        parameters = group["params"]
        if chosen or group["differentiable"] or group.get("capturable"):
            continue
        if all(p.is_cpu and p.dtype in _DTYPES and p.layout == torch.strided for p in parameters):
            group["fused"] = True
            for p in parameters:
                if "step" in (state := optimizer.state.get(p, {})):
                    state["step"] = state["step"].float()
