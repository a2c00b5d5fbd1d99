"""Imports point one way, and the public names are those that `__all__` says."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import penstock

SOURCE = Path(penstock.__file__).parent

BASE = {"errors", "token", "section", "parts", "spec", "jobfile", "job"}
"""Modules directly under the package; their own order is in `ORDER`."""

ORDER = ["errors", "token", "section", "spec", "parts", "jobfile", "job"]

ALLOWED = {
    "model": BASE,
    "exchange": BASE,
    "feed": BASE,
    "cluster": BASE,
    "watch": BASE,
    "plan": BASE | {"model", "exchange", "feed"},
    "runtime": BASE | {"model", "exchange", "feed", "cluster", "watch", "plan"},
    "testing": BASE | {"model", "exchange", "feed", "cluster", "watch", "plan", "runtime"},
    "torch_backend": {"exchange"},
    "demo": set[str](),
    "cli": BASE | {"model", "exchange", "feed", "cluster", "watch", "plan", "runtime"},
}

UPWARD = {("job", "runtime")}
"""The exception: a Job knows how it is run only by handing itself over (in `Job.run`)."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The parts of penstock that a file imports, and whether only a type checker does."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.body:
                inner.for_types = True  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [module]
            if module == "penstock":
                names = [f"penstock.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "penstock" and len(parts) > 1:
                yield parts[1], getattr(node, "for_types", False)


def wrong(part: str, imported: str) -> bool:
    if part in BASE:
        if imported in BASE:
            return ORDER.index(imported) > ORDER.index(part)
        return (part, imported) not in UPWARD
    return imported != part and imported not in ALLOWED[part]


def test_imports_point_one_way() -> None:
    files = [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]
    assert len(files) > 40
    bad = []
    for path in files:
        part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for imported, for_types in imports(path):
            if not for_types and wrong(part, imported):
                bad.append(f"{path.relative_to(SOURCE)} imports penstock.{imported}")
    assert bad == []


@pytest.mark.parametrize(
    ("part", "imported"), [("feed", "runtime"), ("errors", "job"), ("cluster", "exchange")]
)
def test_a_wrong_import_would_be_found(part: str, imported: str) -> None:
    assert wrong(part, imported)


def test_public_names() -> None:
    assert penstock.__all__ == sorted(penstock.__all__, key=str)
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None
    assert dir(penstock) == penstock.__all__
    with pytest.raises(AttributeError, match="has no attribute 'jobs'"):
        penstock.jobs  # noqa: B018


@pytest.mark.parametrize("package", ["exchange", "feed", "watch", "plan", "model.zoo", "cli"])
def test_packages_say_what_is_public(package: str) -> None:
    module = importlib.import_module(f"penstock.{package}")
    assert module.__all__
    for name in module.__all__:
        assert hasattr(module, name)


def test_importing_starts_nothing_and_is_fast() -> None:
    """`import penstock`, and the command's help, do without torch; nothing starts a thread."""
    code = (
        "import os, sys, penstock, penstock.cli\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
        "import penstock.runtime.driver, penstock.runtime.loop\n"
        "assert 'torch' in sys.modules\n"
        "for name in ('torch._dynamo', 'tensorflow', 'pyarrow', 'pandas', 'sklearn'):\n"
        "    assert name not in sys.modules, name\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
    )
    environment = {"OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
