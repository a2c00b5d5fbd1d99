"""Autoencoders: networks that give their own input again, through a narrow code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from penstock.errors import NetworkError
from penstock.model.zoo.recipe import recipe


@recipe
def autoencoder(
    shape: Sequence[int] = (1, 28, 28),
    hidden: Sequence[int] = (1000, 500, 250),
    code: int = 30,
) -> nn.Module:
    """A dense autoencoder: hidden layers with ReLU down to a linear code, and the same back up.

    Weights start from He's normal distribution, biases from zero.

    Arguments:
        shape: of an example.
        hidden: units of the encoder's layers, in order; the decoder has them in reverse.
        code: numbers that the example becomes in the middle.

    Returns:
        A module from `(batch, *shape)`, float32, to as many: logits of pixels between 0 and 1 for
        the loss `binary_cross_entropy_with_logits`, or numbers of any size for `mse`; its target is
        its input. At its defaults it has 2,837,314 parameters.

    Source: the 784-1000-500-250-30 network of Hinton and Salakhutdinov, "Reducing the
    dimensionality of data with neural networks", 2006, with ReLU and He's weights in place of
    logistic units and layer-wise pretraining.
    """
    inputs = math.prod(shape)
    down, up = [inputs, *hidden, code], [code, *reversed(hidden), inputs]
    network = nn.Sequential(
        nn.Flatten(),
        *_dense(down),  # (batch, code)
        *_dense(up),
        nn.Unflatten(1, tuple(shape)),
    )
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return network


def _dense(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


@recipe
def convolutional_autoencoder(
    channels: int = 3, image: int = 64, width: int = 64, code: int = 100
) -> nn.Module:
    """A convolutional autoencoder: strided convolutions down to a code, transposed ones back up.

    Batch normalisation stands behind every convolution but the first and those that give the code
    and the output; leaky ReLU (0.2) in the encoder, ReLU in the decoder. Convolutions start from
    N(0, 0.02), those of the normalisation from N(1, 0.02).

    Arguments:
        channels: of the image.
        image: height and width in pixels: 4 times a power of two, 8 or more.
        width: channels after the first convolution; each further one doubles them, to 4 x 4 pixels.
        code: numbers that an image becomes in the middle.

    Returns:
        A module from images `(batch, channels, image, image)`, float32, to as many: logits or
        numbers, as `autoencoder` gives them; its target is its input. At its defaults it has
        7,153,280 parameters, of which 3,576,704 in the decoder.

    Raises:
        NetworkError: halving does not lead from the image to 4 x 4 pixels.

    Source: the two networks of Radford et al., "Unsupervised representation learning with deep
    convolutional generative adversarial networks", 2016: the discriminator, with `code` outputs, as
    encoder, the generator, without its tanh, as decoder.
    """
    halvings = (image // 4).bit_length() - 1
    if image < 8 or image != 4 << halvings:
        raise NetworkError(
            f"convolutional_autoencoder: image of {image} pixels; expected 8, 16, 32, 64, ...",
            hint="each convolution halves the picture, down to 4 x 4: resize it, or pad it",
        )
    widths = [width << k for k in range(halvings)]
    encoder: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for before, after in pairwise(widths):
        encoder += [
            nn.Conv2d(before, after, 4, 2, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.2),
        ]
    encoder.append(nn.Conv2d(widths[-1], code, 4, bias=False))  # (batch, code, 1, 1)
    decoder: list[nn.Module] = [
        nn.ConvTranspose2d(code, widths[-1], 4, bias=False),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
    ]
    for after, before in reversed(list(pairwise(widths))):
        decoder += [
            nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    decoder.append(nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False))
    network = nn.Sequential(nn.Sequential(*encoder), nn.Sequential(*decoder))
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, mean=1.0, std=0.02)
    return network
