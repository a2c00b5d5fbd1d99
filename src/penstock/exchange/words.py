"""What workers tell each other beside tensors: JSON values, gathered."""

from __future__ import annotations

import json
from typing import Any

import torch

from penstock.exchange.group import Group


def gather_words(group: Group, mine: Any) -> list[Any]:
    """What every rank says, in their order. Collective.

    Arguments:
        mine: a JSON value.
    """
    text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    lengths = torch.empty(group.world_size, 1, dtype=torch.int64)
    group.all_gather(lengths, torch.tensor([len(text)])).wait()
    padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
    padded[: len(text)] = text
    everyone = torch.empty(group.world_size, len(padded), dtype=torch.uint8)
    group.all_gather(everyone, padded).wait()
    rows = zip(everyone, lengths, strict=True)
    return [json.loads(row[: int(length)].numpy().tobytes()) for row, length in rows]
