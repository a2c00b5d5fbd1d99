"""Goes through the programs of all ranks together, without data, and proves that they fit.

`verify` executes all lists in turns, each until it has to wait, and in two ways: as if whoever
begins something waited until all others have begun it, and as programs are meant, where only
`Finish` waits. What never waits in a circle in the first way does not in any executor that begins
things in the order of the list; the second sees what `Finish` finds. On the way it checks that

- no value is read, sent or freed before it is there, after it is freed, or (its source) while it is
  on its way; none is made twice; none that is neither output nor input is left at the end;
- all members of an exchange mean the same: number in its line's order, kind, axis, ranks, dtypes,
  and parts, which fit in shape and cover the results; every receive has its send;
- all that is begun is finished;
- values have the shapes of their layouts, and, with the graph and the assignment, each call reads
  and gives the layouts that it was assigned.

An executor's sends do not wait to be received: they are copied on their way, as `Mailbox` does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.errors import PlanError
from penstock.model.graph import Graph, Node, Spec
from penstock.plan.assignment import Assignment
from penstock.plan.costs.routes import plain
from penstock.plan.layout import in_words, local_shape
from penstock.plan.programs.program import (
    Begun,
    Box,
    Call,
    Exchange,
    Finish,
    Free,
    Instruction,
    Local,
    Program,
    Receive,
    Send,
    Value,
    box_shape,
)

HINT = "a defect of Penstock, unless the program was changed by hand: report it with the job"


def verify(
    programs: Sequence[Program],
    graph: Graph | None = None,
    assignment: Assignment | None = None,
    *,
    operators: bool = True,
) -> None:
    """Checks the programs of all ranks of a mesh.

    Arguments:
        programs: in the order of ranks.
        graph, assignment: that they were written from; without them layouts are not compared.
        operators: whether every call is made with tensors that have a shape and no memory, to see
            that it gives the shapes that the program says.

    Raises:
        PlanError: names rank, instruction and tensor.
    """
    for rank, program in enumerate(programs):
        if program.rank != rank:
            raise PlanError(f"program {rank} is rank {program.rank}'s", hint=HINT)
    if graph is not None:
        for program in programs:
            _check_values(program, graph)
            if assignment is not None:
                _check_layouts(program, graph, assignment)
    if operators:
        shapes = _Shapes()
        for program in programs:
            shapes.check(program)
    for waits_at_once in (True, False):
        _Mesh(programs, waits_at_once).run()


class _Mesh:
    """All ranks in the middle of a step.

    Arguments:
        waits_at_once: whether an exchange waits for the others when it is begun, and not only when
            it is finished.
    """

    def __init__(self, programs: Sequence[Program], waits_at_once: bool) -> None:
        self._waits_at_once = waits_at_once
        self._exchanges: dict[tuple[tuple[int, ...], int], dict[int, Exchange]] = {}
        self._sent: dict[tuple[int, int, int], Value] = {}
        self._ranks = [_Rank(program) for program in programs]

    def run(self) -> None:
        """Until all are done."""
        while any(not rank.is_done for rank in self._ranks):
            moved = False
            for rank in self._ranks:
                while not rank.is_done and self._step(rank):
                    moved = True
            if not moved:
                raise self._stuck()
        for rank in self._ranks:
            rank.check_end()

    def _step(self, rank: _Rank) -> bool:
        """One instruction, if it need not wait."""
        item = rank.item
        if not rank.has_entered:
            rank.enter(item)
            if isinstance(item, Exchange):
                self._come(rank, item)
            elif isinstance(item, Send):
                key = (rank.number, item.peer, item.sequence)
                self._sent[key] = rank.program.values[item.source]
        if self._missing(rank) is not None:
            return False
        if isinstance(item, Finish):
            begun = rank.finish(item)
            if isinstance(begun, Receive):
                self._check_letter(rank, begun)
        rank.go_on()
        return True

    def _missing(self, rank: _Rank) -> str | None:
        """What a rank's instruction waits for."""
        item: Instruction | Begun = rank.item
        if isinstance(item, Finish):
            item = rank.begun[item.number]
        elif not (self._waits_at_once and isinstance(item, Exchange)):
            return None
        if isinstance(item, Exchange):
            there = self._exchanges[item.ranks, item.sequence]
            missing = [str(member) for member in item.ranks if member not in there]
            return f"rank {', '.join(missing)} in {_name(item)}" if missing else None
        if isinstance(item, Receive):
            key = (item.peer, rank.number, item.sequence)
            return None if key in self._sent else f"rank {item.peer} to send number {item.sequence}"
        return None

    def _come(self, rank: _Rank, item: Exchange) -> None:
        """A rank comes to an exchange; the last to come sees that all mean the same."""
        there = self._exchanges.setdefault((item.ranks, item.sequence), {})
        there[rank.number] = item
        if len(there) == len(item.ranks):
            self._check_exchange([there[member] for member in item.ranks])

    def _check_exchange(self, members: Sequence[Exchange]) -> None:
        first = members[0]
        for number, item in zip(first.ranks, members, strict=True):
            rank = self._ranks[number]
            if (item.kind, item.axis) != (first.kind, first.axis):
                raise rank.error(f"is {_name(item)} where rank {first.ranks[0]} has {_name(first)}")
            if len(item.moves) != len(first.moves):
                raise rank.error(
                    f"has {len(item.moves)} tensors where rank {first.ranks[0]} has "
                    f"{len(first.moves)}"
                )
        for place in range(len(first.moves)):
            self._check_move(members, place)

    def _check_move(self, members: Sequence[Exchange], place: int) -> None:
        """One tensor of an exchange, on all ranks of the line."""
        ranks = [self._ranks[number] for number in members[0].ranks]
        moves = [item.moves[place] for item in members]
        sources = [r.program.values[m.source].spec for r, m in zip(ranks, moves, strict=True)]
        results = [r.program.values[m.result].spec for r, m in zip(ranks, moves, strict=True)]
        dtype = sources[0].dtype
        tensors = {r.program.values[m.source].tensor for r, m in zip(ranks, moves, strict=True)}
        for rank, move, source, result in zip(ranks, moves, sources, results, strict=True):
            what = f"{move.source} -> {move.result}"
            if source.dtype != dtype or result.dtype != dtype or len(tensors) > 1:
                raise rank.error(
                    f"{what} is {source}, where rank {ranks[0].number} has {moves[0].source} "
                    f"{sources[0]}"
                )
            _check_boxes(rank, what, move.sends, source, len(ranks))
            _check_boxes(rank, what, move.receives, result, len(ranks))
            if move.receives:
                _check_covers(rank, what, move.receives, result)
            elif not move.sends and result != source:
                raise rank.error(f"{what}: {source} becomes {result}")
        for (i, one), (j, other) in itertools.product(enumerate(moves), repeat=2):
            goes = box_shape(one.sends[j]) if one.sends else sources[i].shape
            comes = box_shape(other.receives[i]) if other.receives else results[j].shape
            if goes != comes:
                raise ranks[j].error(
                    f"{other.source} -> {other.result}: rank {ranks[i].number} sends "
                    f"{list(goes)}, and {list(comes)} is received"
                )

    def _check_letter(self, rank: _Rank, item: Receive) -> None:
        sent = self._sent.pop((item.peer, rank.number, item.sequence))
        value = rank.program.values[item.result]
        if sent != value:
            of, given = (f"{v.tensor} {v.spec} in {in_words(v.layout)}" for v in (value, sent))
            raise rank.error(f"{item.result} is {of}, and rank {item.peer} sends {given}")

    def _stuck(self) -> PlanError:
        lines = []
        for rank in self._ranks:
            if not rank.is_done:
                lines.append(f"{rank.where()} waits for {self._missing(rank)}")
        done = [str(rank.number) for rank in self._ranks if rank.is_done]
        if done:
            lines.append(f"done: rank {', '.join(done)}")
        return PlanError("all wait for one another:\n  " + "\n  ".join(lines), hint=HINT)


@dataclass
class _Rank:
    """One rank in the middle of a step.

    Attributes:
        place: of the instruction that it is at; `has_entered`: whether it has begun it.
        there: values that can be read.
        known: all values that there have been.
        held: by value that is on its way, the numbers that it was begun under.
        begun: what has been begun and not finished, by number.
    """

    program: Program
    place: int = 0
    has_entered: bool = False
    there: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    held: dict[str, set[int]] = field(default_factory=dict)
    begun: dict[int, Begun] = field(default_factory=dict)
    numbers: set[int] = field(default_factory=set)
    sequences: dict[object, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.there |= set(self.program.inputs)
        self.known |= self.there

    @property
    def number(self) -> int:
        return self.program.rank

    @property
    def is_done(self) -> bool:
        return self.place >= len(self.program.instructions)

    @property
    def item(self) -> Instruction:
        return self.program.instructions[self.place]

    def where(self) -> str:
        """For errors."""
        if self.is_done:
            return f"rank {self.number}, at its end"
        return f"rank {self.number}, instruction {self.place}, {self.program.words(self.item)}"

    def error(self, what: str) -> PlanError:
        return PlanError(f"{self.where()}: {what}", hint=HINT)

    def go_on(self) -> None:
        self.place, self.has_entered = self.place + 1, False

    def enter(self, item: Instruction) -> None:
        """Comes to an instruction, and does what it does at once."""
        self.has_entered = True
        match item:
            case Call(node):
                for name in node.inputs:
                    self._read(name)
                for output in node.outputs:
                    if output is not None:
                        self._make(output)
            case Local():
                self._read(item.source)
                self._make(item.result)
                self._check_local(item)
            case Exchange() | Send() | Receive():
                self._begin(item)
            case Finish(number):
                if number not in self.begun:
                    raise self.error(f"nothing is under way as {number}")
            case Free(names):
                for name in names:
                    self._read(name)
                    if self.held.get(name):
                        raise self.error(f"{name} is on its way in {min(self.held[name])}")
                    self.there.discard(name)

    def finish(self, item: Finish) -> Begun:
        """Ends what was begun."""
        begun = self.begun.pop(item.number)
        for name in _sources(begun):
            self.held[name].discard(item.number)
        for name in _results(begun):
            self.there.add(name)
        return begun

    def check_end(self) -> None:
        """After the last instruction."""
        if self.begun:
            raise self.error(f"{', '.join(map(str, self.begun))} is begun, and never finished")
        given = {item.value for item in self.program.outputs}
        for name in sorted(given | set(self.program.renewed.values())):
            if name not in self.there:
                raise self.error(f"{name} is an output, and not there")
        left = self.there - given - set(self.program.inputs)
        if left:
            raise self.error(f"{', '.join(sorted(left))} is never freed")

    def _begin(self, item: Begun) -> None:
        if item.number in self.numbers:
            raise self.error(f"{item.number} is begun a second time")
        self.numbers.add(item.number)
        line: object
        if isinstance(item, Exchange):
            line = item.ranks
            if self.number not in item.ranks or item.ranks != self.program.line(item.axis):
                raise self.error(f"{list(item.ranks)} is not its line of axis {item.axis}")
            if not item.moves:
                raise self.error("moves nothing")
        else:
            line = (type(item), item.peer)
        expected = self.sequences.get(line, 0)
        if item.sequence != expected:
            raise self.error(f"is number {item.sequence}, after {expected} before it")
        self.sequences[line] = expected + 1
        for name in _sources(item):
            self._read(name)
            self.held.setdefault(name, set()).add(item.number)
        for name in _results(item):
            self._make(name)
            self.there.discard(name)
        self.begun[item.number] = item

    def _read(self, name: str) -> None:
        if name not in self.there:
            why = "is not there yet"
            if any(name in _results(item) for item in self.begun.values()):
                why = "is not finished"
            elif name in self.known:
                why = "has been freed"
            raise self.error(f"{name} {why}")

    def _make(self, name: str) -> None:
        if name in self.known:
            raise self.error(f"{name} is made a second time")
        if name not in self.program.values:
            raise self.error(f"{name} has no layout and no shape")
        self.known.add(name)
        self.there.add(name)

    def _check_local(self, item: Local) -> None:
        source, result = (self.program.values[n].spec for n in (item.source, item.result))
        what = f"{item.source} {source} -> {item.result} {result}"
        shape = box_shape(item.box)
        fits = {
            "same": source == result,
            "zeros": True,
            "slice": shape == result.shape and _inside(item.box, source.shape),
            "place": shape == source.shape and _inside(item.box, result.shape),
        }[item.kind]
        if not fits or source.dtype != result.dtype:
            raise self.error(f"{what} by a box of {list(item.box)}")


class _Shapes:
    """Makes calls with tensors that have no memory; calls that are alike once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Spec | None, ...] | Exception] = {}

    def check(self, program: Program) -> None:
        """Every call of a program."""
        for number, item in enumerate(program.instructions):
            if not isinstance(item, Call):
                continue
            specs = [program.values[name].spec for name in item.node.inputs]
            found = self._given(item.node, specs)
            where = f"rank {program.rank}, instruction {number}, {program.words(item)}"
            if isinstance(found, Exception):
                raise PlanError(f"{where}: {found}", hint=HINT) from found
            for name, spec in zip(item.node.outputs, found, strict=True):
                if name is not None and program.values[name].spec != spec:
                    expected = program.values[name].spec
                    raise PlanError(
                        f"{where}: gives {name} as {spec}, and not {expected}", hint=HINT
                    )

    def _given(self, node: Node, specs: Sequence[Spec]) -> tuple[Spec | None, ...] | Exception:
        args, kwargs = node.with_tensors(specs)
        key = f"{node.op}{args}{kwargs}"
        if key not in self._known:
            try:
                with FakeTensorMode(), torch.no_grad():
                    tensors = [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
                    args, kwargs = node.with_tensors(tensors)
                    returned: Any = node.function(*args, **kwargs)
                values = returned if isinstance(returned, tuple | list) else (returned,)
                self._known[key] = tuple(
                    Spec.of(value) if isinstance(value, torch.Tensor) else None for value in values
                )
            except Exception as error:
                self._known[key] = error
        return self._known[key]


def _check_values(program: Program, graph: Graph) -> None:
    """Every value has the part of its layout."""
    for name, value in program.values.items():
        whole = graph.specs[value.tensor]
        shape = local_shape(whole.shape, value.layout, program.sizes, program.coordinates)
        if value.spec != Spec(shape, whole.dtype):
            raise PlanError(
                f"rank {program.rank}: {name} is {value.spec}; of {whole} in "
                f"{in_words(value.layout)} it has {Spec(shape, whole.dtype)}",
                hint=HINT,
            )


def _check_layouts(program: Program, graph: Graph, assignment: Assignment) -> None:
    """Every call reads and gives what was assigned, every node is called, once."""
    nodes = {output: node for node in graph.nodes for output in node.outputs if output is not None}
    called: set[str] = set()

    def compare(where: str, name: str, tensor: str, layout: Any) -> None:
        value = program.values[name]
        expected = plain(graph.specs[tensor].shape, layout, program.sizes)
        if (value.tensor, value.layout) != (tensor, expected):
            raise PlanError(
                f"{where}: {name} is {value.tensor} of {in_words(value.layout)}; assigned was "
                f"{tensor} of {in_words(expected)}",
                hint=HINT,
            )

    for number, item in enumerate(program.instructions):
        if not isinstance(item, Call):
            continue
        where = f"rank {program.rank}, instruction {number}, {program.words(item)}"
        node = nodes[next(name for name in item.node.outputs if name is not None)]
        if node.name in called:
            raise PlanError(f"{where}: {node.name} is called a second time", hint=HINT)
        called.add(node.name)
        for place, (name, tensor) in enumerate(zip(item.node.inputs, node.inputs, strict=True)):
            compare(where, name, tensor, assignment.read_as(graph, node, place))
        for made in node.outputs:
            if made is not None:
                compare(where, made, made, assignment.layout_of(graph, made))
    missing = [node.name for node in graph.nodes if node.name not in called]
    if missing:
        raise PlanError(f"rank {program.rank} never calls {', '.join(missing)}", hint=HINT)
    for given, output in zip(program.outputs, graph.outputs, strict=True):
        where = f"rank {program.rank}, output {given.role} {given.target}".strip()
        compare(where, given.value, output.name, assignment.output_layout(graph, output))


def _check_boxes(rank: _Rank, what: str, boxes: Sequence[Box], whole: Spec, parts: int) -> None:
    if boxes and len(boxes) != parts:
        raise rank.error(f"{what}: {len(boxes)} parts for {parts} ranks")
    for box in boxes:
        if not _inside(box, whole.shape):
            raise rank.error(f"{what}: a part {list(box)} of {whole}")


def _check_covers(rank: _Rank, what: str, boxes: Sequence[Box], whole: Spec) -> None:
    """Boxes that do not overlap are all of it if they have its size."""
    filled = [box for box in boxes if math.prod(box_shape(box))]
    for one, other in itertools.combinations(filled, 2):
        if all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True)):
            raise rank.error(f"{what}: parts {list(one)} and {list(other)} overlap")
    if sum(math.prod(box_shape(box)) for box in filled) != whole.numel:
        raise rank.error(f"{what}: what is received is not all of {whole}")


def _inside(box: Box, shape: Sequence[int]) -> bool:
    return len(box) == len(shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True)
    )


def _sources(item: Begun) -> list[str]:
    if isinstance(item, Exchange):
        return [move.source for move in item.moves]
    return [item.source] if isinstance(item, Send) else []


def _results(item: Begun) -> list[str]:
    if isinstance(item, Exchange):
        return [move.result for move in item.moves]
    return [item.result] if isinstance(item, Receive) else []


def _name(item: Exchange) -> str:
    return f"{item.kind} {item.sequence} on axis {item.axis} of {list(item.ranks)}"
