"""Training by PyTorch's own ways of splitting it; each returns the parameters it reaches."""

from __future__ import annotations

import copy
import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch_programs.ranks import join

STEPS = 4
Parameters = list[Any]


class Network(nn.Module):
    """Three layers, the middle one unused in every other step where asked."""

    def __init__(self, skips: bool = False) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(6, 36), nn.Linear(36, 36)
        self.last = nn.Linear(36, 3)
        self.skips = skips

    def forward(self, x: torch.Tensor, step: int = 0) -> torch.Tensor:
        x = torch.relu(self.first(x))
        if not (self.skips and step % 2):
            x = torch.relu(self.middle(x))
        return self.last(x)


def network(skips: bool = False) -> Network:
    torch.manual_seed(1)
    return Network(skips)


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    return x, y


def ddp(skips: bool, **options: Any) -> Parameters:
    """DistributedDataParallel, small buckets."""
    model = DistributedDataParallel(network(skips), bucket_cap_mb=0.003, **options)
    _train(model, range(STEPS), dist.get_rank())
    return _values(model.module)


def sharded() -> Parameters:
    """FSDP2, each layer for itself."""
    model = network()
    for layer in (model.first, model.middle, model.last):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(STEPS):
        x, y = batch(step, dist.get_rank())
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return [p.full_tensor().tolist() for p in model.parameters()]


def hybrid() -> Parameters:
    """FSDP2 inside pairs, replicated across them; four ranks, a mesh of sub-groups."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(network(), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        x, y = batch(step, dist.get_rank())
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return [p.full_tensor().tolist() for p in model.parameters()]


def redistributed() -> Parameters:
    """A DTensor through every pair of placements: what each rank holds, and the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(35.0).view(7, 5)  # shards of unequal size
    placements: list[Placement] = [Replicate(), Shard(0), Shard(1)]
    found = []
    for before in [*placements, Partial()]:
        for after in placements:
            if isinstance(before, Partial):
                tensor = DTensor.from_local(whole + dist.get_rank(), mesh, [before])
            else:
                tensor = distribute_tensor(whole, mesh, [before])
            moved = tensor.redistribute(mesh, [after])
            found.append([moved.to_local().tolist(), moved.full_tensor().tolist()])
    model = parallelize_module(
        network(), mesh, {"first": ColwiseParallel(), "middle": RowwiseParallel()}
    )
    _train(model, range(STEPS), 0)
    return [*found, *_values(model)]


def pipelined(kind: str) -> Parameters:
    """Two stages on two ranks; each returns its own parameters."""
    rank, model = dist.get_rank(), network()
    parts = [nn.Sequential(model.first, nn.ReLU()), nn.Sequential(model.middle, model.last)]
    stage = PipelineStage(parts[rank], rank, 2, torch.device("cpu"))
    schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](
        stage, n_microbatches=4, loss_fn=nn.functional.mse_loss
    )
    optimizer = torch.optim.SGD(parts[rank].parameters(), 0.1)
    for step in range(STEPS):
        x, y = batch(step, 0)
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y)
        optimizer.step()
    return _values(parts[rank])


def survived(
    store: dist.Store, rank: int, world_size: int, backend: str, kill: bool
) -> dict[str, Any]:
    """Two steps of DDP by all; the last rank leaves in the third, killed if so told, and the
    others go on in the same processes, in a new group."""
    join(dist.PrefixStore("before", store), rank, world_size, backend)
    model = network()
    wrapped: nn.Module = DistributedDataParallel(model, bucket_cap_mb=0.003)
    _train(wrapped, range(2), rank)
    last = rank == world_size - 1
    told: dict[str, Any] = {}
    if kill:
        before = copy.deepcopy(model.state_dict())
        if last:
            model.middle.weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        since = time.monotonic()
        try:
            _train(wrapped, [2], rank)
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}", "s": time.monotonic() - since}
        model.load_state_dict(before)
    dist.destroy_process_group()
    if last:
        return {}
    for parameter in model.parameters():
        parameter.grad = None
    join(dist.PrefixStore("after", store), rank, world_size - 1, backend)
    _train(DistributedDataParallel(model, bucket_cap_mb=0.003), range(2, 2 + STEPS), rank)
    dist.destroy_process_group()
    return {**told, "parameters": _values(model)}


def _train(model: nn.Module, steps: Any, rank: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in steps:
        x, y = batch(step, rank)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x, step), y).backward()
        optimizer.step()


def _values(model: nn.Module) -> Parameters:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).tolist() for p in model.parameters()]
