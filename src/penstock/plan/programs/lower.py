"""A graph and an assignment -> the program of each rank.

The graph is walked once for all ranks (`walk`), which writes a script of calls and hops; then the
script is written out for each rank with its own shapes and boxes (`_written`). So the programs of
all ranks begin the same exchanges in the same order, and each line's exchanges have one order on
all of its ranks, which is why none can wait for another in a circle.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from penstock.model.graph import Graph, Node, Ref, Spec, replaced
from penstock.plan.assignment import Assignment
from penstock.plan.costs.routes import Hop
from penstock.plan.layout import Coordinates, Layout, coordinates_of, everyone, line, local_shape
from penstock.plan.programs.moves import exchange_hop, local_hop
from penstock.plan.programs.program import (
    Call,
    Exchange,
    Finish,
    Free,
    Given,
    Instruction,
    Program,
    Value,
)
from penstock.plan.programs.walk import BeginStep, CallStep, HopStep, Step, Walk, Ways
from penstock.plan.rules.signatures import localized

__all__ = ["BUCKET_BYTES", "IN_FLIGHT", "Ways", "lower"]

BUCKET_BYTES = 8 << 20
"""A bucket is begun when it has so many bytes on a rank."""
IN_FLIGHT = 4
"""So many buckets are under way before the oldest is waited for: enough for a line not to be idle
while gradients wait, and few enough for gradients not to be kept to the end of backward."""


def lower(
    graph: Graph,
    assignment: Assignment,
    routes: Ways,
    *,
    bucket_bytes: int = BUCKET_BYTES,
    in_flight: int = IN_FLIGHT,
    ranks: Iterable[int] | None = None,
) -> tuple[Program, ...]:
    """The programs of ranks.

    Arguments:
        routes: the ways between layouts, on the mesh that the assignment is for.
        bucket_bytes: size of buckets; 0: each exchange by itself.
        in_flight: buckets that may be under way before the oldest is waited for.
        ranks: whose programs; None: all, in order.

    Raises:
        PlanError: a tensor has no way into a layout that the assignment asks of it; names both.
    """
    walk = Walk(graph, assignment, routes, bucket_bytes, in_flight)
    walk.walk()
    script = _with_frees(walk)
    sizes = assignment.sizes
    if ranks is None:
        ranks = range(len(list(everyone(sizes))))
    return tuple(_written(walk, script, rank, coordinates_of(sizes, rank)) for rank in ranks)


def _with_frees(walk: Walk) -> list[Step | Free]:
    """The script with what is not read any more forgotten."""
    last: dict[str, int] = {}
    begun: dict[int, BeginStep] = {}
    for place, step in enumerate(walk.script):
        match step:
            case CallStep(_, reads, gives, _):
                last |= dict.fromkeys([*reads, *(name for name in gives if name)], place)
            case HopStep(source, result, _):
                last |= {source: place, result: place}
            case BeginStep():
                begun[step.number] = step
            case Finish(number):
                for hop in begun[number].hops:
                    last |= {hop.source: place, hop.result: place}
    kept = {value for _, value in walk.outputs}
    replaced_ones = _renewed(walk)
    for item in walk.graph.inputs:
        if item.role == "constant" or (
            item.role in ("parameter", "buffer", "state") and item.name not in replaced_ones
        ):
            kept.add(item.name)
        last.setdefault(item.name, -1)
    frees: dict[int, list[str]] = {}
    for name, place in last.items():
        if name not in kept:
            frees.setdefault(place, []).append(name)
    script: list[Step | Free] = [Free(tuple(frees[-1]))] if -1 in frees else []
    for place, step in enumerate(walk.script):
        script.append(step)
        if place in frees:
            script.append(Free(tuple(frees[place])))
    return script


def _renewed(walk: Walk) -> dict[str, str]:
    """By input, the value that takes its place."""
    found: dict[str, str] = {}
    for output, value in walk.outputs:
        if output.role in ("parameter", "buffer", "state"):
            name = walk.graph.input(output.role, output.target).name
            if name != value:
                found[name] = value
    return found


def _written(
    walk: Walk, script: Sequence[Step | Free], rank: int, coordinates: Coordinates
) -> Program:
    """The script as one rank's program."""
    graph, sizes = walk.graph, walk.assignment.sizes
    values = {
        name: Value(
            tensor,
            layout,
            Spec(
                local_shape(graph.specs[tensor].shape, layout, sizes, coordinates),
                graph.specs[tensor].dtype,
            ),
        )
        for name, (tensor, layout) in walk.values.items()
    }

    def hop(item: HopStep) -> tuple[tuple[str, str], tuple[int, ...], Layout, Hop]:
        tensor, layout = walk.values[item.source]
        return (item.source, item.result), graph.specs[tensor].shape, layout, item.hop

    def instruction(step: Step | Free) -> Instruction:
        match step:
            case CallStep():
                chosen = walk.assignment.nodes[step.node.name]
                node = localized(step.node, graph.specs, chosen, sizes, coordinates)
                return Call(_renamed(node, step), step.after)
            case HopStep():
                return local_hop(*hop(step), sizes, coordinates)
            case BeginStep():
                moves = tuple(exchange_hop(*hop(item), sizes, coordinates) for item in step.hops)
                ranks = line(sizes, step.axis, coordinates)
                return Exchange(step.number, step.kind, step.axis, ranks, step.sequence, moves)
            case _:
                return step

    return Program(
        rank=rank,
        coordinates=coordinates,
        sizes=sizes,
        instructions=tuple(map(instruction, script)),
        values=values,
        inputs={item.name: values[item.name].layout for item in graph.inputs},
        outputs=tuple(
            Given(output.role, output.target, output.name, value) for output, value in walk.outputs
        ),
        renewed=_renewed(walk),
    )


def _renamed(node: Node, step: CallStep) -> Node:
    """With values' names in place of tensors'."""
    names = iter(step.reads)
    args, kwargs = replaced((node.args, dict(node.kwargs)), lambda _: Ref(next(names)))
    assert next(names, None) is None, f"{node.name}: localized, it reads fewer tensors"
    return replace(node, args=args, kwargs=kwargs, outputs=step.gives)
