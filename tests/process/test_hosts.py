"""Groups on several hosts, each with a network, a name and a /dev/shm of its own."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock.errors import TransportError
from penstock.exchange import tree
from penstock.exchange.agreement import Clip
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.exchange.gradients import GradientAgreement
from penstock.exchange.into_forward import watch
from penstock.exchange.reduction import Reduction, Total
from penstock.testing.hosts import GONE, hosts, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")

TIMEOUT_S = 2.5
LENGTHS = [1, 1009, 300_007]


def values(rank: int, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(1000 * rank + length))


def total_of(world_size: int) -> Total:
    """The sum over shards, one on each rank."""
    return Total([(rank, rank + 1) for rank in range(world_size)], world_size)


def check(group: Communicator, length: int) -> None:
    """Each collective once; float32 sums over shards to the bit."""
    rank, world_size = group.rank, group.world_size
    everyone = range(world_size)
    parts = [values(r, length) for r in everyone]
    total = parts[rank].clone()
    group.all_reduce(total, total_of(world_size)).wait()
    assert torch.equal(total, tree.tree_sum(parts)), "not along the fixed tree"
    mean = parts[rank].clone()
    group.all_reduce(mean, Reduction("avg"), sync=True)
    assert torch.allclose(mean, torch.stack(parts).mean(0), atol=1e-5)
    halves = [part.to(torch.bfloat16) for part in parts]
    half = halves[rank].clone()
    group.all_reduce(half, sync=True)
    assert torch.equal(half, tree.tree_sum([h.float() for h in halves]).to(torch.bfloat16))
    gathered = [torch.zeros(length + r) for r in everyone]
    group.gather_all(gathered, values(rank, length + rank)).wait()
    assert all(torch.equal(gathered[r], values(r, length + r)) for r in everyone)
    for root in everyone:
        tensor = parts[rank].clone()
        group.broadcast(tensor, root).wait()
        assert torch.equal(tensor, parts[root])
    root = world_size - 1
    smallest = parts[rank].clone()
    group.reduce(smallest, Reduction("min"), root).wait()
    assert torch.equal(smallest, torch.stack(parts).amin(0) if rank == root else parts[rank])
    at_root = [torch.zeros(length) for _ in everyone] if rank == root else None
    group.gather(at_root, parts[rank], root).wait()
    assert at_root is None or all(torch.equal(*pair) for pair in zip(at_root, parts, strict=True))
    out = torch.zeros(length)
    group.scatter(out, parts if rank == root else None, root).wait()
    assert torch.equal(out, parts[rank])
    group.reduce_scatter(out, [values(10 * rank + r, length) for r in everyone]).wait()
    theirs = torch.stack([values(10 * r + rank, length) for r in everyone])
    assert torch.allclose(out, theirs.sum(0), atol=1e-5)
    group.exchange(gathered, [values(10 * rank + r, length + rank) for r in everyone]).wait()
    assert all(torch.equal(gathered[r], values(10 * r + rank, length + r)) for r in everyone)
    came = torch.zeros(length)
    sent = group.send(parts[rank], (rank + 1) % world_size)
    group.receive(came, (rank - 1) % world_size).wait()
    sent.wait()
    assert torch.equal(came, parts[rank - 1])
    group.barrier()


def collectives(store: dist.Store, rank: int, world_size: int) -> tuple[str, list[str], bool]:
    group = connect(store, rank, world_size, timeout_s=20.0)
    for length in LENGTHS:
        check(group, length)
    memory = group.allocate(4 * LENGTHS[-1])
    inside = memory.view(torch.float32).copy_(values(rank, LENGTHS[-1]))
    group.all_reduce(inside, total_of(world_size), sync=True)
    parts = [values(r, LENGTHS[-1]) for r in range(world_size)]
    assert (group.all_reduce_s(1 << 20) is None) == (len(set(group.hosts)) == 1)
    found = group.through, list(group.hosts), torch.equal(inside, tree.tree_sum(parts))
    group.barrier()
    group.close()
    return found


@pytest.mark.parametrize(
    ("hosts_by_rank", "bits_per_s"),
    [
        ([0, 1], 100_000_000),
        ([0, 1], 1_000_000_000),
        ([0, 0, 1, 1], 1_000_000_000),
        ([0, 1, 0, 1], 10_000_000_000),  # sums over ranks 0 and 2 are no subtrees
        ([0, 1, 2, 3], 1_000_000_000),
        ([0, 0, 1, 1, 2, 2, 3, 3], 1_000_000_000),
        ([0, 0, 0], None),
    ],
    ids=str,
)
def test_all_collectives_and_who_shares_memory(
    hosts_by_rank: list[int], bits_per_s: int | None
) -> None:
    count = max(hosts_by_rank) + 1
    with hosts(count, bits_per_s) as net:
        found = net.run(collectives, hosts_by_rank)
    alone = len(hosts_by_rank) == count
    through = "memory" if count == 1 else "tcp" if alone else "memory and tcp"
    assert found == [(through, [f"host{h}" for h in hosts_by_rank], True)] * len(hosts_by_rank)


def trains(store: dist.Store, rank: int, world_size: int) -> tuple[list[bytes], list[int]]:
    """The parameters after some steps, in which the exchange goes on into forward or not, and in
    which order it sends then."""
    group = connect(store, rank, world_size, timeout_s=20.0)
    digests = []
    for goes_on in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4)))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        agreement = GradientAgreement(
            group,
            list(network.named_parameters()),
            optimizer,
            range(rank, rank + 1),
            world_size,
            bucket_bytes=65_000,
            borders=None,
            clip=Clip(),
            where=lambda shard: f"shard {shard}",
            into_forward=goes_on,
        )
        if goes_on:
            watch(network, optimizer, list(network.parameters()), agreement.settle)
        for step in range(6):
            agreement.activate(0)
            loss = network(values(rank, 4 * 128 + step)[:512].view(4, 128)).square().mean()
            agreement.backward(loss, 4, True)
            agreement.commit(step)
        agreement.settle()
        digests.append(b"".join(p.detach().numpy().tobytes() for p in network.parameters()))
    group.barrier()
    group.close()
    return digests, agreement.order


def test_between_hosts_the_first_layers_are_sent_first() -> None:
    with hosts(2, 5_000_000) as net:  # a bucket takes 100 ms, much longer than backward
        found = net.run(trains, [0, 1])
    for digests, order in found:
        assert digests == [found[0][0][0]] * 2
        assert order == [0, 3, 2, 1]


def go_on(group: Communicator, store: dist.Store, began: list[float]) -> None:
    """All-reduces again and again, and notes when each began."""
    tensor = torch.ones(2_000_000)
    for turn in range(1000):
        began.append(time.monotonic())
        group.all_reduce(tensor, Reduction("avg"), sync=True)
        if group.rank == 0 and turn == 0:
            store.set("under way", "")


def loses(store: dist.Store, rank: int, world_size: int) -> tuple[str, float, float]:
    """What is said when a rank is lost, and after how long; then what the others sum."""
    group = connect(dist.PrefixStore("first", store), rank, world_size, timeout_s=TIMEOUT_S)
    began: list[float] = []
    with pytest.raises(TransportError) as caught:
        go_on(group, store, began)
    waited_s = time.monotonic() - began[-1]
    group.close()
    if rank == world_size - 1:
        return str(caught.value), waited_s, 0.0
    following = connect(dist.PrefixStore("next", store), rank, world_size - 1, timeout_s=20.0)
    total = torch.full((300_007,), float(rank + 1))
    following.all_reduce(total, sync=True)
    following.barrier()
    following.close()
    return str(caught.value), waited_s, total[-1].item()


def test_a_host_that_is_cut_off_is_named_and_the_others_go_on() -> None:
    with hosts(3, 1_000_000_000) as net, net.ranks(loses, [0, 0, 1, 2]) as ranks:
        ranks.store.wait(["under way"])
        time.sleep(0.1)
        net.cut(2)
        *others, cut_off = ranks.wait(timeout_s=40.0)
    for text, waited_s, total in others:
        assert "all_reduce of avg float32 (2000000,), number " in text
        assert "rank 3 (on host2) had not come" in text
        assert "on host0) had" not in text, "it was there"
        assert TIMEOUT_S - 1 < waited_s < TIMEOUT_S + 2
        assert total == 6.0
    text, waited_s, _ = cut_off  # the last bytes of some may have come before the cut
    assert "rank 1 (on host0)" in text
    assert "had not come" in text


def killed(store: dist.Store, rank: int, world_size: int, *, mid_way: bool) -> tuple[str, float]:
    """What is said of the last rank, and how long after it has killed itself."""
    group = connect(store, rank, world_size, timeout_s=20.0)
    tensor = torch.ones(2_000_000)
    group.all_reduce(tensor, sync=True)
    if rank == world_size - 1:
        if mid_way:
            group.all_reduce(tensor)
        time.sleep(0.05)
        store.set("killed at", str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(TransportError) as caught:
        group.all_reduce(tensor, sync=True)
    noticed = time.monotonic()
    group.close()
    return str(caught.value), noticed - float(store.get("killed at"))


@pytest.mark.parametrize("mid_way", [True, False])
def test_a_rank_killed_on_another_host_is_noticed_within_a_second(mid_way: bool) -> None:
    with hosts(2, 100_000_000) as net:
        *others, gone = net.run(partial(killed, mid_way=mid_way), [0, 0, 1, 1])
    assert gone is GONE
    for text, after_s in others:
        assert "rank 3 on host1 died" in text
        assert after_s < 1.5


def ends_early(store: dist.Store, rank: int, world_size: int) -> Any:
    """A group whose second rank on each host leaves: the others are told who."""
    group = connect(store, rank, world_size, timeout_s=20.0)
    group.barrier()
    if rank == 3:
        group.close()
        return None
    with pytest.raises(TransportError) as caught:
        group.all_reduce(torch.ones(100_000), sync=True)
    return str(caught.value)


def test_a_rank_that_leaves_is_named_on_both_hosts() -> None:
    with hosts(2) as net:
        *others, left = net.run(ends_early, [0, 0, 1, 1])
    assert left is None
    for text in others:
        assert "rank 3 on host1 has left" in text or "rank 3 on host1 left" in text
