"""Every row of the table of rules, proved by numbers: of all networks of the zoo, and by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph, Node, Ref, Spec, operator_of, replaced
from penstock.plan.layout import B, P, S
from penstock.plan.rules import views
from penstock.plan.rules.signatures import (
    RULES,
    Combination,
    Signature,
    Units,
    combinations,
    has_rule,
    signatures,
    units_of,
)
from penstock.testing.rules import check, distinct

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
ADAGRAD = partial(torch.optim.Adagrad, lr=1e-2)

Network = tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple[Tensor, Tensor], Any]


def classes(*shape: int, of: int) -> Tensor:
    return torch.randint(0, of, shape)


def one_logit(output: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output.squeeze(1), y)


def networks() -> dict[str, Network]:
    """Small ones, of sizes that 2 and 3 ranks divide, and that they do not."""
    torch.manual_seed(0)
    vectors, images, tokens = torch.randn(6, 12), torch.randn(4, 3, 32, 32), classes(4, 6, of=20)
    small, of_image, of_text = torch.rand(4, 3, 16, 16), classes(4, of=5), classes(4, of=3)
    columns = torch.cat([classes(6, 3, of=5), classes(6, 3, of=7)], 1)
    cross_entropy = F.cross_entropy
    text = {"vocabulary": 20, "width": 12, "heads": 3, "layers": 1, "length": 6}
    return {
        "mlp": (
            partial(zoo.mlp, 12, (9, 8), 5), cross_entropy, (vectors, classes(6, of=5)), ADAGRAD,
        ),
        "lenet": (
            zoo.lenet, cross_entropy, (torch.randn(4, 1, 28, 28), classes(4, of=10)), SGD,
        ),
        "vgg16": (
            partial(zoo.vgg16, 5, 32, 4, 16, batch_norm=True), cross_entropy,
            (images, of_image), SGD,
        ),
        "resnet": (partial(zoo.resnet, (1, 1), 4, 5), cross_entropy, (images, of_image), SGD),
        "bottlenecks": (
            partial(zoo.resnet, (1, 1), 4, 5, bottleneck=True), cross_entropy,
            (images, of_image), ADAMW,
        ),
        "autoencoder": (
            partial(zoo.autoencoder, (1, 4, 4), (9, 8), 6), F.mse_loss,
            (torch.rand(6, 1, 4, 4), torch.rand(6, 1, 4, 4)), ADAMW,
        ),
        "convolutional autoencoder": (
            partial(zoo.convolutional_autoencoder, 3, 16, 4, 6),
            F.binary_cross_entropy_with_logits, (small, small), SGD,
        ),
        "lstm": (
            partial(zoo.text_lstm, 20, 6, 8, 2, 3), cross_entropy,
            (classes(4, 5, of=20), of_text), ADAMW,
        ),
        "gru": (
            partial(zoo.text_lstm, 20, 6, 8, 1, 3, "gru"), cross_entropy,
            (classes(4, 5, of=20), of_text), SGD,
        ),
        "gpt": (partial(zoo.gpt, **text, dropout=0.1), cross_entropy, (tokens, tokens), ADAMW),
        "bert": (partial(zoo.bert, **text), cross_entropy, (tokens, tokens), SGD),
        "vit": (
            partial(zoo.vit, 16, 8, 12, 3, 1, 5, dropout=0.1), cross_entropy,
            (small, of_image), SGD,
        ),
        "recommender": (
            partial(zoo.recommender, (9, 7, 11), 6, 3, (8,), (8,), 1), one_logit,
            (columns, torch.rand(6)), ADAGRAD,
        ),
        "mixture of experts": (
            partial(zoo.mixture_of_experts, **text, hidden=10, experts=4, top=2), cross_entropy,
            (tokens, tokens), ADAMW,
        ),
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are so small that a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def graphs() -> dict[str, Graph]:
    return {
        name: capture(network(), loss, batch, optimizer)
        for name, (network, loss, batch, optimizer) in networks().items()
    }


def T(*shape: int, dtype: torch.dtype = torch.float32) -> Spec:
    return Spec(shape, dtype)


def whole(*shape: int) -> Spec:
    return T(*shape, dtype=torch.int64)


def mask(*shape: int) -> Spec:
    return T(*shape, dtype=torch.bool)


def called(op: str, *args: Any, **kwargs: Any) -> tuple[Node, dict[str, Spec]]:
    """A node of this operator, with a `Spec` for each tensor."""
    specs: dict[str, Spec] = {}

    def named(value: Any) -> Any:
        if isinstance(value, Spec):
            specs[f"in{len(specs)}"] = value
            return Ref(f"in{len(specs) - 1}")
        return [named(item) for item in value] if isinstance(value, list) else value

    given, words = tuple(map(named, args)), {key: named(value) for key, value in kwargs.items()}
    with FakeTensorMode():
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
        real, options = replaced((given, words), lambda ref: tensors[ref.name])
        returned = operator_of(op)(*real, **options)
    values = returned if isinstance(returned, tuple | list) else (returned,)
    names = tuple(f"out{number}" for number in range(len(values)))
    specs |= {name: Spec.of(value) for name, value in zip(names, values, strict=True)}
    return Node(op, op, given, words, names, "forward"), specs


PLAIN = """
    abs alias ceil cos detach elu erf exp exp2 expm1 floor hardsigmoid hardswish hardtanh isinf
    isnan lift_fresh_copy log log10 log2 mish nan_to_num positive round sign silu sin softplus
    tan trunc empty_like ones_like zeros_like
"""
TWO = """
    atan2.default copy.default eq.Tensor floor_divide.default fmod.Tensor gt.Tensor
    hardsigmoid_backward.default hardswish_backward.default le.Tensor lt.Tensor maximum.default
    minimum.default mish_backward.default pow.Tensor_Tensor remainder.Tensor silu_backward.default
"""
OF_BOOLS = """
    bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor logical_and.default logical_or.default
    logical_xor.default
"""
ALONG = """
    argmax.default argmin.default cumprod.default cumsum.default max.dim min.dim prod.dim_int
"""
X, Y = T(5, 1, 6), T(4, 6)


def rest() -> Iterator[tuple[Node, dict[str, Spec]]]:
    """What the zoo's networks do not call; also with arguments that they do not give."""

    for name in PLAIN.split():
        yield called(f"aten.{name}.default", X)
    for name in TWO.split():
        yield called(f"aten.{name}", X, X)
    for name in OF_BOOLS.split():
        yield called(f"aten.{name}", mask(4, 6), mask(6))
    for name in ALONG.split():
        yield called(f"aten.{name}", T(4, 5, 6), 1)
    yield called("aten.amin.default", T(4, 5, 6), [1])
    yield called("aten.logsumexp.default", T(4, 5, 6), [1])
    yield called("aten.amax.default", T(4, 5, 6), [0, -1], True)
    yield called("aten.argmax.default", T(4, 6))
    yield called("aten.all.dim", mask(4, 6), 1)
    yield called("aten.any.dim", mask(4, 6), 0, True)
    yield called("aten.bitwise_not.default", mask(4, 6))
    yield called("aten.logical_not.default", mask(4, 6))
    yield called("aten.clamp_min.default", X, 0.1)
    yield called("aten.clamp_max.default", X, 0.1)
    yield called("aten.clamp.default", X, None, 0.5)
    yield called("aten.div.Tensor_mode", X, Y, rounding_mode="floor")
    yield called("aten.div.Scalar_mode", X, 0.3, rounding_mode="trunc")
    yield called("aten.add.Tensor", X, Y, alpha=3)
    yield called("aten.add.Tensor", X, 0.5)
    yield called("aten.add.Tensor", X, 0)
    yield called("aten.sub.Tensor", X, Y)
    yield called("aten.mul.Tensor", X, mask(4, 6))
    yield called("aten.where.ScalarOther", mask(4, 6), X, 0.0)
    yield called("aten.where.ScalarOther", mask(4, 6), X, 1.0)
    yield called("aten.masked_fill.Scalar", X, mask(4, 6), 0)
    yield called("aten.masked_fill.Scalar", X, mask(4, 6), 2.0)
    yield called("aten.masked_fill.Tensor", X, mask(5, 4, 1), T())
    yield called("aten.lerp.Tensor", X, Y, T(6))
    yield called("aten.fill.Scalar", X, 2.0)
    yield called("aten.elu_backward.default", Y, 1, 1, 1, False, Y)
    yield called("aten.hardtanh_backward.default", Y, Y, -1.0, 1.0)
    yield called("aten.log_sigmoid_backward.default", Y, Y, Y)
    yield called("aten.softplus_backward.default", Y, Y, 1, 20)
    yield called("aten.glu.default", T(4, 6), 1)
    yield called("aten.glu_backward.default", T(4, 3), T(4, 6), 1)
    yield called("aten._to_copy.default", Y, dtype=torch.int64)
    yield called("aten._to_copy.default", whole(4, 6), dtype=torch.float32)
    yield called("aten.matmul.default", T(4, 3, 5, 6), T(4, 3, 6, 2))
    yield called("aten.matmul.default", T(4, 3, 5, 6), T(6, 2))
    yield called("aten.matmul.default", T(4, 1, 5, 6), T(3, 6, 2))
    yield called("aten.mv.default", T(4, 6), T(6))
    yield called("aten.dot.default", T(6), T(6))
    yield called("aten.sort.default", T(4, 6), 0, True)
    yield called("aten.flip.default", T(4, 5, 6), [1])
    yield called("aten.roll.default", T(4, 5, 6), [2], [0])
    yield called("aten.roll.default", T(4, 6), [2])
    yield called("aten.permute.default", T(4, 5, 6), [2, 0, -2])
    yield called("aten.stack.default", [T(4, 6), T(4, 6)], -1)
    yield called("aten.split_with_sizes.default", T(4, 6), [1, 3], 0)
    yield called("aten.slice.Tensor", T(4, 6), 1, 0, 6)
    yield called("aten.slice_backward.default", T(4, 2), [4, 6], 1, 1, 5, 2)
    yield called("aten.slice_backward.default", T(4, 6), [4, 6], 1, 0, 9, 1)
    yield called("aten.constant_pad_nd.default", T(4, 5, 6), [0, 0, 1, 2])
    yield called("aten.constant_pad_nd.default", T(4, 5, 6), [1, 0], 2.0)
    yield called("aten.repeat.default", T(4, 6), [3, 2, 1])
    yield called("aten.squeeze.default", T(1, 3, 1, 4))
    yield called("aten.squeeze.dims", T(1, 3, 1, 4), [0, 2])
    yield called("aten.expand.default", T(4, 1, 6), [3, -1, 5, 6])
    yield called("aten.triu.default", T(2, 5, 6), 1)
    yield called("aten.tril.default", T(6, 4), -1)
    yield called("aten.gather.default", T(4, 5, 6), 1, whole(4, 3, 6))
    yield called("aten.gather.default", T(4, 5, 6), -1, whole(3, 5, 6))
    yield called("aten.gather.default", T(4, 8), 1, whole(4, 1))
    yield called("aten.gather.default", T(), 0, whole())
    yield called("aten.scatter.src", T(4, 5, 6), 1, whole(4, 3, 6), T(4, 3, 6))
    yield called("aten.scatter_add.default", T(4, 5, 6), 1, whole(4, 3, 6), T(4, 3, 6))
    yield called("aten.scatter.value", T(4, 6), 0, whole(3, 6), 0)
    yield called("aten.index_select.default", T(4, 5, 6), 1, whole(4))
    yield called("aten.index.Tensor", T(4, 5, 6), [whole(3, 2), None, whole(2)])
    yield called("aten.index.Tensor", T(4, 5), [None, whole(6)])
    yield called("aten.index_put.default", T(4, 5, 6), [None, whole(3)], T(4, 3, 6), True)
    yield called("aten.index_put.default", T(4, 5, 6), [None, whole(1)], T(4, 1, 6), False)
    yield called("aten.embedding_dense_backward.default", T(4, 3, 6), whole(4, 3), 9, 2, False)
    yield called(
        "aten.convolution.default", T(4, 6, 7), T(8, 3, 3), T(8), [1], [1], [1], False, [0], 2
    )
    yield called(
        "aten.convolution.default", T(4, 6, 7), T(6, 1, 3), None, [1], [1], [1], False, [0], 6
    )
    yield called(
        "aten.convolution.default", T(4, 6, 7), T(6, 5, 3), T(5), [2], [1], [1], True, [1], 1
    )
    yield called(
        "aten.convolution_backward.default", T(4, 8, 7), T(4, 6, 7), T(8, 3, 3), [8], [1], [1], [1],
        False, [0], 2, [True, True, True],
    )  # fmt: skip
    yield called("aten.adaptive_max_pool2d.default", T(4, 3, 6, 6), [2, 3])
    yield called(
        "aten.adaptive_max_pool2d_backward.default", T(4, 3, 2, 3), T(4, 3, 6, 6), whole(4, 3, 2, 3)
    )
    yield called("aten.max_pool2d_with_indices.default", T(3, 6, 6), [2, 2])
    yield called("aten.avg_pool2d.default", T(4, 3, 6, 6), [3, 3], [2, 2], [1, 1])
    yield called(
        "aten.avg_pool2d_backward.default", T(4, 3, 3, 3), T(4, 3, 6, 6), [2, 2], [2, 2], [0, 0],
        False, True, None,
    )  # fmt: skip
    yield called("aten._adaptive_avg_pool2d.default", T(4, 3, 6, 6), [2, 3])
    yield called("aten._adaptive_avg_pool2d_backward.default", T(4, 3, 2, 3), T(4, 3, 6, 6))
    yield called("aten.upsample_nearest2d.default", T(4, 3, 2, 2), [4, 4])
    yield called("aten.upsample_bilinear2d.default", T(4, 3, 2, 2), [4, 4], False)
    yield called("aten.upsample_nearest2d_backward.default", T(4, 3, 4, 4), [4, 4], [4, 3, 2, 2])
    yield called(
        "aten.upsample_bilinear2d_backward.default", T(4, 3, 4, 4), [4, 4], [4, 3, 2, 2], False
    )
    yield called("aten.pixel_shuffle.default", T(4, 12, 2, 2), 2)
    yield called("aten.pixel_unshuffle.default", T(4, 3, 4, 4), 2)
    yield called("aten.nll_loss_backward.default", T(4), T(4, 5), whole(4), T(5), 0, -100, T())
    for x, dim in ((T(4, 19), 1), (T(19, 4), 0), (T(4, 19, 6), 1)):
        row = tuple(1 if d == dim else n for d, n in enumerate(x.shape))
        yield called("penstock.log_sums.default", x, dim, 5)
        yield called("penstock.log_sum.default", x, x, dim)
        yield called("penstock.put_at.default", T(*row), whole(*row), dim, 0, 19)
        given = (T(*row), x, T(*row), T(*row), whole(*row))
        yield called("penstock.class_gradient.default", *given, dim, 0)
    q, k, attention = T(4, 3, 6, 2), T(4, 3, 5, 2), "_scaled_dot_product_flash_attention_for_cpu"
    for options in ({}, {"attn_mask": T(4, 1, 6, 5), "scale": 0.3}, {"attn_mask": T(6, 5)}):
        yield called(f"aten.{attention}.default", q, k, k, 0.0, False, **options)
        given = (q, q, k, k, q, T(4, 3, 6), 0.0, False)
        yield called(f"aten.{attention}_backward.default", *given, **options)
    for name in ("empty", "full", "ones", "zeros"):
        value = (0.0,) if name == "full" else ()
        yield called(f"aten.new_{name}.default", Y, [5, 6], *value)
    yield called("aten.empty.memory_format", [4, 6], dtype=torch.float64)
    yield called("aten.full.default", [4, 6], 2.0, dtype=torch.float64)
    yield called("aten.full_like.default", Y, 2.0)
    yield called("aten.arange.default", 6)
    yield called("aten.arange.start", 2, 8)
    yield called("aten.arange.start_step", 3, 16, 2)
    yield called("aten.eye.default", 6, dtype=torch.float64)
    yield called("aten.triu_indices.default", 4, 4)
    yield called("aten.reshape.default", T(6, 5), [3, 10])
    yield called("aten.view.default", T(4, 3, 5), [12, 5])
    yield called("aten.view.default", T(6, 3, 2), [36])
    yield called("aten._unsafe_view.default", T(36), [6, 3, 2])


@pytest.mark.parametrize(("sizes", "at_most"), [((2,), None), ((3,), None), ((2, 2), 8)])
def test_operators_of_the_zoo(
    graphs: dict[str, Graph], sizes: Sequence[int], at_most: int | None
) -> None:
    units = {id(graph): units_of(graph, sizes) for graph in graphs.values()}
    checked = 0
    for node, graph in distinct(graphs.values()):
        checked += check(node, graph.specs, sizes, units[id(graph)], at_most)
    assert checked > 2000


@pytest.mark.parametrize("sizes", [(2,), (3,), (2, 2), (2, 3)])
def test_all_other_operators(sizes: Sequence[int]) -> None:
    for node, specs in rest():
        assert has_rule(node.op)
        check(node, specs, sizes, {18: (3,), 36: (2, 6), 12: (3,)}, 40)


def test_no_row_of_the_table_is_unchecked(graphs: dict[str, Graph]) -> None:
    called_there = {node.op for graph in graphs.values() for node in graph.nodes}
    called_there |= {node.op for node, _ in rest()}
    rows = {op if op in RULES else op.rpartition(".")[0] for op in called_there}
    assert RULES.keys() - rows == set()
    assert views.VIEWS - called_there == set()


def test_operators_with_much_work_can_be_split(graphs: dict[str, Graph]) -> None:
    """Those that do a hundredth of a network's work or more; and every operator has a rule."""
    for name, graph in graphs.items():
        flops = {node.name: flops_of(node, graph.specs) for node in graph.nodes}
        for node in graph.nodes:
            assert has_rule(node.op), f"{name}: {node.op}"
            if flops[node.name] > 0.01 * sum(flops.values()):
                split = [s for s in signatures(node, graph.specs, 2) if is_split(s)]
                assert split, f"{name}: {node.name} ({node.op}) cannot be split"


def is_split(signature: Signature) -> bool:
    return any(p.is_split for p in (*signature.inputs, *signature.outputs) if p is not None)


def flops_of(node: Node, specs: Mapping[str, Spec]) -> float:
    """As torch counts them; of what it does not, one for each number that is given."""
    outputs = [name for name in node.outputs if name is not None]
    numbers = sum(specs[name].numel for name in outputs)
    count = flop_registry.get(getattr(torch.ops.aten, node.op.split(".")[1], None))
    if count is None:
        return float(numbers)
    with FakeTensorMode():
        made = {
            n: torch.empty(specs[n].shape, dtype=specs[n].dtype) for n in (*node.inputs, *outputs)
        }
        args, kwargs = node.with_tensors([made[name] for name in node.inputs])
        values = [None if name is None else made[name] for name in node.outputs]
        out = values[0] if len(values) == 1 else tuple(values)
        return float(count(*args, **kwargs, out_val=out))


CONVOLVED = (T(4, 6, 7), T(8, 6, 3), T(8), [1], [1], [1], False, [0], 1)
WRONG = {
    "a bias once per rank": (
        called("aten.convolution.default", *CONVOLVED),
        Signature((S(1), S(1), B), (P,)),
    ),
    "a softmax along its dim": (
        called("aten._softmax.default", T(4, 6), 1, False), Signature((S(1),), (S(1),)),
    ),
    "copies that differ": (called("aten.sum.dim_IntList", T(4, 6), [0]), Signature((S(0),), (B,))),
    "a class that only one rank has": (
        called("aten.gather.default", T(4, 6), 1, whole(4, 1)), Signature((S(1), B), (B,)),
    ),
    "statistics of each rank's classes": (
        called("penstock.log_sums.default", T(4, 6), 1, 3), Signature((S(1),), (B, B)),
    ),
    "statistics of other rows": (
        called("penstock.log_sums.default", T(4, 6), 1, 4), Signature((S(0),), (S(1), S(1))),
    ),
    "statistics of some classes": (
        called("penstock.log_sum.default", T(4, 6), T(4, 6), 1), Signature((S(1), S(1)), (B, B)),
    ),
    "a gradient added up by class": (
        called("penstock.put_at.default", T(4, 1), whole(4, 1), 1, 0, 6), Signature((B, B), (P,)),
    ),
    "heads that are not outermost": (
        called("aten.view.default", T(4, 3, 5), [12, 5]), Signature((S(1),), (S(0),)),
    ),
    "cuts between other rows": (
        called("aten.view.default", T(3, 3), [9]), Signature((S(0),), (S(0),)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_signatures_are_caught(case: str) -> None:
    (node, specs), wrong = WRONG[case]
    assert (wrong,) not in combinations(node, specs, (2,))

    def ways(
        node: Node, specs: Mapping[str, Spec], sizes: Sequence[int], units: Units
    ) -> Sequence[Combination]:
        return [(wrong,)]

    with pytest.raises(AssertionError, match=node.op.replace(".", r"\.")):
        check(node, specs, (2,), ways=ways)


@pytest.mark.parametrize(
    ("name", "wrong", "shapes"),
    [
        ("aten.relu", "* -> *", [Y]),
        ("aten.mm", "ik, jk -> ij", [T(6, 6), T(6, 6)]),
        ("aten.mul", "* + * -> *", [Y, Y]),
        ("aten.sort", "*! -> *, *", [Y]),
    ],
)
def test_wrong_rules_are_caught(
    name: str, wrong: str, shapes: list[Spec], monkeypatch: pytest.MonkeyPatch
) -> None:
    overload = "Tensor" if name == "aten.mul" else "default"
    node, specs = called(f"{name}.{overload}", *shapes)
    check(node, specs, (2,))
    monkeypatch.setitem(RULES, name, wrong)
    with pytest.raises(AssertionError, match=node.op.replace(".", r"\.")):
        check(node, specs, (2,))
