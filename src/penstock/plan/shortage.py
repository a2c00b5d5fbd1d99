"""A step that needs more memory than there is: what takes it, and what would fit at what price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.errors import NetworkError
from penstock.model.graph import Graph
from penstock.plan.memory import Lifetimes, Peak, in_bytes
from penstock.plan.recompute import Candidate, Recomputation

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
            f"a step needs {in_bytes(peak.num_bytes)} of memory (at {where}), and there are "
            f"{in_bytes(self.budget_bytes)}. {in_bytes(self.resident_bytes)} are parameters, state "
            f"and batch. Largest at the peak: {largest}"
        )

    @property
    def hint(self) -> str:
        """What would fit, or what comes nearest."""
        if not self.remedies:
            return "more memory, or a smaller network"
        fitting = [remedy for remedy in self.remedies if remedy.fits]
        if fitting:
            return "would fit: " + "; or ".join(remedy.words for remedy in fitting)
        return "nothing fits by itself: " + "; ".join(remedy.words for remedy in self.remedies)

    def error(self) -> NetworkError:
        """To be raised."""
        return NetworkError(self.message, hint=self.hint)


def shortage(
    graph: Graph,
    budget_bytes: int,
    choices: Recomputation,
    step_s: float,
    batch: int,
    at_batch: Callable[[int], Graph] | None = None,
    split: Callable[[], tuple[int, float, str]] | None = None,
) -> Shortage | None:
    """What is missing, and what would help.

    Arguments:
        graph: the step.
        budget_bytes: for all that it holds.
        choices: of what may run again in it.
        step_s: what the step takes, for prices in percent.
        batch: its examples.
        at_batch: captures the step with another number of examples.
        split: peak in bytes, seconds more, and words of the best plan on more devices.

    Returns:
        None if the step fits as it stands.
    """
    lifetimes = Lifetimes.of_graph(graph)
    if lifetimes.peak_bytes <= budget_bytes:
        return None
    remedies = [_recomputation(choices, budget_bytes, step_s)]
    if at_batch is not None:
        remedies += _smaller_batch(budget_bytes, batch, at_batch)
    if split is not None:
        peak_bytes, extra_s, words = split()
        words = f"{words}: {in_bytes(peak_bytes)} a device, {_percent(extra_s, step_s)}"
        remedies.append(Remedy("split", words, peak_bytes, extra_s, peak_bytes <= budget_bytes))
    ordered = sorted((r for r in remedies if r is not None), key=lambda r: not r.fits)
    return Shortage(budget_bytes, lifetimes.peak, lifetimes.resident_bytes, tuple(ordered))


def _recomputation(choices: Recomputation, budget_bytes: int, step_s: float) -> Remedy | None:
    found: Candidate | None = choices.within(budget_bytes)
    fits = found is not None
    if found is None:
        found = choices.sweep()[-1]
    if not found.names:
        return None
    words = (
        f"recomputation of {len(found.names)} operators: {in_bytes(found.peak_bytes)}, "
        f"{_percent(found.extra_s, step_s)}"
    )
    return Remedy("recomputation", words, found.peak_bytes, found.extra_s, fits)


def _smaller_batch(budget_bytes: int, batch: int, at_batch: Callable[[int], Graph]) -> list[Remedy]:
    """The largest of half, a quarter, ... that fits; if none does, the smallest."""
    remedy = None
    while batch > 1:
        batch //= 2
        peak_bytes = Lifetimes.of_graph(at_batch(batch)).peak_bytes
        fits = peak_bytes <= budget_bytes
        words = f"a batch of {batch}: {in_bytes(peak_bytes)}, with more steps to an epoch"
        remedy = Remedy("batch", words, peak_bytes, 0.0, fits)
        if fits:
            break
    return [] if remedy is None else [remedy]


def _percent(extra_s: float, step_s: float) -> str:
    return f"{100 * extra_s / step_s:+.0f}% time a step"
