"""How the ranks of a group come together."""

from __future__ import annotations

import contextlib
from typing import Any

from penstock.exchange.communicator import Communicator
from penstock.exchange.loopback import loopback
from penstock.exchange.mailbox import Mailbox
from penstock.exchange.peers import Peers
from penstock.exchange.shm import NoMemory, ShmTransport, ranks_in_memory
from penstock.exchange.tcp import TcpTransport
from penstock.exchange.transport import Transport


def connect(
    store: Any,
    rank: int,
    world_size: int,
    *,
    timeout_s: float,
    address: str | None = None,
    share_memory: bool = True,
) -> Communicator:
    """Joins the group whose ranks meet in a store of torch.distributed.

    Arguments:
        timeout_s: how long to wait for the others, now and in collectives.
        share_memory: whether ranks of one host meet in memory; else they are as hosts apart.
        address: where the others reach this rank; None: as `Peers.meet` finds it.

    Raises:
        TransportError: not all ranks came before the deadline.
    """
    if world_size == 1:
        return alone()
    peers = Peers.meet(store, rank, world_size, address=address, timeout_s=timeout_s)
    near = ranks_in_memory(peers) if share_memory else [rank]
    transport: Transport = TcpTransport(peers)
    if len(near) == world_size:
        with contextlib.suppress(NoMemory):  # as in a container with little of it
            transport = ShmTransport(peers, near)
    return Communicator(transport, Mailbox(peers, timeout_s), timeout_s=timeout_s)


def alone() -> Communicator:
    """The communicator of a group of one."""
    return Communicator(loopback(1)[0], timeout_s=60.0)
