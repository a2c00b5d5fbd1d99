"""Why a parameter lies as it does: what its other layouts would cost.

For each other layout the cells around the parameter (and around those tied to it) are chosen again,
with the parameter in that layout; those further away stay as they were found. So a price is that of
an assignment there is, and an upper bound of the best with that layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.errors import UserError, did_you_mean
from penstock.plan.layout import Layout, in_words
from penstock.plan.rules.joins import Cell, Choice
from penstock.plan.search.best import best
from penstock.plan.search.cells import Cells, assignment_of
from penstock.plan.search.integer import Limits
from penstock.plan.search.price import Price
from penstock.plan.search.search import GAP, Found, Search
from penstock.plan.search.ties import alike
from penstock.plan.words import in_time

NEAR = 8
"""How many steps around a parameter may change."""

TIME_LIMIT_S = 10.0
"""For each layout."""

ROUNDS = 3
"""Of tying what is chosen again."""


@dataclass(frozen=True)
class Alternative:
    """A layout of a parameter, and the step with it."""

    layout: Layout
    price: Price


@dataclass(frozen=True)
class Reason:
    """Why a parameter lies as it does.

    Arguments:
        parameter: its name.
        chosen: as it lies.
        others: what else was tried, the least step first; of a layout that is not there nothing was
            found that fits.
        words: for people.
    """

    parameter: str
    chosen: Alternative
    others: tuple[Alternative, ...]
    words: str


def reason(search: Search, found: Found, parameter: str, near: int = NEAR) -> Reason:
    """Why a parameter lies as it was found to.

    Arguments:
        search: which has found it.
        near: how many steps around the parameter are chosen again.

    Raises:
        UserError: there is no such parameter.
    """
    known = [item.target for item in search.graph.inputs if item.role == "parameter"]
    if parameter not in known:
        inside = [name for name in known if parameter and name.startswith(f"{parameter}.")]
        some = f"for instance {', '.join((inside or known)[:5])}"
        raise UserError(
            f"the network has no parameter {parameter!r}",
            hint=some if inside else did_you_mean(parameter, known) or some,
        )
    name = search.graph.input("parameter", parameter).name
    cells = search.cells.cells
    place = next(k for k, cell in enumerate(cells) if cell.members == (name,))
    chosen = Alternative(found.assignment.layout_of(search.graph, name), found.price)
    around = _around(cells, search.classes, place, near)
    others = []
    for layout in dict.fromkeys(choice.gives[0] for choice in cells[place].choices):
        if layout != chosen.layout:
            price = _with(search, found, place, layout, around)
            if price is not None:
                others.append(Alternative(layout, price))
    others.sort(key=lambda other: (*search.order(other.price), other.layout))
    return Reason(parameter, chosen, tuple(others), in_sentences(search, found, chosen, others))


def _around(cells: Sequence[Cell], classes: Sequence[int], place: int, near: int) -> frozenset[int]:
    """The cells within so many steps of those of a class."""
    touching: dict[str, list[int]] = {}
    for k, cell in enumerate(cells):
        for name in (*cell.reads, *cell.gives):
            touching.setdefault(name, []).append(k)
    found = {k for k, first in enumerate(classes) if first == classes[place]}
    edge = set(found)
    for _ in range(near):
        names = {name for k in edge for name in (*cells[k].reads, *cells[k].gives)}
        edge = {k for name in names for k in touching[name]} - found
        found |= edge
    return frozenset(found)


def _with(
    search: Search, found: Found, place: int, layout: Layout, around: frozenset[int]
) -> Price | None:
    cells = []
    for k, cell in enumerate(search.cells.cells):
        kept, why = tuple(cell.choices), ""
        if search.classes[k] == search.classes[place]:
            kept, why = tuple(c for c in kept if c.gives[0] == layout), "as asked"
        elif k not in around:
            kept = tuple(c for c in kept if _is_taken(found, cell, c))[:1]
            why = f"as found {cell.choices.index(kept[0])}"
        cells.append(replace(cell, choices=kept, key=f"{cell.key} {why}"))
    again = Cells(search.graph, tuple(cells), search.cells.scalars, search.cells.scalars_s)
    is_tied = len(set(search.classes)) < len(cells)
    classes = alike(cells, ROUNDS) if is_tied else search.classes
    limits = Limits(search.memory_bytes, search.beside, GAP, TIME_LIMIT_S)
    answer = best(again, search.prices, classes, limits, float("inf"))
    if answer.chosen is None:
        return None
    return search.price(assignment_of(again, answer.chosen, search.sizes))


def _is_taken(found: Found, cell: Cell, choice: Choice) -> bool:
    given = found.assignment
    return all(
        member == (given.nodes[name] if name in given.nodes else given.inputs[name])
        for name, member in zip(cell.members, choice.members, strict=True)
    )


def in_sentences(
    search: Search, found: Found, chosen: Alternative, others: Sequence[Alternative]
) -> str:
    """The figures as sentences."""
    words = [f"{in_words(chosen.layout)}: a step of {in_time(chosen.price.step_s)}."]
    if not others:
        words.append("Nothing else fits." if search.memory_bytes else "Nothing else is possible.")
    else:
        words.append(_compared(search, chosen, others[0]))
    if found.price.exchange_s + found.price.late_s == 0.0 and found.assignment.copies_all:
        words.append(
            "All ranks compute the same: on these links any exchange takes longer than what it "
            "saves."
        )
    return " ".join(words)


def _compared(search: Search, chosen: Alternative, other: Alternative) -> str:
    name = in_words(other.layout)
    if not search.fits(other.price):
        return f"{name} would not fit the memory."
    more_s = other.price.step_s - chosen.price.step_s
    if more_s <= 1e-3 * chosen.price.step_s:
        return f"{name} would take as long."
    parts = {
        "computing": other.price.compute_s - chosen.price.compute_s,
        "exchange that is waited for": other.price.exchange_s - chosen.price.exchange_s,
        "exchange of gradients that nothing hides": other.price.exposed_s - chosen.price.exposed_s,
    }
    told = [
        f"{in_time(abs(seconds))} {'more' if seconds > 0 else 'less'} {what}"
        for what, seconds in sorted(parts.items(), key=lambda item: -abs(item[1]))
        if abs(seconds) > 0.05 * more_s
    ]
    return f"Next is {name}, which takes {in_time(more_s)} more: {', '.join(told)}."
