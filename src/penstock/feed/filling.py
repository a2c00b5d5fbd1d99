"""Spools that this process fills from files, by a thread, while it trains on what is there.

    records = filled(key, "a.parquet", rows, lambda: batches of x and y)

A spool's folder is `$PENSTOCK_SPOOL/<key>`; where the variable is not set, it is in a folder of
this process that is removed when it ends. A key says all that the rows depend on: a closed spool
that has it is used again and nothing is read, and one that another process is filling is read as
it grows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import queue
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError, PenstockError
from penstock.feed.converter import Values
from penstock.feed.segment import Ragged
from penstock.feed.spool import SpoolEnd, SpoolWriter, writer_lives
from penstock.feed.spooled import SpoolRecords

SPOOL = "PENSTOCK_SPOOL"
"""The environment variable that names the folder of a worker's spools."""
AHEAD = 2
"""So many batches are read while one is written."""
_LOOK_S = 0.1
_STOP_S = 5.0
"""So long a thread has to notice that nobody wants its spool any more; it looks batch by batch."""

_filling: weakref.WeakValueDictionary[Path, Filling] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def key_of(*parts: Any) -> str:
    """The name of a spool: a function of JSON values."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]


def filled(
    key: str,
    where: str,
    rows: int,
    read: Callable[[], Generator[Values, None, None]],
    empty: Values,
    need_bytes: int | None = None,
) -> SpoolRecords:
    """Records that come to be: the first can be taken long before the last is there.

    Arguments:
        key: of the spool, by `key_of`.
        where: the source, for messages.
        rows: how many there will be.
        read: gives them, in order; called by a thread if nobody has filled the spool.
        empty: features and target of no rows.
        need_bytes: of the spool, if that is known.

    Raises:
        DataError: the disk has less room than that. What goes wrong in `read` is raised by whoever
            waits for the records.
    """
    found = filling(key, where, rows, read, need_bytes) if rows else None
    return FilledRecords(found, where, empty)


def filling(
    key: str,
    where: str,
    rows: int | None,
    read: Callable[[], Generator[Values, None, None]],
    need_bytes: int | None = None,
) -> Filling:
    """The spool of `filled` alone.

    Arguments:
        rows: None where nobody knows: what others have left there is not used then.
    """
    folder = _root() / key
    with _lock:
        found = _filling.get(folder)
        if found is None or not found.serves:
            found = _filling[folder] = Filling(folder, where, rows, read, need_bytes)
    return found


class FilledRecords(SpoolRecords):
    """The rows of one spool, which are known by dtype and shape before there are any.

    Arguments:
        filling: None where there are none: several shards of that kind would share a key.
    """

    def __init__(self, filling: Filling | None, where: str, empty: Values) -> None:
        super().__init__((lambda number: None) if filling is None else filling.folder_of, where)
        self._empty = empty

    def take(self, rows: NDArray[np.int64]) -> tuple[Any, Any]:
        import torch

        if len(rows):
            return super().take(rows)
        x, y = (
            value if isinstance(value, Ragged) else torch.from_numpy(value.copy())
            for value in (self._empty["x"], self._empty["y"])
        )
        return x, y


class Filling:
    """A spool's folder, and the thread that fills it for as long as this is in use."""

    def __init__(
        self,
        folder: Path,
        where: str,
        rows: int | None,
        read: Callable[[], Generator[Values, None, None]],
        need_bytes: int | None,
    ) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        if rows is not None and (self._closed_rows() == rows or writer_lives(folder)):
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        writer = SpoolWriter(folder, where, need_bytes=need_bytes)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(writer, where, read, stop), name="penstock-fill", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, _end, self._thread, stop)  # at the process's end, too

    def folder_of(self, number: int) -> Path | None:
        """Of the n-th spool, as `SpoolRecords` asks: there is one."""
        return self.folder if number == 0 else None

    @property
    def serves(self) -> bool:
        """Whether the spool is whole, or someone is filling it."""
        if self._thread is not None and self._thread.is_alive():
            return True
        return self._closed_rows() is not None or writer_lives(self.folder) is True

    def _closed_rows(self) -> int | None:
        try:
            end = SpoolEnd.read(self.folder)
        except DataError:
            return None
        return None if end is None else end.rows


def _fill(
    writer: SpoolWriter,
    where: str,
    read: Callable[[], Generator[Values, None, None]],
    stop: threading.Event,
) -> None:
    try:
        with closing(_ahead(read, stop)) as batches:
            for values in batches:
                writer.write(values)
        if stop.is_set():
            return writer.abandon()
        writer.close()
    except PenstockError as error:
        writer.fail(error)
    except BaseException as error:
        name = type(error).__name__
        writer.fail(DataError(f"{where}: cannot be read: {name}: {error}"))


def _ahead(
    read: Callable[[], Generator[Values, None, None]], stop: threading.Event
) -> Generator[Values, None, None]:
    """What `read` gives, read by another thread while what came before is written."""
    ahead: queue.Queue[Values | BaseException | None] = queue.Queue(AHEAD)
    over = threading.Event()

    def put(what: Values | BaseException | None) -> bool:
        while not (over.is_set() or stop.is_set()):
            with suppress(queue.Full):
                ahead.put(what, timeout=_LOOK_S)
                return True
        return False

    def run() -> None:
        try:
            with closing(read()) as batches:
                for values in batches:
                    if not put(values):
                        return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=run, name="penstock-read", daemon=True)
    thread.start()
    try:
        while not stop.is_set():
            try:
                found = ahead.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found
    finally:
        over.set()
        thread.join(_STOP_S)


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(_STOP_S)


def _root() -> Path:
    folder = os.environ.get(SPOOL)
    return Path(folder) if folder else _temporary()


@functools.cache
def _temporary() -> Path:
    folder, owner = Path(tempfile.mkdtemp(prefix="penstock-spool-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    weakref.finalize(_end, remove)  # for as long as this module
    return folder
