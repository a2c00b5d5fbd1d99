"""The choice of all cells at once, as an integer program for HiGHS.

Variables, for a class u of tied cells of which there are n_u, and a value v of n_v alike:

    x[u, c]         1 if u takes choice c                                                   binary
    z[v, r, a, b]   1 if v, given in layout a, is read in b by reader r                 continuous
    y[v, a, b]      1 if v's route from a to b is made, for readers that wait for it    continuous
    l[v, a, b]      1 if it is made for late readers alone                              continuous
    e               seconds of late routes that nothing hides                           continuous

    minimize    sum n_u time(u, c) x[u, c]  +  sum n_v way(v, a, b) y[v, a, b]  +  e

    one choice  sum over c of x[u, c] = 1
    flow out    sum over b of z[v, r, a, b] = sum of x[giver of v, c] over c giving v in a
    flow in     sum over a of z[v, r, a, b] = sum of x[r, c] over c reading v in b
    shared      y[v, a, b] >= z[v, r, a, b]                         r waits
                y[v, a, b] + l[v, a, b] >= z[v, r, a, b]            r is late
    overlap     e >= late - hides
                late  = sum n_v way(v, a, b) l[v, a, b]
                hides = beside sum n_u (backward and updates of u, c) x[u, c]
    memory      sum n_u held(u, c) x[u, c] + bytes of routed inputs and views <= memory of a rank

Late readers are updates and the next step: what they wait for, exchanges of gradients above all,
goes on beside what is computed meanwhile. But for what updates themselves give: it is exchanged
when there is nothing left to compute, and counts in full.

With flows, the relaxation without the overlap is nearly always integral (with covering constraints
it is far from it), and they are whole if x is. The overlap spoils that: it asks for a mixture of
ways that hide much and ways that exchange little. So it can be given a price instead, e replaced by
weight (late - hides) with a weight in [0, 1]; the least of that is a bound of the step as well
(Lagrange), and `search` looks for the weight at which it is highest.

Readers with the same choices share a flow, and a value of one reader has no y or l: its z is paid
itself. A choice or a route that alone takes more than is left between the least that all cells take
and a step that is known is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from penstock.plan.layout import Layout
from penstock.plan.rules.joins import Cell, Choice
from penstock.plan.search.cells import Cells, Prices, held_bytes, lying_in_inputs

_SHORTEST_S = 0.1
"""HiGHS is let run for this long at least."""

_SCALE = 1e3
"""What the objective is of, about: HiGHS's tolerances are absolute."""


@dataclass(frozen=True)
class Solution:
    """What HiGHS has found.

    Arguments:
        chosen: by cell, the number of its choice; None if it has none.
        bound_s: no choice of tied cells takes a step less.
        infeasible: whether it is proved that nothing fits the memory.
        timed_out: whether it was stopped before it could prove the gap.
        binaries, variables, constraints: their numbers.
    """

    chosen: tuple[int, ...] | None
    bound_s: float
    infeasible: bool
    timed_out: bool
    binaries: int
    variables: int
    constraints: int


@dataclass(frozen=True)
class Limits:
    """What is asked of a solution.

    Arguments:
        memory_bytes: of a rank.
        beside: how much of backward's and updates' time late routes can run beside.
        gap: stops when no solution can be better by more than this part.
        time_limit_s: stops then.
        relaxed: solves the linear relaxation, for its bound alone.
        frugal: minimizes the memory of a rank instead of the time.
        weight: the price of late routes that are not hidden; None: the overlap as it is.
    """

    memory_bytes: float = math.inf
    beside: float = 1.0
    gap: float = 0.01
    time_limit_s: float = 60.0
    relaxed: bool = False
    frugal: bool = False
    weight: float | None = None


def solve(
    cells: Cells,
    prices: Prices,
    classes: Sequence[int],
    limits: Limits,
    known_s: float,
) -> Solution:
    """Chooses for all cells.

    Arguments:
        classes: by cell, the number of the first of its class.
        known_s: a step that some choice takes; what must take more is not looked at. Infinite if
            none is known.
    """
    return _Program(cells, prices, classes, limits, known_s).solve()


def is_late_read(giver: Cell, reader: Cell) -> bool:
    """Whether nobody waits for a route between them that can go on beside other things."""
    asks_alone = reader.is_input or not reader.members
    return (reader.is_update or asks_alone) and not giver.is_update


_Route = tuple[Layout, Layout]
_Columns = dict[Layout, list[int]]


@dataclass
class _Value:
    """A value, how often it is there, by layout the variables of its giver, and its readers."""

    name: str
    count: int
    sources: _Columns
    waiting: list[_Columns]
    late: list[_Columns]


class _Program:
    def __init__(
        self,
        cells: Cells,
        prices: Prices,
        classes: Sequence[int],
        limits: Limits,
        known_s: float,
    ) -> None:
        self._cells, self._prices, self._classes = cells, prices, classes
        self._limits, self._known_s = limits, known_s
        self._of_inputs = lying_in_inputs(cells.graph)
        self._costs: list[float] = []
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._factors: list[float] = []
        self._least: list[float] = []
        self._most: list[float] = []
        self._late: list[tuple[int, float]] = []
        self._held: list[tuple[int, float]] = []
        self._x: dict[int, list[tuple[int, int]]] = {}
        self._count: dict[int, int] = {}
        for first in classes:
            self._count[first] = self._count.get(first, 0) + 1
        self._spare_s = self._spare()
        self._constant_s = cells.scalars_s
        self._add_choices()
        self._binaries = len(self._costs)
        for value in self._values():
            self._add_flows(value)
        self._add_overlap()
        if math.fsum(held for _, held in self._held) > limits.memory_bytes:
            shares = [(column, held / limits.memory_bytes) for column, held in self._held]
            self._row(shares, -math.inf, 1.0)

    def _spare(self) -> float:
        """What a choice or a route may take above the least, or nothing can be as good as what is
        known: every cell takes its least at least."""
        if self._limits.frugal:
            return math.inf
        least_s = self._cells.scalars_s + sum(
            count * min(choice.time_s for choice in self._cells.cells[first].choices)
            for first, count in self._count.items()
        )
        return max(0.0, self._known_s - least_s) * (1 + 1e-6) + 1e-12

    def _variable(self, cost: float) -> int:
        self._costs.append(cost)
        return len(self._costs) - 1

    def _row(self, terms: Sequence[tuple[int, float]], least: float, most: float) -> None:
        number = len(self._least)
        for column, factor in terms:
            self._rows.append(number)
            self._columns.append(column)
            self._factors.append(factor)
        self._least.append(least)
        self._most.append(most)

    def _add_choices(self) -> None:
        for first, count in self._count.items():
            choices = self._cells.cells[first].choices
            self._x[first] = []
            least_s = min(choice.time_s for choice in choices)
            for c, choice in enumerate(choices):
                if count * (choice.time_s - least_s) > self._spare_s:
                    continue
                column = self._variable(count * choice.time_s)
                self._x[first].append((c, column))
                if choice.held_bytes:
                    self._held.append((column, count * choice.held_bytes))
            self._row([(column, 1.0) for _, column in self._x[first]], 1.0, 1.0)

    def _values(self) -> list[_Value]:
        """Those that are read; alike are those whose giver and readers are of the same classes."""
        cells, classes = self._cells.cells, self._classes
        readers: dict[str, dict[tuple[int, int], None]] = {}
        for k, cell in enumerate(cells):
            for port, name in enumerate(cell.reads):
                readers.setdefault(name, {})[classes[k], port] = None
        alike: dict[tuple[int, int, frozenset[tuple[int, int]]], list[str]] = {}
        for k, cell in enumerate(cells):
            for place, name in enumerate(cell.gives):
                if name in readers:
                    key = (classes[k], place, frozenset(readers[name]))
                    alike.setdefault(key, []).append(name)
        found = []
        for (giver, place, _), names in alike.items():
            sources = self._by_layout(giver, lambda choice, k=place: choice.gives[k])  # type: ignore[misc]
            value = _Value(names[0], len(names), sources, [], [])
            seen: set[object] = set()
            for reader, port in readers[names[0]]:
                targets = self._by_layout(reader, lambda choice, k=port: choice.reads[k])  # type: ignore[misc]
                is_late = is_late_read(cells[giver], cells[reader])
                same = (is_late, *((b, tuple(columns)) for b, columns in targets.items()))
                if same not in seen:
                    seen.add(same)
                    (value.late if is_late else value.waiting).append(targets)
            found.append(value)
        return found

    def _by_layout(self, first: int, layout_of: Callable[[Choice], Layout]) -> _Columns:
        """The variables of a class's choices, by a layout in each."""
        choices = self._cells.cells[first].choices
        found: _Columns = {}
        for c, column in self._x[first]:
            found.setdefault(layout_of(choices[c]), []).append(column)
        return found

    def _add_flows(self, value: _Value) -> None:
        spec = self._cells.graph.specs[value.name]
        readers = [*((r, False) for r in value.waiting), *((r, True) for r in value.late)]
        alone = len(readers) == 1
        made: dict[bool, dict[_Route, int]] = {False: {}, True: {}}

        def paid(route: _Route, seconds: float, is_late: bool) -> int:
            """A variable that is 1 if a route is made."""
            column = self._variable(0.0 if is_late else seconds)
            if is_late:
                self._late.append((column, seconds))
            if value.name in self._of_inputs:
                held = held_bytes(spec, route[1], self._prices.sizes)
                self._held.append((column, value.count * held))
            return column

        for targets, is_late in readers:
            out: _Columns = {a: [] for a in value.sources}
            into: _Columns = {b: [] for b in targets}
            for route in ((a, b) for a in value.sources for b in targets):
                seconds = value.count * self._prices.way_s(spec, *route)
                hides_s = self._limits.beside * self._known_s if is_late else 0.0
                if seconds == math.inf or seconds > self._spare_s + hides_s:
                    continue
                if route[0] == route[1] or not alone:
                    flow = self._variable(0.0)
                else:
                    flow = paid(route, seconds, is_late)
                out[route[0]].append(flow)
                into[route[1]].append(flow)
                if route[0] != route[1] and not alone:
                    if route not in made[is_late]:
                        made[is_late][route] = paid(route, seconds, is_late)
                    payers = {made[is_late][route], made[False].get(route, made[is_late][route])}
                    terms = [(column, 1.0) for column in sorted(payers)]
                    self._row([*terms, (flow, -1.0)], 0.0, math.inf)
            for columns, ends in ((value.sources, out), (targets, into)):
                for layout, choices in columns.items():
                    through = [(flow, 1.0) for flow in ends[layout]]
                    self._row([*through, *((x, -1.0) for x in choices)], 0.0, 0.0)

    def _add_overlap(self) -> None:
        terms = list(self._late)
        for k, found in self._x.items():
            for c, column in found:
                hides_s = self._cells.cells[k].choices[c].hides_s
                if hides_s:
                    terms.append((column, -self._limits.beside * self._count[k] * hides_s))
        always_s = self._limits.beside * self._cells.scalars_s
        if self._limits.weight is None:
            exposed = self._variable(1.0)
            self._row([*terms, (exposed, -1.0)], -math.inf, always_s)
        else:
            for column, seconds in terms:
                self._costs[column] += self._limits.weight * seconds
            self._constant_s -= self._limits.weight * always_s

    def _order_s(self) -> float:
        """About what a step takes."""
        if self._known_s < math.inf:
            return self._known_s
        return max(math.fsum(self._costs[: self._binaries]) / max(len(self._x), 1), 1e-9)

    def solve(self) -> Solution:
        """Runs HiGHS."""
        num, rows = len(self._costs), len(self._least)
        matrix = csr_array(
            (self._factors, (self._rows, self._columns)), shape=(rows, num), dtype=np.float64
        )
        scale = _SCALE / self._order_s()
        integrality: npt.NDArray[np.int64] = np.zeros(num, np.int64)
        integrality[: self._binaries] = not self._limits.relaxed
        upper = np.full(num, np.inf)
        upper[: self._binaries] = 1.0
        costs = np.array(self._costs) * scale
        if self._limits.frugal:
            # The time is 1 % of it, and decides among what holds the same.
            costs *= 0.01
            held = np.array([bytes_ for _, bytes_ in self._held])
            np.add.at(costs, [c for c, _ in self._held], _SCALE * held / held.max())
        result = milp(
            costs,
            integrality=integrality,
            bounds=Bounds(0.0, upper),
            constraints=LinearConstraint(matrix, self._least, self._most),
            options={
                "time_limit": max(self._limits.time_limit_s, _SHORTEST_S),
                "mip_rel_gap": self._limits.gap,
                # It saves nothing here, and has been seen not to end, whatever the time limit.
                "presolve": False,
            },
        )
        bound = result.fun if self._limits.relaxed else result.get("mip_dual_bound")
        bound_s = float(bound) / scale if bound is not None and math.isfinite(bound) else 0.0
        chosen = None
        if result.x is not None and not self._limits.relaxed:
            best = {
                k: max(found, key=lambda pair: result.x[pair[1]])[0] for k, found in self._x.items()
            }
            chosen = tuple(best[k] for k in self._classes)
        bound_s = max(bound_s + self._constant_s, 0.0)
        infeasible, timed_out = result.status == 2, result.status == 1
        return Solution(chosen, bound_s, infeasible, timed_out, self._binaries, num, rows)
