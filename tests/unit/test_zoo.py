"""The zoo: sizes, shapes, first weights, and what a Job file says for them."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.errors import NetworkError
from penstock.model import zoo
from penstock.model.zoo.mixture import Mixture
from penstock.model.zoo.transformer import Block, dense
from penstock.spec import NETWORK, Maker

# What each network is in these tests: its keywords, the shape and highest token of its input
# (nothing: numbers), and the shape of its output.
TINY: dict[str, tuple[dict[str, Any], tuple[int, ...], int | None, tuple[int, ...]]] = {
    "autoencoder": (
        {"shape": [1, 6, 6], "hidden": [20], "code": 4},
        (3, 1, 6, 6),
        None,
        (3, 1, 6, 6),
    ),
    "bert": (
        {"vocabulary": 11, "width": 8, "heads": 2, "layers": 2, "length": 6},
        (3, 5),
        10,
        (3, 11, 5),
    ),
    "convolutional_autoencoder": (
        {"channels": 1, "image": 16, "width": 4, "code": 5},
        (3, 1, 16, 16),
        None,
        (3, 1, 16, 16),
    ),
    "gpt": (
        {"vocabulary": 11, "width": 8, "heads": 2, "layers": 2, "length": 6},
        (3, 5),
        10,
        (3, 11, 5),
    ),
    "lenet": ({"classes": 4}, (3, 1, 28, 28), None, (3, 4)),
    "mixture_of_experts": (
        {
            "vocabulary": 11,
            "width": 8,
            "hidden": 12,
            "experts": 3,
            "heads": 2,
            "layers": 2,
            "length": 6,
        },
        (3, 5),
        10,
        (3, 11, 5),
    ),
    "mlp": ({"inputs": 12, "hidden": [9, 7], "classes": 4}, (3, 3, 4), None, (3, 4)),
    "recommender": (
        {
            "rows": [5, 7, 9],
            "width": 4,
            "dense_features": 2,
            "hidden": [6],
            "top": [8],
            "classes": 3,
        },
        (9, 5),
        4,
        (9, 3),
    ),
    "resnet": ({"layers": [1, 2], "width": 4, "classes": 5}, (3, 3, 32, 32), None, (3, 5)),
    "text_lstm": (
        {"vocabulary": 11, "embedding": 6, "hidden": 8, "layers": 2, "classes": 3},
        (3, 5),
        10,
        (3, 3),
    ),
    "vgg16": ({"classes": 5, "image": 32, "width": 4, "dense": 16}, (3, 3, 32, 32), None, (3, 5)),
    "vit": (
        {"image": 8, "patch": 4, "width": 8, "heads": 2, "layers": 2, "classes": 5},
        (3, 3, 8, 8),
        None,
        (3, 5),
    ),
}
every = pytest.mark.parametrize("name", zoo.__all__)


def tiny(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = getattr(zoo, name)(**TINY[name][0] | more)
    return network


def tiny_input(name: str) -> Tensor:
    torch.manual_seed(1)
    _, shape, highest, _ = TINY[name]
    return torch.randn(shape) if highest is None else torch.randint(highest + 1, shape)


def tiny_loss(output: Tensor) -> Tensor:
    """Cross-entropy with classes drawn at random, as a Job's `cross_entropy`."""
    torch.manual_seed(2)
    target = torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]))
    return F.cross_entropy(output, target)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(name: str, **keywords: Any) -> nn.Module:
    """Of the published size, without memory."""
    with torch.device("meta"):
        network: nn.Module = getattr(zoo, name)(**keywords)
    return network


def test_lenet_has_the_parameters_of_its_layers() -> None:
    counts = [parameter.numel() for parameter in zoo.lenet().parameters()]
    assert counts == [500, 20, 25_000, 50, 40_000, 200, 2_000, 10]
    assert sum(counts) == 67_780


@pytest.mark.parametrize("classes", [10, 3])
def test_lenet_gives_logits(classes: int) -> None:
    torch.manual_seed(0)
    output = zoo.lenet(classes)(torch.rand(4, 1, 28, 28))
    assert output.shape == (4, classes)
    assert not torch.allclose(output.sum(1), torch.ones(4), atol=0.01)  # no softmax


def test_lenet_is_the_one_written_out_with_relu_before_pooling() -> None:
    torch.manual_seed(0)
    network = zoo.lenet()
    first, second = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    hidden, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
    x = torch.rand(2, 1, 28, 28)
    y = torch.max_pool2d(torch.relu(first(x)), 2)
    y = torch.max_pool2d(torch.relu(second(y)), 2)
    assert y.shape == (2, 50, 2, 2)
    y = last(torch.relu(hidden(y.flatten(1))))
    assert torch.equal(network(x), y)


def test_lenet_starts_from_xavier_weights_and_zero_biases() -> None:
    torch.manual_seed(0)
    for layer in zoo.lenet().modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            area = layer.weight[0, 0].numel() if layer.weight.dim() == 4 else 1
            fans = area * (layer.weight.shape[0] + layer.weight.shape[1])
            bound = (6 / fans) ** 0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (zoo.lenet, "penstock.zoo:lenet"),
        (zoo.lenet(), "penstock.zoo:lenet"),
        (zoo.lenet(10), "penstock.zoo:lenet"),
        (zoo.lenet(5), {"penstock.zoo:lenet": {"classes": 5}}),
        (zoo.lenet(classes=5), {"penstock.zoo:lenet": {"classes": 5}}),
        (pickle.loads(pickle.dumps(zoo.lenet(5))), {"penstock.zoo:lenet": {"classes": 5}}),
        (nn.Linear(1, 1), None),
        (nn.Sequential(zoo.lenet(5)), None),
    ],
)
def test_a_network_is_described_by_its_recipe(network: object, said: object) -> None:
    assert Maker.of(network, NETWORK).describe() == said


def test_what_describes_a_module_makes_the_same_architecture() -> None:
    network = zoo.lenet(5)
    again = Maker.of(Maker.of(network, NETWORK).describe(), NETWORK).make()
    assert repr(again) == repr(network)
    assert repr(again) != repr(zoo.lenet())


def test_an_instance_keeps_its_weights_and_a_factory_draws_new_ones() -> None:
    network = zoo.lenet()
    assert Maker.of(network, NETWORK).make() is network
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(Maker.of(zoo.lenet, NETWORK).make()[0].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@every
def test_logits_and_a_gradient_for_every_parameter(name: str) -> None:
    network = tiny(name)
    output = network(tiny_input(name))
    assert output.shape == TINY[name][3]
    assert output.dtype == torch.float32
    x = tiny_input(name)
    loss = F.mse_loss(output, x) if "autoencoder" in name else tiny_loss(output)
    loss.backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


@every
def test_every_recipe_is_said_and_made_again(name: str) -> None:
    keywords = TINY[name][0]
    network = tiny(name)
    said = Maker.of(network, NETWORK).describe()
    assert said == {f"penstock.zoo:{name}": keywords}
    torch.manual_seed(0)
    again = Maker.of(said, NETWORK).make()
    x = tiny_input(name)
    assert torch.equal(again.eval()(x), network.eval()(x))
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


@every
def test_every_network_runs_in_bfloat16(name: str) -> None:
    network, x = tiny(name).eval(), tiny_input(name)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x)
    torch.testing.assert_close(low.float(), network(x), rtol=0.1, atol=0.1)


PUBLISHED = {
    "autoencoder": ((64, 1, 28, 28), torch.float32, (64, 1, 28, 28)),
    "bert": ((8, 512), torch.int64, (8, 30522, 512)),
    "convolutional_autoencoder": ((8, 3, 64, 64), torch.float32, (8, 3, 64, 64)),
    "gpt": ((8, 1024), torch.int64, (8, 50257, 1024)),
    "lenet": ((8, 1, 28, 28), torch.float32, (8, 10)),
    "mixture_of_experts": ((8, 1024), torch.int64, (8, 50257, 1024)),
    "mlp": ((8, 1, 28, 28), torch.float32, (8, 10)),
    "recommender": ((8, 39), torch.int64, (8, 2)),
    "resnet": ((8, 3, 224, 224), torch.float32, (8, 1000)),
    "text_lstm": ((8, 400), torch.int64, (8, 2)),
    "vgg16": ((8, 3, 224, 224), torch.float32, (8, 1000)),
    "vit": ((8, 3, 224, 224), torch.float32, (8, 1000)),
}


@every
def test_published_shapes_come_of_shapes_alone(name: str) -> None:
    """A tensor on the meta device has no numbers: control flow cannot depend on them."""
    shape, dtype, expected = PUBLISHED[name]
    network = on_meta(name)
    assert network(torch.empty(shape, dtype=dtype, device="meta")).shape == expected


def test_control_flow_that_depends_on_numbers_would_be_found() -> None:
    class Depends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match="meta"):
        Depends()(torch.empty(2, device="meta"))


@pytest.mark.parametrize(
    ("name", "keywords", "expected"),
    [
        ("bert", {}, 109_514_298),
        ("gpt", {}, 124_439_808),
        ("gpt", {"tied": False}, 163_037_184),
        ("gpt", {"width": 1024, "heads": 16, "layers": 24}, 354_823_168),
        ("mlp", {}, 266_610),
        ("resnet", {}, 11_689_512),
        ("resnet", {"layers": (3, 4, 6, 3)}, 21_797_672),
        ("resnet", {"layers": (3, 4, 6, 3), "bottleneck": True}, 25_557_032),
        ("vgg16", {}, 138_357_544),
        ("vgg16", {"batch_norm": True}, 138_365_992),
        ("vit", {}, 86_567_656),
    ],
)
def test_published_parameter_counts(name: str, keywords: dict[str, Any], expected: int) -> None:
    assert count(on_meta(name, **keywords)) == expected


def test_parameter_counts_of_sizes_that_no_paper_counts() -> None:
    ends = [784, 1000, 500, 250, 30]
    weights = sum(before * after for before, after in pairwise(ends))
    assert count(on_meta("autoencoder")) == 2 * weights + 2 * (1000 + 500 + 250) + 30 + 784
    assert count(on_meta("autoencoder")) == 2_837_314

    network = on_meta("convolutional_autoencoder")
    assert count(network[1]) == 3_576_704  # the published generator
    assert count(network[0]) == 2_765_568 + (100 - 1) * 512 * 16  # discriminator, with a code
    assert count(network) == 7_153_280

    for cell, gates, expected in (("lstm", 4, 10_373_122), ("gru", 3, 9_060_354)):
        recurrent = gates * 1024 * (256 + 1024 + 2)
        assert count(on_meta("text_lstm", cell=cell)) == expected
        assert expected == 20_000 * 256 + recurrent + 2 * 1024 + 2

    expert = 768 * 3072 + 3072 + 3072 * 768 + 768
    added = 12 * (7 * expert + 8 * 768)
    assert count(on_meta("mixture_of_experts")) == 124_439_808 + added == 521_197_824

    network = on_meta("recommender")
    tables = 33_762_577 * 16  # the 540 million of the paper
    tower = sum((a + 1) * b for a, b in zip([13, 512, 256, 64], [512, 256, 64, 16]))
    head = sum((a + 1) * b for a, b in zip([27 * 26 // 2 + 16, 512, 256], [512, 256, 2]))
    assert count(network) == tables + tower + head == 540_677_474


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [({}, (1, 512, 7, 7)), ({"layers": (3, 4, 6, 3), "bottleneck": True}, (1, 2048, 7, 7))],
)
def test_resnet_halves_five_times(keywords: dict[str, Any], expected: tuple[int, ...]) -> None:
    network = on_meta("resnet", **keywords)
    assert network[:-3](torch.empty(1, 3, 224, 224, device="meta")).shape == expected


def test_a_residual_block_adds_to_its_input() -> None:
    network = tiny("resnet", layers=(2,), bottleneck=True).eval()
    first, second = network[4], network[5]
    for block in (first, second):
        nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(2, 4, 5, 5)
    wide = first(x)
    assert torch.equal(wide, torch.relu(first.shortcut(x)))
    assert wide.shape == (2, 16, 5, 5)
    assert torch.equal(second(wide), wide)
    nn.init.ones_(second.body[-1].weight)
    assert not torch.equal(second(wide), wide)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_is_a_layer_of_torch(causal: bool, post_norm: bool) -> None:
    torch.manual_seed(0)
    heads, width, hidden, length = 3, 12, 20, 7
    block = Block(width, heads, dense(width, hidden), causal=causal, post_norm=post_norm, eps=1e-5)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer = nn.TransformerEncoderLayer(
        width, heads, hidden, 0.0, "gelu", batch_first=True, norm_first=not post_norm
    )

    def sorted_(tensor: Tensor) -> Tensor:  # torch has q of all heads first, then k, then v
        return tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    ours, theirs = block.state_dict(), {}
    for kind in ("weight", "bias"):
        theirs[f"self_attn.in_proj_{kind}"] = sorted_(ours[f"attention.qkv.{kind}"])
        theirs[f"self_attn.out_proj.{kind}"] = ours[f"attention.output.{kind}"]
        theirs[f"linear1.{kind}"] = ours[f"dense.0.{kind}"]
        theirs[f"linear2.{kind}"] = ours[f"dense.2.{kind}"]
        theirs[f"norm1.{kind}"] = ours[f"attention_norm.{kind}"]
        theirs[f"norm2.{kind}"] = ours[f"dense_norm.{kind}"]
    layer.load_state_dict(theirs)
    x = torch.randn(2, length, width)
    mask = nn.Transformer.generate_square_subsequent_mask(length) if causal else None
    torch.testing.assert_close(block(x), layer(x, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "changed"), [("gpt", 3), ("mixture_of_experts", 3), ("bert", 0)])
def test_which_positions_see_a_token(name: str, changed: int) -> None:
    """The first position whose logits change with token 3: itself, or all with two sides."""
    network, tokens = tiny(name).eval(), tiny_input(name)
    other = tokens.clone()
    other[:, 3] = (other[:, 3] + 1) % 11
    same = (network(tokens) == network(other)).all(1).all(0)
    assert same.tolist() == [position < changed for position in range(5)]


@pytest.mark.parametrize(("tied", "learns"), [(True, True), (False, False)])
def test_a_tied_embedding_learns_from_the_output_too(tied: bool, learns: bool) -> None:
    network, tokens = tiny("gpt", tied=tied), torch.zeros(1, 5, dtype=torch.int64)
    tiny_loss(network(tokens)).backward()
    grad = network.tokens.weight.grad
    assert bool(grad[0].any())
    assert bool(grad[1:].any()) == learns  # of tokens that the input does not have
    assert ("head.weight" in network.state_dict()) != tied


def test_bert_tells_segments_apart() -> None:
    network, tokens = tiny("bert").eval(), tiny_input("bert")
    assert torch.equal(network(tokens), network(tokens, torch.zeros_like(tokens)))
    assert not torch.allclose(network(tokens), network(tokens, torch.ones_like(tokens)))


@pytest.mark.parametrize("name", ["bert", "gpt", "mixture_of_experts", "vgg16", "vit"])
def test_dropout_is_of_training_only(name: str) -> None:
    network, x = tiny(name, dropout=0.5), tiny_input(name)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize("top", [1, 2, 4])
def test_a_mixture_is_the_sum_of_the_chosen_experts(top: int) -> None:
    torch.manual_seed(0)
    mixture = Mixture(width=6, hidden=10, experts=4, top=top, std=0.5)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 6)
    expected = torch.zeros(2, 5, 6)
    for place in [(i, j) for i in range(2) for j in range(5)]:
        odds = torch.softmax(mixture.gate.weight @ x[place], 0)
        chosen = sorted(range(4), key=lambda e: -odds[e].item())[:top]
        total = sum(odds[e] for e in chosen) if top > 1 else 1.0
        for e in chosen:
            inner = F.gelu(x[place] @ mixture.up[e] + mixture.up_bias[e, 0], approximate="tanh")
            outer = inner @ mixture.down[e] + mixture.down_bias[e, 0]
            expected[place] += odds[e] / total * outer
    torch.testing.assert_close(mixture(x), expected, rtol=1e-4, atol=1e-5)
    shares = mixture.shares(x.flatten(0, 1))
    assert ((shares > 0).sum(1) == top).all()


def test_a_gate_learns_with_one_expert_on_top() -> None:
    network = tiny("mixture_of_experts", top=1)
    tiny_loss(network(tiny_input("mixture_of_experts"))).backward()
    assert all(block.dense.gate.weight.grad.any() for block in network.blocks)


@pytest.mark.parametrize("dense_features", [2, 0])
def test_a_recommender_multiplies_every_two_vectors(dense_features: int) -> None:
    network = tiny("recommender", dense_features=dense_features)
    x = tiny_input("recommender")[:, 2 - dense_features :]
    if dense_features:
        x[0, 0] = -3  # counts as 0
    expected = []
    for example in x.tolist():
        kept: list[Tensor] = []
        if dense_features:
            counts = [math.log(1 + max(number, 0)) for number in example[:2]]
            kept = [network.tower(torch.tensor(counts))]
        found = zip(network.tables, example[dense_features:])
        vectors = kept + [table.weight[category] for table, category in found]
        products = [
            vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)
        ]  # row after row of the lower triangle
        expected.append(network.head(torch.cat([*kept, torch.stack(products)])))
    torch.testing.assert_close(network(x), torch.stack(expected))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_text_is_read_in_order_and_alone(cell: str) -> None:
    network, tokens = tiny("text_lstm", cell=cell), tiny_input("text_lstm")
    assert type(network.recurrent) is {"lstm": nn.LSTM, "gru": nn.GRU}[cell]
    alone = torch.cat([network(text[None]) for text in tokens])
    torch.testing.assert_close(network(tokens), alone)
    assert not torch.allclose(network(tokens), network(tokens.flip(1)))


def test_first_weights_of_recurrent_networks() -> None:
    network = tiny("text_lstm")
    for layer in range(2):
        _input, forget, _cell, _output = getattr(network.recurrent, f"bias_ih_l{layer}").chunk(4)
        assert (forget == 1).all()
        assert getattr(network.recurrent, f"bias_ih_l{layer}").sum() == len(forget)
        assert not getattr(network.recurrent, f"bias_hh_l{layer}").any()
        for gate in getattr(network.recurrent, f"weight_hh_l{layer}").chunk(4):
            torch.testing.assert_close(gate @ gate.t(), torch.eye(8), rtol=0, atol=1e-5)
    assert not tiny("text_lstm", cell="gru").recurrent.bias_ih_l0.any()


def test_first_weights_of_transformers() -> None:
    sizes = {"width": 64, "heads": 4, "layers": 8}
    network = tiny("gpt", vocabulary=500, length=200, **sizes)
    stds = {key: p.std().item() for key, p in network.named_parameters()}
    expected = {
        "tokens.weight": 0.02,
        "positions.weight": 0.01,
        "blocks.3.attention.qkv.weight": 0.02,
        "blocks.3.attention.output.weight": 0.02 / 4,
        "blocks.3.dense.0.weight": 0.02,
        "blocks.3.dense.2.weight": 0.02 / 4,
    }
    assert {key: stds[key] for key in expected} == pytest.approx(expected, rel=0.05)
    mixture = tiny("mixture_of_experts", hidden=100, **sizes)
    stds = {key: p.std().item() for key, p in mixture.named_parameters()}
    expected = {"blocks.3.dense.up": 0.02, "blocks.3.dense.down": 0.02 / 4}
    assert {key: stds[key] for key in expected} == pytest.approx(expected, rel=0.05)
    for name in ("bert", "vit"):
        network = tiny(name, **sizes)
        assert network.blocks[3].dense[2].weight.std().item() == pytest.approx(0.0176, rel=0.05)
        assert network.blocks[3].dense[2].weight.abs().max() <= 0.04
    biases = [p for key, p in network.named_parameters() if key.endswith("bias")]
    assert biases
    assert not any(bias.any() for bias in biases)


def test_first_weights_of_convolutional_networks() -> None:
    network = tiny("vgg16", width=32, dense=64)
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert (len(convolutions), len(layers)) == (13, 3)
    for layer in convolutions:
        assert layer.weight.std().item() == pytest.approx(
            (2 / 9 / len(layer.weight)) ** 0.5, rel=0.1
        )
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
    for layer in tiny("resnet", width=32).modules():
        if isinstance(layer, nn.Conv2d):
            fan = layer.kernel_size[0] ** 2 * layer.out_channels
            assert layer.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1)
    for layer in tiny("convolutional_autoencoder", width=32).modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_first_weights_of_dense_layers_patches_and_tables() -> None:
    first = tiny("mlp", inputs=100, hidden=[200])[1]
    assert first.weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.05)
    assert not first.bias.any()
    patches = tiny("vit", width=64).patches
    cut = 0.88  # what is left of a standard deviation that is truncated at two
    assert patches.weight.std().item() == pytest.approx(cut / 48**0.5, rel=0.05)
    network = tiny("recommender", rows=[400, 900], width=32)
    for table, bound in zip(network.tables, (1 / 20, 1 / 30)):
        assert 0.99 * bound < table.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("name", "keywords", "words"),
    [
        ("vgg16", {"image": 100}, "image of 100 pixels; expected a multiple of 32"),
        ("convolutional_autoencoder", {"image": 48}, "image of 48 pixels; expected 8, 16, 32"),
        ("convolutional_autoencoder", {"image": 4}, "image of 4 pixels"),
        ("gpt", {"heads": 3}, "width of 8 cannot be divided among 3 heads"),
        ("vit", {"image": 9}, "image of 9 pixels cannot be divided into patches of 4"),
        ("mixture_of_experts", {"top": 4}, "4 on top of 3 experts; expected 1 to 3"),
        ("recommender", {"rows": [5], "dense_features": 0}, "1 tables and 0 dense features"),
        ("text_lstm", {"cell": "rnn"}, "cell 'rnn'; expected 'lstm' or 'gru'"),
    ],
)
def test_sizes_that_do_not_fit(name: str, keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(NetworkError, match=words) as caught:
        tiny(name, **keywords)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["bert", "gpt", "mixture_of_experts"])
def test_a_sequence_longer_than_the_positions(name: str) -> None:
    network = tiny(name)
    assert network(torch.zeros(1, 6, dtype=torch.int64)).shape == (1, 11, 6)
    with pytest.raises(NetworkError, match="7 tokens, in a network with 6 positions"):
        network(torch.zeros(1, 7, dtype=torch.int64))


def test_a_recommender_says_which_columns_it_expects() -> None:
    with pytest.raises(NetworkError, match="4 columns; expected 5") as caught:
        tiny("recommender")(torch.zeros(1, 4, dtype=torch.int64))
    assert "2 counts, then a category of each of 3 tables" in caught.value.hint
