"""BERT: a transformer that reads a text from both sides and says what was masked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.model.zoo.recipe import recipe
from penstock.model.zoo.transformer import Block, checked_length, dense, start

_EPS = 1e-12
"""Of the norms, as released."""


@recipe
def bert(
    vocabulary: int = 30522,
    width: int = 768,
    heads: int = 12,
    layers: int = 12,
    length: int = 512,
    dropout: float = 0.1,
    segments: int = 2,
) -> nn.Module:
    """BERT with its masked-language head: embeddings, post-norm blocks, logits of every token.

    Weights start from N(0, 0.02), truncated at two standard deviations, biases from zero. The
    token embedding is also the weight of the output.

    Arguments:
        vocabulary: number of different tokens.
        width: of a token's vector.
        heads: of the attention, a divisor of `width`.
        layers: blocks; the dense layer of each has 4 `width` hidden units.
        length: of the longest sequence.
        dropout: probability, of embeddings, attention weights and what is added to the shortcuts.
        segments: kinds of sentences.

    Returns:
        A module from tokens `(batch, length)`, int64, and segments of the same kind (where not
        given, all are of segment 0) to logits `(batch, vocabulary, length)`: what `cross_entropy`
        takes with targets `(batch, length)`, int64, that are -100 wherever nothing was masked. It
        is a view of `(batch, length, vocabulary)`. Every token is attended to: fill sequences, do
        not pad them. At its defaults it has 109,514,298 parameters, without pooler and
        next-sentence head.

    Raises:
        NetworkError: the width cannot be divided among the heads; from the module, a sequence is
            too long.

    Source: Devlin et al., "BERT: pre-training of deep bidirectional transformers for language
    understanding", 2019, BERT base, and its released code.
    """
    blocks = [
        Block(width, heads, dense(width, 4 * width), dropout=dropout, post_norm=True, eps=_EPS)
        for _ in range(layers)
    ]
    network = _Encoder(vocabulary, width, length, segments, blocks, dropout)
    start(network, 0.02, truncated=True)
    return network


class _Encoder(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        width: int,
        length: int,
        segments: int,
        blocks: list[Block],
        dropout: float,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.segments = nn.Embedding(segments, width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=_EPS))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """`(batch, length)`, int64, once or twice, to `(batch, vocabulary, length)`."""
        length = checked_length(tokens, self.positions.num_embeddings)
        segment = self.segments.weight[0] if segments is None else self.segments(segments)
        x = self.tokens(tokens) + self.positions.weight[:length] + segment
        x = self.head(self.blocks(self.dropout(self.norm(x))))
        return F.linear(x, self.tokens.weight, self.bias).transpose(1, 2)
