"""A step on a mesh is the step of one process: losses, parameters, state and gradients.

Three steps of different batches, in float64, within 1e-10: sums are taken in another order, and
nothing else differs; dropout, too, is the same. All ranks run in this process;
`test_plan_processes` has some of it between processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penstock.errors import PlanError
from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph
from penstock.plan.assignment import Assignment
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, P, S
from penstock.plan.programs.interpret import run_all
from penstock.plan.programs.lower import lower
from penstock.plan.programs.program import Call, Program
from penstock.plan.programs.verify import verify
from penstock.plan.rules.formula import Signature
from penstock.plan.rules.localize import RULES as LOCAL
from penstock.plan.rules.signatures import has_rule
from penstock.plan.search.search import Search
from penstock.testing.assignments import STYLES, Style, cluster, greedy, styled
from penstock.testing.networks import ADAMW, SGD, TINY, Example, following, tiny

pytestmark = pytest.mark.usefixtures("deadline")

TOLERANCE = 1e-10
BUCKET_BYTES = 2048
"""So that the tiny networks have several buckets, and tensors that travel alone."""
MESHES = [(2,), (3,), (4,), (2, 2)]
"""The batch of 6 is cut evenly by 2 and 3, and unevenly by 4."""
WAYS = (*STYLES, "search")
"""By hand, and as the search splits it."""


def cases() -> Iterator[Any]:
    """All networks, ways and meshes; of each network's ways one mesh is tried by `make test`, in
    turn, and the rest by `make torture`."""
    for place, name in enumerate(TINY):
        for number, way in enumerate(WAYS):
            meshes = [sizes for sizes in MESHES if way != "mixed" or len(sizes) > 1]
            for sizes in meshes:
                first = sizes == meshes[(place + number) % len(meshes)]
                quick = first and (way != "search" or name in SEARCHED)
                marks = () if quick else (pytest.mark.torture,)
                yield pytest.param(name, way, sizes, marks=marks)


SEARCHED = ("mlp", "lstm", "gpt", "mixture")
Outputs = list[dict[str, torch.Tensor]]


@functools.cache
def captured(name: str, optimizer: bool = True) -> tuple[Example, Graph]:
    example = tiny(name)
    chosen = ADAMW if name in ("mlp", "gpt", "recommender") else SGD
    return example, capture(
        example.network, example.loss, example.batch, chosen if optimizer else None
    )


def batches(example: Example, graph: Graph) -> list[dict[str, torch.Tensor]]:
    """What is new in each of three steps: the batch in another order of rows, and the seed."""
    seeds = [torch.tensor(seed) for seed in (7, 8, 9)]
    given = [
        {"x": example.x.roll(step, 0), "y": example.y.roll(step * (1 + step), 0), "seed": seed}
        for step, seed in enumerate(seeds)
    ]
    names = {item.name for item in graph.inputs}
    return [{name: t for name, t in fresh.items() if name in names} for fresh in given]


@functools.cache
def serial(name: str) -> Outputs:
    """The steps of one process."""
    example, graph = captured(name)
    inputs, found = example.inputs(graph), []
    for fresh in batches(example, graph):
        inputs |= fresh
        found.append(graph.run(inputs))
        inputs = following(graph, inputs, found[-1])
    return found


def programs_of(graph: Graph, assignment: Assignment) -> tuple[Program, ...]:
    sizes = assignment.sizes
    routes = Routes(cluster(sizes), sizes)
    programs = lower(graph, assignment, routes, bucket_bytes=BUCKET_BYTES, in_flight=2)
    verify(programs, graph, assignment)
    return programs


def parallel(example: Example, graph: Graph, assignment: Assignment) -> Outputs:
    programs = programs_of(graph, assignment)
    return run_all(graph, programs, example.inputs(graph), batches(example, graph))


def distance(one: Outputs, other: Outputs) -> float:
    """The largest difference of any element of any output of any step."""
    assert len(one) == len(other)
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            difference = (a[name].double() - b[name].double()).abs()
            assert torch.isfinite(difference).all(), name
            worst = max(worst, float(difference.max()))
    return worst


def assigned(graph: Graph, sizes: tuple[int, ...], way: str) -> Assignment:
    if way == "search":
        return Search(graph, cluster(sizes), sizes).find(time_limit_s=20.0).assignment
    return styled(graph, sizes, cast("Style", way))


@pytest.mark.parametrize(("name", "way", "sizes"), list(cases()), ids=str)
def test_three_steps(name: str, way: str, sizes: tuple[int, ...]) -> None:
    example, graph = captured(name)
    assignment = assigned(graph, sizes, way)
    assert any(p not in (B, None) for chosen in assignment.nodes.values()
               for signature in chosen for p in signature.outputs)  # fmt: skip
    found = parallel(example, graph, assignment)
    assert distance(found, serial(name)) <= TOLERANCE
    # The steps do something, and not the same: otherwise nothing would have been compared.
    first, *_, last = (outputs[graph.output("loss").name] for outputs in found)
    assert abs(float(first - last)) > 1e-3


@pytest.mark.parametrize("name", ["mlp", "gpt"])
@pytest.mark.parametrize("style", ["data", "zero", "model"])
def test_gradients(name: str, style: Style) -> None:
    example, graph = captured(name, False)
    assert {output.role for output in graph.outputs} == {"loss", "gradient"}
    whole = graph.run(example.inputs(graph))
    programs = programs_of(graph, styled(graph, (3,), style))
    assert distance(run_all(graph, programs, example.inputs(graph)), [whole]) <= TOLERANCE


class Odd(nn.Module):
    """Has an operator that nobody splits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.logcumsumexp(self.first(x), 1))
        return out


@pytest.mark.parametrize("style", ["data", "zero", "model"])
def test_an_operator_without_a_rule_runs_on_copies(style: Style) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        example = Example(Odd(), torch.randn(6, 4), torch.randint(3, (6,)), F.cross_entropy)
        graph = capture(example.network, example.loss, example.batch, SGD)
        odd = [node for node in graph.nodes if not has_rule(node.op)]
        assert any("logcumsumexp" in node.op for node in odd)
        whole = graph.run(example.inputs(graph))
        programs = programs_of(graph, styled(graph, (3,), style))
        names = {name for node in odd for name in node.inputs}
        called = [i.node for i in programs[1].instructions if isinstance(i, Call)]
        read = {name for node in called if not has_rule(node.op) for name in node.inputs}
        assert {programs[1].values[name].tensor for name in read} == names
        assert {programs[1].values[name].layout for name in read} == {(B,)}
        assert distance(run_all(graph, programs, example.inputs(graph)), [whole]) <= TOLERANCE
    finally:
        torch.set_default_dtype(before)


def with_wrong_rules(op: str, change: Callable[[Signature], Signature]) -> Outputs:
    """The steps of data parallelism on two ranks, but for signatures of one operator."""
    example, graph = captured("mlp")
    assignment = styled(graph, (2,), "data")
    nodes: dict[str, Any] = dict(assignment.nodes)
    for node in graph.nodes:
        if node.op == op and node.phase != "update":
            nodes[node.name] = tuple(map(change, nodes[node.name]))
    assert nodes != assignment.nodes
    return parallel(example, graph, replace(assignment, nodes=nodes))


def test_control_wrong_values_are_seen() -> None:
    """The sum of logarithms of softmax is taken for that of the sum."""
    found = with_wrong_rules("aten._log_softmax.default", lambda _: Signature((P,), (P,)))
    assert distance(found, serial("mlp")) > 1e-3


def test_control_copies_that_differ_are_seen() -> None:
    """Each rank's own gradient is taken for that of all."""
    with pytest.raises(PlanError, match="to be the same on ranks 0 and 1, and is not"):
        with_wrong_rules(
            "aten.t.default", lambda of: Signature((P,), (B,)) if of.inputs == (P,) else of
        )


# A vocabulary that is split: no rank has all logits of a row.


def without_some(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of targets, some do not count."""
    return F.cross_entropy(logits, y, ignore_index=5)


def smoothed(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, y, label_smoothing=0.1)


def rows_by_themselves(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, y, reduction="none").square().sum() / 100


def speaking(loss: Any, tied: bool = False) -> Example:
    """A transformer of 259 words, which neither 2 nor 3 nor 4 ranks cut evenly."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = zoo.gpt(259, width=8, heads=2, layers=1, length=6, tied=tied)
            x, y = torch.randint(259, (2, 4, 6))
            y[0, :3] = 5
            return Example(network, x, y, loss)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("sizes", [(2,), (3,), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("loss", [F.cross_entropy, without_some, rows_by_themselves, smoothed])
def test_a_vocabulary_that_is_split(loss: Any, tied: bool, sizes: tuple[int, ...]) -> None:
    example = speaking(loss, tied)
    graph = capture(example.network, example.loss, example.batch, ADAMW)
    table = "tokens.weight" if tied else "head.weight"
    assignment = greedy(graph, sizes, {table: (S(0),) * len(sizes)})
    gradients = [node for node in graph.nodes if node.op == "penstock.class_gradient.default"]
    assert len(gradients) == (loss is not smoothed)
    for node in gradients:
        assert assignment.read_as(graph, node, 1) == (S(1),) * len(sizes)
        assert assignment.layout_of(graph, node.name) == (S(1),) * len(sizes)
    inputs, wanted = example.inputs(graph), []
    for fresh in batches(example, graph):
        inputs |= fresh
        wanted.append(graph.run(inputs))
        inputs = following(graph, inputs, wanted[-1])
    assert distance(parallel(example, graph, assignment), wanted) <= TOLERANCE


def test_control_classes_in_a_wrong_place_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank takes its classes for the first."""
    for op in ("aten.gather", "penstock.class_gradient"):

        def misplaced(it: Any, rule: Any = LOCAL[op]) -> Any:
            node = rule(it)
            return replace(node, args=(*node.args[:-1], 0)) if len(node.args) > 3 else node

        with monkeypatch.context() as patched:
            patched.setitem(LOCAL, op, misplaced)
            with pytest.raises(AssertionError):
                test_a_vocabulary_that_is_split(F.cross_entropy, False, (3,))
