"""One rank's end of a group: collectives in the order in which they are issued.

What the caller waits for at once runs in the caller, as long as nothing else is under way; the rest
runs in a thread of the communicator, one after the other. After the first error nothing runs any
more: every collective under way or issued later fails by the same error, and a new group has to be
formed.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from penstock.errors import TransportError, UserError
from penstock.exchange import collectives
from penstock.exchange.collectives import Call
from penstock.exchange.mailbox import Letter, Mailbox
from penstock.exchange.network import Network
from penstock.exchange.operation import Operation
from penstock.exchange.reduction import SUM, Reduction, Total
from penstock.exchange.transport import Transport, aborted
from penstock.exchange.work import DONE, ObservedWork, Observer, Work

Run = Callable[[Call], None]
_Item = tuple[Run, Call, Work, int]


class Communicator:
    """One rank's end.

    All ranks issue the same collectives in the same order, with tensors of the same dtype and shape
    where nothing else is said. Tensors are on the CPU, of any strides, and stay untouched until the
    work is done; `sync=True` is for who waits at once anyway.

    Arguments:
        transport: moves the bytes; closed with the communicator.
        mailbox: for `send` and `receive`; None where there are none.
        timeout_s: how long a collective may wait for others.
        network: what the group knows of its links, and the topologies that it takes for them; None
            where everything goes to everyone at once.

    Raises (all collectives, when they are issued):
        UserError: a tensor or reduction that cannot be.
        TransportError: the group has failed before.
    """

    def __init__(
        self,
        transport: Transport,
        mailbox: Mailbox | None = None,
        *,
        timeout_s: float,
        network: Network | None = None,
    ) -> None:
        self.rank = transport.rank
        self.world_size = transport.world_size
        self.hosts = transport.hosts
        self.timeout_s = timeout_s
        self.network = network
        self.through = transport.name
        """What moves the bytes: "loopback", "memory", "tcp"."""
        self.observer: Observer | None = None
        """Hears of collectives issued from now on; not of `send` and `receive`."""
        self._transport, self._mailbox = transport, mailbox
        self._turn = threading.Lock()
        self._sequence, self._unfinished = 0, 0
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._stop = weakref.finalize(self, self._queue.put, None)  # the thread ends
        self._thread: threading.Thread | None = None
        self._error: TransportError | None = None
        self._forked = False
        _LIVE.add(self)

    def all_reduce(
        self, tensor: torch.Tensor, reduction: Reduction | Total = SUM, *, sync: bool = False
    ) -> Work:
        """Reduces the tensors of all ranks for all, in place."""
        reduction.check(tensor.dtype)
        flat = _flat(tensor, written=True)

        def run(call: Call) -> None:
            source = reduction.premultiplied(flat)
            collectives.all_reduce(call, source, flat, reduction, shared)
            _put_back(tensor, flat)

        shared = self._transport.holds(flat)
        return self._issue(self._all_reduce_of(tensor, reduction, shared), run, sync)

    def repeated_all_reduce(
        self, tensor: torch.Tensor, reduction: Reduction | Total = SUM
    ) -> Callable[[bool], Work]:
        """What reduces this tensor, (n,), contiguous, whenever it is called (with `sync`), as
        `all_reduce` would: for who does so again and again."""
        reduction.check(tensor.dtype)
        shared, ready = self._transport.holds(tensor), None

        def run(call: Call) -> None:
            nonlocal ready
            if ready is None:
                ready = collectives.repeated_all_reduce(call, tensor, reduction, shared)
            ready(call)

        return partial(self._issue, self._all_reduce_of(tensor, reduction, shared), run)

    def all_reduce_s(self, num_bytes: int) -> float | None:
        """About how long an all-reduce takes between hosts, from what was measured; None where
        there is one host, or nothing was."""
        if self.network is None or len(self.network.table.hosts) == 1:
            return None
        hosts, far = len(self.network.table.hosts), self.network.links.far
        return far.latency_s + 2 * (hosts - 1) / hosts * num_bytes / far.bytes_per_s

    def reduce(
        self, tensor: torch.Tensor, reduction: Reduction, root: int, *, sync: bool = False
    ) -> Work:
        """Reduces the tensors of all ranks into the root's; the others keep theirs."""
        reduction.check(tensor.dtype)
        here = self._is_root(root)
        flat = _flat(tensor, written=here)

        def run(call: Call) -> None:
            source = reduction.premultiplied(flat)
            collectives.reduce(call, source, flat if here else None, reduction, root)
            if here:
                _put_back(tensor, flat)

        return self._issue(_named("reduce", tensor, reduction.op, root), run, sync)

    def broadcast(self, tensor: torch.Tensor, root: int, *, sync: bool = False) -> Work:
        """Gives the root's tensor to all others, in place."""
        here = self._is_root(root)
        flat = _flat(tensor, written=not here)

        def run(call: Call) -> None:
            collectives.broadcast(call, flat, root)
            if not here:
                _put_back(tensor, flat)

        return self._issue(_named("broadcast", tensor, "", root), run, sync)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor, *, sync: bool = False) -> Work:
        """Gives each rank's input to all: output (world_size, *input.shape)."""
        return self.gather_all(list(output.unbind()), input, sync=sync)

    def gather_all(
        self, outputs: Sequence[torch.Tensor], input: torch.Tensor, *, sync: bool = False
    ) -> Work:
        """Gives each rank's input to all; outputs[r] is as large as the input of rank r."""
        self._one_each(outputs)
        _same_dtype([*outputs, input])
        flats = [_flat(output, written=True) for output in outputs]
        source = _apart(_flat(input), flats, self.rank)

        def run(call: Call) -> None:
            collectives.all_gather(call, source, flats)
            for output, flat in zip(outputs, flats, strict=True):
                _put_back(output, flat)

        return self._issue(_list_named("all_gather", outputs), run, sync)

    def gather(
        self,
        outputs: Sequence[torch.Tensor] | None,
        input: torch.Tensor,
        root: int,
        *,
        sync: bool = False,
    ) -> Work:
        """Gives each rank's input to the root, which alone has outputs."""
        self._is_root(root, outputs)
        _same_dtype([*(outputs or ()), input])
        flats = None if outputs is None else [_flat(output, written=True) for output in outputs]
        source = _apart(_flat(input), flats or (), self.rank)

        def run(call: Call) -> None:
            collectives.gather(call, source, flats, root)
            for output, flat in zip(outputs or (), flats or (), strict=True):
                _put_back(output, flat)

        return self._issue(_operation("gather", f"{_dtype(input)} to rank {root}"), run, sync)

    def scatter(
        self,
        output: torch.Tensor,
        inputs: Sequence[torch.Tensor] | None,
        root: int,
        *,
        sync: bool = False,
    ) -> Work:
        """Gives each rank its output of the root's inputs; the root alone has inputs."""
        self._is_root(root, inputs)
        _same_dtype([*(inputs or ()), output])
        flat = _flat(output, written=True)
        flats = None if inputs is None else [_flat(input) for input in inputs]

        def run(call: Call) -> None:
            collectives.scatter(call, flats, flat, root)
            _put_back(output, flat)

        return self._issue(_operation("scatter", f"{_dtype(output)} from rank {root}"), run, sync)

    def reduce_scatter(
        self,
        output: torch.Tensor,
        inputs: Sequence[torch.Tensor],
        reduction: Reduction = SUM,
        *,
        sync: bool = False,
    ) -> Work:
        """Reduces into each rank's output what all have for it: inputs[r] is for rank r."""
        self._one_each(inputs)
        reduction.check(output.dtype)
        _same_dtype([*inputs, output])
        flat = _flat(output, written=True)
        flats = [_flat(input) for input in inputs]

        def run(call: Call) -> None:
            sources = [reduction.premultiplied(flat) for flat in flats]
            collectives.reduce_scatter(call, sources, flat, reduction)
            _put_back(output, flat)

        return self._issue(_list_named("reduce_scatter", inputs, reduction.op), run, sync)

    def exchange(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        *,
        sync: bool = False,
    ) -> Work:
        """Gives inputs[r] to rank r; outputs[r] comes from it, and is as large as its input."""
        self._one_each(outputs)
        self._one_each(inputs)
        _same_dtype([*outputs, *inputs])
        flats = [_flat(output, written=True) for output in outputs]
        sources = [_flat(input) for input in inputs]

        def run(call: Call) -> None:
            collectives.all_to_all(call, sources, flats)
            for output, flat in zip(outputs, flats, strict=True):
                _put_back(output, flat)

        return self._issue(_operation("all_to_all", _dtype(inputs[0])), run, sync)

    def barrier(self, *, sync: bool = True, timeout_s: float | None = None) -> Work:
        """Done when all have come."""
        return self._issue(_operation("barrier", ""), collectives.barrier, sync, timeout_s)

    def send(self, tensor: torch.Tensor, peer: int, tag: int = 0) -> Work:
        """Sends to one rank; what is sent with one tag arrives in order."""
        self._in_group(peer)
        return self._post(self._letters().send(peer, tag, collectives.as_bytes(_flat(tensor))))

    def receive(self, tensor: torch.Tensor, peer: int | None, tag: int = 0) -> Work:
        """Receives from one rank, or (None) from whichever sends first."""
        if peer is not None:
            self._in_group(peer)
        flat = _flat(tensor, written=True)
        letter = self._letters().receive(peer, tag, collectives.as_bytes(flat))
        return self._post(letter, lambda: _put_back(tensor, flat))

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory, zeros, uint8 (num_bytes,): what lies in it is reduced in place by the ranks of
        this host. All of them give such tensors to a collective, or none. Ordinary memory where
        they share none. Collective; ranks need not take as much as each other."""
        found: list[torch.Tensor | None] = []

        def run(call: Call) -> None:
            found.append(call.transport.allocate(num_bytes, call))

        self._issue(_operation("allocate", ""), run, True)
        memory = found[0]
        if memory is None:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")
        return memory

    def abort(self, reason: str) -> None:
        """Ends the group on all ranks: what is under way fails within 100 ms. From any thread."""
        if self._error is None:
            self._error = aborted(f"rank {self.rank}", reason)
        self._transport.abort(reason)

    def close(self) -> None:
        """Leaves; waits for nobody."""
        if self._forked:
            return
        if self._unfinished and self._error is None:
            self.abort(f"rank {self.rank} has left with collectives under way")
        if self._error is None:
            self._error = TransportError(f"rank {self.rank} has left the group")
        self._stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        if self._mailbox is not None:
            self._mailbox.close()
        self._transport.close()

    def _all_reduce_of(
        self, tensor: torch.Tensor, reduction: Reduction | Total, shared: bool
    ) -> Operation:
        kind = "all_reduce in shared memory" if shared else "all_reduce"
        return _named(kind, tensor, reduction.op)

    def _issue(
        self, operation: Operation, run: Run, sync: bool, timeout_s: float | None = None
    ) -> Work:
        observer = self.observer
        issued_ns = 0 if observer is None else time.perf_counter_ns()
        with self._turn:
            if self._error is not None:
                raise self._error
            self._sequence += 1
            table = None if self.network is None else self.network.table
            wait_s = timeout_s or self.timeout_s
            call = Call(self._transport, self._sequence, operation, wait_s, table)
            if sync and not self._unfinished:
                if (error := self._run(run, call, issued_ns)) is not None:
                    raise error
                return DONE
            work = Work(call.what) if observer is None else ObservedWork(observer, call)
            self._unfinished += 1
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_serve,
                    args=(self._queue, weakref.ref(self)),
                    name="penstock-group",
                    daemon=True,
                )
                self._thread.start()
            self._queue.put((run, call, work, issued_ns))
        if threading.current_thread() is self._thread:
            # A callback, whose thread is the one that runs what is issued: nobody else will.
            while not work.done() and (item := self._queue.get()) is not None:
                self.run_next(*item)
        elif sync:
            work.wait()
        return work

    def run_next(self, run: Run, call: Call, work: Work, issued_ns: int) -> None:
        """Runs what is next in the queue, in the communicator's thread."""
        error = self._error
        if error is None:
            with torch.inference_mode():  # which may write to all tensors
                error = self._run(run, call, issued_ns)
        with self._turn:
            self._unfinished -= 1
        work.end(error)

    def _forget(self) -> None:
        """In a forked child: the group is the parent's."""
        self._forked, self._thread = True, None
        self._turn = threading.Lock()
        self._error = TransportError(
            "a forked process has no part in the group of the process that it was forked from",
            hint="form a group in the child, or start it by spawn",
        )

    def _at_exit(self) -> None:
        """A thread that is in the middle of a collective must not outlive the interpreter."""
        if self._unfinished and not self._forked:
            self.close()

    def _run(self, run: Run, call: Call, issued_ns: int) -> TransportError | None:
        """Runs a collective; after an error, nothing runs any more."""
        observer = self.observer
        began_ns = 0 if observer is None else time.perf_counter_ns()
        try:
            run(call)
        except TransportError as error:
            self._error = error
            self._transport.abort(error.message)  # before the others hear that this rank has left
        except BaseException as error:  # Ctrl-C, too, leaves the ranks out of step
            self._error = TransportError(f"rank {self.rank}: {call.what}: {error!r}")
            self._error.__cause__ = error
            self._transport.abort(self._error.message)
            if not isinstance(error, Exception):
                raise
        if observer is not None:
            ended_ns = time.perf_counter_ns()
            observer.ran(call.operation, call.sequence, issued_ns or began_ns, began_ns, ended_ns)
        return self._error

    def _is_root(self, root: int, only_there: object = ...) -> bool:
        """Whether this rank is the root; UserError where there is none, or a list is misplaced."""
        self._in_group(root, "root")
        here = root == self.rank
        if only_there is not ... and (only_there is not None) != here:
            where = "missing at the root" if here else f"given at rank {self.rank}"
            raise UserError(f"a list of tensors is {where}; only the root, rank {root}, has one")
        if isinstance(only_there, (list, tuple)):
            self._one_each(only_there)
        return here

    def _one_each(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != self.world_size:
            raise UserError(
                f"{len(tensors)} tensors: expected one for each of {self.world_size} ranks"
            )

    def _in_group(self, rank: int, name: str = "rank") -> None:
        if not 0 <= rank < self.world_size:
            raise UserError(f"{name} {rank}: expected a rank from 0 to {self.world_size - 1}")

    def _letters(self) -> Mailbox:
        if self._mailbox is None:
            raise UserError("send and receive: this group has no connections between its ranks")
        return self._mailbox

    def _post(self, letter: Letter, then: Callable[[], None] | None = None) -> Work:
        """A letter's work."""
        work = Work(letter.what)

        def ended(error: TransportError | None) -> None:
            if error is None and then is not None:
                try:
                    then()
                except Exception as failed:
                    error = TransportError(f"{letter.what}: {failed!r}")
            work.source = letter.source
            work.end(error)

        letter.when_done(ended)
        return work


_LIVE: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _serve(items: queue.SimpleQueue[_Item | None], owner: weakref.ref[Communicator]) -> None:
    """The thread: one collective after the other. It does not keep the communicator alive."""
    while (item := items.get()) is not None:
        communicator = owner()
        if communicator is None:
            return
        communicator.run_next(*item)
        del communicator, item


def _forget_all() -> None:
    for communicator in list(_LIVE):
        communicator._forget()


def _close_all() -> None:
    for communicator in list(_LIVE):
        communicator._at_exit()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)


_operation = lru_cache(maxsize=1024)(Operation)


@lru_cache(maxsize=1024)
def _known(
    kind: str, op: str, dtype: torch.dtype, shape: torch.Size, root: int | None
) -> Operation:
    what = f"{op} {_name(dtype)} {tuple(shape)}".strip()
    return Operation(kind, what if root is None else f"{what}, root {root}")


def _named(kind: str, tensor: torch.Tensor, op: str, root: int | None = None) -> Operation:
    return _known(kind, op, tensor.dtype, tensor.shape, root)


def _list_named(kind: str, tensors: Sequence[torch.Tensor], op: str = "") -> Operation:
    """Of a list that is the same on all ranks."""
    lengths = tuple(tensor.numel() for tensor in tensors)
    same = len(set(lengths)) == 1
    what = f"{op} {_dtype(tensors[0])} {lengths[0] if same else list(lengths)} each".strip()
    return _operation(kind, what)


def _dtype(tensor: torch.Tensor) -> str:
    return _name(tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same_dtype(tensors: Sequence[torch.Tensor]) -> None:
    """UserError where bytes would be taken for those of another dtype."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise UserError(
                f"tensors of {_name(dtype)} and of {_name(tensor.dtype)} in one collective",
                hint="inputs and outputs must have one dtype",
            )


def _flat(tensor: torch.Tensor, written: bool = False) -> torch.Tensor:
    """The tensor's elements, (n,), contiguous: a view where it can be, else a copy.

    Arguments:
        written: whether a result goes there.
    """
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        if tensor.requires_grad:
            tensor = tensor.detach()
        flat = tensor if tensor.dim() == 1 else tensor.view(-1)
        # One element counts as contiguous in whatever stride, and has no bytes to be seen as then.
        return flat if flat.stride(0) == 1 else flat.as_strided(flat.shape, (1,))
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise UserError(
            f"a {tensor.layout} tensor on {tensor.device}: this group moves dense CPU tensors",
            hint="tensor.cpu(); for GPUs a group of backend cpu:penstock,cuda:nccl",
        )
    if written and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise UserError(
            f"a result of shape {tuple(tensor.shape)} and strides {tensor.stride()}: several of "
            "its elements are one",
            hint="tensor.contiguous()",
        )
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)


def _apart(source: torch.Tensor, outputs: Sequence[torch.Tensor], rank: int) -> torch.Tensor:
    """The source, or a copy of it where what comes from another rank would overwrite it."""
    start, stop = source.data_ptr(), source.data_ptr() + source.nbytes
    for other, output in enumerate(outputs):
        first = output.data_ptr()
        if other != rank and first < stop and start < first + output.nbytes:
            return source.clone()
    return source


def _put_back(tensor: torch.Tensor, flat: torch.Tensor) -> None:
    """What was written into a copy goes where it belongs."""
    if tensor.data_ptr() != flat.data_ptr():
        tensor.detach().copy_(flat.view(tensor.shape))
