"""Spools that stay on a host when who has read them leaves, for the run that goes on from there.

    <place>/penstock-<uid>/agents-<key of the run>/<key of a spool>

A spool comes and goes whole, by rename: of two who would have it, one does. Its key says of which
rows it is, so that others are not even looked at. Nothing was flushed to the medium, which is why
the run's key is of this start of the machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path

from penstock.errors import DataError
from penstock.feed.filling import key_of
from penstock.feed.folder import SpoolEnd

KEPT_S = 24 * 3600.0
"""How long what nobody has come for may stay; whichever agent comes next removes it then."""
PREFIX = "agents-"
BOOT = Path("/proc/sys/kernel/random/boot_id")


class KeptSpools:
    """What is kept of a run on this host. Folders that are too old are removed.

    Arguments:
        place: a folder of the disk that the spools are on.
        run: the run's directory.
    """

    def __init__(self, place: Path, run: str) -> None:
        self._ours = place / f"penstock-{os.getuid()}"
        self.folder = self._ours / f"{PREFIX}{key_of(run, BOOT.read_text())}"
        for left in self._ours.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > KEPT_S:
                    self._remove(left)

    def keep(self, key: str, spool: Path) -> None:
        """Takes a whole spool over.

        Raises:
            OSError: it cannot: the place is on another disk, or not this user's to write to.
        """
        own_folder(self._ours)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        try:
            spool.rename(self.folder / key)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # there is one already
                raise

    def take(self, key: str, rows: int, checksum: str, spool: Path) -> bool:
        """Gives a spool away, if it is here and is still what it was; whether it did."""
        try:
            own_folder(self._ours)
            spool.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / key).rename(spool)
        except OSError:
            return False
        with contextlib.suppress(DataError, OSError):
            end = SpoolEnd.read(spool)
            if end is not None and (end.rows, end.checksum) == (rows, checksum):
                sizes = [(spool / segment.name).stat().st_size for segment in end.segments]
                if sizes == [segment.bytes for segment in end.segments]:
                    return True
        shutil.rmtree(spool, ignore_errors=True)
        return False

    def remove(self) -> None:
        """Nobody will come for what is left."""
        with contextlib.suppress(OSError):
            own_folder(self._ours)
            self._remove(self.folder)
            self._ours.rmdir()  # if it was the last

    def _remove(self, folder: Path) -> None:
        if folder.exists():
            # Away at once: what another takes meanwhile, it takes whole.
            going = Path(tempfile.mkdtemp(prefix=f"{PREFIX}going-", dir=self._ours))
            with contextlib.suppress(OSError):  # another removes it
                folder.rename(going)
            shutil.rmtree(going, ignore_errors=True)


def own_folder(path: Path) -> None:
    """Makes a folder that no other user can write to, where there is none.

    Raises:
        PermissionError: what is there is not such a folder.
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise PermissionError(f"{path} is not a folder of this user alone")
