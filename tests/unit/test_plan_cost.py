"""Operators cost as the roofline has it, ways are those that an assignment needs, and a step is the
longer of what cannot go on at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from penstock.errors import PlanError
from penstock.exchange.cost import Link
from penstock.model.capture import capture
from penstock.model.graph import Graph, Input, Node, Output, Ref, Spec, refs
from penstock.plan.assignment import Assignment
from penstock.plan.costs import operators as cost
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.costs.operators import Measured, Operator, StepTime, flops, operator_s, predict
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, Layout, P, Placement, S
from penstock.plan.rules.signatures import Signature, combinations, signatures

DEVICE = Device("made up", {"float32": 1e9, "bfloat16": 4e9}, 1e8, 1 << 34, 1e-5)
CLUSTER = Cluster(1, 4, DEVICE, Link(1e-4, 1e8, 1e-6), Link(1e-4, 1e8, 1e-6))
MANY, WIDE = 1e18, 1e18


def fast(**changed: float) -> Cluster:
    """A device on which only this costs anything."""
    speeds = {"flops": MANY, "memory_bytes_per_s": WIDE, "operator_s": 0.0} | changed
    rate = speeds.pop("flops")
    return replace(CLUSTER, device=replace(DEVICE, flops_per_s={"float32": rate}, **speeds))


def call(
    op: str, *shapes: tuple[int, ...], more: tuple[object, ...] = (), dtype: str = "float32"
) -> tuple[Node, dict[str, Spec]]:
    """A node on tensors a, b, ..., and the specs of those and of what it gives."""
    kind = getattr(torch, dtype)
    specs = {name: Spec(shape, kind) for name, shape in zip("abcdef", shapes, strict=False)}
    args = (*(Ref(name) for name in specs), *more)
    node = Node("out", op, args, {}, ("out",), "forward")
    given = [torch.empty(s.shape, dtype=s.dtype, device="meta") for s in specs.values()]
    made = node.function(*given, *more)
    if isinstance(made, tuple):
        node = replace(node, outputs=tuple(f"out.{k}" for k in range(len(made))))
    return node, specs | {name: Spec.of(value) for name, value in node.results(made).items()}


def chosen(*signatures: str) -> tuple[Signature, ...]:
    """Of words such as "S0 B -> S0", one for each axis."""

    def read(words: str) -> tuple[Placement, ...]:
        return tuple({"B": B, "P": P}.get(w) or S(int(w[1:])) for w in words.split())

    return tuple(Signature(*(read(side) for side in one.split("->"))) for one in signatures)


def test_a_matrix_product_by_hand() -> None:
    node, specs = call("aten.mm.default", (100, 300), (300, 200))
    assert flops(node, specs) == 2 * 100 * 300 * 200
    found = operator_s(node, specs, chosen("B B -> B"), (4,), CLUSTER)
    assert found == pytest.approx(2 * 100 * 300 * 200 / 1e9 + 1e-5)
    thin, thin_specs = call("aten.mm.default", (1000, 1), (1, 1000))
    touched = 4 * (1000 + 1000 + 1000 * 1000)
    found = operator_s(thin, thin_specs, chosen("B B -> B"), (4,), CLUSTER)
    assert found == pytest.approx(touched / 1e8 + 1e-5)


@pytest.mark.parametrize(
    ("words", "sizes", "share"),
    [
        (("S0 B -> S0",), (4,), 1 / 4),
        (("B S1 -> S1",), (4,), 1 / 4),
        (("S1 S0 -> P",), (4,), 1 / 4),
        (("P B -> P",), (4,), 1),
        (("B B -> B",), (4,), 1),
        (("S0 B -> S0",), (3,), 34 / 100),  # 100 rows on 3: 33, 33, 34
        (("S0 B -> S0", "S0 B -> S0"), (3, 4), 9 / 100),  # 34 rows on 4
        (("S0 B -> S0", "S1 S0 -> P"), (2, 4), 1 / 8),
        (("B B -> B", "B S1 -> S1"), (2, 4), 1 / 4),
    ],
)
def test_the_largest_share_counts(
    words: tuple[str, ...], sizes: tuple[int, ...], share: float
) -> None:
    node, specs = call("aten.mm.default", (100, 300), (300, 200))
    found = operator_s(node, specs, chosen(*words), sizes, fast(flops=1e9))
    assert found == pytest.approx(share * 2 * 100 * 300 * 200 / 1e9)


def test_bytes_are_those_of_the_largest_parts() -> None:
    node, specs = call("aten.mm.default", (100, 300), (300, 200))
    cluster = fast(memory_bytes_per_s=1e8)
    found = operator_s(node, specs, chosen("S1 S0 -> P"), (7,), cluster)
    assert found == pytest.approx(4 * (100 * 43 + 43 * 200 + 100 * 200) / 1e8)
    twice = Node("out", "aten.mul.Tensor", (Ref("a"), Ref("a")), {}, ("out",), "forward")
    specs = {"a": Spec((50, 10), torch.float32), "out": Spec((50, 10), torch.float32)}
    found = operator_s(twice, specs, chosen("S0 S0 -> S0"), (4,), cluster)
    assert found == pytest.approx(4 * (13 * 10) * 2 / 1e8)  # read once, written once


def test_other_operators_have_a_flop_for_each_element() -> None:
    node, specs = call("aten.add.Tensor", (50, 10), (10,))
    assert flops(node, specs) == 500
    found = operator_s(node, specs, chosen("S0 B -> S0"), (4,), fast(flops=1e3))
    assert found == pytest.approx(13 * 10 / 1e3)


@pytest.mark.parametrize(
    ("op", "shape", "more", "signature"),
    [
        ("aten.view.default", (8, 6), ([48],), "S0 -> S0"),
        ("aten.t.default", (8, 6), (), "S0 -> S1"),
        ("aten.expand.default", (8, 1), ([8, 9],), "S0 -> S0"),
        ("aten.select.int", (8, 6), (1, 0), "S0 -> S0"),
        ("aten.slice.Tensor", (8, 6), (1, 0, 3), "S0 -> S0"),
    ],
)
def test_views_cost_nothing(
    op: str, shape: tuple[int, ...], more: tuple[object, ...], signature: str
) -> None:
    node, specs = call(op, shape, more=more)
    assert operator_s(node, specs, chosen(signature), (2,), CLUSTER) == 0.0
    assert flops(node, specs) == 0
    copy, specs = call("aten.clone.default", shape)
    assert operator_s(copy, specs, chosen("B -> B"), (2,), CLUSTER) > 1e-5


def test_a_lookup_reads_no_more_than_it_gives() -> None:
    specs = {"a": Spec((10**6, 8), torch.float32), "b": Spec((32,), torch.int64)}
    specs["out"] = Spec((32, 8), torch.float32)
    node = Node("out", "aten.embedding.default", (Ref("a"), Ref("b")), {}, ("out",), "forward")
    found = operator_s(node, specs, chosen("B B -> B"), (2,), fast(memory_bytes_per_s=1e8))
    assert found == pytest.approx((2 * 32 * 8 * 4 + 32 * 8) / 1e8)


def test_the_rate_is_that_of_the_dtype() -> None:
    node, specs = call("aten.mm.default", (500, 500), (500, 500))
    half, half_specs = call("aten.mm.default", (500, 500), (500, 500), dtype="bfloat16")
    work = 2 * 500**3
    for cluster_node, its_specs, rate in ((node, specs, 1e9), (half, half_specs, 4e9)):
        found = operator_s(cluster_node, its_specs, chosen("B B -> B"), (2,), CLUSTER)
        assert found == pytest.approx(work / rate + 1e-5)


def test_flops_of_convolutions_and_attention() -> None:
    more: tuple[object, ...] = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    node, specs = call("aten.convolution.default", (8, 3, 16, 16), (32, 3, 3, 3), more=more)
    assert flops(node, specs) == 2 * 8 * 32 * 16 * 16 * 3 * 9
    found = operator_s(node, specs, chosen("S0 B -> S0"), (4,), fast(flops=1e9))
    assert found == pytest.approx(2 * 2 * 32 * 16 * 16 * 3 * 9 / 1e9)
    name = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    node, specs = call(name, *[(2, 4, 16, 8)] * 3)
    assert flops(node, specs) == 2 * 2 * (2 * 4) * 16 * 16 * 8


class Gelu(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 24), torch.nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.gelu(self.first(x)))


@functools.cache
def captured() -> Graph:
    batch = torch.randn(8, 12), torch.randn(8, 4)
    make = functools.partial(torch.optim.SGD, lr=0.1)
    return capture(Gelu(), torch.nn.functional.mse_loss, batch, make)


def data_parallel(graph: Graph, sizes: tuple[int, ...]) -> Assignment:
    """The batch split, parameters copied: each node the first signature that fits its inputs."""
    inputs = {i.name: (S(0) if i.role == "data" else B,) * len(sizes) for i in graph.inputs}
    nodes: dict[str, tuple[Signature, ...]] = {}
    split = Assignment(sizes, inputs, nodes)
    for node in graph.nodes:
        ways = combinations(node, graph.specs, sizes)
        have = [split.layout_of(graph, name) for name in node.inputs]
        want = [tuple(B if p == P else p for p in layout) for layout in have]
        if node.phase == "update":
            want = [(B,) * len(sizes)] * len(want)

        def reads(way: tuple[Signature, ...]) -> list[Layout]:
            return [tuple(one.inputs[k] for one in way) for k in range(len(way[0].inputs))]

        nodes[node.name] = next(
            (way for lay in (have, want) for way in ways if reads(way) == lay), ways[0]
        )
    return split


def test_ways_of_data_parallel_are_its_gradients() -> None:
    graph, sizes = captured(), (4,)
    routes = Routes(CLUSTER, sizes)
    ways = list(data_parallel(graph, sizes).ways(graph, routes))
    gradients = {o.name for o in graph.outputs if o.role == "gradient"}
    kinds = {way.tensor: [hop.kind for hop in way.way.hops] for way in ways}
    updated = {ref.name for n in graph.nodes if n.phase == "update" for ref in refs(n.args)}
    exchanged = {name for name, hops in kinds.items() if hops == ["all_reduce"]}
    assert len(exchanged & (gradients | updated)) == 4
    assert len({(way.tensor, way.target) for way in ways}) == len(ways)
    for way in ways:
        assert way.source == (P,)
        assert way.target == (B,)


def test_a_step_of_data_parallel_hides_its_gradients() -> None:
    graph, sizes = captured(), (4,)
    split = data_parallel(graph, sizes)
    found = predict(graph, split, Routes(CLUSTER, sizes))
    compute_s = sum(
        operator_s(n, graph.specs, split.nodes[n.name], sizes, CLUSTER) for n in graph.nodes
    )
    exchange_s = sum(w.way.cost_s for w in split.ways(graph, Routes(CLUSTER, sizes)))
    assert found.compute_s == pytest.approx(compute_s)
    assert found.exchange_s == pytest.approx(exchange_s)
    assert found.step_s == pytest.approx(compute_s + exchange_s - found.overlapped_s)
    assert 0 < found.overlapped_s < exchange_s


SPEC = Spec((1000, 1000), torch.float32)


def chain(phases: str) -> Graph:
    """Nodes n0, n1, ... each of what the one before gives; and updates, each of what the last node
    before it in another phase gives. "f", "b" and "u" are the phases."""
    names = {"f": "forward", "b": "backward", "u": "update"}
    nodes, last = [], "x"
    for number, phase in enumerate(phases):
        name = f"n{number}"
        node = Node(name, "aten.clone.default", (Ref(last),), {}, (name,), names[phase])  # type: ignore[arg-type]
        nodes.append(node)
        last = last if phase == "u" else name
    inputs = (Input("x", "data", "x"),)
    specs = {"x": SPEC} | {node.name: SPEC for node in nodes}
    return Graph(inputs, tuple(nodes), (Output("output", "y", last),), specs)


def step_of(
    phases: str, lays: str, monkeypatch: pytest.MonkeyPatch, *, compute_s: float, way_s: float
) -> StepTime:
    """The time of a chain whose node k reads lays[k][0] and gives lays[k][1]; made-up prices."""
    graph = chain(phases)
    read: Callable[[str], Placement] = lambda word: {"B": B, "P": P}.get(word) or S(int(word))  # noqa: E731
    nodes = {
        node.name: (Signature((read(lay[0]),), (read(lay[1]),)),)
        for node, lay in zip(graph.nodes, lays.split(), strict=True)
    }
    routes = Routes(CLUSTER, (4,))
    find = routes.way
    monkeypatch.setattr(
        routes, "way", lambda *asked: replace(way, cost_s=way_s) if (way := find(*asked)) else None
    )
    monkeypatch.setattr(cost, "operator_s", lambda *_: compute_s)
    return predict(graph, Assignment((4,), {"x": (S(0),)}, nodes), routes)


@pytest.mark.parametrize(
    ("phases", "lays", "step_s", "overlapped_s"),
    [
        ("ff", "00 00", 2, 0),  # nothing goes anywhere
        ("ff", "00 BB", 2 + 3, 0),  # waited for
        ("fbu", "00 0P BB", 3 + 3, 0),  # nothing to hide behind
        ("fbub", "00 00 BB 00", 4 + 2, 1),  # hidden behind what follows
        ("fbubbbbb", "00 00 BB 00 00 00 00 00", 8, 3),
        ("fbub", "00 00 BB BB", 4 + 3, 0),  # what follows waits too
    ],
)
def test_lanes(
    phases: str, lays: str, step_s: float, overlapped_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node takes 1 s, and each way 3 s."""
    found = step_of(phases, lays, monkeypatch, compute_s=1, way_s=3)
    assert (found.step_s, found.overlapped_s) == (step_s, overlapped_s)
    assert found.compute_s == len(phases)


def test_an_update_waits_only_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backward node's sum is read by its update; the next node reads x instead."""
    graph = chain("f")
    nodes = [graph.nodes[0]]
    for number in range(3):
        nodes.append(Node(f"b{number}", "aten.clone.default", (Ref("n0"),), {}, (f"b{number}",),
                          "backward"))  # fmt: skip
        nodes.append(Node(f"u{number}", "aten.clone.default", (Ref(f"b{number}"),), {},
                          (f"u{number}",), "update"))  # fmt: skip
    specs = {"x": SPEC} | {node.name: SPEC for node in nodes}
    graph = Graph(graph.inputs, tuple(nodes), (), specs)
    signature = {"f": "S0 -> S0", "b": "S0 -> P", "u": "B -> B"}
    chose = {n.name: chosen(signature[n.phase[0]]) for n in nodes}
    routes = Routes(CLUSTER, (4,))
    way = routes.way((4,), 4, (P,), (B,))
    assert way is not None

    def predicted(way_s: float) -> StepTime:
        monkeypatch.setattr(routes, "way", lambda *_: replace(way, cost_s=way_s))
        monkeypatch.setattr(cost, "operator_s", lambda *_: 1.0)
        return predict(graph, Assignment((4,), {"x": (S(0),)}, chose), routes)

    # n0 b0 b1 b2, and then the updates; the ways begin at 2, 3 and 4.
    assert predicted(0.5) == StepTime(7.0, 1.5, 1.5, 7.0)
    assert predicted(2.0).step_s == pytest.approx(2 + 3 * 2 + 1)
    assert predicted(10.0).step_s == pytest.approx(2 + 3 * 10 + 1)
    assert predicted(0.0) == StepTime(7.0, 0.0, 0.0, 7.0)


def test_outputs_lie_as_they_are_asked() -> None:
    graph, sizes = captured(), (2,)
    split = data_parallel(graph, sizes)
    sharded = replace(split, inputs={**split.inputs, "first.weight": (S(0),)})
    for output in graph.outputs:
        want = {"loss": (B,)}.get(output.role, (B,))
        if output.target == "first.weight":
            want = (S(0),)
        assert sharded.output_layout(graph, output) == want
    loss = graph.output("loss")
    asked = replace(split, outputs={loss.name: (P,)})
    assert asked.output_layout(graph, loss) == (P,)
    ways = {way.tensor: way for way in sharded.ways(graph, Routes(CLUSTER, sizes))}
    assert [o.target for o in ways[loss.name].outputs] == [""]
    assert ways["first.weight"].target == (B,)  # gathered once for all that read it whole
    assert len(ways["first.weight"].consumers) >= 1
    assert ways["first.weight"].outputs == ()


def test_what_cannot_be_is_an_error() -> None:
    graph = captured()
    split = data_parallel(graph, (4,))
    loss = graph.output("loss").name
    impossible = replace(split, outputs={loss: (S(0),)})
    with pytest.raises(PlanError, match=rf"{loss} float32\[\] cannot go from .* to \[S0\]"):
        list(impossible.ways(graph, Routes(CLUSTER, (4,))))


def test_measured_times_come_first() -> None:
    node, specs = call("aten.mm.default", (100, 300), (300, 200))
    whole = Measured().with_nodes([node], specs)
    ((key, seconds),) = whole.seconds.items()
    assert key == "aten.mm.default(float32[100, 300], float32[300, 200]) -> float32[100, 200]"
    assert 1e-7 < seconds < 10
    assert Operator(node, specs, CLUSTER, whole).seconds(chosen("B B -> B"), (2,)) == seconds
    part = Measured({key.replace("100", "50"): 42.0})
    assert part.with_nodes([node], specs).seconds.keys() == {key, *part.seconds}
    assert operator_s(node, specs, chosen("S0 B -> S0"), (2,), CLUSTER, part) == 42.0
    roofline = operator_s(node, specs, chosen("S0 B -> S0"), (2,), CLUSTER)
    assert operator_s(node, specs, chosen("S0 B -> S0"), (2,), CLUSTER, whole) == roofline


def test_every_node_of_a_network_has_a_price_however_it_is_split() -> None:
    graph, sizes = captured(), (2, 2)
    for node in graph.nodes:
        costs = Operator(node, graph.specs, CLUSTER)
        every = list(itertools.product(signatures(node, graph.specs, 2), repeat=2))
        copied = costs.seconds(every[0], sizes)
        for way in combinations(node, graph.specs, sizes):
            assert 0 <= costs.seconds(way, sizes) <= copied
