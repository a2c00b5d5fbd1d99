"""What the transformers of the zoo are made of.

    attention(x) = softmax(q k^T / sqrt(head)) v, in each of the heads; q, k, v linear in x

    pre-norm     x + attention(norm(x)), then x + dense(norm(x))
    post-norm    norm(x + attention(x)), then norm(x + dense(x))

Sizes: b batch, l length, w width, h heads, d = w / h numbers of a head.

Source: Vaswani et al., "Attention is all you need", 2017 (post-norm); Radford et al., "Language
models are unsupervised multitask learners", 2019 (pre-norm).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.errors import NetworkError


class Attention(nn.Module):
    """Self-attention with several heads, and dropout of its weights and of its output.

    Arguments:
        width: of the input and the output.
        heads: a divisor of `width`.
        causal: whether a position sees only itself and those before it.
        dropout: probability.

    Raises:
        NetworkError: the width cannot be divided among the heads.
    """

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise NetworkError(
                f"a width of {width} cannot be divided among {heads} heads",
                hint="the width is a multiple of the number of heads, often 64 times it",
            )
        self.head = width // heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, l, w)` to `(b, l, w)`."""
        # q, k and v of one head lie together, so that a part of the rows of `qkv` holds whole heads
        # wherever it is cut for tensor parallelism; hence also no `heads` here.
        heads = self.qkv(x).unflatten(-1, (-1, 3 * self.head)).transpose(1, 2)  # (b, h, l, 3 d)
        q, k, v = heads.chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout.p if self.training else 0.0, is_causal=self.causal
        )
        output: Tensor = self.dropout(self.output(mixed.transpose(1, 2).flatten(2)))
        return output


class Block(nn.Module):
    """A layer of a transformer: attention, then a dense layer, each with a norm and a shortcut.

    Arguments:
        width: of the input and the output.
        heads: of the attention.
        dense: a module from `(b, l, w)` to `(b, l, w)`, as `dense` makes it.
        causal: whether a position sees only itself and those before it.
        dropout: probability, of attention weights and of what is added to the shortcuts.
        post_norm: whether the norms stand behind the shortcuts' sums, and not before what is added.
        eps: of the norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dense: nn.Module,
        *,
        causal: bool = False,
        dropout: float = 0.0,
        post_norm: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, causal, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.dense = dense
        self.dense_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.post_norm = post_norm

    def forward(self, x: Tensor) -> Tensor:
        """`(b, l, w)` to `(b, l, w)`."""
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x))
            x = self.dense_norm(x + self.dropout(self.dense(x)))
        else:
            x = x + self.attention(self.attention_norm(x))
            x = x + self.dropout(self.dense(self.dense_norm(x)))
        return x


def dense(width: int, hidden: int, gelu: Literal["none", "tanh"] = "none") -> nn.Sequential:
    """Linear, GELU, linear: `(b, l, w)` to `(b, l, w)` by way of `hidden`.

    Arguments:
        gelu: "none" for the exact function, "tanh" for its approximation.
    """
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(approximate=gelu), nn.Linear(hidden, width)
    )


def checked_length(tokens: Tensor, length: int) -> int:
    """The length of sequences `(batch, length)`.

    Raises:
        NetworkError: there are not so many positions.
    """
    if tokens.shape[1] > length:
        raise NetworkError(
            f"sequences of {tokens.shape[1]} tokens, in a network with {length} positions",
            hint="cut the sequences, or make the network with a larger `length`",
        )
    return tokens.shape[1]


def start(network: nn.Module, std: float, truncated: bool = False) -> None:
    """Draws the first weights of a transformer: linear layers and embeddings; biases are zero.

    Arguments:
        std: of the normal distribution.
        truncated: whether what lies beyond two standard deviations is drawn again.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            draw(layer.weight, std, truncated)
        if isinstance(layer, nn.Linear) and isinstance(layer.bias, Tensor):
            nn.init.zeros_(layer.bias)


def draw(tensor: Tensor, std: float, truncated: bool = False) -> None:
    """Fills a tensor from N(0, std), as `start` does."""
    with torch.no_grad():
        if truncated:
            nn.init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)
        else:
            nn.init.normal_(tensor, std=std)
