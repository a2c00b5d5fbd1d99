"""The folder of a spool: the names in it, who holds it, and how it ends.

    lock           held (flock) by the writer as long as it writes, and before it can be seen
    000000.arrow   a segment: a window of rows, sealed by a footer and its name (see `segment`)
    000001.arrow   ...
    end.json       total rows, checksum, fields, segments: written last
    failed.json    in place of the end: why there will be none

What has its name is whole and never changes. A lock is of an open file: it goes with the process,
however that ends, and two threads of one process see each other's. (What a writer forks holds it
too, and the folder looks alive for as long as that lives.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from penstock import errors
from penstock.errors import DataError, PenstockError
from penstock.feed.segment import WRITING, Field, fields_from_json, fields_to_json

LOCK, END, FAILED = "lock", "end.json", "failed.json"
LOCK_S = 0.25
"""Until a lock counts as a writer's: a reader that looks after one has it for microseconds."""


@dataclass(frozen=True)
class Segment:
    """A file of a spool.

    Arguments:
        name, rows: its own.
        bytes: on disk; of this file alone, where another spool of the same rows may have others.
        checksum: of the spool's rows up to its last one, as `SpoolEnd` has it.
    """

    name: str
    rows: int
    bytes: int
    checksum: str


@dataclass(frozen=True)
class SpoolEnd:
    """What a closed spool holds.

    Arguments:
        rows: of all segments.
        checksum: eight hexadecimal digits: a function of the fields' names, dtypes and shapes, and
            of their values row after row. Not of batches or segments.
        fields: by name; empty where there are no rows.
        window_rows: of each segment but the last, or at most where rows are of unequal length (see
            `windows`); 0 where there are no rows.
        segments: in order.
    """

    rows: int
    checksum: str
    fields: Mapping[str, Field]
    window_rows: int
    segments: tuple[Segment, ...]

    @property
    def bytes(self) -> int:
        """Of all segments, on disk."""
        return sum(segment.bytes for segment in self.segments)

    @classmethod
    def read(cls, folder: Path) -> SpoolEnd | None:
        """The end of the spool in this folder; None where there is none (yet)."""
        try:
            words = json.loads((folder / END).read_text())
            return cls(
                words["rows"],
                words["checksum"],
                fields_from_json(words["fields"]),
                words["window_rows"],
                tuple(Segment(**segment) for segment in words["segments"]),
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(folder / END, f"cannot be read: {error}") from error

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "fields": fields_to_json(self.fields)}, indent=1)


class SpoolFolder:
    """The folder of a spool, held by the one who fills it until it is released.

    What another has left there, who did not come to its end, is removed.

    Arguments:
        where: names the data, for messages.

    Raises:
        DataError: it holds a closed spool, or another writes there now, or it cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], where: str) -> None:
        self.path, self.where = Path(folder), where
        try:
            self._lock: IO[bytes] | None = self._made() or self._left()
        except OSError as error:
            raise DataError(
                f"{where}: cannot make {folder}: {error}",
                hint="PENSTOCK_SPOOL, and on Spark spark.local.dir, must name a folder of a disk "
                "that has room and can be written to",
            ) from error

    @property
    def held(self) -> bool:
        return self._lock is not None

    def end(self, end: SpoolEnd) -> None:
        """Closes the spool: says so, and releases the folder."""
        self._put(END, end.to_json())
        self.release()

    def touch(self) -> None:
        """Lets readers see that rows come, though no segment may be whole for long."""
        if self._lock is not None:
            os.utime(self._lock.fileno())

    def fail(self, error: PenstockError) -> None:
        """Tells readers why this spool has no end, and releases the folder."""
        if self._lock is None:
            return
        words = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        with contextlib.suppress(OSError):  # no room even for this: they learn that we are gone
            self._put(FAILED, json.dumps(words))
        self.release()

    def release(self) -> None:
        """Lets the folder go, without a word where nothing was said before."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _made(self) -> IO[bytes] | None:
        """The lock of a new folder, held before anybody sees it; None if there is one already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        name = f".{self.path.name}."
        fresh = Path(tempfile.mkdtemp(prefix=name, suffix=WRITING, dir=self.path.parent))
        lock = open(fresh / LOCK, "wb")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            fresh.rename(self.path)
        except OSError as error:
            lock.close()
            shutil.rmtree(fresh)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            return None  # it is not empty, or a link
        return lock

    def _left(self) -> IO[bytes]:
        """The lock of a folder that somebody has left, taken over."""
        there = DataError(
            f"{self.where}: {self.path} is there already: a spool is written once",
            hint="remove the folder, or give another",
        )
        try:
            lock = open(self.path / LOCK, "r+b")  # noqa: SIM115
        except FileNotFoundError:
            raise there from None
        give_up = time.monotonic() + LOCK_S
        while not _locked(lock):
            if time.monotonic() > give_up:
                lock.close()
                raise DataError(
                    f"{self.where}: {self.path} is being written: a spool has one writer",
                    hint="wait for it to end, or give another folder",
                )
            time.sleep(0.005)
        if (self.path / END).exists():
            lock.close()
            raise there
        for pattern in (FAILED, "*.arrow", f"*{WRITING}"):
            for path in self.path.glob(pattern):
                path.unlink()
        return lock

    def _put(self, name: str, text: str) -> None:
        written = self.path / (name + WRITING)
        written.write_text(text)
        written.replace(self.path / name)


def writer_lives(folder: Path) -> bool | None:
    """Whether someone writes this spool now; None where nobody has begun."""
    try:
        with open(folder / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except (FileNotFoundError, NotADirectoryError):
        return None
    except BlockingIOError:
        return True


def failure(folder: Path) -> PenstockError | None:
    """What the writer of a spool gave up with."""
    try:
        words = json.loads((folder / FAILED).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    kind = getattr(errors, words["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, PenstockError)):
        kind = DataError
    return kind(words["message"], hint=words["hint"])


def segment_name(number: int) -> str:
    """The file of a spool's segment, numbered from 0."""
    return f"{number:06d}.arrow"


def damaged(path: Path, what: str) -> DataError:
    """The error for a file of a spool that is not as it was written."""
    return DataError(
        f"{path} {what}",
        hint="a spool is nobody's to change; remove it and run again to have it written anew",
    )


def _locked(lock: IO[bytes]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
