"""Executes programs as they are written: the proof of a plan, and the reference for executors.

`interpret` is one rank's step, through whatever groups it is given. `run_all` is the whole mesh in
this process: a thread for each rank, whole tensors in and whole tensors out. Nothing is done for
speed, but that what is begun goes on by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from penstock.errors import PenstockError, PlanError, TransportError
from penstock.model import cross_entropy, randomness
from penstock.model.graph import Graph, Spec
from penstock.plan.layout import B, everyone, join, split
from penstock.plan.programs.groups import Groups, in_this_process
from penstock.plan.programs.program import (
    Box,
    Call,
    Exchange,
    Finish,
    Free,
    Instruction,
    Local,
    Move,
    Program,
    Receive,
    Send,
)
from penstock.plan.rules import embedding_part

assert cross_entropy
assert randomness
assert embedding_part  # they register operators that programs call

Tensors = Mapping[str, torch.Tensor]

END_S = 60.0
"""How long a rank's thread may go on after what it waits for must have come or failed."""
SLACK = 256.0
"""So many units of a dtype's rounding copies of one tensor may be apart: kernels that sum may take
another order on memory that is aligned otherwise."""


def interpret(program: Program, groups: Groups, tensors: Tensors) -> dict[str, torch.Tensor]:
    """One step of one rank.

    Arguments:
        groups: of this rank; all ranks interpret their programs at the same time.
        tensors: this rank's parts, by name of the graph's input. Their dictionary stays as it is.

    Returns:
        By name, the values of `program.outputs`.

    Raises:
        PlanError: an instruction cannot be executed, or gives another shape than the program says;
            names rank, instruction and tensor.
        TransportError: another rank has failed.
    """
    rank = _Rank(program, groups, tensors)
    with torch.no_grad():
        for number, item in enumerate(program.instructions):
            rank.execute(number, item)
    return {given.value: rank.values[given.value] for given in program.outputs}


def renewed(program: Program, tensors: Tensors, results: Tensors) -> dict[str, torch.Tensor]:
    """The inputs of the next step: those of this one, with new values in the place of the old."""
    return dict(tensors) | {name: results[value] for name, value in program.renewed.items()}


def scattered(program: Program, whole: Tensors) -> dict[str, torch.Tensor]:
    """A rank's inputs of whole ones, of which there may be more or fewer than it has."""
    return {
        name: split(whole[name], layout, program.sizes, program.coordinates)
        for name, layout in program.inputs.items()
        if name in whole
    }


def run_all(
    graph: Graph,
    programs: Sequence[Program],
    tensors: Tensors,
    steps: Sequence[Tensors] = ({},),
    *,
    timeout_s: float = 60.0,
) -> list[dict[str, torch.Tensor]]:
    """Steps of all ranks, in this process. Each rank computes with one thread.

    Arguments:
        programs: of all ranks, in their order.
        tensors: whole inputs of the first step, by name; constants need not be there.
        steps: for each step, the inputs that are others than before (data, the seed).
        timeout_s: how long a rank waits for another.

    Returns:
        For each step, what `graph.run` gives: whole outputs, by the names of their tensors.

    Raises:
        PlanError: see `interpret`; or copies of a tensor differ between ranks.
    """
    given = dict(graph.constants) | dict(tensors)
    found = run_ranks(programs, given, steps, timeout_s=timeout_s)
    return [
        joined(graph, programs, [of_rank[step] for of_rank in found]) for step in range(len(steps))
    ]


def run_ranks(
    programs: Sequence[Program],
    tensors: Tensors,
    steps: Sequence[Tensors] = ({},),
    *,
    timeout_s: float = 60.0,
) -> list[list[dict[str, torch.Tensor]]]:
    """`run_all`, but for the joining: of each rank, for each step, what `interpret` gives."""
    ends = in_this_process(programs[0].sizes, timeout_s=timeout_s)
    found: list[list[dict[str, torch.Tensor]]] = [[] for _ in programs]
    failures: list[tuple[int, BaseException]] = []

    def run(program: Program, groups: Any) -> None:
        torch.set_num_threads(1)
        try:
            own = scattered(program, tensors)
            for fresh in steps:
                own |= scattered(program, fresh)
                results = interpret(program, groups, own)
                found[program.rank].append(results)
                own = renewed(program, own, results)
        except BaseException as error:
            failures.append((program.rank, error))
            groups.abort(f"rank {program.rank} has failed")

    threads_before = torch.get_num_threads()
    threads = [
        threading.Thread(target=run, args=pair, name=f"rank {pair[0].rank}", daemon=True)
        for pair in zip(programs, ends, strict=True)
    ]
    try:
        for thread in threads:
            thread.start()
        _join(threads, len(steps) * timeout_s + END_S)
    finally:
        torch.set_num_threads(threads_before)
        for groups in ends:
            groups.close()
    if failures:
        # Who has only lost the others is not at fault.
        failures.sort(key=lambda failure: (isinstance(failure[1], TransportError), failure[0]))
        raise failures[0][1]
    return found


def joined(
    graph: Graph, programs: Sequence[Program], results: Sequence[Tensors]
) -> dict[str, torch.Tensor]:
    """Whole outputs of all ranks' results, by the names of their tensors.

    Raises:
        PlanError: copies of a tensor differ between ranks.
    """
    whole: dict[str, torch.Tensor] = {}
    sizes = programs[0].sizes
    for given in programs[0].outputs:
        layout = programs[0].values[given.value].layout
        parts = [of_rank[given.value] for of_rank in results]
        for rank, at in enumerate(everyone(sizes)):
            first = tuple(0 if p == B else c for p, c in zip(layout, at, strict=True))
            other = list(everyone(sizes)).index(first)
            if not _same(parts[rank], parts[other]):
                raise PlanError(
                    f"{given.role} {given.target}: {given.value} is to be the same on ranks "
                    f"{other} and {rank}, and is not",
                    hint="a rule says B of what differs from rank to rank",
                )
        whole[given.tensor] = join(parts, layout, sizes, graph.specs[given.tensor].shape)
    return whole


class _Rank:
    """A rank in the middle of a step."""

    def __init__(self, program: Program, groups: Groups, tensors: Tensors) -> None:
        self.values = {name: tensors[name] for name in program.inputs}
        self._program, self._groups = program, groups
        self._begun: dict[int, Callable[[], Tensors]] = {}

    def execute(self, number: int, item: Instruction) -> None:
        """One instruction."""
        try:
            made = self._made(item)
        except TransportError:
            raise
        except PenstockError as error:
            raise PlanError(f"{self._where(number, item)}: {error.message}") from error
        except Exception as error:
            raise PlanError(f"{self._where(number, item)}: {error}") from error
        for name, tensor in made.items():
            expected, given = self._program.values[name].spec, Spec.of(tensor)
            if given != expected:
                where = self._where(number, item)
                raise PlanError(f"{where}: {name} is {given}, and was to be {expected}")
            self.values[name] = tensor

    def _where(self, number: int, item: Instruction) -> str:
        program = self._program
        return f"rank {program.rank}, instruction {number}, {program.words(item)}"

    def _made(self, item: Instruction) -> Tensors:
        match item:
            case Call(node):
                args, kwargs = node.with_tensors([self.values[name] for name in node.inputs])
                return node.results(node.function(*args, **kwargs))
            case Local():
                return {item.result: self._local(item)}
            case Exchange():
                self._begun[item.number] = self._exchange(item)
            case Send():
                work = self._groups.send(self.values[item.source], item.peer, item.sequence)
                self._begun[item.number] = _nothing_of(work)
            case Receive():
                self._begun[item.number] = self._receive(item)
            case Finish():
                return self._begun.pop(item.number)()
            case Free():
                for name in item.names:
                    del self.values[name]
        return {}

    def _local(self, item: Local) -> torch.Tensor:
        source = self.values[item.source]
        if item.kind == "same":
            return source
        if item.kind == "slice":
            return _boxed(source, item.box).clone(memory_format=torch.contiguous_format)
        result = self._new(item.result).zero_()
        if item.kind == "place":
            _boxed(result, item.box).copy_(source)
        return result

    def _receive(self, item: Receive) -> Callable[[], Tensors]:
        result = self._new(item.result)
        work = self._groups.receive(result, item.peer, item.sequence)

        def finish() -> Tensors:
            work.wait()
            return {item.result: result}

        return finish

    def _exchange(self, item: Exchange) -> Callable[[], Tensors]:
        group = self._groups.line(item.axis)
        sources = [self.values[move.source] for move in item.moves]
        if item.kind == "all_reduce":
            flat = torch.cat([source.reshape(-1) for source in sources])
            work = group.all_reduce(flat)

            def finish() -> Tensors:
                work.wait()
                return _cut(flat, item.moves, [source.shape for source in sources])

            return finish

        results = [self._new(move.result) for move in item.moves]
        ranks = range(len(item.ranks))
        if item.kind == "reduce_scatter":
            sends = [_packed(_part(item.moves, sources, "sends", rank)) for rank in ranks]
            received = [_buffer(results)]
            work = group.reduce_scatter(received[0], sends)
            parts = [results]
        else:
            parts = [_part(item.moves, results, "receives", rank) for rank in ranks]
            received = [_buffer(part) for part in parts]
            if item.kind == "all_gather":
                work = group.gather_all(received, _packed(sources))
            else:
                sends = [_packed(_part(item.moves, sources, "sends", rank)) for rank in ranks]
                work = group.exchange(received, sends)

        def put() -> Tensors:
            work.wait()
            for flat, places in zip(received, parts, strict=True):
                _unpack(flat, places)
            return {m.result: result for m, result in zip(item.moves, results, strict=True)}

        return put

    def _new(self, name: str) -> torch.Tensor:
        spec = self._program.values[name].spec
        return torch.empty(spec.shape, dtype=spec.dtype)


def _boxed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A view of what lies in a box."""
    for dim, (start, stop) in enumerate(box):
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def _part(
    moves: Sequence[Move], tensors: Sequence[torch.Tensor], side: str, rank: int
) -> list[torch.Tensor]:
    """Views of what each move has for a rank, or from it."""
    return [
        _boxed(tensor, getattr(move, side)[rank])
        for move, tensor in zip(moves, tensors, strict=True)
    ]


def _packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors as they travel: one as it is, several in one flat buffer."""
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


def _buffer(places: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where tensors arrive: one in its place, several in a flat buffer."""
    if len(places) == 1:
        return places[0]
    return places[0].new_empty(sum(place.numel() for place in places))


def _unpack(flat: torch.Tensor, places: Sequence[torch.Tensor]) -> None:
    if len(places) > 1:
        pieces = torch.split(flat, [place.numel() for place in places])
        for piece, place in zip(pieces, places, strict=True):
            place.copy_(piece.view(place.shape))


def _cut(flat: torch.Tensor, moves: Sequence[Move], shapes: Sequence[torch.Size]) -> Tensors:
    """The results of a sum, which lie in its flat buffer."""
    pieces = torch.split(flat, [shape.numel() for shape in shapes])
    return {
        move.result: piece.view(shape)
        for move, piece, shape in zip(moves, pieces, shapes, strict=True)
    }


def _nothing_of(work: Any) -> Callable[[], Tensors]:
    def finish() -> Tensors:
        work.wait()
        return {}

    return finish


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two copies are one tensor's, but for what rounding may do."""
    if not one.dtype.is_floating_point:
        return torch.equal(one, other)
    size = float(other.abs().nan_to_num().max()) if other.numel() else 0.0
    slack = SLACK * torch.finfo(one.dtype).eps
    return torch.allclose(one, other, rtol=slack, atol=slack * size, equal_nan=True)


def _join(threads: Sequence[threading.Thread], within_s: float) -> None:
    give_up = time.monotonic() + within_s
    for thread in threads:
        thread.join(max(0.0, give_up - time.monotonic()))
    late = [thread.name for thread in threads if thread.is_alive()]
    if late:
        raise TransportError(
            f"{', '.join(late)}: not done after {within_s:g} s",
            hint="a step takes longer than the deadline: run_all(..., timeout_s=...)",
        )
