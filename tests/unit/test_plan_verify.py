"""What is wrong in programs is found, and said: rank, instruction, tensor."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from penstock.errors import PlanError
from penstock.model.capture import capture
from penstock.model.graph import Graph, Spec
from penstock.plan.assignment import Assignment
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, S
from penstock.plan.programs.lower import lower
from penstock.plan.programs.program import (
    Call,
    Exchange,
    Finish,
    Free,
    Given,
    Instruction,
    Local,
    Move,
    Program,
    Receive,
    Send,
    Value,
)
from penstock.plan.programs.verify import verify
from penstock.testing.assignments import cluster, styled
from penstock.testing.networks import SGD, tiny

Programs = list[Program]


@functools.cache
def lowered() -> tuple[Graph, Assignment, tuple[Program, ...]]:
    """A step of a perceptron, its parameters and batch split over 2 x 2 ranks."""
    example = tiny("mlp")
    graph = capture(example.network, example.loss, example.batch, SGD)
    assignment = styled(graph, (2, 2), "mixed")
    programs = lower(graph, assignment, Routes(cluster((2, 2)), (2, 2)), bucket_bytes=1000)
    return graph, assignment, programs


def programs() -> Programs:
    return list(lowered()[2])


def find(program: Program, fits: Callable[[Any], bool], which: int = 0) -> int:
    """The place of an instruction."""
    return [k for k, item in enumerate(program.instructions) if fits(item)][which]


def exchange(kind: str) -> Callable[[Any], bool]:
    return lambda item: isinstance(item, Exchange) and item.kind == kind


def changed(program: Program, place: int, *items: Instruction) -> Program:
    """With these in the place of one instruction."""
    old = program.instructions
    return replace(program, instructions=(*old[:place], *items, *old[place + 1 :]))


def moved(program: Program, place: int, to: int) -> Program:
    items = list(program.instructions)
    items.insert(to, items.pop(place))
    return replace(program, instructions=tuple(items))


def refused(found: Sequence[Program], match: str) -> str:
    """Asserts that programs are refused, with this in the error; its text."""
    with pytest.raises(PlanError, match=match) as caught:
        verify(found)
    assert caught.value.hint
    return caught.value.message


def test_what_lower_writes_is_right() -> None:
    graph, assignment, found = lowered()
    verify(found, graph, assignment)
    kinds = {item.kind for item in found[0].instructions if isinstance(item, Exchange)}
    assert kinds == {"all_reduce", "reduce_scatter", "all_gather", "all_to_all"}


def test_a_rank_that_ends_early_is_waited_for() -> None:
    found = programs()
    place = find(found[1], lambda i: isinstance(i, Exchange) and i.axis == 0, -1)
    short = found[1].instructions[:place]
    found[1] = replace(found[1], instructions=short, outputs=(), renewed={})
    text = refused(found, "all wait for one another")
    assert "waits for rank 1 in" in text
    assert "done: rank 1" in text


def test_other_kinds() -> None:
    found = programs()
    place = find(found[3], exchange("all_reduce"))
    item = found[3].instructions[place]
    assert isinstance(item, Exchange)
    found[3] = changed(found[3], place, replace(item, kind="all_gather"))
    refused(found, rf"instruction \d+, begin \d+: .* where rank {item.ranks[0]} has all_reduce")


def test_other_shapes() -> None:
    found = programs()
    place = find(found[2], exchange("all_reduce"))
    item = found[2].instructions[place]
    assert isinstance(item, Exchange)
    values = dict(found[2].values)
    for name in (item.moves[0].source, item.moves[0].result):
        values[name] = replace(values[name], spec=Spec((5, 7), torch.float64))
    found[2] = replace(found[2], values=values)
    with pytest.raises(PlanError, match=f"{re.escape(item.moves[0].source)}.*5, 7"):
        verify(found, operators=False)
    with pytest.raises(
        PlanError, match=r"rank 2, instruction \d+, aten.*, and not float64\[5, 7\]"
    ):
        verify(found)


def test_other_dtypes() -> None:
    found = programs()
    place = find(found[2], exchange("all_gather"))
    item = found[2].instructions[place]
    assert isinstance(item, Exchange)
    name, values = item.moves[0].source, dict(found[2].values)
    for of in (name, item.moves[0].result):
        values[of] = replace(values[of], spec=replace(values[of].spec, dtype=torch.float32))
    found[2] = replace(found[2], values=values)
    with pytest.raises(PlanError, match=r"float32.* where rank \d has .* float64"):
        verify(found, operators=False)


def test_parts_that_do_not_fit() -> None:
    found = programs()
    place = find(found[0], exchange("all_to_all"))
    item = found[0].instructions[place]
    assert isinstance(item, Exchange)
    first = item.moves[0]
    assert first.sends[0] != first.sends[1]
    wide = tuple(tuple((a, b + 1) for a, b in box) for box in first.sends)
    several = (first.receives[0],) * len(first.receives)
    for wrong, match in (
        (replace(first, sends=wide), "a part"),
        (replace(first, receives=several), "overlap"),
        (replace(first, receives=()), "sends .*, and .* is received"),
        (replace(first, sends=first.sends[:1]), "1 parts for 2 ranks"),
    ):
        bad = list(found)
        bad[0] = changed(found[0], place, replace(item, moves=(wrong, *item.moves[1:])))
        refused(bad, match)


def test_what_is_freed_too_early_or_twice_or_never() -> None:
    found = programs()
    place = find(found[0], lambda i: isinstance(i, Free))
    item = found[0].instructions[place]
    assert isinstance(item, Free)
    name = item.names[0]
    early = list(found)
    early[0] = moved(found[0], place, 0)
    refused(early, rf"rank 0, instruction 0, free .*{re.escape(name)} is not there yet")
    call = find(found[0], lambda i: isinstance(i, Call) and name in i.node.inputs, -1)
    early[0] = moved(found[0], place, call)
    refused(early, rf"rank 0, instruction {call + 1}, .*{re.escape(name)} has been freed")
    twice = list(found)
    twice[0] = changed(found[0], place, item, item)
    refused(twice, rf"rank 0, instruction {place + 1}, free .* has been freed")
    never = list(found)
    never[0] = changed(found[0], place)
    refused(never, rf"rank 0, at its end: .*{re.escape(name)} is never freed")


def test_what_is_read_or_freed_while_it_is_on_its_way() -> None:
    found = programs()
    place = find(found[0], exchange("all_gather"))
    item = found[0].instructions[place]
    assert isinstance(item, Exchange)
    finish = find(found[0], lambda i: isinstance(i, Finish) and i.number == item.number)
    result = item.moves[0].result
    reader = find(found[0], lambda i: isinstance(i, Call) and result in i.node.inputs)
    match = rf"rank 0, instruction {finish}, .*: {re.escape(result)} is not finished"
    refused([moved(found[0], reader, finish), *found[1:]], match)
    freed = list(found)
    source = item.moves[0].source
    freed[0] = changed(found[0], place, item, Free((source,)))
    refused(freed, rf"rank 0, instruction {place + 1}, .* is on its way in {item.number}")
    twice = list(found)
    twice[0] = changed(found[0], place, item, item)
    refused(twice, f"rank 0, instruction {place + 1}, .*{item.number} is begun a second time")
    wrong = list(found)
    wrong[0] = changed(found[0], finish, Finish(4321))
    refused(wrong, "nothing is under way as 4321")


def test_layouts_other_than_assigned() -> None:
    graph, assignment, found = lowered()
    other = styled(graph, (2, 2), "model")
    with pytest.raises(PlanError, match=r"rank 0, .* assigned was"):
        verify(found, graph, other)
    values = dict(found[1].values)
    name = next(n for n, v in values.items() if S(0) in v.layout)
    values[name] = replace(values[name], layout=(B, B))
    with pytest.raises(PlanError, match=rf"rank 1: {re.escape(name)} is .*; of .* in \[B, B\]"):
        verify([found[0], replace(found[1], values=values), *found[2:]], graph, assignment)
    call = find(found[0], lambda i: isinstance(i, Call) and i.after is not None, -1)
    with pytest.raises(PlanError, match=r"never calls"):
        verify([changed(found[0], call), *found[1:]], graph, assignment)


# Small programs of their own: exchanges of lines, sends and receives.


SPEC = Spec((2,), torch.float32)
NAMES = "abcdefgh"


def program(rank: int, sizes: tuple[int, ...], items: Sequence[Instruction], given: str) -> Program:
    """Has `a` and `b`, and gives what is said."""
    layout = (B,) * len(sizes)
    at = {(2,): [(0,), (1,)], (2, 2): [(0, 0), (0, 1), (1, 0), (1, 1)]}[sizes][rank]
    return Program(
        rank=rank,
        coordinates=at,
        sizes=sizes,
        instructions=tuple(items),
        values={name: Value("a", layout, SPEC) for name in NAMES},
        inputs={"a": layout, "b": layout},
        outputs=tuple(Given("output", name, name, name) for name in given),
        renewed={},
    )


def sum_of(number: int, axis: int, ranks: tuple[int, ...], source: str, result: str,
           sequence: int = 0) -> Exchange:  # fmt: skip
    return Exchange(number, "all_reduce", axis, ranks, sequence, (Move(source, result),))


def across(rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lines of a rank of 2 x 2."""
    return ((0, 2), (1, 3))[rank % 2], ((0, 1), (2, 3))[rank // 2]


def crossing(rank: int, turned: bool, waits: bool) -> Program:
    """Sums along both axes; `turned`: first along the other."""
    down, along = across(rank)
    first, second = sum_of(0, 0, down, "a", "c"), sum_of(1, 1, along, "b", "d")
    order = [second, first] if turned else [first, second]
    items: list[Instruction] = []
    for item in order:
        items += [item, Finish(item.number)] if waits else [item]
    if not waits:
        items += [Finish(item.number) for item in order]
    return program(rank, (2, 2), items, "cd")


def test_two_lines_in_opposite_order_are_a_deadlock() -> None:
    verify([crossing(rank, False, True) for rank in range(4)])
    # Each rank waits along one axis for one that waits along the other, in a circle.
    turned = [crossing(rank, rank in (1, 2), True) for rank in range(4)]
    text = refused(turned, "all wait for one another")
    for rank in range(4):
        assert re.search(rf"rank {rank}, instruction \d, .* waits for rank \d in all_reduce", text)
    # Begun one after the other and finished later, they would pass on threads of their own; an
    # executor that waits where it begins would hang.
    refused(
        [crossing(rank, rank in (1, 2), False) for rank in range(4)], "all wait for one another"
    )


def test_one_line_in_another_order() -> None:
    def two(turned: bool, rank: int) -> Program:
        first = sum_of(0, 0, (0, 1), "a", "c", 0)
        second = sum_of(1, 0, (0, 1), "b", "d", 1)
        items: list[Instruction] = [first, second]
        if turned:
            items = [replace(second, sequence=1), replace(first, sequence=0)]
        return program(rank, (2,), [*items, Finish(0), Finish(1)], "cd")

    verify([two(False, 0), two(False, 1)])
    refused([two(False, 0), two(True, 1)], "rank 1, instruction 0, .*: is number 1, after 0 before")


def test_a_missing_rank() -> None:
    whole = sum_of(0, 0, (0, 1), "a", "c")
    there = program(0, (2,), [whole, Finish(0)], "c")
    verify([there, program(1, (2,), [whole, Finish(0)], "c")])
    text = refused([there, program(1, (2,), [], "")], "all wait for one another")
    assert "rank 0, instruction 0, begin 0: all_reduce 0 on axis 0 [0, 1]" in text
    assert "waits for rank 1 in all_reduce 0" in text
    assert "done: rank 1" in text


def test_lines_that_are_none() -> None:
    bad = program(1, (2,), [sum_of(0, 0, (1,), "a", "c"), Finish(0)], "c")
    good = program(0, (2,), [sum_of(0, 0, (0, 1), "a", "c"), Finish(0)], "c")
    refused([good, bad], r"rank 1, instruction 0, .*\[1\] is not its line of axis 0")


def stage(rank: int, items: Sequence[Instruction], given: str = "") -> Program:
    return program(rank, (2,), items, given)


def test_sends_and_receives() -> None:
    there: list[Instruction] = [Send(0, "a", 1, 0), Send(1, "b", 1, 1), Finish(0), Finish(1)]
    back: list[Instruction] = [Receive(0, "c", 0, 0), Receive(1, "d", 0, 1), Finish(0), Finish(1)]
    verify([stage(0, there), stage(1, back, "cd")])
    # A receive without its send, also because it comes from another rank.
    text = refused([stage(0, there[:1] + there[2:3]), stage(1, back, "cd")], "all wait")
    assert "rank 1, instruction 3, finish 1 waits for rank 0 to send number 1" in text
    swapped: list[Instruction] = [Receive(0, "c", 0, 1), Receive(1, "d", 0, 0), *back[2:]]
    refused(
        [stage(0, there), stage(1, swapped, "cd")], "rank 1, .*: is number 1, after 0 before it"
    )


def test_a_swapped_send() -> None:
    """Of two tensors of other shapes the second is sent first."""

    def wide(of: Program, name: str) -> Program:
        value = Value("b", (B,), Spec((3,), torch.float32))
        return replace(of, values={**of.values, name: value})

    there: list[Instruction] = [Send(0, "a", 1, 0), Send(1, "b", 1, 1), Finish(0), Finish(1)]
    back: list[Instruction] = [Receive(0, "c", 0, 0), Receive(1, "d", 0, 1), Finish(0), Finish(1)]
    receiver = wide(stage(1, back, "cd"), "d")
    verify([wide(stage(0, there), "b"), receiver])
    turned: list[Instruction] = [Send(0, "b", 1, 0), Send(1, "a", 1, 1), Finish(0), Finish(1)]
    text = refused([wide(stage(0, turned), "b"), receiver], "rank 1, instruction 2, finish 0: c is")
    assert "rank 0 sends" in text


def test_ranks_that_wait_for_one_another_s_sends() -> None:
    def one(rank: int, first: bool) -> Program:
        send: list[Instruction] = [Send(0, "a", 1 - rank, 0), Finish(0)]
        receive: list[Instruction] = [Receive(1, "c", 1 - rank, 0), Finish(1)]
        return stage(rank, send + receive if first else receive + send, "c")

    verify([one(0, True), one(1, False)])
    verify([one(0, True), one(1, True)])  # sends do not wait to be received
    refused([one(0, False), one(1, False)], "all wait for one another")


def test_what_is_never_finished_or_never_made() -> None:
    both = (0, 1)
    begun = [stage(rank, [sum_of(0, 0, both, "a", "c")]) for rank in range(2)]
    refused(begun, "rank 0, at its end: 0 is begun, and never finished")
    refused([stage(rank, [], "c") for rank in range(2)], "rank 0, at its end: c is an output, and")
    again: list[Instruction] = [Local("same", "a", "c"), Local("same", "b", "c")]
    refused([stage(0, again, "c"), stage(1, [])], "rank 0, instruction 1, .*: c is made a second")
    refused([stage(0, [Local("slice", "a", "c", ((0, 1),))], "c"), stage(1, [])], "by a box of")
    refused([stage(1, []), stage(0, [])], "program 0 is rank 1's")
