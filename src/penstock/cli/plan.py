"""What `penstock plan` is asked for, and prints: a plan as a table for a person."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from penstock.errors import JobError
from penstock.plan.step import Layer, StepPlan, Times
from penstock.plan.words import in_bytes, in_time


def check_alone(option: str, others: Mapping[str, bool]) -> None:
    """An option that says all that is printed stands alone.

    Arguments:
        others: by option, whether it is given as well.

    Raises:
        JobError: one is.
    """
    for other, given in others.items():
        if given:
            raise JobError(
                f"{option} and {other}: expected one of them",
                hint=f"{option} prints its own answer: ask for {other} in another call",
            )


def check_writable(files: Mapping[str, Path | None]) -> None:
    """Looks whether files can be made, before a search whose answer they are to hold.

    Arguments:
        files: by option.

    Raises:
        JobError: one cannot; names the option and it.
    """
    for option, path in files.items():
        if path is None:
            continue
        if path.is_dir():
            raise JobError(f"{option} {path}: it is a folder", hint="name a file in it")
        if not path.parent.is_dir():
            raise JobError(
                f"{option} {path}: there is no folder {path.parent}",
                hint=f"make it first: mkdir -p {path.parent}",
            )
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise JobError(f"{option} {path}: no right to write there", hint="name another file")


def read_pins(pairs: Sequence[str]) -> dict[str, str]:
    """Pins by name, of NAME=LAYOUT each.

    Raises:
        JobError: one is not written so, or two are of one name.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, _, layout = (half.strip() for half in pair.rpartition("="))
        if not name or not layout:
            raise JobError(
                f"--pin {pair}: expected NAME=LAYOUT", hint="--pin classifier.0.weight=S0"
            )
        if name in found:
            raise JobError(
                f"--pin {pair}: {name} is pinned to {found[name]} already",
                hint="one layout for each name; for an axis each, [S0, B]",
            )
        found[name] = layout
    return found


def show(plan: StepPlan, console: Console) -> None:
    """Prints a plan: what it takes beside the known ways, its layers, and its largest routes."""
    cluster, mesh = plan.cluster, " x ".join(map(str, plan.assignment.sizes))
    if plan.stages is not None:
        mesh += " in each stage"
    console.print(
        f"{plan.network}  {plan.batch:,} examples a step on {cluster.hosts} x {cluster.devices} "
        f"{cluster.device.name}, mesh {mesh}"
    )
    for note in plan.notes:
        console.print(f"  {note}", style="dim")
    console.print(_times(plan))
    console.print(_layers(plan))
    _show_memory(plan, console)
    if plan.stages is not None:
        stages = plan.stages
        chunks = "1 chunk" if stages.chunks == 1 else f"{stages.chunks} chunks"
        console.print(
            f"pipeline  {stages.number} stages of {chunks}, {stages.micro_batches} "
            f"micro-batches, {stages.bubble:.0%} of a step waiting"
        )
    console.print(f"plan    {plan.fingerprint}")


def _times(plan: StepPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("predicted", "step", "compute", "exchange", "not hidden", "times this"):
        table.add_column(name, justify="left" if name == "predicted" else "right")

    def add(name: str, times: Times) -> None:
        seconds = (times.step_s, times.compute_s, times.exchange_s, times.exposed_s)
        ratio = f"{times.step_s / plan.times.step_s:.2f}" if plan.times.step_s else ""
        table.add_row(name, *map(in_time, seconds), ratio)

    add("this plan", plan.times)
    for name, times in plan.beside.items():
        add(name.replace("_", " "), times)
    return table


def _layers(plan: StepPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "parameters", "how its main operator is split", "compute", "sends"):
        right = name in ("parameters", "compute", "sends")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for name, layer, count in _alike(plan.layers):
        parameters = sum(_numel(spec) for spec, _ in layer.parameters.values())
        times = f" ({count} alike)" if count > 1 else ""
        sends = in_bytes(layer.exchange_bytes) if layer.exchange_bytes else ""
        table.add_row(
            (name or "loss and the rest") + times,
            f"{parameters:,}" if parameters else "",
            layer.splits,
            in_time(layer.compute_s),
            sends,
        )
    return table


def _alike(layers: tuple[Layer, ...]) -> list[tuple[str, Layer, int]]:
    """Layers, those of repeated blocks as one line: the first's name, itself, their number."""
    found: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        words = "".join("#" if c.isdigit() else c for c in layer.module)
        shapes = tuple(layer.parameters.values())
        key = (words, shapes, layer.splits, layer.exchange_bytes)
        found.setdefault(key, []).append(layer)
    return [(alike[0].module, alike[0], len(alike)) for alike in found.values()]


def _numel(spec: str) -> int:
    """Of a spec in words: float32[3, 4]."""
    count = 1
    for size in spec.partition("[")[2].rstrip("]").split(","):
        count *= int(size) if size.strip() else 1
    return count


def _show_memory(plan: StepPlan, console: Console) -> None:
    memory = plan.memory
    if memory is None:
        return
    console.print(
        f"memory  peak {in_bytes(memory.peak_bytes)} of {in_bytes(memory.limit_bytes)}, of it "
        f"{in_bytes(memory.resident_bytes)} parameters, state and batch; at the peak "
        + ", ".join(memory.largest[:3])
    )
