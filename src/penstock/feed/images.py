"""Records from folders of image files: the folder's name is the class."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock.errors import DataError
from penstock.feed.bad import BadRecords
from penstock.feed.columns import Image
from penstock.feed.decode import stages_of
from penstock.feed.files import contents, locate, stamp_of
from penstock.feed.filling import filled, key_of
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.segment import Ragged
from penstock.feed.source import Source, Stage

if TYPE_CHECKING:
    from penstock.feed.converter import Values
    from penstock.feed.spooled import SpoolRecords

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_READ_FILES = 64
"""At once: what has a latency (an object store) is asked for all of them together."""


def images(
    url: str | os.PathLike[str],
    *,
    height: int,
    width: int,
    channels: int = 3,
    on_bad_record: str = "error",
) -> Source:
    """Records from a folder with a folder for each class, on any fsspec URL.

    Features are uint8 (batch, channels, height, width), the target int64 (batch,): the number of
    the class, in the order of the folders' names. The spool keeps the files' bytes; a stage decodes
    them, by Pillow (`pip install 'penstock[images]'`). Records are numbered in an order that mixes
    the classes, a function of the files' names.

    Arguments:
        url: of the folder. Files count at any depth of a class's folder, by their endings (.jpg,
            .png, ...).
        height, width, channels: of a record: see `Image`.
        on_bad_record: what becomes of files that cannot be decoded: "error", "skip" or
            "quarantine".

    Raises:
        DataError: here for arguments that cannot be; from `manifest()` where there are no images.
    """
    return ImageSource(
        os.fspath(url), Image("image", height, width, channels), BadRecords(on_bad_record)
    )


@dataclass(frozen=True)
class _Listing:
    """What `manifest()` finds; it travels with the source.

    Arguments:
        classes: their names, in order.
        paths: of the files, from `url`, in the order of the records.
        bytes: of all files.
        digest: of the paths and the files' sizes.
        stamps: of when the files were changed last, which differs from one copy to the next.
    """

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    bytes: int
    digest: str
    stamps: str


@dataclass
class ImageSource:
    """A folder of folders of images, one partition."""

    url: str
    image: Image
    bad: BadRecords
    _listing: _Listing | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        names = self._listing.paths if self._listing else ()
        return stages_of(self.image, self.url, self.bad, names)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by their number."""
        self._listing = self._listing or self._list()
        return self._listing.classes

    def manifest(self) -> Manifest:
        self.bad.clear()
        listing = self._listing = self._list()
        return Manifest((Partition(f"images {listing.digest}", len(listing.paths)),))

    def open(self, pieces: Sequence[Piece]) -> SpoolRecords:
        listing = self._listing = self._listing or self._list()
        key = key_of("images", self.url, listing.digest, listing.stamps, [*map(asdict, pieces)])
        rows = sum(piece.rows for piece in pieces)
        # Of these files nobody knows the size: as large as the others, by and large.
        need_bytes = listing.bytes * rows // len(listing.paths)
        empty: Values = {
            "x": Ragged(np.zeros(1, np.int64), np.empty(0, np.uint8)),
            "y": np.empty(0, np.int64),
        }
        return filled(key, self.url, rows, lambda: self._read(pieces), empty, need_bytes)

    def describe(self) -> dict[str, Any]:
        values = {"url": self.url, **asdict(self.image)}
        del values["column"]
        if not self.bad.stops:
            values["on_bad_record"] = self.bad.on_bad_record
        return {"images": values}

    def _list(self) -> _Listing:
        fs, root = locate(self.url)
        if not fs.isdir(root):
            raise DataError(
                f"{self.url}: no such folder; {contents(fs, posixpath.dirname(root.rstrip('/')))}"
            )
        found = fs.find(root, detail=True)
        sizes = {
            path[len(root) :].lstrip("/"): int(info["size"] or 0)
            for path, info in found.items()
            if path.lower().endswith(SUFFIXES)
        }
        sizes = {path: size for path, size in sizes.items() if "/" in path and path[0] not in "._"}
        if not sizes:
            raise DataError(
                f"{self.url}: no image in a folder of a class; {contents(fs, root)}",
                hint="expected <class>/<name>.jpg (or .png, ...), a folder for each class",
            )
        classes = sorted({path.partition("/")[0] for path in sizes})
        paths = sorted(sizes, key=lambda path: sha256(path.encode()).digest())
        digest = sha256("\n".join(f"{path} {sizes[path]}" for path in paths).encode()).hexdigest()
        changed = "\n".join(f"{path} {stamp_of(info)}" for path, info in sorted(found.items()))
        stamps = sha256(changed.encode()).hexdigest()
        return _Listing(tuple(classes), tuple(paths), sum(sizes.values()), digest[:16], stamps)

    def _read(self, pieces: Sequence[Piece]) -> Generator[Values, None, None]:
        listing = self._listing
        assert listing is not None
        fs, root = locate(self.url)
        labels = {name: label for label, name in enumerate(listing.classes)}
        for piece in pieces:
            for start in range(piece.start, piece.stop, _READ_FILES):
                paths = listing.paths[start : min(start + _READ_FILES, piece.stop)]
                full = [f"{root.rstrip('/')}/{path}" for path in paths]
                try:
                    read = fs.cat(full) if len(full) > 1 else {full[0]: fs.cat_file(full[0])}
                except OSError as error:
                    raise DataError(
                        f"{self.url}: an image cannot be read: {error}",
                        hint="the folder was changed after the run began; start a new run",
                    ) from error
                files = [read[path] for path in full]
                offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
                yield {
                    "x": Ragged(offsets, np.frombuffer(b"".join(files), np.uint8)),
                    "y": np.array([labels[path.partition("/")[0]] for path in paths], np.int64),
                }
