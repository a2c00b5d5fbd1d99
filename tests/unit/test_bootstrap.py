"""Code that travels by value, and finds the rest of its code where Penstock is not installed."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from penstock.cluster.bootstrap import by_value, with_code
from penstock.cluster.environment import pack_code
from penstock.cluster.node import facts, size

MODULE = """
    VERSION = {version!r}

    def double(folder, by, batches):
        for batch in batches:
            yield batch * by

    def fail(folder, message, batches):
        yield 1
        raise ValueError(message)

    def where(folder, batches):
        import sys, penstock.part
        yield sys.path[0] == folder, penstock.part.VERSION, penstock.part.__file__[:len(folder)]
"""


def packed(files: Mapping[str, str]) -> tuple[bytes, str]:
    """An archive as `pack_code` makes it, and its digest."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, textwrap.dedent(text))
    return stream.getvalue(), hashlib.sha256(stream.getvalue()).hexdigest()


def made_up(version: str) -> tuple[bytes, str]:
    """A made-up Penstock of one module."""
    return packed({"penstock/__init__.py": "", "penstock/part.py": MODULE.format(version=version)})


def shipped(version: str, target: str, *arguments: Any) -> Callable[[Any], Any]:
    unpack = by_value("penstock.cluster.environment", "unpack_code")
    return with_code(*made_up(version), unpack, f"penstock.part:{target}", *arguments)


class Node:
    """A machine whose Python has the standard library and cloudpickle, as Spark's workers do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        spec = importlib.util.find_spec("cloudpickle")
        assert spec is not None
        assert spec.origin is not None
        (folder / "site").mkdir()
        (folder / "site/cloudpickle").symlink_to(Path(spec.origin).parent)

    def run(self, code: str, *sent: Any) -> list[str]:
        """The lines that code prints, which has what was sent as `sent`."""
        (self.folder / "sent").write_bytes(cloudpickle.dumps(sent))
        head = f"""
import pickle, sys
sys.path.append({str(self.folder / "site")!r})
with open({str(self.folder / "sent")!r}, "rb") as file:
    sent = pickle.load(file)
"""
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", head + textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(self.folder / "cache")},
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.splitlines()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


# By value


def test_code_is_sent_and_no_address(node: Node) -> None:
    gather = by_value("penstock.cluster.node", "facts")
    assert b"penstock.cluster.node" not in cloudpickle.dumps(gather)
    printed = node.run("print(sent[0]()['python'], 'penstock' in sys.modules)", gather)
    assert printed == [f"{'.'.join(map(str, sys.version_info[:3]))} False"]
    assert gather().keys() == facts().keys()


def test_an_address_would_not_be_found(node: Node) -> None:
    with pytest.raises(RuntimeError, match="No module named 'penstock'"):
        node.run("sent[0]()", facts)


def test_what_a_function_leans_on_in_its_module_goes_along(node: Node) -> None:
    """Though another function of the module may not."""
    print_size = by_value("penstock.cluster.node", "size")
    assert print_size is not size
    assert node.run("print(sent[0](412_000))", print_size) == ["412 KB"]


def test_a_module_or_function_that_is_not_there() -> None:
    with pytest.raises(ModuleNotFoundError):
        by_value("penstock.no_such_module", "f")
    with pytest.raises(KeyError, match="no_such_function"):
        by_value("penstock.cluster.node", "no_such_function")


# With code


def test_a_target_in_shipped_code_takes_the_batches(node: Node) -> None:
    printed = node.run(
        """
        before = list(sys.path)
        print(list(sent[0](iter([1, 2, 3]))))
        assert sys.path == before
        print(list(sent[1]([])), sys.path == before)
        """,
        shipped("new", "double", 2),
        shipped("new", "where"),
    )
    assert printed[0] == "[2, 4, 6]"
    folder = node.folder / "cache/penstock" / f"code-{made_up('new')[1]}"
    assert printed[1] == f"[(True, 'new', {str(folder)!r})] True"


def test_batches_are_taken_one_by_one(node: Node) -> None:
    """A partition may be larger than memory."""
    printed = node.run(
        """
        def batches():
            for n in range(3):
                print("read", n)
                yield n
        for batch in sent[0](batches()):
            print("wrote", batch)
        """,
        shipped("new", "double", 2),
    )
    assert printed == ["read 0", "wrote 0", "read 1", "wrote 2", "read 2", "wrote 4"]


OLDER = """
import os
old = {folder!r}
os.makedirs(old + "/penstock")
os.makedirs(old + "/penstocks")
for name in ("penstock/__init__", "penstock/stale", "penstocks/__init__"):
    open(f"{{old}}/{{name}}.py", "w").close()
with open(old + "/penstock/part.py", "w") as file:
    file.write("VERSION = 'old'")
sys.path.insert(0, old)
import penstock.part, penstock.stale, penstocks
assert penstock.part.VERSION == "old"
"""


def test_an_older_penstock_is_forgotten(node: Node) -> None:
    """Spark uses its Python workers again, and nodes may have a version of their own."""
    printed = node.run(
        OLDER.format(folder=str(node.folder / "old"))
        + textwrap.dedent("""
        before = list(sys.path)
        print(list(sent[0]([]))[0][:2], "penstock.stale" in sys.modules, "penstocks" in sys.modules)
        print(list(sent[1]([]))[0][:2])
        assert sys.path == before
        """),
        shipped("new", "where"),
        shipped("newer", "where"),
    )
    assert printed == ["(True, 'new') False True", "(True, 'newer')"]


def test_the_same_code_is_not_imported_again(node: Node) -> None:
    printed = node.run(
        """
        list(sent[0]([]))
        first = sys.modules["penstock.part"]
        list(sent[0]([]))
        print(sys.modules["penstock.part"] is first)
        """,
        shipped("new", "where"),
    )
    assert printed == ["True"]


def test_the_path_is_as_it_was_after_an_exception_and_after_being_closed(node: Node) -> None:
    printed = node.run(
        """
        before = list(sys.path)
        failing, unfinished, missing = (each([1, 2]) for each in sent)
        assert sys.path == before, "nothing happens before the first batch is asked for"
        for generator in (failing, unfinished):
            next(generator)
            assert sys.path[1:] == before
            try:
                print(next(generator))
            except ValueError as error:
                print("raised", error)
            generator.close()
            assert sys.path == before
        try:
            next(missing)
        except AttributeError as error:
            print(error)
        assert sys.path == before
        """,
        shipped("new", "fail", "bad batch"),
        shipped("new", "double", 2),
        shipped("new", "no_such_function"),
    )
    assert printed == [
        "raised bad batch",
        "4",
        "module 'penstock.part' has no attribute 'no_such_function'",
    ]


def test_damaged_code_is_not_run(node: Node) -> None:
    data, digest = made_up("new")
    unpack = by_value("penstock.cluster.environment", "unpack_code")
    damaged = with_code(data[:-1] + b"x", digest, unpack, "penstock.part:double", 2)
    printed = node.run(
        """
        before = list(sys.path)
        try:
            list(sent[0]([1]))
        except ValueError as error:
            print(error)
        assert sys.path == before and "penstock" not in sys.modules
        """,
        damaged,
    )
    assert "damaged on its way" in printed[0]


def test_an_agent_begins_where_penstock_is_not_installed(node: Node) -> None:
    """Its modules need no library until it asks Spark which task it is."""
    code = pack_code()
    unpack = by_value("penstock.cluster.environment", "unpack_code")
    run = with_code(code.data, code.digest, unpack, "penstock.cluster.agent:run", {})
    printed = node.run(
        """
        try:
            list(sent[0]([]))
        except ModuleNotFoundError as error:
            print(error.name, sys.modules["penstock.cluster.agent"].__file__)
        """,
        run,
    )
    folder = node.folder / "cache/penstock" / f"code-{code.digest}"
    assert printed == [f"pyspark {folder}/penstock/cluster/agent.py"]
