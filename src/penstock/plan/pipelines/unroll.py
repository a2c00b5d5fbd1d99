"""A graph in stages and a schedule -> for each rank of the pipeline, its step as a graph.

A rank's graph has the nodes of its stages once for each micro-batch, in the order of its tasks,
then what is late (`Stages`), and between them

    receive   gives a tensor that another rank has made: right before its first reader
    send      reads a tensor in the layout in which the other rank wants it: right behind its maker
    sums      of gradients and losses, from micro-batch to micro-batch, in order

so that all that is known of graphs and assignments holds of it: `lower` splits it over the mesh
inside the stage, brings what is sent into the layout of its reader, frees what nobody reads any
more. `staged` then makes instructions of `receive` and `send`, which are no operators of torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from penstock.model.graph import Graph, Input, Node, Output, Phase, Ref, Spec, replaced
from penstock.plan.assignment import Assignment
from penstock.plan.layout import B, Layout
from penstock.plan.pipelines.micro_batch import SEED, at, scaled_one
from penstock.plan.pipelines.schedule import Schedule
from penstock.plan.pipelines.stages import Stages
from penstock.plan.rules.signatures import Signature

SEND, RECEIVE = "penstock.send", "penstock.receive"
"""Stand for operators: `send(tensor, to_rank)` and `receive(from_rank)`; ranks of the pipeline."""
SENT = "send "
"""How names of what sends give begin: it is nothing."""


@dataclass(frozen=True, eq=False)
class Part:
    """A rank's step.

    Arguments:
        graph: of it; see the module.
        assignment: of it, over the mesh inside the stage.
    """

    graph: Graph
    assignment: Assignment


def unroll(stages: Stages, assignment: Assignment, schedule: Schedule) -> tuple[Part, ...]:
    """The step of each rank of the pipeline.

    Arguments:
        stages: as many as the schedule has.
        assignment: of the graph of one micro-batch, over the mesh inside a stage.
    """
    asked: dict[int, dict[str, dict[int, Layout]]] = {}
    for rank in range(len(schedule.ranks)):
        reading = _Rank(stages, assignment, schedule, rank, {})
        reading.write()
        for name, (sender, layout) in reading.received.items():
            asked.setdefault(sender, {}).setdefault(name, {})[rank] = layout
    parts = []
    for rank in range(len(schedule.ranks)):
        writing = _Rank(stages, assignment, schedule, rank, asked.get(rank, {}))
        writing.write()
        parts.append(writing.part())
    return tuple(parts)


class _Rank:
    """The graph of a rank of the pipeline, while it is written.

    Arguments:
        sends: by tensor, the ranks that want it, and in which layout.

    Attributes:
        received: by tensor, the rank that it comes from, and the layout in which it is wanted.
    """

    def __init__(
        self,
        stages: Stages,
        assignment: Assignment,
        schedule: Schedule,
        rank: int,
        sends: Mapping[str, Mapping[int, Layout]],
    ) -> None:
        self.received: dict[str, tuple[int, Layout]] = {}
        self._stages, self._graph, self._base = stages, stages.graph, assignment
        self._schedule, self._rank, self._sends = schedule, rank, sends
        self._count = schedule.micro_batches
        self._inputs: dict[str, Input] = {}
        self._nodes: list[Node] = []
        self._outputs: list[Output] = []
        self._specs: dict[str, Spec] = {}
        self._layouts: dict[str, Layout] = {}
        self._signatures: dict[str, tuple[Signature, ...]] = {}
        graph = stages.graph
        self._given = {item.name: item for item in graph.inputs}
        self._renewed = {
            graph.input("buffer", output.target).name: output.name
            for output in graph.outputs
            if output.role == "buffer" and output.name in graph.producer
        }
        late = [node for node in graph.nodes if node.name in stages.late]
        read = {name for node in late for name in node.inputs}
        read |= {output.name for output in graph.outputs if output.role == "gradient"}
        made = [name for name in graph.producer if name in read]
        self._summed = {n: None for n in made if graph.producer[n][0].name not in stages.late}
        self._summed[graph.output("loss").name] = None

    def write(self) -> None:
        """All of it."""
        for item in self._graph.inputs:
            if not self._stages.lies_anywhere(item) and self._has(self._stages.home[item.name]):
                self._input(item, item.name)
        self._write_once()
        running: dict[tuple[str, int], list[Node]] = {}
        late = self._stages.late - self._stages.copied
        repeated = self._stages.repeated - late
        for node in self._graph.nodes:
            if node.name in repeated:
                running.setdefault((node.phase, self._stages.of[node.name]), []).append(node)
        for task in self._schedule.ranks[self._rank]:
            for node in running.get((task.direction, task.stage), ()):
                self._call(node, task.micro_batch)
        for name in self._summed:
            maker = self._graph.producer[name][0].name
            if maker not in self._stages.copied and self._has(self._stages.of[maker]):
                self._sum_of(name)
        for node in self._graph.nodes:
            if node.name in late and self._has(self._stages.of[node.name]):
                self._call(node, None)
        self._give()

    def part(self) -> Part:
        """What has been written."""
        graph = Graph(
            inputs=tuple(self._inputs.values()),
            nodes=tuple(self._nodes),
            outputs=tuple(self._outputs),
            specs=self._specs,
            constants={n: c for n, c in self._graph.constants.items() if n in self._inputs},
            initial={n: v for n, v in self._graph.initial.items() if n in self._inputs},
        )
        inputs = {name: self._layouts[name] for name in self._inputs}
        return Part(graph, Assignment(self._base.sizes, inputs, self._signatures))

    def _has(self, stage: int) -> bool:
        return self._schedule.rank_of(stage) == self._rank

    def _write_once(self) -> None:
        """What others wait for before any micro-batch."""
        others = self._stages.repeated | self._stages.late | self._stages.copied
        for node in self._graph.nodes:
            wanted = any(name in self._sends for name in node.outputs if name is not None)
            if wanted and node.name not in others and self._has(self._stages.of[node.name]):
                self._call(node, None)

    # What is read.

    def _read(self, name: str, micro_batch: int | None, layout: Layout, late: bool = False) -> str:
        """A tensor of the graph under its name here, there to be read.

        Arguments:
            micro_batch: of the reader; None for one that runs once.
            layout: in which it is read.
            late: whether of what micro-batches make the sum is read.
        """
        if name in self._given:
            return self._read_input(self._given[name], micro_batch, layout)
        maker, _ = self._graph.producer[name]
        own = self._sum_of(name) if late and name in self._summed else None
        if maker.name in self._stages.copied:
            self._call(maker, None)
            return own or name
        stage = self._stages.of[maker.name]
        if own is not None:
            return self._there(own, stage, name, layout)
        if maker.name in self._stages.repeated and maker.name not in self._stages.late:
            assert micro_batch is not None, f"{name} is of a micro-batch, and read behind them all"
            return self._there(at(name, micro_batch, self._count), stage, name, layout)
        if self._has(stage):
            self._call(maker, None)
        return self._there(name, stage, name, layout)

    def _read_input(self, item: Input, micro_batch: int | None, layout: Layout) -> str:
        if item.role == "data":
            assert micro_batch is not None
            own = at(item.name, micro_batch, self._count)
            return self._input(item, own)
        if item.name == SEED and micro_batch is not None and self._count > 1:
            return self._seed(item, micro_batch)
        if self._stages.lies_anywhere(item):
            return self._input(item, item.name)
        if micro_batch and item.name in self._renewed:
            new = self._renewed[item.name]
            stage = self._stages.of[self._graph.producer[new][0].name]
            return self._there(at(new, micro_batch - 1, self._count), stage, new, layout)
        return self._there(item.name, self._stages.home[item.name], item.name, layout)

    def _there(self, own: str, stage: int, name: str, layout: Layout) -> str:
        """A tensor that is of this rank, or has come from another."""
        if self._has(stage) or own in self._specs:
            assert own in self._specs, f"{own} is read before it is made"
            return own
        sender = self._schedule.rank_of(stage)
        self.received[own] = sender, layout
        phase: Phase = "forward"
        if name in self._graph.producer and self._graph.producer[name][0].phase != "forward":
            phase = "backward"
        signature = tuple(Signature((), (placement,)) for placement in layout)
        node = Node(f"receive {own}", RECEIVE, (sender,), {}, (own,), phase)
        self._add(node, signature, [self._graph.specs[name]])
        return own

    def _seed(self, item: Input, micro_batch: int) -> str:
        """See `micro_batch`: k seed + m."""
        own = at(item.name, micro_batch, self._count)
        if own not in self._specs:
            scaled = f"{item.name}#"
            self._input(item, item.name)
            if scaled not in self._specs:
                self._plain(scaled, "aten.mul.Scalar", item.name, self._count, "forward")
            self._plain(own, "aten.add.Scalar", scaled, micro_batch, "forward")
        return own

    # What is written.

    def _input(self, item: Input, own: str) -> str:
        if own not in self._inputs:
            target = item.target if item.role != "data" else own
            self._inputs[own] = Input(own, item.role, target)
            self._specs[own] = self._graph.specs[item.name]
            self._layouts[own] = self._base.layout_of(self._graph, item.name)
            self._send(own, "forward")
        return own

    def _call(self, node: Node, micro_batch: int | None) -> None:
        """A node of the graph, once, or of a micro-batch."""

        def own(name: str) -> str:
            return name if micro_batch is None else at(name, micro_batch, self._count)

        if own(node.name) in self._signatures:
            return
        layouts = [self._base.read_as(self._graph, node, n) for n in range(len(node.inputs))]
        late = node.name in self._stages.late
        reads = iter(
            [
                self._read(name, micro_batch, layout, late)
                for name, layout in zip(node.inputs, layouts, strict=True)
            ]
        )
        args, kwargs = replaced((node.args, dict(node.kwargs)), lambda _: Ref(next(reads)))
        results = tuple(None if name is None else own(name) for name in node.outputs)
        made = replace(node, name=own(node.name), args=args, kwargs=kwargs, outputs=results)
        specs = [self._graph.specs[name] for name in node.outputs if name is not None]
        self._add(scaled_one(made, self._count), self._base.nodes[node.name], specs)
        for name in node.outputs:
            if name in self._summed and not late and micro_batch is not None:
                self._add_up(name, micro_batch)

    def _add(self, node: Node, signature: tuple[Signature, ...], specs: Sequence[Spec]) -> None:
        self._nodes.append(node)
        self._signatures[node.name] = signature
        results = [name for name in node.outputs if name is not None]
        self._specs |= dict(zip(results, specs, strict=True))
        for number, name in enumerate(node.outputs):
            if name is not None:
                placements = [one.outputs[number] for one in signature]
                self._layouts[name] = tuple(B if p is None else p for p in placements)
        if node.op != SEND:
            for name in results:
                self._send(name, node.phase)

    def _plain(self, own: str, op: str, source: str, number: float, phase: Phase) -> None:
        """A pointwise and linear operator of a tensor and a number."""
        signature = tuple(Signature((p,), (p,)) for p in self._layouts[source])
        node = Node(own, op, (Ref(source), number), {}, (own,), phase)
        self._add(node, signature, [self._specs[source]])

    def _sum_of(self, name: str) -> str:
        """The name of what all micro-batches have added up to."""
        maker, _ = self._graph.producer[name]
        if self._count == 1:
            return name
        own = f"{name}#sum"
        if maker.name in self._stages.repeated or own in self._specs:
            return own
        if maker.name in self._stages.copied or self._has(self._stages.of[maker.name]):
            # The same for every micro-batch: it is as often in the sum as there are.
            self._call(maker, None)
            self._plain(own, "aten.mul.Scalar", name, self._count, "backward")
        return own

    def _add_up(self, name: str, micro_batch: int) -> None:
        """To the sum of the micro-batches before, in whichever layout it is made."""
        if self._count == 1 or micro_batch == 0:
            return
        new = at(name, micro_batch, self._count)
        before = f"{name}#sum of {micro_batch}" if micro_batch > 1 else at(name, 0, self._count)
        is_last = micro_batch == self._count - 1
        own = f"{name}#sum" if is_last else f"{name}#sum of {micro_batch + 1}"
        signature = tuple(Signature((p, p), (p,)) for p in self._layouts[new])
        args = (Ref(before), Ref(new))
        node = Node(own, "aten.add.Tensor", args, {}, (own,), "backward")
        self._add(node, signature, [self._specs[new]])

    def _send(self, own: str, phase: Phase) -> None:
        """To all that want it."""
        for rank, layout in self._sends.get(own, {}).items():
            name = f"{SENT}{own} to {rank}"
            node = Node(
                name, SEND, (Ref(own), rank), {}, (name,),
                "forward" if phase == "forward" else "backward",
            )  # fmt: skip
            signature = tuple(Signature((p,), (p,)) for p in layout)
            self._add(node, signature, [self._specs[own]])

    def _give(self) -> None:
        """The outputs of this rank's stages."""
        loss = self._graph.output("loss").name
        for output in self._graph.outputs:
            own = self._given_as(output, loss)
            if own is not None:
                self._outputs.append(replace(output, name=own))

    def _given_as(self, output: Output, loss: str) -> str | None:
        """An output's name here; None if it is another rank's."""
        name, maker = output.name, self._graph.producer.get(output.name)
        if output.role == "loss":
            if maker is None or not self._has(self._stages.of[maker[0].name]):
                return None
            own = self._sum_of(name)
            if self._count > 1:
                self._plain(f"{name}#mean", "aten.mul.Scalar", own, 1 / self._count, "backward")
                own = f"{name}#mean"
            return own
        if output.role in ("parameter", "buffer", "state", "gradient"):
            role = "parameter" if output.role == "gradient" else output.role
            item = self._graph.input(role, output.target)
            if self._stages.lies_anywhere(item):
                if item.name not in self._inputs:
                    return None
            elif not self._has(self._stages.home[item.name]):
                return None
            if maker is None:
                return self._input(item, item.name)
            layout = self._base.output_layout(self._graph, output)
            if output.role == "buffer":
                return self._read(name, self._count - 1, layout)
            return self._read(name, None, layout, late=True)
        return None
