"""What a choice of all cells costs, quickly; `price` counts the same from the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

from penstock.plan.layout import Layout
from penstock.plan.search.cells import Cells, Prices, held_bytes, lying_in_inputs
from penstock.plan.search.integer import is_late_read
from penstock.plan.search.price import Price


class Tally:
    """Counts what choices cost.

    Arguments:
        beside: how much of the time of backward and updates late routes can run beside.
    """

    def __init__(self, cells: Cells, prices: Prices, beside: float) -> None:
        self._cells, self._prices, self._beside = cells, prices, beside
        self._of_inputs = lying_in_inputs(cells.graph)
        self._readers: dict[str, list[tuple[int, int]]] = {}
        for k, cell in enumerate(cells.cells):
            for port, name in enumerate(cell.reads):
                self._readers.setdefault(name, []).append((k, port))

    def price(self, chosen: Sequence[int]) -> Price:
        """Of the choices with these numbers, by cell."""
        cells, graph = self._cells.cells, self._cells.graph
        taken = [cell.choices[number] for cell, number in zip(cells, chosen, strict=True)]
        exchange_s = late_s = 0.0
        held = math.fsum(choice.held_bytes for choice in taken)
        for giver, cell in enumerate(cells):
            for name, source in zip(cell.gives, taken[giver].gives, strict=True):
                waited: dict[Layout, bool] = {}
                for k, port in self._readers.get(name, ()):
                    target = taken[k].reads[port]
                    if target != source:
                        waits = not is_late_read(cell, cells[k])
                        waited[target] = waits or waited.get(target, False)
                for target, waits in waited.items():
                    seconds = self._prices.way_s(graph.specs[name], source, target)
                    if waits:
                        exchange_s += seconds
                    else:
                        late_s += seconds
                    if name in self._of_inputs:
                        held += held_bytes(graph.specs[name], target, self._prices.sizes)
        compute_s = math.fsum(choice.time_s for choice in taken) + self._cells.scalars_s
        hides_s = math.fsum(choice.hides_s for choice in taken) + self._cells.scalars_s
        return Price(compute_s, exchange_s, late_s, self._beside * hides_s, held)
