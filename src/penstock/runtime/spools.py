"""Where a run on this machine keeps its spools: a folder of its own, on local disk.

    <temporary folder>/penstock-<uid>/<name of the run>-<digest of its directory>/

It goes when the run is over. After an interrupt, or when a machine has failed, it stays for the run
that goes on from there, which takes from it what has not changed; whichever run comes next removes
folders that are a day old and in use by nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from penstock.errors import RunError
from penstock.feed.filling import SPOOL
from penstock.feed.kept import KEPT_S, own_folder

LOCK = "in-use"


class RunSpools:
    """The spools of one run.

    Arguments:
        url: the run's directory.

    Raises:
        RunError: another process runs it now, or there can be no such folder.
    """

    def __init__(self, url: str) -> None:
        root = Path(os.environ.get(SPOOL) or tempfile.gettempdir()) / f"penstock-{os.getuid()}"
        digest = hashlib.sha256(url.encode()).hexdigest()[:12]
        self.folder = root / f"{Path(url).name}-{digest}"
        try:
            own_folder(root)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = open(self.folder / LOCK, "wb")  # noqa: SIM115
        except OSError as error:
            raise RunError(
                f"no folder for spools: {error}",
                hint=f"{SPOOL} names another place for them, on a disk of this machine",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{url} is being run by another process: {self.folder} is in use",
                hint="wait for it, or run in another directory",
            ) from error
        self.keep = True
        """Whether they stay for a run that goes on from there."""
        _sweep(root)

    def close(self) -> None:
        """The run is over."""
        if not self.keep or not any(path.name != LOCK for path in self.folder.iterdir()):
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()  # if it was the last
        self._lock.close()


def _sweep(root: Path) -> None:
    for left in _left(root):
        shutil.rmtree(left, ignore_errors=True)


def _left(root: Path) -> Iterator[Path]:
    for folder in root.iterdir():
        with contextlib.suppress(OSError), open(folder / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - folder.stat().st_mtime > KEPT_S:
                yield folder
