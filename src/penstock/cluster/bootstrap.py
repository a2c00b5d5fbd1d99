"""What Spark's Python workers run before they have Penstock: it brings its code along.

The functions here travel by value. They may lean on nothing but the standard library until the
shipped code is unpacked and found (`environment.unpack_code`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def by_value(module: str, name: str) -> Any:
    """A function of a module, such that cloudpickle sends its code and not its address.

    The module's source is run once more under a name that nobody can import.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    namespace: dict[str, Any] = {"__name__": "shipped_by_penstock"}
    source = Path(spec.origin).read_bytes()
    exec(compile(source, spec.origin, "exec"), namespace)
    return namespace[name]


def with_code(
    code: bytes, digest: str, unpack: Callable[..., str], target: str, *arguments: Any
) -> Callable[[Any], Iterator[Any]]:
    """A function for `mapInArrow` that finds the shipped code and goes on with `target` in it.

    Arguments:
        code, digest: of `environment.pack_code`.
        unpack: `environment.unpack_code`, by value.
        target: "module:function", called with the folder of the code, the arguments, and the
            batches; gives batches.
    """

    def run(batches: Any) -> Iterator[Any]:
        import importlib
        import sys

        folder = unpack(code, digest)
        # Spark uses its Python workers again: an earlier run may have had other code.
        for name, module in list(sys.modules.items()):
            ours = name == "penstock" or name.startswith("penstock.")
            if ours and not str(getattr(module, "__file__", "")).startswith(folder):
                del sys.modules[name]
        sys.path.insert(0, folder)
        try:
            where, _, function = target.partition(":")
            yield from getattr(importlib.import_module(where), function)(
                folder, *arguments, batches
            )
        finally:
            sys.path.remove(folder)

    return run
