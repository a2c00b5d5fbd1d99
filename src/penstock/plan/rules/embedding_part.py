"""Embeddings of which a rank has some rows: a lookup gives zeros for the others' rows.

    penstock.embedding_part(weight, indices, start)                   (rows, w), (...) -> (..., w)
    penstock.embedding_part_backward(grad, indices, start, rows, padding_index)  -> (rows, w)

The sum of what all ranks look up is what one looks up in all rows (Shoeybi et al. 2019,
arXiv:1909.08053, section 3). Backward, each rank adds up the gradient of its rows.
"""

from __future__ import annotations

import torch

from penstock.model.operators import define, within


def embedding_part(weight: torch.Tensor, indices: torch.Tensor, start: int) -> torch.Tensor:
    """The rows of these indices.

    Arguments:
        weight: rows `start` and following, (rows, width).
        indices: int64 or int32, of rows of the whole.

    Returns:
        (..., width); zeros for rows that are not here.
    """
    place, elsewhere = within(indices, start, weight.shape[0])
    found = torch.ops.aten.embedding.default(weight, place.masked_fill_(elsewhere, 0))
    return found.masked_fill_(elsewhere.unsqueeze(-1), 0)  # type: ignore[no-any-return]


def embedding_part_backward(
    grad_output: torch.Tensor, indices: torch.Tensor, start: int, rows: int, padding_index: int
) -> torch.Tensor:
    """The gradient of rows `start` to `start + rows`.

    Arguments:
        grad_output: (..., width).
        indices: (...), of rows of the whole.
        padding_index: of a row that has no gradient; -1 for none.

    Returns:
        (rows, width).
    """
    place, elsewhere = within(indices, start, rows)
    if padding_index >= 0:
        elsewhere |= indices == padding_index
    # What is elsewhere is added to one row more, which is padding and thrown away.
    place.masked_fill_(elsewhere, rows)
    found = torch.ops.aten.embedding_dense_backward.default(
        grad_output, place, rows + 1, rows, False
    )
    return found[:rows]  # type: ignore[no-any-return]


define("embedding_part(Tensor weight, Tensor indices, int start) -> Tensor", embedding_part)
define(
    "embedding_part_backward(Tensor grad_output, Tensor indices, int start, int rows, "
    "int padding_index) -> Tensor",
    embedding_part_backward,
)
