"""The search: for every operator of a step, how it is split; what neighbours then exchange.

    minimize the seconds of a step (`price`), so that a rank's memory suffices

over the choices of all cells (`cells`: operators that are best split together) at once, by an
integer program (`integer`) in which repeated layers are tied (`ties`), within a time limit and to a
gap. Data parallel, tensor parallel, optimizer state in parts (ZeRO) and Krizhevsky's hybrid (2014,
arXiv:1404.5997) are points of the same space: which comes out is a matter of cost alone. Known ways
(`presets`) are priced as well, and the best of all is the answer: the search is never worse than
they are, also where its time runs out. How far it may be from the best is `gap`, among all ways in
which repeated layers are split alike.

The answer is the same in every process, unless the time limit was what ended it (`timed_out`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.errors import UserError
from penstock.model.graph import Graph
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster
from penstock.plan.costs.operators import Measured
from penstock.plan.search.best import best
from penstock.plan.search.cells import Prices, assignment_of, cells_of
from penstock.plan.search.integer import Limits, solve
from penstock.plan.search.pins import Pins, pinned
from penstock.plan.search.presets import PRESETS, preset
from penstock.plan.search.price import ClusterPrices, Price, price
from penstock.plan.search.ties import MAX_CHOICES, tied

GAP = 0.01
TIME_LIMIT_S = 60.0


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Arguments:
        assignment: the best.
        price: its step and memory.
        presets: of each preset, its assignment and price; those that keep to the pins.
        origin: "search", or the preset that is the best.
        bound_s: no assignment in which repeated layers are split alike takes a step less.
        gap: by which part of it the step may be above the bound.
        fits: whether `price.held_bytes` is within the memory asked for. If not, the assignment is
            the one found that holds least.
        timed_out: whether the time limit came before the gap was proved.
        seconds: of the whole search; of them, of HiGHS.
        solver_s: of HiGHS.
        binaries, variables, constraints, cells, classes: sizes of the program.
    """

    assignment: Assignment
    price: Price
    presets: Mapping[str, tuple[Assignment, Price]]
    origin: str
    bound_s: float
    fits: bool
    timed_out: bool
    seconds: float
    solver_s: float
    binaries: int
    variables: int
    constraints: int
    cells: int
    classes: int

    @property
    def gap(self) -> float:
        return max(0.0, self.price.step_s / self.bound_s - 1) if self.bound_s else math.inf


class Search:
    """A graph, a cluster, and what has been asked: made once, for a search and its reasons.

    Arguments:
        graph: of a step.
        cluster: whose devices and links count.
        sizes: of the mesh's axes; those of the cluster.
        pins: see `pins`.
        prices: of operators and routes; those of the cluster.
        measured: times of operators, instead of computed ones.
        memory_bytes: of a rank; that of the cluster's device.
        beside: how much of the time of backward and updates late exchanges run beside.
        max_choices: how far repeated layers are tied, see `ties`.

    Raises:
        JobError: a pin is not possible.
    """

    def __init__(
        self,
        graph: Graph,
        cluster: Cluster,
        sizes: Sequence[int] | None = None,
        *,
        pins: Pins | None = None,
        prices: Prices | None = None,
        measured: Measured | None = None,
        memory_bytes: float | None = None,
        beside: float = 1.0,
        max_choices: int = MAX_CHOICES,
    ) -> None:
        began = time.perf_counter()
        self.graph = graph
        self.sizes = tuple(sizes or cluster.mesh)
        self.prices = prices or ClusterPrices(graph, cluster, self.sizes, measured)
        self.memory_bytes = cluster.device.memory_bytes if memory_bytes is None else memory_bytes
        self.beside = beside
        self.cells = pinned(cells_of(graph, self.prices), pins or {})
        self.classes = tied(self.cells.cells, max_choices)
        self._seconds = time.perf_counter() - began

    def preset(self, name: str) -> Assignment:
        """A known way to split the graph, as far as pins allow.

        Raises:
            UserError: there is none of that name.
        """
        for known in PRESETS:
            if name == known:
                return self.assigned(preset(known, self.cells, self.prices))
        raise UserError(f"there is no preset {name!r}", hint=f"there are {', '.join(PRESETS)}")

    def price(self, assignment: Assignment) -> Price:
        """See `price`."""
        return price(self.graph, assignment, self.prices, self.beside)

    def find(self, *, gap: float = GAP, time_limit_s: float = TIME_LIMIT_S) -> Found:
        """The best assignment.

        Arguments:
            gap: how much of the bound the step may be above it.
            time_limit_s: of HiGHS.
        """
        began = time.perf_counter()
        known: dict[str, tuple[Assignment, Price]] = {}
        for name in PRESETS:
            assignment = self.preset(name)
            known[name] = (assignment, self.price(assignment))
        limits = Limits(self.memory_bytes, self.beside, gap, time_limit_s)
        known_s = min((p.step_s for _, p in known.values() if self.fits(p)), default=math.inf)
        solving = time.perf_counter()
        answer = best(self.cells, self.prices, self.classes, limits, known_s)
        chosen = answer.chosen
        if answer.infeasible and known_s == math.inf:
            frugal = replace(limits, memory_bytes=math.inf, frugal=True, gap=0.05)
            chosen = solve(self.cells, self.prices, self.classes, frugal, known_s).chosen
        solver_s = time.perf_counter() - solving
        candidates: dict[str, tuple[Assignment, Price]] = dict(known)
        if chosen is not None:
            assignment = self.assigned(chosen)
            candidates = {"search": (assignment, self.price(assignment)), **known}
        origin = min(candidates, key=lambda name: self.order(candidates[name][1]))
        assignment, least = candidates[origin]
        return Found(
            assignment,
            least,
            known,
            origin,
            # Of an answer without a gap they are the same but for rounding.
            min(answer.bound_s, least.step_s),
            self.fits(least),
            answer.timed_out,
            self._seconds + time.perf_counter() - began,
            solver_s,
            answer.binaries,
            answer.variables,
            answer.constraints,
            len(self.cells.cells),
            len(set(self.classes)),
        )

    def fits(self, found: Price) -> bool:
        """Whether the memory suffices."""
        return found.held_bytes <= self.memory_bytes * (1 + 1e-6)

    def order(self, found: Price) -> tuple[float, float]:
        """First what fits, by time; then what holds least."""
        return 0.0 if self.fits(found) else found.held_bytes, found.step_s

    def assigned(self, chosen: Sequence[int]) -> Assignment:
        return assignment_of(self.cells, chosen, self.sizes)
