"""A recommender: large tables of embeddings, and how the vectors found there agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from penstock.errors import NetworkError
from penstock.model.zoo.recipe import recipe

CRITEO = (
    1460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5683, 8_351_593, 3194,
    27, 14_992, 5_461_306, 10, 5652, 2173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
"""Categories in each of the 26 columns of Criteo's display advertising challenge (Kaggle, 2014)."""


@recipe
def recommender(
    rows: Sequence[int] = CRITEO,
    width: int = 16,
    dense_features: int = 13,
    hidden: Sequence[int] = (512, 256, 64),
    top: Sequence[int] = (512, 256),
    classes: int = 2,
) -> nn.Module:
    """DLRM: embeddings and a dense tower, the products of every two of their vectors, a dense head.

    Tables start from the uniform distribution within 1 / sqrt(rows), dense weights from Xavier's
    normal distribution, biases from N(0, 1 / sqrt(units)).

    Arguments:
        rows: of each table: the number of its categories.
        width: of a category's vector.
        dense_features: counts at the head of an example.
        hidden: units of the tower's hidden layers; a layer of `width` units follows them.
        top: units of the head's hidden layers.
        classes: number of outputs. The paper has 1, for the loss
            `binary_cross_entropy_with_logits`.

    Returns:
        A module from `(batch, dense_features + len(rows))`, int64, to logits `(batch, classes)`.
        As in Criteo's records, counts come first: the tower gets log(1 + count), and what is
        negative counts as 0; then one category from every table. At its defaults it has 540,677,474
        parameters, of which 540,201,232 in the tables (2.2 GB).

    Raises:
        NetworkError: there are no two vectors to multiply; from the module, an example has other
            columns.

    Source: Naumov et al., "Deep learning recommendation model for personalization and
    recommendation systems", 2019, section 5, and its released code.
    """
    if len(rows) + (dense_features > 0) < 2:
        raise NetworkError(
            f"recommender: {len(rows)} tables and {dense_features} dense features; expected two "
            "tables, or one and dense features",
            hint="`rows` has a number for each column of categories",
        )
    return _Recommender(rows, width, dense_features, hidden, top, classes)


class _Recommender(nn.Module):
    def __init__(
        self,
        rows: Sequence[int],
        width: int,
        dense_features: int,
        hidden: Sequence[int],
        top: Sequence[int],
        classes: int,
    ) -> None:
        super().__init__()
        self.dense_features = dense_features
        self.tables = nn.ModuleList(nn.Embedding(count, width) for count in rows)
        self.tower = _tower([dense_features, *hidden, width]) if dense_features else None
        vectors = len(rows) + (dense_features > 0)
        pairs = math.comb(vectors, 2)
        self.head = _tower([pairs + (width if dense_features else 0), *top, classes])[:-1]
        for layer in self.modules():
            if isinstance(layer, nn.Embedding):
                bound = layer.num_embeddings**-0.5
                nn.init.uniform_(layer.weight, -bound, bound)
            elif isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.normal_(layer.bias, std=layer.out_features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """`(batch, dense_features + tables)`, int64, to `(batch, classes)`."""
        expected = self.dense_features + len(self.tables)
        if features.shape[1] != expected:
            raise NetworkError(
                f"recommender: {features.shape[1]} columns; expected {expected}",
                hint=f"{self.dense_features} counts, then a category of each of {len(self.tables)} "
                "tables",
            )
        categories = features[:, self.dense_features :].unbind(1)
        vectors = [table(category) for table, category in zip(self.tables, categories)]
        kept = []
        if self.tower is not None:
            counts = features[:, : self.dense_features].clamp(min=0)
            kept.append(self.tower(counts.to(vectors[0].dtype).log1p()))
        stacked = torch.stack(kept + vectors, dim=1)  # (batch, vectors, width)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        # Each pair once, and no vector with itself.
        size = products.shape[1]
        row, column = torch.tril_indices(size, size, offset=-1, device=products.device)
        output: Tensor = self.head(torch.cat([*kept, products[:, row, column]], dim=1))
        return output


def _tower(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)
