"""A folder on any fsspec URL, used as object stores allow: whole objects, no append, no rename."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from penstock.errors import RunError


class Store:
    """Named objects under one URL (a local path, `s3://bucket/folder`, `hdfs://...`).

    Raises:
        RunError: every failure, naming the object.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise RunError(
                f"{url}: {error}", hint="install the file system that fsspec names"
            ) from error

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole object, over an earlier one."""
        path = f"{self._root}/{name}"
        try:
            self._files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            if isinstance(self._files, LocalFileSystem):
                _write_local(path, data)
            else:
                self._files.pipe_file(path, data)
        except OSError as error:
            raise RunError(
                f"{self.url}/{name} cannot be written ({len(data)} bytes): {error}",
                hint="free space there, or give another folder: runs: FOLDER",
            ) from error

    def read(self, name: str) -> bytes:
        """A whole object."""
        try:
            data: bytes = self._files.cat_file(f"{self._root}/{name}")
        except OSError as error:
            raise RunError(f"{self.url}/{name} cannot be read: {error}") from error
        return data

    def exists(self, name: str = "") -> bool:
        """Whether there is an object or folder of this name."""
        return bool(self._files.exists(f"{self._root}/{name}"))

    def names(self, folder: str = "") -> list[str]:
        """The names directly under a folder, sorted; empty when there is no such folder."""
        try:
            self._files.invalidate_cache()
            found: list[Any] = self._files.ls(f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.url}/{folder} cannot be listed: {error}") from error
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def delete(self, name: str) -> None:
        """Deletes an object or a folder with all in it; none there is no error."""
        path = f"{self._root}/{name}"
        try:
            if self._files.exists(path):
                self._files.rm(path, recursive=True)
        except OSError as error:
            raise RunError(f"{self.url}/{name} cannot be deleted: {error}") from error


def _write_local(path: str, data: bytes) -> None:
    """Writes a file at once, as object stores do: whoever reads it, or is killed, sees no half."""
    hidden = f"{path}.part"
    try:
        with open(hidden, "wb") as file:
            file.write(data)
        os.replace(hidden, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(hidden)
        raise
