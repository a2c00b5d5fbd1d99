"""What a person sees of a run: a live line in a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

LINE_EVERY_S = 5.0


class Display(Protocol):
    """Is told what happens in a run."""

    def line(self, text: str) -> None:
        """A line of text that stays."""
        ...

    def progress(self, event: dict[str, Any]) -> None:
        """How far training is: epoch, epochs, step_in_epoch, steps_per_epoch, loss and more."""
        ...

    def output(self, rank: int, line: str) -> None:
        """What a worker printed."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


def display(show: bool) -> Display:
    """The display that fits standard error; a silent one if nothing is to be shown."""
    if not show:
        return SilentDisplay()
    console = Console(stderr=True, highlight=False)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay()


class SilentDisplay:
    """Shows nothing."""

    def line(self, text: str) -> None: ...

    def progress(self, event: dict[str, Any]) -> None: ...

    def output(self, rank: int, line: str) -> None: ...

    def close(self) -> None: ...


class PlainDisplay:
    """A line every few seconds and at the end of each epoch."""

    def __init__(self) -> None:
        self._shown_at = time.monotonic()
        self._shown_epoch = 0
        self._last: dict[str, Any] | None = None

    def line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event["epoch"] > self._shown_epoch and self._last is not None:
            ended = self._last | {"step_in_epoch": event["steps_per_epoch"]}
            self._shown_epoch = event["epoch"]
            self._show(event if event["epoch"] >= event["epochs"] else ended)
        elif now - self._shown_at > LINE_EVERY_S:
            self._show(event)
        self._last = event

    def output(self, rank: int, line: str) -> None:
        self.line(f"[rank {rank}] {line}")

    def close(self) -> None: ...

    def _show(self, event: dict[str, Any]) -> None:
        self._shown_at = time.monotonic()
        self.line(f"{words(event)}  {numbers(event)}")


class LiveDisplay:
    """A bar that moves, with the numbers beside it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def progress(self, event: dict[str, Any]) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=event["steps_per_epoch"], numbers="")
        done, of = position(event)
        self._bar.update(
            self._task,
            description=f"epoch {min(event['epoch'] + 1, event['epochs'])}/{event['epochs']}",
            completed=done,
            total=of,
            numbers=numbers(event),
        )

    def output(self, rank: int, line: str) -> None:
        self.line(f"[rank {rank}] {line}")

    def close(self) -> None:
        self._bar.stop()


def position(event: dict[str, Any]) -> tuple[int, int | None]:
    """Steps done in the epoch, and steps of an epoch: None where nobody has counted them yet."""
    ended = event["epoch"] >= event["epochs"]
    return (event["steps_per_epoch"] if ended else event["step_in_epoch"]), event["steps_per_epoch"]


def words(event: dict[str, Any]) -> str:
    """`epoch 3/5  140/157`, or `epoch 1/5  step 140`."""
    done, of = position(event)
    steps = f"step {done}" if of is None else f"{done}/{of}"
    return f"epoch {min(event['epoch'] + 1, event['epochs'])}/{event['epochs']}  {steps}"


def numbers(event: dict[str, Any]) -> str:
    """`loss 0.0712  6,410 examples/s  bounded by compute`."""
    parts = [] if event["loss"] is None else [f"loss {event['loss']:.4f}"]
    if event["examples_per_s"] is not None:
        parts.append(f"{event['examples_per_s']:,.0f} examples/s")
    if event.get("bounded_by"):
        parts.append(f"bounded by {event['bounded_by'][0]}")
    return "  ".join(parts)
