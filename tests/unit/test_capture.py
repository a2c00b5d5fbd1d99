"""Captured steps: the same numbers as the network, its loss and its optimizer give themselves."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penstock.errors import NetworkError
from penstock.model import randomness
from penstock.model.capture import capture
from penstock.model.clipping import Clipping
from penstock.model.graph import Graph, Output, Ref, Spec
from penstock.testing.networks import ADAGRAD, ADAMW, SGD, TINY, Example, following, tiny

STEPS = 3
RATE = 0.01


def plain(example: Example) -> Example:
    """Without dropout, which draws other numbers than torch does."""
    for module in example.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return example


def compare(example: Example, optimizer: Any, steps: int = STEPS, atol: float = 1e-10) -> Graph:
    """Asserts that captured steps are those of torch; parameters, buffers and losses."""
    graph = capture(example.network, example.loss, example.batch, optimizer)
    inputs = example.inputs(graph)
    theirs = optimizer(example.network.parameters())
    for group in theirs.param_groups:
        group["lr"] = RATE
    for _ in range(steps):
        outputs = graph.run(inputs)
        theirs.zero_grad()
        loss = example.loss(example.network(example.x), example.y)
        loss.backward()
        theirs.step()
        ours = outputs[graph.output("loss").name]
        torch.testing.assert_close(ours, loss.detach(), rtol=0, atol=atol)
        inputs = following(graph, inputs, outputs)
    own = dict(example.network.named_parameters()) | dict(example.network.named_buffers())
    compared = [i for i in graph.inputs if i.role in ("parameter", "buffer")]
    assert compared
    for item in compared:
        torch.testing.assert_close(inputs[item.name], own[item.target].detach(), rtol=0, atol=atol)
    return graph


@pytest.mark.parametrize("name", TINY)
def test_steps_are_those_of_torch(name: str) -> None:
    compare(plain(tiny(name)), ADAMW if name in ("mlp", "gpt", "recommender") else SGD)


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.SGD,
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        partial(torch.optim.Adam, weight_decay=0.1, amsgrad=True),
        ADAGRAD,
        torch.optim.RMSprop,
        torch.optim.Adamax,
        torch.optim.Adadelta,
        torch.optim.RAdam,
    ],
)
def test_optimizers(kind: Any) -> None:
    compare(tiny("mlp"), kind if kind is ADAGRAD else partial(kind, lr=RATE), steps=7)


def test_an_optimizer_that_counts_in_single_precision() -> None:
    """torch keeps NAdam's product of momenta in float32; here it is float64."""
    compare(tiny("mlp", torch.float32), partial(torch.optim.NAdam, lr=RATE), steps=3, atol=1e-6)


def test_groups_of_parameters_have_their_own_rates() -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "momentum": 0.5}, {"params": others}], lr=RATE)

    graph = compare(tiny("mlp"), optimizer)
    rates = [item.name for item in graph.inputs if item.name.startswith("lr.")]
    assert rates == ["lr.0", "lr.1"]
    states = [item.target for item in graph.inputs if item.role == "state"]
    assert len(states) == 1
    assert states[0].endswith("weight/momentum_buffer")


def test_an_optimizer_that_begins_otherwise_is_refused() -> None:
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(NetworkError, match=r"optimizer SGD: .*steps otherwise"):
        capture(tiny("mlp").network, F.cross_entropy, tiny("mlp").batch, optimizer)


def test_roles_and_phases() -> None:
    example = tiny("resnet")
    graph = capture(example.network, example.loss, example.batch, ADAMW)
    names = dict(example.network.named_parameters())
    assert {i.target for i in graph.inputs if i.role == "parameter"} == names.keys()
    assert {o.target for o in graph.outputs if o.role == "parameter"} == names.keys()
    buffers = {k for k, _ in example.network.named_buffers()}
    assert {o.target for o in graph.outputs if o.role == "buffer"} == buffers
    assert len([i for i in graph.inputs if i.name == "lr.0/step"]) == 1
    order = {"forward": 0, "backward": 1}
    phases = [order[node.phase] for node in graph.nodes if node.phase != "update"]
    assert phases == sorted(phases)
    assert set(phases) == {0, 1}
    convolutions = [n for n in graph.nodes if n.op.startswith("aten.convolution")]
    paths = {name for name, m in example.network.named_modules() if isinstance(m, nn.Conv2d)}
    assert {node.module for node in convolutions} == paths
    # Updates stand right behind their gradients, not at the end.
    first = next(i for i, n in enumerate(graph.nodes) if n.phase == "update")
    assert any(node.phase == "backward" for node in graph.nodes[first:])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embedding(x).mean(1))
        return out


class Computed(nn.Module):
    """Its weight is computed by another network."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 12))
        self.code = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x @ self.maker(self.code).view(4, 3)
        return out


def small(network: nn.Module, x: torch.Tensor, classes: int = 3) -> Example:
    y = torch.randint(classes, (len(x),))
    return Example(network.double(), x, y, F.cross_entropy)


def test_a_shared_parameter_is_one() -> None:
    graph = compare(small(Tied(), torch.randint(10, (6, 5)), 10), SGD)
    assert [i.target for i in graph.inputs if i.role == "parameter"] == ["embedding.weight"]


def test_parameters_that_are_computed() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    compare(small(Computed(), x), SGD)
    compare(small(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), x), SGD)


class Inverse(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ torch.linalg.inv(torch.eye(3, dtype=x.dtype) * 2)


def test_operators_that_check_their_numbers() -> None:
    compare(small(Inverse(4, 3), torch.randn(6, 4, dtype=torch.float64)), SGD)


def test_batch_norm_that_does_not_learn() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    network[1].eval()
    compare(small(network, torch.randn(6, 4, dtype=torch.float64)), SGD)


def test_a_network_without_memory() -> None:
    """On the meta device, as large ones are captured."""
    with torch.device("meta"):
        network = nn.Linear(4, 3)
        batch = torch.empty(6, 4), torch.empty(6, dtype=torch.int64)
    there = nn.Linear(4, 3), F.cross_entropy, (torch.randn(6, 4), torch.randint(3, (6,))), SGD
    assert capture(network, F.cross_entropy, batch, SGD).fingerprint == capture(*there).fingerprint


def test_gradients_are_outputs_without_an_optimizer() -> None:
    example = tiny("mlp")
    graph = capture(example.network, example.loss, example.batch)
    outputs = graph.run(example.inputs(graph))
    example.loss(example.network(example.x), example.y).backward()
    for name, parameter in example.network.named_parameters():
        assert parameter.grad is not None
        gradient = outputs[graph.output("gradient", name).name]
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-12)


def test_the_network_stays_as_it_is() -> None:
    example = tiny("resnet")
    before = {k: v.clone() for k, v in example.network.state_dict().items()}
    capture(example.network, example.loss, example.batch, SGD)
    after = example.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.grad is None for parameter in example.network.parameters())


class Branching(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        if y.sum() > 0:  # here
            y = y * 2
        return y


class Masking(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x[x[:, 0] > 0])  # here


class Hidden(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.table = torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.table  # here


@pytest.mark.parametrize(
    ("kind", "what", "hint"),
    [
        (Branching, "reads a number out of a tensor", "torch.where"),
        (Masking, "size of a result depends on values", "torch.where"),
        (Hidden, "neither a parameter nor a buffer", "register_buffer"),
    ],
)
def test_what_cannot_be_captured_names_the_line(kind: Any, what: str, hint: str) -> None:
    with pytest.raises(NetworkError, match=what) as caught:
        capture(kind(4, 3), F.cross_entropy, (torch.randn(6, 4), torch.randint(3, (6,))))
    line = int(caught.value.message.split(":")[1])
    with open(__file__) as file:
        assert file.readlines()[line - 1].endswith("# here\n")
    assert hint in caught.value.hint


def graph_of(name: str = "mlp") -> Graph:
    example = tiny(name)
    return capture(example.network, example.loss, example.batch, SGD)


def test_the_verifier_finds_what_is_wrong() -> None:
    graph = graph_of()
    graph.validate()
    first, second = graph.nodes[:2]
    one, other = [item.name for item in graph.inputs if item.role == "parameter"][:2]
    product = next(node for node in graph.nodes if node.op == "aten.mm.default")
    wrong = Ref(product.inputs[0]), Ref(product.inputs[0])
    swapped = replace(graph, nodes=(second, first, *graph.nodes[2:]))
    specs = dict(graph.specs) | {product.name: Spec((1, 2), torch.float64)}
    cases = [
        (swapped, "before it is there"),
        (replace(graph, nodes=(first, *graph.nodes)), "a second time"),
        (replace(graph, outputs=(Output("loss", "", "nothing"),)), "no such tensor"),
        (replace(graph, specs=specs), rf"{product.name} \(aten.mm.default\) gives"),
        (replace(graph, outputs=(Output("parameter", one, other),)), "after the step"),
    ]
    for broken, what in cases:
        with pytest.raises(NetworkError, match=what):
            broken.validate()
    bad = replace(product, args=wrong)
    nodes = tuple(bad if node is product else node for node in graph.nodes)
    with pytest.raises(NetworkError, match=rf"{product.name} \(aten.mm.default\): "):
        replace(graph, nodes=nodes).validate()


def test_fingerprints() -> None:
    """Equal in another process, whatever its hashes; another for another network."""
    program = (
        "from penstock.testing.networks import *\n"
        "from penstock.model.capture import capture\n"
        "e = tiny('gpt')\n"
        "print(capture(e.network, e.loss, e.batch, SGD).fingerprint)"
    )
    environment = {"PYTHONHASHSEED": "77", "PATH": ""}
    there = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert there.stdout.strip() == graph_of("gpt").fingerprint
    assert graph_of("mlp").fingerprint != graph_of("gpt").fingerprint


def test_dropout_is_a_function_of_the_seed() -> None:
    network = nn.Sequential(nn.Linear(50, 400), nn.Dropout(0.3), nn.Linear(400, 3))
    example = small(network, torch.randn(64, 50, dtype=torch.float64))
    graph = capture(example.network, example.loss, example.batch)
    inputs = example.inputs(graph, seed=1)
    losses = []
    for seed in (1, 1, 2):
        inputs["seed"] = torch.tensor(seed)
        losses.append(graph.run(inputs)[graph.output("loss").name].item())
    assert losses[0] == losses[1] != losses[2]


def test_random_numbers_are_those_of_their_place() -> None:
    seed, shape = torch.tensor(5), [7, 30, 11]
    whole = randomness.uniform(seed, 3, shape, [0, 0, 0], shape, dtype=torch.float32)
    part = randomness.uniform(seed, 3, shape, [2, 10, 4], [3, 15, 7], dtype=torch.float32)
    assert torch.equal(part, whole[2:5, 10:25, 4:11])
    other = randomness.uniform(seed, 4, shape, [0, 0, 0], shape, dtype=torch.float32)
    assert (other == whole).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_random_numbers_are_uniform(dtype: torch.dtype) -> None:
    shape = [400, 500]
    drawn = randomness.uniform(torch.tensor(9), 0, shape, [0, 0], shape, dtype=dtype)
    assert drawn.dtype == dtype
    x = drawn.double()
    assert x.min() >= 0
    assert x.max() < 1
    histogram = torch.histc(x, 16, 0, 1) / x.numel() * 16
    assert (histogram - 1).abs().max() < 0.05
    for along in (0, 1):  # neighbours know nothing of each other
        pairs = torch.stack([x.narrow(along, 0, 399).flatten(), x.narrow(along, 1, 399).flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs() < 0.02


class Two(nn.Module):
    """Of two features by name, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Embedding(5, 3)

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.left(x["dense"]) + self.right(x["word"])
        return out


def test_features_of_several_tensors() -> None:
    network = Two().double()
    x = {"dense": torch.randn(6, 4, dtype=torch.float64), "word": torch.randint(5, (6,))}
    y = torch.randint(3, (6,))
    graph = capture(network, F.cross_entropy, (x, y))
    assert [i.name for i in graph.inputs if i.role == "data"] == ["x.dense", "x.word", "y"]
    given = dict(network.named_parameters()) | {f"x.{k}": v for k, v in x.items()} | {"y": y}
    loss = graph.run(given)[graph.output("loss").name]
    torch.testing.assert_close(loss, F.cross_entropy(network(x), y).detach())


@pytest.mark.parametrize("limit", [{"norm": 0.1}, {"norm": 1e3}, {"value": 0.01}])
def test_gradients_are_clipped(limit: dict[str, float]) -> None:
    example = tiny("mlp")
    clipping = Clipping(**limit)
    graph = capture(example.network, example.loss, example.batch, clipping=clipping)
    example.loss(example.network(example.x), example.y).backward()
    parameters = dict(example.network.named_parameters())
    free = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    if "norm" in limit:
        nn.utils.clip_grad_norm_(parameters.values(), limit["norm"])
    else:
        nn.utils.clip_grad_value_(parameters.values(), limit["value"])
    outputs = graph.run(example.inputs(graph))
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        gradient = outputs[graph.output("gradient", name).name]
        # torch adds 1e-6 to the norm that it divides by
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-5, atol=1e-12)
        assert torch.equal(gradient, free[name]) == (limit == {"norm": 1e3})
    compare(example, SGD)


def test_forward_in_bfloat16() -> None:
    example = tiny("mlp", torch.float32)
    graph = capture(example.network, example.loss, example.batch, SGD, autocast=torch.bfloat16)
    inputs = example.inputs(graph)
    loss = graph.run(inputs)[graph.output("loss").name]
    with torch.autocast("cpu", torch.bfloat16):
        expected = example.loss(example.network(example.x), example.y).detach()
    torch.testing.assert_close(loss, expected)
    products = [node for node in graph.nodes if node.op == "aten.mm.default"]
    assert {graph.specs[node.name].dtype for node in products} == {torch.bfloat16}
    assert all(graph.specs[name].dtype == torch.float32 for name in inputs if "weight" in name)


def test_products_over_several_batch_dims_are_not_folded() -> None:
    """Attention with dropout is products of (batch, heads, i, k), which can be split by heads."""
    example = tiny("gpt")
    graph = capture(example.network, example.loss, example.batch, SGD)
    products = [node for node in graph.nodes if node.op == "aten.matmul.default"]
    assert len(products) == 2 * 6  # two of each layer, and two backward of each
    assert not [node for node in graph.nodes if node.op == "aten.bmm.default"]
    for node in products:
        a, b = (graph.specs[name].shape for name in node.inputs)
        assert a[:2] == b[:2] == (6, 4)
