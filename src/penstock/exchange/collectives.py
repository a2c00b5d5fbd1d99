"""The collectives, each made of `Transport.share`.

Tensors here are flat, contiguous and on the CPU; `communicator` sees to that. What is reduced is
reduced along the fixed tree over ranks: from all ranks' parts at once, or step by step where the
group has a table of topologies that says so (see `Call.topology`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from penstock.exchange import hierarchy, serial
from penstock.exchange.cost import Sums, Table
from penstock.exchange.mixed import MixedTransport
from penstock.exchange.operation import Operation, Turn
from penstock.exchange.reduction import Combine, Reduction
from penstock.exchange.schedules import Buffer, carry_out, cut, stepwise
from penstock.exchange.shm import ShmTransport
from penstock.exchange.topology import at_once, schedule
from penstock.exchange.transport import Read, Transport, Views, ignore

ONE_PHASE_BYTES = 64 << 10
"""Up to here every rank reduces everything itself; above, each a part, if there are more than two.
[measured: AMD EPYC, 4 ranks on 2 cores, 2026-11]"""


_BYTE = torch.zeros(1, dtype=torch.uint8)
_AT_ONCE = "all to all"


class Call(Turn):
    """One collective under way: its turn, and what carries it out."""

    __slots__ = ("table", "transport")

    def __init__(
        self,
        transport: Transport,
        sequence: int,
        operation: Operation,
        timeout_s: float,
        table: Table | None = None,
    ) -> None:
        super().__init__(sequence, operation, timeout_s)
        self.transport, self.table = transport, table

    def share(
        self,
        parts: Sequence[torch.Tensor | None],
        sizes: Sequence[int],
        read: Callable[[Views, int, int], None],
    ) -> None:
        """`Transport.share` of tensors of any dtype."""
        self.transport.share(self, _each(parts, as_bytes), sizes, read)

    def topology(self, collective: str, num_bytes: int, otherwise: str, sums: Sums = "any") -> str:
        """The table's choice for a buffer of so many bytes; `otherwise` where there is no table."""
        if self.table is None:
            return otherwise
        return self.table.topology(collective, num_bytes, sums=sums)

    def follow(
        self,
        collective: str,
        topology: str,
        buffer: Buffer = (),
        combine: Combine | None = None,
        root: int = 0,
    ) -> None:
        """Carries out a topology step by step; `combine` is of partial sums (`stepwise`)."""
        rank, world_size = self.transport.rank, self.transport.world_size
        hosts = () if self.table is None else self.table.hosts
        steps = schedule(collective, topology, world_size, rank, root=root, hosts=hosts)
        carry_out(steps, self.share, rank, world_size, buffer, combine)


def barrier(call: Call) -> None:
    """Returns when all have come here."""
    if (topology := call.topology("barrier", 0, _AT_ONCE)) != _AT_ONCE:
        call.follow("barrier", topology)
        return
    world_size = call.transport.world_size
    call.share([_BYTE] * world_size, [1] * world_size, ignore)


def all_reduce(
    call: Call, source: torch.Tensor, out: torch.Tensor, combine: Combine, shared: bool = False
) -> None:
    """Reduces the tensors of all ranks for all.

    Arguments:
        source: what this rank brings, (n,).
        out: (n,); may be the source.
        shared: whether the source is read by others where it lies, on all ranks.
    """
    if isinstance(call.transport, MixedTransport) and hierarchy.all_reduce(
        call.transport, call, source, out, combine
    ):
        return
    rank, world_size = call.transport.rank, call.transport.world_size
    topology = _all_reduce_topology(call, out, combine, shared)
    if topology == "gather":
        reduce_to_all(call, source, out, combine)
    elif topology == "direct":
        borders = cut(0, len(out), world_size, out.itemsize)
        pieces = [out[start:stop] for start, stop in borders]
        sources = [source[start:stop] for start, stop in borders]
        _reduce_to_each(call, sources, pieces[rank], combine)
        _give_to_all(call, pieces[rank], pieces)
    else:
        serial.copy(source, out)
        _reduce_along(call, "all_reduce", topology, out, out, combine)


def repeated_all_reduce(
    first: Call, out: torch.Tensor, combine: Combine, shared: bool
) -> Callable[[Call], None]:
    """An all-reduce of one tensor, in place, again and again: what stays the same is done here,
    once. [measured: 2 ranks, 270 KB, in the middle of training steps, AMD EPYC, 2026-11: 110 us
    instead of 175]"""
    transport, topology = first.transport, _all_reduce_topology(first, out, combine, shared)
    if topology != "gather" or not isinstance(transport, ShmTransport):
        return lambda call: all_reduce(call, out, out, combine, shared)
    world_size, other = transport.world_size, 1 if transport.rank == 0 else 0
    parts, sizes = [as_bytes(out)] * world_size, [out.nbytes] * world_size
    known: dict[int, Callable[[], None]] = {}  # a round's slots lie in one of two places

    def read(views: Views, start: int, stop: int) -> None:
        view = views[other]
        assert view is not None
        if (place := view.data_ptr()) not in known:
            if stop - start < out.nbytes:  # in several rounds
                _reducing(combine, out)(views, start, stop)
                return
            typed = [view.view(out.dtype) for view in views if view is not None]
            known[place] = combine.ready(typed, out)
        known[place]()

    return lambda call: transport.share(call, parts, sizes, read)


def reduce_to_all(call: Call, source: torch.Tensor, out: torch.Tensor, combine: Combine) -> None:
    """As `all_reduce`: every rank reads all and reduces all."""
    world_size = call.transport.world_size
    call.share([source] * world_size, [source.nbytes] * world_size, _reducing(combine, out))


def reduce(
    call: Call, source: torch.Tensor, out: torch.Tensor | None, combine: Combine, root: int
) -> None:
    """Reduces the tensors of all ranks into the root's `out`."""
    sums = _sums(combine, source.dtype)
    if (topology := call.topology("reduce", source.nbytes, "star", sums)) != "star":
        # Partial sums go into the root's result, and elsewhere into a copy.
        buffer = torch.empty_like(source) if out is None else out
        serial.copy(source, buffer)
        _reduce_along(call, "reduce", topology, buffer, buffer, combine, root)
        return
    world_size = call.transport.world_size
    parts = _only(root, source, None, world_size)
    if out is None:
        call.share(parts, [0] * world_size, ignore)
    else:
        call.share(parts, [source.nbytes] * world_size, _reducing(combine, out))


def reduce_scatter(
    call: Call, sources: Sequence[torch.Tensor], out: torch.Tensor, combine: Combine
) -> None:
    """Reduces into `out` what all ranks have for this one; sources[r] is for rank r."""
    num_bytes, sums = sum(source.nbytes for source in sources), _sums(combine, out.dtype)
    topology = call.topology("reduce_scatter", num_bytes, "direct", sums)
    if topology == "direct":
        _reduce_to_each(call, sources, out, combine)
        return
    pieces = [source.clone() for source in sources]  # for partial sums
    own = pieces[call.transport.rank]
    _reduce_along(call, "reduce_scatter", topology, pieces, own, combine)
    serial.copy(own, out)


def broadcast(call: Call, tensor: torch.Tensor, root: int) -> None:
    """Gives the root's tensor to all others, in place."""
    if (topology := call.topology("broadcast", tensor.nbytes, "star")) != "star":
        call.follow("broadcast", topology, tensor, root=root)
        return
    world_size = call.transport.world_size
    if call.transport.rank == root:
        call.share(_only(root, None, tensor, world_size), [0] * world_size, ignore)
    else:
        sizes = _only(root, tensor.nbytes, 0, world_size)
        call.share([None] * world_size, sizes, _copying(_only(root, tensor, None, world_size)))


def all_gather(call: Call, source: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    """Gives each rank's tensor to all; outputs[rank] may be the source itself."""
    topology = call.topology("all_gather", sum(out.nbytes for out in outputs), "direct")
    if topology == "direct":
        _give_to_all(call, source, outputs)
        return
    serial.copy(source, outputs[call.transport.rank])
    call.follow("all_gather", topology, outputs)


def gather(
    call: Call, source: torch.Tensor, outputs: Sequence[torch.Tensor] | None, root: int
) -> None:
    """Gives each rank's tensor to the root."""
    world_size = call.transport.world_size
    parts = _only(root, source, None, world_size)
    if outputs is None:
        call.share(parts, [0] * world_size, ignore)
    else:
        call.share(parts, [out.nbytes for out in outputs], _copying(outputs))


def scatter(
    call: Call, sources: Sequence[torch.Tensor] | None, out: torch.Tensor, root: int
) -> None:
    """Gives each rank its tensor of the root's."""
    world_size = call.transport.world_size
    sizes, outputs = _only(root, out.nbytes, 0, world_size), _only(root, out, None, world_size)
    call.share([None] * world_size if sources is None else sources, sizes, _copying(outputs))


def all_to_all(
    call: Call, sources: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> None:
    """Gives sources[r] to rank r; outputs[r] comes from it."""
    call.share(sources, [out.nbytes for out in outputs], _copying(outputs))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A flat tensor's bytes, uint8 (bytes,), in place."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def _sums(combine: Combine, dtype: torch.dtype) -> Sums:
    """What a reduction asks of a topology. Floats keep the fixed tree's bits whatever way they go,
    so that the table, which is of measured times, decides on nothing but time."""
    if not isinstance(combine, Reduction):  # over shards, which only all parts together tell
        return "once"
    if combine.op in ("min", "max") or not (dtype.is_floating_point or dtype.is_complex):
        return "any"
    return "once" if dtype.itemsize == 2 else "exact"


def _all_reduce_topology(call: Call, out: torch.Tensor, combine: Combine, shared: bool) -> str:
    two_share_nothing = call.transport.world_size == 2 and not shared
    one_phase = out.nbytes <= ONE_PHASE_BYTES or two_share_nothing
    topology = "gather" if one_phase else "direct"
    if shared:
        return topology
    return call.topology("all_reduce", out.nbytes, topology, _sums(combine, out.dtype))


def _reduce_along(
    call: Call,
    collective: str,
    topology: str,
    buffer: Buffer,
    out: torch.Tensor,
    combine: Combine,
    root: int = 0,
) -> None:
    """Reduces step by step; `out` is the part of the buffer in which the result will be."""
    divides, world_size = False, call.transport.world_size
    if not at_once(topology, world_size):
        combine, divides = stepwise(combine)
    call.follow(collective, topology, buffer, combine, root)
    if divides:
        serial.divide(out, world_size)


def _reduce_to_each(
    call: Call, sources: Sequence[torch.Tensor], out: torch.Tensor, combine: Combine
) -> None:
    sizes = [out.nbytes] * call.transport.world_size
    call.share(sources, sizes, _reducing(combine, out))


def _give_to_all(call: Call, source: torch.Tensor, outputs: Sequence[torch.Tensor]) -> None:
    world_size = call.transport.world_size
    call.share([source] * world_size, [out.nbytes for out in outputs], _copying(outputs))


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


def _only(rank: int, one: Any, others: Any, world_size: int) -> list[Any]:
    """By rank: this for one, that for all others."""
    return [one if r == rank else others for r in range(world_size)]


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
            if view is not None and out is not None:
                serial.copy(view, out[start : start + len(view)])

    return read
