"""A pipeline of all ranks, in this process, beside the same micro-batches by one: to rounding.

Losses, parameters, buffers and optimizer state of three steps; the latter are as good as gradients,
as each is a function of all gradients so far. float64, so that 1e-10 is far above rounding and far
below any fault.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from penstock.errors import PlanError
from penstock.model.capture import capture
from penstock.model.clipping import Clipping
from penstock.model.graph import Graph
from penstock.plan.costs.operators import flops
from penstock.plan.costs.routes import Routes
from penstock.plan.memory.footprint import footprint
from penstock.plan.pipelines.micro_batch import accumulated
from penstock.plan.pipelines.schedule import interleaved
from penstock.plan.pipelines.staged import Staged, staged, staged_program
from penstock.plan.pipelines.stages import Stages, cut
from penstock.plan.programs.program import Finish, Program, Receive, Send
from penstock.plan.programs.verify import verify
from penstock.testing.assignments import Style, cluster, styled
from penstock.testing.networks import ADAMW, SGD, Example, following, tiny

pytestmark = pytest.mark.usefixtures("deadline")

MICRO_BATCH = 2
NAMES = ["mlp", "resnet", "autoencoder", "lstm", "gpt", "bert", "vit", "recommender", "mixture"]
CASES = [(2, 1, 3, (1,)), (3, 1, 3, (1,)), (4, 1, 4, (1,)), (2, 2, 4, (1,)), (2, 1, 2, (2,))]
"""Ranks of the pipeline, chunks, micro-batches, and the mesh inside a stage."""
STEPS = 3


@functools.cache
def example(name: str, micro_batches: int) -> Example:
    return tiny(name, batch=MICRO_BATCH * micro_batches)


@functools.cache
def graph_of(name: str, norm: float | None = None) -> Graph:
    small = tiny(name, batch=MICRO_BATCH)
    optimizer = SGD if name in ("resnet", "lstm") else ADAMW
    clipping = None if norm is None else Clipping(norm=norm)
    return capture(small.network, small.loss, small.batch, optimizer, clipping=clipping)


def piped(
    graph: Graph,
    ranks: int,
    chunks: int,
    micro_batches: int,
    sizes: Sequence[int] = (1,),
    style: Style = "data",
) -> Staged:
    stages = cut(graph, ranks * chunks, lambda n: flops(n, graph.specs) + 1e3, lambda b: b)
    assignment = styled(graph, sizes, style)
    routes = Routes(cluster(sizes), sizes)
    return staged(stages, assignment, interleaved(ranks, chunks, micro_batches), routes)


def seeds(graph: Graph) -> list[dict[str, torch.Tensor]]:
    has = any(item.name == "seed" for item in graph.inputs)
    return [{"seed": torch.tensor(7 + step)} if has else {} for step in range(STEPS)]


@functools.cache
def serial(
    name: str, micro_batches: int, norm: float | None = None
) -> list[dict[str, torch.Tensor]]:
    graph = graph_of(name, norm)
    step = accumulated(graph, micro_batches)
    now, found = example(name, micro_batches).inputs(graph), []
    for fresh in seeds(graph):
        found.append(step(now | fresh))
        now = following(graph, now, found[-1])
    return found


def assert_equal(
    graph: Graph,
    found: Sequence[dict[str, torch.Tensor]],
    expected: Sequence[dict[str, torch.Tensor]],
) -> None:
    assert len(found) == len(expected) == STEPS
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {output.name for output in graph.outputs}
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-10)


def cases() -> Iterator[Any]:
    """Of each network two pipelines are tried by `make test`, in turn; all by `make torture`."""
    for place, name in enumerate(NAMES):
        for number, case in enumerate(CASES):
            quick = number in (place % len(CASES), (place + 2) % len(CASES))
            yield pytest.param(name, *case, marks=() if quick else (pytest.mark.torture,))


@pytest.mark.parametrize(("name", "ranks", "chunks", "micro_batches", "sizes"), list(cases()))
def test_a_pipeline_is_the_serial_step(
    name: str, ranks: int, chunks: int, micro_batches: int, sizes: tuple[int, ...]
) -> None:
    graph = graph_of(name)
    pipeline = piped(graph, ranks, chunks, micro_batches, sizes)
    pipeline.check()
    given = example(name, micro_batches).inputs(graph)
    found = pipeline.run_all(given, seeds(graph))
    assert_equal(graph, found, serial(name, micro_batches))


@pytest.mark.parametrize("style", ["zero", "model"])
def test_inside_a_stage_anything_may_be_split(style: Style) -> None:
    graph = graph_of("gpt")
    pipeline = piped(graph, 2, 1, 2, (2,), style)
    pipeline.check()
    found = pipeline.run_all(example("gpt", 2).inputs(graph), seeds(graph))
    assert_equal(graph, found, serial("gpt", 2))


def test_a_rank_alone_writes_the_same_program() -> None:
    pipeline = piped(graph_of("gpt", 0.1), 2, 1, 2, (2,))
    stages, sizes = pipeline.stages, (2,)
    for rank in (0, 3):
        program = staged_program(
            stages,
            styled(stages.graph, sizes, "data"),
            pipeline.schedule,
            Routes(cluster(sizes), sizes),
            rank,
        )
        assert list(program.lines()) == list(pipeline.programs[rank].lines())


def test_the_norm_of_all_gradients_goes_down_the_line() -> None:
    graph = graph_of("gpt", 0.1)
    pipeline = piped(graph, 3, 1, 3, (2,))
    pipeline.check()
    found = pipeline.run_all(example("gpt", 3).inputs(graph), seeds(graph))
    assert_equal(graph, found, serial("gpt", 3, 0.1))
    weight = graph.output("parameter", "norm.weight").name
    assert not torch.equal(found[0][weight], serial("gpt", 3)[0][weight])  # the limit limits


@pytest.mark.parametrize("name", ["mlp", "autoencoder", "vit"])
def test_micro_batches_are_the_whole_batch_where_examples_do_not_mix(name: str) -> None:
    """Without batch norm and dropout: the reference itself, beside the graph of the whole batch."""
    whole = example(name, 3)
    graph = capture(whole.network, whole.loss, whole.batch, ADAMW)
    now = whole.inputs(graph)
    for found in serial(name, 3):
        expected = graph.run(now)
        now = following(graph, now, expected)
        for output in graph_of(name).outputs:
            other = graph.output(output.role, output.target).name
            torch.testing.assert_close(found[output.name], expected[other], rtol=1e-10, atol=1e-10)


def test_a_tied_parameter_lives_in_the_first_stage_that_reads_it() -> None:
    graph = graph_of("gpt")
    pipeline = piped(graph, 3, 1, 3)
    stages = pipeline.stages
    assert stages.home["tokens.weight"] == 0
    assert stages.home["norm.weight"] == 2
    first, _, last = pipeline.programs
    weight = "tokens.weight"
    assert weight in first.inputs
    assert weight not in last.inputs
    assert sum(sent == weight for sent, _ in letters(first)) == 1  # once a step
    gradients = [s for s, _ in letters(last) if pipeline.parts[2].graph.specs[s].shape == (32, 16)]
    assert len(gradients) == 1
    assert gradients[0].endswith("#sum")


def letters(program: Program) -> Iterator[tuple[str, int]]:
    """What a rank sends, and to whom."""
    for item in program.instructions:
        if isinstance(item, Send):
            yield program.values[item.source].tensor, item.peer


def test_what_a_rank_holds_does_not_grow_with_micro_batches() -> None:
    """But for their data: the first of two ranks has two in flight, and the last one has one."""
    graph = graph_of("vit")

    def held(micro_batches: int) -> list[int]:
        pipeline = piped(graph, 2, 1, micro_batches)
        data = {f"{name}#{number}" for name in ("x", "y") for number in range(micro_batches)}
        found = []
        for program in pipeline.programs:
            given = sum(program.values[n].spec.num_bytes for n in data & program.inputs.keys())
            found.append(footprint(program).peak_bytes - given)
        return found

    few, some, many = held(2), held(4), held(12)
    assert many[0] == pytest.approx(some[0], rel=0.02)
    assert many[1] == pytest.approx(some[1], rel=0.02)
    assert few[0] <= some[0] * 1.02
    assert held(1)[0] < 0.9 * few[0]  # the control: one in flight is less


@pytest.fixture
def pipeline() -> Staged:
    return piped(graph_of("mlp"), 2, 1, 3)


def swapped(program: Program, kind: type[Send] | type[Receive]) -> Program:
    """Two that are alike in all but what they carry, in each other's place."""
    items = list(program.instructions)
    places = [n for n, item in enumerate(items) if isinstance(item, kind)]
    one, other = (items[place] for place in places[:2])
    assert isinstance(one, Send | Receive)
    assert isinstance(other, Send | Receive)
    key = "source" if kind is Send else "result"
    items[places[0]] = replace(one, **{key: getattr(other, key)})
    items[places[1]] = replace(other, **{key: getattr(one, key)})
    return replace(program, instructions=tuple(items))


def test_a_swapped_send_is_found(pipeline: Staged) -> None:
    """Of equal shape: only what it is tells the micro-batches apart."""
    first, last = pipeline.programs
    verify(pipeline.programs)
    with pytest.raises(PlanError, match="is not there yet"):
        verify([swapped(first, Send), last])
    # A send of what has been made by then, and is of an earlier micro-batch.
    items = list(first.instructions)
    sends = [n for n, item in enumerate(items) if isinstance(item, Send)]
    old, new = items[sends[0]], items[sends[1]]
    assert isinstance(old, Send)
    assert isinstance(new, Send)
    finish = items.index(Finish(old.number))
    free = next(
        n for n in range(finish, len(items)) if old.source in getattr(items[n], "names", ())
    )
    names = tuple(name for name in items[free].names if name != old.source)  # type: ignore[union-attr]
    items[free] = replace(items[free], names=names)  # type: ignore[arg-type]
    items[sends[1]] = replace(new, source=old.source)
    with pytest.raises(PlanError, match=r"#1 .* rank 0 sends .*#0 "):
        verify([replace(first, instructions=tuple(items)), last])


def test_a_swapped_receive_is_found(pipeline: Staged) -> None:
    first, last = pipeline.programs
    with pytest.raises(PlanError, match=r"#1 .* rank 0 sends .*#0 "):
        verify([first, swapped(last, Receive)])


def test_a_missing_send_is_found(pipeline: Staged) -> None:
    first, last = pipeline.programs
    send = next(item for item in reversed(first.instructions) if isinstance(item, Send))
    items = tuple(i for i in first.instructions if i not in (send, Finish(send.number)))
    with pytest.raises(
        PlanError, match=f"rank 1.* waits for rank 0 to send number {send.sequence}"
    ):
        verify([replace(first, instructions=items), last])


def test_ranks_that_wait_in_a_circle_are_found(pipeline: Staged) -> None:
    """The first rank waits for the first gradient before it sends what that is made of."""
    first, last = pipeline.programs
    items = list(first.instructions)
    receive = next(item for item in items if isinstance(item, Receive))
    finish = Finish(receive.number)
    for item in (receive, finish):
        items.remove(item)
    with pytest.raises(PlanError, match="all wait for one another"):
        verify([replace(first, instructions=(receive, finish, *items)), last])


def test_a_fault_in_a_micro_batch_is_seen() -> None:
    """The control of all comparisons: batches in another order are another step."""
    graph = graph_of("resnet")
    other = piped(graph, 2, 1, 3)
    given = example("resnet", 3).inputs(graph)
    turned = given | {name: given[name].roll(MICRO_BATCH, 0) for name in ("x", "y")}
    found = other.run_all(turned, seeds(graph))
    with pytest.raises(AssertionError):
        assert_equal(graph, found, serial("resnet", 3))  # batch norm's statistics go in order


class _Penalized(nn.Module):
    """Whose loss has a part that is of parameters alone, and a parameter that is in no other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        penalty = (self.first.weight**2).sum() * 0.1 + (self.scale**2).sum()
        return self.second(torch.tanh(self.first(x))).square().mean() + penalty


def test_what_depends_on_parameters_alone_counts_once_a_micro_batch() -> None:
    torch.manual_seed(0)
    network = _Penalized().double()
    x, y = torch.randn(6, 5).double(), torch.zeros(6)
    whole = Example(network, x, y, lambda output, _: output)
    graph = capture(network, whole.loss, (x[:2], y[:2]), SGD)
    given = whole.inputs(graph)
    pipeline = piped(graph, 2, 1, 3)
    pipeline.check()
    (found,) = pipeline.run_all(given)
    expected = accumulated(graph, 3)(given)
    plain = capture(network, whole.loss, (x, y), SGD)
    other = plain.run(whole.inputs(plain))
    for output in graph.outputs:
        name = plain.output(output.role, output.target).name
        for one in (found, expected):
            torch.testing.assert_close(one[output.name], other[name], rtol=1e-10, atol=1e-10)


def test_stages_are_read_again_from_their_cuts() -> None:
    stages = piped(graph_of("mlp"), 2, 1, 2).stages
    again = Stages(stages.graph, stages.cuts)
    assert again.of == stages.of
    with pytest.raises(PlanError, match="not forward nodes"):
        Stages(stages.graph, ("no node",))
