"""The groups in which a rank of a mesh exchanges: one for each line that it lies on.

Where ranks are threads of one process the groups are loopbacks (`in_this_process`); where they are
processes, the ranks of a line meet in a store of torch.distributed (`connected`), or are a mesh of
torch's own on the backend "penstock" (`of_mesh`). Each group runs what it is given in the order in
which it is given, and does not wait for the others.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import PrefixStore

from penstock.errors import TransportError, UserError
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.exchange.loopback import loopback
from penstock.plan.layout import coordinates_of, everyone, line, rank_of


class Work(Protocol):
    """What was begun."""

    def wait(self) -> None:
        """Returns when it is done; raises TransportError when it cannot be, or is late."""
        ...


class Groups(Protocol):
    """What a program exchanges through."""

    def line(self, axis: int) -> Communicator:
        """Of the ranks that differ along an axis alone, in their order."""
        ...

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> Work:
        """Begins sending to a rank of the mesh; what has one tag arrives in order."""
        ...

    def receive(self, tensor: torch.Tensor, peer: int, tag: int) -> Work:
        """Begins receiving from a rank of the mesh, into a contiguous tensor."""
        ...

    def close(self) -> None:
        """Leaves; waits for nobody."""
        ...


class Connected:
    """Groups of communicators.

    Arguments:
        lines: by axis.
        whole: of all ranks, for `send` and `receive`; None where nothing is sent.
    """

    def __init__(self, lines: Sequence[Communicator], whole: Communicator | None = None) -> None:
        self._lines, self._whole = tuple(lines), whole

    def line(self, axis: int) -> Communicator:
        return self._lines[axis]

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> Work:
        return self._all().send(tensor, peer, tag)

    def receive(self, tensor: torch.Tensor, peer: int, tag: int) -> Work:
        return self._all().receive(tensor, peer, tag)

    def close(self) -> None:
        for group in self._lines:
            group.close()
        if self._whole is not None:
            self._whole.close()

    def _all(self) -> Communicator:
        if self._whole is None:
            raise UserError(
                "a program sends from rank to rank, and there is no group of all ranks",
                hint="connected(..., sends=True)",
            )
        return self._whole


def connected(
    store: Any,
    rank: int,
    sizes: Sequence[int],
    *,
    timeout_s: float,
    sends: bool = False,
    share_memory: bool = True,
) -> Connected:
    """Joins the groups of a rank whose mesh meets in a store of torch.distributed.

    Arguments:
        sizes: of the mesh.
        timeout_s: how long to wait for the others, now and in collectives.
        sends: whether there will be `send` and `receive`.
        share_memory: whether ranks of one host meet in memory.

    Raises:
        TransportError: not all ranks came before the deadline.
    """
    join = partial(connect, timeout_s=timeout_s, share_memory=share_memory)
    at = coordinates_of(sizes, rank)
    groups: list[Communicator] = []
    try:
        for axis, parts in enumerate(sizes):
            ranks = line(sizes, axis, at)
            own = PrefixStore(f"axis {axis} from {ranks[0]}", store)
            groups.append(join(own, at[axis], parts))
        whole = join(PrefixStore("whole", store), rank, math.prod(sizes)) if sends else None
    except BaseException:
        for group in groups:
            group.close()
        raise
    return Connected(groups, whole)


def of_mesh(mesh: Any) -> Connected:
    """The groups of a `torch.distributed.DeviceMesh` whose backend is "penstock".

    Raises:
        UserError: it is of another backend.
    """
    lines = []
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        if not isinstance(getattr(group, "communicator", None), Communicator):
            raise UserError(
                f"axis {axis} of the device mesh is of backend {type(group).__name__}",
                hint='torch.distributed.init_process_group("penstock") before the mesh is made',
            )
        lines.append(group.communicator)
    return Connected(lines)


class Threads:
    """Groups of a rank that is a thread: see `in_this_process`."""

    def __init__(
        self,
        rank: int,
        lines: Sequence[Communicator],
        post: _Post,
        timeout_s: float,
    ) -> None:
        self._rank, self._lines, self._post = rank, tuple(lines), post
        self._timeout_s = timeout_s

    def line(self, axis: int) -> Communicator:
        return self._lines[axis]

    def send(self, tensor: torch.Tensor, peer: int, tag: int) -> Work:
        self._post.box(self._rank, peer, tag).put(tensor.clone())
        return _Done()

    def receive(self, tensor: torch.Tensor, peer: int, tag: int) -> Work:
        box = self._post.box(peer, self._rank, tag)
        what = f"rank {self._rank}: receive from rank {peer}, tag {tag}"
        return _Letter(what, tensor, box, self._timeout_s)

    def abort(self, reason: str) -> None:
        """Ends all groups on all ranks: who waits in them fails."""
        for group in self._lines:
            group.abort(reason)
        self._post.fail()

    def close(self) -> None:
        for group in self._lines:
            group.close()


def in_this_process(sizes: Sequence[int], *, timeout_s: float = 60.0) -> list[Threads]:
    """The groups of all ranks of a mesh, each to be used by a thread of its own.

    Arguments:
        timeout_s: how long to wait for another rank.
    """
    ends: dict[tuple[int, int], Communicator] = {}
    for axis, parts in enumerate(sizes):
        for at in everyone(sizes):
            if at[axis] == 0:
                members = zip(line(sizes, axis, at), loopback(parts), strict=True)
                for rank, end in members:
                    ends[rank, axis] = Communicator(end, timeout_s=timeout_s)
    post = _Post()
    ranks = [rank_of(sizes, at) for at in everyone(sizes)]
    return [
        Threads(rank, [ends[rank, axis] for axis in range(len(sizes))], post, timeout_s)
        for rank in ranks
    ]


_Box = queue.SimpleQueue["torch.Tensor | None"]


class _Post:
    """What is on its way, by sender, receiver and tag."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[int, int, int], _Box] = {}
        self._lock = threading.Lock()
        self._failed = False

    def box(self, sender: int, receiver: int, tag: int) -> _Box:
        """In it is None where no more will come."""
        with self._lock:
            box = self._boxes.setdefault((sender, receiver, tag), queue.SimpleQueue())
            if self._failed:
                box.put(None)
        return box

    def fail(self) -> None:
        """No more will come."""
        with self._lock:
            self._failed = True
            for box in self._boxes.values():
                box.put(None)


class _Done:
    def wait(self) -> None:
        pass


class _Letter:
    """What is to be received; taken out of its box when it is waited for."""

    def __init__(
        self,
        what: str,
        into: torch.Tensor,
        box: _Box,
        timeout_s: float,
    ) -> None:
        self._what, self._into, self._box = what, into, box
        self._timeout_s = timeout_s

    def wait(self) -> None:
        began = time.monotonic()
        try:
            tensor = self._box.get(timeout=self._timeout_s)
        except queue.Empty:
            late = f"{self._what}: after {time.monotonic() - began:.0f} s nothing had come"
            raise TransportError(late) from None
        if tensor is None:
            self._box.put(None)
            raise TransportError(f"{self._what}: another rank has failed")
        if tensor.shape != self._into.shape or tensor.dtype != self._into.dtype:
            sent, expected = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, self._into))
            raise TransportError(f"{self._what}: {sent} was sent, expected {expected}")
        self._into.copy_(tensor)
