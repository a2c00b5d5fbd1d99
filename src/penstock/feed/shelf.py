"""Where an agent keeps spools: those that it reads itself, and those that its worker is to have.

    <folder>/nonce                             to know this folder by, on this host
    <folder>/read/<source>/<partition>         a spool that this agent writes
    <folder>/spool/<source>/<partition>        of its worker: a link to what an agent of this host
                                               reads, or a copy of what one elsewhere does
    <folder>/spool/<source>/partitions.json    the numbers of all partitions of the source

A copy has the same segments as the spool that it is of, and the same end. It grows as that one
does, and its lock is held meanwhile, so that the worker cannot tell one from the other.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from penstock.errors import DataError
from penstock.feed.segment import WRITING, reserve
from penstock.feed.spool import (
    END,
    FAILED,
    LARGER_DISK,
    SpoolEnd,
    SpoolFolder,
    SpoolWriter,
    segment_name,
)

PARTITIONS = "partitions.json"
ALIVE = "alive"
"""In the folder of a worker's spools: touched as long as there is an agent that is heard of."""
NONCE = "nonce"


class Shelf:
    """The folders of an agent.

    Arguments:
        folder: of the agent; what it holds is made here.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.nonce = secrets.token_hex(16)
        (folder / NONCE).write_text(self.nonce)
        self._copies: dict[tuple[int, int], SpoolCopy] = {}
        self._lock = threading.Lock()

    def open(self, source: int, numbers: Sequence[int]) -> None:
        """A source has partitions of these numbers."""
        folder = self._folder / "spool" / str(source)
        folder.mkdir(parents=True)
        (folder / PARTITIONS).write_text(json.dumps(sorted(numbers)))

    def touch(self) -> None:
        """Lets the worker see that this agent is at work."""
        with contextlib.suppress(OSError):  # it has no sources, or the agent is leaving
            (self._folder / "spool" / ALIVE).touch()

    def reading(self, source: int, partition: int) -> Path:
        """Where this agent writes what it reads."""
        return self._folder / "read" / str(source) / str(partition)

    def find(self, source: int, partition: int, number: int) -> tuple[str, Path] | None:
        """What there is of a spool that this agent reads: its segment of that number, how it ended
        ("end", "failed") before that, or nothing as yet.
        """
        folder = self.reading(source, partition)
        segment = folder / segment_name(number)
        if segment.exists():
            return "segment", segment
        for what, name in (("end", END), ("failed", FAILED)):
            if (path := folder / name).exists():
                return ("segment", segment) if segment.exists() else (what, path)
        return None

    def whole(self) -> Iterator[tuple[int, int, Path, SpoolEnd]]:
        """The spools that this agent has read to their end: source, partition, folder, end."""
        for folder in sorted(self._folder.glob("read/*/*")):
            with contextlib.suppress(DataError):
                if (end := SpoolEnd.read(folder)) is not None:
                    yield int(folder.parent.name), int(folder.name), folder, end

    def is_here(self, folder: str, nonce: str) -> bool:
        """Whether an agent's folder is of this host."""
        try:
            return (Path(folder) / NONCE).read_text() == nonce
        except OSError:
            return False

    def link(self, source: int, partition: int, folder: str) -> None:
        """The worker is to have a spool that an agent of this host reads, in whose folder it is.

        What is there as a copy stays.
        """
        if self.copying(source, partition):
            return
        path = self._of_worker(source, partition)
        fresh = path.with_name(f".{partition}{WRITING}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path(folder) / "read" / str(source) / str(partition))
        fresh.replace(path)

    def drop(self, source: int, partition: int) -> None:
        """Who read it is gone: a link to it is removed. A copy stays, whole or not."""
        path = self._of_worker(source, partition)
        if path.is_symlink():
            path.unlink()

    def empty(self, source: int, partitions: Sequence[int]) -> None:
        """These have no rows."""
        for partition in partitions:
            path = self._of_worker(source, partition)
            if not path.exists():
                SpoolWriter(path, f"partition {partition}").close()

    def copying(self, source: int, partition: int) -> bool:
        """Whether a copy was begun, or is whole."""
        path = self._of_worker(source, partition)
        return path.is_dir() and not path.is_symlink()

    def copy(self, source: int, partition: int) -> SpoolCopy | None:
        """The copy to go on with, begun where there is none; None if it is whole."""
        key = source, partition
        with self._lock:
            if key not in self._copies:
                if self.copying(source, partition):  # it has no rows
                    return None
                self._copies[key] = SpoolCopy(self._of_worker(source, partition))
            found = self._copies[key]
            return None if found.whole else found

    def _of_worker(self, source: int, partition: int) -> Path:
        return self._folder / "spool" / str(source) / str(partition)


def partitions_of(folder: Path) -> list[int]:
    """The numbers of a source's partitions, by its folder of a worker's spools."""
    found: list[int] = json.loads((folder / PARTITIONS).read_text())
    return found


class SpoolCopy:
    """A copy of a spool, segment by segment.

    Arguments:
        folder: of the copy; made here, in place of a link.

    Attributes:
        number: of the next segment.
        whole: whether it has ended.
    """

    def __init__(self, folder: Path) -> None:
        if folder.is_symlink():
            folder.unlink()
        self.number, self.whole = 0, False
        self._folder = SpoolFolder(folder, str(folder))
        self._adding = threading.Lock()

    def put(self, what: str, number: int, data: bytes | bytearray) -> bool:
        """Takes what `Shelf.find` has found elsewhere; whether the copy is whole then.

        What is there already is passed over.

        Raises:
            DataError: the disk is full.
        """
        with self._adding:
            if number != self.number or self.whole:
                return self.whole
            names = {"segment": segment_name(number), "end": END, "failed": FAILED}
            path = self._folder.path / names[what]
            written = path.with_name(path.name + WRITING)
            try:
                _write(written, data)
                written.replace(path)
            except OSError as error:
                free = shutil.disk_usage(written.parent).free
                raise DataError(
                    f"{path}: no room for {len(data):,} bytes: {error}; {free:,} are free",
                    hint=LARGER_DISK,
                ) from error
            if what == "segment":
                self.number += 1
            else:
                self.whole = True
                self._folder.release()
            return self.whole


def _write(path: Path, data: bytes | bytearray) -> None:
    with open(path, "wb", buffering=0) as file:
        reserve(file.fileno(), 0, len(data))
        view = memoryview(data)
        while len(view):
            view = view[file.write(view) :]
