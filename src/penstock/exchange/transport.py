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
from penstock.exchange.operation import Operation

Views = Sequence[torch.Tensor | None]
"""By rank, uint8 (bytes,): a piece of what each has for this one; None from who has nothing (more)."""

Read = Callable[[Views, int, int], None]
"""Takes views of the bytes [start, stop) of what each rank has for this one (less from who has less
than `stop`). Start rises from 0 in multiples of `ALIGNMENT_BYTES`. The views are not to be written,
and are gone when the call ends."""

ALIGNMENT_BYTES = 64


class Transport(Protocol):
    """One rank's end. All ranks call `share` in the same order, each from one thread at a time.

    Attributes:
        hosts: by rank, the name of its machine, for errors.
    """

    rank: int
    world_size: int
    hosts: Sequence[str]

    def share(
        self,
        sequence: int,
        operation: Operation,
        parts: Views,
        sizes: Sequence[int],
        read: Read,
        timeout_s: float,
    ) -> None:
        """Gives each rank what this one has for it, and reads what all have for this one.

        On return everything has been read here, and the parts may be overwritten.

        Arguments:
            sequence: of the operation in this group, for errors.
            parts: for each rank the bytes for it, uint8 (bytes,), contiguous, or None; one tensor
                may be there several times. The own one is what `read` sees at this rank.
            sizes: how many bytes each rank has for this one.

        Raises:
            TransportError: a peer has gone or stopped, means another operation, or has another
                number of bytes; or the group was aborted. The transport is of no more use then.
        """
        ...

    def abort(self, reason: str) -> None:
        """Ends the group on all ranks: whoever waits raises within 100 ms. From any thread."""
        ...

    def close(self) -> None:
        """Leaves; waits for nobody."""
        ...


def stalled(
    operation: Operation,
    sequence: int,
    missing: Sequence[int],
    hosts: Sequence[str],
    timeout_s: float,
) -> TransportError:
    """The error of who has waited for ranks that did not come."""
    return TransportError(
        f"{operation.text}, number {sequence}: after {timeout_s:g} s "
        f"{ranks(missing, hosts)} had not come",
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


def lost(what: str, peer: int, hosts: Sequence[str], why: str) -> TransportError:
    """The error of who has lost a peer, or waits for one that has left."""
    return TransportError(f"{what}: rank {peer} on {hosts[peer]} {why}")


def aborted(what: str, reason: str) -> TransportError:
    """The error of who was released by an abort."""
    return TransportError(f"{what}: the group was aborted: {reason}")


def ranks(missing: Sequence[int], hosts: Sequence[str]) -> str:
    """Such as "rank 1 (on a), rank 3 (on b)"."""
    return ", ".join(f"rank {rank} (on {hosts[rank]})" for rank in missing)
