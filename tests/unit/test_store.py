"""Named objects under a URL, locally and in an object store's manner."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import fsspec
import pytest

from penstock.errors import RunError
from penstock.runtime.store import Store


@pytest.fixture(params=["local", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(
        {
            "local": str(tmp_path / "run"),
            "file": f"file://{tmp_path}/run",
            "memory": f"memory://{uuid.uuid4().hex}",
        }[request.param]
    )


def test_what_is_written_is_read(store: Store) -> None:
    assert not store.exists()
    assert not store.exists("a/b/c.json")
    store.write("a/b/c.json", b"one")
    store.write("a/b/c.json", b"another")
    store.write("a/d", b"")
    assert store.read("a/b/c.json") == b"another"
    assert store.read("a/d") == b""
    assert store.exists("a/b/c.json")
    assert store.exists("a/b")
    assert not store.exists("a/b/other")


def test_names_are_those_directly_under_a_folder(store: Store) -> None:
    assert store.names() == []
    assert store.names("nowhere") == []
    for name in ("b/2", "b/10", "b/1", "b/deep/x", "a"):
        store.write(name, b"x")
    assert store.names("b") == ["1", "10", "2", "deep"]
    assert store.names() == ["a", "b"]


def test_delete_takes_an_object_or_a_folder(store: Store) -> None:
    for name in ("b/1", "b/deep/x", "c"):
        store.write(name, b"x")
    store.delete("b/1")
    assert store.names("b") == ["deep"]
    store.delete("b")
    assert store.names() == ["c"]
    store.delete("b")  # none there is no error
    store.delete("nothing/at/all")
    assert store.read("c") == b"x"


def test_what_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(RunError, match="no/such cannot be read"):
        store.read("no/such")


def test_two_stores_of_one_url_see_the_same() -> None:
    url = f"memory://{uuid.uuid4().hex}"
    assert Store(url).names("checkpoints") == []
    Store(url).write("checkpoints/00000001/manifest.json", b"{}")
    assert Store(f"{url}/").names("checkpoints") == ["00000001"]
    assert Store(f"{url}x").names("checkpoints") == []


def test_a_protocol_that_is_unknown() -> None:
    with pytest.raises(RunError, match="nosuch://bucket") as caught:
        Store("nosuch://bucket")
    assert caught.value.hint


def test_a_file_where_a_folder_must_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"file/plan\.json cannot be written \(4 bytes\)") as caught:
        store.write("plan.json", b"data")
    assert "runs: FOLDER" in caught.value.hint
    assert (tmp_path / "file").read_text() == "in the way"
    assert not store.exists("plan.json")


def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write("manifest.json", b"whole")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(RunError, match="No space left on device"):
            store.write("manifest.json", b"a longer one")
    assert store.read("manifest.json") == b"whole"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_nobody_sees_half_of_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed before the file is whole leaves the one that was there."""
    store = Store(str(tmp_path))
    store.write("plan.json", b"before")
    seen: list[bytes] = []
    replace = os.replace

    def look(source: str, target: str) -> None:
        seen.append(store.read("plan.json"))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    store.write("plan.json", b"after")
    assert seen == [b"before"]
    assert store.read("plan.json") == b"after"


def test_a_folder_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "ls", refuse)
    with pytest.raises(RunError, match="checkpoints cannot be listed: not yours"):
        store.names("checkpoints")
