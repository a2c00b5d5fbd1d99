"""Files on any fsspec URL, and errors that say what lies where a file was expected."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class File:
    """A file as it was found.

    Arguments:
        path: on its file system.
        size: in bytes.
        stamp: of its last change, as the file system tells it; empty where it does not.
    """

    path: str
    size: int
    stamp: str = ""

    @classmethod
    def of(cls, fs: Any, path: str) -> File:
        info = fs.info(path)
        return cls(path, int(info["size"] or 0), stamp_of(info))


def stamp_of(info: Mapping[str, Any]) -> str:
    """What its file system tells of a file that changes with it; empty where that is nothing."""
    keys = ("ETag", "etag", "mtime", "created")
    return str(next((info[key] for key in keys if key in info), ""))


def find(url: str, suffixes: Sequence[str]) -> list[File]:
    """The files that a URL names: a file, those of a folder at any depth, or of a glob; sorted.

    Arguments:
        suffixes: of a folder's files. Parts of a path that start with "_" or "." hide it there, as
            Spark and pyarrow have it (`_temporary`, `.part-0.parquet.crc`).

    Raises:
        DataError: there are none; says what there is.
    """
    fs, root = locate(url)
    if fs.isfile(root):
        return [File.of(fs, root)]
    if fs.isdir(root):
        found = [path for path in fs.find(root) if path.endswith(tuple(suffixes))]
        found = [path for path in found if not _is_hidden(path[len(root) :])]
        if not found:
            kinds = " or ".join(f"*{suffix}" for suffix in suffixes)
            raise DataError(f"{url}: no {kinds} file; {contents(fs, root)}")
    else:
        found = [path for path in fs.glob(root) if fs.isfile(path)]
        if not found:
            raise DataError(
                f"{url}: no such file or folder, and no file matches it; "
                f"{contents(fs, posixpath.dirname(root))}"
            )
    return [File.of(fs, path) for path in sorted(found)]


def shared_folder(files: Sequence[File]) -> int:
    """How many leading characters the paths' common folder has."""
    return len(posixpath.commonpath([posixpath.dirname(file.path) for file in files] or [""]))


def _is_hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))


@contextmanager
def opened(
    url: str, path: str | None = None, *, compression: str | None = None
) -> Iterator[IO[bytes]]:
    """The file of a URL, or of another path on its file system, open for reading bytes.

    Arguments:
        compression: "infer" reads what is compressed, by the ending of its name.

    Raises:
        DataError: it is missing (with what is in its folder) or cannot be opened.
    """
    fs, root = locate(url)
    name = url if path is None else path
    try:
        file = fs.open(root if path is None else path, "rb", compression=compression)
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
