"""The update of a step whose sums are yet to come: by buckets, as parameters are asked for."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer

from penstock.exchange import agreement
from penstock.exchange.agreement import Clip
from penstock.exchange.bucket import Bucket


class LateUpdate:
    """Updates the parameters of buckets under way.

    The optimizer works in a thread of its own, for which the reader waits: the reader may be in the
    middle of anything, as autocast, inference mode or a transform of torch.func, which would be the
    update's too.

    Arguments:
        optimizer: updates each parameter by itself (`into_forward.obstacle`).
        buckets: of all its parameters.
        clip: by value, if at all.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, buckets: Sequence[Bucket], clip: Clip
    ) -> None:
        self._optimizer, self._buckets, self._clip = optimizer, buckets, clip
        bucket_of = {id(p): b for b, bucket in enumerate(buckets) for p in bucket.parameters}
        self._bucket_of = bucket_of
        self._by_group = [
            [[p for p in group["params"] if bucket_of.get(id(p)) == b] for b in range(len(buckets))]
            for group in optimizer.param_groups
        ]
        self._around = step_hooks(optimizer), len(optimizer.param_groups)
        self.under_way = False
        """Whether a parameter may not be up to date."""
        self._pending: set[int] = set()
        self._divisor = 0
        self._options: list[dict[str, Any]] = []
        self._next_row: int | None = None
        self._settling = threading.RLock()
        self._thread = ThreadPoolExecutor(1, "penstock-update")

    def possible(self) -> bool:
        """Whether nothing has happened meanwhile that wants one update for all: a hook of the
        optimizer, another of its groups, or a compiler, which would look into what is done here."""
        around = step_hooks(self._optimizer), len(self._optimizer.param_groups)
        return around == self._around and not _compiling()

    def begin(self, examples: int) -> None:
        """All buckets have been sent, and the last one has come: its parameters are updated now.

        Arguments:
            examples: of the whole step; the gradients are divided by their number.
        """
        self._divisor, self._next_row = examples, None
        # As they are in this step: a schedule may go on before the last parameter is updated.
        self._options = [dict(group) for group in self._optimizer.param_groups]
        self._pending = set(range(len(self._buckets)))
        self.under_way = True
        for bucket in reversed(range(len(self._buckets))):
            self._update(bucket)
            if self._buckets[bucket].parameters:
                return

    def next_step(self, row: int) -> None:
        """The next step's gradients will come into this row: it is cleared, now or when it can."""
        self._next_row = row
        for number, bucket in enumerate(self._buckets):
            if number not in self._pending:
                bucket.rows[row].zero_()

    def settle(self, parameter: torch.nn.Parameter | None) -> None:
        """Waits until a parameter, or each of them, is updated."""
        if not self.under_way or threading.current_thread().name.startswith("penstock-update"):
            return
        with self._settling:
            wanted = list(self._pending)
            if parameter is not None:
                wanted = [self._bucket_of.get(id(parameter), -1)]
            for bucket in sorted(wanted, reverse=True):
                if bucket in self._pending:
                    self._update(bucket)

    def _update(self, number: int) -> None:
        """Waits for a bucket, and updates its parameters."""
        bucket = self._buckets[number]
        bucket.finish()
        self._thread.submit(self._step, number).result()
        self._pending.discard(number)
        self.under_way = bool(self._pending)

    def _step(self, number: int) -> None:
        """The optimizer's step for the parameters of a bucket alone."""
        bucket = self._buckets[number]
        if self._divisor and bucket.parameters:
            total = bucket.gradients[0]
            total.div_(self._divisor)
            agreement.clip_gradients([total], self._clip)
            for parameter, gradient in zip(bucket.parameters, bucket.totals, strict=True):
                parameter.grad = gradient
            optimizer, groups = self._optimizer, self._optimizer.param_groups
            optimizer.param_groups = [
                options | {"params": of_group[number]}
                for options, of_group in zip(self._options, self._by_group, strict=True)
                if of_group[number]
            ]
            try:
                optimizer.step()
            finally:
                optimizer.param_groups = groups
        if self._next_row is not None:
            agreement.hide_gradients(bucket.parameters)
            bucket.rows[self._next_row].zero_()


def step_hooks(optimizer: torch.optim.Optimizer) -> int:
    """How many functions are called before or after each of its steps."""
    own = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    before = len(torch_optimizer._global_optimizer_pre_hooks)
    return own + before + len(torch_optimizer._global_optimizer_post_hooks)


def _compiling() -> bool:
    """Whether something has been compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters.get("frames"))
