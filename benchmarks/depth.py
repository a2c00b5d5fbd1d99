"""How deep a network may be in so much memory: with recomputation, beside plain PyTorch.

    plain       the module, its backward and torch's optimizer
    penstock    the captured step, what it updates written in place, with the cheapest
                recomputation that fits (`penstock.plan.memory.recompute`)

    python benchmarks/depth.py [--memory 2e9] [--times 2.5] [--rounds 5] [--only gpt]

Both train a GPT with AdamW, and a residual network of one stage with SGD and momentum, in this
process. Plain's depth is the largest that fits, extrapolated from two measured ones and measured
itself; Penstock's is --times as much. Memory is parameters, state and batch, and what a step
allocates at its peak, by torch's profiler; beside Penstock's stands what was predicted. In every
round both make a step, one after the other. Printed are medians of milliseconds a layer, and the
median of their ratios in the same round, of which the aim is 1.35 at 2.5 times the depth; and
the same for the step in which nothing runs again, at the depth of plain PyTorch, which is what
the executor of the graph costs by itself.

Operators' times, by which it is chosen what runs again, are measured first.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph, Node
from penstock.plan.costs.operators import Measured, is_view
from penstock.plan.memory.liveness import Lifetimes
from penstock.plan.memory.recompute import Recomputation
from penstock.plan.words import in_bytes
from penstock.runtime.heap import keep_freed_memory
from penstock.testing.memory import Stepper, measured_peak
from penstock.testing.networks import Example


@dataclass(frozen=True)
class Kind:
    """A network of any depth.

    Arguments:
        make: of a depth, with a batch and a loss.
        optimizer: makes it from the parameters.
    """

    make: Callable[[int], Example]
    optimizer: Callable[[Any], torch.optim.Optimizer]


def gpt(width: int, batch: int, layers: int) -> Example:
    """Of 256 tokens."""
    network = zoo.gpt(1024, width=width, heads=width // 64, layers=layers, length=256)
    x, y = (torch.randint(1024, (batch, 256)) for _ in range(2))
    return Example(network, x, y, F.cross_entropy)


def residual(width: int, batch: int, layers: int) -> Example:
    """Blocks of two convolutions on 14 x 14 positions."""
    network = zoo.resnet(layers=(layers,), width=width, classes=10)
    return Example(
        network, torch.randn(batch, 3, 56, 56), torch.randint(10, (batch,)), F.cross_entropy
    )


class Plain:
    """Trains by PyTorch alone."""

    def __init__(self, kind: Kind, depth: int) -> None:
        self._example = kind.make(depth)
        self._optimizer = kind.optimizer(self._example.network.parameters())
        self.step()

    def step(self) -> None:
        example = self._example
        self._optimizer.zero_grad()
        example.loss(example.network(example.x), example.y).backward()
        self._optimizer.step()

    def memory_bytes(self) -> int:
        """At the peak of a step."""
        self._optimizer.zero_grad()  # whose gradients are allocated in the step
        network = self._example.network
        tensors = [*network.parameters(), *network.buffers(), self._example.x, self._example.y]
        for state in self._optimizer.state.values():
            tensors += [value for value in state.values() if torch.is_tensor(value)]
        return sum(tensor.nbytes for tensor in tensors) + measured_peak(self.step)


def captured(kind: Kind, depth: int) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The step, and its inputs."""
    example = kind.make(depth)
    graph = capture(example.network, example.loss, example.batch, kind.optimizer)
    return graph, example.inputs(graph)


def seconds_of(graph: Graph) -> Callable[[Node], float]:
    """What nodes of forward take, measured."""
    nodes = [node for node in graph.nodes if node.phase == "forward"]
    measured = Measured().with_nodes(nodes, graph.specs)

    def seconds(node: Node) -> float:
        if is_view(node.op):
            return 0.0
        outputs = [None if name is None else graph.specs[name] for name in node.outputs]
        inputs = [graph.specs[name] for name in node.inputs]
        return measured.seconds[Measured.key(node.op, inputs, outputs)]

    return seconds


def deepest(kind: Kind, memory_bytes: int) -> int:
    """Of plain PyTorch: the depth that fits, by a line through two that do."""
    two, four = (Plain(kind, depth).memory_bytes() for depth in (2, 4))
    depth = 2 + int((memory_bytes - two) / ((four - two) / 2))
    while depth > 1 and Plain(kind, depth).memory_bytes() > memory_bytes:
        depth -= 1
    return depth


def timed(step: Callable[[], Any]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def compare(name: str, kind: Kind, memory_bytes: int, times: float, rounds: int) -> None:
    depth = deepest(kind, memory_bytes)
    deeper = int(-(-depth * times // 1))
    plain = Plain(kind, depth)
    print(f"{name}: plain PyTorch has {depth} layers in {in_bytes(plain.memory_bytes())}")
    same, tensors = captured(kind, depth)
    before = Stepper(same, tensors)
    graph, tensors = captured(kind, deeper)
    began = time.perf_counter()
    choices = Recomputation(graph, seconds_of(graph))
    found = choices.within(memory_bytes)
    took_s = time.perf_counter() - began
    kept_bytes = Lifetimes.of_graph(graph).peak_bytes
    least = choices.sweep()[-1].peak_bytes
    print(
        f"  penstock: {deeper} layers take {in_bytes(kept_bytes)}, and {in_bytes(least)} at least; "
        f"chosen in {took_s:.1f} s"
    )
    if found is None:
        print("  nothing fits")
        return
    stepper = Stepper(found.graph, tensors)
    stepper.step()
    allocated = measured_peak(stepper.step)
    total = allocated + Lifetimes.of_graph(found.graph).resident_bytes
    print(
        f"  with {len(found.names)} operators again: {in_bytes(found.peak_bytes)} predicted, "
        f"{in_bytes(total)} measured ({found.peak_bytes / total:.3f})"
    )
    gc.collect()
    ratios: dict[str, list[float]] = {}
    layer_ms: dict[str, list[float]] = {}
    for _ in range(rounds):
        took = {
            "plain": timed(plain.step) / depth,
            "penstock, nothing again": timed(before.step) / depth,
            "penstock": timed(stepper.step) / deeper,
        }
        for which, layer_s in took.items():
            layer_ms.setdefault(which, []).append(1e3 * layer_s)
            ratios.setdefault(which, []).append(layer_s / took["plain"])
    for which, values in layer_ms.items():
        layers = deeper if which == "penstock" else depth
        print(
            f"  {which:24}{layers:5} layers{statistics.median(values):9.1f} ms a layer"
            f"{statistics.median(ratios[which]):7.2f} x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--memory", type=float, default=2e9, help="bytes")
    parser.add_argument("--times", type=float, default=2.5, help="as deep as plain PyTorch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("gpt", "residual"))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=0, help="8 sequences, or 128 images")
    from collectives import hardware  # type: ignore[import-not-found]

    options = parser.parse_args()
    keep_freed_memory()
    sgd = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
    kinds = {
        "gpt": Kind(functools.partial(gpt, options.width, options.batch or 8), adamw),
        "residual": Kind(functools.partial(residual, options.width, options.batch or 128), sgd),
    }
    print(hardware())
    for name, kind in kinds.items():
        if options.only in (None, name):
            compare(name, kind, int(options.memory), options.times, options.rounds)


if __name__ == "__main__":
    main()
