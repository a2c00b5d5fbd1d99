"""GPT-2: a transformer that reads a text from the left and says what comes next."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from penstock.model.zoo.recipe import recipe
from penstock.model.zoo.transformer import Block, checked_length, dense, draw, start


@recipe
def gpt(
    vocabulary: int = 50257,
    width: int = 768,
    heads: int = 12,
    layers: int = 12,
    length: int = 1024,
    dropout: float = 0.0,
    tied: bool = True,
) -> nn.Module:
    """GPT-2: token and position embeddings, pre-norm causal blocks, a norm, logits of next tokens.

    Weights start from N(0, 0.02), and from 1 / sqrt(2 layers) of that where they add to the
    shortcuts; positions from N(0, 0.01); biases from zero.

    Arguments:
        vocabulary: number of different tokens.
        width: of a token's vector.
        heads: of the attention, a divisor of `width`.
        layers: blocks; the dense layer of each has 4 `width` hidden units.
        length: of the longest sequence.
        dropout: probability, of embeddings, attention weights and what is added to the shortcuts;
            0.1 in the paper's predecessor.
        tied: whether the token embedding is also the weight of the output.

    Returns:
        A module from tokens `(batch, length)`, int64, to logits `(batch, vocabulary, length)`: what
        `cross_entropy` takes with targets `(batch, length)`, int64, the tokens one to the right. It
        is a view of `(batch, length, vocabulary)`. At its defaults it has 124,439,808 parameters,
        and 163,037,184 if not tied; 354,823,168 with width 1024, 16 heads and 24 layers.

    Raises:
        NetworkError: the width cannot be divided among the heads; from the module, a sequence is
            too long.

    Source: Radford et al., "Language models are unsupervised multitask learners", 2019, and its
    released code for the weights of positions and the tanh in GELU.
    """
    blocks = [
        Block(width, heads, dense(width, 4 * width, "tanh"), causal=True, dropout=dropout)
        for _ in range(layers)
    ]
    network = Decoder(vocabulary, width, length, blocks, dropout, tied)
    for block in blocks:
        draw(block.dense[2].weight, residual_std(layers))  # type: ignore[index]
    return network


def residual_std(layers: int) -> float:
    """Of the weights that add to shortcuts, of which there are two in each layer."""
    return 0.02 / math.sqrt(2 * layers)


class Decoder(nn.Module):
    """GPT-2's network around blocks of any kind. It draws all weights but the dense layers' last.

    Arguments:
        vocabulary, width, length, dropout, tied: as of `gpt`.
        blocks: modules from `(batch, length, width)` to the same.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        length: int,
        blocks: Sequence[Block],
        dropout: float,
        tied: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        # Not a layer that holds the embedding's weight: that is one tensor under two names, and
        # becomes two where a module is made on another device.
        self.head = None if tied else nn.Linear(width, vocabulary, bias=False)
        start(self, 0.02)
        draw(self.positions.weight, 0.01)
        for block in blocks:
            draw(block.attention.output.weight, residual_std(len(blocks)))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(batch, length)`, int64, to `(batch, vocabulary, length)`."""
        length = checked_length(tokens, self.positions.num_embeddings)
        x = self.dropout(self.tokens(tokens) + self.positions.weight[:length])
        x = self.norm(self.blocks(x))
        logits = F.linear(x, self.tokens.weight) if self.head is None else self.head(x)
        return logits.transpose(1, 2)
