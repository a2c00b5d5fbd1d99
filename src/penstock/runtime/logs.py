"""What workers print, kept in the run directory as segments: `logs/rank-0.000000.log` and so on."""

from __future__ import annotations

import re
import time
from collections import deque

from penstock.runtime.store import Store

FOLDER = "logs"
ROLL_S = 2.0
LAST_LINES = 12


class Logs:
    """The output of all ranks of one run; segments continue after those that are there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._next: dict[int, int] = {}
        self._pending: dict[int, bytearray] = {}
        self._partial: dict[int, bytes] = {}
        self._last: dict[int, deque[str]] = {}
        self._rolled_at = time.monotonic()
        for name in store.names(FOLDER):
            if found := re.fullmatch(r"rank-(\d+)\.(\d+)\.log", name):
                rank, number = int(found[1]), int(found[2])
                self._next[rank] = max(self._next.get(rank, 0), number + 1)

    def write(self, rank: int, data: bytes) -> list[str]:
        """Keeps output; returns the lines that it completes."""
        self._pending.setdefault(rank, bytearray()).extend(data)
        *lines, self._partial[rank] = (self._partial.get(rank, b"") + data).split(b"\n")
        words = [line.decode(errors="replace") for line in lines]
        self._last.setdefault(rank, deque(maxlen=LAST_LINES)).extend(words)
        if time.monotonic() - self._rolled_at > ROLL_S:
            self.roll()
        return words

    def last(self, rank: int) -> list[str]:
        """The last lines of a rank, one that has not ended too."""
        partial = self._partial.get(rank, b"").decode(errors="replace")
        return [*self._last.get(rank, ()), *([partial] if partial else [])]

    def roll(self) -> None:
        """Writes what is in memory as one segment for each rank."""
        for rank, data in self._pending.items():
            number = self._next.get(rank, 0)
            self._store.write(f"{FOLDER}/rank-{rank}.{number:06d}.log", bytes(data))
            self._next[rank] = number + 1
        self._pending.clear()
        self._rolled_at = time.monotonic()

    def close(self) -> None:
        """Writes the rest."""
        self.roll()
