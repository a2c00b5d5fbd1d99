"""Workers do without torch.compile's machinery, and optimizers step as they always do."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch

from penstock.errors import NetworkError
from penstock.runtime.fused import fuse

CODE = """
import sys
import torch
import penstock.runtime.optimizers

def stepped(kind):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    optimizer = kind(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
        schedule.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.is_grad_enabled()
    return [p.tolist() for p in network.parameters()]

kinds = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    and kind.__name__ not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
]
assert len(kinds) > 10
without = [stepped(kind) for kind in kinds]
assert "torch._dynamo" not in sys.modules
import torch._dynamo
assert [stepped(kind) for kind in kinds] == without  # by torch's own wrappers
"""


def test_no_optimizer_imports_what_only_compiling_needs() -> None:
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


KINDS = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad]


def stepped(network: torch.nn.Module, kind: Any, fused: bool, **options: Any) -> list[torch.Tensor]:
    network = copy.deepcopy(network)
    optimizer = kind(network.parameters(), lr=0.1, weight_decay=0.01, **options)
    if fused:
        fuse(optimizer)
    for step in range(3):
        for number, p in enumerate(network.parameters()):
            generator = torch.Generator().manual_seed(10 * step + number)
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)  # contiguous
        optimizer.step()
    return [p.detach() for p in network.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_fused_update_is_the_same_update(kind: Any, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2))
    network.to(torch.float64).to(memory_format=memory_format)
    for ours, theirs in zip(stepped(network, kind, True), stepped(network, kind, False)):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)


def test_which_optimizers_are_fused() -> None:
    def chosen(optimizer: torch.optim.Optimizer) -> list[Any]:
        fuse(optimizer)
        return [group.get("fused") for group in optimizer.param_groups]

    one, half = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4).bfloat16())
    for kind in KINDS:
        assert chosen(kind([one], lr=0.1)) == [True]
        assert chosen(kind([{"params": [one]}, {"params": [half]}], lr=0.1)) == [True, None]
        assert chosen(kind([one], lr=0.1, foreach=False)) == [None]
        assert chosen(kind([one], lr=0.1, fused=False)) == [False]
    assert chosen(torch.optim.RMSprop([one])) == [None]
    turned = torch.nn.Parameter(torch.ones(4, 2).t())
    assert chosen(torch.optim.Adam([turned])) == [None]
    with pytest.raises(NetworkError, match="is not contiguous"):
        fuse(torch.optim.Adam([turned], fused=True))
