"""Checkpoints: sealed or not there, compared with their manifest, and never unpickled."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.errors import RunError
from penstock.runtime import checkpoint
from penstock.runtime.checkpoint import Checkpoint, File
from penstock.runtime.store import Store

TENSORS = {
    "float": torch.tensor([1.5, math.nan, -0.0, math.inf]),
    "half": torch.randn(3, 4).bfloat16(),
    "double": torch.randn(2, 1, 2, dtype=torch.float64),
    "whole": torch.tensor([2**62, -1]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "transposed": torch.randn(3, 2).t(),
    "a part": torch.randn(10)[2:5],
}
NUMBERS = {"seen": [3, 0.1], "none": None, "name": "é"}


def written(store: Store, step: int, metric: float | None = None) -> None:
    """Writes and seals a checkpoint."""
    files = [
        checkpoint.write_tensors(store, step, "network.safetensors", TENSORS),
        checkpoint.write_tensors(store, step, checkpoint.shard_file(0), {}, NUMBERS),
        checkpoint.write_json(store, step, "state.json", {"step": step}),
    ]
    checkpoint.seal(store, step, files, metric)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) if tensor.dim() else b""


def test_what_is_sealed_is_read_bit_for_bit(store: Store) -> None:
    written(store, 12, metric=0.25)
    saved = checkpoint.latest(store)
    assert saved is not None
    assert (saved.step, saved.metric) == (12, 0.25)
    saved.verify()
    tensors, numbers = saved.tensors("network.safetensors")
    assert numbers is None
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert bits(tensors[name]) == bits(tensor)
        assert torch.equal(tensors[name], tensor) or name == "float"
    assert saved.tensors("shard-00000.safetensors") == ({}, NUMBERS)
    assert saved.json() == {"step": 12}
    assert saved.has("state.json")
    assert not saved.has("optimizer.safetensors")


def test_a_view_does_not_drag_its_storage_along(store: Store) -> None:
    file = checkpoint.write_tensors(store, 1, "x.safetensors", {"a": torch.zeros(10**6)[:4]})
    assert file.size_bytes < 1000


def test_a_checkpoint_is_there_only_when_it_is_sealed(store: Store) -> None:
    assert checkpoint.latest(store) is None
    assert checkpoint.sealed_steps(store) == []
    written(store, 4)
    checkpoint.write_json(store, 8, "state.json", {})
    assert checkpoint.sealed_steps(store) == [4]
    written(store, 8)
    written(store, 100)
    assert checkpoint.sealed_steps(store) == [4, 8, 100]
    checkpoint.unseal(store, 100)
    checkpoint.unseal(store, 100)  # once more is no error
    latest = checkpoint.latest(store)
    assert latest is not None
    assert latest.step == 8
    with pytest.raises(RunError, match=r"00000100/manifest\.json cannot be read"):
        Checkpoint(store, 100)


@pytest.mark.parametrize("metric", [None, math.nan, math.inf])
def test_a_metric_that_json_has_not(store: Store, metric: float | None) -> None:
    written(store, 1, metric)
    assert Checkpoint(store, 1).metric is None


def test_pruning_keeps_the_newest_and_one_more(store: Store) -> None:
    for step in range(0, 60, 10):
        written(store, step)
    checkpoint.write_json(store, 60, "state.json", {})  # being written
    checkpoint.prune(store, 2, also=10)
    assert checkpoint.sealed_steps(store) == [10, 40, 50]
    assert store.names("checkpoints") == ["00000010", "00000040", "00000050", "00000060"]
    checkpoint.prune(store, 2, also=40)
    assert checkpoint.sealed_steps(store) == [40, 50]
    checkpoint.prune(store, 1, also=None)
    assert checkpoint.sealed_steps(store) == [50]
    Checkpoint(store, 50).verify()


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("name", ["network.safetensors", "state.json", "shard-00000.safetensors"])
@pytest.mark.parametrize("damage", [flipped, lambda d: d[:-1], lambda d: d + b" ", lambda d: b""])
def test_a_changed_or_truncated_file_is_named(
    store: Store, name: str, damage: Callable[[bytes], bytes]
) -> None:
    written(store, 3)
    path = f"checkpoints/00000003/{name}"
    store.write(path, damage(store.read(path)))
    saved = Checkpoint(store, 3)
    read = saved.json if name.endswith("json") else saved.tensors
    for look in (saved.verify, lambda: read(name)):
        with pytest.raises(RunError, match=f"{store.url}/{path}: ") as caught:
            look()
        assert "delete this checkpoint's folder" in caught.value.hint
    written(store, 3)
    Checkpoint(store, 3).verify()


def test_a_file_that_is_missing_is_named(store: Store) -> None:
    written(store, 3)
    store.delete("checkpoints/00000003/state.json")
    with pytest.raises(RunError, match=r"00000003/state\.json cannot be read"):
        Checkpoint(store, 3).verify()
    with pytest.raises(RunError, match=r"optimizer\.safetensors: .* manifest names no such file"):
        Checkpoint(store, 3).tensors("optimizer.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1, "step": 3',
        '{"format": 1, "metric": null, "files": [{"name": "a"}]}',
        '{"format": 2, "metric": null, "files": []}',
    ],
)
def test_a_manifest_that_is_none_is_named(store: Store, text: str) -> None:
    written(store, 3)
    store.write("checkpoints/00000003/manifest.json", text.encode())
    with pytest.raises(RunError, match=r"00000003/manifest\.json is not a manifest") as caught:
        Checkpoint(store, 3)
    assert caught.value.hint


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


def test_nothing_is_ever_unpickled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run directory is untrusted: whoever writes a file can write its manifest as well."""
    bomb = pickle.dumps(Bomb())
    with pytest.raises(pytest.fail.Exception):
        pickle.loads(bomb)  # it would go off

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for target in (pickle, torch):
        for name in ("load", "loads"):
            monkeypatch.setattr(target, name, refused, raising=False)
    for name in ("network.safetensors", "state.json"):
        written(store, 3)
        store.write(f"checkpoints/00000003/{name}", bomb)
        manifest = json.loads(store.read("checkpoints/00000003/manifest.json"))
        for file in manifest["files"]:
            if file["name"] == name:
                file |= {"size_bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
        store.write("checkpoints/00000003/manifest.json", json.dumps(manifest).encode())
        saved = Checkpoint(store, 3)
        saved.verify()
        with pytest.raises(RunError, match=f"{name} is not (JSON|safetensors)"):
            saved.json() if name == "state.json" else saved.tensors(name)


def test_the_files_are_safetensors_and_json_and_no_others(tmp_path: Path) -> None:
    written(Store(str(tmp_path)), 1)
    for path in (tmp_path / "checkpoints/00000001").iterdir():
        data = path.read_bytes()
        if path.suffix == ".json":
            json.loads(data)
        else:
            assert path.suffix == ".safetensors"
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_an_optimizers_state_is_parted_into_tensors_and_numbers() -> None:
    moment = torch.ones(3)
    state = {"moment": moment, "step": 4, "flag": True, "name": "x", "nothing": None, "rate": 0.1}
    tensors, numbers = checkpoint.split_state(state, "optimizer.w/")
    assert tensors == {"optimizer.w/moment": moment}
    assert numbers == {
        "optimizer.w/step": 4,
        "optimizer.w/flag": True,
        "optimizer.w/name": "x",
        "optimizer.w/nothing": None,
        "optimizer.w/rate": 0.1,
    }
    with pytest.raises(RunError, match=r"keeps a list in optimizer\.w/history"):
        checkpoint.split_state({"history": [torch.ones(1)]}, "optimizer.w/")


def test_names_sort_as_steps_do() -> None:
    steps = [0, 9, 10, 123, 99_999_999]
    assert sorted(map(checkpoint.folder_of, steps)) == list(map(checkpoint.folder_of, steps))
    assert File("a", 1, "b") == File("a", 1, "b")
