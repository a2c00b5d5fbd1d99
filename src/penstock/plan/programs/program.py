"""`Program`: what one rank does in a step, as a list that is known before the step begins.

    Call        an operator on this rank's parts
    Local       a change of layout that needs no other rank
    Exchange    begins a change of layout among the ranks of one line of the mesh
    Send        begins sending a tensor to one rank, Receive receiving one
    Finish      waits for what was begun under a number: its results are there from here on
    Free        forgets tensors that nobody will read

A value is a tensor of the graph as it lies on this rank. In the layout that its node gives it has
the tensor's name, `mm_3`, and in any other the layout behind it, `mm_3@[S0, B]`. Each is made once.

What is begun runs by itself: sources may not change or be freed, and results are not there, before
it is finished. An exchange of several moves is a bucket: they travel as one flat buffer. Nobody
but updates and outputs waits for a bucket, and the calls that could only wait for it say so
(`Call.after`): whoever executes the list in its order runs them behind the `Finish`, and whoever
is told that a bucket has come, and all that the list finishes before it, may run them then, in the
midst of backward, in their order.

A step ends by the new values of parameters, buffers and state taking the place of the old:
`Program.renewed` says which input becomes which value. The old one is freed at its last use, so
that both are there only while one is made of the other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from penstock.model.graph import Node, Result, Spec
from penstock.plan.layout import Coordinates, Layout, in_words, line

Box = tuple[tuple[int, int], ...]
"""The range [start, stop) of each dim of a part of a tensor."""

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]


def box_shape(box: Box) -> tuple[int, ...]:
    """Of what lies in it."""
    return tuple(stop - start for start, stop in box)


@dataclass(frozen=True)
class Value:
    """What a name stands for.

    Arguments:
        tensor: of the graph.
        layout: in which.
        spec: of this rank's part.
    """

    tensor: str
    layout: Layout
    spec: Spec


@dataclass(frozen=True)
class Call:
    """Calls an operator.

    Arguments:
        node: as this rank calls it; names in it are values'.
        after: the number of the bucket that this call alone has to wait for; None for one that has
            its place in forward or backward.
    """

    node: Node
    after: int | None = None


@dataclass(frozen=True)
class Local:
    """Makes a value of another without anybody else; a tensor of its own, but for `same`.

    Arguments:
        kind: `same`: the result is the source; `slice`: it is a box of the source; `place`: zeros,
            with the source in a box; `zeros`: zeros.
        box: of the source that is taken, or of the result in which it is put; () for the others.
    """

    kind: Literal["same", "slice", "place", "zeros"]
    source: str
    result: str
    box: Box = ()


@dataclass(frozen=True)
class Move:
    """One tensor of an exchange.

    Arguments:
        source, result: values.
        sends: by rank of the line, the box of the source that goes to it; () where all of it goes
            to all.
        receives: by rank of the line, the box of the result that comes from it; () where the result
            is the sum of what comes.
    """

    source: str
    result: str
    sends: tuple[Box, ...] = ()
    receives: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """Begins a collective of the ranks of a line.

    Arguments:
        number: of what this rank begins, by which it is finished.
        kind: `all_reduce` P to B, `reduce_scatter` P to S, `all_gather` S to B, `all_to_all` S to
            S. It says which of a move's `sends` and `receives` there are.
        axis, ranks: of the mesh; the ranks of the line, in order.
        sequence: of this exchange among those of its line, from 0; the same on all its ranks.
        moves: what travels; of one dtype.
    """

    number: int
    kind: Kind
    axis: int
    ranks: tuple[int, ...]
    sequence: int
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Send:
    """Begins sending a value to a rank.

    Arguments:
        number: by which it is finished.
        peer: the rank.
        sequence: among what goes from this rank to that one, from 0.
    """

    number: int
    source: str
    peer: int
    sequence: int


@dataclass(frozen=True)
class Receive:
    """Begins receiving a value from a rank; see `Send`."""

    number: int
    result: str
    peer: int
    sequence: int


@dataclass(frozen=True)
class Finish:
    """Waits for what was begun under a number."""

    number: int


@dataclass(frozen=True)
class Free:
    """Forgets values. A tensor that the caller or another value holds as well lives on there."""

    names: tuple[str, ...]


Begun = Exchange | Send | Receive
Instruction = Call | Local | Exchange | Send | Receive | Finish | Free


@dataclass(frozen=True)
class Given:
    """What a step gives on a rank.

    Arguments:
        role, target: of the graph's output.
        tensor: its name in the graph.
        value: its name here.
    """

    role: Result
    target: str
    tensor: str
    value: str


@dataclass(frozen=True, eq=False)
class Program:
    """A rank's step.

    Arguments:
        rank, coordinates, sizes: of the rank, where it lies, and in which mesh.
        instructions: in the order in which they are executed.
        values: all that have a name, by name; inputs too.
        inputs: by name of the graph's input, the layout in which it is given.
        outputs: what the step gives, in the graph's order.
        renewed: by input, the value that takes its place at the step's end.
    """

    rank: int
    coordinates: Coordinates
    sizes: tuple[int, ...]
    instructions: tuple[Instruction, ...]
    values: Mapping[str, Value]
    inputs: Mapping[str, Layout]
    outputs: tuple[Given, ...]
    renewed: Mapping[str, str]

    def line(self, axis: int) -> tuple[int, ...]:
        """The ranks that differ from this one along an axis alone, itself among them."""
        return line(self.sizes, axis, self.coordinates)

    def buffer_bytes(self, exchange: Exchange) -> int:
        """Its buffer as `exchange.cost` counts it: what is brought, of an all-gather what all have
        in the end."""
        gathers = exchange.kind == "all_gather"
        names = [move.result if gathers else move.source for move in exchange.moves]
        return sum(self.values[name].spec.num_bytes for name in names)

    def sent_bytes(self, exchange: Exchange) -> int:
        """What this rank sends at least, in the topology `direct`, where every part goes the way
        from who has it to who needs it."""
        p, here = len(exchange.ranks), exchange.ranks.index(self.rank)
        total = 0
        for move in exchange.moves:
            spec = self.values[move.source].spec
            if exchange.kind == "all_reduce":
                # A rank's part of a sum is that of the flat buffer, and goes out again summed.
                total += 2 * (p - 1) * spec.num_bytes // p
            elif exchange.kind == "all_gather":
                total += (p - 1) * spec.num_bytes
            else:
                sizes = (math.prod(box_shape(box)) for box in move.sends)
                total += sum(n for to, n in enumerate(sizes) if to != here) * spec.dtype.itemsize
        return total

    def summary(self) -> dict[str, Any]:
        """The numbers of what it does, as JSON values."""
        exchanges: dict[str, dict[str, int]] = {}
        for item in self.instructions:
            if isinstance(item, Exchange):
                of = exchanges.setdefault(f"axis {item.axis}: {item.kind}", Counter())
                of["number"] += 1
                of["tensors"] += len(item.moves)
                of["buffer_bytes"] += self.buffer_bytes(item)
                of["sent_bytes"] += self.sent_bytes(item)
        kinds = Counter(type(item).__name__.lower() for item in self.instructions)
        phases = Counter(i.node.phase for i in self.instructions if isinstance(i, Call))
        return {
            "rank": self.rank,
            "coordinates": list(self.coordinates),
            "sizes": list(self.sizes),
            "instructions": dict(kinds),
            "calls": dict(phases),
            "exchanges": {key: dict(of) for key, of in exchanges.items()},
            "input_bytes": sum(self.values[name].spec.num_bytes for name in self.inputs),
        }

    def lines(self) -> Iterator[str]:
        """The whole as text, a line for each input, instruction and output."""
        for name, layout in self.inputs.items():
            yield f"     input {name} {self.values[name].spec} of {in_words(layout)}"
        for number, item in enumerate(self.instructions):
            yield f"{number:4} {self.words(item)}"
        for given in self.outputs:
            what = f"{given.role} {given.target}".strip()
            yield f"     {what} <- {given.value} of {in_words(self.values[given.value].layout)}"

    def words(self, item: Instruction) -> str:
        """An instruction as a line of text."""
        match item:
            case Call(node, after):
                results = ", ".join("_" if o is None else self._spec(o) for o in node.outputs)
                behind = "" if after is None else f" (after {after})"
                return f"{node.op}({', '.join(node.inputs)}) -> {results}{behind}"
            case Local(kind, source, result, _):
                return f"{kind} {source} -> {self._spec(result)}"
            case Exchange():
                moves = ", ".join(f"{m.source} -> {self._spec(m.result)}" for m in item.moves)
                return (
                    f"begin {item.number}: {item.kind} {item.sequence} on axis {item.axis} "
                    f"{list(item.ranks)}: {moves}"
                )
            case Send():
                return f"begin {item.number}: send {item.sequence} {item.source} to {item.peer}"
            case Receive():
                result = self._spec(item.result)
                return f"begin {item.number}: receive {item.sequence} {result} from {item.peer}"
            case Finish(number):
                return f"finish {number}"
            case Free(names):
                return f"free {', '.join(names)}"

    def _spec(self, name: str) -> str:
        return f"{name} {self.values[name].spec}" if name in self.values else name
