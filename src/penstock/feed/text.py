"""Records that are runs of bytes of text files, to predict each byte from those before it."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from penstock.errors import DataError
from penstock.feed.files import File, find, opened, shared_folder
from penstock.feed.filling import filled, key_of
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.source import Rows, Source, Stage

if TYPE_CHECKING:
    from penstock.feed.converter import Values
    from penstock.feed.spooled import SpoolRecords

_READ_BYTES = 2**20


def text(url: str | os.PathLike[str], *, length: int, stride: int | None = None) -> Source:
    """Records of `length` successive bytes and the bytes that come next, from text files.

    Features are int64 (batch, length), and so is the target: each byte's successor. A record lies
    in one file; what is left over at a file's end is too short to be one. A byte that is in several
    records is spooled several times, as a feature and as a target.

    Arguments:
        url: of a file; a folder, whose `*.txt` and `*.md` files count at any depth; or a glob.
            Files are sorted by path.
        length: of a record, in bytes.
        stride: from the start of a record to that of the next; default `length`.

    Raises:
        DataError: here for arguments that cannot be; from `manifest()` for missing files.
    """
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"text: {name} {value!r}: expected a whole number of bytes, 1 or more")
    return TextSource(os.fspath(url), length, stride)


@dataclass
class TextSource:
    """Text files, each a partition."""

    url: str
    length: int
    stride: int
    _files: tuple[File, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage("codes", codes),)

    def manifest(self) -> Manifest:
        files = self._files = tuple(find(self.url, (".txt", ".md")))
        start = shared_folder(files)
        return Manifest(
            tuple(Partition(file.path[start:].lstrip("/"), self._rows(file)) for file in files)
        )

    def open(self, pieces: Sequence[Piece]) -> SpoolRecords:
        files = self._files = self._files or tuple(find(self.url, (".txt", ".md")))
        key = key_of(self.describe(), [*map(asdict, files)], [*map(asdict, pieces)])
        rows = sum(piece.rows for piece in pieces)
        need_bytes = 2 * rows * self.length
        return filled(key, self.url, rows, lambda: self._read(pieces), self._empty, need_bytes)

    def describe(self) -> dict[str, Any]:
        values: dict[str, Any] = {"url": self.url, "length": self.length}
        if self.stride != self.length:
            values["stride"] = self.stride
        return {"text": values}

    @property
    def _empty(self) -> Values:
        nothing = np.empty((0, self.length), np.uint8)
        return {"x": nothing, "y": nothing}

    def _rows(self, file: File) -> int:
        return max(0, (file.size - self.length - 1) // self.stride + 1)

    def _read(self, pieces: Sequence[Piece]) -> Generator[Values, None, None]:
        rows_at_once = max(1, _READ_BYTES // max(self.stride, self.length))
        for piece in pieces:
            file = self._files[piece.partition]
            with opened(self.url, file.path) as handle:
                for row in range(piece.start, piece.stop, rows_at_once):
                    rows = min(rows_at_once, piece.stop - row)
                    need = (rows - 1) * self.stride + self.length + 1
                    handle.seek(row * self.stride)
                    data = handle.read(need)
                    if len(data) < need:
                        raise DataError(
                            f"{file.path} ends at byte {row * self.stride + len(data):,}: it had "
                            f"{file.size:,}",
                            hint="the file was changed after the run began; start a new run",
                        )
                    windows = sliding_window_view(np.frombuffer(data, np.uint8), self.length + 1)
                    windows = windows[:: self.stride]
                    yield {"x": windows[:, :-1], "y": windows[:, 1:]}


def codes(rows: Rows, rng: np.random.Generator) -> Rows:
    """Bytes as int64, which embeddings and cross entropy want; spooled as they are."""
    return Rows(rows.x.long(), rows.y.long(), rows.ids)
