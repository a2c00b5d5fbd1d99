"""`Transport`: how bytes move between the ranks of one group.

Every collective is made of one thing, `share`: each rank has some bytes for each other rank, and
reads what all the others have for it. Who reads from memory that it shares with the writer gets to
see the writer's own bytes; who is far away gets a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from penstock.errors import TransportError
from penstock.exchange.operation import Turn

Views = Sequence[torch.Tensor | None]
"""By rank, uint8 (bytes,): (a piece of) what each has for this one; None for nothing (more)."""

Read = Callable[[Views, int, int], None]
"""Takes views of the bytes [start, stop) of what each rank has for this one (less from who has less
than `stop`). Start rises from 0 in multiples of `ALIGNMENT_BYTES`. The views are not to be written,
and are gone when the call ends."""

ALIGNMENT_BYTES = 64


class Transport(Protocol):
    """One rank's end. All ranks call `share` in the same order, each from one thread at a time.

    Attributes:
        name: of what moves the bytes.
        hosts: by rank, the name of its machine, for errors.
    """

    name: str
    rank: int
    world_size: int
    hosts: Sequence[str]

    def share(self, turn: Turn, parts: Views, sizes: Sequence[int], read: Read) -> None:
        """Gives each rank what this one has for it, and reads what all have for this one.

        On return everything has been read here, and the parts may be overwritten; before, `read`
        may write into the parts what it has just read there (the same bytes [start, stop)), unless
        they are held in shared memory. Ranks between which there are no bytes need not meet.

        Arguments:
            parts: for each rank the bytes for it, uint8 (bytes,), contiguous, or None; one tensor
                may be there several times. The own one is what `read` sees at this rank.
            sizes: how many bytes each rank has for this one.

        Raises:
            TransportError: a peer has gone or stopped, means another operation, or has another
                number of bytes; or the group was aborted. The transport is of no more use then.
        """
        ...

    def allocate(self, num_bytes: int, turn: Turn) -> torch.Tensor | None:
        """Memory of this rank that the others read in place, zeros, uint8 (num_bytes,). Collective;
        ranks need not take as much as each other.

        None, on all ranks, where there is none.
        """
        ...

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether others read a tensor of this rank where it lies."""
        ...

    def abort(self, reason: str) -> None:
        """Ends the group on all ranks: whoever waits raises within 100 ms. From any thread."""
        ...

    def close(self) -> None:
        """Leaves; waits for nobody."""
        ...


def ignore(views: Views, start: int, stop: int) -> None:
    """A `Read` of who only gives."""


def stalled(turn: Turn, missing: Sequence[int], hosts: Sequence[str]) -> TransportError:
    """The error of who has waited for ranks that did not come."""
    return TransportError(
        f"{turn.what}: after {turn.timeout_s:g} s {ranks(missing, hosts)} had not come",
        hint="a rank that is stopped, slow, or in another part of the program; its log tells where",
    )


def differs(
    sequence: int, mine: str, rank: int, peer: int, theirs: str, hosts: Sequence[str]
) -> TransportError:
    """The error of ranks that mean different operations, told alike by both."""
    said = sorted([(rank, mine), (peer, theirs)])
    return TransportError(
        f"collective number {sequence} differs between ranks: "
        + "; ".join(f"rank {r} ({hosts[r]}) is at {text}" for r, text in said),
        hint="all ranks must issue the same collectives, with the same shapes, in the same order",
    )


def misfit(
    turn: Turn, rank: int, size: int, peer: int, theirs: int, hosts: Sequence[str]
) -> TransportError:
    """The error of ranks that mean the same operation, but not the same number of bytes."""
    return TransportError(
        f"{turn.what}: rank {peer} on {hosts[peer]} has {theirs} bytes for rank {rank} on "
        f"{hosts[rank]}, which expects {size}",
        hint="the sizes that ranks give to this operation must fit together",
    )


def lost(what: str, peer: int, hosts: Sequence[str], why: str) -> TransportError:
    """The error of who has lost a peer, or waits for one that has left."""
    return TransportError(f"{what}: rank {peer} on {hosts[peer]} {why}")


def aborted(what: str, reason: str) -> TransportError:
    """The error of who was released by an abort."""
    return TransportError(f"{what}: the group was aborted: {reason}")


def ranks(missing: Sequence[int], hosts: Sequence[str]) -> str:
    """Such as "rank 1 (on a), rank 3 (on b)"."""
    return ", ".join(f"rank {rank} (on {hosts[rank]})" for rank in missing)
