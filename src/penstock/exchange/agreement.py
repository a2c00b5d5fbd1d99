"""How the shards of one job agree on parameters: what `AllReduce` and `Averaging` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.errors import Diverged
from penstock.exchange.flat import Layout, by_dtype
from penstock.exchange.group import Group
from penstock.exchange.shard_sum import ShardSum

HEADER_SIZE = 5
"""What each shard says beside its tensors: its examples (in two digits, so that float32 sums them
exactly), the sum of their losses, two wishes. It is summed with the tensors, in one collective."""
_BASE = 4096.0


@dataclass(frozen=True)
class Outcome:
    """What all workers know after an exchange, equal on all of them.

    `loss` is the mean over `examples` (all shards, all steps since the last exchange); `stop` and
    `save` (a checkpoint) are true when some worker wished it.
    """

    examples: int
    loss: float
    stop: bool
    save: bool

    @classmethod
    def of(cls, header: torch.Tensor) -> Outcome:
        """What the sum of all shards' headers, (HEADER_SIZE,), says."""
        high, low, loss, stop, save = header.tolist()
        examples = int(high * _BASE + low)
        return cls(examples, loss / examples if examples else math.nan, stop > 0, save > 0)


def write_header(
    into: torch.Tensor, examples: int, loss: float, *, stop: bool = False, save: bool = False
) -> None:
    """Fills a shard's header, (HEADER_SIZE,): examples, the sum of their losses, two wishes."""
    words = (*divmod(examples, _BASE), loss, stop, save)
    if into.is_cpu:
        into.numpy()[:] = words  # a tenth of the time
    else:
        into.copy_(torch.tensor(words, dtype=into.dtype))


_HOLD_HEADERS = (torch.float32, torch.float64)


def layouts_of(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Layout]:
    """A layout for each dtype, the last of one that can hold a header, if there is one."""
    layouts = [Layout.of(group, dtype) for dtype, group in by_dtype(tensors).items()]
    return sorted(layouts, key=lambda layout: layout.dtype in _HOLD_HEADERS)


def sums_of(
    group: Group,
    own: range,
    shards: int,
    flats: Sequence[tuple[torch.dtype, Sequence[tuple[int, int]]]],
    device: torch.device,
) -> list[ShardSum]:
    """Sums of flat tensors, each given by its dtype and borders. The last one holds, behind its
    tensors, the header; where no flat tensor can hold one, another is made."""
    if not flats or flats[-1][0] not in _HOLD_HEADERS:
        flats = [*flats, (torch.float64, [(0, 0)])]
    dtype, borders = flats[-1]
    start, stop = borders[-1]
    flats = [*flats[:-1], (dtype, [*borders[:-1], (start, stop + HEADER_SIZE)])]
    return [ShardSum(group, own, shards, dtype, device, borders) for dtype, borders in flats]


@dataclass(frozen=True)
class Clip:
    """Gradient clipping by global L2 norm or by value; None for neither."""

    norm: float | None = None
    value: float | None = None


class Agreement(Protocol):
    """One worker's part in keeping its shards and all others agreed. One step is:

    for each own shard i: `activate(i)`, then `backward` for each of its micro-batches (or `skip`
    when it has no examples left); then `commit`.
    """

    steps_apart: int
    """Steps since the last exchange."""

    @property
    def agreed(self) -> bool:
        """Whether all shards hold the same parameters and optimizer state now."""
        ...

    def activate(self, i: int) -> None:
        """The network's parameters and gradients are the i-th own shard's from now on."""
        ...

    def backward(self, loss: torch.Tensor, examples: int, last: bool) -> None:
        """Adds the gradients of a mean loss over `examples`; `last` ends the shard's part."""
        ...

    def skip(self) -> None:
        """The active shard has no (more) examples in this step."""
        ...

    def commit(self, step: int, *, stop: bool = False, save: bool = False) -> Outcome | None:
        """Ends step number `step`: exchange and update; tells the others this worker's wishes.

        None when the step needed no exchange.
        """
        ...

    def conclude(self) -> Outcome | None:
        """One more exchange where shards stand apart; None where they agree."""
        ...

    def settle(self, parameter: torch.nn.Parameter | None = None) -> None:
        """Waits until a parameter, or each of them, is as the last step has left it."""
        ...

    def merged(self) -> AbstractContextManager[None]:
        """While in it, the network's parameters are all shards' (weighted) mean. Collective."""
        ...

    def borders(self) -> dict[str, list[list[int]]]:
        """Bucket borders by dtype: frozen when the job starts, used again on resume."""
        ...

    @property
    def exchange_bytes(self) -> int:
        """What each shard gives to an exchange."""
        ...

    def parameters_of(self, i: int) -> list[torch.Tensor]:
        """The i-th own shard's trained parameters."""
        ...

    def gradients(self) -> list[torch.Tensor]:
        """The last gradients of the trained parameters, until the next step begins."""
        ...


def gradient_views(
    parameters: Sequence[torch.nn.Parameter],
    layouts: Sequence[Layout],
    flats: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """For each parameter, its view in the flat buffers (one per layout, by dtype)."""
    by_name = {
        (layout.dtype, slot.name): view
        for layout, flat in zip(layouts, flats, strict=True)
        for slot, view in zip(layout.slots, layout.views(flat), strict=True)
    }
    return [by_name[p.dtype, str(number)] for number, p in enumerate(parameters)]


def finite(flat: torch.Tensor) -> bool:
    """Whether all its numbers are, and their sum."""
    return math.isfinite(flat.sum().item())


def check_finite(
    loss: float,
    flats: Iterable[torch.Tensor],
    gradients: Iterable[tuple[str, torch.Tensor]],
    where: Callable[[], str],
) -> None:
    """Raises Diverged when the loss or a gradient is not finite, naming the first parameter.

    Arguments:
        flats: all gradients of the shard that have not been checked.
        gradients: each parameter's name and gradient, in order of registration.
        where: names step and shard.
    """
    if math.isfinite(loss) and all(map(finite, flats)):
        return
    bad = [name for name, gradient in gradients if not torch.isfinite(gradient).all()]
    if math.isfinite(loss) and not bad:
        return  # a sum of finite gradients that overflowed
    gradient = (
        f"the first parameter whose gradient is not finite is {bad[0]}"
        if bad
        else ("all gradients are finite")
    )
    raise Diverged(
        f"{where()}: the loss is {loss}; {gradient}",
        hint="a smaller learning rate, clip: {norm: 1}, or look for bad values in this batch",
    )


def clip_gradients(flats: Sequence[torch.Tensor], clip: Clip) -> None:
    """Clips in place, over all flat buffers together."""
    if clip.value is not None:
        for flat in flats:
            flat.clamp_(-clip.value, clip.value)
    if clip.norm is not None:
        norms = torch.stack([torch.linalg.vector_norm(flat).double() for flat in flats])
        norm = torch.linalg.vector_norm(norms).item()
        if norm > clip.norm:
            for flat in flats:
                flat.mul_(clip.norm / (norm + 1e-6))


def hide_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """The parameters have no gradient; the flat buffers keep theirs."""
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def data_replaced(
    parameters: Sequence[torch.nn.Parameter], tensors: Sequence[torch.Tensor]
) -> Iterator[None]:
    """The parameters have these values meanwhile."""
    before = [p.data for p in parameters]
    for p, tensor in zip(parameters, tensors, strict=True):
        p.data = tensor
    try:
        yield
    finally:
        for p, tensor in zip(parameters, before, strict=True):
            p.data = tensor
