"""A program as any PyTorch user writes it, for torchrun: writes what it has reached to a file."""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import penstock.exchange.process_group  # noqa: F401  registers the backend

dist.init_process_group("penstock")
torch.manual_seed(dist.get_rank())  # DDP takes rank 0's
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
reached = [p.tolist() for p in model.parameters()]
with open(os.path.join(sys.argv[1], f"{dist.get_rank()}.json"), "w") as file:
    json.dump({"world_size": dist.get_world_size(), "reached": reached}, file)
dist.destroy_process_group()
