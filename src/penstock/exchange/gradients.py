"""`AllReduce`: one set of parameters; every step takes the gradient over all shards' examples.

With shard s's batch of n_s examples and mean loss L_s, the step's gradient is

    g = sum_s n_s grad L_s / sum_s n_s

Each backward adds n_s grad L_s into a flat row; rows are summed along the fixed tree (`shard_sum`),
bucket by bucket while the last own shard's backward still runs, in the order in which backward
makes them (from the last layer to the first).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from penstock.exchange import agreement
from penstock.exchange.agreement import EXAMPLES, LOSS, SAVE, STOP, Clip, Outcome
from penstock.exchange.flat import Layout, by_dtype
from penstock.exchange.group import Group
from penstock.exchange.shard_sum import ShardSum


class GradientAgreement:
    """One worker's part in `AllReduce`.

    Arguments:
        parameters: name and parameter, in order of registration; all need gradients.
        optimizer: of these parameters.
        own, shards: the shards of this worker, and their number in all.
        bucket_bytes: about how much is sent at once.
        borders: frozen borders of an earlier run; None to decide them now.
        where: names step and shard in errors, given an own shard's index.
    """

    agreed = True
    steps_apart = 0

    def __init__(
        self,
        group: Group,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        own: range,
        shards: int,
        *,
        bucket_bytes: int,
        borders: dict[str, list[list[int]]] | None,
        clip: Clip,
        where: Callable[[int], str],
    ) -> None:
        self._names = [name for name, _ in parameters]
        self._parameters = [parameter for _, parameter in parameters]
        self._optimizer, self._own, self._clip, self._where = optimizer, own, clip, where
        backward_order = [(str(n), p) for n, p in enumerate(self._parameters)][::-1]
        self._layouts = [Layout.of(g, dtype) for dtype, g in by_dtype(backward_order).items()]
        self._borders = {
            str(layout.dtype): (
                [list(b) for b in layout.buckets(bucket_bytes)]
                if borders is None
                else borders[str(layout.dtype)]
            )
            for layout in self._layouts
        }
        device = self._parameters[0].device
        self._sums = [
            ShardSum(
                group,
                own,
                shards,
                layout.length,
                layout.dtype,
                device,
                [(b[0], b[1]) for b in self._borders[str(layout.dtype)]],
                agreement.HEADER_SIZE,
            )
            for layout in self._layouts
        ]
        self._views = [
            agreement.gradient_views(self._parameters, self._layouts, flats)
            for flats in zip(*(s.rows for s in self._sums), strict=True)
        ]
        self._buckets = [
            (layout, s, index, start, stop)
            for layout, s in zip(self._layouts, self._sums, strict=True)
            for index, (start, stop) in enumerate(self._borders[str(layout.dtype)])
        ]
        self._bucket_of = self._find_buckets()
        self._missing = [0] * len(self._buckets)
        self._sent, self._armed = 0, False
        self._checks_ahead = device.type == "cpu"  # a GPU would have to be waited for
        self._i, self._examples, self._loss = 0, 0, 0.0
        for number, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]

    def borders(self) -> dict[str, list[list[int]]]:
        return self._borders

    def activate(self, i: int) -> None:
        self._i, self._examples, self._loss, self._sent = i, 0, 0.0, 0
        for s in self._sums:
            s.row(i).zero_()

    def backward(self, loss: torch.Tensor, examples: int, last: bool) -> None:
        self._examples += examples
        self._armed = last and self._i + 1 == len(self._own)
        if self._armed:
            self._missing = [0] * len(self._buckets)
            for bucket in self._bucket_of:
                self._missing[bucket] += 1
        # Hidden until the update: a loop's zero_grad can neither take nor clear them.
        self._point_at(self._sums[0].row_index(self._i))
        (loss * examples).backward()  # type: ignore[no-untyped-call]
        agreement.hide_gradients(self._parameters)
        self._loss += loss.item() * examples
        if last:
            self._end_shard()

    def skip(self) -> None:
        self._end_shard()

    def commit(self, step: int, *, stop: bool = False, save: bool = False) -> Outcome | None:
        last = self._sums[-1]
        last.header[:, STOP], last.header[:, SAVE] = float(stop), float(save)
        self._send(len(self._buckets))
        totals = [s.finish() for s in self._sums]
        outcome = Outcome.of(last.headers)
        if outcome.examples:
            for total in totals:
                total.div_(outcome.examples)
            self._point_at(0)
            agreement.clip_gradients(totals, self._clip)
            self._optimizer.step()
        return outcome

    def conclude(self) -> Outcome | None:
        return None

    @contextmanager
    def merged(self) -> Iterator[None]:
        yield

    @property
    def exchange_bytes(self) -> int:
        """What each shard gives to an exchange."""
        return sum(layout.length * layout.dtype.itemsize for layout in self._layouts)

    def parameters_of(self, i: int) -> list[torch.Tensor]:
        """The i-th own shard's parameters: the same for all."""
        return [p.data for p in self._parameters]

    def gradients(self) -> list[torch.Tensor]:
        """The last step's gradient of each parameter, until the next step begins."""
        return self._views[0]

    def _point_at(self, row: int) -> None:
        for parameter, view in zip(self._parameters, self._views[row], strict=True):
            parameter.grad = view

    def _find_buckets(self) -> list[int]:
        """The bucket of each parameter."""
        found = [0] * len(self._parameters)
        for index, (layout, _, _, start, stop) in enumerate(self._buckets):
            for slot in layout.slots:
                if start <= slot.start < stop or (slot.start == slot.stop == stop):
                    found[int(slot.name)] = index
        return found

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        bucket = self._bucket_of[number]

        def arrived(parameter: torch.Tensor) -> None:
            if self._armed:
                self._missing[bucket] -= 1
                if self._missing[bucket] == 0 and bucket == self._sent:
                    self._send_ahead()

        return arrived

    def _send_ahead(self) -> None:
        """Sends the buckets that are ready, while backward goes on.

        The last one waits for the check of the loss: without it, nobody commits the step. Nor does
        what is not finite leave: sums come back in place, and would seem to be everyone's fault.
        """
        until = min(self._ready(), len(self._buckets) - 1)
        while self._sent < until:
            if self._checks_ahead and not math.isfinite(self._mine(self._sent).sum().item()):
                self._armed = False
                return
            self._send(self._sent + 1)

    def _mine(self, bucket: int) -> torch.Tensor:
        """The active shard's gradients in a bucket."""
        _, s, _, start, stop = self._buckets[bucket]
        return s.rows[s.row_index(self._i)][start:stop]

    def _ready(self) -> int:
        """How many buckets, in order, have all their gradients."""
        count = self._sent
        while count < len(self._buckets) and self._missing[count] == 0:
            count += 1
        return count

    def _send(self, until: int) -> None:
        while self._sent < until:
            _, s, index, _, _ = self._buckets[self._sent]
            s.send(index)
            self._sent += 1

    def _end_shard(self) -> None:
        if self._examples:
            row = self._sums[0].row_index(self._i)
            agreement.check_finite(
                self._loss,
                [
                    self._mine(bucket)
                    for bucket in range(self._sent if self._checks_ahead else 0, len(self._buckets))
                ],
                dict(zip(self._names, self._views[row], strict=True)),
                self._where(self._i),
            )
        for s in self._sums:
            s.header[self._i, EXAMPLES] = self._examples
            s.header[self._i, LOSS] = self._loss
            s.added(self._i)
        self._armed = False
