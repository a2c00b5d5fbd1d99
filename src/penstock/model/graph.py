"""`Graph`: one training step as operators and tensors, with nothing hidden in either.

Operators hold no state: parameters, buffers and the optimizer's state are inputs, and their new
values are outputs. All operators are functional, so that any of them may run anywhere, once or
twice, as soon as what it reads is there:

    inputs ──► forward nodes ──► loss ──► backward nodes ──► gradients ──► update nodes ──► outputs

A node calls an operator of torch by its full name (`aten.mm.default`). Where an argument is a
tensor stands a `Ref` to its name; all else is a constant. A node of one output gives a tensor of
the node's name; the k-th of several is `name.k`. Random numbers come from `penstock.uniform`, which
is a function of a seed and of where an element lies in its tensor (see `randomness`).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from penstock.errors import NetworkError

Role = Literal["parameter", "buffer", "state", "data", "scalar", "constant"]
"""What an input is. `data` are the tensors of a batch, `scalar` what changes from step to step (the
seed, learning rates), `state` the optimizer's (target: the parameter, a slash, and the key)."""
Result = Literal["loss", "output", "parameter", "buffer", "state", "gradient"]
Phase = Literal["forward", "backward", "update"]


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclass(frozen=True)
class Ref:
    """In a node's arguments, the tensor of this name."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Input:
    """A tensor that a step is given.

    Arguments:
        name: of the tensor.
        role, target: what it is, and which: a parameter's name, a state's.
    """

    name: str
    role: Role
    target: str


@dataclass(frozen=True)
class Output:
    """A tensor that a step gives: the new value of `target`, or its gradient, or the loss."""

    role: Result
    target: str
    name: str


@dataclass(frozen=True)
class Node:
    """A call of an operator.

    Arguments:
        name: of the call; of its tensor, if it gives one.
        op: full name of the operator.
        args, kwargs: as the operator takes them, `Ref` for a tensor.
        outputs: names of the tensors it gives; None for one that is not computed.
        phase: of the step.
        module: path of the module whose forward has called it; also in backward.
        call: number of the call that autograd has recorded: a backward node has that of the forward
            nodes that it is the backward of. 0 where nothing is known of it.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[str | None, ...]
    phase: Phase
    module: str = ""
    call: int = 0

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the tensors it reads, in order of their appearance; one read twice is twice."""
        return tuple(ref.name for ref in refs((self.args, dict(self.kwargs))))

    @property
    def function(self) -> Callable[..., Any]:
        return operator_of(self.op)

    def with_tensors(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments with these in place of `inputs`."""
        left = iter(tensors)
        args, kwargs = replaced((self.args, dict(self.kwargs)), lambda _: next(left))
        return args, kwargs

    def results(self, returned: Any) -> dict[str, torch.Tensor]:
        """What its operator has returned, by name."""
        values = returned if isinstance(returned, tuple | list) else (returned,)
        named = zip(self.outputs, values, strict=True)
        return {name: value for name, value in named if name is not None}


@dataclass(frozen=True, eq=False)
class Graph:
    """A training step.

    Arguments:
        inputs, outputs: what it is given, and gives.
        nodes: in an order in which they can run.
        specs: of every tensor, by name.
        constants: values of the inputs of that role, by name.
        initial: by name of a state's input, the number that all its elements begin with.
    """

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    specs: Mapping[str, Spec]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    initial: Mapping[str, float] = field(default_factory=dict)

    @functools.cached_property
    def producer(self) -> Mapping[str, tuple[Node, int]]:
        """Of every tensor that a node gives, the node and which of its outputs it is."""
        return {
            name: (node, number)
            for node in self.nodes
            for number, name in enumerate(node.outputs)
            if name is not None
        }

    @functools.cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """Of every tensor that a node reads, those nodes in order, each once."""
        found: dict[str, dict[str, Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found.setdefault(name, {})[node.name] = node
        return {name: tuple(nodes.values()) for name, nodes in found.items()}

    def input(self, role: Role, target: str) -> Input:
        """The input of a role and target; KeyError if there is none."""
        return self._inputs[role, target]

    def output(self, role: Result, target: str = "") -> Output:
        """The output of a role and target; KeyError if there is none."""
        return self._outputs[role, target]

    @functools.cached_property
    def _inputs(self) -> dict[tuple[Role, str], Input]:
        return {(i.role, i.target): i for i in self.inputs}

    @functools.cached_property
    def _outputs(self) -> dict[tuple[Result, str], Output]:
        return {(o.role, o.target): o for o in self.outputs}

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One step, by one process: from the inputs' names to the outputs' names.

        Constants need not be given. Tensors are forgotten after their last use.
        """
        values = dict(self.constants) | dict(tensors)
        last = {name: node.name for node in self.nodes for name in node.inputs}
        kept = {output.name for output in self.outputs}
        with torch.no_grad():
            for node in self.nodes:
                args, kwargs = node.with_tensors([values[name] for name in node.inputs])
                values |= node.results(node.function(*args, **kwargs))
                made = [name for name in node.outputs if name is not None]
                for name in {*node.inputs, *made} - kept:
                    if last.get(name, node.name) == node.name:
                        del values[name]
        return {output.name: values[output.name] for output in self.outputs}

    def validate(self) -> None:
        """Checks the whole: names, order, roles, and the shape and dtype of every node's results.

        Raises:
            NetworkError: names the node and the tensor.
        """
        known: dict[str, str] = {}
        for item in self.inputs:
            _check(item.name not in known, f"two inputs are called {item.name!r}")
            known[item.name] = "input"
        for node in self.nodes:
            for name in node.inputs:
                _check(name in known, f"{node.name} reads {name!r} before it is there")
            for output in node.outputs:
                if output is not None:
                    _check(output not in known, f"{node.name} gives {output!r} a second time")
                    known[output] = node.name
        _check(known.keys() == self.specs.keys(), "specs are of other tensors than there are")
        for result in self.outputs:
            what = f"{result.role} {result.target}".strip()
            _check(result.name in known, f"the output {what} is {result.name!r}: no such tensor")
            if result.role in ("parameter", "buffer", "state"):
                given = self._inputs.get((result.role, result.target))
                _check(given is not None, f"the output {what} is of no input")
                assert given is not None
                same = self.specs[given.name] == self.specs[result.name]
                specs = f"{self.specs[given.name]}, and {self.specs[result.name]} after the step"
                _check(same, f"{what} is {specs}")
        self._check_specs()

    def _check_specs(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(), torch.no_grad():
            made = {
                name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in self.specs.items()
            }
            for node in self.nodes:
                args, kwargs = node.with_tensors([made[name] for name in node.inputs])
                try:
                    returned = node.function(*args, **kwargs)
                except Exception as error:
                    raise NetworkError(f"not a graph: {node.name} ({node.op}): {error}") from error
                for name, value in node.results(returned).items():
                    found = Spec.of(value)
                    _check(
                        found == self.specs[name],
                        f"{node.name} ({node.op}) gives {found}, and not {self.specs[name]}",
                    )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits; equal for equal steps, in whichever process."""
        digest = hashlib.sha256()
        for line in self.lines():
            digest.update(line.encode() + b"\n")
        for name in sorted(self.constants):
            digest.update(self.constants[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def lines(self) -> Iterator[str]:
        """The whole as text, a line for each input, node and output."""
        for item in self.inputs:
            yield f"{item.role} {item.target} -> {self._words(item.name)}"
        for node in self.nodes:
            given = ", ".join(
                [*map(_constant, node.args)]
                + [f"{k}={_constant(v)}" for k, v in sorted(node.kwargs.items())]
            )
            results = ", ".join("_" if o is None else self._words(o) for o in node.outputs)
            yield f"{node.phase} {node.module or '-'}: {node.op}({given}) -> {results}"
        for result in self.outputs:
            yield f"{result.role} {result.target} <- %{result.name}"

    def _words(self, name: str) -> str:
        return f"%{name} {self.specs[name]}"


def operator_of(name: str) -> Callable[..., Any]:
    """The operator of a full name, as `aten.mm.default`.

    Raises:
        NetworkError: this torch has none of that name.
    """
    found: Any = torch.ops
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise NetworkError(
            f"torch {torch.__version__} has no operator {name!r}",
            hint="the graph is of another version of torch, or the operator's library is not "
            "imported",
        ) from error
    operator: Callable[..., Any] = found
    return operator


def refs(value: Any) -> Iterator[Ref]:
    """The references in arguments, in order."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from refs(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from refs(item)


def replaced(value: Any, by: Callable[[Ref], Any]) -> Any:
    """Arguments with something in place of each reference."""
    if isinstance(value, Ref):
        return by(value)
    if isinstance(value, tuple | list):
        return type(value)(replaced(item, by) for item in value)
    if isinstance(value, dict):
        return {key: replaced(item, by) for key, item in value.items()}
    return value


def _constant(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_constant, value))}]"
    return repr(value)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise NetworkError(f"not a graph: {message}")
