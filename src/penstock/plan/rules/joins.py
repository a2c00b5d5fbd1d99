"""Cells that are best split together become one.

    updates     what updates one parameter, with the state that nothing else reads
    views       a view with whatever alone reads it, where it is no smaller than what it is of: a
                route behind it could as well stand before it; and likewise with whatever gives
                what it alone reads, where it is no larger

Between joined cells there is no route: they choose one layout for what is between them. A view is
joined only if all layouts that were possible at its other end remain so. Of the choices of a joined
cell with the same layouts at all ports, the cheapest remains, and those that hold less memory.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.model.graph import Spec
from penstock.plan.layout import Layout
from penstock.plan.rules.formula import Signature

Combination = tuple[Signature, ...]
"""Of a node: a signature for each axis of the mesh."""


@dataclass(frozen=True)
class Choice:
    """One way to split a cell.

    Arguments:
        reads, gives: a layout for each port, and for each value given.
        time_s, hides_s: of its operators; of those of them that late exchanges can go on beside,
            which are backward's and updates'.
        held_bytes: memory on the rank with most of it: parameters, gradients, state, and
            activations that backward reads.
        members: by member of the cell, its layout if it is an input, else its combination.
    """

    reads: tuple[Layout, ...]
    gives: tuple[Layout, ...]
    time_s: float
    hides_s: float
    held_bytes: float
    members: tuple[Layout | Combination, ...]


@dataclass(frozen=True, eq=False)
class Cell:
    """What is split as one.

    Arguments:
        members: names of nodes and inputs.
        reads, gives: names of values, by port and by place.
        choices: at least one.
        key: equal for cells that are alike apart from names; they have the same choices.
        is_update: whether all members are nodes of the update, or state.
        is_input: whether it is an input, whose reads are for the next step.
        is_view: whether it computes nothing.
    """

    members: tuple[str, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    choices: tuple[Choice, ...]
    key: str
    is_update: bool = False
    is_input: bool = False
    is_view: bool = False


def joined(cells: Sequence[Cell], specs: Mapping[str, Spec]) -> tuple[Cell, ...]:
    """The cells after all joins, in an order in which each comes after those whose values it
    reads; inputs come first.

    Arguments:
        cells: in such an order.
        specs: of values.
    """
    net = _Net(cells, specs)
    net.join_updates()
    net.join_views()
    return net.ordered()


class _Net:
    """Cells, who gives what and who reads it."""

    def __init__(self, cells: Sequence[Cell], specs: Mapping[str, Spec]) -> None:
        self._specs = specs
        self._cells: dict[int, Cell] = {}
        self._giver: dict[str, int] = {}
        self._readers: dict[str, dict[int, None]] = {}
        self._next = 0
        self._place = {name: k for k, cell in enumerate(cells) for name in cell.members}
        self._choices: dict[str, tuple[Choice, ...]] = {}
        for cell in cells:
            self._add(cell)

    def _add(self, cell: Cell) -> int:
        number, self._next = self._next, self._next + 1
        self._cells[number] = cell
        for name in cell.gives:
            self._giver[name] = number
        for name in cell.reads:
            self._readers.setdefault(name, {})[number] = None
        return number

    def _remove(self, number: int) -> None:
        for name in self._cells.pop(number).reads:
            self._readers[name].pop(number, None)

    def _readers_of(self, name: str) -> list[int]:
        return list(self._readers.get(name, ()))

    def join_updates(self) -> None:
        """Each node of the update with all of the update that it reads from, and with state."""
        for number, cell in list(self._cells.items()):
            if number not in self._cells or not cell.is_update or cell.is_input:
                continue
            while (source := self._update_before(number)) is not None:
                number = self._join(source, number)

    def _update_before(self, number: int) -> int | None:
        for name in self._cells[number].reads:
            source = self._giver[name]
            cell = self._cells[source]
            if source != number and cell.is_update:
                readers = [self._cells[r] for given in cell.gives for r in self._readers_of(given)]
                if all(reader.is_update or reader.is_input for reader in readers):
                    return source
        return None

    def join_views(self) -> None:
        """Each view with its one reader, or with its giver whose one reader it is."""
        waiting = [number for number, cell in self._cells.items() if cell.is_view]
        while waiting:
            number = waiting.pop()
            if number not in self._cells:
                continue
            pair = self._reader_to_join(number) or self._giver_to_join(number)
            if pair:
                new = self._join(*pair)
                if self._cells[new].is_view:
                    waiting.append(new)

    def _reader_to_join(self, number: int) -> tuple[int, int] | None:
        view = self._cells[number]
        if len(view.reads) != 1 or len(view.gives) != 1:
            return None
        (value,) = view.gives
        readers = self._readers_of(value)
        if len(readers) != 1 or self._bytes(value) < self._bytes(view.reads[0]):
            return None
        reader = self._cells[readers[0]]
        ports = [k for k, name in enumerate(reader.reads) if name == value]
        asked = [{choice.reads[k] for k in ports} for choice in reader.choices]
        given = {choice.gives[0] for choice in view.choices}
        if reader.is_input or not reader.members or reader.is_update != view.is_update:
            return None  # Of updates nobody waits for a route, and of views before them somebody.
        if any(len(layouts) > 1 or not layouts <= given for layouts in asked):
            return None
        return number, readers[0]

    def _giver_to_join(self, number: int) -> tuple[int, int] | None:
        view = self._cells[number]
        if len(view.reads) != 1 or len(view.gives) != 1:
            return None
        (value,) = view.reads
        if len(self._readers_of(value)) != 1 or self._bytes(view.gives[0]) > self._bytes(value):
            return None
        giver = self._cells[self._giver[value]]
        place = giver.gives.index(value)
        readable = {choice.reads[0] for choice in view.choices}
        if giver.is_input or giver.is_update != view.is_update:
            return None
        if any(choice.gives[place] not in readable for choice in giver.choices):
            return None
        return self._giver[value], number

    def _bytes(self, name: str) -> int:
        return self._specs[name].num_bytes

    def _join(self, first: int, second: int) -> int:
        one, two = self._cells[first], self._cells[second]
        gives = one.gives + two.gives
        reads = one.reads + two.reads
        place = {name: k for k, name in enumerate(gives)}
        kept_gives = [
            k
            for k, name in enumerate(gives)
            if any(reader not in (first, second) for reader in self._readers_of(name))
        ]
        kept_reads = [k for k, name in enumerate(reads) if name not in place]
        inner = [(k, place[name]) for k, name in enumerate(reads) if name in place]
        first_read: dict[str, int] = {}
        same = [first_read.setdefault(name, k) for k, name in enumerate(reads)]
        wiring = f"{one.key}|{two.key}|{kept_gives}|{inner}|{same}"
        key = hashlib.blake2b(wiring.encode(), digest_size=16).hexdigest()
        if key not in self._choices:
            self._choices[key] = _choices(one, two, kept_reads, kept_gives, inner)
        choices = self._choices[key]
        if not choices:
            names = ", ".join(one.members + two.members)
            raise AssertionError(f"no layout suits all of {names}: there is one of B alone")
        ports = _different(kept_reads, same, choices)
        if len(ports) < len(kept_reads):
            choices = self._choices.setdefault(
                f"{key} {ports}",
                tuple(replace(c, reads=tuple(c.reads[k] for k in ports)) for c in choices),
            )
        new = Cell(
            one.members + two.members,
            tuple(reads[kept_reads[k]] for k in ports),
            tuple(gives[k] for k in kept_gives),
            choices,
            key,
            is_update=one.is_update and two.is_update,
            is_view=one.is_view and two.is_view,
        )
        self._remove(first)
        self._remove(second)
        return self._add(new)

    def ordered(self) -> tuple[Cell, ...]:
        """All, inputs first, then as they depend on each other, else in the order given."""
        last = len(self._place)
        rank = {
            k: max((self._place[name] for name in cell.members), default=last)
            for k, cell in self._cells.items()
        }
        needs: dict[int, int] = {}
        feeds: dict[int, list[int]] = {}
        for number, cell in self._cells.items():
            before = {self._giver[name] for name in cell.reads} - {number}
            before = set() if cell.is_input else before
            needs[number] = len(before)
            for source in before:
                feeds.setdefault(source, []).append(number)
        ready = [
            (not self._cells[k].is_input, rank[k], k) for k, missing in needs.items() if not missing
        ]
        heapq.heapify(ready)
        found = []
        while ready:
            *_, number = heapq.heappop(ready)
            found.append(self._cells[number])
            for reader in feeds.get(number, ()):
                needs[reader] -= 1
                if not needs[reader]:
                    heapq.heappush(ready, (True, rank[reader], reader))
        assert len(found) == len(self._cells), "cells read each other's values in a circle"
        return tuple(found)


def _choices(
    one: Cell,
    two: Cell,
    kept_reads: Sequence[int],
    kept_gives: Sequence[int],
    inner: Sequence[tuple[int, int]],
) -> tuple[Choice, ...]:
    """All pairs that agree on what is between them, without those that others make needless.

    Arguments:
        kept_reads, kept_gives: numbers of ports and values, counted through both cells.
        inner: a port, and the value of the two that it reads.
    """
    reads, gives = len(one.reads), len(one.gives)
    between = [(k, g) for k, g in inner if (k < reads) != (g < gives)]

    def side(choice: Choice, is_first: bool) -> tuple[Layout, ...]:
        found = []
        for k, g in between:
            if (k < reads) == is_first:
                found.append(choice.reads[k if is_first else k - reads])
            else:
                found.append(choice.gives[g if is_first else g - gives])
        return tuple(found)

    mates: dict[tuple[Layout, ...], list[Choice]] = {}
    for choice in two.choices:
        mates.setdefault(side(choice, False), []).append(choice)
    found: dict[object, list[Choice]] = {}
    for left in one.choices:
        for right in mates.get(side(left, True), ()):
            all_reads, all_gives = left.reads + right.reads, left.gives + right.gives
            if any(all_reads[k] != all_gives[g] for k, g in inner):
                continue
            choice = Choice(
                tuple(all_reads[k] for k in kept_reads),
                tuple(all_gives[k] for k in kept_gives),
                left.time_s + right.time_s,
                left.hides_s + right.hides_s,
                left.held_bytes + right.held_bytes,
                left.members + right.members,
            )
            found.setdefault((choice.reads, choice.gives), []).append(choice)
    return tuple(choice for alike in found.values() for choice in undominated(alike))


def undominated(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no other beats in both time and memory; of equal ones the first."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.time_s, c.held_bytes)):
        if not found or choice.held_bytes < found[-1].held_bytes:
            found.append(choice)
    return found


def _different(
    kept_reads: Sequence[int], same: Sequence[int], choices: Sequence[Choice]
) -> list[int]:
    """The ports without those that read the same value in the same layout as an earlier one."""
    found: list[int] = []
    for k, port in enumerate(kept_reads):
        twins = [other for other in found if same[kept_reads[other]] == same[port]]
        if not any(all(c.reads[k] == c.reads[other] for c in choices) for other in twins):
            found.append(k)
    return found
