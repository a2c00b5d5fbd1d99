"""A pipeline -> the program of each rank, and its proof.

The mesh has the pipeline as its outermost axis: (ranks of the pipeline, *mesh inside a stage). Each
rank of the pipeline has a step of its own (`unroll`), which `lower` splits over the mesh inside it;
then what stands for sends and receives becomes instructions:

- a tensor goes between ranks of equal coordinates inside their stages, in the layout in which it is
  first read (the sender brings it into that layout);
- a send is begun as soon as its tensor is there, and finished before the next to the same rank
  begins, or at the end; so nobody waits in a send for one that waits in another;
- a receive is begun when the one that is read before it is finished, so that one is always on its
  way while a rank computes, and finished right before its first reader. Receives from one rank are
  begun in the order of its sends.

Nobody waits in a circle: schedules see to that between tasks (`Schedule.validate`), the order of
the graph within them, and `Staged.check` proves it of the lists as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from penstock.errors import PlanError
from penstock.model.graph import Ref
from penstock.plan.assignment import Assignment
from penstock.plan.layout import B, coordinates_of
from penstock.plan.pipelines.micro_batch import Tensors, cut_batch
from penstock.plan.pipelines.schedule import Schedule
from penstock.plan.pipelines.stages import Stages
from penstock.plan.pipelines.unroll import RECEIVE, SEND, SENT, Part, unroll
from penstock.plan.programs.interpret import joined, run_ranks
from penstock.plan.programs.lower import BUCKET_BYTES, IN_FLIGHT, Ways, lower
from penstock.plan.programs.program import (
    Begun,
    Call,
    Exchange,
    Finish,
    Free,
    Instruction,
    Program,
    Receive,
    Send,
)
from penstock.plan.programs.verify import verify


@dataclass(frozen=True, eq=False)
class Staged:
    """The programs of a pipeline.

    Arguments:
        stages, schedule: that they carry out.
        parts: of each rank of the pipeline, its step.
        inside: of each rank of the pipeline, the programs of the mesh inside it, in which sends and
            receives are calls.
        programs: of all ranks.
    """

    stages: Stages
    schedule: Schedule
    parts: tuple[Part, ...]
    inside: tuple[tuple[Program, ...], ...]
    programs: tuple[Program, ...]

    def check(self) -> None:
        """Proves the programs: `verify`.

        Raises:
            PlanError: names rank, instruction and tensor.
        """
        for part, programs in zip(self.parts, self.inside, strict=True):
            verify(programs, part.graph, part.assignment, operators=False)
        verify(self.programs)

    def inputs(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """A step's inputs as the programs name them: the batch is in micro-batches."""
        return cut_batch(self.stages.graph, tensors, self.schedule.micro_batches)

    def run_all(
        self, tensors: Tensors, steps: Sequence[Tensors] = ({},), *, timeout_s: float = 60.0
    ) -> list[dict[str, torch.Tensor]]:
        """Steps of all ranks in this process; as `interpret.run_all`, by the graph's names."""
        graph = self.stages.graph
        given = self.inputs(dict(graph.constants) | dict(tensors))
        fresh = [self.inputs(step) for step in steps]
        found = run_ranks(self.programs, given, fresh, timeout_s=timeout_s)
        return [self.joined([of_rank[step] for of_rank in found]) for step in range(len(steps))]

    def joined(self, results: Sequence[Tensors]) -> dict[str, torch.Tensor]:
        """Whole outputs of all ranks' results, by the graph's names.

        Raises:
            PlanError: copies of a tensor differ between ranks.
        """
        graph, size = self.stages.graph, len(self.inside[0])
        found: dict[str, torch.Tensor] = {}
        for rank, (part, programs) in enumerate(zip(self.parts, self.inside, strict=True)):
            own = joined(part.graph, programs, results[rank * size : (rank + 1) * size])
            for output in part.graph.outputs:
                name = graph.output(output.role, output.target).name
                if name in found and not torch.equal(found[name], own[output.name]):
                    raise PlanError(
                        f"{output.role} {output.target} is to be the same on all ranks of the "
                        f"pipeline, and is not on rank {rank}",
                        hint="it was taken to depend on nothing that differs between them",
                    )
                found[name] = own[output.name]
        return found


def staged(
    stages: Stages,
    assignment: Assignment,
    schedule: Schedule,
    routes: Ways,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    in_flight: int = IN_FLIGHT,
) -> Staged:
    """The programs of all ranks.

    Arguments:
        stages: as many as the schedule has.
        assignment: of the graph of a micro-batch, over the mesh inside a stage.
        routes: the ways on that mesh.
        bucket_bytes, in_flight: see `lower`.

    Raises:
        PlanError: the schedule is for another number of stages; or see `lower`.
    """
    if schedule.stages != stages.count:
        raise PlanError(f"a schedule of {schedule.stages} stages, and {stages.count} stages")
    parts = unroll(stages, assignment, schedule)
    inside = tuple(
        lower(part.graph, part.assignment, routes, bucket_bytes=bucket_bytes, in_flight=in_flight)
        for part in parts
    )
    letters = _letters(parts)
    return Staged(
        stages,
        schedule,
        parts,
        inside,
        tuple(
            _Splice(rank, len(inside), program, len(programs), letters).program()
            for rank, programs in enumerate(inside)
            for program in programs
        ),
    )


def staged_program(
    stages: Stages,
    assignment: Assignment,
    schedule: Schedule,
    routes: Ways,
    rank: int,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    in_flight: int = IN_FLIGHT,
) -> Program:
    """One rank's program, the same as among those of all: what a worker has need of."""
    parts = unroll(stages, assignment, schedule)
    own, within = divmod(rank, math.prod(assignment.sizes))
    (inside,) = lower(
        parts[own].graph,
        parts[own].assignment,
        routes,
        bucket_bytes=bucket_bytes,
        in_flight=in_flight,
        ranks=(within,),
    )
    size = math.prod(assignment.sizes)
    return _Splice(own, len(parts), inside, size, _letters(parts)).program()


_Letters = Mapping[tuple[int, int], tuple[str, ...]]
"""By ranks of the pipeline, from and to, the tensors that go, in order."""


def _letters(parts: Sequence[Part]) -> _Letters:
    """In the order of graphs, which that of programs is: no send is an update, that might wait."""
    found: dict[tuple[int, int], list[str]] = {}
    for rank, part in enumerate(parts):
        for node in part.graph.nodes:
            if node.op == SEND:
                source, to = node.args
                found.setdefault((rank, to), []).append(source.name)
    return {pair: tuple(tensors) for pair, tensors in found.items()}


class _Splice:
    """A program inside a stage, while it becomes one of the whole mesh.

    Arguments:
        rank, ranks: of the pipeline.
        inside: the program.
        size: ranks inside a stage.
    """

    def __init__(
        self, rank: int, ranks: int, inside: Program, size: int, letters: _Letters
    ) -> None:
        self._rank, self._inside, self._size, self._letters = rank, inside, size, letters
        self._sizes = (ranks, *inside.sizes)
        self._written: list[Instruction] = []
        self._next = 1 + max(
            (item.number for item in inside.instructions if isinstance(item, Exchange)), default=-1
        )
        self._sent: dict[int, int] = {}
        self._under_way: dict[int, Send] = {}
        self._to_free: set[str] = set()
        self._begun: dict[int, int] = {}
        self._numbers: dict[str, int] = {}
        self._wanted = [
            (item.node.args[0], str(item.node.outputs[0]))
            for item in inside.instructions
            if isinstance(item, Call) and item.node.op == RECEIVE
        ]

    def program(self) -> Program:
        """The whole mesh's."""
        inside, rank = self._inside, self._whole(self._rank)
        self._begin_next()
        for item in inside.instructions:
            self._write(item)
        for to in list(self._under_way):
            self._finish_send(to)
        values = {
            name: replace(value, layout=(B, *value.layout))
            for name, value in inside.values.items()
            if not _is_sent(name)
        }
        return replace(
            inside,
            rank=rank,
            coordinates=coordinates_of(self._sizes, rank),
            sizes=self._sizes,
            instructions=tuple(self._written),
            values=values,
            inputs={name: (B, *layout) for name, layout in inside.inputs.items()},
        )

    def _whole(self, rank: int) -> int:
        """The rank of the mesh that lies in another rank of the pipeline where this one does."""
        return rank * self._size + self._inside.rank

    def _write(self, item: Instruction) -> None:
        match item:
            case Call(node) if node.op == SEND:
                source, to = node.args
                self._send(source, to)
            case Call(node) if node.op == RECEIVE:
                self._written.append(Finish(self._numbers[str(node.outputs[0])]))
                self._wanted.pop(0)
                self._begin_next()
            case Exchange():
                ranks = tuple(self._rank * self._size + rank for rank in item.ranks)
                self._written.append(replace(item, axis=item.axis + 1, ranks=ranks))
            case Free(names):
                held = {send.source for send in self._under_way.values()}
                self._to_free |= held & set(names)
                self._free([name for name in names if not _is_sent(name) and name not in held])
            case _:
                self._written.append(item)

    def _begun_as(self, item: Begun) -> int:
        self._written.append(item)
        self._next += 1
        return item.number

    def _begin_next(self) -> None:
        """Begins the receive that is read next, and those that its sender sends before it."""
        if not self._wanted:
            return
        sender, tensor = self._wanted[0]
        letters = self._letters[sender, self._rank]
        while tensor not in self._numbers:
            sequence = self._begun.get(sender, 0)
            name, self._begun[sender] = letters[sequence], sequence + 1
            receive = Receive(self._next, name, self._whole(sender), sequence)
            self._numbers[name] = self._begun_as(receive)

    def _send(self, source: Ref, to: int) -> None:
        self._finish_send(to)
        sequence = self._sent.get(to, 0)
        self._sent[to] = sequence + 1
        send = Send(self._next, source.name, self._whole(to), sequence)
        self._begun_as(send)
        self._under_way[to] = send

    def _finish_send(self, to: int) -> None:
        send = self._under_way.pop(to, None)
        if send is None:
            return
        self._written.append(Finish(send.number))
        held = {other.source for other in self._under_way.values()}
        if send.source in self._to_free - held:
            self._to_free.discard(send.source)
            self._free([send.source])

    def _free(self, names: Sequence[str]) -> None:
        if names:
            self._written.append(Free(tuple(names)))


def _is_sent(name: str) -> bool:
    """Whether a name is what stands for a send's result."""
    return name.startswith(SENT)
