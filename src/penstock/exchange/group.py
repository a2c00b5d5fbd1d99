"""What workers agree by: collectives among the ranks of one group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from penstock.exchange.reduction import Reduction, Total


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Returns when it is done; TransportError when a peer is gone or the deadline passed."""
        ...


class Group(Protocol):
    """Collectives among `world_size` workers, issued in the same order by all of them.

    Tensors are contiguous and stay untouched by the caller until the work is done; `sync=True` is
    for who waits at once anyway. A failed or late peer is a TransportError, after which the group
    is of no more use than `close`.
    """

    rank: int
    world_size: int

    def all_reduce(
        self, tensor: torch.Tensor, reduction: Reduction | Total, *, sync: bool = False
    ) -> Work:
        """Starts combining the tensors of all, in place: the same bits on all."""
        ...

    def repeated_all_reduce(
        self, tensor: torch.Tensor, reduction: Reduction | Total
    ) -> Callable[[bool], Work]:
        """What starts `all_reduce` of this one tensor, (n,), whenever it is called with `sync`."""
        ...

    def all_reduce_s(self, num_bytes: int) -> float | None:
        """About how long one takes between hosts; None where there is one, or that is unknown."""
        ...

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, *, sync: bool = False) -> Work:
        """Starts gathering: output (world_size, *input.shape), input the same shape on all."""
        ...

    def broadcast(self, tensor: torch.Tensor, root: int, *, sync: bool = False) -> Work:
        """Starts sending the root's tensor to all others, in place."""
        ...

    def barrier(self) -> object:
        """Returns when all have come here."""
        ...

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory in which tensors are combined fastest: uint8 (num_bytes,), zeros. Collective."""
        ...

    def close(self) -> None:
        """Leaves the group; waits for nobody."""
        ...
