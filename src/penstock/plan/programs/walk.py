"""One walk over a graph for all ranks: in which order operators are called and tensors re-laid.

Nodes keep the order of the graph, but for updates. A value is brought into the layout in which it
is read once, for all its readers:

- in forward and backward, right behind its node, if its first reader is of the same phase, and else
  (parameters; activations that backward reads) right before its first reader. It is finished right
  before that reader, so that what lies between them runs meanwhile;
- where nobody but updates and outputs read it (gradients, and the new values of parameters that
  were updated in parts), together with others, as a bucket: as many as backward makes before
  `bucket_bytes` are full, begun as soon as the last is there. Updates that wait for it stand behind
  its `Finish`, and that stands where `in_flight` newer buckets have begun, or at the end. A bucket
  of several exchanges (along two axes) begins the next when a newer bucket begins.

Exchanges of a bucket are alike: same axes and kinds, same dtype, and none waits for another
(`Walk._depths`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.errors import PlanError
from penstock.model.graph import Graph, Node, Output, Spec
from penstock.plan.assignment import Assignment
from penstock.plan.costs.routes import Hop, Way, after, plain
from penstock.plan.layout import Layout, in_words, largest_shape
from penstock.plan.programs.moves import exchange_of
from penstock.plan.programs.program import Finish, Kind

_Key = tuple[str, Layout]
"""A tensor in a layout."""


class Ways(Protocol):
    """What the lowering asks of `Routes`."""

    def way(
        self, shape: Sequence[int], itemsize: int, source: Layout, target: Layout
    ) -> Way | None: ...


@dataclass(frozen=True)
class CallStep:
    """A call, as all ranks make it: the values that it reads, and gives."""

    node: Node
    reads: tuple[str, ...]
    gives: tuple[str | None, ...]
    after: int | None


@dataclass(frozen=True)
class HopStep:
    """One value's hop."""

    source: str
    result: str
    hop: Hop


@dataclass(frozen=True)
class BeginStep:
    """An exchange of some values."""

    number: int
    kind: Kind
    axis: int
    sequence: int
    hops: tuple[HopStep, ...]


Step = CallStep | HopStep | BeginStep | Finish


@dataclass(eq=False)
class _Member:
    """A tensor on its way, as part of a bucket."""

    tensor: str
    layout: Layout
    hops: deque[Hop]


@dataclass(eq=False)
class _Bucket:
    """Tensors that travel together.

    Attributes:
        waits_for: how many of them are yet to be made.
        number: of the exchange that is under way.
    """

    members: list[_Member] = field(default_factory=list)
    waits_for: int = 0
    num_bytes: int = 0
    number: int | None = None
    done: bool = False


class Walk:
    """The graph, walked in order.

    Attributes:
        script: what has been written so far.
        values: by name, the tensor and the layout.
        outputs: by the graph's outputs, in order, the value.
    """

    def __init__(
        self,
        graph: Graph,
        assignment: Assignment,
        routes: Ways,
        bucket_bytes: int,
        in_flight: int,
    ) -> None:
        self.graph, self.assignment = graph, assignment
        self.script: list[Step] = []
        self.values: dict[str, _Key] = {}
        self.outputs: list[tuple[Output, str]] = []
        self._routes, self._in_flight = routes, max(1, in_flight)
        self._sizes = assignment.sizes
        self._owns: dict[str, Layout] = {}
        self._reads: dict[str, list[_Key]] = {}
        self._made: dict[_Key, str] = {}
        self._unfinished: dict[str, int] = {}
        self._numbers = 0
        self._sequences: Counter[int] = Counter()
        self._readers = self._read()
        self._late = self._late_nodes()
        self._buckets, self._waiting = self._bucketed(bucket_bytes)
        self._on_demand = self._for_the_waiting()
        self._flying: deque[_Bucket] = deque()
        self._pending: dict[str, Node] = {}
        self._asleep: dict[str, Node] = {}

    def walk(self) -> None:
        """Writes the script."""
        for item in self.graph.inputs:
            self._add(item.name, self._own(item.name))
        for node in self.graph.nodes:
            if node.name in self._on_demand:
                self._asleep[node.name] = node
            elif node.name not in self._late or self._is_ready(node):
                self._call(node, None)
            else:
                self._pending[node.name] = node
        while self._flying:
            self._retire()
        left = [*self._pending, *self._asleep]
        assert not left, f"{', '.join(left)} wait for nothing"
        for output in self.graph.outputs:
            self.outputs.append(
                (output, self._finished(*self._brought(output.name, self._asked(output))))
            )

    # What the assignment says.

    def _own(self, tensor: str) -> Layout:
        """The layout in which a tensor is made or given."""
        if tensor not in self._owns:
            self._owns[tensor] = self.assignment.layout_of(self.graph, tensor)
        return self._owns[tensor]

    def _asked(self, output: Output) -> Layout:
        """The layout in which an output is to lie."""
        layout = self.assignment.output_layout(self.graph, output)
        return plain(self.graph.specs[output.name].shape, layout, self._sizes)

    def _targets(self, node: Node) -> list[_Key]:
        """What a node reads."""
        if node.name not in self._reads:
            self._reads[node.name] = [
                (name, self.assignment.read_as(self.graph, node, number))
                for number, name in enumerate(node.inputs)
            ]
        return self._reads[node.name]

    def _way(self, key: _Key) -> tuple[Hop, ...]:
        tensor, target = key
        spec, source = self.graph.specs[tensor], self._own(tensor)
        if source == target:
            return ()
        way = self._routes.way(spec.shape, spec.dtype.itemsize, source, target)
        if way is None:
            raise PlanError(
                f"{tensor} {spec}: there is no way from {in_words(source)} to {in_words(target)}",
                hint="the assignment asks for a layout in which the tensor cannot lie",
            )
        return way.hops

    # What is known before the walk.

    def _read(self) -> dict[_Key, list[Node | None]]:
        """By tensor and layout, the nodes that read it so, in order; None for an output."""
        readers: dict[_Key, list[Node | None]] = {}
        for node in self.graph.nodes:
            for key in self._targets(node):
                readers.setdefault(key, []).append(node)
        for output in self.graph.outputs:
            readers.setdefault((output.name, self._asked(output)), []).append(None)
        return readers

    def _late_nodes(self) -> set[str]:
        """Updates of which nothing but updates and outputs depends."""
        late: set[str] = set()
        for node in reversed(self.graph.nodes):
            readers = [
                reader.name
                for name in node.outputs
                if name is not None
                for reader in self.graph.consumers.get(name, ())
            ]
            if node.phase == "update" and late.issuperset(readers):
                late.add(node.name)
        return late

    def _depths(self) -> dict[str, int]:
        """How many bucketed moves lie on the longest path to each tensor.

        Moves of one depth do not depend on one another, so that they can share a bucket.
        """
        depths = {item.name: 0 for item in self.graph.inputs}
        for node in self.graph.nodes:
            deepest = max(
                (depths[key[0]] + self._is_late_move(key) for key in self._targets(node)),
                default=0,
            )
            depths |= {name: deepest for name in node.outputs if name is not None}
        return depths

    def _is_late_move(self, key: _Key) -> bool:
        """Whether it is an exchange that nobody waits for but updates and outputs."""
        return (
            key[0] in self.graph.producer
            and any(exchange_of(hop, self._sizes) for hop in self._way(key))
            and all(reader is None or reader.name in self._late for reader in self._readers[key])
        )

    def _bucketed(self, bucket_bytes: int) -> tuple[dict[_Key, _Bucket], dict[str, list[_Bucket]]]:
        """The bucket of each late move, and by tensor the buckets that wait for it."""
        depths = self._depths()
        targets: dict[str, list[Layout]] = {}
        for tensor, layout in self._readers:
            targets.setdefault(tensor, []).append(layout)
        buckets: dict[_Key, _Bucket] = {}
        waiting: dict[str, list[_Bucket]] = {}
        open_ones: dict[object, _Bucket] = {}
        for tensor in self.graph.producer:
            for layout in targets.get(tensor, ()):
                if not self._is_late_move((tensor, layout)):
                    continue
                hops = self._way((tensor, layout))
                spec, source = self.graph.specs[tensor], self._own(tensor)
                kinds = [(hop.axis, exchange_of(hop, self._sizes)) for hop in hops]
                alike = (depths[tensor], spec.dtype, *(kind for kind in kinds if kind[1]))
                size = Spec(largest_shape(spec.shape, source, self._sizes), spec.dtype).num_bytes
                alone = size >= bucket_bytes
                bucket = _Bucket() if alone else open_ones.setdefault(alike, _Bucket())
                bucket.members.append(_Member(tensor, source, deque(hops)))
                bucket.waits_for += 1
                bucket.num_bytes += size
                if bucket.num_bytes >= bucket_bytes and not alone:
                    del open_ones[alike]
                buckets[tensor, layout] = bucket
                waiting.setdefault(tensor, []).append(bucket)
        return buckets, waiting

    def _for_the_waiting(self) -> set[str]:
        """Updates that wait for no bucket, of which only such depend as do.

        They are called with those: what they give would lie about until then.
        """
        waiting: set[str] = set()
        for node in self.graph.nodes:
            for key in self._targets(node):
                producer = self.graph.producer.get(key[0])
                if key in self._buckets or (producer and producer[0].name in waiting):
                    waiting.add(node.name)
        given = {output.name for output in self.graph.outputs} | self._waiting.keys()
        found: set[str] = set()
        for node in reversed(self.graph.nodes):
            if node.name in waiting or node.name not in self._late or given & {*node.outputs}:
                continue
            made = [name for name in node.outputs if name is not None]
            readers = {r.name for name in made for r in self.graph.consumers.get(name, ())}
            if readers and readers <= waiting | found:
                found.add(node.name)
        return found

    # Writing.

    def _add(self, tensor: str, layout: Layout) -> str:
        """A new value."""
        name = tensor if layout == self._own(tensor) else f"{tensor}@{in_words(layout)}"
        self.values[name] = (tensor, layout)
        self._made[tensor, layout] = name
        return name

    def _call(self, node: Node, behind: int | None) -> None:
        for name in node.inputs:
            producer = self.graph.producer.get(name)
            if producer and producer[0].name in self._asleep:
                self._call(self._asleep.pop(producer[0].name), behind)
        brought = [self._brought(*key) for key in self._targets(node)]
        reads = tuple(self._finished(*key) for key in brought)
        gives = tuple(
            None if name is None else self._add(name, self._own(name)) for name in node.outputs
        )
        self.script.append(CallStep(node, reads, gives, behind))
        made = [name for name in gives if name is not None]
        for name in made:
            self._begin_early(name, node)
        for name in made:
            for bucket in self._waiting.get(name, ()):
                bucket.waits_for -= 1
                if not bucket.waits_for:
                    self._launch(bucket)

    def _begin_early(self, tensor: str, node: Node) -> None:
        """Begins the exchanges of a new tensor whose first reader is of the same phase."""
        targets = {
            key: None for r in self.graph.consumers.get(tensor, ()) for key in self._targets(r)
        }
        for key in targets:
            if key[0] != tensor or key in self._buckets:
                continue
            first = self._readers[key][0]
            hops = self._way(key)
            if first is None or first.phase != node.phase or not hops:
                continue
            if exchange_of(hops[0], self._sizes):
                self._hop([(tensor, self._own(tensor), hops[0])])

    def _brought(self, tensor: str, target: Layout) -> _Key:
        """Begins what brings a tensor into a layout."""
        layout = self._own(tensor)
        for hop in self._way((tensor, target)):
            self._hop([(tensor, layout, hop)])
            layout = after(layout, hop)
        return tensor, layout

    def _finished(self, tensor: str, layout: Layout) -> str:
        """The value of a tensor in a layout, there to be read."""
        name = self._made[tensor, layout]
        if name in self._unfinished:
            number = self._unfinished[name]
            self.script.append(Finish(number))
            self._unfinished = {n: of for n, of in self._unfinished.items() if of != number}
        return name

    def _hop(self, moves: Sequence[tuple[str, Layout, Hop]]) -> int | None:
        """Writes hops that are alike, if they have not been made; the number that they finish by.

        Arguments:
            moves: tensors, their layouts and hops.
        """
        hops = []
        for tensor, layout, hop in moves:
            if (tensor, after(layout, hop)) not in self._made:
                source = self._finished(tensor, layout)
                hops.append(HopStep(source, self._add(tensor, after(layout, hop)), hop))
        if not hops:
            return None
        kind, axis = exchange_of(hops[0].hop, self._sizes), hops[0].hop.axis
        if kind is None:
            self.script += hops
            return None
        number, self._numbers = self._numbers, self._numbers + 1
        self.script.append(BeginStep(number, kind, axis, self._sequences[axis], tuple(hops)))
        self._sequences[axis] += 1
        self._unfinished |= {hop.result: number for hop in hops}
        return number

    # Buckets.

    def _launch(self, bucket: _Bucket) -> None:
        """Begins a bucket, and has those before it go on."""
        self._go_on(bucket)
        for other in self._flying:
            self._go_on(other)
        self._flying.append(bucket)
        while len(self._flying) > self._in_flight:
            self._retire()

    def _go_on(self, bucket: _Bucket) -> None:
        """To its next exchange, if there is one, or to the end of its way."""
        exchanges: list[tuple[str, Layout, Hop]] = []
        for member in bucket.members:
            while member.hops:
                hop = member.hops.popleft()
                move = (member.tensor, member.layout, hop)
                member.layout = after(member.layout, hop)
                if exchange_of(hop, self._sizes):
                    exchanges.append(move)
                    break
                self._hop([move])
        if exchanges:
            number = self._hop(exchanges)
            bucket.number = bucket.number if number is None else number

    def _retire(self) -> None:
        """Waits for the oldest bucket, and makes the updates that have waited for it."""
        bucket = self._flying.popleft()
        while any(member.hops for member in bucket.members):
            for each in (bucket, *self._flying):
                self._go_on(each)
        for member in bucket.members:
            self._finished(member.tensor, member.layout)
        bucket.done = True
        for name, node in list(self._pending.items()):
            # A call may have launched a bucket, whose turn has retired others and called the rest.
            if name in self._pending and self._is_ready(node):
                del self._pending[name]
                self._call(node, bucket.number)

    def _is_ready(self, node: Node) -> bool:
        """Whether it needs to wait for no bucket, and for no node that does."""
        for key in self._targets(node):
            if key in self._buckets:
                if not self._buckets[key].done:
                    return False
            elif (key[0], self._own(key[0])) not in self._made and (
                self.graph.producer[key[0]][0].name not in self._asleep
            ):
                return False
        return True
