"""Segments: whole, immutable files of length-prefixed records in TensorFlow's record format.

Object stores have no append and no rename, so a log is a folder of segments, each written once
and whole. Their names sort in the order of time, which is the order that TensorBoard reads in:

    events.out.tfevents.{seconds since 1970, ten digits}.{sequence, six digits}.penstock

A record of n bytes of payload is framed as (tensorflow/core/lib/io/record_writer.h)

    uint64 n | uint32 masked_crc(n) | payload | uint32 masked_crc(payload)        little-endian
    masked_crc(x) = rotate_right(crc32c(x), 15) + 0xa282ead8

CRC-32C is linear over GF(2): with a register that starts at 0, crc(a | b) is shift(crc(a), |b|)
xor crc(b), where shift(c, n) feeds n zero bytes. `crc32c` therefore looks up every byte of many
records at once and folds neighbours, log2(length) times; zeros in front change nothing, so
records of different lengths share one array, aligned at their ends.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed (RFC 3720, 12.1)
_PREFIX = bytes.fromhex("54641f64")  # takes the register from 0 to 0xffffffff, where CRC-32C starts
_MASK_DELTA = 0xA282EAD8
_FOLDED_BYTES = 1 << 17  # of records in one array: its temporaries stay within a core's cache
_NAME = re.compile(r"tfevents\.(\d{10,})(?:\.(\d{6,})\.penstock$)?")
_HIDDEN = "part."  # before a name until the file is whole, where files appear as they are written
_APPENDING = {"file", "local", "hdfs", "arrow_hdfs", "sftp", "ssh"}  # those show files half-written


@functools.cache
def _byte_table() -> NDArray[np.uint32]:
    """crc of each byte from a register of 0: (256,)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@functools.cache
def _shift_tables(level: int) -> NDArray[np.uint32]:
    """shift(c, 2**level), a table for each byte of c: (4, 256)."""
    if level > 0:
        half = _shift_tables(level - 1)
        return _shift(half, half)
    place = np.arange(4, dtype=np.uint32).reshape(4, 1)
    register = np.arange(256, dtype=np.uint32) << 8 * place
    return np.asarray(_byte_table()[register & 0xFF] ^ (register >> 8))


def _shift(tables: NDArray[np.uint32], crc: NDArray[np.uint32]) -> NDArray[np.uint32]:
    shifted = tables[0][crc & 0xFF] ^ tables[1][(crc >> 8) & 0xFF]
    return np.asarray(shifted ^ tables[2][(crc >> 16) & 0xFF] ^ tables[3][crc >> 24])


def crc32c(messages: Sequence[bytes]) -> NDArray[np.uint32]:
    """CRC-32C of each message: (messages,)."""
    result = np.empty(len(messages), np.uint32)
    by_levels: dict[int, list[int]] = {}
    for index, message in enumerate(messages):
        by_levels.setdefault((len(message) + len(_PREFIX) - 1).bit_length(), []).append(index)
    for levels, indices in by_levels.items():
        width = 1 << levels
        rows = max(1, _FOLDED_BYTES // width)
        for start in range(0, len(indices), rows):
            chosen = indices[start : start + rows]
            flat = b"".join([(_PREFIX + messages[i]).rjust(width, b"\0") for i in chosen])
            crc = _byte_table()[np.frombuffer(flat, np.uint8).reshape(-1, width)]
            for level in range(levels):
                crc = _shift(_shift_tables(level), crc[:, ::2]) ^ crc[:, 1::2]
            result[chosen] = ~crc[:, 0]
    return result


def _masked(messages: Sequence[bytes]) -> list[int]:
    crc = crc32c(messages)
    masked: list[int] = (((crc >> 15) | (crc << 17)) + np.uint32(_MASK_DELTA)).tolist()
    return masked


def pack(payloads: Iterable[bytes]) -> bytes:
    """One segment of these records."""
    payloads = list(payloads)
    lengths = [struct.pack("<Q", len(payload)) for payload in payloads]
    checks = _masked(lengths + payloads)
    parts = []
    for number, payload in enumerate(payloads):
        parts.append(lengths[number])
        parts.append(struct.pack("<I", checks[number]))
        parts.append(payload)
        parts.append(struct.pack("<I", checks[len(payloads) + number]))
    return b"".join(parts)


def unpack(data: bytes, name: str) -> list[tuple[int, bytes]]:
    """The records of a segment: (offset in bytes, payload).

    Arguments:
        data: the whole segment.
        name: its file, for messages.

    Raises:
        DataError: a record is cut off, or one of its two checksums does not fit.
    """
    lengths: list[bytes] = []
    payloads: list[bytes] = []
    offsets: list[int] = []
    checks: list[tuple[int, int]] = []
    offset, cut = 0, False
    while offset < len(data) and not cut:
        stop = offset + 16
        if stop <= len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            stop += length
        cut = stop > len(data)
        if not cut:
            lengths.append(data[offset : offset + 8])
            payloads.append(data[offset + 12 : stop - 4])
            offsets.append(offset)
            (check,) = struct.unpack_from("<I", data, offset + 8)
            checks.append((check, struct.unpack_from("<I", data, stop - 4)[0]))
            offset = stop
    found = _masked(lengths + payloads)
    for number, expected in enumerate(checks):
        for part, what in enumerate(("length", "payload")):
            if found[part * len(payloads) + number] != expected[part]:
                raise _damaged(name, offsets[number], f"the {what}'s checksum does not fit")
    if cut:
        header = data[offset : offset + 12]
        if len(header) == 12 and _masked([header[:8]]) != list(struct.unpack("<I", header[8:])):
            raise _damaged(name, offset, "the length's checksum does not fit")
        raise _damaged(name, offset, f"the file ends in it, after {len(data):,} bytes")
    return list(zip(offsets, payloads))


def _damaged(name: str, offset: int, what: str) -> DataError:
    return DataError(
        f"{name}: the record at byte {offset:,} is damaged: {what}",
        hint="copy the file again from where it was written, or delete it to do without its events",
    )


def list_segments(filesystem: Any, folder: str) -> list[tuple[str, int]]:
    """(path, size in bytes) of the segments in a folder, oldest first; none if there is no folder.

    Other writers' event files count as segments, as they do for TensorBoard.
    """
    filesystem.invalidate_cache(folder)
    try:
        entries = filesystem.ls(folder, detail=True)
    except FileNotFoundError:
        return []
    found = [(entry["name"], entry["size"] or 0) for entry in entries if entry["type"] == "file"]
    return sorted((s for s in found if "tfevents" in _base(s[0])), key=lambda s: _base(s[0]))


def next_segment(last: str | None, wall_time: float) -> str:
    """The name of the segment after `last` (None: the first one) whose first event is this old.

    Sorts after `last` even where the clock went back, or ran ahead on another machine.
    """
    sequence, seconds = 0, max(0, int(wall_time))
    if last is not None:
        match = _NAME.search(_base(last))
        if match:
            seconds = max(seconds, int(match[1]))
            sequence = int(match[2]) + 1 if match[2] else 0
    name = f"events.out.tfevents.{seconds:010d}.{sequence:06d}.penstock"
    if last is not None and name <= _base(last):  # another writer's file, or seven digits of ours
        name = f"events.out.tfevents.{seconds + 1:010d}.{sequence:06d}.penstock"
    return name


def write_segment(filesystem: Any, folder: str, name: str, data: bytes) -> None:
    """Writes one whole new file: no reader ever sees a part of it."""
    target = f"{folder}/{name}"
    protocols = filesystem.protocol
    if _APPENDING.isdisjoint((protocols,) if isinstance(protocols, str) else protocols):
        filesystem.pipe_file(target, data)
    else:
        hidden = f"{folder}/{_HIDDEN}{name.rpartition('tfevents.')[2]}"
        filesystem.pipe_file(hidden, data)
        filesystem.mv(hidden, target)


def _base(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
