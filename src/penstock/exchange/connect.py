"""How the ranks of a group come together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from penstock.exchange.communicator import Communicator
from penstock.exchange.loopback import loopback
from penstock.exchange.mailbox import Mailbox
from penstock.exchange.mixed import MixedTransport
from penstock.exchange.network import Network, measure
from penstock.exchange.pattern import Hosts
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
    share_memory: bool | Sequence[Sequence[int]] = True,
    network: Network | None = None,
) -> Communicator:
    """Joins the group whose ranks meet in a store of torch.distributed.

    Arguments:
        timeout_s: how long to wait for the others, now and in collectives.
        address: where the others reach this rank; None: as `Peers.meet` finds it.
        share_memory: whether ranks of one host meet in memory; else they are as hosts apart. Lists
            of ranks say which are to count as one host; they must be able to share memory.
        network: what was measured before, the same on all ranks; it is taken where it fits, and
            else, if there is more than one host, measured now.

    Raises:
        TransportError: not all ranks came before the deadline.
    """
    if world_size == 1:
        return alone()
    peers = Peers.meet(store, rank, world_size, address=address, timeout_s=timeout_s)
    hosts = _hosts(peers, share_memory)
    transport = _transport(peers, hosts)
    if isinstance(transport, ShmTransport):
        network = None  # in memory each rank reads from all others alike
    elif network is None or not network.fits(peers.hosts, hosts):
        network = measure(transport, hosts, timeout_s)
    mailbox = Mailbox(peers, timeout_s)
    return Communicator(transport, mailbox, timeout_s=timeout_s, network=network)


def alone() -> Communicator:
    """The communicator of a group of one."""
    return Communicator(loopback(1)[0], timeout_s=60.0)


def _hosts(peers: Peers, share_memory: bool | Sequence[Sequence[int]]) -> Hosts:
    """The ranks of each host, the same on all ranks."""
    if share_memory is False:
        return tuple((rank,) for rank in range(peers.world_size))
    if share_memory is not True:
        return tuple(sorted(tuple(sorted(ranks)) for ranks in share_memory))
    near = peers.gather(json.dumps(ranks_in_memory(peers)).encode())
    return tuple(sorted({tuple(json.loads(ranks)) for ranks in near}))


def _transport(peers: Peers, hosts: Hosts) -> Transport:
    if len(hosts) == peers.world_size:
        return TcpTransport(peers)
    own = next(ranks for ranks in hosts if peers.rank in ranks)
    try:
        return ShmTransport(peers, own) if len(hosts) == 1 else MixedTransport(peers, own, hosts)
    except NoMemory:  # as in a container with little of it
        return TcpTransport(peers)
