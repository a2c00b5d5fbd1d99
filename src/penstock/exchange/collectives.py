"""The collectives, each made of `Transport.share`.

Tensors here are flat, contiguous and on the CPU; `communicator` sees to that. What is reduced is
reduced from all ranks' parts at once, along the fixed tree over ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from penstock.exchange.operation import Operation
from penstock.exchange.reduction import Combine
from penstock.exchange.transport import Read, Transport, Views

ONE_PHASE_BYTES = 64 << 10
"""Up to here every rank reduces everything itself; above, each a part, if there are more than two.
[measured: AMD EPYC, 4 ranks on 2 cores, 2026-11]"""


_BYTE = torch.zeros(1, dtype=torch.uint8)


class Call(NamedTuple):
    """One collective under way: what `share` needs to know of it."""

    transport: Transport
    sequence: int
    operation: Operation
    timeout_s: float

    def share(
        self,
        parts: Sequence[torch.Tensor | None],
        sizes: Sequence[int],
        read: Callable[[Views, int, int], None],
    ) -> None:
        """`Transport.share` of tensors of any dtype."""
        given = _each(parts, as_bytes)
        self.transport.share(self.sequence, self.operation, given, sizes, read, self.timeout_s)


def barrier(call: Call) -> None:
    """Returns when all have come here."""
    world_size = call.transport.world_size
    call.share([_BYTE] * world_size, [1] * world_size, _ignore)


def all_reduce(
    call: Call, source: torch.Tensor, out: torch.Tensor, combine: Combine, shared: bool = False
) -> None:
    """Reduces the tensors of all ranks for all.

    Arguments:
        source: what this rank brings, (n,).
        out: (n,); may be the source.
        shared: whether the source is read by others where it lies, on all ranks.
    """
    rank, world_size = call.transport.rank, call.transport.world_size
    if source.nbytes <= ONE_PHASE_BYTES or (world_size == 2 and not shared):
        reduce_to_all(call, source, out, combine)
        return
    borders = cut(len(out), out.itemsize, world_size)
    pieces = [out[start:stop] for start, stop in borders]
    reduce_scatter(call, [source[start:stop] for start, stop in borders], pieces[rank], combine)
    all_gather(call, pieces[rank], pieces)


def reduce_to_all(call: Call, source: torch.Tensor, out: torch.Tensor, combine: Combine) -> None:
    """As `all_reduce`: every rank reads all and reduces all."""
    world_size = call.transport.world_size
    call.share([source] * world_size, [source.nbytes] * world_size, _reducing(combine, out))


def reduce(
    call: Call, source: torch.Tensor, out: torch.Tensor | None, combine: Combine, root: int
) -> None:
    """Reduces the tensors of all ranks into the root's `out`."""
    world_size = call.transport.world_size
    parts: list[torch.Tensor | None] = [None] * world_size
    parts[root] = source
    if out is None:
        call.share(parts, [0] * world_size, _ignore)
    else:
        call.share(parts, [source.nbytes] * world_size, _reducing(combine, out))


def reduce_scatter(
    call: Call, sources: Sequence[torch.Tensor], out: torch.Tensor, combine: Combine
) -> None:
    """Reduces into `out` what all ranks have for this one; sources[r] is for rank r."""
    sizes = [out.nbytes] * call.transport.world_size
    call.share(sources, sizes, _reducing(combine, out))


def broadcast(call: Call, tensor: torch.Tensor, root: int) -> None:
    """Gives the root's tensor to all others, in place."""
    rank, world_size = call.transport.rank, call.transport.world_size
    sizes = [0] * world_size
    if rank == root:
        call.share([None if r == root else tensor for r in range(world_size)], sizes, _ignore)
        return
    sizes[root] = tensor.nbytes
    outputs: list[torch.Tensor | None] = [None] * world_size
    outputs[root] = tensor
    call.share([None] * world_size, sizes, _copying(outputs))


def all_gather(call: Call, source: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    """Gives each rank's tensor to all; outputs[rank] may be the source itself."""
    world_size = call.transport.world_size
    call.share([source] * world_size, [out.nbytes for out in outputs], _copying(outputs))


def gather(
    call: Call, source: torch.Tensor, outputs: Sequence[torch.Tensor] | None, root: int
) -> None:
    """Gives each rank's tensor to the root."""
    world_size = call.transport.world_size
    parts: list[torch.Tensor | None] = [None] * world_size
    parts[root] = source
    if outputs is None:
        call.share(parts, [0] * world_size, _ignore)
    else:
        call.share(parts, [out.nbytes for out in outputs], _copying(outputs))


def scatter(
    call: Call, sources: Sequence[torch.Tensor] | None, out: torch.Tensor, root: int
) -> None:
    """Gives each rank its tensor of the root's."""
    world_size = call.transport.world_size
    outputs: list[torch.Tensor | None] = [None] * world_size
    outputs[root] = out
    sizes = [out.nbytes if rank == root else 0 for rank in range(world_size)]
    call.share([None] * world_size if sources is None else sources, sizes, _copying(outputs))


def all_to_all(
    call: Call, sources: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> None:
    """Gives sources[r] to rank r; outputs[r] comes from it."""
    call.share(sources, [out.nbytes for out in outputs], _copying(outputs))


def cut(length: int, itemsize: int, parts: int) -> list[tuple[int, int]]:
    """Borders of so many about equal runs of [0, length); each starts on a cache line."""
    step = max(1, 64 // itemsize)
    lines = -(-length // step)
    marks = [min(length, lines * part // parts * step) for part in range(parts + 1)]
    return list(itertools.pairwise(marks))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat tensor's bytes, uint8 (bytes,), in place."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def _each(
    parts: Sequence[torch.Tensor | None], change: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Changes tensors; one that is there several times remains one."""
    before: torch.Tensor | None = None
    changed: list[torch.Tensor | None] = []
    after: torch.Tensor | None = None
    for part in parts:
        if part is not before:
            before, after = part, None if part is None else change(part)
        changed.append(after)
    return changed


def _ignore(views: Views, start: int, stop: int) -> None:
    pass


def _reducing(combine: Combine, out: torch.Tensor) -> Read:
    """Reduces into `out` as it comes."""
    dtype, itemsize, num_bytes = out.dtype, out.itemsize, out.nbytes

    def read(views: Views, start: int, stop: int) -> None:
        parts = [view.view(dtype) for view in views if view is not None]
        whole = stop - start == num_bytes
        combine.combine(parts, out if whole else out[start // itemsize : stop // itemsize])

    return read


def _copying(outputs: Sequence[torch.Tensor | None]) -> Read:
    """Copies what comes to where it belongs."""
    into = _each(outputs, as_bytes)

    def read(views: Views, start: int, stop: int) -> None:
        for view, out in zip(views, into, strict=True):
            if view is not None and out is not None and len(view):
                place = out[start : start + len(view)]
                if place.data_ptr() != view.data_ptr():
                    place.copy_(view)

    return read
