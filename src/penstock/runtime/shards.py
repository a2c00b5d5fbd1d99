"""What belongs to a shard and not to the worker that carries it: random state and buffers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from penstock.exchange.flat import Layout, by_dtype
from penstock.exchange.group import Group
from penstock.exchange.shard_sum import ShardSum


@dataclass
class RandomState:
    """Where torch's, numpy's and Python's global generators stand."""

    torch_cpu: torch.Tensor
    torch_cuda: torch.Tensor | None
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """The state of this process's generators now."""
        cuda = torch.cuda.get_rng_state() if _cuda_in_use() else None
        numpy_state = np.random.get_state(legacy=False)
        assert isinstance(numpy_state, dict)
        return cls(torch.get_rng_state(), cuda, numpy_state, random.getstate())

    @classmethod
    def seeded(cls, first: int, *key: int) -> RandomState:
        """The state that a key stands for; leaves this process's generators as they are."""
        with preserved():
            seed(first, *key)
            return cls.capture()

    def restore(self) -> None:
        """Makes it the state of this process's generators."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None:
            torch.cuda.set_rng_state(self.torch_cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """As tensors, for a checkpoint."""
        keys, gauss = self.numpy["state"], self.numpy["gauss"]
        version, words, gauss_next = self.python
        tensors = {
            "torch_cpu": self.torch_cpu,
            "numpy": torch.from_numpy(keys["key"].astype(np.int64)),
            "numpy_position": torch.tensor([keys["pos"], self.numpy["has_gauss"]]),
            "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
            "python": torch.tensor([version, *words]),
            "python_gauss": torch.tensor(
                [] if gauss_next is None else [gauss_next], dtype=torch.float64
            ),
        }
        if self.torch_cuda is not None:
            tensors["torch_cuda"] = self.torch_cuda
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> RandomState:
        """What `to_tensors` made."""
        position, has_gauss = tensors["numpy_position"].tolist()
        version, *words = tensors["python"].tolist()
        gauss_next = tensors["python_gauss"].tolist()
        numpy_state = {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": tensors["numpy_gauss"].item(),
        }
        python = (version, tuple(words), gauss_next[0] if gauss_next else None)
        return cls(tensors["torch_cpu"], tensors.get("torch_cuda"), numpy_state, python)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def seed(first: int, *key: int) -> None:
    """Seeds all generators of this process from a key of whole numbers."""
    # As spawn key and not as more entropy, where (1, 1) would be as (1, 1, 0).
    words = np.random.SeedSequence(first, spawn_key=key).generate_state(3)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


@contextmanager
def preserved() -> Iterator[None]:
    """Leaves the generators afterwards as they were before."""
    before = RandomState.capture()
    try:
        yield
    finally:
        before.restore()


class ShardBuffers:
    """The buffers of a network (batch-norm statistics), one set per own shard.

    Arguments:
        network: its buffers now are the first values of every shard.
        num_own: how many shards this worker carries.
    """

    def __init__(self, network: torch.nn.Module, num_own: int) -> None:
        self.names: list[str] = []
        self._places: list[list[tuple[torch.nn.Module, str]]] = []
        index_of: dict[int, int] = {}
        for prefix, module in network.named_modules():
            for key, tensor in module._buffers.items():
                if tensor is None:
                    continue
                if id(tensor) not in index_of:
                    index_of[id(tensor)] = len(self.names)
                    self.names.append(f"{prefix}.{key}" if prefix else key)
                    self._places.append([])
                self._places[index_of[id(tensor)]].append((module, key))
        self._active = 0
        first = self._current()
        self._sets = [first] + [[t.clone() for t in first] for _ in range(num_own - 1)]

    def activate(self, i: int) -> None:
        """The network takes the i-th own shard's buffers."""
        if i != self._active:
            self._sets[self._active] = self._current()
            self._active = i
            self._place(self._sets[i])

    def of(self, i: int) -> dict[str, torch.Tensor]:
        """The i-th own shard's buffers by name."""
        if i == self._active:
            self._sets[i] = self._current()
        return dict(zip(self.names, self._sets[i], strict=True))

    def load(self, i: int, values: dict[str, torch.Tensor]) -> None:
        """Sets the i-th own shard's buffers."""
        for name, tensor in self.of(i).items():
            tensor.copy_(values[name])

    @contextmanager
    def replaced(self, values: dict[str, torch.Tensor]) -> Iterator[None]:
        """The network has these buffers meanwhile."""
        self._sets[self._active] = self._current()
        self._place([values[name] for name in self.names])
        try:
            yield
        finally:
            self._place(self._sets[self._active])

    def _current(self) -> list[torch.Tensor]:
        return [places[0][0]._buffers[places[0][1]] for places in self._places]  # type: ignore[misc]

    def _place(self, tensors: list[torch.Tensor]) -> None:
        for places, tensor in zip(self._places, tensors, strict=True):
            for module, key in places:
                module._buffers[key] = tensor


def merged_buffers(
    group: Group, buffers: ShardBuffers, own: range, shards: int
) -> dict[str, torch.Tensor]:
    """The buffers of the network that all shards' make together. Collective.

    Floating ones are shard 0's plus the mean difference of all shards' from it, summed along the
    fixed tree (so a buffer that is equal everywhere stays as it is, to the bit); others are
    shard 0's.
    """
    merged = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in buffers.of(0).items()
    }
    for tensor in merged.values():
        group.broadcast(tensor, root=0).wait()
    floating = [(name, t) for name, t in merged.items() if t.is_floating_point()]
    for dtype, tensors in by_dtype(floating).items():
        layout = Layout.of(tensors, dtype)
        device = tensors[0][1].device
        sums = ShardSum(group, own, shards, dtype, device, [(0, layout.length)])
        for i in range(len(own)):
            mine = buffers.of(i)
            sums.row(i).zero_()
            for slot, view in zip(layout.slots, layout.views(sums.row(i)), strict=True):
                torch.sub(mine[slot.name], merged[slot.name], out=view)
            sums.added(i)
        for slot, view in zip(layout.slots, layout.views(sums.total()), strict=True):
            merged[slot.name].add_(view.div(shards))
    return merged
