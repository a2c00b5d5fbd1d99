"""The multi-layer perceptron, for vectors and flattened images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from penstock.model.zoo.recipe import recipe


@recipe
def mlp(inputs: int = 784, hidden: Sequence[int] = (300, 100), classes: int = 10) -> nn.Module:
    """A multi-layer perceptron: dense layers, with ReLU behind each but the last.

    Weights start from He's normal distribution, biases from zero.

    Arguments:
        inputs: numbers in an example.
        hidden: units of every hidden layer, in order.
        classes: number of outputs.

    Returns:
        A module from `(batch, ...)`, float32, with `inputs` numbers in an example, to logits
        `(batch, classes)`. At its defaults it has 266,610 parameters.

    Source: the 784-300-100-10 network of LeCun et al., "Gradient-based learning applied to document
    recognition", 1998, with ReLU in place of tanh; weights from He et al., "Delving deep into
    rectifiers", 2015.
    """
    widths = [inputs, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(widths[-1], classes))
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return network
