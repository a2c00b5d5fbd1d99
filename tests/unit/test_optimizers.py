"""Workers do without torch.compile's machinery, and optimizers step as they always do."""

from __future__ import annotations

import subprocess
import sys

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
