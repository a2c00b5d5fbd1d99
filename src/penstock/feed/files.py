"""Files on any fsspec URL, and errors that say what lies where a file was expected."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec

from penstock.errors import DataError

_NAMES_SHOWN = 12


def locate(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path on it.

    Raises:
        DataError: the protocol is unknown, or its library is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise DataError(f"{url}: {error}") from error
    return fs, path


@contextmanager
def opened(url: str, path: str | None = None) -> Iterator[IO[bytes]]:
    """The file of a URL, or of another path on its file system, open for reading bytes.

    Raises:
        DataError: it is missing (with what is in its folder) or cannot be opened.
    """
    fs, root = locate(url)
    name = url if path is None else path
    try:
        file = fs.open(root if path is None else path, "rb")
    except FileNotFoundError as error:
        folder = posixpath.dirname(root if path is None else path)
        raise DataError(f"{name}: no such file; {contents(fs, folder)}") from error
    except OSError as error:
        raise DataError(f"{name}: cannot be opened: {error}") from error
    with file:
        yield file


def contents(fs: Any, folder: str) -> str:
    """What is in a folder, as the end of a message."""
    try:
        names = sorted(posixpath.basename(name.rstrip("/")) for name in fs.ls(folder, detail=False))
    except OSError:
        return f"there is no folder {folder}"
    if not names:
        return f"the folder {folder} is empty"
    rest = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"the folder {folder} holds: {', '.join(names[:_NAMES_SHOWN])}{rest}"
