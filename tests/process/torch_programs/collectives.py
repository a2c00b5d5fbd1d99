"""Every collective of torch.distributed, on values that add exactly in any dtype and order."""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh

from penstock.errors import TransportError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.complex64,
)
MOVED_ONLY = (torch.bool, torch.int16)
"""What gloo moves though it does not reduce it."""
FLOATING = DTYPES[:4]

Values = Any


def values(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, other ones on each rank."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    numbers = torch.randint(0, 4, shape or (7,), generator=generator)
    return (numbers > 1) if dtype == torch.bool else numbers.to(dtype)


def told(*tensors: torch.Tensor) -> Values:
    return [
        (str(t.dtype), torch.view_as_real(t).tolist() if t.is_complex() else t.tolist())
        for t in tensors
    ]


def reductions(dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    yield "sum", dist.ReduceOp.SUM
    if dtype.is_complex:
        return
    yield "product", dist.ReduceOp.PRODUCT
    yield "min", dist.ReduceOp.MIN
    yield "max", dist.ReduceOp.MAX
    if not dtype.is_floating_point:
        yield "band", dist.ReduceOp.BAND
        yield "bor", dist.ReduceOp.BOR
        yield "bxor", dist.ReduceOp.BXOR


def every() -> dict[str, dict[str, Values]]:
    """Each collective on each dtype."""
    return {
        **{f"reduced {dtype}": reduced(dtype) for dtype in DTYPES},
        **{f"moved {dtype}": moved(dtype) for dtype in (*DTYPES, *MOVED_ONLY)},
    }


def reduced(dtype: torch.dtype) -> dict[str, Values]:
    """Each collective that reduces, with each operator."""
    size, rank = dist.get_world_size(), dist.get_rank()
    answers: dict[str, Values] = {}
    for name, op in reductions(dtype):
        with _collective(answers, f"all_reduce {name}") as keep:
            x = values(dtype)
            dist.all_reduce(x, op)
            keep(x)
        with _collective(answers, f"all_reduce {name}, of no dimension") as keep:
            x = values(dtype, 1)[0]
            dist.all_reduce(x, op)
            keep(x)
        with _collective(answers, f"reduce {name}") as keep:
            x = values(dtype, seed=1)
            dist.reduce(x, size - 1, op)
            keep(*([x] if rank == size - 1 else []))
        with _collective(answers, f"reduce_scatter {name}") as keep:
            x = torch.zeros(3, dtype=dtype)
            dist.reduce_scatter(x, list(values(dtype, size, 3, seed=2).unbind()), op)
            keep(x)
        with _collective(answers, f"reduce_scatter_tensor {name}") as keep:
            x = torch.zeros(2, 3, dtype=dtype)
            dist.reduce_scatter_tensor(x, values(dtype, size * 2, 3, seed=3), op)
            keep(x)
    with _collective(answers, "all_reduce_coalesced") as keep:
        several = [values(dtype, n, seed=n) for n in (1, 5, 2)]
        dist.all_reduce_coalesced(several)
        keep(*several)
    return answers


def moved(dtype: torch.dtype) -> dict[str, Values]:
    """Each collective that only moves."""
    size, rank = dist.get_world_size(), dist.get_rank()
    answers: dict[str, Values] = {}
    with _collective(answers, "broadcast") as keep:
        x = values(dtype)
        dist.broadcast(x, size - 1)
        keep(x)
    with _collective(answers, "all_gather") as keep:
        several = [torch.zeros(7, dtype=dtype) for _ in range(size)]
        dist.all_gather(several, values(dtype))
        keep(*several)
    with _collective(answers, "all_gather_into_tensor") as keep:
        stacked, joined = torch.zeros(size, 7, dtype=dtype), torch.zeros(size * 7, dtype=dtype)
        dist.all_gather_into_tensor(stacked, values(dtype))
        dist.all_gather_into_tensor(joined, values(dtype))
        keep(stacked, joined)
    with _collective(answers, "gather") as keep:
        several = [torch.zeros(7, dtype=dtype) for _ in range(size)]
        dist.gather(values(dtype), several if rank == 1 else None, dst=1)
        keep(*several)
    with _collective(answers, "scatter") as keep:
        x = torch.zeros(7, dtype=dtype)
        dist.scatter(x, list(values(dtype, size, 7).unbind()) if rank == 1 else None, src=1)
        keep(x)
    with _collective(answers, "all_to_all_single") as keep:
        x = torch.zeros(size * 2, 3, dtype=dtype)
        dist.all_to_all_single(x, values(dtype, size * 2, 3))
        keep(x)
    with _collective(answers, "all_to_all_single, uneven") as keep:
        # rank r has r + p + 1 rows for rank p
        sizes = [rank + peer + 1 for peer in range(size)]
        x = torch.zeros(sum(sizes), 2, dtype=dtype)
        dist.all_to_all_single(x, values(dtype, sum(sizes), 2), sizes, sizes)
        keep(x)
    with _collective(answers, "send and recv") as keep:
        x = torch.zeros(7, dtype=dtype)
        if rank == 0:
            dist.send(values(dtype), 1, tag=3)
        elif rank == 1:
            dist.recv(x, 0, tag=3)
        keep(x)
    with _collective(answers, "batch_isend_irecv") as keep:
        x, around = torch.zeros(7, dtype=dtype), ((rank + 1) % size, (rank - 1) % size)
        sent = values(dtype)
        operations = [dist.P2POp(dist.isend, sent, around[0]), dist.P2POp(dist.irecv, x, around[1])]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        keep(x)
    return answers


def only_here() -> dict[str, Values]:
    """What gloo does not have, with its result by arithmetic: pairs of received and expected."""
    size, rank = dist.get_world_size(), dist.get_rank()
    everyone = torch.arange(size, dtype=torch.float32)
    answers: dict[str, Values] = {}
    for dtype in FLOATING:
        x = torch.full((5,), float(rank), dtype=dtype)
        dist.all_reduce(x, dist.ReduceOp.AVG)
        answers[f"avg {dtype}"] = told(x, torch.full_like(x, everyone.mean().item()))
        x = torch.full((5,), float(rank), dtype=dtype)
        dist.all_reduce(x, dist.ReduceOp.PREMUL_SUM(0.5))
        answers[f"premul_sum {dtype}"] = told(x, torch.full_like(x, everyone.sum().item() / 2))
    x = torch.full((3,), float(rank))
    dist.all_reduce(x, dist.ReduceOp.PREMUL_SUM(torch.tensor(2.0)))
    answers["premul_sum by a tensor"] = told(x, torch.full_like(x, everyone.sum().item() * 2))
    x = torch.full((4, 6), float(rank)).t()[::2]
    dist.all_reduce(x)
    answers["not contiguous"] = told(x, torch.full_like(x, everyone.sum().item()))
    several = [torch.zeros(r) for r in range(size)]
    dist.all_gather(several, torch.full((rank,), float(rank)))
    answers["all_gather, uneven"] = told(
        *several, *(torch.full((r,), float(r)) for r in range(size))
    )
    x = torch.zeros(size * 2)
    with dist._coalescing_manager():
        dist.all_gather_into_tensor(x, torch.full((2,), float(rank)))
    answers["coalesced"] = told(x, everyone.repeat_interleave(2))
    x = torch.zeros(2)
    with dist._coalescing_manager():
        dist.reduce_scatter_tensor(x, everyone.repeat_interleave(2))
    answers["coalesced reduce_scatter"] = told(x, torch.full((2,), float(rank * size)))
    several = [torch.zeros(rank + peer + 1) for peer in range(size)]
    dist.all_to_all(several, [torch.full((rank + peer + 1,), float(rank)) for peer in range(size)])
    expected = [torch.full((rank + peer + 1,), float(peer)) for peer in range(size)]
    answers["all_to_all"] = told(*several, *expected)
    return answers


def works() -> None:
    """What a program may ask of a work, asserted here."""
    size, rank = dist.get_world_size(), dist.get_rank()
    x = torch.full((4,), float(rank))
    work = dist.all_reduce(x, async_op=True)
    future = work.get_future()
    assert work.wait(datetime.timedelta(seconds=5)) is True
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None
    assert work.result()[0] is x
    assert torch.equal(future.wait()[0], x)
    assert x.tolist() == [sum(range(size))] * 4
    if rank == 0:
        late = torch.zeros(1)
        work = dist.irecv(late, tag=9)
        assert not work.is_completed()
        assert not work.is_success()
        with pytest.raises(TransportError):  # nobody has sent
            work.wait(datetime.timedelta(milliseconds=50))
        dist.barrier()
        work.wait()
        assert late.item() == work.source_rank() == size - 1
        assert dist.recv(late, tag=10) == 1
    else:
        dist.barrier()
        if rank == size - 1:
            dist.send(torch.full((1,), float(rank)), 0, tag=9)
        if rank == 1:
            dist.send(torch.zeros(1), 0, tag=10)
    dist.barrier(async_op=True).wait()
    group = dist.group.WORLD
    assert dist.get_backend() == "penstock"
    assert group.rank() == rank
    assert group.size() == size
    assert group._get_backend_name() == "penstock"
    assert group.group_name
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank})
    assert gathered == [{"rank": r} for r in range(size)]
    objects = ["a", 1] if rank == 0 else [None, None]
    dist.broadcast_object_list(objects, src=0)
    assert objects == ["a", 1]
    one: list[Any] = [None]
    dist.scatter_object_list(one, list(range(size)) if rank == 0 else None, src=0)
    assert one == [rank]


def functional_collectives() -> None:
    """torch.ops._c10d_functional, eager and under torch.compile's own wait."""
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD
    mine = torch.full((size, 2), float(rank))
    total = functional.all_reduce(mine, "sum", group)
    assert torch.equal(total, torch.full_like(mine, sum(range(size))))
    assert torch.equal(mine, torch.full_like(mine, rank))
    gathered = functional.all_gather_tensor(mine, 0, group)
    assert gathered[:, 0].tolist() == [r for r in range(size) for _ in range(size)]
    part = functional.reduce_scatter_tensor(mine, "avg", 0, group)
    assert part.tolist() == [[sum(range(size)) / size] * 2]
    swapped = functional.all_to_all_single(mine, None, None, group)
    assert swapped[:, 0].tolist() == list(range(size))
    spread = functional.broadcast(mine, 1, group)
    assert torch.equal(spread, torch.ones_like(mine))
    several = functional.all_reduce_coalesced([mine, mine[0]], "max", group)
    assert all(bool((t == size - 1).all()) for t in several)
    several = functional.all_gather_into_tensor_coalesced([mine, mine[:1]], group)
    assert [len(t) for t in several] == [size * size, size]
    several = functional.reduce_scatter_tensor_coalesced([mine, mine], "sum", [0, 0], group)
    assert all(bool((t == sum(range(size))).all()) for t in several)


def sub_groups() -> None:
    """Four ranks; groups used at once, in an order that differs between ranks."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    rows, columns = mesh.get_group("shard"), mesh.get_group("replica")
    assert dist.get_process_group_ranks(rows) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert dist.get_group_rank(rows, rank) == rank % 2
    assert dist.get_global_rank(columns, 1) == rank % 2 + 2
    for _ in range(20):
        tensors = [torch.full((n,), float(rank)) for n in (3, 5000, 17)]
        order = [(0, rows), (1, columns), (2, None)]
        if rank % 2:
            order.reverse()
        issued = [dist.all_reduce(tensors[i], group=group, async_op=True) for i, group in order]
        for work in issued:
            work.wait()
        neighbours = [rank // 2 * 4 + 1, rank % 2 * 2 + 2, 6]
        assert [t[-1].item() for t in tensors] == neighbours
    # each group by a thread of its own
    counts = {}

    def count(name: str, group: dist.ProcessGroup) -> None:
        x = torch.ones(100)
        for _ in range(30):
            dist.all_reduce(x, dist.ReduceOp.AVG, group=group)
            dist.all_reduce(x, dist.ReduceOp.MAX, group=group, async_op=True).wait()
        counts[name] = x.sum().item()

    threads = [threading.Thread(target=count, args=of) for of in (("r", rows), ("c", columns))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert counts == {"r": 100, "c": 100}
    alone = dist.new_group([rank], use_local_synchronization=True)
    x = torch.ones(2)
    dist.all_reduce(x, group=alone)
    dist.barrier(group=alone)
    assert x.tolist() == [1, 1]
    dist.destroy_process_group(columns)
    dist.all_reduce(x, group=rows)
    assert x.tolist() == [2, 2]


@contextlib.contextmanager
def _collective(answers: dict[str, Values], name: str) -> Iterator[Callable[..., None]]:
    """Keeps what the collective gave, or that torch or the backend refuses it."""

    def keep(*tensors: torch.Tensor) -> None:
        answers[name] = told(*tensors)

    try:
        yield keep
    except (RuntimeError, ValueError, TypeError) as error:
        answers[name] = f"refused: {error}"
