"""Many tensors as views of one flat buffer, cut into buckets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 64
"""Every view starts on a cache line, so that kernels treat all rows alike."""


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the flat buffer, in elements."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """The order and place of named tensors of one dtype in a flat buffer of `length` elements."""

    dtype: torch.dtype
    slots: tuple[Slot, ...]
    length: int

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Layout:
        """Lays the tensors out one after the other, each aligned."""
        step = max(1, ALIGNMENT_BYTES // dtype.itemsize)
        slots, start = [], 0
        for name, tensor in tensors:
            stop = start + tensor.numel()
            slots.append(Slot(name, tuple(tensor.shape), start, stop))
            start = -(-stop // step) * step
        return cls(dtype, tuple(slots), start)

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors inside `flat` (length,), in the order of the slots."""
        return [flat[s.start : s.stop].view(s.shape) for s in self.slots]

    def buckets(self, bucket_bytes: int) -> tuple[tuple[int, int], ...]:
        """Borders (start, stop) of runs of whole slots of about `bucket_bytes`, in order."""
        borders, start = [], 0
        ends = [slot.start for slot in self.slots[1:]] + [self.length]
        for end in ends:
            if end == self.length or (end - start) * self.dtype.itemsize >= bucket_bytes:
                borders.append((start, end))
                start = end
        return tuple(borders)


def by_dtype(
    tensors: Sequence[tuple[str, torch.Tensor]],
) -> dict[torch.dtype, list[tuple[str, torch.Tensor]]]:
    """Groups named tensors by dtype, in order of first appearance."""
    groups: dict[torch.dtype, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        groups.setdefault(tensor.dtype, []).append((name, tensor))
    return groups
