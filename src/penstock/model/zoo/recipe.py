"""Marks that let a Job file say what a module was made by."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

from torch import nn

P = ParamSpec("P")


def recipe(function: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """Mark a function of the zoo, and every module it makes, with how YAML says them.

    The function carries `penstock_recipe = "penstock.zoo:lenet"`; a module that it makes carries
    the same, or `{"penstock.zoo:lenet": {"classes": 5}}` where arguments differ from their
    defaults. The mark says the architecture and not the weights: a module has its own, and the
    same words in a Job file give weights drawn under that job's seed.
    """
    name = f"penstock.zoo:{function.__name__}"
    signature = inspect.signature(function)

    @functools.wraps(function)
    def make(*args: P.args, **keywords: P.kwargs) -> nn.Module:
        network = function(*args, **keywords)
        chosen = {
            key: value
            for key, value in signature.bind(*args, **keywords).arguments.items()
            if value != signature.parameters[key].default
        }
        network.__dict__["penstock_recipe"] = {name: chosen} if chosen else name
        return network

    make.__dict__["penstock_recipe"] = name
    return make
