"""The exchange of gradients when a rank is lost: an exception, after which the others go on."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock.errors import TransportError
from penstock.exchange.agreement import Agreement, Clip
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.exchange.gradients import GradientAgreement
from penstock.testing.group import GONE, in_processes

pytestmark = pytest.mark.usefixtures("deadline", "nothing_left")

SHARDS = 4
SURVIVORS = {0: 0, 2: 1}
SIZE = 600
"""A layer of so many rows and columns has more bytes than one chunk of shared memory."""


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, SIZE), torch.nn.Linear(SIZE, SIZE), torch.nn.Linear(SIZE, 1)
    )


def agreement_of(group: Communicator, net: torch.nn.Module, own: range) -> Agreement:
    return GradientAgreement(
        group,
        list(net.named_parameters()),
        torch.optim.SGD(net.parameters(), lr=1e-3),
        own,
        SHARDS,
        bucket_bytes=1 << 18,
        borders=None,
        clip=Clip(),
        where=lambda i: f"own shard {i}",
    )


def step(agreement: Agreement, net: torch.nn.Module, own: range, number: int) -> None:
    for i, shard in enumerate(own):
        agreement.activate(i)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * number + shard))
        agreement.backward(net(x).square().mean(), len(x), True)
    agreement.commit(number)


def shards_of(rank: int, world_size: int) -> range:
    return range(SHARDS * rank // world_size, SHARDS * (rank + 1) // world_size)


def digest(net: torch.nn.Module) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in net.parameters())


def lose_rank_1(group: Communicator, folder: str, moment: str) -> bytes | None:
    """Three ranks train two steps; rank 1 is lost in the third; the others go on with that step."""
    net = network()
    own = shards_of(group.rank, 3)
    agreement = agreement_of(group, net, own)
    for number in range(2):
        step(agreement, net, own, number)
    before = digest(net)
    if group.rank == 1:
        if moment == "between steps":
            os.kill(os.getpid(), signal.SIGKILL)
        hook = [*net.parameters()][2].register_post_accumulate_grad_hook  # in mid-backward
        hook(lambda parameter: os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[no-untyped-call]
    with pytest.raises(TransportError, match=r"rank 1 on \S+ (has )?died"):
        step(agreement, net, own, 2)
    assert digest(net) == before, "a step that was not agreed upon changed the parameters"
    group.close()
    rank = SURVIVORS[group.rank]
    store = dist.FileStore(f"{folder}/next", 2)  # type: ignore[attr-defined]
    near = group.through == "memory"
    following = connect(store, rank, 2, timeout_s=20.0, share_memory=near)
    for hooked in net.parameters():  # the old agreement's hooks must not send any more
        hooked._post_accumulate_grad_hooks = None  # type: ignore[attr-defined]
    own = shards_of(rank, 2)
    agreement = agreement_of(following, net, own)
    for number in range(2, 4):
        step(agreement, net, own, number)
    following.barrier()
    following.close()
    return digest(net)


def undisturbed() -> bytes:
    """The same four steps in one process."""
    from penstock.exchange.connect import alone

    net = network()
    agreement = agreement_of(alone(), net, range(SHARDS))
    for number in range(4):
        step(agreement, net, range(SHARDS), number)
    return digest(net)


@pytest.mark.parametrize("through", ["memory", "tcp", "hosts"])
@pytest.mark.parametrize("moment", ["between steps", "in the middle of backward"])
def test_survivors_go_on_to_the_same_bits(through: str, moment: str, tmp_path: Path) -> None:
    lose = partial(lose_rank_1, folder=str(tmp_path), moment=moment)
    results: list[Any] = in_processes(3, lose, through=through)
    assert results[1] is GONE
    expected = undisturbed()
    assert results[0] == results[2] == expected
