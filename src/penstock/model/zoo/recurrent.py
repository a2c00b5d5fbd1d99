"""Recurrent networks, for text."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from penstock.errors import NetworkError
from penstock.model.zoo.recipe import recipe

_CELLS: dict[str, tuple[type[nn.LSTM] | type[nn.GRU], int]] = {
    "lstm": (nn.LSTM, 4),
    "gru": (nn.GRU, 3),
}
"""The layer of each cell, and its gates."""


@recipe
def text_lstm(
    vocabulary: int = 20_000,
    embedding: int = 256,
    hidden: int = 1024,
    layers: int = 1,
    classes: int = 2,
    cell: Literal["lstm", "gru"] = "lstm",
) -> nn.Module:
    """A classifier of texts: word vectors, a recurrent network, a dense layer on its last state.

    Word vectors start from N(0, 1), what goes into a gate from Xavier's uniform distribution, what
    returns from orthogonal matrices, biases from zero, but those of an LSTM's forget gates from 1.

    Arguments:
        vocabulary: number of different tokens.
        embedding: numbers in a word's vector.
        hidden: numbers in a layer's state.
        layers: recurrent layers, one on top of the other.
        classes: number of outputs.
        cell: "lstm" or "gru".

    Returns:
        A module from tokens `(batch, length)`, int64, to logits `(batch, classes)`. All tokens are
        read, and the last is heard best: pad in front. At its defaults it has 10,373,122
        parameters, or 9,060,354 with "gru".

    Raises:
        NetworkError: there is no such cell.

    Source: Hochreiter and Schmidhuber, "Long short-term memory", 1997; Cho et al., "Learning phrase
    representations using RNN encoder-decoder", 2014 (GRU); forget gates as Jozefowicz et al., "An
    empirical exploration of recurrent network architectures", 2015; sizes as Miyato et al.,
    "Adversarial training methods for semi-supervised text classification", 2017.
    """
    if cell not in _CELLS:
        raise NetworkError(
            f"text_lstm: cell {cell!r}; expected 'lstm' or 'gru'", hint="an LSTM is the default"
        )
    return _TextClassifier(vocabulary, embedding, hidden, layers, classes, cell)


class _TextClassifier(nn.Module):
    def __init__(
        self, vocabulary: int, embedding: int, hidden: int, layers: int, classes: int, cell: str
    ) -> None:
        super().__init__()
        kind, gates = _CELLS[cell]
        self.words = nn.Embedding(vocabulary, embedding)
        self.recurrent = kind(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)
        for name, param in self.recurrent.named_parameters():
            parts = param.detach().chunk(gates)  # views: input, forget, cell, output in an LSTM
            for gate, part in enumerate(parts):
                if name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(part)
                elif name.startswith("weight_hh"):
                    nn.init.orthogonal_(part)
                else:  # two biases are added up: one of them opens the gate
                    forget = cell == "lstm" and gate == 1 and name.startswith("bias_ih")
                    nn.init.constant_(part, 1.0 if forget else 0.0)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """`(batch, length)`, int64, to `(batch, classes)`."""
        states: Tensor = self.recurrent(self.words(tokens))[0]  # (batch, length, hidden)
        output: Tensor = self.head(states[:, -1])
        return output
