"""What a driver hands to its own workers: any object, pickled, its arrays shared and not copied.

    8 bytes n, n times 8 bytes length, then n parts, each starting at a multiple of 64 bytes:
    a head in JSON, the pickle, and the buffers it left out of band (pickle protocol 5).

Workers of one machine map one file, so that an array in a Job exists once however many they are.
The head can be read before anything of the user's is imported.
"""

from __future__ import annotations

import functools
import json
import mmap
import pickle
import struct
from typing import Any

import cloudpickle

from penstock.errors import NetworkError
from penstock.section import label
from penstock.spec import Maker

ALIGNMENT = 64


def pack(head: dict[str, Any], value: Any) -> list[bytes | memoryview]:
    """The parts of the file, in order.

    Raises:
        NetworkError: something in it cannot be pickled; the message names what.
    """
    buffers: list[pickle.PickleBuffer] = []
    try:
        body = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    except Exception as error:  # picklers raise whatever the object's own code raises
        raise NetworkError(
            f"the job cannot be sent to its workers: {_culprit(value)} cannot be pickled: "
            f"{type(error).__name__}: {error}",
            hint="give a function that makes it instead of the object (network=make_network), "
            "and open files, locks and connections inside that function",
        ) from error
    parts: list[bytes | memoryview] = [
        json.dumps(head).encode(),
        body,
        *(buffer.raw() for buffer in buffers),
    ]
    lengths = [len(part) for part in parts]
    index = struct.pack(f"<{len(parts) + 1}Q", len(parts), *lengths)
    out: list[bytes | memoryview] = []
    for part in [index, *parts]:
        out += [part, bytes(-len(part) % ALIGNMENT)]
    return out


class Payload:
    """A file that `pack` made."""

    def __init__(self, fd: int) -> None:
        view = memoryview(mmap.mmap(fd, 0, access=mmap.ACCESS_READ))
        (count,) = struct.unpack_from("<Q", view)
        lengths = struct.unpack_from(f"<{count}Q", view, 8)
        start, self._parts = _aligned(8 * (count + 1)), []
        for length in lengths:
            self._parts.append(view[start : start + length])
            start = _aligned(start + length)
        self.head: dict[str, Any] = json.loads(bytes(self._parts[0]))

    def load(self) -> Any:
        """The object; its arrays are views of the mapped file, read-only."""
        return pickle.loads(self._parts[1], buffers=self._parts[2:])


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _culprit(value: Any) -> str:
    """The name of the first part that cannot be pickled by itself."""
    for name, part in _parts(value).items():
        try:
            cloudpickle.dumps(part)
        except Exception:
            return _culprit(part) if _parts(part) else f"{name} ({_kind(part)})"
    return type(value).__name__


def _parts(value: Any) -> dict[str, Any]:
    """What a thing of ours is made of, by name; a Job's makers are the user's."""
    if isinstance(value, functools.partial):
        return {str(n): part for n, part in enumerate(value.args)} | value.keywords
    if isinstance(value, dict):
        return value
    ours = type(value).__module__.startswith("penstock") and not isinstance(value, Maker)
    return getattr(value, "__dict__", {}) if ours else {}


def _kind(part: Any) -> str:
    return label(part.target) if isinstance(part, Maker) else type(part).__name__
