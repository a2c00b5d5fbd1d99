"""Text files of one row a line, cut into blocks that can be read by themselves.

A block ends where a row does, so that a worker reads no more of a file than its own blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from penstock.feed.files import opened

BLOCK_BYTES = 16 * 2**20
"""A block is the rows that end within so many bytes, or one row that is longer."""


class Blocks:
    """Cuts files. Keeps the bytes of the last block, which is wanted next when files are counted.

    Arguments:
        delimiter: between values, which may be quoted and have line ends in them; None: each line
            is a row.
    """

    def __init__(self, delimiter: str | None = None) -> None:
        self._delimiter = delimiter
        self._last: tuple[str, int, bytes] = ("", 0, b"")

    def cut(self, url: str, path: str) -> Iterator[tuple[int, bytes]]:
        """Where each block of a file starts, and its bytes; compressed files are as if they
        were not."""
        start, rest = 0, b""
        with opened(url, path, compression="infer") as file:
            data = file.read(BLOCK_BYTES)
            while data:
                following = file.read(BLOCK_BYTES)
                rest += data
                if end := self._row_end(rest) if following else len(rest):
                    self._last = path, start, rest[:end]
                    yield start, rest[:end]
                    start, rest = start + end, rest[end:]
                data = following

    def read(self, url: str, path: str, start: int, stop: int) -> bytes:
        """The bytes of a block."""
        if self._last[:2] == (path, start) and len(self._last[2]) == stop - start:
            return self._last[2]
        with opened(url, path, compression="infer") as file:
            file.seek(start)
            return file.read(stop - start)

    def forget(self) -> None:
        """Lets go of the last block."""
        self._last = ("", 0, b"")

    def _row_end(self, data: bytes) -> int:
        """After the last line end that is not between quotes; 0 if there is none.

        Before such a line end there is an even number of quotes. Where that holds for none, a quote
        may stand for itself, as in `5" pipe`: then quoted values are looked for, which is slower.
        """
        end = data.rfind(b"\n") + 1
        if self._delimiter is None:
            return end
        quotes = data.count(b'"', 0, end)
        while end and quotes % 2:
            before = data.rfind(b"\n", 0, end - 1) + 1
            quotes -= data.count(b'"', before, end)
            end = before
        if end:
            return end
        start = rb"(?:\A|(?<=\n)|(?<=%b))" % re.escape(self._delimiter).encode()
        values = re.compile(start + rb'"[^"]*(?:""[^"]*)*(?:"|\Z)')
        return values.sub(lambda value: b"x" * len(value[0]), data).rfind(b"\n") + 1

    def __getstate__(self) -> dict[str, str | None]:
        return {"delimiter": self._delimiter}

    def __setstate__(self, state: dict[str, str | None]) -> None:
        self.__init__(state["delimiter"])  # type: ignore[misc]


def suffixes_of(*endings: str) -> tuple[str, ...]:
    """With those of compressed files."""
    return tuple(e + packed for e in endings for packed in ("", ".gz", ".bz2", ".xz"))


def failing(low: int, high: int, works: Callable[[int, int], bool]) -> Iterator[int]:
    """The numbers i in [low, high) that are the reason why `works(low, high)` is false.

    Halves what does not work, so that what does is looked at in large pieces.
    """
    if low >= high or works(low, high):
        return
    if high - low == 1:
        yield low
        return
    middle = (low + high) // 2
    yield from failing(low, middle, works)
    yield from failing(middle, high, works)
