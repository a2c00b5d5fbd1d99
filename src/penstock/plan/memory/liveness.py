"""What a step holds in memory at each instruction, and where in one arena each tensor can lie.

A storage is alive from the instruction that makes it to the last that reads it or a view of it:

    bytes(i) = resident + sum of size(s) over first(s) <= i <= last(s) + scratch(i)
    peak     = max over i of bytes(i)

Resident is what a step is given: parameters, buffers, state, constants, the batch. Sizes are those
of torch's storages; views have none (`source_of`). Scratch is what an operator takes for itself
and gives back before it returns (see `scratch`).

New values of parameters, buffers and state are written where the old ones are (`in_place`), and
cost nothing; see `Updates` for other ways. Gradients are as other tensors: alive from the node that
makes them to the last that reads them, or to the end if the step gives them.

`pack` gives each storage an offset: one after the other, the largest first, each at the lowest
offset that is free for all its life (greedy by size; Pisarchyk and Lee, "Efficient memory
management for deep neural net inference", 2020, arXiv:2001.03288, section 5.2), and in other orders
where that one leaves gaps.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from penstock.model.graph import Graph, Node, Spec, operator_of, refs
from penstock.plan.memory.scratch import pointwise, scratch_bytes
from penstock.plan.words import in_bytes

Updates = Literal["in_place", "renewed", "apart"]
"""Where a step puts new values of parameters, buffers and state: where the old ones are; in memory
of their own, the old one freed at its last use, as a `Program` does; or beside the old ones, as
`Graph.run` does."""
VIEWS_UNSAID = frozenset({"aten._unsafe_view.default"})
"""Views, though their schemas do not say so."""
ALIGNMENT_BYTES = 64
"""A line of the processor's cache, and what torch aligns its tensors to on the CPU."""
CUDA_BLOCK_BYTES = 512
"""What torch's allocator on CUDA rounds sizes up to (c10/cuda/CUDACachingAllocator.cpp,
kMinBlockSize)."""
GOOD_ENOUGH = 1.01
"""Of the bytes that are held at once, the arena with which the search for a smaller one ends."""


@dataclass(frozen=True)
class Made:
    """A tensor that an instruction makes.

    Arguments:
        name: of the tensor.
        num_bytes: of its storage.
        source: the tensor whose storage it shares, if it is a view or written in that one's place.
    """

    name: str
    num_bytes: int
    source: str | None = None


@dataclass(frozen=True)
class Event:
    """What an instruction is to memory.

    Arguments:
        name, module: of the instruction, for people.
        reads: names of tensors. Where a program frees tensors by instructions of their own, what
            such an instruction frees is what it reads.
        makes: tensors.
        scratch_bytes: what it takes for itself.
    """

    name: str
    reads: Sequence[str]
    makes: Sequence[Made]
    module: str = ""
    scratch_bytes: int = 0


@dataclass(frozen=True)
class Storage:
    """Memory of a tensor and of all views of it.

    Arguments:
        name: of the tensor that it was made for.
        num_bytes: of it.
        module: whose tensor it is.
        first, last: numbers of the instructions that make it and that read it last.
    """

    name: str
    num_bytes: int
    module: str
    first: int
    last: int

    def __str__(self) -> str:
        of = f" of {self.module}" if self.module else ""
        return f"{self.name}{of}, {in_bytes(self.num_bytes)}"


@dataclass(frozen=True)
class Peak:
    """The instruction at which most memory is held.

    Arguments:
        num_bytes: held there, with what is resident and with its own scratch.
        instruction, name, module: of the instruction.
        storages: alive there, the largest first, resident ones among them.
    """

    num_bytes: int
    instruction: int
    name: str
    module: str
    storages: tuple[Storage, ...]


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """From when to when each storage of a program is alive.

    Arguments:
        events: the instructions.
        storages: that instructions make, in the order in which they do.
        resident: there before the first instruction and after the last.
    """

    events: tuple[Event, ...]
    storages: tuple[Storage, ...]
    resident: tuple[Storage, ...]

    @classmethod
    def of_events(
        cls,
        events: Iterable[Event],
        resident: Mapping[str, int],
        kept: Iterable[str] = (),
        block_bytes: int = 1,
        given: Mapping[str, int] | None = None,
    ) -> Lifetimes:
        """From a program.

        Arguments:
            events: its instructions, in order.
            resident: bytes by name, of what is there before and after it.
            kept: names of tensors that are alive to its end, as what it gives is.
            block_bytes: sizes are rounded up to multiples of it.
            given: bytes by name, of what is there before it and freed at its last use.

        Raises:
            KeyError: a tensor is read before it is made.
        """
        events = tuple(events)
        given = given or {}
        root = {name: name for name in (*resident, *given)}
        born = {name: (num_bytes, 0) for name, num_bytes in given.items()}  # bytes, instruction
        last = dict.fromkeys(given, len(events) - 1)
        for number, event in enumerate(events):
            for name in event.reads:
                last[root[name]] = number
            for made in event.makes:
                if made.source is None:
                    root[made.name] = made.name
                    born[made.name] = made.num_bytes, number
                else:
                    root[made.name] = root[made.source]
                last[root[made.name]] = number
        for name in kept:
            last[root[name]] = len(events) - 1

        def rounded(num_bytes: int) -> int:
            return -(-num_bytes // block_bytes) * block_bytes

        return cls(
            events,
            tuple(
                Storage(name, rounded(num_bytes), events[at].module, at, last[name])
                for name, (num_bytes, at) in born.items()
            ),
            tuple(
                Storage(name, rounded(num_bytes), "", 0, len(events) - 1)
                for name, num_bytes in resident.items()
            ),
        )

    @classmethod
    def of_graph(
        cls,
        graph: Graph,
        updates: Updates = "in_place",
        scratch: Callable[[Node, Mapping[str, Spec]], int] = scratch_bytes,
        block_bytes: int = 1,
        specs: Mapping[str, Spec] | None = None,
    ) -> Lifetimes:
        """Of a step by one process.

        Arguments:
            graph: the step.
            updates: where new values are put.
            scratch: bytes that a node takes for itself.
            block_bytes: sizes are rounded up to multiples of it: `CUDA_BLOCK_BYTES` on CUDA.
            specs: of a rank's parts of the tensors; the graph's own if None.
        """
        specs = graph.specs if specs is None else specs
        places = in_place(graph) if updates == "in_place" else {}
        events = []
        for node in graph.nodes:
            source = source_of(node)
            makes = tuple(
                Made(name, specs[name].num_bytes, places.get(name, source))
                for name in node.outputs
                if name is not None
            )
            taken = scratch(node, specs)
            events.append(Event(node.name, node.inputs, makes, node.module, taken))
        resident = {item.name: specs[item.name].num_bytes for item in graph.inputs}
        kept = [output.name for output in graph.outputs]
        renewed = set(renewals(graph).values()) if updates == "renewed" else set()
        given = {name: resident.pop(name) for name in renewed - {*kept}}
        return cls.of_events(events, resident, kept, block_bytes, given)

    @functools.cached_property
    def resident_bytes(self) -> int:
        return sum(storage.num_bytes for storage in self.resident)

    @functools.cached_property
    def timeline(self) -> NDArray[np.int64]:
        """Bytes held during each instruction, with what is resident and with scratch."""
        scratch = np.array([event.scratch_bytes for event in self.events], np.int64)
        return _held(self.storages, len(self.events)) + scratch + self.resident_bytes

    @functools.cached_property
    def peak_bytes(self) -> int:
        """With what is resident."""
        return int(self.timeline.max(initial=self.resident_bytes))

    @functools.cached_property
    def peak(self) -> Peak:
        """The first instruction at which most is held. There is at least one instruction."""
        at = int(self.timeline.argmax())
        alive = [s for s in self.storages if s.first <= at <= s.last]
        ordered = sorted([*alive, *self.resident], key=lambda s: (-s.num_bytes, s.name))
        event = self.events[at]
        return Peak(self.peak_bytes, at, event.name, event.module, tuple(ordered))


@functools.cache
def _viewed(op: str) -> int | str | None:
    """Which argument's storage an operator's results share: by position, by name, or none."""
    if op in VIEWS_UNSAID:
        return 0
    schema = getattr(operator_of(op), "_schema", None)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and not argument.alias_info.is_write:
            return argument.name if argument.kwarg_only else position
    return None


def source_of(node: Node) -> str | None:
    """The tensor whose storage the results of a node share; None if they have storages of their
    own."""
    viewed = _viewed(node.op)
    if viewed is None:
        return None
    arguments = node.args[viewed] if isinstance(viewed, int) else node.kwargs[viewed]
    return next(refs(arguments)).name


def roots(graph: Graph) -> dict[str, str]:
    """Of every tensor, the one that its storage was made for; views are of their source's."""
    found = {item.name: item.name for item in graph.inputs}
    for node in graph.nodes:
        source = source_of(node)
        for name in node.outputs:
            if name is not None:
                found[name] = name if source is None else found[source]
    return found


def renewals(graph: Graph) -> dict[str, str]:
    """New values that a step computes: the new one's name -> the old one's."""
    return {
        output.name: graph.input(output.role, output.target).name
        for output in graph.outputs
        if output.role in ("parameter", "buffer", "state") and output.name in graph.producer
    }


def in_place(graph: Graph) -> dict[str, str]:
    """Of `renewals`, those that can be written where the old values are.

    So can be what a pointwise operator gives, or one that does not read the old value, if nobody
    reads the old value later.
    """
    root = roots(graph)
    last = {root[name]: n for n, node in enumerate(graph.nodes) for name in node.inputs}
    number = {node.name: n for n, node in enumerate(graph.nodes)}
    found: dict[str, str] = {}
    for new, old in renewals(graph).items():
        if root[new] != new:
            continue
        node, _ = graph.producer[new]
        at, read = number[node.name], last.get(old, -1)
        views = any(root[name] == old != name for name in node.inputs)
        if read < at or (read == at and pointwise(node.op) and not views):
            found[new] = old
    return found


@dataclass(frozen=True, eq=False)
class Packed:
    """Where storages lie in one arena.

    Arguments:
        offsets: bytes from the arena's begin, by name of the storage.
        arena_bytes: size of the arena.
    """

    offsets: Mapping[str, int]
    arena_bytes: int

    def check(self, lifetimes: Lifetimes) -> None:
        """That no two storages that are alive at once overlap, and all lie in the arena.

        Raises:
            ValueError: names two that do, or one that does not.
        """
        births: dict[int, list[Storage]] = {}
        deaths: dict[int, list[Storage]] = {}
        for storage in filter(lambda s: s.num_bytes, lifetimes.storages):
            births.setdefault(storage.first, []).append(storage)
            deaths.setdefault(storage.last, []).append(storage)
        alive: list[tuple[int, int, str]] = []  # begin, end, name: by begin, disjoint
        for number in range(len(lifetimes.events)):
            for storage in births.get(number, ()):
                begin = self.offsets[storage.name]
                entry = begin, begin + storage.num_bytes, storage.name
                if begin < 0 or entry[1] > self.arena_bytes:
                    raise ValueError(f"{storage} does not lie in the arena of {self.arena_bytes}")
                at = bisect.bisect(alive, entry)
                for other in alive[max(at - 1, 0) : at + 1]:
                    if other[0] < entry[1] and entry[0] < other[1]:
                        raise ValueError(f"{storage.name} and {other[2]} overlap at {number}")
                alive.insert(at, entry)
            for storage in deaths.get(number, ()):
                begin = self.offsets[storage.name]
                alive.remove((begin, begin + storage.num_bytes, storage.name))


def pack(lifetimes: Lifetimes, alignment_bytes: int = ALIGNMENT_BYTES) -> Packed:
    """Offsets in one arena for what instructions make; what is resident lies elsewhere.

    Of several orders of placing the one with the smallest arena is taken.
    """
    sizes = {
        storage: -(-storage.num_bytes // alignment_bytes) * alignment_bytes
        for storage in lifetimes.storages
        if storage.num_bytes
    }
    orders: list[Callable[[Storage], tuple[float, ...]]] = [
        lambda s: (-sizes[s], s.first),
        lambda s: (-sizes[s] * (s.last - s.first + 1), s.first),
        lambda s: (s.first - s.last, -sizes[s], s.first),
        lambda s: (s.first, -sizes[s]),
    ]
    best: Packed | None = None
    needed = int(_held(lifetimes.storages, len(lifetimes.events)).max(initial=0))
    for order in orders:
        packed = _placed(sorted(sizes, key=order), sizes)
        if best is None or packed.arena_bytes < best.arena_bytes:
            best = packed
        if best.arena_bytes <= GOOD_ENOUGH * needed:
            break
    assert best is not None
    return best


def _placed(order: Sequence[Storage], sizes: Mapping[Storage, int]) -> Packed:
    # Those that have been placed, by offset, so that one sweep finds a gap.
    begin, end, first, last = (np.zeros(len(order), np.int64) for _ in range(4))
    offsets: dict[str, int] = {}
    for count, storage in enumerate(order):
        together = (first[:count] <= storage.last) & (last[:count] >= storage.first)
        free_from = np.maximum.accumulate(np.append(0, end[:count][together]))
        gaps = np.append(begin[:count][together], np.iinfo(np.int64).max) - free_from
        offset = int(free_from[np.argmax(gaps >= sizes[storage])])
        offsets[storage.name] = offset
        at = int(np.searchsorted(begin[:count], offset, "right"))
        for column, value in zip(
            (begin, end, first, last),
            (offset, offset + sizes[storage], storage.first, storage.last),
        ):
            column[at + 1 : count + 1] = column[at:count]
            column[at] = value
    return Packed(offsets, int(end.max(initial=0)))


def _held(storages: Iterable[Storage], num_instructions: int) -> NDArray[np.int64]:
    """Bytes of storages alive at each instruction."""
    change = np.zeros(num_instructions + 1, np.int64)
    for storage in storages:
        change[storage.first] += storage.num_bytes
        change[storage.last + 1] -= storage.num_bytes
    held: NDArray[np.int64] = np.cumsum(change[:-1])
    return held
