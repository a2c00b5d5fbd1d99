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
from penstock.exchange.agreement import HEADER_SIZE, Clip, Outcome
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
        borders_of = [self._borders[str(layout.dtype)] for layout in self._layouts]
        self._sums = agreement.sums_of(
            group,
            own,
            shards,
            [
                (layout.dtype, [(b[0], b[1]) for b in borders])
                for layout, borders in zip(self._layouts, borders_of, strict=True)
            ],
            device,
        )
        self._views = [
            agreement.gradient_views(self._parameters, self._layouts, flats)
            for flats in zip(*(s.rows for s in self._sums[: len(self._layouts)]), strict=True)
        ]
        self._totals = [
            s.rows[0][: layout.length] for layout, s in zip(self._layouts, self._sums, strict=False)
        ]
        self._headers = [self._sums[-1].row(i)[-HEADER_SIZE:] for i in range(len(own))]
        self._total_header = self._sums[-1].rows[0][-HEADER_SIZE:]
        self._buckets: list[tuple[ShardSum, int, list[torch.Tensor]]] = [
            (s, index, [row[start:stop] for row in s.rows])
            for s, borders in zip(self._sums, borders_of, strict=False)
            for index, (start, stop) in enumerate(borders)
        ]
        """Sum, number in it, and by row the gradients in it. The last is sent by `commit`."""
        if len(self._sums) > len(self._layouts):
            self._buckets.append((self._sums[-1], 0, [row[:0] for row in self._sums[-1].rows]))
        self._bucket_of = self._find_buckets(borders_of)
        self._counts = [self._bucket_of.count(b) for b in range(len(self._buckets))]
        self._missing = self._counts
        self._sent, self._armed = 0, False
        self._checks_ahead = device.type == "cpu"  # a GPU would have to be waited for
        self._i, self._row, self._examples, self._loss = 0, 0, 0, 0.0
        for number, parameter in enumerate(self._parameters):
            if self._bucket_of[number] + 1 < len(self._buckets):
                parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]

    def borders(self) -> dict[str, list[list[int]]]:
        return self._borders

    def activate(self, i: int) -> None:
        self._i, self._row = i, self._sums[0].row_index(i)
        self._examples, self._loss, self._sent = 0, 0.0, 0
        for s in self._sums:
            s.row(i).zero_()

    def backward(self, loss: torch.Tensor, examples: int, last: bool) -> None:
        self._examples += examples
        self._armed = last and self._i + 1 == len(self._own) and len(self._buckets) > 1
        if self._armed:
            self._missing = self._counts.copy()
        # Hidden until the update: a loop's zero_grad can neither take nor clear them.
        self._point_at(self._row)
        (loss * examples).backward()  # type: ignore[no-untyped-call]
        agreement.hide_gradients(self._parameters)
        self._loss += loss.item() * examples
        if last:
            self._end_shard()

    def skip(self) -> None:
        self._end_shard()

    def commit(self, step: int, *, stop: bool = False, save: bool = False) -> Outcome | None:
        if stop or save:
            agreement.write_header(
                self._headers[-1], self._examples, self._loss, stop=stop, save=save
            )
        self._send(len(self._buckets))
        for s in self._sums:
            s.finish()
        outcome = Outcome.of(self._total_header)
        if outcome.examples:
            for total in self._totals:
                total.div_(outcome.examples)
            self._point_at(0)
            agreement.clip_gradients(self._totals, self._clip)
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

    def _find_buckets(self, borders_of: Sequence[list[list[int]]]) -> list[int]:
        """The bucket of each parameter."""
        found, before = [0] * len(self._parameters), 0
        for layout, borders in zip(self._layouts, borders_of, strict=True):
            for slot in layout.slots:
                at = (b for b, (_, stop) in enumerate(borders) if slot.start < stop)
                found[int(slot.name)] = before + next(at, len(borders) - 1)
            before += len(borders)
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
        while self._sent + 1 < len(self._buckets) and not self._missing[self._sent]:
            if self._checks_ahead and not math.isfinite(self._mine(self._sent).sum().item()):
                self._armed = False
                return
            self._send(self._sent + 1)

    def _mine(self, bucket: int) -> torch.Tensor:
        """The active shard's gradients in a bucket."""
        return self._buckets[bucket][2][self._row]

    def _send(self, until: int) -> None:
        while self._sent < until:
            s, index, _ = self._buckets[self._sent]
            s.send(index)
            self._sent += 1

    def _end_shard(self) -> None:
        if self._examples:
            unsent = range(self._sent if self._checks_ahead else 0, len(self._buckets))
            finite = all(math.isfinite(self._mine(b).sum().item()) for b in unsent)
            if not (finite and math.isfinite(self._loss)):
                agreement.check_finite(
                    self._loss,
                    dict(zip(self._names, self._views[self._row], strict=True)),
                    self._where(self._i),
                )
        agreement.write_header(self._headers[self._i], self._examples, self._loss)
        for s in self._sums:
            s.added(self._i)
        self._armed = False
