"""Lets an exchange of gradients go on into the next forward: who reads a parameter that is yet to
be updated waits for it first, and for it alone.

Parameters are read through their modules: as attributes, by `parameters()`, by `state_dict()`. All
of these look into a module's own dict, which is replaced by one that says so beforehand; and before
a module's forward it is said for all parameters that it keeps, as some have a list of them
(nn.LSTM). Who has kept a parameter elsewhere, as torch.jit.trace does, reads what the step before
has left of it. Of the optimizer's state, `state_dict` waits.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Sequence, ValuesView
from typing import Any

import torch

from penstock.exchange.agreement import Clip
from penstock.exchange.late_update import step_hooks

Settle = Callable[[torch.nn.Parameter], None]

_EACH_BY_ITSELF = {
    kind
    for name in (
        *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam"),
        *("RAdam", "RMSprop", "Rprop", "SGD"),
    )
    if (kind := getattr(torch.optim, name, None))
}
"""torch's optimizers that update each parameter by its own gradient and state alone."""


def obstacle(network: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: Clip) -> str | None:
    """Why the parameters of a network cannot be updated one after the other; None if they can."""
    if clip.norm is not None:
        return "gradients are clipped by the norm of all of them"
    if type(optimizer) not in _EACH_BY_ITSELF:
        return f"what {type(optimizer).__name__} does with a parameter may depend on the others"
    for group in optimizer.param_groups:
        for key, value in group.items():
            if isinstance(value, torch.Tensor):
                return f"the optimizer's {key} is a tensor, which may change at any time"
    trained = {id(p) for p in network.parameters()}
    if any(id(p) not in trained for group in optimizer.param_groups for p in group["params"]):
        return "the optimizer has a parameter that the network has not"
    if step_hooks(optimizer):
        return "the optimizer has hooks, which expect one step for all parameters"
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
            return f"module {name or 'itself'} of the network is compiled"
        if hasattr(module, "_orig_mod"):
            return "the network is compiled"
    if any(not p.is_cpu for p in network.parameters()):
        return "parameters are not on the CPU"
    return None


def watch(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: Sequence[torch.nn.Parameter],
    settle: Callable[..., None],
) -> None:
    """From now on `settle` is called with each of these parameters before somebody gets it, and
    without any before somebody gets the optimizer's state."""
    known = {id(p) for p in trained}
    for module in network.modules():
        if any(id(p) in known for p in module._parameters.values()):
            module.__dict__["_parameters"] = _Watched(module._parameters, settle)
        module.register_forward_pre_hook(_Before(settle), prepend=True)
    optimizer.register_state_dict_pre_hook(lambda _: settle())


class _Watched(dict[str, "torch.nn.Parameter | None"]):
    """A module's parameters by name."""

    def __init__(self, parameters: Any, settle: Settle) -> None:
        super().__init__(parameters)
        self._settle = settle

    def __getitem__(self, name: str) -> torch.nn.Parameter | None:
        found = super().__getitem__(name)
        if found is not None:
            self._settle(found)
        return found

    def get(self, name: str, default: Any = None) -> Any:
        found = super().get(name, default)
        if isinstance(found, torch.nn.Parameter):
            self._settle(found)
        return found

    def __iter__(self) -> Iterator[str]:
        """Also of who copies the dict."""
        self._settle_all()
        return super().__iter__()

    def setdefault(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else super().setdefault(name, default)

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        self._settle_all()
        return super().values()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        self._settle_all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def _settle_all(self) -> None:
        for parameter in super().values():
            if parameter is not None:
                self._settle(parameter)

    def __reduce__(self) -> Any:
        """Copies, and what is pickled, are of nobody's training."""
        return dict, (self.copy(),)


class _Before:
    """What is called before a module's forward."""

    def __init__(self, settle: Settle) -> None:
        self._settle = settle

    def __call__(self, module: torch.nn.Module, arguments: Any) -> None:
        module._parameters.values()  # are settled
        for value in vars(module).values():
            if isinstance(value, (list, tuple)):
                for kept in value:
                    if isinstance(kept, torch.nn.Parameter):
                        self._settle(kept)

    def __reduce__(self) -> Any:
        return _Nothing, ()


class _Nothing:
    """What is called before the forward of a module's copy."""

    def __call__(self, module: torch.nn.Module, arguments: Any) -> None:
        pass
