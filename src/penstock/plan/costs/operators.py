"""What a step takes on a cluster: each operator by the roofline of its device, and both lanes.

    operator_s = max(flops / flops_per_s, bytes / memory_bytes_per_s) + launch     `Operator`

of the rank that has most to do: FLOPs are those of the whole operator times its share of the work,
bytes those of the largest parts that it reads and writes (Williams, Waterman and Patterson 2009,
Commun. ACM 52, 65). A view costs nothing. What was measured (`Measured`) comes before what is
computed.

    step_s = compute_s + exchange_s - overlapped_s                                  `predict`

on two lanes: an exchange of which only updates (or the outputs) have need goes on beside whatever
is computed meanwhile; any other stops the computing until it is done.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import flop_counter

from penstock.model.graph import Graph, Node, Spec, replaced
from penstock.plan.costs.hardware import Cluster
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import Layout, largest_shape

if TYPE_CHECKING:
    from penstock.plan.assignment import Assignment, Change
    from penstock.plan.rules.signatures import Signature

VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view", "_unsafe_view", "t", "transpose", "permute", "expand", "select", "slice",
        "unsqueeze", "split", "split_with_sizes", "unbind", "squeeze", "detach", "alias",
    )
)  # fmt: skip
"""Operators, without their overloads, that move nothing."""

_PICKS = frozenset(f"aten.{name}" for name in ("embedding", "index_select", "gather", "index"))
"""Those that read no more of their first tensor than they give."""

_REPEATS = 5


def _attention(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    query, key, value = (tensor.shape for tensor in args[:3])
    return int(flop_counter.sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    given, query, key, value = (tensor.shape for tensor in args[:4])
    count = flop_counter.sdpa_backward_flop_count
    return int(count(given, query, key, value))  # type: ignore[no-untyped-call]


def _products(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Of matrices, over any batch dims."""
    return 2 * int(out_val.numel()) * int(args[0].shape[-1])


_FLOPS: dict[str, Callable[..., int]] = {
    str(operator): formula for operator, formula in flop_counter.flop_registry.items()
} | {  # which torch's registry has for GPUs only
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten.matmul": _products,
}


def is_view(op: str) -> bool:
    """Whether an operator of this full name only looks at its input in another shape."""
    return op.rpartition(".")[0] in VIEWS


def flops(node: Node, specs: Mapping[str, Spec]) -> int:
    """Of the whole operator: two for each product and sum of a matrix product, a convolution or an
    attention; else one for each element that it gives."""
    if is_view(node.op):
        return 0
    formula = _FLOPS.get(node.op.rpartition(".")[0])
    results = [None if name is None else _empty(specs[name]) for name in node.outputs]
    if formula is None:
        return sum(result.numel() for result in results if result is not None)
    args, kwargs = replaced((node.args, dict(node.kwargs)), lambda ref: _empty(specs[ref.name]))
    return int(formula(*args, **kwargs, out_val=results[0] if len(results) == 1 else results))


def _empty(spec: Spec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


@dataclass(frozen=True)
class Measured:
    """Seconds that operators took, by `key`."""

    seconds: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def key(op: str, inputs: Iterable[Spec], outputs: Iterable[Spec | None]) -> str:
        """Of an operator on tensors of these shapes and dtypes."""
        results = ", ".join("_" if spec is None else str(spec) for spec in outputs)
        return f"{op}({', '.join(map(str, inputs))}) -> {results}"

    def to_json(self) -> str:
        """As text."""
        return json.dumps(dict(self.seconds), indent=1, sort_keys=True)

    def with_nodes(self, nodes: Iterable[Node], specs: Mapping[str, Spec]) -> Measured:
        """And these nodes, measured here unless they are known; views are not.

        Arguments:
            nodes: of a graph, or as a rank calls them; `specs` has the shapes that they see.
        """
        seconds = dict(self.seconds)
        for node in nodes:
            outputs = [None if name is None else specs[name] for name in node.outputs]
            key = self.key(node.op, [specs[name] for name in node.inputs], outputs)
            if key not in seconds and not is_view(node.op):
                seconds[key] = measure(node, specs)
        return Measured(seconds)


def measure(node: Node, specs: Mapping[str, Spec]) -> float:
    """Seconds that a node takes on this machine's CPU with as many threads as are set now.

    The least of some calls: a busy machine only makes them slower. Numbers are random in [0, 1);
    indices are 0.
    """
    tensors = [
        torch.rand(spec.shape, dtype=spec.dtype)
        if spec.dtype.is_floating_point
        else torch.zeros(spec.shape, dtype=spec.dtype)
        for spec in (specs[name] for name in node.inputs)
    ]
    args, kwargs = node.with_tensors(tensors)
    least_s = math.inf
    with torch.no_grad():
        for _ in range(_REPEATS):
            began = time.perf_counter()
            node.function(*args, **kwargs)
            least_s = min(least_s, time.perf_counter() - began)
    return least_s


class Operator:
    """A node, with what its cost has in common for all ways to split it.

    Arguments:
        specs: of the tensors that it reads and gives, whole.
    """

    def __init__(
        self,
        node: Node,
        specs: Mapping[str, Spec],
        cluster: Cluster,
        measured: Measured | None = None,
    ) -> None:
        self._node, self._device, self._measured = node, cluster.device, measured
        self._inputs = [specs[name] for name in node.inputs]
        self._outputs = [None if name is None else specs[name] for name in node.outputs]
        packet = node.op.rpartition(".")[0]
        self._is_view, self._picks = packet in VIEWS, packet in _PICKS
        self._flops = flops(node, specs) if packet in _FLOPS else None
        given = [spec for spec in self._outputs if spec is not None]
        floats = [spec for spec in given + self._inputs if spec.dtype.is_floating_point]
        dtype = (floats or given or self._inputs)[0].dtype if given or self._inputs else None
        self._flops_per_s = self._device.flops_of(dtype or torch.float32)

    def seconds(self, chosen: Sequence[Signature], sizes: Sequence[int]) -> float:
        """What it takes the rank that has most to do.

        Arguments:
            chosen: a signature for each axis of the mesh.
            sizes: of its axes.
        """
        if self._is_view:
            return 0.0
        read = [
            (spec, tuple(one.inputs[number] for one in chosen))
            for number, spec in enumerate(self._inputs)
        ]
        given = [
            None if spec is None else (spec, _placements(chosen, number))
            for number, spec in enumerate(self._outputs)
        ]
        inputs = [_part(spec, layout, sizes) for spec, layout in read]
        outputs = [None if one is None else _part(*one, sizes) for one in given]
        if self._measured is not None:
            key = self._measured.key(self._node.op, inputs, outputs)
            if key in self._measured.seconds:
                return self._measured.seconds[key]
        given_bytes = sum(part.num_bytes for part in outputs if part is not None)
        once = {
            (name, layout): part.num_bytes
            for name, (_, layout), part in zip(self._node.inputs, read, inputs, strict=True)
        }
        read_bytes = sum(once.values())
        if self._picks and inputs:
            read_bytes -= max(0, inputs[0].num_bytes - given_bytes)
        if self._flops is None:
            work = float(sum(part.numel for part in outputs if part is not None))
        else:
            work = self._flops * _share([*read, *(one for one in given if one)], sizes)
        moved_s = (read_bytes + given_bytes) / self._device.memory_bytes_per_s
        return max(work / self._flops_per_s, moved_s) + self._device.operator_s


def _share(tensors: Sequence[tuple[Spec, Layout]], sizes: Sequence[int]) -> float:
    """Of an operator's work: along each axis, the largest part of what is split there."""
    share = 1.0
    for axis, parts in enumerate(sizes):
        largest = 0.0
        for spec, layout in tensors:
            dim, unit = layout[axis]
            if layout[axis].is_split:
                whole = largest_shape(spec.shape, layout[:axis], sizes[:axis])[dim]
                largest = max(largest, unit * -(-(whole // unit) // parts) / whole)
        share *= largest or 1.0
    return share


def operator_s(
    node: Node,
    specs: Mapping[str, Spec],
    chosen: Sequence[Signature],
    sizes: Sequence[int],
    cluster: Cluster,
    measured: Measured | None = None,
) -> float:
    """Seconds that a node takes the rank that has most to do; see `Operator`."""
    return Operator(node, specs, cluster, measured).seconds(chosen, sizes)


def _placements(chosen: Sequence[Signature], number: int) -> Layout:
    placements = tuple(signature.outputs[number] for signature in chosen)
    return tuple(placement for placement in placements if placement is not None)


def _part(spec: Spec, layout: Layout, sizes: Sequence[int]) -> Spec:
    return Spec(largest_shape(spec.shape, layout, sizes), spec.dtype)


@dataclass(frozen=True)
class StepTime:
    """What a step takes.

    Arguments:
        compute_s: of all operators.
        exchange_s: of all ways.
        overlapped_s: of that, what goes on beside operators.
        step_s: of the whole.
    """

    compute_s: float
    exchange_s: float
    overlapped_s: float
    step_s: float


def predict(
    graph: Graph, assignment: Assignment, routes: Routes, measured: Measured | None = None
) -> StepTime:
    """Walks a step on two lanes. Updates are continuations: they run when the rest is done."""
    blocking: dict[str, list[Change]] = {}
    beside: dict[str, list[Change]] = {}
    awaited: dict[str, list[Change]] = {}
    for change in assignment.ways(graph, routes):
        if change.awaiting:
            blocking.setdefault(change.awaiting[0].name, []).append(change)
            continue
        beside.setdefault(change.tensor, []).append(change)
        for node in change.consumers:
            awaited.setdefault(node.name, []).append(change)
    lane, compute_s, exchange_s, step_s = _Lane(), 0.0, 0.0, 0.0

    def begin(tensors: Iterable[str | None]) -> float:
        begun = [change for name in tensors if name for change in beside.get(name, ())]
        for change in begun:
            lane.add(change)
        return sum(change.way.cost_s for change in begun)

    exchange_s += begin(item.name for item in graph.inputs)
    for node in sorted(graph.nodes, key=lambda node: node.phase == "update"):
        stop_s = sum(change.way.cost_s for change in blocking.get(node.name, ()))
        wait_s = sum(lane.finish(change) for change in awaited.get(node.name, ()))
        chosen = assignment.nodes[node.name]
        own_s = operator_s(node, graph.specs, chosen, assignment.sizes, routes.cluster, measured)
        lane.advance(own_s)
        compute_s, exchange_s = compute_s + own_s, exchange_s + stop_s + begin(node.outputs)
        step_s += stop_s + wait_s + own_s
    step_s += lane.left_s
    return StepTime(compute_s, exchange_s, compute_s + exchange_s - step_s, step_s)


class _Lane:
    """Exchanges that go on one after the other, while there is time."""

    def __init__(self) -> None:
        self._queue: deque[tuple[tuple[str, Layout], float]] = deque()
        self.left_s = 0.0

    def add(self, change: Change) -> None:
        """It begins when those before it are done."""
        self._queue.append(((change.tensor, change.target), change.way.cost_s))
        self.left_s += change.way.cost_s

    def advance(self, time_s: float) -> None:
        """So much time passes."""
        while self._queue and time_s > 0:
            key, left_s = self._queue.popleft()
            passed_s = min(left_s, time_s)
            time_s -= passed_s
            if passed_s < left_s:
                self._queue.appendleft((key, left_s - passed_s))
        self.left_s = math.fsum(left_s for _, left_s in self._queue)

    def finish(self, change: Change) -> float:
        """Seconds until this one is done, which then is; 0 if it was already."""
        wanted = (change.tensor, change.target)
        if all(key != wanted for key, _ in self._queue):
            return 0.0
        waited_s = 0.0
        while self._queue:
            key, left_s = self._queue.popleft()
            waited_s += left_s
            if key == wanted:
                break
        self.left_s = math.fsum(left_s for _, left_s in self._queue)
        return waited_s
