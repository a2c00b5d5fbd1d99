"""Pins: what a person has decided about how parameters lie, before the search decides the rest.

A pin is of a parameter, or of a module and then of all its parameters that can lie so. It is a
placement for each axis of the mesh (`["S0", "B"]` or `"[S0, B]"`), or one alone: `"S0"` is any
layout that splits dim 0 on some axis and nothing else, by units of whatever size, `"S0/48"` one by
units of 48, and `"B"` copies on all axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from penstock.errors import JobError, did_you_mean
from penstock.plan.layout import B, Layout, P, Placement, in_words, read_layout
from penstock.plan.rules.joins import Cell
from penstock.plan.search.cells import Cells

Pin = str | Placement | Sequence[str | Placement]
Pins = Mapping[str, Pin]


def pinned(cells: Cells, pins: Pins) -> Cells:
    """The cells of a graph without the choices that the pins forbid.

    Raises:
        JobError: no parameter or module has that name, or it cannot lie so; names the pin and what
            is possible.
    """
    if not pins:
        return cells
    places = {cell.members[0]: k for k, cell in enumerate(cells.cells) if cell.is_input}
    parameters = {i.target: i.name for i in cells.graph.inputs if i.role == "parameter"}
    found = list(cells.cells)
    # Those of modules first, so that a pin of a parameter comes before that of its module.
    for name in sorted(pins, key=lambda name: (name in parameters, len(name), name)):
        of = _parameters_of(name, parameters)
        wanted = _read(name, pins[name])
        fitting = 0
        for parameter in of:
            place = places[parameters[parameter]]
            before = cells.cells[place]
            choices = tuple(c for c in before.choices if _fits(c.gives[0], wanted))
            if choices:
                words = ", ".join(in_words(choice.gives[0]) for choice in choices)
                found[place] = replace(before, choices=choices, key=f"{before.key} pinned {words}")
                fitting += 1
        if not fitting:
            raise _impossible(cells, name, wanted, found[places[parameters[of[0]]]], of)
    return replace(cells, cells=tuple(found))


def _parameters_of(name: str, parameters: Mapping[str, str]) -> list[str]:
    if name in parameters:
        return [name]
    of = [parameter for parameter in parameters if not name or parameter.startswith(f"{name}.")]
    if not of:
        modules = {p[:k] for p in parameters for k, letter in enumerate(p) if letter == "."}
        known = sorted({*parameters, *modules})
        hint = did_you_mean(name, known) or f"for instance {', '.join(known[:5])}"
        raise JobError(f"pin {name!r}: the network has no parameter or module of that name",
                       hint=hint)  # fmt: skip
    return of


def _read(name: str, pin: Pin) -> Placement | Layout:
    """What a pin asks for: a placement on any axes, or one on each."""
    try:
        if isinstance(pin, Placement):
            return pin
        if isinstance(pin, str):
            words = pin.strip()
            if not words or words.startswith("[") != words.endswith("]"):
                raise ValueError(f"{pin!r} is no layout")
            layout = read_layout(words)
            return layout if words.startswith("[") or len(layout) != 1 else layout[0]
        parts = [p if isinstance(p, Placement) else read_layout(str(p)) for p in pin]
        return tuple(
            itertools.chain.from_iterable([p] if isinstance(p, Placement) else p for p in parts)
        )
    except ValueError as error:
        raise JobError(f"pin {name!r}: {error}", hint="write S0, B, or one for each axis of the "
                       "mesh, as [S0, B]") from error  # fmt: skip


def _fits(layout: Layout, wanted: Placement | Layout) -> bool:
    if not isinstance(wanted, Placement):
        return layout == wanted
    if wanted == B:
        return all(p == B for p in layout)
    return any(p.is_split for p in layout) and all(
        p == B or (p.dim == wanted.dim and wanted.unit in (1, p.unit)) for p in layout
    )


def _impossible(
    cells: Cells, name: str, wanted: Placement | Layout, cell: Cell, of: Sequence[str]
) -> JobError:
    asked = repr(wanted) if isinstance(wanted, Placement) else in_words(wanted)
    spec = cells.graph.specs[cell.members[0]]
    layouts = [choice.gives[0] for choice in cell.choices]
    placements = (wanted,) if isinstance(wanted, Placement) else wanted
    axes = len(layouts[0])
    which = name if of == [name] else f"{name} (its {', '.join(of[:3])}{', ...' * (len(of) > 3)})"
    possible = ", ".join(map(in_words, layouts[:12])) + ", ..." * (len(layouts) > 12)
    if wanted == P or (not isinstance(wanted, Placement) and P in wanted):
        why = "a parameter is not kept as a sum of parts"
    elif not isinstance(wanted, Placement) and len(wanted) != axes:
        why = f"the mesh has {_number(axes, 'axis')}, the pin {_number(len(wanted), 'placement')}"
    elif beyond := [p for p in placements if p.is_split and p.dim >= len(spec.shape)]:
        why = (
            f"{spec} has {_number(len(spec.shape), 'dim')}, counted from 0, and no {beyond[0].dim}"
        )
    else:
        why = f"{spec} cannot be cut so that every rank has a part"
    return JobError(
        f"pin {which}: {asked} is not possible: {why}",
        hint=f"possible are {possible}",
    )


def _number(count: int, noun: str) -> str:
    plural = {"axis": "axes"}.get(noun, f"{noun}s")
    return f"{count} {noun if count == 1 else plural}"
