"""torch.distributed's own groups as a group: gloo on CPU, NCCL on GPUs."""

from __future__ import annotations

import datetime
import warnings
from typing import Any

import torch
import torch.distributed as dist

from penstock.errors import TransportError


class TorchGroup:
    """A rank of torch.distributed's default group.

    Arguments:
        backend: of torch.distributed: "gloo", or "cpu:gloo,cuda:nccl" where every rank has a GPU.
        store: a torch.distributed Store, in which the ranks find each other.
        timeout_s: how long a collective may wait for a peer.

    Raises:
        TransportError: not all ranks came before the deadline.
    """

    def __init__(
        self, backend: str, store: Any, rank: int, world_size: int, timeout_s: float
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        warnings.filterwarnings("ignore", module="torch.distributed", category=FutureWarning)
        try:
            dist.init_process_group(
                backend,
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:
            raise TransportError(
                f"rank {rank} of {world_size} could not join the {backend} group: {error}"
            ) from error

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> TorchWork:
        return self._start("all_gather", dist.all_gather_single, _bytes(output), _bytes(input))

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor) -> TorchWork:
        return self._start("all_to_all", dist.all_to_all_single, _bytes(output), _bytes(input))

    def broadcast(self, tensor: torch.Tensor, root: int) -> TorchWork:
        return self._start("broadcast", dist.broadcast, _bytes(tensor), root)

    def barrier(self) -> None:
        self._start("barrier", dist.all_reduce, torch.zeros(1)).wait()

    def close(self) -> None:
        dist.destroy_process_group()

    def _start(self, name: str, function: object, *arguments: object) -> TorchWork:
        try:
            work = function(*arguments, async_op=True)  # type: ignore[operator]
        except RuntimeError as error:
            raise TransportError(f"rank {self.rank}: {name}: {error}") from error
        return TorchWork(work, name, self.rank)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, uint8 (bytes,): what is only moved may be of any dtype."""
    return tensor.view(-1).view(torch.uint8)


class TorchWork:
    """A collective of torch.distributed under way."""

    def __init__(self, work: dist.Work, name: str, rank: int) -> None:
        self._work, self._name, self._rank = work, name, rank

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise TransportError(f"rank {self._rank}: {self._name}: {error}") from error
