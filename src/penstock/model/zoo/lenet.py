"""LeNet, for 28 x 28 images in one channel."""

from __future__ import annotations

from torch import nn

from penstock.model.zoo.recipe import recipe


@recipe
def lenet(classes: int = 10) -> nn.Module:
    """LeNet: two convolutions, each followed by max-pooling and ReLU, and two dense layers.

    Weights start from Xavier's uniform distribution, biases from zero. ReLU stands behind the
    pooling: it does not fall, so it gives the same there, on a quarter of the numbers.

    Arguments:
        classes: number of outputs.

    Returns:
        A module from images `(batch, 1, 28, 28)`, float32, to logits `(batch, classes)`. There is
        no softmax: it is part of the loss `cross_entropy`. With 10 classes it has 67,780
        parameters.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998, with
    ReLU and max-pooling in place of tanh and subsampling.
    """
    network = nn.Sequential(
        nn.Conv2d(1, 20, kernel_size=5),  # (batch, 20, 24, 24)
        nn.MaxPool2d(2),  # (batch, 20, 12, 12)
        nn.ReLU(),
        nn.Conv2d(20, 50, kernel_size=5, stride=2),  # (batch, 50, 4, 4)
        nn.MaxPool2d(2),  # (batch, 50, 2, 2)
        nn.ReLU(),
        nn.Flatten(),  # (batch, 200)
        nn.Linear(200, 200),
        nn.ReLU(),
        nn.Linear(200, classes),
    )
    for layer in network:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network
