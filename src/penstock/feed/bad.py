"""Records that cannot be used: an error, left out, or left out and kept for people to see.

A record is bad when it holds a null, has another length or size than the first, is not what its
column says (a number that is none, a line that cannot be parsed), or is an image that cannot be
decoded. A column of a type that no array is made of is no bad record: that is an error always.

In quarantine, bad records go to JSON-lines files in a folder on any fsspec URL, one for each place
(a file, a partition) that they come from, a line each:

    {"where": "a.csv", "row": 17, "reason": "...", "record": {"x": ..., "y": ...}}

with bytes as {"base64": ...}. Object stores have no append: there, what is told of a place in one
go is one object, and the next is numbered.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import posixpath
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.errors import DataError, did_you_mean
from penstock.feed.files import locate
from penstock.feed.mapped import origin

ON_BAD_RECORD = ("error", "skip", "quarantine")
QUARANTINE = "PENSTOCK_QUARANTINE"
"""The environment variable that names the folder of quarantined records."""
SAMPLED = 5


@dataclass(frozen=True)
class BadRecord:
    """One of them: the file or partition it comes from, its row there, and what is wrong."""

    where: str
    row: int
    reason: str


class BadRecords:
    """What becomes of bad records, and what has been seen of them by this process.

    Pickled, it takes along what to do and where, not what was seen. Threads may share it.

    Arguments:
        on_bad_record: "error", "skip" or "quarantine".
        folder: of quarantined records, on any fsspec URL; may be set later. None: as the
            environment variable `QUARANTINE` says when the first comes. Where neither says one,
            they are only counted.

    Raises:
        DataError: `on_bad_record` is another word.
    """

    def __init__(self, on_bad_record: str = "error", folder: str | None = None) -> None:
        if on_bad_record not in ON_BAD_RECORD:
            raise DataError(
                f"on_bad_record: received {on_bad_record!r}: expected one of: "
                f"{', '.join(ON_BAD_RECORD)}",
                hint=did_you_mean(str(on_bad_record), list(ON_BAD_RECORD)),
            )
        self.on_bad_record, self.folder = on_bad_record, folder
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets what has been seen."""
        self.count = 0
        self.sample: list[BadRecord] = []
        self._written: Counter[str] = Counter()

    @property
    def stops(self) -> bool:
        """Whether the first one ends the run."""
        return self.on_bad_record == "error"

    def add(
        self,
        where: str,
        rows: Sequence[int],
        reason: Callable[[int], str],
        record: Callable[[int], Any],
        hint: str,
        *,
        by_process: bool = False,
    ) -> None:
        """Takes note of bad records of one place.

        Arguments:
            where: the file or partition.
            rows: their numbers there.
            reason: of the i-th of them, what is wrong with it.
            record: of the i-th of them, its values.
            hint: what to do about them.
            by_process: other processes tell of this place too: each has its own file.

        Raises:
            DataError: the first of them, where they are an error.
        """
        if not len(rows):
            return
        if self.stops:
            raise DataError(f"{where}: {reason(0)}", hint=hint)
        with self._lock:
            self.count += len(rows)
            sampled = range(min(SAMPLED - len(self.sample), len(rows)))
            self.sample += [BadRecord(where, int(rows[i]), reason(i)) for i in sampled]
            if self.on_bad_record == "quarantine":
                self._quarantine(
                    f"{where}-{os.uname().nodename}-{os.getpid()}" if by_process else where,
                    [
                        {
                            "where": where,
                            "row": int(rows[i]),
                            "reason": reason(i),
                            "record": _plain(record(i)),
                        }
                        for i in range(len(rows))
                    ],
                )

    def line(self) -> str:
        """For people: how many there were, and the first few; empty where there were none."""
        if not self.count:
            return ""
        folder = self._folder_now() if self.on_bad_record == "quarantine" else None
        kept = f", kept in {folder}" if folder else ""
        shown = "; ".join(f"{bad.where}: {bad.reason}" for bad in self.sample)
        more = "; ..." if self.count > len(self.sample) else ""
        noun = "bad record" if self.count == 1 else "bad records"
        return f"{self.count:,} {noun} left out{kept}: {shown}{more}"

    def every(self, where: str) -> DataError:
        """The error for data of which no record is good."""
        first = self.sample[0]
        return DataError(
            f"{where}: every record is bad: {self.count:,} of {self.count:,}, the first in "
            f"{first.where}: {first.reason}",
            hint="is the right column named, and its type or size the one expected?",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"on_bad_record": self.on_bad_record, "folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _folder_now(self) -> str | None:
        return self.folder or os.environ.get(QUARANTINE)

    def _quarantine(self, where: str, entries: Sequence[dict[str, Any]]) -> None:
        folder = self._folder_now()
        if not folder:
            return
        fs, root = locate(folder)
        digest = hashlib.sha256(where.encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.-]+", "-", posixpath.basename(where.rstrip("/")))[-80:]
        name = f"{name}-{digest}"
        times, appends = self._written[where], "file" in fs.protocol
        if times and not appends:
            name += f"-{times}"
        self._written[where] += 1
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        try:
            fs.makedirs(root, exist_ok=True)
            path = f"{root.rstrip('/')}/{name}.jsonl"
            with fs.open(path, "ab" if times and appends else "wb") as file:
                file.write(text.encode())
        except OSError as error:
            raise DataError(
                f"{folder}: bad records cannot be written there: {error}",
                hint="make room or give rights, or say on_bad_record: skip",
            ) from error


def bad_of(source: Any) -> BadRecords:
    """What a source has left out; of one that leaves out nothing, an empty account."""
    found = getattr(origin(source), "bad", None)
    return found if isinstance(found, BadRecords) else BadRecords()


def _plain(value: Any) -> Any:
    """As JSON says it."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)
