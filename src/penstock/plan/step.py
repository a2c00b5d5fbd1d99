"""`StepPlan`: how a training step is split over a cluster, as a file to read, diff and run by.

It holds every decision (the mesh, the layout of every input, the signature of every operator, what
is recomputed, the stages of a pipeline), and what was predicted of it: seconds, bytes, routes. The
same job on the same cluster gives the same file, and `fingerprint` is of its decisions alone. The
graph itself is not in it: a worker captures it again, and `check` compares.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from penstock.errors import UserError
from penstock.model.graph import Graph
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster
from penstock.plan.files import read_json, write_json
from penstock.plan.layout import in_words, read_layout
from penstock.plan.rules.signatures import Combination, Signature

FORMAT = 1
_MAKES_ONE = "penstock plan JOB.yaml --on cluster.json --save FILE makes one"


@dataclass(frozen=True)
class Times:
    """What a step was predicted to take, and a rank to hold.

    Arguments:
        step_s: in all.
        compute_s: of operators, on the rank with most.
        exchange_s: of routes that computing waits for.
        exposed_s: of routes that updates wait for, what does not fit beside backward.
        peak_bytes: on the rank with most; None where it was not looked at.
    """

    step_s: float
    compute_s: float
    exchange_s: float
    exposed_s: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Layer:
    """A module of the network: its parameters, and what it costs.

    Arguments:
        module: its path; empty for what is in none.
        parameters: by name, shape and layout in words.
        compute_s: of its operators, forward, backward and update.
        exchange_s, exchange_bytes: of the routes to what it reads; bytes that a rank sends.
        splits: how its heaviest operator is split, in words.
    """

    module: str
    parameters: Mapping[str, tuple[str, str]]
    compute_s: float
    exchange_s: float
    exchange_bytes: int
    splits: str


@dataclass(frozen=True)
class Route:
    """A tensor that goes from one layout to another.

    Arguments:
        tensor, module: its name; the module that reads it.
        source, target: layouts in words.
        num_bytes: that a rank sends; the busiest one.
        seconds: that it takes.
        late: whether only updates and the next step wait for it.
    """

    tensor: str
    module: str
    source: str
    target: str
    num_bytes: int
    seconds: float
    late: bool


@dataclass(frozen=True)
class Memory:
    """What a rank holds; the one with most.

    Arguments:
        limit_bytes: of the device.
        resident_bytes: parameters, buffers, state, the batch.
        peak_bytes: at the worst instruction.
        arena_bytes: in which everything but the resident lies, by static offsets.
        timeline: bytes held over the instructions of a step, at some of them.
        largest: at the peak, in words.
    """

    limit_bytes: int
    resident_bytes: int
    peak_bytes: int
    arena_bytes: int
    timeline: tuple[int, ...]
    largest: tuple[str, ...]


@dataclass(frozen=True)
class Stages:
    """A pipeline.

    Arguments:
        number: of stages; ranks of the first axis of the mesh.
        chunks: of each rank: 2 or more are interleaved.
        micro_batches: that a batch is cut into.
        cuts: the first forward node of each stage but the first.
        bubble: share of a step in which a rank waits for others.
        timeline: by stage, what it does and when: (micro-batch, "forward" or "backward", from, to),
            in seconds.
    """

    number: int
    chunks: int
    micro_batches: int
    cuts: tuple[str, ...]
    bubble: float
    timeline: tuple[tuple[tuple[int, str, float, float], ...], ...] = ()


@dataclass(frozen=True, eq=False)
class StepPlan:
    """How a step is split over a cluster; see the module.

    Arguments:
        network: its name, for people.
        batch: examples of a step, of all ranks together.
        graph: fingerprint of the captured step.
        cluster: for which it was made.
        assignment: of every input and node, to the mesh.
        origin: "search", or the known way that was the best.
        times: predicted.
        beside: by name of a known way, its times.
        layers, routes, memory: for people.
        recomputed: tensors that backward computes again.
        stages: of a pipeline, if there is one.
        notes: what a person should know: operators without a rule, and the like.
    """

    network: str
    batch: int
    graph: str
    cluster: Cluster
    assignment: Assignment
    origin: str
    times: Times
    beside: Mapping[str, Times]
    layers: tuple[Layer, ...]
    routes: tuple[Route, ...]
    memory: Memory | None = None
    recomputed: tuple[str, ...] = ()
    stages: Stages | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of what has been decided, whatever was predicted of it."""
        words = json.dumps(self._decided(), sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "format": FORMAT,
            "network": self.network,
            "fingerprint": self.fingerprint,
            "origin": self.origin,
            "times": asdict(self.times),
            "beside": {name: asdict(times) for name, times in self.beside.items()},
            "notes": list(self.notes),
            "cluster": self.cluster.to_json(),
            **self._decided(),
            "memory": None if self.memory is None else asdict(self.memory),
            "layers": [asdict(layer) for layer in self.layers],
            "routes": [asdict(route) for route in self.routes],
            "pipeline": None
            if self.stages is None
            else {"bubble": self.stages.bubble, "timeline": self.stages.timeline},
        }

    def _decided(self) -> dict[str, Any]:
        stages = None if self.stages is None else asdict(self.stages)
        if stages is not None:
            del stages["timeline"], stages["bubble"]
        return {
            "batch": self.batch,
            "graph": self.graph,
            "mesh": list(self.assignment.sizes),
            "stages": stages,
            "recomputed": list(self.recomputed),
            "inputs": {k: in_words(v) for k, v in sorted(self.assignment.inputs.items())},
            "outputs": {k: in_words(v) for k, v in sorted(self.assignment.outputs.items())},
            "nodes": {k: combination_in_words(v) for k, v in self.assignment.nodes.items()},
        }

    @classmethod
    def from_json(cls, values: Any, source: str = "the plan") -> StepPlan:
        """What `to_json` gave.

        Arguments:
            source: whose values they are, for errors: the file's name.

        Raises:
            UserError: they are no plan, or one of another format, or changed by hand.
        """
        try:
            if values["format"] != FORMAT:
                raise UserError(
                    f"{source}: a plan of format {values['format']}; expected {FORMAT}",
                    hint="it was made by another version of Penstock: plan anew",
                )
            plan = cls._read(values, source)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            if isinstance(error, KeyError):
                what = f"there is no key {error}"
            raise UserError(f"{source}: not a plan: {what}", hint=_MAKES_ONE) from error
        if plan.fingerprint != values["fingerprint"]:
            raise UserError(
                f"{source}: its decisions have the fingerprint {plan.fingerprint}; expected "
                f"{values['fingerprint']}",
                hint="the file was changed by hand: pins say what the search is to keep to",
            )
        return plan

    @classmethod
    def _read(cls, values: Any, source: str) -> StepPlan:
        stages = values["stages"]
        return cls(
            network=values["network"],
            batch=values["batch"],
            graph=values["graph"],
            cluster=Cluster.from_json(values["cluster"], source),
            assignment=Assignment(
                sizes=tuple(values["mesh"]),
                inputs={k: read_layout(v) for k, v in values["inputs"].items()},
                nodes={k: read_combination(v) for k, v in values["nodes"].items()},
                outputs={k: read_layout(v) for k, v in values["outputs"].items()},
            ),
            origin=values["origin"],
            times=Times(**values["times"]),
            beside={name: Times(**times) for name, times in values["beside"].items()},
            layers=tuple(map(_layer, values["layers"])),
            routes=tuple(Route(**route) for route in values["routes"]),
            memory=None if values["memory"] is None else _memory(values["memory"]),
            recomputed=tuple(values["recomputed"]),
            stages=None if stages is None else _stages(stages, values["pipeline"]),
            notes=tuple(values["notes"]),
        )

    def save(self, path: str | Path) -> None:
        """Writes the file.

        Raises:
            UserError: it cannot be made.
        """
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> StepPlan:
        """Reads a file.

        Raises:
            UserError: it is not there, or not a plan.
        """
        missing = f"penstock plan JOB.yaml --on cluster.json --save {path} makes one"
        values = read_json(path, missing=missing, wrong=_MAKES_ONE)
        return cls.from_json(values, str(path))

    def check(self, graph: Graph) -> None:
        """Whether it is a plan of this step.

        Raises:
            UserError: the network, its sizes or the version of torch have changed.
        """
        if graph.fingerprint != self.graph:
            raise UserError(
                f"the plan is of the step {self.graph}; this one is {graph.fingerprint}",
                hint="the network, the batch, the optimizer or torch have changed: plan anew",
            )

    def differences(self, other: StepPlan) -> Iterator[str]:
        """What another plan decides otherwise, a line for each; inputs before operators."""
        mine, theirs = self._decided(), other._decided()
        for key in ("graph", "batch", "mesh", "stages", "recomputed"):
            if mine[key] != theirs[key]:
                yield f"{key}: {mine[key]} -> {theirs[key]}"
        for key in ("inputs", "outputs", "nodes"):
            for name in dict.fromkeys([*mine[key], *theirs[key]]):
                one, two = mine[key].get(name), theirs[key].get(name)
                if one != two:
                    what = {"inputs": "", "outputs": "output ", "nodes": "operator "}[key]
                    yield f"{what}{name}: {_words(one)} -> {_words(two)}"


def combination_in_words(chosen: Combination) -> list[str]:
    """A signature for each axis, as `S0, B -> S0`."""
    return [
        f"{', '.join(map(repr, s.inputs))} -> "
        f"{', '.join('_' if p is None else repr(p) for p in s.outputs)}"
        for s in chosen
    ]


def read_combination(words: list[str]) -> Combination:
    """What `combination_in_words` gave.

    Raises:
        ValueError: it is none.
    """
    found = []
    for line in words:
        inputs, arrow, outputs = line.partition("->")
        if not arrow:
            raise ValueError(f"{line!r} is no signature: expected such as 'S0, B -> S0'")
        given: list[Any] = []
        for word in outputs.split(","):
            given.append(None if word.strip() == "_" else read_layout(word)[0])
        found.append(Signature(read_layout(inputs), tuple(given)))
    return tuple(found)


def _layer(values: dict[str, Any]) -> Layer:
    parameters = {name: (spec, layout) for name, (spec, layout) in values["parameters"].items()}
    return Layer(**values | {"parameters": parameters})


def _stages(values: dict[str, Any], drawn: Any) -> Stages:
    timeline = tuple(
        tuple((int(m), str(what), float(a), float(b)) for m, what, a, b in stage)
        for stage in drawn["timeline"]
    )
    cuts = tuple(values["cuts"])
    return Stages(**values | {"cuts": cuts, "bubble": drawn["bubble"], "timeline": timeline})


def _memory(values: dict[str, Any]) -> Memory:
    return Memory(
        **values | {"timeline": tuple(values["timeline"]), "largest": tuple(values["largest"])}
    )


def _words(value: Any) -> str:
    if value is None:
        return "nothing"
    return value if isinstance(value, str) else "; ".join(value)
