"""How the graph of a micro-batch is split inside a stage: by known ways, and by the search.

A stage runs it k times in a step, and exchanges gradients once. What is minimized is therefore

    compute + exchange + (late - hides) / k         of a micro-batch

in the terms of `penstock.plan.search.price`: the search's own program, with late routes at 1 / k.
"""

from __future__ import annotations

from collections.abc import Callable

from penstock.model.graph import Graph
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster
from penstock.plan.search.integer import Limits, solve
from penstock.plan.search.pins import Pins
from penstock.plan.search.presets import PRESETS
from penstock.plan.search.price import Price
from penstock.plan.search.search import Search


class Insides:
    """The micro-batches of a batch, and ways to split them.

    Arguments:
        capture_at: the graph of a step of so many examples.
        batch: examples of a step.
        pins: what has been decided about parameters.
        gap, time_limit_s: of each search.
    """

    def __init__(
        self,
        capture_at: Callable[[int], Graph],
        batch: int,
        *,
        pins: Pins | None,
        gap: float,
        time_limit_s: float,
    ) -> None:
        self._capture_at, self._batch = capture_at, batch
        self._pins, self._gap, self._time_limit_s = pins, gap, time_limit_s
        self._counts: dict[int, int] = {}
        self._made: dict[tuple[int, int, int], _Inside] = {}

    def micro_batch(self, examples: int) -> Graph:
        """Of so many examples."""
        graph = self._capture_at(examples)
        self._counts[id(graph)] = self._batch // examples
        return graph

    def known(self, graph: Graph, part: Cluster) -> list[Assignment]:
        """Of the known ways the fastest, and that which holds least.

        Arguments:
            graph: one that `micro_batch` has given.
        """
        ways = self._of(graph, part).ways
        fastest = min(ways, key=lambda way: _rest_s(way[1]))
        smallest = min(ways, key=lambda way: way[1].held_bytes)
        return [fastest[0]] if smallest is fastest else [fastest[0], smallest[0]]

    def searched(self, graph: Graph, part: Cluster) -> Assignment:
        """What the search finds; the fastest of the known ways where it finds nothing.

        Arguments:
            graph: one that `micro_batch` has given.
        """
        inside = self._of(graph, part)
        search, ways = inside.search, inside.ways
        limits = Limits(
            search.memory_bytes,
            gap=self._gap,
            time_limit_s=self._time_limit_s,
            weight=1 / self._counts[id(graph)],
        )
        fitting = [_rest_s(found) + found.late_s for _, found in ways if search.fits(found)]
        known_s = min(fitting, default=float("inf"))
        solution = solve(search.cells, search.prices, search.classes, limits, known_s)
        if solution.chosen is None:
            return self.known(graph, part)[0]
        return search.assigned(solution.chosen)

    def _of(self, graph: Graph, part: Cluster) -> _Inside:
        key = id(graph), part.hosts, part.devices
        if key not in self._made:  # which holds the graph, so that its id stays its own
            self._made[key] = _Inside(Search(graph, part, pins=self._pins))
        return self._made[key]


class _Inside:
    def __init__(self, search: Search) -> None:
        self.search = search
        known = [search.preset(name) for name in PRESETS]
        self.ways = [(way, search.price(way)) for way in known]


def _rest_s(found: Price) -> float:
    """What each micro-batch takes."""
    return found.compute_s + found.exchange_s
