"""A step that needs more memory than there is: what takes it, and what would fit at what price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.errors import NetworkError
from penstock.plan.memory.liveness import Peak
from penstock.plan.words import in_bytes

LARGEST = 5
"""Tensors that a message names."""


@dataclass(frozen=True)
class Remedy:
    """Something that would change it.

    Arguments:
        kind: what is done.
        words: for people: what, with its price.
        peak_bytes: with it.
        extra_s: that a step takes longer; 0 where a step is another (a smaller batch).
        fits: whether it is enough by itself.
    """

    kind: str
    words: str
    peak_bytes: int
    extra_s: float
    fits: bool


@dataclass(frozen=True)
class Shortage:
    """What a step needs and what there is.

    Arguments:
        budget_bytes: what there is.
        peak: of the step as it stands.
        resident_bytes: of that, what is there before and after the step.
        remedies: those that fit before those that do not.
    """

    budget_bytes: int
    peak: Peak
    resident_bytes: int
    remedies: tuple[Remedy, ...]

    @property
    def message(self) -> str:
        """What takes the memory."""
        peak = self.peak
        where = f"{peak.name}{f' of {peak.module}' if peak.module else ''}"
        largest = "; ".join(map(str, peak.storages[:LARGEST]))
        return (
            f"no plan fits: a rank needs {in_bytes(peak.num_bytes)} of memory (at {where}); "
            f"expected at most {in_bytes(self.budget_bytes)}. {in_bytes(self.resident_bytes)} are "
            f"parameters, state and batch. Largest at the peak: {largest}"
        )

    @property
    def hint(self) -> str:
        """What would fit, or what comes nearest."""
        if not self.remedies:
            return "more devices, more memory, or a smaller network"
        fitting = [remedy for remedy in self.remedies if remedy.fits]
        if fitting:
            return "would fit: " + "; or ".join(remedy.words for remedy in fitting)
        return "nothing fits by itself: " + "; ".join(remedy.words for remedy in self.remedies)

    def error(self) -> NetworkError:
        """To be raised."""
        return NetworkError(self.message, hint=self.hint)


def recomputed(count: int, peak_bytes: int, extra_s: float, step_s: float, fits: bool) -> Remedy:
    """So many operators of forward run again in backward."""
    words = f"recomputation of {count} operators: {in_bytes(peak_bytes)}, "
    return Remedy("recomputation", words + _percent(extra_s, step_s), peak_bytes, extra_s, fits)


def smaller_batch(batch: int, peak_bytes: Callable[[int], int | None], limit: int) -> Remedy | None:
    """The largest of half, a quarter, ... that fits; None if none does.

    Arguments:
        batch: examples of the step.
        peak_bytes: with so many; None: nothing can be said.
    """
    while batch > 1:
        batch //= 2
        peak = peak_bytes(batch)
        if peak is not None and peak <= limit:
            words = f"a batch of {batch}: {in_bytes(peak)}, with more steps to an epoch"
            return Remedy("batch", words, peak, 0.0, True)
    return None


def _percent(extra_s: float, step_s: float) -> str:
    return f"{100 * extra_s / step_s:+.0f}% time a step"
