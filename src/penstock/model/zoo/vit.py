"""The vision transformer: an image as a sequence of patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from penstock.errors import NetworkError
from penstock.model.zoo.recipe import recipe
from penstock.model.zoo.transformer import Block, dense, draw, start

_EPS = 1e-6
"""Of the norms, as released."""


@recipe
def vit(
    image: int = 224,
    patch: int = 16,
    width: int = 768,
    heads: int = 12,
    layers: int = 12,
    classes: int = 1000,
    channels: int = 3,
    dropout: float = 0.0,
) -> nn.Module:
    """A vision transformer: patches, a class token, pre-norm blocks, logits from the class token.

    Weights start from N(0, 0.02), truncated at two standard deviations, those of patches from
    N(0, 1 / sqrt(numbers of a patch)), biases and the class token from zero.

    Arguments:
        image: height and width in pixels, a multiple of `patch`.
        patch: height and width in pixels.
        width: of a patch's vector.
        heads: of the attention, a divisor of `width`.
        layers: blocks; the dense layer of each has 4 `width` hidden units.
        classes: number of outputs.
        channels: of the image.
        dropout: probability, of embeddings, attention weights and what is added to the shortcuts.

    Returns:
        A module from images `(batch, channels, image, image)`, float32, to logits
        `(batch, classes)`. At its defaults, ViT-B/16, it has 86,567,656 parameters.

    Raises:
        NetworkError: the image cannot be divided into patches, or the width among the heads.

    Source: Dosovitskiy et al., "An image is worth 16 x 16 words", 2021; weights as Touvron et al.,
    "Training data-efficient image transformers", 2021.
    """
    if patch < 1 or image < patch or image % patch:
        raise NetworkError(
            f"vit: an image of {image} pixels cannot be divided into patches of {patch}",
            hint="resize the image to a multiple of the patch",
        )
    blocks = [
        Block(width, heads, dense(width, 4 * width), dropout=dropout, eps=_EPS)
        for _ in range(layers)
    ]
    return _VisionTransformer(
        (image // patch) ** 2, patch, width, blocks, classes, channels, dropout
    )


class _VisionTransformer(nn.Module):
    def __init__(
        self,
        num_patches: int,
        patch: int,
        width: int,
        blocks: list[Block],
        classes: int,
        channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + num_patches, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, classes)
        start(self, 0.02, truncated=True)
        draw(self.positions, 0.02, truncated=True)
        draw(self.patches.weight, (channels * patch**2) ** -0.5, truncated=True)
        assert self.patches.bias is not None
        nn.init.zeros_(self.patches.bias)

    def forward(self, images: Tensor) -> Tensor:
        """`(batch, channels, image, image)` to `(batch, classes)`."""
        x = self.patches(images).flatten(2).transpose(1, 2)  # (batch, patches, width)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.norm(self.blocks(self.dropout(x + self.positions)))
        output: Tensor = self.head(x[:, 0])
        return output
