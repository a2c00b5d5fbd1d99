"""Memory that is taken while a function runs; and a step that writes new values in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from penstock.model.graph import Graph, operator_of
from penstock.plan.memory.liveness import in_place


def measured_peak(function: Callable[[], Any], device: str = "cpu") -> int:
    """The most memory that torch's allocator held while `function` ran, above what it held before.

    On the CPU it is the sum of the profiler's memory events: each allocation and release, also
    those inside of operators. Memory that a library takes from the system by itself is not in it.

    Arguments:
        function: to be run, once.
        device: "cpu" or "cuda".

    Returns:
        Bytes.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    results = profile.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class Stepper:
    """Runs a step with what it updates written where it lies.

    Arguments:
        graph: the step.
        tensors: all inputs that are no constants, by name. Parameters, buffers and state are
            written into, step by step.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, torch.Tensor]) -> None:
        self._graph = graph
        self._tensors = dict(graph.constants) | dict(tensors)
        self._places = in_place(graph)
        last: dict[str, int] = {}
        for number, node in enumerate(graph.nodes):
            for name in (*node.inputs, *node.outputs):
                if name is not None:
                    last[name] = number
        self._kept = {output.name for output in graph.outputs}
        self._freed: list[list[str]] = [[] for _ in graph.nodes]
        for name, number in last.items():
            if name not in self._kept:
                self._freed[number].append(name)
        self._late = {
            output.name: graph.input(output.role, output.target).name
            for output in graph.outputs
            if output.role in ("parameter", "buffer", "state") and output.name not in self._places
        }

    def step(self) -> dict[str, torch.Tensor]:
        """One step.

        Returns:
            The outputs that are no new value of an input: the loss, gradients.
        """
        values = dict(self._tensors)
        with torch.no_grad():
            for node, freed in zip(self._graph.nodes, self._freed, strict=True):
                args, kwargs = node.with_tensors([values[name] for name in node.inputs])
                old = self._places.get(node.outputs[0] or "") if len(node.outputs) == 1 else None
                if old is None:
                    values |= node.results(node.function(*args, **kwargs))
                else:
                    place = self._tensors[old]
                    values[node.outputs[0] or ""] = _into(node.op, args, kwargs, place)
                for name in freed:
                    del values[name]
            for name, old in self._late.items():
                self._tensors[old].copy_(values[name])
        return {
            output.name: values[output.name]
            for output in self._graph.outputs
            if output.role not in ("parameter", "buffer", "state")
        }


def _into(op: str, args: Any, kwargs: Mapping[str, Any], place: torch.Tensor) -> torch.Tensor:
    """Calls an operator that writes what it gives into a tensor."""
    packet, _, overload = op.rpartition(".")
    names = ("out", "grad_input") if overload == "default" else (f"{overload}_out", "out")
    found: Any = operator_of(packet)
    for name in names:
        if name in found.overloads() and op.startswith("aten."):
            variant = getattr(found, name)
            target = variant._schema.arguments[-1].name
            result: torch.Tensor = variant(*args, **kwargs, **{target: place})
            return result
    return place.copy_(operator_of(op)(*args, **kwargs))
