"""The torch.distributed backend "penstock": any PyTorch program's collectives on a `Communicator`.

torch takes a group that is a Python class whole, for all devices: CPU tensors go to the
communicator, and CUDA tensors ("cpu:penstock,cuda:nccl") to an NCCL group inside, which is made
when the first of them comes.

Where torch calls from C++ (DDP, functional collectives), an exception must cross it as a failed
future. `torch.futures.Future.set_exception` on a future that DDP waits for ends the process by
SIGSEGV; a function that raises in `then` does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from penstock.errors import TransportError, UserError
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.exchange.reduction import Reduction
from penstock.exchange.work import Work

NAME = "penstock"

_UNSET = timedelta(0)
"""torch's "no timeout of its own" is -1 ms in options and 0 in `Work.wait`: nothing above this."""

_REDUCTIONS = {
    dist.ReduceOp.SUM: Reduction("sum"),
    dist.ReduceOp.AVG: Reduction("avg"),
    dist.ReduceOp.PRODUCT: Reduction("product"),
    dist.ReduceOp.MIN: Reduction("min"),
    dist.ReduceOp.MAX: Reduction("max"),
    dist.ReduceOp.BAND: Reduction("band"),
    dist.ReduceOp.BOR: Reduction("bor"),
    dist.ReduceOp.BXOR: Reduction("bxor"),
}

Tensors = Sequence[torch.Tensor]
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Base: Any = dist.ProcessGroup  # typed, every overload of its C++ would have to be given here


class Options:
    """What the options of torch's collectives hold, each some of it, and the values by default."""

    reduceOp: Any = dist.ReduceOp(dist.ReduceOp.SUM)
    rootRank: int = 0
    rootTensor: int = 0
    timeout: timedelta = timedelta(milliseconds=-1)
    asyncOp: bool = True


DEFAULT = Options()


def monitored_barrier(
    group: dist.ProcessGroup | int | None = None, timeout: timedelta | None = None
) -> None:
    """A barrier that names all ranks that did not come; `dist.monitored_barrier` is gloo's alone.

    Arguments:
        group: of the backend "penstock"; None: the default group.
        timeout: None: the group's.

    Raises:
        TransportError: ranks are missing; the group is of no more use then.
    """
    group = dist.group.WORLD if group is None else group
    if isinstance(group, int):  # as torch says that this rank is no member
        return
    if not isinstance(group, PenstockGroup):
        raise UserError(
            f"monitored_barrier on {type(group).__name__}",
            hint='make the group by torch.distributed.init_process_group("penstock")',
        )
    group.monitored_barrier(timeout)


def create(options: Any, backend_options: object = None) -> PenstockGroup:
    """torch's call, on each member of a new group; `options` is a _DistributedBackendOptions."""
    communicator = connect(
        options.store,
        options.group_rank,
        options.group_size,
        timeout_s=options.timeout.total_seconds(),
    )
    return PenstockGroup(options.store, communicator, options.timeout)


class PendingWork(dist.Work):
    """A collective under way, as torch sees it.

    Arguments:
        work: the communicator's.
        result: the tensors that hold the outcome.
        timeout_s: how long `wait` waits when it is not told; None: the group's.
    """

    def __init__(self, work: Work, result: Sequence[Any], timeout_s: float | None = None) -> None:
        super().__init__()
        self._work, self._result, self._timeout_s = work, result, timeout_s

    def wait(self, timeout: timedelta = _UNSET) -> bool:
        """Raises TransportError when the collective failed, or is not done after the timeout."""
        self._work.wait(timeout.total_seconds() if timeout > _UNSET else self._timeout_s)
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._work.done()

    def is_success(self) -> bool:
        return self._work.done() and self.exception() is None

    def exception(self) -> TransportError | None:
        """What it failed of; None while it has not."""
        if self._work.done():
            try:
                self._work.wait()
            except TransportError as error:
                return error
        return None

    def of(self, result: Sequence[Any]) -> PendingWork:
        """The same work with another result."""
        return PendingWork(self._work, result, self._timeout_s)

    def result(self) -> list[Any]:
        return list(self._result)

    def get_future(self) -> torch.futures.Future[Any]:
        """Holds `result`, or fails with the error's text."""
        failures: list[TransportError] = []

        def outcome(_: object) -> list[Any]:
            if failures:
                raise failures[0]
            return self.result()

        ended: torch.futures.Future[None] = torch.futures.Future()
        future = ended.then(outcome)

        def finish(error: TransportError | None) -> None:
            if error is not None:
                failures.append(error)
            ended.set_result(None)

        self._work.when_done(finish)
        return future

    def source_rank(self) -> int:
        """Of a receive, once done: who sent, as a rank of the group."""
        source = self._work.source
        return -1 if source is None else source

    _source_rank = source_rank


def _cpu(method: _Method) -> _Method:
    """A collective on CPU tensors; with CUDA tensors it is the inner group's of the same name."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: PenstockGroup, tensors: Any, *rest: Any, **options: Any) -> Any:
        first = _first(tensors)
        if first is None and rest:  # gather and scatter off the root
            first = _first(rest[0])
        if first is None:
            raise UserError(f"{name} of no tensors", hint="give at least one")
        if first.is_cpu and first.layout is torch.strided:
            return method(self, tensors, *rest, **options)
        return getattr(self._other(first), name)(tensors, *rest, **options)

    return call  # type: ignore[return-value]


def _first(given: Any) -> torch.Tensor | None:
    """The first tensor of a tensor, a list of them, or a list of lists."""
    while isinstance(given, (list, tuple)) and given:
        given = given[0]
    return given if isinstance(given, torch.Tensor) else None


class PenstockGroup(_Base):  # type: ignore[misc]
    """A torch process group whose CPU half is a communicator.

    Arguments:
        store: in which the group's ranks met; an inner NCCL group meets there too.
        timeout: of an inner NCCL group.
    """

    def __init__(self, store: Any, communicator: Communicator, timeout: timedelta) -> None:
        super().__init__(communicator.rank, communicator.world_size)
        self._store, self._timeout = store, timeout
        self._communicator = communicator
        self._world_size = communicator.world_size
        self._inner: dist.ProcessGroup | None = None
        self._name = self._description = ""

    # What torch asks of a group beside collectives. The base class would ask a backend in C++.

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        return self._name

    def getGroupName(self) -> str:
        return self._name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_desc(self) -> str:
        return self._description

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def communicator(self) -> Communicator:
        """What moves CPU tensors; its collectives and those of this group take turns."""
        return self._communicator

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """See `Communicator.allocate`."""
        return self._communicator.allocate(num_bytes)

    def get_group_store(self) -> Any:
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> Any:
        if torch.device(device).type == "cpu":
            return self
        if self._inner is None:
            raise RuntimeError(f"group {self._name} of backend {NAME} has no {device} half yet")
        return self._inner._get_backend(device)

    supports_splitting = supports_coalescing = supports_time_estimate = False

    def supports_tensor_alloc(self, device: torch.device) -> bool:
        return False

    def _set_sequence_number_for_group(self) -> None:
        """The communicator counts from 0."""

    def abort(self, reason: str = "abort() was called") -> None:
        """Ends the group on all ranks: whoever waits in it raises TransportError. From any thread;
        `dist.destroy_process_group` is still to be called, and then a new group can be made."""
        self._communicator.abort(reason)
        if self._inner is not None:
            self._inner.abort()

    def shutdown(self) -> None:
        """`dist.destroy_process_group` calls it; it waits for no other rank."""
        if self._inner is not None:
            self._inner.shutdown()
        self._communicator.close()

    def _other(self, tensor: torch.Tensor) -> dist.ProcessGroup:
        """The inner group for a tensor that the communicator does not take."""
        if not tensor.is_cuda or not dist.is_nccl_available():
            raise UserError(
                f"a {tensor.layout} tensor on {tensor.device} in a group of backend {NAME}, which "
                "moves dense CPU tensors, and CUDA's by NCCL where there is one",
                hint="tensor.to_dense().cpu(), or a second group of the device's own backend",
            )
        if self._inner is None:
            store = PrefixStore("cuda", self._store)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            nccl = dist.ProcessGroupNCCL(store, self.rank(), self.size(), options)
            inner = dist.ProcessGroup(store, self.rank(), self.size())
            inner._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
            inner._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
            inner._set_group_name(dist.GroupName(f"{self._name}:cuda"))
            self._inner = inner
        return self._inner

    # Collectives. Where torch gives a list of tensors of one rank, it has one element.

    @_cpu
    def allreduce(self, tensors: Tensors, opts: Options = DEFAULT) -> PendingWork:
        reduction = _reduction(opts.reduceOp)
        return _issue(self._communicator.all_reduce, _one(tensors), reduction, opts, tensors)

    @_cpu
    def broadcast(self, tensors: Tensors, opts: Options = DEFAULT) -> PendingWork:
        tensor = tensors[opts.rootTensor]
        return _issue(self._communicator.broadcast, tensor, opts.rootRank, opts, tensors)

    @_cpu
    def reduce(self, tensors: Tensors, opts: Options = DEFAULT) -> PendingWork:
        tensor, reduction = tensors[opts.rootTensor], _reduction(opts.reduceOp)
        return _issue(self._communicator.reduce, tensor, reduction, opts.rootRank, opts, tensors)

    @_cpu
    def allgather(
        self, outputs: Sequence[Tensors], inputs: Tensors, opts: Options = DEFAULT
    ) -> PendingWork:
        return _issue(self._communicator.gather_all, _one(outputs), _one(inputs), opts, outputs)

    @_cpu
    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Options = DEFAULT
    ) -> PendingWork:
        return _issue(self._communicator.gather_all, self._rows(output), input, opts, [output])

    @_cpu
    def gather(
        self, outputs: Sequence[Tensors], inputs: Tensors, opts: Options = DEFAULT
    ) -> PendingWork:
        root = opts.rootRank
        into = _one(outputs) if root == self._communicator.rank else None
        return _issue(self._communicator.gather, into, _one(inputs), root, opts, outputs)

    @_cpu
    def scatter(
        self, outputs: Tensors, inputs: Sequence[Tensors], opts: Options = DEFAULT
    ) -> PendingWork:
        root = opts.rootRank
        source = _one(inputs) if root == self._communicator.rank else None
        return _issue(self._communicator.scatter, _one(outputs), source, root, opts, outputs)

    @_cpu
    def reduce_scatter(
        self, outputs: Tensors, inputs: Sequence[Tensors], opts: Options = DEFAULT
    ) -> PendingWork:
        output, reduction = _one(outputs), _reduction(opts.reduceOp)
        reduce_scatter = self._communicator.reduce_scatter
        return _issue(reduce_scatter, output, _one(inputs), reduction, opts, outputs)

    @_cpu
    def reduce_scatter_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Options = DEFAULT
    ) -> PendingWork:
        rows, reduction = self._rows(input), _reduction(opts.reduceOp)
        return _issue(self._communicator.reduce_scatter, output, rows, reduction, opts, [output])

    @_cpu
    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Options = DEFAULT) -> PendingWork:
        return _issue(self._communicator.exchange, outputs, inputs, opts, outputs)

    @_cpu
    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Options = DEFAULT,
    ) -> PendingWork:
        """Split sizes count along dim 0, one per rank; none: equal parts."""
        outputs = self._split(output, output_split_sizes)
        inputs = self._split(input, input_split_sizes)
        return _issue(self._communicator.exchange, outputs, inputs, opts, [output])

    # Coalesced: one collective after the other.

    @_cpu
    def allreduce_coalesced(self, tensors: Tensors, opts: Options = DEFAULT) -> PendingWork:
        return _together([self.allreduce([tensor], opts) for tensor in tensors], tensors)

    @_cpu
    def allgather_coalesced(
        self, outputs: Sequence[Tensors], inputs: Tensors, opts: Options = DEFAULT
    ) -> PendingWork:
        """outputs[r][i] is for the i-th input of rank r."""
        lists = zip(zip(*outputs, strict=True), inputs, strict=True)
        return _together([self.allgather([of], [input], opts) for of, input in lists], outputs)

    @_cpu
    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Options = DEFAULT
    ) -> PendingWork:
        pairs = zip(outputs, inputs, strict=True)
        return _together([self.all_gather_single(*pair, opts) for pair in pairs], outputs)

    @_cpu
    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Options = DEFAULT
    ) -> PendingWork:
        pairs = zip(outputs, inputs, strict=True)
        return _together([self.reduce_scatter_single(*pair, opts) for pair in pairs], outputs)

    # The names that these had before torch 2.12.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    @_cpu
    def send(self, tensors: Tensors, dst_rank: int, tag: int = 0) -> PendingWork:
        return PendingWork(self._communicator.send(_one(tensors), dst_rank, tag), tensors)

    @_cpu
    def recv(self, tensors: Tensors, src_rank: int, tag: int = 0) -> PendingWork:
        return PendingWork(self._communicator.receive(_one(tensors), src_rank, tag), tensors)

    @_cpu
    def recv_anysource(self, tensors: Tensors, tag: int = 0) -> PendingWork:
        return PendingWork(self._communicator.receive(_one(tensors), None, tag), tensors)

    def barrier(self, opts: Options = DEFAULT, timeout: timedelta | None = None) -> PendingWork:
        """Of the processes: it does not wait for work on a GPU."""
        timeout = opts.timeout if timeout is None else timeout
        timeout_s = timeout.total_seconds() if timeout > _UNSET else None
        return PendingWork(
            self._communicator.barrier(sync=not opts.asyncOp, timeout_s=timeout_s), []
        )

    def monitored_barrier(
        self, timeout: timedelta | None = None, wait_all_ranks: bool = True
    ) -> None:
        """Names all missing ranks in any case."""
        timeout_s = None if timeout is None else timeout.total_seconds()
        self._communicator.barrier(sync=True, timeout_s=timeout_s).wait()

    def _rows(self, tensor: torch.Tensor) -> Tensors:
        """One view per rank: equal parts of a tensor that holds all ranks' parts in order."""
        parts, rest = divmod(tensor.numel(), self._world_size)
        if rest or not tensor.is_contiguous():
            raise UserError(
                f"a tensor of shape {tuple(tensor.shape)}, strides {tensor.stride()}, cannot be "
                f"cut into parts for {self._world_size} ranks",
                hint="it must be contiguous and hold as many elements for each rank",
            )
        return tensor.view(self._world_size, parts).unbind()

    def _split(self, tensor: torch.Tensor, sizes: Sequence[int]) -> Tensors:
        """One view per rank, along dim 0."""
        length = tensor.shape[0] if tensor.dim() else 1
        if not sizes:
            if length % self._world_size:
                raise UserError(
                    f"a tensor of shape {tuple(tensor.shape)} for {self._world_size} ranks: "
                    f"{length} is not divisible",
                    hint="give split sizes",
                )
            sizes = [length // self._world_size] * self._world_size
        elif len(sizes) != self._world_size or sum(sizes) != length:
            raise UserError(
                f"split sizes {list(sizes)} of a tensor of shape {tuple(tensor.shape)}",
                hint=f"there must be {self._world_size}, one per rank, of sum {length}",
            )
        return tensor.split(sizes)  # type: ignore[no-any-return, no-untyped-call]


def _one(tensors: Sequence[Any]) -> Any:
    if len(tensors) != 1:
        raise UserError(f"{len(tensors)} tensors of one rank; {NAME} takes one per process")
    return tensors[0]


def _reduction(op: Any) -> Reduction:
    kind = op.op
    return _REDUCTIONS.get(kind) or Reduction("premul_sum", op.factor)


def _issue(collective: Callable[..., Work], *arguments: Any) -> PendingWork:
    """Issues a collective; the last two arguments are torch's options and the result.

    What torch waits for at once may run in the caller, unless it has a timeout of its own.
    """
    *own, opts, result = arguments
    timeout, sync = opts.timeout, not opts.asyncOp
    if timeout > _UNSET:
        pending = PendingWork(collective(*own), result, timeout.total_seconds())
    else:
        pending = PendingWork(collective(*own, sync=sync), result)
    if sync:
        pending.wait()
    return pending


def _together(works: Sequence[PendingWork], result: Sequence[Any]) -> PendingWork:
    """The last one's: collectives end in the order of their issue, none well after one failed."""
    if not works:
        raise UserError("a coalesced collective of no tensors")
    return works[-1].of(result)
