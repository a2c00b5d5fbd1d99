"""One rank's end of a group: collectives in the order in which they are issued.

What the caller waits for at once runs in the caller, as long as nothing else is under way; the rest
runs in a thread of the communicator, one after the other. After the first error nothing runs any
more: every collective under way or issued later fails by the same error, and a new group has to be
formed.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import torch

from penstock.errors import TransportError, UserError
from penstock.exchange import collectives
from penstock.exchange.collectives import Call
from penstock.exchange.mailbox import Letter, Mailbox
from penstock.exchange.network import Network
from penstock.exchange.operation import Operation
from penstock.exchange.reduction import SUM, Reduction, Total
from penstock.exchange.transport import Transport, aborted

Ended = Callable[[TransportError | None], None]


class Work:
    """A collective under way."""

    source: int | None = None
    """The rank that a received message came from."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._error: TransportError | None = None
        self._calls: list[Ended] = []

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when it is done; raises TransportError when it has failed, or is not done in time
        (it goes on then: its own deadline ends it)."""
        if not self._done.wait(timeout_s):
            raise TransportError(f"not done after {timeout_s:g} s")
        if self._error is not None:
            raise self._error

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def when_done(self, call: Ended) -> None:
        """Calls with the error, or None, when it has ended: once, from any thread, or here."""
        with self._lock:
            if not self._done.is_set():
                self._calls.append(call)
                return
        call(self._error)

    def end(self, error: TransportError | None) -> None:
        """It has ended."""
        with self._lock:
            self._error = error
            self._done.set()
        for call in self._calls:
            call(error)


class _Done(Work):
    """What has run in the caller, without an error."""

    def __init__(self) -> None:
        super().__init__()
        self._done.set()


DONE = _Done()


class Observer(Protocol):
    """Hears of a communicator's collectives; times in ns, from `time.perf_counter_ns`."""

    def ran(
        self, operation: Operation, sequence: int, issued_ns: int, began_ns: int, ended_ns: int
    ) -> None:
        """A collective has run, well or not, in the thread that calls this."""
        ...

    def waited(self, operation: Operation, sequence: int, began_ns: int, ended_ns: int) -> None:
        """The thread that calls this has waited for a collective."""
        ...


class _Observed(Work):
    """A collective under way, of whose waits an observer hears."""

    def __init__(self, observer: Observer, call: Call) -> None:
        super().__init__()
        self._observer, self._call = observer, call

    def wait(self, timeout_s: float | None = None) -> None:
        began_ns = time.perf_counter_ns()
        try:
            super().wait(timeout_s)
        finally:
            ended_ns, call = time.perf_counter_ns(), self._call
            self._observer.waited(call.operation, call.sequence, began_ns, ended_ns)


Run = Callable[[Call], None]


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
        self._queue: queue.SimpleQueue[tuple[Run, Call, Work, int] | None] | None = None
        self._thread: threading.Thread | None = None
        self._error: TransportError | None = None

    def all_reduce(
        self, tensor: torch.Tensor, reduction: Reduction | Total = SUM, *, sync: bool = False
    ) -> Work:
        """Reduces the tensors of all ranks for all, in place."""
        reduction.check(tensor.dtype)

        def run(call: Call) -> None:
            flat = _flat(tensor)
            source = reduction.premultiplied(flat)
            collectives.all_reduce(call, source, flat, reduction, shared)
            _put_back(tensor, flat)

        shared = self._transport.holds(tensor)
        kind = "all_reduce in shared memory" if shared else "all_reduce"
        return self._issue(_named(kind, tensor, reduction.op), run, sync)

    def reduce(
        self, tensor: torch.Tensor, reduction: Reduction, root: int, *, sync: bool = False
    ) -> Work:
        """Reduces the tensors of all ranks into the root's; the others keep theirs."""
        reduction.check(tensor.dtype)
        here = self._is_root(root)

        def run(call: Call) -> None:
            flat = _flat(tensor)
            source = reduction.premultiplied(flat)
            collectives.reduce(call, source, flat if here else None, reduction, root)
            if here:
                _put_back(tensor, flat)

        return self._issue(_named("reduce", tensor, reduction.op, root), run, sync)

    def broadcast(self, tensor: torch.Tensor, root: int, *, sync: bool = False) -> Work:
        """Gives the root's tensor to all others, in place."""
        here = self._is_root(root)

        def run(call: Call) -> None:
            flat = _flat(tensor)
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

        def run(call: Call) -> None:
            flats = [_flat(output) for output in outputs]
            collectives.all_gather(call, _flat(input), flats)
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

        def run(call: Call) -> None:
            flats = None if outputs is None else [_flat(output) for output in outputs]
            collectives.gather(call, _flat(input), flats, root)
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

        def run(call: Call) -> None:
            flat = _flat(output)
            flats = None if inputs is None else [_flat(input) for input in inputs]
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

        def run(call: Call) -> None:
            flat = _flat(output)
            sources = [reduction.premultiplied(_flat(input)) for input in inputs]
            collectives.reduce_scatter(call, sources, flat, reduction)
            _put_back(output, flat)

        return self._issue(_list_named("reduce_scatter", inputs, reduction.op), run, sync)

    def all_to_all(self, output: torch.Tensor, input: torch.Tensor, *, sync: bool = False) -> Work:
        """Gives input[r] to rank r; output[r] comes from it."""
        return self.exchange(list(output.unbind()), list(input.unbind()), sync=sync)

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

        def run(call: Call) -> None:
            flats = [_flat(output) for output in outputs]
            collectives.all_to_all(call, [_flat(input) for input in inputs], flats)
            for output, flat in zip(outputs, flats, strict=True):
                _put_back(output, flat)

        return self._issue(_operation("all_to_all", _dtype(inputs[0])), run, sync)

    def barrier(self, *, sync: bool = True, timeout_s: float | None = None) -> Work:
        """Done when all have come."""
        return self._issue(_operation("barrier", ""), collectives.barrier, sync, timeout_s)

    def send(self, tensor: torch.Tensor, peer: int, tag: int = 0) -> Work:
        """Sends to one rank; what is sent with one tag arrives in order."""
        return self._post(self._letters().send(peer, tag, collectives.as_bytes(_flat(tensor))))

    def receive(self, tensor: torch.Tensor, peer: int | None, tag: int = 0) -> Work:
        """Receives from one rank, or (None) from whichever sends first."""
        flat = _flat(tensor)
        letter = self._letters().receive(peer, tag, collectives.as_bytes(flat))
        return self._post(letter, lambda: _put_back(tensor, flat))

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Memory, zeros, uint8 (num_bytes,): what lies in it is reduced in place by the ranks of
        this host, if all of them give such tensors to a collective. Ordinary memory where they
        share none. Collective; ranks need not take as much as each other."""
        found: list[torch.Tensor | None] = []

        def run(call: Call) -> None:
            found.append(call.transport.allocate(num_bytes, call.sequence, call.timeout_s))

        self._issue(_operation("allocate", ""), run, True)
        memory = found[0]
        return torch.zeros(num_bytes, dtype=torch.uint8) if memory is None else memory

    def abort(self, reason: str) -> None:
        """Ends the group on all ranks: what is under way fails within 100 ms. From any thread."""
        if self._error is None:
            self._error = aborted(f"rank {self.rank}", reason)
        self._transport.abort(reason)

    def close(self) -> None:
        """Leaves; waits for nobody."""
        if self._queue is not None and self._thread is not None:
            if self._unfinished:
                self.abort(f"rank {self.rank} has left with collectives under way")
            self._queue.put(None)
            self._thread.join(1.0)
        if self._mailbox is not None:
            self._mailbox.close()
        self._transport.close()

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
            work = Work() if observer is None else _Observed(observer, call)
            self._unfinished += 1
            if self._queue is None:
                self._queue = queue.SimpleQueue()
                self._thread = threading.Thread(
                    target=self._run_all, args=(self._queue,), name="penstock-group", daemon=True
                )
                self._thread.start()
            self._queue.put((run, call, work, issued_ns))
        if sync:
            work.wait()
        return work

    def _run_all(self, items: queue.SimpleQueue[tuple[Run, Call, Work, int] | None]) -> None:
        """The thread: one collective after the other."""
        while (item := items.get()) is not None:
            run, call, work, issued_ns = item
            error = self._error or self._run(run, call, issued_ns)
            with self._turn:
                self._unfinished -= 1
            work.end(error)

    def _run(self, run: Run, call: Call, issued_ns: int) -> TransportError | None:
        """Runs a collective; after an error, nothing runs any more."""
        observer = self.observer
        began_ns = 0 if observer is None else time.perf_counter_ns()
        try:
            run(call)
        except TransportError as error:
            self._error = error
        except Exception as error:
            what = f"{call.operation.text}, number {call.sequence}: {error!r}"
            self._error = TransportError(f"rank {self.rank}: {what}")
            self._error.__cause__ = error
            self._transport.abort(self._error.message)
        if observer is not None:
            ended_ns = time.perf_counter_ns()
            observer.ran(call.operation, call.sequence, issued_ns or began_ns, began_ns, ended_ns)
        return self._error

    def _is_root(self, root: int, only_there: object = ...) -> bool:
        """Whether this rank is the root; UserError where there is none, or a list is misplaced."""
        if not 0 <= root < self.world_size:
            raise UserError(f"root {root}: expected a rank from 0 to {self.world_size - 1}")
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

    def _letters(self) -> Mailbox:
        if self._mailbox is None:
            raise UserError("send and receive: this group has no connections between its ranks")
        return self._mailbox

    def _post(self, letter: Letter, then: Callable[[], None] | None = None) -> Work:
        """A letter's work."""
        work = Work()

        def ended(error: TransportError | None) -> None:
            if error is None and then is not None:
                then()
            work.source = letter.source
            work.end(error)

        letter.when_done(ended)
        return work


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


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements, (n,), contiguous: a view where it can be, else a copy."""
    if tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        if tensor.requires_grad:
            tensor = tensor.detach()
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    if not tensor.is_cpu or tensor.layout != torch.strided:
        raise UserError(
            f"a {tensor.layout} tensor on {tensor.device}: this group moves dense CPU tensors",
            hint="tensor.cpu(); for GPUs a group of backend cpu:penstock,cuda:nccl",
        )
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)


def _put_back(tensor: torch.Tensor, flat: torch.Tensor) -> None:
    """What was written into a copy goes where it belongs."""
    if tensor.data_ptr() != flat.data_ptr():
        tensor.detach().copy_(flat.view(tensor.shape))
