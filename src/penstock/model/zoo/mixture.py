"""A mixture of experts: a transformer whose dense layers are many, and a gate chooses among them.

    y = sum over experts e of g_e(x) down_e(gelu(up_e(x)))

    p = softmax(gate(x))
    g = p of the `top` experts with the largest p, divided by their sum; 0 of the others
        (with one expert on top, p itself: divided, it would be 1, and the gate would not learn)

Every expert sees every token, and the gate's zeros drop what was not chosen: shapes do not depend
on the data, and neither does what is computed. It costs as many operations as all experts have.

Sizes: n tokens, w width, f hidden units of an expert, e experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from penstock.errors import NetworkError
from penstock.model.zoo.gpt import Decoder, residual_std
from penstock.model.zoo.recipe import recipe
from penstock.model.zoo.transformer import Block, draw


@recipe
def mixture_of_experts(
    vocabulary: int = 50257,
    width: int = 768,
    hidden: int = 3072,
    experts: int = 8,
    top: int = 2,
    heads: int = 12,
    layers: int = 12,
    length: int = 1024,
    dropout: float = 0.0,
    tied: bool = True,
) -> nn.Module:
    """GPT-2 with a mixture of experts as the dense layer of each block.

    Weights start as `gpt`'s; gates from N(0, 0.02).

    Arguments:
        vocabulary, width, heads, layers, length, dropout, tied: as of `gpt`.
        hidden: units of an expert.
        experts: of each layer.
        top: experts that a token listens to; with all of them the mixture is soft.

    Returns:
        A module from tokens `(batch, length)`, int64, to logits `(batch, vocabulary, length)`, as
        `gpt` gives them. Nothing but the loss keeps experts in balance. At its defaults it has
        521,197,824 parameters.

    Raises:
        NetworkError: `top` is not between 1 and `experts`, or the width cannot be divided among the
            heads; from the module, a sequence is too long.

    Source: Shazeer et al., "Outrageously large neural networks", 2017 (the mixture); Fedus et al.,
    "Switch transformers", 2022 (one expert); Jiang et al., "Mixtral of experts", 2024 (8 experts,
    2 on top, one mixture in each block).
    """
    if not 1 <= top <= experts:
        raise NetworkError(
            f"mixture_of_experts: {top} on top of {experts} experts; expected 1 to {experts}",
            hint="`top` is the number of experts that a token listens to",
        )
    mixtures = [Mixture(width, hidden, experts, top, residual_std(layers)) for _ in range(layers)]
    blocks = [Block(width, heads, mixture, causal=True, dropout=dropout) for mixture in mixtures]
    return Decoder(vocabulary, width, length, blocks, dropout, tied)


class Mixture(nn.Module):
    """A dense layer of several experts, in stacked tensors, and its gate.

    Arguments:
        width, hidden, experts, top: as of `mixture_of_experts`.
        std: of the experts' last weights.

    Attributes:
        up: `(experts, width, hidden)`; `up_bias`: `(experts, 1, hidden)`.
        down: `(experts, hidden, width)`; `down_bias`: `(experts, 1, width)`.
    """

    def __init__(self, width: int, hidden: int, experts: int, top: int, std: float) -> None:
        super().__init__()
        self.top = top
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(experts, 1, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_bias = nn.Parameter(torch.zeros(experts, 1, width))
        draw(self.gate.weight, 0.02)
        draw(self.up, 0.02)
        draw(self.down, std)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, length, width)` to the same."""
        tokens = x.flatten(0, 1)  # (n, w)
        seen = tokens.expand(self.up.shape[0], -1, -1)  # (e, n, w), without a copy
        inner = F.gelu(torch.baddbmm(self.up_bias, seen, self.up), approximate="tanh")  # (e, n, f)
        outer = torch.baddbmm(self.down_bias, inner, self.down)  # (e, n, w)
        return (outer * self.shares(tokens).t().unsqueeze(-1)).sum(0).view_as(x)

    def shares(self, tokens: Tensor) -> Tensor:
        """What each expert adds to each token: `(n, w)` to `(n, e)`, zero where not chosen."""
        shares: Tensor = self.gate(tokens).softmax(-1)
        if self.top == shares.shape[1]:
            return shares
        chosen = shares.topk(self.top).indices
        shares = shares * torch.zeros_like(shares).scatter(-1, chosen, 1.0)
        return shares if self.top == 1 else shares / shares.sum(-1, keepdim=True)
