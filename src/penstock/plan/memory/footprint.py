"""What a rank's program holds in memory: its instructions as `liveness` reads them."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.plan.memory.liveness import Event, Lifetimes, Made, source_of
from penstock.plan.memory.scratch import scratch_bytes
from penstock.plan.programs.program import (
    Call,
    Exchange,
    Finish,
    Free,
    Instruction,
    Local,
    Program,
    Receive,
    Send,
)


def footprint(program: Program, block_bytes: int = 1) -> Lifetimes:
    """The lives of all that a rank has during a step.

    Parameters, buffers and state that get new values are freed at their last use, and the new ones
    stay to the end; the rest of what a step is given stays as well.

    Arguments:
        block_bytes: sizes are rounded up to multiples of it.
    """
    given = {name: program.values[name].spec.num_bytes for name in program.inputs}
    kept = [output.value for output in program.outputs]
    renewed = {name: given.pop(name) for name in program.renewed if name not in kept}
    events = [event for item in program.instructions for event in _events(program, item)]
    return Lifetimes.of_events(events, given, kept, block_bytes, renewed)


def _events(program: Program, item: Instruction) -> Iterator[Event]:
    def made(name: str, source: str | None = None) -> Made:
        return Made(name, program.values[name].spec.num_bytes, source)

    match item:
        case Call(node):
            specs = {
                name: program.values[name].spec for name in {*node.inputs, *node.outputs} if name
            }
            makes = tuple(made(name, source_of(node)) for name in node.outputs if name is not None)
            yield Event(node.name, node.inputs, makes, node.module, scratch_bytes(node, specs))
        case Local(kind, source, result):
            view = source if kind == "same" else None
            yield Event(f"{kind} {source}", (source,), (made(result, view),))
        case Exchange():
            # Several go in one flat buffer, which is there as long as the exchange is under way.
            flat = program.buffer_bytes(item) if len(item.moves) > 1 else 0
            reads = tuple(move.source for move in item.moves)
            makes = tuple(made(move.result) for move in item.moves)
            yield Event(item.kind, reads, makes, "", flat)
        case Send():
            yield Event("send", (item.source,), ())
        case Receive():
            yield Event("receive", (), (made(item.result),))
        case Free(names):
            yield Event("free", names, ())
        case Finish():
            return
