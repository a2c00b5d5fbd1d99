"""Checkpoints: safetensors and JSON, a manifest written last, nothing ever unpickled.

checkpoints/00000200/
  network.safetensors     parameters and buffers as evaluated (all shards' mean)
  optimizer.safetensors   its state, where all shards agree
  shard-00000.safetensors random state, buffers; parameters and optimizer state where shards
                          stand apart (between two averagings)
  state.json              step, cursors, frozen decisions, numbers of the optimizer
  manifest.json           the files above with size and SHA-256: without it, there is no
                          checkpoint
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch

from penstock.errors import RunError
from penstock.runtime.store import Store

FOLDER = "checkpoints"
FORMAT = 1
DAMAGED = (
    "the file was changed or cut off; delete this checkpoint's folder to go on from the one before"
)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class File:
    """A file of a checkpoint that its writer has finished."""

    name: str
    size_bytes: int
    sha256: str


def folder_of(step: int) -> str:
    """The folder of the checkpoint after this step, in the run directory."""
    return f"{FOLDER}/{step:08d}"


def shard_file(shard: int) -> str:
    """The name of a shard's file."""
    return f"shard-{shard:05d}.safetensors"


def write_tensors(
    store: Store, step: int, name: str, tensors: Tensors, numbers: Any = None
) -> File:
    """Writes tensors, and JSON values beside them."""
    contiguous = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    metadata = {"numbers": json.dumps(numbers)}
    return _write(store, step, name, safetensors.torch.save(contiguous, metadata))


def write_json(store: Store, step: int, name: str, values: Any) -> File:
    """Writes JSON values."""
    return _write(store, step, name, json.dumps(values, indent=1).encode())


def _write(store: Store, step: int, name: str, data: bytes) -> File:
    store.write(f"{folder_of(step)}/{name}", data)
    return File(name, len(data), hashlib.sha256(data).hexdigest())


def seal(store: Store, step: int, files: list[File], metric: float | None) -> None:
    """Writes the manifest: from now on the checkpoint exists."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "files": [vars(file) for file in files],
    }
    store.write(f"{folder_of(step)}/manifest.json", json.dumps(manifest, indent=1).encode())


def unseal(store: Store, step: int) -> None:
    """Takes the manifest away, before files of a checkpoint of this name are written again."""
    store.delete(f"{folder_of(step)}/manifest.json")


class Checkpoint:
    """A sealed checkpoint. What is read is compared with the manifest.

    Raises:
        RunError: a file is missing or not what the manifest says.
    """

    def __init__(self, store: Store, step: int) -> None:
        self._store, self.step = store, step
        self.folder = folder_of(step)
        try:
            manifest = json.loads(store.read(f"{self.folder}/manifest.json"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']}, and this version reads {FORMAT}")
            self.metric: float | None = manifest["metric"]
            self._files = {f["name"]: File(**f) for f in manifest["files"]}
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{store.url}/{self.folder}/manifest.json is not a manifest: {error}",
                hint=DAMAGED,
            ) from error

    def verify(self) -> None:
        """Reads every file."""
        for name in self._files:
            self._read(name)

    def json(self, name: str = "state.json") -> Any:
        """JSON values of a file."""
        data = self._read(name)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self._not("JSON", name, error) from error

    def tensors(self, name: str) -> tuple[Tensors, Any]:
        """The tensors of a file, and the JSON values beside them."""
        data = self._read(name)
        try:
            tensors = safetensors.torch.load(data)
            length = int.from_bytes(data[:8], "little")
            header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
            numbers = json.loads(header.get("__metadata__", {}).get("numbers", "null"))
        except (safetensors.SafetensorError, ValueError, RecursionError) as error:
            raise self._not("safetensors", name, error) from error
        return tensors, numbers

    def has(self, name: str) -> bool:
        """Whether the checkpoint has this file."""
        return name in self._files

    def _not(self, kind: str, name: str, error: Exception) -> RunError:
        path = f"{self._store.url}/{self.folder}/{name}"
        return RunError(f"{path} is not {kind}, as its manifest says: {error}", hint=DAMAGED)

    def _read(self, name: str) -> bytes:
        path = f"{self._store.url}/{self.folder}/{name}"
        if name not in self._files:
            raise RunError(f"{path}: the checkpoint's manifest names no such file")
        data, file = self._store.read(f"{self.folder}/{name}"), self._files[name]
        if len(data) != file.size_bytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise RunError(
                f"{path}: {len(data)} bytes that are not the {file.size_bytes} written",
                hint=DAMAGED,
            )
        return data


def sealed_steps(store: Store) -> list[int]:
    """The steps after which there is a sealed checkpoint, in order."""
    return [
        int(name)
        for name in store.names(FOLDER)
        if name.isdigit() and store.exists(f"{FOLDER}/{name}/manifest.json")
    ]


def latest(store: Store) -> Checkpoint | None:
    """The last sealed checkpoint, or None."""
    steps = sealed_steps(store)
    return Checkpoint(store, steps[-1]) if steps else None


def prune(store: Store, keep: int, also: int | None) -> None:
    """Deletes all but the last `keep` checkpoints, and the one after step `also` (the best)."""
    for step in sealed_steps(store)[:-keep]:
        if step != also:
            unseal(store, step)
            store.delete(folder_of(step))


def split_state(state: Mapping[str, Any], prefix: str) -> tuple[Tensors, dict[str, Any]]:
    """Parts one parameter's optimizer state into tensors and JSON values.

    Raises:
        RunError: a value that is neither; named by its key.
    """
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{key}"] = value
        elif value is None or isinstance(value, bool | int | float | str):
            numbers[f"{prefix}{key}"] = value
        else:
            raise RunError(
                f"the optimizer keeps a {type(value).__name__} in {prefix}{key}; a checkpoint "
                "holds tensors and plain numbers",
                hint="use an optimizer whose state is tensors, as torch.optim's are",
            )
    return tensors, numbers
