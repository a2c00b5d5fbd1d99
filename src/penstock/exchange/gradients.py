"""`AllReduce`: one set of parameters; every step takes the gradient over all shards' examples.

With shard s's batch of n_s examples and mean loss L_s, the step's gradient is

    g = sum_s n_s grad L_s / sum_s n_s

Each backward adds n_s grad L_s into a flat row; rows are summed along the fixed tree (`shard_sum`),
bucket by bucket while the last own shard's backward still runs. Backward fills the buckets from the
last layer to the first, and a step's last one brings what all say beside their gradients.

Usually all of them are waited for, and then comes the update. With `into_forward` the exchange goes
on while the next forward runs: a step is made when the first layers' bucket has come, and the other
layers are updated as they are needed (`settle`). Buckets are then sent in order of need (`order`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from penstock.errors import NetworkError
from penstock.exchange import agreement
from penstock.exchange.agreement import HEADER_SIZE, Clip, Outcome
from penstock.exchange.bucket import cut
from penstock.exchange.group import Group
from penstock.exchange.late_update import LateUpdate
from penstock.exchange.order import sending_order

MEASURED_STEP = 2
"""The step, counted from 0, after which buckets are ordered by how long its backward took."""


class GradientAgreement:
    """One worker's part in `AllReduce`.

    Arguments:
        parameters: name and parameter, in order of registration; all need gradients.
        optimizer: of these parameters.
        own, shards: the shards of this worker, and their number in all.
        bucket_bytes: about how much is sent at once.
        borders: frozen borders of an earlier run; None to decide them now.
        where: names step and shard in errors, given an own shard's index.
        into_forward: whether `commit` may return before all parameters are updated. Who reads
            one then says so to `settle` before; the optimizer updates each parameter by itself,
            and nothing is clipped by norm.
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
        into_forward: bool = False,
    ) -> None:
        self._names = [name for name, _ in parameters]
        self._parameters = [parameter for _, parameter in parameters]
        self._group, self._optimizer, self._own = group, optimizer, own
        self._clip, self._where = clip, where
        backward_order = [(str(n), p) for n, p in enumerate(self._parameters)][::-1]
        self._layouts = agreement.layouts_of(backward_order)
        self._borders = {
            str(layout.dtype): (
                [list(b) for b in layout.buckets(bucket_bytes)]
                if borders is None
                else borders[str(layout.dtype)]
            )
            for layout in self._layouts
        }
        device = self._parameters[0].device
        flats = [
            (layout.dtype, [(start, stop) for start, stop in self._borders[str(layout.dtype)]])
            for layout in self._layouts
        ]
        self._sums = agreement.sums_of(group, own, shards, flats, device)
        self._views = [
            agreement.gradient_views(self._parameters, self._layouts, rows)
            for rows in zip(*(s.rows for s in self._sums[: len(flats)]), strict=True)
        ]
        self._headers = [self._sums[-1].row(i)[-HEADER_SIZE:] for i in range(len(own))]
        self._total_header = self._sums[-1].rows[0][-HEADER_SIZE:]
        self._totals = [
            s.rows[0][: layout.length] for s, layout in zip(self._sums, self._layouts, strict=False)
        ]
        self._buckets = cut(
            self._parameters, self._views[0], self._layouts, self._borders, self._sums
        )
        """In the order in which backward fills them. The last one is sent by `commit`."""
        self.order = list(range(len(self._buckets)))
        """In which they are sent, on all workers."""
        self._missing: list[set[int]] = []
        self._sent, self._armed = 0, False
        self._checks_ahead = device.type == "cpu"  # a GPU would have to be waited for
        self._i, self._row, self._examples, self._loss = 0, 0, 0, 0.0
        for number, bucket in enumerate(self._buckets[:-1]):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]
        self._late = LateUpdate(optimizer, self._buckets, clip) if into_forward else None
        self._commits, self._began = 0, 0.0
        self._ready_s = [0.0] * len(self._buckets)

    def borders(self) -> dict[str, list[list[int]]]:
        return self._borders

    def activate(self, i: int) -> None:
        self._i, self._row = i, self._sums[0].row_index(i)
        self._examples, self._loss, self._sent = 0, 0.0, 0
        agreement.hide_gradients(self._parameters)
        if self._late is not None and self._late.under_way:
            self._late.next_step(self._row)
            return
        for s in self._sums:
            s.row(i).zero_()

    def backward(self, loss: torch.Tensor, examples: int, last: bool) -> None:
        self.settle()
        self._examples += examples
        self._armed = last and self._i + 1 == len(self._own) and len(self._buckets) > 1
        if self._armed:
            self._missing = [set(map(id, bucket.parameters)) for bucket in self._buckets]
            self._began = time.perf_counter()
        # Hidden until the update: a loop's zero_grad can neither take nor clear them.
        self._point_at(self._row)
        (loss * examples).backward()  # type: ignore[no-untyped-call]
        agreement.hide_gradients(self._parameters)
        self._loss += loss.item() * examples
        if last:
            self._end_shard()

    def skip(self) -> None:
        self.settle()
        self._end_shard()

    def commit(self, step: int, *, stop: bool = False, save: bool = False) -> Outcome | None:
        if stop or save:
            agreement.write_header(
                self._headers[-1], self._examples, self._loss, stop=stop, save=save
            )
        self._send_rest()
        if self._late is not None and self._late.possible():
            self._buckets[-1].finish()
            outcome = Outcome.of(self._total_header)
            self._late.begin(outcome.examples)
        else:
            for bucket in self._buckets:
                bucket.finish()
            outcome = Outcome.of(self._total_header)
            if outcome.examples:
                for total in self._totals:
                    total.div_(outcome.examples)
                self._point_at(0)
                agreement.clip_gradients(self._totals, self._clip)
                self._optimizer.step()
        if self._late is not None and self._commits == MEASURED_STEP:
            self._order_anew()
        self._commits += 1
        return outcome

    def conclude(self) -> Outcome | None:
        self.settle()
        return None

    @contextmanager
    def merged(self) -> Iterator[None]:
        self.settle()
        yield

    @property
    def exchange_bytes(self) -> int:
        """What each shard gives to an exchange."""
        return sum(layout.length * layout.dtype.itemsize for layout in self._layouts)

    def parameters_of(self, i: int) -> list[torch.Tensor]:
        """The i-th own shard's parameters: the same for all."""
        self.settle()
        return [p.data for p in self._parameters]

    def gradients(self) -> list[torch.Tensor]:
        """The last step's gradient of each parameter, until the next step begins."""
        self.settle()
        return self._views[0]

    def settle(self, parameter: torch.nn.Parameter | None = None) -> None:
        """Waits until a parameter, or each of them, is as the last step has left it."""
        if self._late is not None:
            self._late.settle(parameter)

    def _point_at(self, row: int) -> None:
        for parameter, view in zip(self._parameters, self._views[row], strict=True):
            parameter.grad = view

    def _hook(self, bucket: int) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            if not self._armed:
                return
            if bucket in self.order[: self._sent]:
                raise self._twice(parameter)
            missing = self._missing[bucket]
            missing.discard(id(parameter))
            if not missing:
                self._ready_s[bucket] = time.perf_counter() - self._began
                if bucket == self.order[self._sent]:
                    self._send_ahead()

        return arrived

    def _twice(self, parameter: torch.Tensor) -> NetworkError:
        found = zip(self._names, self._parameters, strict=True)
        name = next(name for name, own in found if own is parameter)
        return NetworkError(
            f"{self._where(self._i)}: parameter {name} got more gradient after it seemed to have "
            "all, and was sent",
            hint="checkpoint(..., use_reentrant=False); or a larger strategy.bucket_bytes",
        )

    def _send_ahead(self) -> None:
        """Sends the buckets that are ready, while backward goes on.

        The last one waits for the check of the loss: without it, nobody commits the step. Nor does
        what is not finite leave: sums come back in place, and would seem to be everyone's fault.
        """
        last = len(self._buckets) - 1
        while (bucket := self.order[self._sent]) != last and not self._missing[bucket]:
            if self._checks_ahead and not agreement.finite(self._mine(bucket)):
                self._armed = False
                return
            self._buckets[bucket].send()
            self._sent += 1

    def _send_rest(self) -> None:
        """Sends what backward has left to be sent, on all workers in one order."""
        for bucket in self.order[self._sent :]:
            self._sent += 1
            at_once = self._sent == len(self.order) and self._late is None
            self._buckets[bucket].send(sync=at_once)

    def _mine(self, bucket: int) -> torch.Tensor:
        """The active shard's gradients in a bucket."""
        return self._buckets[bucket].gradients[self._row]

    def _end_shard(self) -> None:
        if self._examples:
            unsent = self.order[self._sent if self._checks_ahead else 0 :]
            agreement.check_finite(
                self._loss,
                map(self._mine, unsent),
                zip(self._names, self._views[self._row], strict=True),
                lambda: self._where(self._i),
            )
        agreement.write_header(self._headers[self._i], self._examples, self._loss)
        for s in self._sums:
            s.added(self._i)
        if self._armed:
            self._ready_s[-1] = time.perf_counter() - self._began
        self._armed = False

    def _order_anew(self) -> None:
        """From the next step on, buckets go in order of need. Collective."""
        own = torch.tensor(self._ready_s, dtype=torch.float64)
        everyone = own.new_empty(self._group.world_size, len(own))
        self._group.all_gather(everyone, own, sync=True).wait()
        takes_s = [self._group.all_reduce_s(bucket.gradients[0].nbytes) for bucket in self._buckets]
        self.order = sending_order(everyone.amax(0).tolist(), takes_s)
