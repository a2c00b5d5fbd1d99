"""What a pipeline takes at least, and about: of the whole batch's graph, before anything is cut.

For p ranks of n devices each, k micro-batches and v chunks, with R the seconds in which one device
would run all that is of the batch, by the roofline and without launches, L those of its launches,
and U and V the same of updates:

    micro  = R / (k n) + L                          a micro-batch through all stages, split evenly
    least  = max(bubble micro, (k micro + U / n + V) / p)                               `least_s`
    bubble = 1 / (1 - (1 - 1 / k)^p)                with one chunk                        `bubble`
           = max(k / p, 1)                          with several

No split and no cut has less to do: a rank's part of an operator is 1 / n of it or more, and of a
micro-batch 1 / k or more (if work grows no faster than the batch does). As to the bubble: before
rank r begins, the first micro-batch is through the ranks before it, and when it has ended the last
one goes back through them. With t_r a micro-batch's time on rank r, whose sum is `micro`,

    step >= k t_r + t_0 + ... + t_(r-1)             for every r

and the largest of these is least where all are equal: t_r = (1 - 1 / k)^r step / k, whose sum is
step (1 - (1 - 1 / k)^p). Equal stages, (k + p - 1) / p, are not the best that there could be.

    about  = (k + (p - 1) / v) (micro' / p + sends) + (U / n + V) / p + exposed         `about_s`

is a guess, of equal stages in which the batch alone is split (`micro'`: in whole examples). `sends`
are 2 v (p - 1) / p of one cut's, since 1F1B has no more in flight than hides computing; `exposed`
is what of a stage's gradients, added up over n devices, does not fit beside its last backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from penstock.model.graph import Graph, Node
from penstock.plan.costs.hardware import Cluster
from penstock.plan.costs.operators import Operator, is_view
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, P
from penstock.plan.pipelines.model import NodeTimes
from penstock.plan.pipelines.stages import Stages, crossing_bytes
from penstock.plan.rules.signatures import Signature
from penstock.plan.search.cells import gradients_of, key_of

BACKWARD = 2 / 3
"""Of a micro-batch's time: two products for each one of forward."""
NARROW = 0.25
"""A cut is sought where little is sent: at the best quarter of all places, the guess is."""


def bubble(ranks: int, micro_batches: int, chunks: int) -> float:
    """A step in times of a micro-batch through all stages, at least; see the module."""
    if chunks == 1:
        return 1 / (1 - (1 - 1 / micro_batches) ** ranks)
    return max(micro_batches / ranks, 1.0)


class Promise:
    """What is known of all pipelines of a graph.

    Arguments:
        graph: of the whole batch.
        batch: its examples.
        cluster: whose devices count; it is cut into the stages' clusters by whoever asks.
    """

    def __init__(self, graph: Graph, batch: int, cluster: Cluster) -> None:
        self.graph, self._batch = graph, batch
        stages = Stages(graph, ())
        self.places = len({node.call for node in graph.nodes if node.phase == "forward"})
        """Stages that there can be, at most."""
        device_s, known = cluster.device.operator_s, dict[str, float]()
        self._device_s, self._running = device_s, stages.repeated
        self._whole_s: dict[str, float] = {}
        work_s = {"running": 0.0, "update": 0.0}
        launch_s = {"running": 0.0, "update": 0.0}
        for node in graph.nodes:
            if is_view(node.op):
                continue
            once = node.phase == "update"
            # Sums of gradients run once a step, if they are of two stages.
            is_sum = node.phase == "backward" and node.op == "aten.add.Tensor"
            is_running = node.name in stages.repeated and not is_sum
            key = key_of(node, graph.specs)
            if key not in known:
                whole_s = Operator(node, graph.specs, cluster).seconds((_copied(node),), (1,))
                known[key] = whole_s - device_s
            self._whole_s[node.name] = known[key]
            if node.name in stages.copied or not (once or is_running):
                continue
            kind = "update" if once else "running"
            work_s[kind] += known[key]
            launch_s[kind] += device_s
        self._work_s, self._launch_s = work_s["running"], launch_s["running"]
        self._update_s, self._update_launch_s = work_s["update"], launch_s["update"]
        names = [item.name for item in graph.inputs if item.role == "parameter"]
        self._numel = sum(graph.specs[name].numel for name in names)
        self._itemsize = max((graph.specs[name].dtype.itemsize for name in names), default=4)
        forward = [node.name for node in graph.nodes if node.phase == "forward"]
        crossing = crossing_bytes(Stages(graph, tuple(forward[1:])))
        sent = [max(both) for both in crossing if max(both)]
        self._cut_bytes = float(np.quantile(sent, NARROW)) if sent else 0.0
        self._gradients_s: dict[tuple[int, int, int], float] = {}

    def least_s(self, ranks: int, micro_batches: int, chunks: int, inside: Cluster) -> float:
        """No pipeline of these takes less; see the module.

        Arguments:
            inside: the cluster of one stage.
        """
        micro_s = self._work_s / (micro_batches * inside.ranks) + self._launch_s
        updates_s = self._update_s / inside.ranks + self._update_launch_s
        through_s = bubble(ranks, micro_batches, chunks) * micro_s
        return max(through_s, (micro_batches * micro_s + updates_s) / ranks)

    def about_s(
        self,
        ranks: int,
        micro_batches: int,
        chunks: int,
        inside: Cluster,
        send_s: Callable[[float], float],
    ) -> float:
        """What a pipeline of these may take; see the module.

        Arguments:
            inside: the cluster of one stage.
            send_s: that so many bytes of each device of a stage take to the next.
        """
        examples = self._batch // micro_batches
        share = -(-examples // inside.ranks) / examples
        micro_s = self._work_s * share / micro_batches + self._launch_s
        updates_s = self._update_s / inside.ranks + self._update_launch_s
        both_s = 2 * send_s(self._cut_bytes * share / micro_batches)
        sends_s = both_s * chunks * (ranks - 1) / ranks
        exposed_s = max(0.0, self._exchange_s(ranks, inside) - BACKWARD * micro_s / ranks)
        turns = micro_batches + (ranks - 1) / chunks
        return turns * (micro_s / ranks + sends_s) + updates_s / ranks + exposed_s

    def guess(self, micro_batches: int, inside: Cluster) -> NodeTimes:
        """Of each node, what it may take of a micro-batch in a stage: of the same guess.

        Arguments:
            inside: the cluster of one stage.
        """
        examples = self._batch // micro_batches
        share = -(-examples // inside.ranks) / examples / micro_batches
        exchange_s, ranks = self._exchange_s(1, inside), inside.ranks
        gradients = {name for names in gradients_of(self.graph).values() for name in names}
        late = {
            name: exchange_s * self.graph.specs[name].numel / max(1, self._numel)
            for name in gradients
        }

        def seconds(node: Node) -> float:
            if node.name not in self._whole_s:
                return 0.0
            part = share if node.name in self._running else 1 / ranks
            return self._whole_s[node.name] * part + self._device_s

        def num_bytes(name: str) -> float:
            maker = self.graph.producer.get(name)
            of_batch = maker is not None and maker[0].name in self._running
            return self.graph.specs[name].num_bytes * (share if of_batch else 1.0)

        return NodeTimes(seconds, num_bytes, late, {})

    def _exchange_s(self, ranks: int, inside: Cluster) -> float:
        """Of a stage's gradients, added up over its devices."""
        key = ranks, inside.hosts, inside.devices
        if key not in self._gradients_s:
            axes, shape = len(inside.mesh), (math.ceil(self._numel / ranks),)
            routes = Routes(inside, inside.mesh)
            way = routes.way(shape, self._itemsize, (P,) * axes, (B,) * axes)
            self._gradients_s[key] = 0.0 if way is None or inside.ranks == 1 else way.cost_s
        return self._gradients_s[key]


def _copied(node: Node) -> Signature:
    """All of it."""
    outputs = tuple(None if name is None else B for name in node.outputs)
    return Signature((B,) * len(node.inputs), outputs)
