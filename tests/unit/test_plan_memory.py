"""Liveness: what a step is said to hold, beside what is measured; and offsets in one arena."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph, Input, Node, Output, Ref, Spec
from penstock.plan.memory.liveness import (
    Event,
    Lifetimes,
    Made,
    Packed,
    in_bytes,
    in_place,
    pack,
    roots,
)
from penstock.plan.memory.scratch import scratch_bytes
from penstock.testing.memory import Stepper, measured_peak
from penstock.testing.networks import ADAMW, Example, following, tiny

# Sizes at which tensors, and not the few bytes of counters, are what is measured.
TOKENS = (8, 32)


def text(make: Any, *sizes: Any, **options: Any) -> Example:
    x, y = torch.randint(64, TOKENS), torch.randint(64, TOKENS)
    return Example(make(*sizes, **options), x, y, F.cross_entropy)


def images(network: torch.nn.Module, side: int, channels: int = 3) -> Example:
    x = torch.randn(16, channels, side, side)
    return Example(network, x, torch.randint(10, (16,)), F.cross_entropy)


NETWORKS = {
    "mlp": lambda: images(zoo.mlp(inputs=300, hidden=(200, 200)), 10),
    "gpt": lambda: text(zoo.gpt, 64, width=32, heads=2, layers=2, length=32, dropout=0.1),
    "bert": lambda: text(zoo.bert, 64, width=32, heads=2, layers=2, length=32, dropout=0.1),
    "lstm": lambda: Example(
        zoo.text_lstm(vocabulary=64, embedding=32, hidden=48, classes=4),
        torch.randint(64, (32, 12)),
        torch.randint(4, (32,)),
        F.cross_entropy,
    ),
    "recommender": lambda: Example(
        zoo.recommender(rows=(500, 200), width=16, dense_features=0, hidden=(), top=(64,)),
        torch.randint(200, (512, 2)),
        torch.randint(2, (512,)),
        F.cross_entropy,
    ),
    "mixture": lambda: text(
        zoo.mixture_of_experts, 64, width=32, hidden=64, heads=2, layers=2, length=32
    ),
    "vgg": lambda: images(zoo.vgg16(classes=10, image=32, width=8, dense=64, batch_norm=True), 32),
    "resnet": lambda: images(zoo.resnet(layers=(1, 1), width=16, classes=10), 64),
}
CONVOLUTIONAL = ("vgg", "resnet")


def step_of(name: str) -> tuple[Graph, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    example = NETWORKS[name]()
    graph = capture(example.network, example.loss, example.batch, ADAMW)
    return graph, example.inputs(graph)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_peak_is_what_is_measured(name: str) -> None:
    graph, inputs = step_of(name)
    tolerance = 0.1 if name in CONVOLUTIONAL else 0.05
    stepper = Stepper(graph, inputs)
    stepper.step()
    steps = {"apart": partial(graph.run, inputs), "in_place": stepper.step}
    for updates, step in steps.items():
        lifetimes = Lifetimes.of_graph(graph, updates)  # type: ignore[arg-type]
        measured = measured_peak(step)
        assert lifetimes.peak_bytes - lifetimes.resident_bytes == pytest.approx(
            measured, rel=tolerance
        ), updates
        # If nothing were freed it would be far from it.
        assert sum(storage.num_bytes for storage in lifetimes.storages) > 1.5 * measured


@pytest.mark.parametrize("name", ["vgg", "resnet", "gpt", "bert", "lstm", "recommender", "mixture"])
def test_views_are_those_that_share_storage(name: str) -> None:
    example = tiny(name) if name in ("vgg", "resnet", "lstm", "gpt", "bert") else NETWORKS[name]()
    graph = capture(example.network, example.loss, example.batch, ADAMW)
    with FakeTensorMode(), torch.no_grad():
        made = {
            item.name: torch.empty(graph.specs[item.name].shape, dtype=graph.specs[item.name].dtype)
            for item in graph.inputs
        }
        for node in graph.nodes:
            args, kwargs = node.with_tensors([made[n] for n in node.inputs])
            made |= node.results(node.function(*args, **kwargs))
        shared = {name: value.untyped_storage()._cdata for name, value in made.items()}
        found = roots(graph)
        for tensor, value in made.items():
            assert shared[tensor] == shared[found[tensor]], tensor
            if found[tensor] == tensor:
                assert value.untyped_storage().nbytes() == graph.specs[tensor].num_bytes, tensor
        assert len({*found.values()}) == len({*shared.values()})


def test_a_step_in_place_is_the_step() -> None:
    graph, inputs = step_of("resnet")
    stepper = Stepper(graph, {name: tensor.clone() for name, tensor in inputs.items()})
    values = dict(inputs)
    for _ in range(2):
        outputs = graph.run(values)
        values = following(graph, values, outputs)
        given = stepper.step()
        assert torch.equal(given[graph.output("loss").name], outputs[graph.output("loss").name])
    assert in_place(graph)
    updates = {graph.input(o.role, o.target).name for o in graph.outputs if o.role != "loss"}  # type: ignore[arg-type]
    for name in updates:
        assert torch.equal(stepper._tensors[name], values[name]), name
        assert name == "num_batches_tracked" or not torch.equal(values[name], inputs[name])


def events(*lines: tuple[str, str, int]) -> list[Event]:
    """(reads, made, bytes)"""
    return [
        Event(f"i{n}", reads.split(), [Made(made, size)] if made else [])
        for n, (reads, made, size) in enumerate(lines)
    ]


def test_liveness_by_hand() -> None:
    program = [
        Event("one", ["p"], [Made("a", 100)], "layer"),
        Event("two", ["a"], [Made("v", 100, "a")]),
        Event("three", ["p"], [Made("b", 30)], scratch_bytes=7),
        Event("four", ["v", "b"], [Made("c", 5)]),
        Event("five", ["c"], [Made("unread", 1000)]),
        Event("six", ["c"], []),
    ]
    found = Lifetimes.of_events(program, {"p": 10}, kept=["b"])
    assert found.timeline.tolist() == [110, 110, 147, 145, 1045, 45]
    assert (found.peak_bytes, found.peak.instruction, found.peak.name) == (1045, 4, "five")
    assert [s.name for s in found.peak.storages] == ["unread", "b", "p", "c"]
    assert str(next(s for s in found.storages if s.name == "a")) == "a of layer, 100 B"
    given = Lifetimes.of_events(program, {}, given={"p": 10})
    assert given.timeline.tolist() == [110, 110, 147, 135, 1005, 5]
    blocks = Lifetimes.of_events(program, {"p": 10}, block_bytes=512)
    assert blocks.timeline.tolist() == [1024, 1024, 1543, 2048, 2048, 1024]


def test_new_values_take_the_places_of_old_ones() -> None:
    graph, _ = step_of("mlp")
    apart, renewed, placed = (
        Lifetimes.of_graph(graph, updates).timeline.tolist()  # type: ignore[arg-type]
        for updates in ("apart", "renewed", "in_place")
    )
    assert max(placed) < max(apart)
    assert max(renewed) < max(apart)
    fresh = sum(graph.specs[name].num_bytes for name in in_place(graph))
    assert apart[-1] - placed[-1] == fresh > 1_000_000
    # What is read after the new value is there cannot be written over.
    (first, *_) = in_place(graph)
    old = in_place(graph)[first]
    node = graph.nodes[-1]
    late = replace(node, name="late", op="aten.neg.default", args=(graph.nodes[0].args[0],))
    late = replace(late, args=(type(late.args[0])(old),), kwargs={}, outputs=("late",))
    longer = replace(
        graph,
        nodes=(*graph.nodes, late),
        specs=dict(graph.specs) | {"late": graph.specs[old]},
    )
    assert first not in in_place(longer)
    assert first in in_place(graph)


def test_only_what_may_be_is_written_in_place() -> None:
    """Three parameters: one renewed by a pointwise operator, one by a product, one through a view
    of itself."""
    square = Spec((8, 8), torch.float32)
    names = ("plain", "product", "turned")
    nodes = (
        node("new_plain", "aten.mul.Tensor", Ref("plain"), 2.0),
        node("new_product", "aten.mm.default", Ref("product"), Ref("product")),
        node("view", "aten.t.default", Ref("turned")),
        node("new_turned", "aten.sub.Tensor", Ref("turned"), Ref("view")),
        node("loss", "aten.sum.dim_IntList", Ref("new_plain"), (0, 1)),
    )
    graph = Graph(
        inputs=tuple(Input(name, "parameter", name) for name in names),
        nodes=nodes,
        outputs=(
            *(Output("parameter", name, f"new_{name}") for name in names),
            Output("loss", "", "loss"),
        ),
        specs=dict.fromkeys((*names, *(n.name for n in nodes)), square)
        | {"loss": Spec((), torch.float32)},
    )
    graph.validate()
    assert in_place(graph) == {"new_plain": "plain"}
    values = {name: torch.randn(8, 8) for name in names}
    stepper = Stepper(graph, {name: value.clone() for name, value in values.items()})
    for _ in range(2):
        outputs = graph.run(values)
        values = following(graph, values, outputs)
        assert torch.equal(stepper.step()["loss"], outputs["loss"])
    assert all(torch.equal(stepper._tensors[name], values[name]) for name in names)


def node(name: str, op: str, *args: Any) -> Node:
    return Node(name, op, args, {}, (name,), "update")


SCRATCH = {
    "uniform": ("penstock.uniform.default", [((), torch.int64)], (3, [64, 96], [0, 0], [64, 96])),
    "softmax": ("aten._safe_softmax.default", [((64, 96), torch.float32)], (-1,)),
    "mask": ("aten.mul.Tensor", [((64, 96), torch.float32), ((64, 96), torch.bool)], ()),
    "sum": ("aten.add.Tensor", [((64, 96), torch.float32), ((64, 96), torch.float32)], ()),
    **{
        f"{pass_}, {dtype}, {channels}": (
            f"aten.convolution{pass_}.default",
            [((8, 32, 16, 16), dtype)] * (pass_ == "_backward")
            + [((8, channels, 16, 16), dtype), ((32, channels, 3, 3), dtype)],
            (None, *[[1, 1]] * 3, False, [0, 0], 1) + ([True] * 2 + [False],) * (pass_ != ""),
        )
        for pass_ in ("", "_backward")
        for dtype in (torch.float32, torch.float64)
        for channels in (16, 32)
    },
}


@pytest.mark.parametrize("name", SCRATCH)
def test_scratch_is_what_is_measured(name: str) -> None:
    op, given, rest = SCRATCH[name]
    tensors = [torch.ones(shape, dtype=dtype) for shape, dtype in given]
    refs = [Ref(f"input{n}") for n in range(len(tensors))]
    kwargs = {"dtype": torch.float32} if name == "uniform" else {}
    outputs = ("y",) if not name.startswith("_backward") else ("y", "z", None)
    call = Node("y", op, (*refs, *rest), kwargs, outputs, "forward")
    held: list[Any] = []
    args, options = call.with_tensors(tensors)
    call.function(*args, **options)
    measured = measured_peak(lambda: held.append(call.function(*args, **options)))
    results = call.results(held[0])
    specs = {k: Spec.of(v) for k, v in results.items()}
    specs |= {ref.name: Spec.of(tensor) for ref, tensor in zip(refs, tensors, strict=True)}
    own = sum(value.nbytes for value in results.values())
    assert own + scratch_bytes(call, specs) == pytest.approx(measured, rel=0.1)
    assert (scratch_bytes(call, specs) > 0) == (name != "sum")


def lifetimes_at_random(count: int, seed: int) -> Lifetimes:
    rng = random.Random(seed)
    alive: list[str] = []
    made: list[Event] = []
    for number in range(count):
        reads = []
        while alive and (len(alive) > 60 or rng.random() < 0.45):
            reads.append(alive.pop(rng.randrange(len(alive))))
        size = rng.choice([0, 8, 4096, 1 << 20, rng.randrange(1 << 22)])
        made.append(Event(f"i{number}", reads, [Made(f"t{number}", size)]))
        alive.append(f"t{number}")
    return Lifetimes.of_events(made, {})


def test_packed_storages_do_not_overlap() -> None:
    for seed in range(5):
        lifetimes = lifetimes_at_random(400, seed)
        packed = pack(lifetimes)
        packed.check(lifetimes)
        assert lifetimes.peak_bytes <= packed.arena_bytes < 1.15 * lifetimes.peak_bytes
        assert all(offset % 64 == 0 for offset in packed.offsets.values())


def test_arenas_of_networks_are_little_larger_than_the_peak() -> None:
    for name in ("gpt", "lstm", "resnet"):
        lifetimes = Lifetimes.of_graph(step_of(name)[0], scratch=lambda node, specs: 0)
        packed = pack(lifetimes)
        packed.check(lifetimes)
        assert packed.arena_bytes < 1.05 * (lifetimes.peak_bytes - lifetimes.resident_bytes)


def test_check_finds_what_overlaps() -> None:
    lifetimes = Lifetimes.of_events(
        events(("", "a", 64), ("", "b", 64), ("a b", "c", 64), ("c", "", 0)), {}
    )
    packed = pack(lifetimes)
    packed.check(lifetimes)
    with pytest.raises(ValueError, match="overlap"):
        Packed(dict(packed.offsets) | {"b": packed.offsets["a"] + 32}, 512).check(lifetimes)
    longer = Lifetimes.of_events(lifetimes.events, {}, kept=["a"])
    with pytest.raises(ValueError, match="overlap"):
        Packed(dict(packed.offsets) | {"c": packed.offsets["a"]}, 512).check(longer)
    with pytest.raises(ValueError, match="arena"):
        Packed(packed.offsets, 100).check(lifetimes)


def test_bytes_in_words() -> None:
    assert [in_bytes(n) for n in (0, 999, 1500, 999_600, 2e9, 5e13, 5e15)] == [
        "0 B", "999 B", "1.5 kB", "1 MB", "2 GB", "50 TB", "5,000 TB"
    ]  # fmt: skip
