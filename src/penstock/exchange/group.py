"""What workers agree by: collectives among the ranks of one group."""

from __future__ import annotations

from typing import Protocol

import torch


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Returns when it is done; TransportError when a peer is gone or the deadline passed."""
        ...


class Group(Protocol):
    """Collectives among `world_size` workers, issued in the same order by all of them.

    Tensors are contiguous and stay untouched by the caller until the work is done. A failed or
    late peer is a TransportError, after which the group is of no more use than `close`.
    """

    rank: int
    world_size: int

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> Work:
        """Starts gathering: output (world_size, *input.shape), input the same shape on all."""
        ...

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor) -> Work:
        """Starts exchanging: input[r] goes to rank r, output[r] comes from it; equal shapes."""
        ...

    def broadcast(self, tensor: torch.Tensor, root: int) -> Work:
        """Starts sending the root's tensor to all others, in place."""
        ...

    def barrier(self) -> None:
        """Returns when all have come here."""
        ...

    def close(self) -> None:
        """Leaves the group; waits for nobody."""
        ...
