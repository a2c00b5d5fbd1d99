"""Every collective over every transport, on every dtype: against a float64 reference.

What is reduced in a dtype is allowed that dtype's own rounding, once for each sum in half precision
and once for each addition otherwise; integers and what is only moved must be exact. All ranks must
have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from penstock.errors import TransportError, UserError
from penstock.exchange.communicator import Communicator
from penstock.exchange.reduction import Reduction
from penstock.testing.group import in_processes, in_threads

pytestmark = pytest.mark.usefixtures("deadline", "nothing_left")

FLOATING = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
COMPLEX = [torch.complex64, torch.complex128]
LENGTHS = [0, 1, 7, 1009]
LARGE = 300_007
"""float32: more than a chunk, and not a multiple of anything."""

Run = Callable[..., list[Any]]
RUNS: dict[str, Run] = {
    "loopback": in_threads,
    "memory": partial(in_processes, through="memory"),
    "tcp": partial(in_processes, through="tcp"),
    "hosts": partial(in_processes, through="hosts"),
}


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def values(rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers of this rank, small enough that no sum or product of five overflows."""
    generator = torch.Generator().manual_seed(1000 * rank + length)
    if dtype.is_complex:
        return torch.randn(length, dtype=dtype, generator=generator)
    if dtype.is_floating_point:
        return torch.randn(length, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.randint(0, 2, (length,), generator=generator).bool()
    return torch.randint(0, 3, (length,), generator=generator).to(dtype)


def expected(op: str, parts: list[torch.Tensor], factor: float) -> torch.Tensor:
    """The reduction in float64 (complex128, int64)."""
    first = parts[0]
    if first.is_complex():
        wide = torch.stack(parts).to(torch.complex128)
    else:
        wide = torch.stack(parts).to(torch.float64 if first.is_floating_point() else torch.int64)
    result: torch.Tensor
    if op == "premul_sum":  # what each brings is rounded to its dtype
        result = torch.stack([(p * factor).to(first.dtype) for p in parts]).to(wide.dtype).sum(0)
    elif op in ("sum", "avg"):
        result = wide.sum(0) / (len(parts) if op == "avg" else 1)
    elif op == "product":
        result = wide.prod(0)
    elif op in ("min", "max"):
        result = wide.amin(0) if op == "min" else wide.amax(0)
    else:
        operator = {"band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor}[
            op
        ]
        result = wide[0]
        for part in wide[1:]:
            result = operator(result, part)
    return result


def check(op: str, got: torch.Tensor, parts: list[torch.Tensor], factor: float = 1.0) -> None:
    """Raises where a result is not what it should be."""
    reference = expected(op, parts, factor)
    if not (got.is_floating_point() or got.is_complex()):
        assert torch.equal(got.to(torch.int64), reference.to(got.dtype).to(torch.int64)), op
        return
    eps, least = torch.finfo(got.dtype).eps, torch.finfo(got.dtype).smallest_normal
    wide = torch.stack([part.to(reference.dtype).abs() for part in parts])
    scale = (wide.prod(0) if op == "product" else wide.sum(0)) * max(1.0, abs(factor))
    if got.dtype in (torch.float16, torch.bfloat16):  # one rounding, and float32's before it
        bound = reference.abs().clamp(least) * eps * 0.501 + scale * 1e-6
    else:  # of terms that may cancel
        bound = scale * eps * len(parts)
    assert ((got.to(reference.dtype) - reference).abs() <= bound).all(), (op, got.dtype)


def ops(dtype: torch.dtype) -> list[str]:
    if dtype.is_complex:
        return ["sum", "avg", "product", "premul_sum"]
    if dtype.is_floating_point:
        return ["sum", "avg", "product", "min", "max", "premul_sum"]
    return ["sum", "product", "min", "max", "band", "bor", "bxor"]


def reductions(group: Communicator) -> dict[str, bytes]:
    """Checks all reductions; returns the bits of what all ranks should have alike."""
    rank, world_size, bits = group.rank, group.world_size, {}
    for dtype in FLOATING + INTEGERS + COMPLEX:
        for length in LENGTHS:
            parts = [values(r, length, dtype) for r in range(world_size)]
            for number, op in enumerate(ops(dtype)):
                factor = 0.375
                reduction = Reduction(op, factor if op == "premul_sum" else None)
                tensor = parts[rank].clone()
                group.all_reduce(tensor, reduction, sync=number % 2 == 0).wait()
                check(op, tensor, parts, factor)
                bits[f"{op} {dtype} {length}"] = tensor.view(torch.uint8).numpy().tobytes()
                root = (number + length) % world_size
                at_root = parts[rank].clone()
                group.reduce(at_root, reduction, root).wait()
                if rank == root:
                    assert torch.equal(at_root, tensor)
                else:
                    assert torch.equal(at_root, parts[rank]), "the others keep theirs"
                lengths = [length + r if r % 2 else length for r in range(world_size)]
                theirs = [
                    [values(10 * r + q, lengths[q], dtype) for q in range(world_size)]
                    for r in range(world_size)
                ]
                mine = torch.zeros(lengths[rank], dtype=dtype)
                group.reduce_scatter(mine, theirs[rank], reduction).wait()
                check(op, mine, [theirs[r][rank] for r in range(world_size)], factor)
    return bits


def moves(group: Communicator) -> None:
    rank, world_size = group.rank, group.world_size
    everyone = range(world_size)
    for dtype in [*FLOATING, *INTEGERS, *COMPLEX, torch.bool]:
        for length in LENGTHS:
            lengths = [length + 3 * r if r % 2 else length for r in everyone]  # uneven
            own = values(rank, lengths[rank], dtype)
            gathered = [torch.zeros(n, dtype=dtype) for n in lengths]
            group.gather_all(gathered, own).wait()
            assert all(torch.equal(gathered[r], values(r, lengths[r], dtype)) for r in everyone)
            outputs = [torch.zeros(lengths[rank] + r, dtype=dtype) for r in everyone]
            inputs = [values(10 * rank + r, lengths[r] + rank, dtype) for r in everyone]
            group.exchange(outputs, inputs).wait()
            for r in everyone:
                assert torch.equal(outputs[r], values(10 * r + rank, lengths[rank] + r, dtype))
            for root in everyone:
                tensor = values(rank, length, dtype)
                group.broadcast(tensor, root, sync=True)
                assert torch.equal(tensor, values(root, length, dtype))
                at_root = [torch.zeros(n, dtype=dtype) for n in lengths]
                group.gather(at_root if rank == root else None, own, root).wait()
                if rank == root:
                    for r in everyone:
                        assert torch.equal(at_root[r], values(r, lengths[r], dtype))
                got = torch.zeros(lengths[rank], dtype=dtype)
                given = [values(10 * root + r, lengths[r], dtype) for r in everyone]
                group.scatter(got, given if rank == root else None, root).wait()
                assert torch.equal(got, given[rank])
            group.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_reduction_of_every_dtype(world_size: int, run: Run) -> None:
    bits = run(world_size, reductions, timeout_s=60.0)
    assert all(other == bits[0] for other in bits)
    assert len(bits[0]) == len(LENGTHS) * sum(len(ops(d)) for d in FLOATING + INTEGERS + COMPLEX)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_everything_that_only_moves(world_size: int, run: Run) -> None:
    assert run(world_size, moves, timeout_s=60.0) == [None] * world_size


def large(group: Communicator) -> list[bytes]:
    """Tensors of many chunks, in ordinary memory and in shared; returns the sums' bits."""
    rank, world_size, found = group.rank, group.world_size, []
    parts = [values(r, LARGE, torch.float32) for r in range(world_size)]
    for place in ("ordinary", "allocated", "half of it"):
        memory = torch.zeros(4 * LARGE, dtype=torch.uint8)
        if place != "ordinary":
            memory = group.allocate(4 * LARGE + 64)[: 4 * LARGE]
        tensor = memory.view(torch.float32)
        for again in range(2):  # what was read must not have been altered too early
            tensor.copy_(parts[rank] + again)
            given = tensor[LARGE // 3 :] if place == "half of it" else tensor
            group.all_reduce(given, sync=bool(again)).wait()
            start = LARGE - len(given)
            check("sum", given, [part[start:] + again for part in parts])
        found.append(tensor[LARGE // 3 :].numpy().tobytes())
        gathered = torch.zeros(world_size, LARGE)
        tensor.copy_(parts[rank])
        group.all_gather(gathered, tensor).wait()
        tensor.zero_()
        assert all(torch.equal(gathered[r], parts[r]) for r in range(world_size))
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_tensors_of_many_chunks(world_size: int, run: Run) -> None:
    bits = run(world_size, large, timeout_s=60.0)
    assert all(other == bits[0] for other in bits)
    assert len(set(bits[0])) == 1, "one place adds in another order than another"


def strides(group: Communicator) -> None:
    rank, world_size = group.rank, group.world_size
    base = torch.arange(24.0).view(4, 6) * (rank + 1)
    total = torch.arange(24.0).view(4, 6) * sum(range(1, world_size + 1))
    across = base.clone().t()
    group.all_reduce(across).wait()
    assert torch.equal(across, total.t())
    columns = base.clone()
    group.all_reduce(columns[:, ::2]).wait()
    assert torch.equal(columns[:, ::2], total[:, ::2])
    assert torch.equal(columns[:, 1::2], base[:, 1::2]), "what lies between stays as it is"
    # Contiguous, with strides of its own for the dim of one channel.
    images = torch.ones(4, 1, 3, 3).to(memory_format=torch.channels_last) * rank
    group.broadcast(images, 1, sync=True)
    assert (images == 1).all()
    number = torch.tensor(3.0 * rank)
    group.all_reduce(number, sync=True)
    assert number.item() == 3.0 * sum(range(world_size))
    parameter = torch.nn.Parameter(base.clone())
    group.all_reduce(parameter.data, sync=True)
    group.broadcast(parameter, 0, sync=True)
    assert torch.equal(parameter, total)
    outputs = torch.zeros(6, world_size)
    group.all_gather(outputs.t(), torch.arange(6.0) + rank).wait()
    for r in range(world_size):
        assert torch.equal(outputs[:, r], torch.arange(6.0) + r)
    turned = (torch.ones(5, dtype=torch.complex64) * (1 + 2j)).conj()
    gathered = torch.zeros(world_size, 5, dtype=torch.complex64)
    group.all_gather(gathered, turned).wait()
    assert torch.equal(gathered[0], torch.full((5,), 1 - 2j))


def test_tensors_that_are_not_contiguous(run: Run) -> None:
    assert run(3, strides) == [None] * 3


def order(group: Communicator) -> None:
    """Many under way at once, waited for in another order, with some in between that run inline."""
    rank, world_size = group.rank, group.world_size
    tensors = [torch.full((1 + 997 * n,), float(rank + n)) for n in range(12)]
    works = [group.all_reduce(tensor) for tensor in tensors]
    inline = torch.tensor([float(rank)])
    group.all_reduce(inline, sync=True)
    assert works[-1].done(), "what came later overtook what came before"
    for work in reversed(works):
        work.wait()
    ranks = sum(range(world_size))
    assert inline.item() == ranks
    for n, tensor in enumerate(tensors):
        assert (tensor == ranks + n * world_size).all()
    heard: list[object] = []
    group.barrier(sync=False).when_done(heard.append)
    group.barrier()
    group.barrier(sync=False).wait()
    assert heard == [None]


@pytest.mark.parametrize("world_size", [2, 4])
def test_collectives_run_in_the_order_of_issue(world_size: int, run: Run) -> None:
    assert run(world_size, order) == [None] * world_size


def shapes_differ(group: Communicator) -> tuple[str, str]:
    group.barrier()
    told = []
    for _ in range(2):
        with pytest.raises(TransportError) as caught:
            group.all_reduce(torch.zeros(3 + group.rank % 2), sync=True)
        told.append(caught.value.message)
    return told[0], told[1]


def sizes_differ(group: Communicator) -> str:
    outputs = [torch.zeros(4 if group.rank == 1 and r == 0 else 3) for r in range(group.world_size)]
    with pytest.raises(TransportError) as caught:  # rank 0 has what it wants, the first time
        _ = [group.exchange(outputs, [torch.zeros(3)] * group.world_size, sync=True) for _ in "12"]
    return caught.value.message


def test_other_shapes_are_named_on_all_ranks(run: Run) -> None:
    for first, second in run(2, shapes_differ):
        assert "rank 0 (" in first
        assert "is at all_reduce of sum float32 (3,); rank 1" in first
        assert "is at all_reduce of sum float32 (4,)" in first
        assert second == first, "a group that has failed fails alike ever after"


def test_other_sizes_are_named(run: Run) -> None:
    told = run(2, sizes_differ)
    assert "12 bytes for rank 1" in told[1]
    assert "expects 16" in told[1]
    assert "12 bytes for rank 1" in told[0]


def wrong_arguments(group: Communicator) -> None:
    for call, text in (
        (lambda: group.broadcast(torch.zeros(1), 7), "root 7: expected a rank from 0 to 1"),
        (lambda: group.gather_all([torch.zeros(1)], torch.zeros(1)), "one for each of 2 ranks"),
        (lambda: group.all_reduce(torch.zeros(1), Reduction("band")), "band of float32"),
        (lambda: group.all_reduce(torch.zeros(1, dtype=torch.int32), Reduction("avg")), "avg of"),
        (lambda: group.scatter(torch.zeros(1), None, group.rank), "missing at the root"),
    ):
        with pytest.raises(UserError, match=text):
            call()
    tensor = torch.ones(1)
    group.all_reduce(tensor, sync=True)  # no harm was done
    assert tensor.item() == 2


def test_what_cannot_be_is_said_before_anything_is_sent() -> None:
    assert in_threads(2, wrong_arguments) == [None, None]


def test_the_reference_would_notice_a_wrong_rounding() -> None:
    parts = [values(r, 1009, torch.bfloat16) for r in range(5)]
    twice = parts[0].clone()
    for part in parts[1:]:
        twice += part  # rounds after each addition
    with pytest.raises(AssertionError):
        check("sum", twice, parts)
    assert math.isclose(expected("avg", parts, 1.0)[0].item(), sum(p[0].item() for p in parts) / 5)
