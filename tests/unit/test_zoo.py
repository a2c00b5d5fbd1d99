"""The zoo: sizes, shapes, first weights, and what a Job file says for them."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from penstock.model import zoo
from penstock.spec import NETWORK, Maker


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
