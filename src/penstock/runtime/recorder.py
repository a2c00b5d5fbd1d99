"""What rank 0 writes for people to see: scalars of every step, now and then histograms."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence

import torch

from penstock.exchange.agreement import Agreement, Outcome
from penstock.watch import EventWriter

FOLDER = "events"


@functools.cache
def _tags(groups: int) -> tuple[str, ...]:
    """Of what is written after every step."""
    rates = (f"learning_rate/{group}" if group else "learning_rate" for group in range(groups))
    return ("loss", "examples_per_s", *rates)


class Recorder:
    """Event files of one run.

    Arguments:
        url: the run directory.
        scalars_every, histograms_every: in steps; 0 for never.
        resumed_at: the step of the checkpoint that this run goes on from, or None.
    """

    def __init__(
        self, url: str, scalars_every: int, histograms_every: int, resumed_at: int | None
    ) -> None:
        self._writer = EventWriter(f"{url}/{FOLDER}", resumed_at=resumed_at)
        self._scalars_every, self._histograms_every = scalars_every, histograms_every
        self._since, self._examples = time.perf_counter(), 0
        self._before: list[torch.Tensor] | None = None
        self.examples_per_s = float("nan")

    def pause(self) -> None:
        """What follows (an evaluation, a checkpoint) does not count as training time."""
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Ends a pause."""
        self._since += time.perf_counter() - self._paused

    def before_step(self, step: int, agreement: Agreement) -> None:
        """Keeps the parameters where this step's update will be shown."""
        if self._histograms_every and step % self._histograms_every == 0 and self._before is None:
            self._before = [p.detach().clone() for p in agreement.parameters_of(0)]

    def after_step(
        self,
        step: int,
        outcome: Outcome | None,
        learning_rates: Sequence[float],
        trained: Sequence[tuple[str, torch.nn.Parameter]],
        agreement: Agreement,
    ) -> None:
        """Writes what a step showed."""
        if outcome is not None and outcome.examples:
            self._examples += outcome.examples
            if self._scalars_every and step % self._scalars_every == 0:
                now = time.perf_counter()
                self.examples_per_s = self._examples / max(now - self._since, 1e-9)
                self._since, self._examples = now, 0
                values = (outcome.loss, self.examples_per_s, *learning_rates)
                self._writer.row(step, _tags(len(learning_rates)), values)
        if self._before is not None:
            parameters, gradients = agreement.parameters_of(0), agreement.gradients()
            for (name, _), old, new, gradient in zip(
                trained, self._before, parameters, gradients, strict=True
            ):
                update = new.detach() - old
                self._writer.histogram(step, f"weights/{name}", new.detach())
                self._writer.histogram(step, f"gradients/{name}", gradient)
                self._writer.histogram(step, f"updates/{name}", update)
                size, change = old.abs().mean().item(), update.abs().mean().item()
                if size > 0 and change > 0:
                    self._writer.scalars(
                        step, {f"log10_update_to_parameter/{name}": math.log10(change / size)}
                    )
            self._before = None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars of the user's or of an evaluation."""
        self._writer.scalars(step, values)

    def flush(self) -> None:
        """Writes what is in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is in memory; nothing may follow."""
        self._writer.close()
