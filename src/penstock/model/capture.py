"""A network, its loss and its optimizer -> the `Graph` of one training step.

    module ──aot_export_joint_with_descriptors──► forward and backward, functional
    optimizer ──make_fx, one parameter at a time──► update nodes, right behind each gradient

Only this file touches torch's private export APIs. Some operators are written by others first, so
that what is left can be split: a mean becomes a sum and a factor, as the factor is of the whole
tensor wherever the sum is taken; batch norm is written with sums over the batch; random operators
become `penstock.uniform` (see `randomness`).

The batch has the size at which the step is captured: sizes are constants in the graph.
"""

from __future__ import annotations

import copy
import operator
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.fx.traceback as fx_traceback
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._functorch._aot_autograd.descriptors import (
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTOutput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from penstock.errors import NetworkError
from penstock.model.clipping import Clipping
from penstock.model.decompositions import DECOMPOSITIONS, fresh_salts
from penstock.model.graph import Graph, Input, Node, Output, Phase, Ref, Role, Spec
from penstock.model.logits import from_logits
from penstock.model.unfold import unfolded
from penstock.model.updates import GRADIENT, PARAMETER, RATE, SAME, SKIPPED, OptimizerMaker, Updates

__all__ = ["Step", "capture"]

Loss = Callable[[Any, Any], torch.Tensor]
Batch = tuple[Any, Any]
SEED = "seed"
VIEWS = {"aten.t.default", "aten.view.default", "aten.transpose.int", "aten.permute.default",
         "aten.unsqueeze.default", "aten.expand.default", "aten._unsafe_view.default"}  # fmt: skip
"""Called twice with the same, they are called once."""
HINT = (
    "a network that is planned computes the same operators for every batch: no `if` or loop over "
    "values of tensors (torch.where, torch.cond), no .item(), no numpy; or train it with "
    "strategy all_reduce, which takes any network"
)
FULL = "aten.full.default"
TOKEN = "a token"
CHECKS = (torch.ops.aten._linalg_check_errors.default,)
"""Raise where numbers are not as expected, and give nothing: left out."""
READABLE = {
    "_local_scalar_dense": "it reads a number out of a tensor",
    "aten.nonzero": "the size of a result depends on values (a mask as index, nonzero)",
    "aten.unique": "the size of a result depends on values (unique)",
    ".numpy()": "it takes a tensor to numpy",
}
"""What torch says, and what it means."""


class Step(nn.Module):
    """A network and its loss as one module.

    Arguments:
        network: from x to its output.
        loss: `(output, y) -> scalar`.
        autocast: the dtype in which forward computes what can be computed so.
    """

    def __init__(self, network: nn.Module, loss: Loss, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.loss, self.autocast = network, loss, autocast

    def forward(self, x: Any, y: Any) -> torch.Tensor:
        if self.autocast is None:
            return self.loss(self.network(x), y)
        with torch.autocast("cpu", self.autocast):
            return self.loss(self.network(x), y)


def capture(
    network: nn.Module,
    loss: Loss,
    batch: Batch,
    optimizer: OptimizerMaker | None = None,
    *,
    autocast: torch.dtype | None = None,
    clipping: Clipping | None = None,
) -> Graph:
    """Captures a training step. The network stays as it is.

    Arguments:
        network: in training mode or not, as the step is to be; on the CPU or on the meta device.
        loss: `(output, y) -> scalar`.
        batch: x and y, (batch, ...), or tensors on the meta device of that shape and dtype; each
            a tensor, or a tuple or dict of tensors.
        optimizer: makes it from the parameters. Without one, gradients are outputs.
        autocast: the dtype in which forward computes what can be computed so (bfloat16).
        clipping: limits to gradients before the optimizer's step.

    Returns:
        The graph; its inputs are named after parameters, `x`, `y` (`x.0`, `x.key` where there are
        several) and `seed`.

    Raises:
        NetworkError: it cannot be captured; names the line of the user's code.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = _Builder(_joint(network, loss, batch, autocast), _first_names(network))
        builder.add_all(batch)
        builder.simplify()
        builder.clip(clipping or Clipping())
        if optimizer is None:
            builder.give_gradients()
        else:
            builder.add_updates(Updates(network, optimizer))
    graph = builder.graph()
    graph.validate()
    return graph


def _first_names(network: nn.Module) -> dict[str, str]:
    """Of each name of a parameter or buffer, the first that the same tensor has."""
    first: dict[int, str] = {}
    tensors = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _joint(network: nn.Module, loss: Loss, batch: Batch, autocast: torch.dtype | None) -> fx.Graph:
    fresh_salts()
    mode = FakeTensorMode()
    step = Step(_fake_module(network, mode), loss, autocast)
    x, y = pytree.tree_map(lambda tensor: mode.from_tensor(_on_cpu(tensor)), batch)
    _name_modules(step.network)
    try:
        with ExitStack() as stack, mode, fx_traceback.preserve_node_meta():
            joint = aot_export_joint_with_descriptors(
                stack, step, (x, y), decompositions=DECOMPOSITIONS
            )
    except NetworkError:
        raise
    except Exception as error:
        line = _line_of(error)
        if "convert all Tensors to FakeTensors" in str(error):
            raise NetworkError(
                f"{line}: cannot be captured: it reads a tensor that is neither a parameter nor a "
                "buffer of the network",
                hint="make it a buffer of its module: self.register_buffer(name, tensor)",
            ) from error
        what = next((w for name, w in READABLE.items() if name in str(error)), str(error))
        raise NetworkError(f"{line}: cannot be captured: {what}", hint=HINT) from error
    return joint.graph_module.graph


def _fake_module(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose tensors have shapes and no memory; shared ones stay shared."""
    memo: dict[int, Any] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                fake = mode.from_tensor(_on_cpu(parameter.detach()))
                memo[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = mode.from_tensor(_on_cpu(buffer.detach()))
    return copy.deepcopy(network, memo)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor


def _name_modules(network: nn.Module) -> None:
    """Has every operator know the innermost module that has called it."""

    def naming(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def named(*args: Any, **kwargs: Any) -> Any:
            with fx_traceback.annotate({"module": name}):
                return forward(*args, **kwargs)

        return named

    for name, module in network.named_modules():
        module.forward = naming(name, module.forward)


def _line_of(error: BaseException) -> str:
    """File and line of the user's code, which is what is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    users = [f for f in frames if not f.filename.startswith(ours) and "<" not in f.filename]
    return f"{users[-1].filename}:{users[-1].lineno}" if users else "the network"


class _Builder:
    """Takes torch's graph over, node by node."""

    def __init__(self, source: fx.Graph, first_names: dict[str, str]) -> None:
        self._source, self._first_names = source, first_names
        self._inputs: list[Input] = []
        self._nodes: list[Node] = []
        self._outputs: list[Output] = []
        self._specs: dict[str, Spec] = {}
        self._constants: dict[str, torch.Tensor] = {}
        self._initial: dict[str, float] = {}
        self._names: dict[fx.Node, str | tuple[str | None, ...]] = {}
        self._views: dict[str, str] = {}
        self._calls: dict[int, int] = {-1: 0}
        self._gradients: dict[str, str] = {}

    def graph(self) -> Graph:
        used = {name for node in self._nodes for name in node.inputs}
        used |= {output.name for output in self._outputs}
        inputs = [i for i in self._inputs if i.name in used or i.role not in ("scalar", "constant")]
        nodes = _without_dead(self._nodes, {output.name for output in self._outputs})
        alive = {name for node in nodes for name in node.outputs if name is not None}
        alive |= {item.name for item in inputs}
        return Graph(
            inputs=tuple(inputs),
            nodes=tuple(nodes),
            outputs=tuple(self._outputs),
            specs={name: spec for name, spec in self._specs.items() if name in alive},
            constants={n: c for n, c in self._constants.items() if n in alive},
            initial=self._initial,
        )

    def add_all(self, batch: Batch) -> None:
        """Inputs, and the nodes of forward and backward."""
        self._input(SEED, "scalar", SEED, Spec((), torch.int64))
        data = iter([*_names_of("x", batch[0]), *_names_of("y", batch[1])])
        self._ones: set[fx.Node] = set()
        for node in self._source.nodes:
            if node.op == "placeholder":
                self._placeholder(node, data)
        for node in self._source.nodes:
            match node.op:
                case "get_attr":
                    self._constant(node)
                case "call_function":
                    self._call(node)
                case "output":
                    self._finish(node)

    def simplify(self) -> None:
        """Takes products over several batch dims, and losses by classes, for what they are."""
        needed = {output.name for output in self._outputs} | {*self._gradients.values()}
        nodes = from_logits(unfolded(self._nodes, self._specs), self._specs, needed)
        self._nodes = _without_dead(nodes, needed)

    def clip(self, clipping: Clipping) -> None:
        """Limits the gradients."""
        clipped = clipping.nodes(self._gradients, self._specs)
        self._nodes += clipped.nodes
        self._specs |= clipped.specs
        self._gradients = clipped.gradients

    def give_gradients(self) -> None:
        for target, name in self._gradients.items():
            self._outputs.append(Output("gradient", target, name))

    def add_updates(self, updates: Updates) -> None:
        """The optimizer's part, behind each gradient."""
        behind: dict[str, list[Node]] = {}
        for target, gradient in self._gradients.items():
            update = updates.of(target, self._specs[target])
            names = {PARAMETER: target, GRADIENT: gradient, RATE: update.rate}
            for key, (spec, initial) in update.state.items():
                of = update.rate if key in update.counters else target
                names[key] = state = f"{of}/{key}"
                if state not in self._specs:
                    self._input(state, "state", state, spec)
                    self._initial[state] = initial
            if update.rate not in self._specs:
                self._input(update.rate, "scalar", update.rate, Spec((), torch.float64))
            placed = update.of(target, names)
            fresh = [node for node in placed.nodes if node.name not in self._specs]
            self._specs |= placed.specs
            behind.setdefault(gradient, []).extend(fresh)
            self._outputs.append(Output("parameter", target, placed.results[PARAMETER]))
            for key in update.state:
                output = Output("state", names[key], placed.results[key])
                if output not in self._outputs:
                    self._outputs.append(output)
        given = {item.name for item in self._inputs}
        nodes = [node for name in behind for node in behind[name] if name in given]
        for node in self._nodes:
            nodes.append(node)
            for name in node.outputs:
                nodes += behind.get(name, []) if name is not None else []
        self._nodes = _in_order(nodes, given)

    def _input(self, name: str, role: Role, target: str, spec: Spec) -> None:
        self._inputs.append(Input(name, role, target))
        self._specs[name] = spec

    def _placeholder(self, node: fx.Node, data: Iterator[str]) -> None:
        described, spec = node.meta["desc"], Spec.of(node.meta["val"])
        if isinstance(described, ParamAOTInput | BufferAOTInput):
            target = self._target(described)
            role: Role = "parameter" if isinstance(described, ParamAOTInput) else "buffer"
            if target not in self._specs:  # shared ones come once for each of their names
                self._input(target, role, target, spec)
            self._names[node] = target
        elif "Tangent" in type(described).__name__:
            self._ones.add(node)
        elif "Token" in type(described).__name__:  # orders what has effects
            self._names[node] = TOKEN
        else:
            name = next(data)
            self._input(name, "data", name, spec)
            self._names[node] = name

    def _constant(self, node: fx.Node) -> None:
        value: Any = self._source.owning_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, FakeTensor) and value.constant is not None:
            value = value.constant
        if isinstance(value, FakeTensor):
            raise NetworkError(
                f"a tensor of {Spec.of(value)} that is neither parameter nor buffer",
                hint="register it as a buffer of its module (register_buffer)",
            )
        self._input(node.name, "constant", node.name, Spec.of(value))
        self._constants[node.name] = value.detach().clone()
        self._names[node] = node.name

    def _call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, number = node.args
            self._names[node] = cast("Any", self._names[source][number])  # type: ignore[index]
            return
        if node.target is torch.ops.higher_order.with_effects and node.args[1] in CHECKS:
            self._names[node] = (TOKEN,)
            return
        op = _name_of(node)
        value = node.meta["val"]
        phase: Phase = (
            "backward" if node.meta.get("partitioner_tag") == "is_backward" else "forward"
        )
        if op in SAME or (op == "aten.clone.default" and not node.kwargs):
            self._names[node] = self._names[cast("fx.Node", node.args[0])]
            return
        args, kwargs = self._argument(node.args), self._argument(dict(node.kwargs))
        if (filled := _filling(op, args)) is not None:  # of a shape, and not of another tensor
            spec = Spec.of(value)
            op, args, kwargs = FULL, (spec.shape, filled), {"dtype": spec.dtype}
        if op == "penstock.uniform.default":
            args = (Ref(SEED), *args[1:])
        values = value if isinstance(value, tuple | list) else (value,)
        outputs = _output_names(node.name, values)
        made = Node(
            node.name,
            op,
            args,
            kwargs,
            outputs,
            phase,
            node.meta.get("custom", {}).get("module", ""),
            self._calls.setdefault(node.meta.get("seq_nr", -1), len(self._calls)),
        )
        if op in VIEWS:
            key = f"{op}{made.args}"
            if key in self._views:
                self._names[node] = self._views[key]
                return
            self._views[key] = node.name
        self._names[node] = outputs if isinstance(value, tuple | list) else node.name
        for name, item in zip(outputs, values, strict=True):
            if name is not None:
                self._specs[name] = Spec.of(item)
        self._nodes.append(made)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in self._ones:
                self._one(value)
            name = self._names[value]
            assert isinstance(name, str)
            return Ref(name)
        if isinstance(value, tuple | list):
            return tuple(self._argument(item) for item in value)
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items() if key not in SKIPPED}
        if isinstance(value, torch.SymInt):
            return int(value)
        return value

    def _one(self, node: fx.Node) -> None:
        """The gradient of the loss by itself."""
        if node not in self._names:
            spec = Spec.of(node.meta["val"])
            args = (spec.shape, 1.0)
            made = Node("one", FULL, args, {"dtype": spec.dtype}, ("one",), "backward")
            self._nodes.append(made)
            self._specs["one"] = spec
            self._names[node] = "one"

    def _finish(self, node: fx.Node) -> None:
        (results,) = node.args
        for result, described in zip(
            cast("Sequence[Any]", results), node.meta["desc"], strict=True
        ):
            if result is None:
                continue
            name = self._names[result]
            assert isinstance(name, str)
            if isinstance(described, PlainAOTOutput):
                self._outputs.append(Output("loss", "", name))
            elif isinstance(described, InputMutationAOTOutput):
                target = self._target(described.mutated_input)
                self._outputs.append(Output("buffer", target, name))
            elif isinstance(described, GradAOTOutput) and isinstance(
                described.grad_of, ParamAOTInput
            ):
                self._add_gradient(self._target(described.grad_of), name)

    def _target(self, described: Any) -> str:
        return self._first_names[described.target.removeprefix("network.")]

    def _add_gradient(self, target: str, name: str) -> None:
        """The gradient of a shared parameter is the sum of those at its places."""
        if target in self._gradients:
            both = Ref(self._gradients[target]), Ref(name)
            name = f"{target}:sum of {len(self._nodes)}"
            self._nodes.append(Node(name, "aten.add.Tensor", both, {}, (name,), "backward"))
            self._specs[name] = self._specs[target]
        self._gradients[target] = name


def _filling(op: str, args: tuple[Any, ...]) -> Any:
    """The number with which an operator fills a tensor that is like another; None for others."""
    name = op.split(".")[1]
    if name in ("zeros_like", "new_zeros", "ones_like", "new_ones"):
        return 1 if "ones" in name else 0
    if name == "full_like":
        return args[1]
    return args[2] if name == "new_full" else None


def _names_of(name: str, value: Any) -> list[str]:
    """The tensor's, or those of a tuple's or dict's, in torch's order."""
    found = pytree.tree_flatten_with_path(value)[0]
    keys = [[getattr(key, "idx", getattr(key, "key", key)) for key in path] for path, _ in found]
    return [".".join([name, *map(str, path)]) for path in keys]


def _name_of(node: fx.Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        raise NetworkError(
            f"{node.meta.get('custom', {}).get('module', 'the network')}: calls {node.target}, "
            "which is not an operator of tensors",
            hint=HINT,
        )
    return str(node.target)


def _output_names(name: str, values: Sequence[Any]) -> tuple[str | None, ...]:
    if len(values) == 1:
        return (name,)
    return tuple(
        f"{name}.{number}" if isinstance(value, torch.Tensor) else None
        for number, value in enumerate(values)
    )


def _in_order(nodes: Sequence[Node], known: set[str]) -> list[Node]:
    """With shared numbers in front of the first that reads them."""
    giving = {name: node for node in nodes for name in node.outputs if name is not None}
    ordered: list[Node] = []
    known = set(known)

    def place(node: Node) -> None:
        for name in node.inputs:
            if name not in known:
                place(giving[name])
        if not known.issuperset(name for name in node.outputs if name is not None):
            known.update(name for name in node.outputs if name is not None)
            ordered.append(node)

    for node in nodes:
        place(node)
    return ordered


def _without_dead(nodes: Sequence[Node], needed: set[str]) -> list[Node]:
    """Without nodes, and without outputs, that nobody reads."""
    kept: list[Node] = []
    needed = set(needed)
    for node in reversed(nodes):
        if not any(output in needed for output in node.outputs):
            continue
        needed |= set(node.inputs)
        kept.append(node)
    return kept[::-1]
