"""An optimizer -> the nodes that update one parameter.

Any optimizer of torch's kind whose step is tensors' operators: it is let make a step of one
parameter, and what it calls is recorded. The learning rate and the number of the step are tensors,
so that they are not constants in what is recorded: `_Numbers` has what takes numbers take them.
What has been recorded is then compared with some steps of the optimizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from penstock.errors import NetworkError
from penstock.model.graph import Node, Ref, Spec, replaced

OptimizerMaker = Callable[[Any], torch.optim.Optimizer]
SAME = frozenset({"aten.detach.default", "aten.alias.default", "aten.lift_fresh_copy.default"})
"""What gives back what it is given."""
SKIPPED = frozenset({"device", "pin_memory", "layout"})
"""Where a tensor is made is said by the plan."""
PARAMETER, GRADIENT, RATE = "param", "grad", "lr"
COUNTED = ("step", "mu_product", "mu", "eta")
"""State without dims, which is kept in float64."""
INITIAL = {"mu_product": 1.0, "mu": 1.0}
"""State that an optimizer makes in its first step, and not of zeros."""
HINT = "torch.optim's SGD, Adam, AdamW, Adagrad, RMSprop, NAdam, Adamax and Adadelta can be"


@dataclass(frozen=True)
class Update:
    """The update of a parameter: nodes with inputs `param`, `grad`, `lr` and the state's keys.

    Arguments:
        nodes: what is called.
        results: by key (`param` and the state's), the tensor that is its new value.
        specs: of the tensors that nodes give.
        state: by key, its spec and the number that it begins with.
        rate: name of the learning rate's input.
        counters: keys of the state that counts steps, the same for all parameters.
    """

    nodes: tuple[Node, ...]
    results: Mapping[str, str]
    specs: Mapping[str, Spec]
    state: Mapping[str, tuple[Spec, float]]
    rate: str
    counters: frozenset[str]

    def of(self, target: str, names: Mapping[str, str]) -> Placed:
        """For one parameter, whose inputs have these names.

        What follows from counters and the learning rate alone is the same for all parameters.
        """
        shared = self._shared()

        def called(name: str) -> str:
            return names.get(name) or f"{self.rate if name in shared else target}:{name}"

        nodes = []
        for node in self.nodes:
            args, kwargs = replaced(
                (node.args, dict(node.kwargs)), lambda ref: Ref(called(ref.name))
            )
            name = called(node.name)
            module = target.rpartition(".")[0]
            nodes.append(
                replace(node, name=name, args=args, kwargs=kwargs, outputs=(name,), module=module)
            )
        results = {key: called(name) for key, name in self.results.items()}
        specs = {called(name): spec for name, spec in self.specs.items()}
        return Placed(nodes, results, specs)

    def _shared(self) -> set[str]:
        shared = {RATE, *self.counters}
        for node in self.nodes:
            if shared.issuperset(node.inputs):
                shared.add(node.name)
        return shared


@dataclass(frozen=True)
class Placed:
    """An update as part of a graph: see `Update`."""

    nodes: list[Node]
    results: Mapping[str, str]
    specs: Mapping[str, Spec]


class Updates:
    """What an optimizer does to each parameter.

    Arguments:
        network: whose parameters are optimized.
        optimizer: makes it from them.
    """

    def __init__(self, network: nn.Module, optimizer: OptimizerMaker) -> None:
        self._parameters = dict(network.named_parameters(remove_duplicate=False))
        made = optimizer([p for p in network.parameters() if p.requires_grad])
        self._kind = type(made)
        self._groups = {
            id(parameter): (number, {k: v for k, v in group.items() if k != "params"})
            for number, group in enumerate(made.param_groups)
            for parameter in group["params"]
        }
        self._alike: dict[Any, Update] = {}

    def of(self, target: str, spec: Spec) -> Update:
        """The update of a parameter; those of one spec and group share it.

        Raises:
            NetworkError: the optimizer cannot be captured.
        """
        number, options = self._groups[id(self._parameters[target])]
        if (number, spec) not in self._alike:
            try:
                update = _recorded(self._kind, options, f"lr.{number}", spec)
                _compare(self._kind, options, update, spec)
            except NetworkError:
                raise
            except Exception as error:
                raise NetworkError(
                    f"optimizer {self._kind.__name__}: cannot be captured: {error}", hint=HINT
                ) from error
            self._alike[number, spec] = update
        return self._alike[number, spec]


def _recorded(kind: Any, options: Mapping[str, Any], rate: str, spec: Spec) -> Update:
    state = _state_of(kind, options, spec)

    def step(
        param: torch.Tensor, grad: torch.Tensor, lr: torch.Tensor, *values: Any
    ) -> list[torch.Tensor]:
        param = param.clone()
        given = {key: value.clone() for key, value in zip(state, values, strict=True)}
        optimizer = _made(kind, options, param, lr, given)
        param.grad = grad
        _step(optimizer)
        return [param.detach(), *(optimizer.state[param][key].detach() for key in state)]

    specs = [spec, spec, Spec((), torch.float64), *(of for of, _ in state.values())]
    with FakeTensorMode():
        fakes = [torch.empty(of.shape, dtype=of.dtype) for of in specs]
        module = make_fx(step)(*fakes)
    return _read(module, [PARAMETER, GRADIENT, RATE, *state], state, rate)


def _read(
    module: fx.GraphModule,
    inputs: list[str],
    state: Mapping[str, tuple[Spec, float]],
    rate: str,
) -> Update:
    names: dict[fx.Node, str] = {}
    nodes: list[Node] = []
    specs: dict[str, Spec] = {}
    results: dict[str, str] = {}

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return Ref(names[value])
        return tuple(map(argument, value)) if isinstance(value, tuple | list) else value

    given = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            names[node] = next(given)
        elif node.op == "output":
            keys = [key for key in inputs if key not in (GRADIENT, RATE)]
            results = {k: names[v] for k, v in zip(keys, node.args[0], strict=True)}
        elif node.op == "get_attr":
            continue  # of what the optimizer makes anew, in place of which stands its state
        elif str(node.target) in SAME or str(node.target) == "aten.clone.default":
            if node.args[0] in names:
                names[node] = names[node.args[0]]
        else:
            names[node] = node.name
            args = argument(node.args)
            kwargs = {k: argument(v) for k, v in node.kwargs.items() if k not in SKIPPED}
            op = _functional(node.target)
            nodes.append(Node(node.name, op, args, kwargs, (node.name,), "update"))
            specs[node.name] = Spec.of(node.meta["val"])
    counters = frozenset(key for key in state if key in COUNTED)
    return Update(tuple(nodes), results, specs, state, rate, counters)


def _functional(operator: Any) -> str:
    """The operator that gives what this one writes into its first argument.

    What is written into is a clone of an input, of which there are no views.
    """
    library, name, overload = str(operator).split(".")
    return f"{library}.{name.removesuffix('_')}.{overload}"


def _made(
    kind: Any, options: Mapping[str, Any], param: torch.Tensor, lr: Any, state: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of one parameter, which steps by tensors' operators alone."""
    optimizer: torch.optim.Optimizer = kind([param], lr=options["lr"])
    plain = dict(options) | {"foreach": False, "fused": False, "capturable": True, "lr": lr}
    group = optimizer.param_groups[0]
    group.update({k: v for k, v in plain.items() if k in group})
    if state:
        optimizer.state[param] = dict(state)
    return optimizer


class _Numbers(TorchFunctionMode):
    """Lets tensors without dims stand where optimizers give operators numbers."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.item:
            return args[0]
        factor = kwargs.get("alpha", kwargs.get("value"))
        if isinstance(factor, torch.Tensor):
            into, *others = args
            if function is torch.Tensor.add_:
                return into.add_(others[0] * factor)
            if function is torch.Tensor.addcmul_:
                return into.add_(others[0] * others[1] * factor)
            if function is torch.Tensor.addcdiv_:
                return into.add_(others[0] / others[1] * factor)
        return function(*args, **kwargs)


def _step(optimizer: torch.optim.Optimizer) -> None:
    """As for a compiler: with no number read out of a tensor."""
    step = getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        with torch.no_grad(), _Numbers():
            step(optimizer)
    finally:
        torch.compiler._is_compiling_flag = before


def _state_of(kind: Any, options: Mapping[str, Any], spec: Spec) -> dict[str, tuple[Spec, float]]:
    """By key of what the optimizer keeps, its spec and the number that it begins with."""
    param = torch.zeros((1,) * len(spec.shape), dtype=spec.dtype)
    optimizer = _made(kind, options, param, options["lr"], {})
    before = {k: v.clone() for k, v in optimizer.state[param].items() if torch.is_tensor(v)}
    param.grad = torch.zeros_like(param)
    _step(optimizer)
    found: dict[str, tuple[Spec, float]] = {}
    for key, value in optimizer.state[param].items():
        if torch.is_tensor(value):
            initial = float(before[key].flatten()[0]) if key in before else INITIAL.get(key, 0.0)
            counted = key in COUNTED
            alike = Spec((), torch.float64) if counted else Spec(spec.shape, value.dtype)
            found[key] = alike, initial
    return found


def _compare(kind: Any, options: Mapping[str, Any], update: Update, spec: Spec) -> None:
    """Three steps of the nodes beside three of the optimizer itself.

    Sizes in the nodes are those of the parameter, and no optimizer of this kind reads them.

    Raises:
        NetworkError: they differ.
    """
    size = (2,) * len(spec.shape)
    random = torch.Generator().manual_seed(0)
    param = torch.randn(size, generator=random, dtype=torch.float64).to(spec.dtype)
    param.requires_grad_()
    values = {
        PARAMETER: param.detach().clone(),
        RATE: torch.tensor(float(options["lr"]), dtype=torch.float64),
    }
    for key, (of, initial) in update.state.items():
        values[key] = torch.full(size if of.shape == spec.shape else (), initial, dtype=of.dtype)
    theirs = kind([param], lr=options["lr"])
    theirs.param_groups[0].update(options)
    for _ in range(3):
        param.grad = torch.randn(size, generator=random, dtype=torch.float64).to(spec.dtype)
        theirs.step()
        values[GRADIENT] = param.grad
        given = dict(values)
        with torch.no_grad():
            for node in update.nodes:
                args, kwargs = node.with_tensors([given[name] for name in node.inputs])
                given |= node.results(node.function(*args, **kwargs))
        values |= {key: given[name] for key, name in update.results.items()}
    if not torch.allclose(values[PARAMETER], param, rtol=1e-4, atol=1e-6):
        raise NetworkError(
            f"optimizer {kind.__name__}: cannot be captured: it steps otherwise than what was "
            "recorded of it",
            hint=HINT,
        )
