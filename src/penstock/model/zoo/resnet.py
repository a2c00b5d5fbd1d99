"""Residual networks, for photographs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from penstock.model.zoo.recipe import recipe

_EXPANSION = 4
"""Channels that a bottleneck gives, as a multiple of those between its convolutions."""


@recipe
def resnet(
    layers: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
    classes: int = 1000,
    channels: int = 3,
    bottleneck: bool = False,
) -> nn.Module:
    """A residual network with batch normalisation: ResNet-18 at its defaults.

    Convolutions start from He's normal distribution over what they send out and have no bias;
    batch normalisation starts as the identity.

    Arguments:
        layers: blocks of each stage; all stages but the first halve height and width.
        width: channels of the first stage's convolutions; each stage doubles them.
        classes: number of outputs.
        channels: of the image.
        bottleneck: blocks of three convolutions (1 x 1, 3 x 3, 1 x 1, the last with four times the
            channels) in place of basic ones (3 x 3 twice).

    Returns:
        A module from images `(batch, channels, height, width)`, float32, of any size, 224 x 224 in
        the paper, to logits `(batch, classes)`. Its parameters: 11,689,512 with (2, 2, 2, 2),
        21,797,672 with (3, 4, 6, 3), and 25,557,032 with the latter as bottlenecks (ResNet-18, 34
        and 50).

    Source: He et al., "Deep residual learning for image recognition", 2016, table 1. As in the
    implementations measured since, a bottleneck halves in its 3 x 3 convolution.
    """
    blocks: list[nn.Module] = []
    before = width
    for stage, count in enumerate(layers):
        for position in range(count):
            stride = 2 if stage and not position else 1
            block = _Residual(before, width << stage, stride, bottleneck)
            blocks.append(block)
            before = block.channels
    network = nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),  # a quarter of height and width
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(before, classes),
    )
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network


class _Residual(nn.Module):
    """relu(body(x) + shortcut(x)); the shortcut is a convolution where the shape changes.

    Attributes:
        channels: of the output.
    """

    def __init__(self, before: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.channels = _EXPANSION * width if bottleneck else width
        if bottleneck:
            self.body = nn.Sequential(
                *_convolution(before, width, 1),
                nn.ReLU(),
                *_convolution(width, width, 3, stride),
                nn.ReLU(),
                *_convolution(width, self.channels, 1),
            )
        else:
            self.body = nn.Sequential(
                *_convolution(before, width, 3, stride),
                nn.ReLU(),
                *_convolution(width, width, 3),
            )
        same = stride == 1 and before == self.channels
        self.shortcut = nn.Sequential(
            *(() if same else _convolution(before, self.channels, 1, stride))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, before, height, width)` to `(batch, channels, height / stride, ...)`."""
        output: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return output


def _convolution(before: int, after: int, kernel: int, stride: int = 1) -> Sequence[nn.Module]:
    return (
        nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(after),
    )
