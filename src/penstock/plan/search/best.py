"""The best choices of all cells: the integer program, and what the overlap makes of it.

Small programs are solved as they are. In larger ones overlap has a price w instead (`integer`):

    bound(w) = min over choices of  rest + w (late - hides)        for each w in [0, 1] a bound

With w = 0 all exchanges of gradients are free, and with w = 1 nothing hides them; if the best for
w = 0 hides them all, or the best for w = 1 leaves nothing that could hide, it is the best. Else the
bound is highest where two choices are equally good, one that exchanges more than is hidden, and one
that exchanges less: there the lines rest + w (late - hides) of the best choices found so far meet,
and w is moved to where they do until nothing is below (Kelley 1960). Between the two choices the
best is a mixture, which tied layers forbid. So layers are taken from one up to some depth, and from
there on from the other, at the depth that is cheapest. If that is not as near to the bound as is
asked, the program is solved as it is after all, in the time that is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from penstock.plan.search.cells import Cells, Prices
from penstock.plan.search.integer import Limits, Solution, solve
from penstock.plan.search.price import Price
from penstock.plan.search.tally import Tally

EXACT_CHOICES = 1000
"""A program of no more binary variables is solved as it is."""

MAX_WEIGHTS = 6
CUTS = 32
"""So many depths are tried first, and as many around the best."""


@dataclass(frozen=True)
class Answer:
    """What was found.

    Arguments:
        chosen: by cell, the number of its choice; None if nothing was found.
        price: of that.
        bound_s: no choice of tied cells takes a step less, or what was known is the best.
        infeasible: whether nothing fits the memory.
        timed_out: whether time ran out before all was done.
        binaries, variables, constraints: of the largest program.
        programs: their number.
    """

    chosen: tuple[int, ...] | None
    price: Price | None
    bound_s: float
    infeasible: bool
    timed_out: bool
    binaries: int
    variables: int
    constraints: int
    programs: int


def best(
    cells: Cells, prices: Prices, classes: Sequence[int], limits: Limits, known_s: float
) -> Answer:
    """The best choices.

    Arguments:
        classes: by cell, the number of the first of its class.
        limits: their time is of all programs together.
        known_s: a step that is known to be possible; infinite if none is.
    """
    return _Best(cells, prices, classes, limits, known_s).found()


@dataclass(frozen=True)
class _Tried:
    chosen: tuple[int, ...]
    price: Price

    @property
    def rest_s(self) -> float:
        return self.price.compute_s + self.price.exchange_s

    @property
    def over_s(self) -> float:
        """Late exchanges that are not hidden; below 0, what more could be."""
        return self.price.late_s - self.price.hides_s


class _Best:
    def __init__(
        self, cells: Cells, prices: Prices, classes: Sequence[int], limits: Limits, known_s: float
    ) -> None:
        self._cells, self._prices, self._classes = cells, prices, classes
        self._limits, self._known_s = limits, known_s
        self._tally = Tally(cells, prices, limits.beside)
        self._deadline = time.monotonic() + limits.time_limit_s
        self._tried: list[_Tried] = []
        self._solutions: list[Solution] = []
        self._bound_s = 0.0

    def found(self) -> Answer:
        binaries = sum(len(self._cells.cells[first].choices) for first in set(self._classes))
        if binaries > EXACT_CHOICES:
            self._by_weights()
        if not self._is_close() and time.monotonic() < self._deadline:
            self._solve(None)
        return self._answer()

    def _is_close(self) -> bool:
        """Whether what is known is as near to the bound as is asked."""
        return self._known_s <= self._bound_s * (1 + self._limits.gap)

    def _answer(self) -> Answer:
        fitting = [tried for tried in self._tried if self._fits(tried.price)]
        least = min(fitting, key=lambda tried: tried.price.step_s, default=None)
        largest = max(self._solutions, key=lambda solution: solution.variables)
        return Answer(
            least.chosen if least else None,
            least.price if least else None,
            self._bound_s,
            any(solution.infeasible for solution in self._solutions),
            any(solution.timed_out for solution in self._solutions),
            largest.binaries,
            largest.variables,
            largest.constraints,
            len(self._solutions),
        )

    def _fits(self, price: Price) -> bool:
        return price.held_bytes <= self._limits.memory_bytes * (1 + 1e-6)

    def _solve(self, weight: float | None) -> _Tried | None:
        left_s = self._deadline - time.monotonic()
        limits = replace(self._limits, weight=weight, time_limit_s=left_s)
        solution = solve(self._cells, self._prices, self._classes, limits, self._known_s)
        self._solutions.append(solution)
        if solution.infeasible and self._known_s < math.inf:
            self._bound_s = self._known_s
        self._bound_s = max(self._bound_s, solution.bound_s)
        return self._try(solution.chosen) if solution.chosen is not None else None

    def _try(self, chosen: tuple[int, ...]) -> _Tried:
        tried = _Tried(chosen, self._tally.price(chosen))
        self._tried.append(tried)
        if self._fits(tried.price):
            self._known_s = min(self._known_s, tried.price.step_s)
        return tried

    def _by_weights(self) -> None:
        over = self._solve(0.0)
        if over is None or over.over_s <= 0:
            return
        under = self._solve(1.0)
        if under is None or under.over_s >= 0:
            return
        while len(self._solutions) < MAX_WEIGHTS and time.monotonic() < self._deadline:
            weight = (under.rest_s - over.rest_s) / (over.over_s - under.over_s)
            weight = min(max(weight, 0.0), 1.0)
            meet_s = over.rest_s + weight * over.over_s
            between = self._solve(weight)
            if between is None:
                break
            below_s = between.rest_s + weight * between.over_s
            if below_s >= meet_s * (1 - self._limits.gap):
                break
            if between.over_s > 0:
                over = between
            else:
                under = between
        self._mix(over, under)

    def _mix(self, one: _Tried, other: _Tried) -> None:
        """Layers of one up to some depth, and of the other from there on."""
        depth = _depths(self._cells)
        steps = sorted(set(depth))

        def mixed(first: _Tried, second: _Tried) -> Callable[[int], _Tried]:
            def at(cut: int) -> _Tried:
                border = steps[min(cut, len(steps) - 1)]
                return self._try(
                    tuple(
                        a if place < border else b
                        for place, a, b in zip(depth, first.chosen, second.chosen, strict=True)
                    )
                )

            return at

        for first, second in ((one, other), (other, one)):
            at = mixed(first, second)
            stride = max(1, len(steps) // CUTS)
            tried = {cut: at(cut) for cut in range(0, len(steps), stride)}
            fitting = [cut for cut in tried if self._fits(tried[cut].price)]
            if fitting:
                near = min(fitting, key=lambda cut: tried[cut].price.step_s)
                for cut in range(near - stride, near + stride, max(1, 2 * stride // CUTS)):
                    if 0 <= cut < len(steps):
                        at(cut)


def _depths(cells: Cells) -> list[int]:
    """How deep in the network each cell is: where forward would be when backward is there."""
    graph = cells.graph
    place: dict[str, int] = {}
    forward = sum(node.phase == "forward" for node in graph.nodes)
    others = len(graph.nodes) - forward
    number = {"forward": 0, "other": 0}
    for node in graph.nodes:
        if node.phase == "forward":
            place[node.name] = number["forward"]
            number["forward"] += 1
        else:
            place[node.name] = forward - 1 - number["other"] * forward // max(others, 1)
            number["other"] += 1
    for item in graph.inputs:
        readers = graph.consumers.get(item.name, ())
        place[item.name] = place[readers[0].name] if readers else 0
    return [max((place[name] for name in cell.members), default=forward) for cell in cells.cells]
