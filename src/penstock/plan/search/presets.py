"""Known ways to split a network, made by the search's own cells and prices, to compare with.

    data_parallel   the batch S0 on all axes, parameters B; gradients are added up everywhere
    zero            the same, but parameters and state S: parameters are gathered for use, gradients
                    reduced to where their parameters lie (Rajbhandari et al. 2020,
                    arXiv:1910.02054, stage 3)
    megatron        on the last axis the matrices S, by columns or rows as suits what comes in, so
                    that sums are added up once for every two, and the loss taken from logits that
                    lie split by class; on the other axes data parallel (Shoeybi et al. 2019,
                    arXiv:1909.08053)

From the inputs on, each cell in order takes the choice that costs least with the routes to it. Of
routes only those are made that these ways have: sums are completed, and what is split is gathered;
what is computed on copies is not cut again. Where a graph leaves nothing else, a cell is copied, so
that every preset is there for every graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from penstock.plan.layout import B, Layout, P, Placement, S, possible
from penstock.plan.rules.joins import Cell, Choice
from penstock.plan.search.cells import Cells, Prices, assignment_of
from penstock.plan.search.price import price

Preset = Literal["data_parallel", "zero", "megatron"]
PRESETS: tuple[Preset, ...] = get_args(Preset)


def preset(name: Preset, cells: Cells, prices: Prices) -> tuple[int, ...]:
    """By cell, the number of its choice."""
    if name == "data_parallel":
        return _Greedy(cells, prices, _data_parallel(cells)).choices()
    if name == "zero":
        return _Greedy(cells, prices, _zero(cells, prices)).choices()
    # Tables of embeddings may be split as the matrices are, by rows, or not.
    tables, none = _tables(cells), frozenset[str]()
    ways = [
        _Greedy(cells, prices, _megatron(cells), by_matrix=True).choices(),
        _Greedy(cells, prices, _megatron(cells, tables, B), tables, by_matrix=True).choices(),
        _Greedy(
            cells, prices, _megatron(cells, tables, S(0)), none, by_matrix=True, by_row=True
        ).choices(),
    ]

    def step_s(chosen: tuple[int, ...]) -> float:
        assignment = assignment_of(cells, chosen, prices.sizes)
        return price(cells.graph, assignment, prices).step_s

    return min(ways, key=step_s)


_MATRIX = ("aten.mm", "aten.bmm", "aten.addmm", "aten.convolution", "aten.embedding")
"""Operators whose parameters are matrices that can be split."""

Wanted = Callable[[Layout], int]
"""How much a layout of an input is wanted; the least is taken, and several may be the least."""


def _roles(cells: Cells) -> dict[str, str]:
    return {item.name: item.role for item in cells.graph.inputs}


def _data_parallel(cells: Cells) -> dict[str, Wanted]:
    def by_batch(layout: Layout) -> int:
        return sum(p != S(0) for p in layout)

    def copied(layout: Layout) -> int:
        return sum(p != B for p in layout)

    return {n: by_batch if role == "data" else copied for n, role in _roles(cells).items()}


def _zero(cells: Cells, prices: Prices) -> dict[str, Wanted]:
    found = _data_parallel(cells)
    for name, role in _roles(cells).items():
        if role == "parameter":
            found[name] = _sharded(cells.graph.specs[name].shape, prices.sizes)
    return found


def _sharded(shape: Sequence[int], sizes: Sequence[int]) -> Wanted:
    """Split on as many axes as can be, if possible along one dim and evenly."""

    def order(layout: Layout) -> tuple[int, int, bool, Layout]:
        dims = {p.dim for p in layout if p.is_split}
        even = all(shape[dim] % math.prod(sizes) == 0 for dim in dims)
        return sum(p == B for p in layout), len(dims), not even, layout

    ways = itertools.product((B, *map(S, range(len(shape)))), repeat=len(sizes))
    best = min((way for way in ways if possible(shape, way, sizes)), key=order)
    return lambda layout: int(layout != best)


def _tables(cells: Cells) -> frozenset[str]:
    """Parameters in which rows are looked up."""
    nodes = cells.graph.nodes
    return frozenset(node.inputs[0] for node in nodes if node.op == "aten.embedding.default")


def _megatron(
    cells: Cells, tables: frozenset[str] = frozenset(), within: Placement = B
) -> dict[str, Wanted]:
    """Tables lie so on the last axis."""

    def by_batch(layout: Layout) -> int:
        return sum(p != S(0) for p in layout[:-1]) + (layout[-1] != B)

    def copied(layout: Layout) -> int:
        return sum(p != B for p in layout)

    def free(layout: Layout) -> int:
        return sum(p != B for p in layout[:-1])

    def as_table(layout: Layout) -> int:
        return free(layout) + (layout[-1] != within)

    of_role = {"data": by_batch, "parameter": free}
    return {
        name: as_table if name in tables else of_role.get(role, copied)
        for name, role in _roles(cells).items()
    }


@dataclass
class _Lying:
    """Where a value is: what it is given in, and the layouts that routes have brought it to.

    One that costs nothing, and that nobody has read yet, may still be given in several.
    """

    open: dict[Layout, int] = field(default_factory=dict)
    given: Layout | None = None
    there: set[Layout] = field(default_factory=set)


class _Greedy:
    """Takes cell after cell.

    Arguments:
        wanted: by input, which layouts.
        tables: inputs that are copied, and by which products of cut activations may be taken.
        by_matrix: whether a cell prefers to split a parameter's matrix on the last axis.
        by_row: whether a cell prefers to give the gradient of a table's rows split so.
    """

    def __init__(
        self,
        cells: Cells,
        prices: Prices,
        wanted: Mapping[str, Wanted],
        tables: frozenset[str] = frozenset(),
        *,
        by_matrix: bool = False,
        by_row: bool = False,
    ) -> None:
        self._cells, self._prices, self._wanted = cells, prices, wanted
        self._by_matrix, self._by_row = by_matrix, by_row
        self._roles = _roles(cells)
        self._ops = {node.name: node.op.rpartition(".")[0] for node in cells.graph.nodes}
        self._chosen: dict[int, int] = {}
        self._giver = {
            name: (k, at)
            for k, cell in enumerate(cells.cells)
            for at, name in enumerate(cell.gives)
        }
        self._lying: dict[str, _Lying] = {}
        self._from_matrix: set[str] = set()
        self._of_tables = set(tables)
        self._of_inputs = {name for name, role in self._roles.items() if role != "data"}
        self._of_parameters = {name for name, role in self._roles.items() if role == "parameter"}
        self._next = {
            name: cell.members[0] for cell in cells.cells if cell.is_input for name in cell.reads
        }

    def choices(self) -> tuple[int, ...]:
        for k, cell in enumerate(self._cells.cells):
            if cell.reads and not cell.is_input:
                for derived in (self._of_inputs, self._of_parameters, self._of_tables):
                    if derived.issuperset(cell.reads):
                        derived.update(cell.gives)
            if cell.is_input:
                self._open(k, [c.gives[0] for c in cell.choices], self._wanted[cell.members[0]])
            elif not self._is_open(cell):
                self._take(k, self._best(cell))
            elif cell.gives:
                self._open(k, [c.gives[0] for c in cell.choices], lambda _: 0)
        for k, cell in enumerate(self._cells.cells):
            if k not in self._chosen:
                # Nobody has read it, or it may lie in any way.
                lying = self._lying[cell.gives[0]]
                self._settle(cell.gives[0], min(lying.open, key=_copies))
        return tuple(self._chosen[k] for k in range(len(self._cells.cells)))

    def _is_open(self, cell: Cell) -> bool:
        """Whether it costs nothing, and depends on nothing that is settled."""
        if len(cell.gives) != 1 or (cell.reads and any(c.time_s for c in cell.choices)):
            return False
        return all(self._lying[name].open for name in cell.reads)

    def _open(self, k: int, layouts: Sequence[Layout], wanted: Wanted) -> None:
        cell = self._cells.cells[k]
        least = min(map(wanted, layouts))
        lying = _Lying()
        for number, layout in enumerate(layouts):
            reads = () if cell.is_input else cell.choices[number].reads
            fits = all(a in self._lying[read].open for read, a in zip(cell.reads, reads))
            if wanted(layout) == least and layout not in lying.open and fits:
                lying.open[layout] = number
        name = cell.gives[0]
        if not lying.open:
            self._lying[name] = _Lying()
            self._take(k, self._best(cell))
            return
        self._lying[name] = lying
        shape = self._cells.graph.specs[name].shape
        is_matrix = cell.is_input and self._roles[cell.members[0]] == "parameter"
        if len(shape) >= 2 and (is_matrix or self._from_matrix.intersection(cell.reads)):
            self._from_matrix.add(name)
        if len(lying.open) == 1:
            self._settle(name, next(iter(lying.open)))

    def _settle(self, name: str, layout: Layout) -> None:
        """Has an open value given in a layout."""
        k, at = self._giver[name]
        lying = self._lying[name]
        number = lying.open[layout]
        cell = self._cells.cells[k]
        self._chosen[k] = number
        lying.open, lying.given = {}, cell.choices[number].gives[at]
        lying.there.add(layout)
        if not cell.is_input:
            for read, asked in zip(cell.reads, cell.choices[number].reads, strict=True):
                self._bring(read, asked)

    def _bring(self, name: str, asked: Layout) -> None:
        lying = self._lying[name]
        if lying.open:
            self._settle(name, asked if asked in lying.open else self._nearest(name, asked)[1])
        lying.there.add(asked)

    def _nearest(self, name: str, asked: Layout) -> tuple[float, Layout]:
        """Of the layouts in which an open value may lie, that with the cheapest route."""
        spec = self._cells.graph.specs[name]
        return min((self._prices.way_s(spec, a, asked), a) for a in self._lying[name].open)

    def _take(self, k: int, number: int) -> None:
        cell = self._cells.cells[k]
        choice = cell.choices[number]
        self._chosen[k] = number
        for name, asked in zip(cell.reads, choice.reads, strict=True):
            self._bring(name, asked)
        for name, layout in zip(cell.gives, choice.gives, strict=True):
            self._lying[name] = _Lying({}, layout, {layout})

    def _best(self, cell: Cell) -> int:
        numbers = range(len(cell.choices))
        for allowed in (self._is_batchwise, self._is_usual, self._is_feasible):
            fitting = [n for n in numbers if allowed(cell, cell.choices[n])]
            if fitting:
                break
        if self._by_matrix and self._has(cell, *_MATRIX):
            split = [n for n in fitting if self._splits_matrix(cell, cell.choices[n])]
            fitting = split or fitting
        if self._by_row and self._has(cell, "aten.embedding_dense_backward"):
            rows = [n for n in fitting if all(to[-1] == S(0) for to in cell.choices[n].gives)]
            fitting = rows or fitting
        return min(fitting, key=lambda n: (self._cost(cell, cell.choices[n]), n))

    def _has(self, cell: Cell, *ops: str) -> bool:
        return any(self._ops.get(name) in ops for name in cell.members)

    def _splits_matrix(self, cell: Cell, choice: Choice) -> bool:
        return any(
            name in self._from_matrix and self._lying[name].open and asked[-1].is_split
            for name, asked in zip(cell.reads, choice.reads, strict=True)
        )

    def _is_batchwise(self, cell: Cell, choice: Choice) -> bool:
        """Whether, besides, on the axes that split the batch parameters are whole where they are
        used, and nothing else is gathered."""
        axes = len(self._prices.sizes) - self._by_matrix
        for name, asked in zip(cell.reads, choice.reads, strict=True):
            given = self._lying[name].given
            if given is None or cell.is_update:
                continue
            if name in self._of_inputs:
                copied = all(p == B for p in asked[:axes])
                if name in self._of_parameters and not cell.is_view and not copied:
                    return False
                continue
            if any(a.is_split and a != b for a, b in zip(given[:axes], asked[:axes])):
                return False
        return self._is_usual(cell, choice)

    def _is_usual(self, cell: Cell, choice: Choice) -> bool:
        beside_table = not self._of_tables.isdisjoint(cell.reads)
        may_cut = cell.is_update or (beside_table and self._has(cell, "aten.mm"))
        given = [self._lying[name].given for name in cell.reads]
        for name, lies, asked in zip(cell.reads, given, choice.reads, strict=True):
            lying = self._lying[name]
            if lies is None:
                if asked not in lying.open:
                    return False
                continue
            role = self._roles.get(name)
            if cell.is_update and role == "parameter" and asked != lies:
                return False
            if asked in lying.there or may_cut or role == "constant":
                continue
            for axis, (a, b) in enumerate(zip(lies, asked, strict=True)):
                if a.is_split and b == P:
                    return False
                # Cut is what was whole only to go with what is split.
                if b.is_split and (a == P or (a == B and not _splits(given, axis))):
                    return False
        return self._is_feasible(cell, choice)

    def _is_feasible(self, cell: Cell, choice: Choice) -> bool:
        return self._cost(cell, choice) < math.inf

    def _cost(self, cell: Cell, choice: Choice) -> float:
        specs = self._cells.graph.specs
        cost_s = choice.time_s
        for name, asked in zip(cell.reads, choice.reads, strict=True):
            lying = self._lying[name]
            if lying.open:
                cost_s += 0.0 if asked in lying.open else self._nearest(name, asked)[0]
            elif asked not in lying.there:
                assert lying.given is not None
                cost_s += self._prices.way_s(specs[name], lying.given, asked)
        for name, layout in zip(cell.gives, choice.gives, strict=True):
            if name in self._next:
                old = self._lying[self._next[name]].given
                if old is not None:
                    cost_s += self._prices.way_s(specs[name], layout, old)
        return cost_s


def _splits(layouts: Sequence[Layout | None], axis: int) -> bool:
    return any(layout is not None and layout[axis].is_split for layout in layouts)


def _copies(layout: Layout) -> int:
    return sum(p != B for p in layout)
