"""VGG, for photographs: a deep stack of narrow convolutions and three dense layers."""

from __future__ import annotations

from torch import nn

from penstock.errors import NetworkError
from penstock.model.zoo.recipe import recipe

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Of configuration D: channels, as a multiple of the first stage's, and convolutions."""


@recipe
def vgg16(
    classes: int = 1000,
    image: int = 224,
    width: int = 64,
    dense: int = 4096,
    batch_norm: bool = False,
    dropout: float = 0.5,
    channels: int = 3,
) -> nn.Module:
    """VGG with 16 layers: 13 convolutions in five stages, each halved by pooling, and three dense.

    Convolutions start from He's normal distribution over what they send out, dense layers from
    N(0, 0.01), biases from zero.

    Arguments:
        classes: number of outputs.
        image: height and width in pixels, a multiple of 32.
        width: channels of the first stage; the last two have eight times as many.
        dense: units of each hidden dense layer.
        batch_norm: whether batch normalisation stands behind each convolution.
        dropout: probability behind each hidden dense layer.
        channels: of the image.

    Returns:
        A module from images `(batch, channels, image, image)`, float32, to logits
        `(batch, classes)`. At its defaults it has 138,357,544 parameters; 138,365,992 with
        `batch_norm`.

    Raises:
        NetworkError: five halvings leave no whole number of pixels.

    Source: Simonyan and Zisserman, "Very deep convolutional networks for large-scale image
    recognition", 2015, table 1, configuration D; weights and batch normalisation as torchvision.
    """
    if image < 32 or image % 32:
        raise NetworkError(
            f"vgg16: image of {image} pixels; expected a multiple of 32",
            hint="five poolings halve the picture: resize it, to 224 for instance",
        )
    layers: list[nn.Module] = []
    before = channels
    for multiple, convolutions in _STAGES:
        for _ in range(convolutions):
            after = multiple * width
            layers.append(nn.Conv2d(before, after, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(after))
            layers.append(nn.ReLU())
            before = after
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(
        *layers,  # (batch, 8 width, image / 32, image / 32)
        nn.Flatten(),
        nn.Linear(before * (image // 32) ** 2, dense),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(dense, dense),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(dense, classes),
    )
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    return network
