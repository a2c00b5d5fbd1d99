"""torch.distributed's own groups as a group: gloo on CPU, NCCL on GPUs."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from penstock.errors import TransportError
from penstock.exchange.group import Work
from penstock.exchange.reduction import Reduction, Total

SCATTER_BYTES = 256 * 1024
"""Tensors of at least this size are cut between workers when there are more than two.
[measured: gloo on loopback, 2 cores, 2026-11: a second exchange costs about 0.7 ms]"""


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

    def all_reduce(
        self, tensor: torch.Tensor, reduction: Reduction | Total, *, sync: bool = False
    ) -> Work:
        """Gathers all, then combines them here: torch's own all-reduce adds in its own order."""
        if self.world_size == 1:
            reduction.combine([tensor], tensor)
            return _Done()
        if self.world_size > 2 and tensor.nbytes >= SCATTER_BYTES:
            return _Scattered(self, tensor, reduction)
        gathered = tensor.new_empty(self.world_size, len(tensor))
        return _Gathered(self.all_gather(gathered, tensor), gathered, tensor, reduction)

    def repeated_all_reduce(
        self, tensor: torch.Tensor, reduction: Reduction | Total
    ) -> Callable[[bool], Work]:
        return lambda sync: self.all_reduce(tensor, reduction, sync=sync)

    def all_reduce_s(self, num_bytes: int) -> float | None:
        return None

    def all_gather(
        self, output: torch.Tensor, input: torch.Tensor, *, sync: bool = False
    ) -> TorchWork:
        return self._start("all_gather", dist.all_gather_single, _bytes(output), _bytes(input))

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor) -> TorchWork:
        """Starts exchanging: input[r] goes to rank r, output[r] comes from it; equal shapes."""
        return self._start("all_to_all", dist.all_to_all_single, _bytes(output), _bytes(input))

    def broadcast(self, tensor: torch.Tensor, root: int, *, sync: bool = False) -> TorchWork:
        return self._start("broadcast", dist.broadcast, _bytes(tensor), root)

    def barrier(self) -> None:
        self._start("barrier", dist.all_reduce, torch.zeros(1)).wait()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

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


class _Gathered:
    """An all-reduce of which each rank gets all parts whole."""

    def __init__(
        self,
        work: TorchWork,
        gathered: torch.Tensor,
        tensor: torch.Tensor,
        reduction: Reduction | Total,
    ) -> None:
        self._work, self._gathered = work, gathered
        self._tensor, self._reduction = tensor, reduction

    def wait(self) -> None:
        self._work.wait()
        self._reduction.combine(list(self._gathered.unbind()), self._tensor)


class _Scattered:
    """An all-reduce of which each rank combines a part; the parts are gathered when waited for."""

    def __init__(
        self, group: TorchGroup, tensor: torch.Tensor, reduction: Reduction | Total
    ) -> None:
        self._group, self._tensor, self._reduction = group, tensor, reduction
        part = -(-len(tensor) // group.world_size)
        padded = torch.nn.functional.pad(tensor, (0, part * group.world_size - len(tensor)))
        self._parts = padded.view(group.world_size, part)
        self._given = torch.empty_like(self._parts)
        self._work = group.all_to_all(self._given, self._parts)

    def wait(self) -> None:
        self._work.wait()
        mine = torch.empty_like(self._given[0])
        self._reduction.combine(list(self._given.unbind()), mine)
        self._group.all_gather(self._parts, mine).wait()
        self._tensor.copy_(self._parts.view(-1)[: len(self._tensor)])


class _Done:
    def wait(self) -> None:
        pass
