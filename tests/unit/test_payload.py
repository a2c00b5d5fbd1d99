"""What a driver hands to its workers: arrays shared and aligned, and what cannot go is named."""

from __future__ import annotations

import functools
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from penstock import Job, feed
from penstock.errors import NetworkError
from penstock.runtime import payload
from penstock.runtime.payload import ALIGNMENT, Payload


@pytest.fixture
def as_file() -> Iterator[Callable[[list[Any]], int]]:
    """Writes parts to a file in memory; gives its descriptor."""
    opened: list[int] = []

    def write(parts: list[Any]) -> int:
        fd = os.memfd_create("test")
        opened.append(fd)
        with open(os.dup(fd), "wb") as stream:
            stream.writelines(parts)
        return fd

    yield write
    for fd in opened:
        os.close(fd)


def test_what_is_packed_is_loaded(as_file: Callable[[list[Any]], int]) -> None:
    value = {
        "array": np.arange(7.0),
        "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "empty": np.empty((0, 3), np.float32),
        "words": ["a", None, 1.5],
        "tensor": torch.arange(4),
        "function": lambda x: x + 1,
    }
    file = Payload(as_file(payload.pack({"address": ["127.0.0.1", 5], "ä": 1}, value)))
    assert file.head == {"address": ["127.0.0.1", 5], "ä": 1}
    loaded = file.load()
    for name in ("array", "columns", "empty"):
        np.testing.assert_array_equal(loaded[name], value[name])
        assert loaded[name].dtype == value[name].dtype  # type: ignore[union-attr]
    assert loaded["words"] == value["words"]
    assert torch.equal(loaded["tensor"], torch.arange(4))
    assert loaded["function"](1) == 2


def test_each_part_begins_at_a_multiple_of_64_bytes(as_file: Callable[[list[Any]], int]) -> None:
    value = [np.full(n, n % 251, np.uint8) for n in (1, 63, 64, 65, 1000)]
    parts = payload.pack({"odd": "x" * 13}, value)
    data = b"".join(bytes(part) for part in parts)
    assert len(data) % ALIGNMENT == 0
    (count,) = struct.unpack_from("<Q", data)
    assert count == 2 + len(value)  # head, pickle, and every array out of band
    loaded = Payload(as_file(parts)).load()
    for array, original in zip(loaded, value, strict=True):
        assert array.ctypes.data % ALIGNMENT == 0
        np.testing.assert_array_equal(array, original)


def test_arrays_are_not_copied_into_the_pickle() -> None:
    array = np.random.default_rng(0).integers(0, 255, 1 << 20, dtype=np.uint8)
    parts = payload.pack({}, {"x": array, "again": array})
    assert max(len(part) for part in parts[:4]) < 4096  # index, head, pickle, paddings
    assert sum(len(part) == array.nbytes for part in parts) == 1  # once, however often it is used
    shared = next(part for part in parts if len(part) == array.nbytes)
    assert np.shares_memory(np.frombuffer(shared, np.uint8), array)


def test_workers_share_the_arrays_and_cannot_change_them(
    as_file: Callable[[list[Any]], int],
) -> None:
    marker = np.frombuffer(b"a marker that is found again", np.uint8)
    fd = as_file(payload.pack({}, {"x": marker}))
    one, two = Payload(fd).load()["x"], Payload(fd).load()["x"]
    assert not one.flags.owndata
    assert not one.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 1
    data = os.pread(fd, 1 << 16, 0)
    os.pwrite(fd, b"A", data.index(marker.tobytes()))
    assert bytes(one[:1]) == bytes(two[:1]) == b"A"  # both look at the one file


def test_read_only_arrays_can_be_sent_and_used(as_file: Callable[[list[Any]], int]) -> None:
    x = np.ones((10, 2), np.float32)
    x.setflags(write=False)
    source = Payload(as_file(payload.pack({}, feed.arrays(x, np.arange(10))))).load()
    records = source.open(source.manifest().share(0, 1))
    features, target = records.take(np.array([3, 1]))
    features.add_(1)  # a batch is the caller's own
    assert features.tolist() == [[2, 2], [2, 2]]
    assert target.tolist() == [3, 1]
    assert records.take(np.array([3]))[0].tolist() == [[1, 1]]


def test_the_head_is_read_without_the_rest(as_file: Callable[[list[Any]], int]) -> None:
    parts = payload.pack({"search_path": ["/x"]}, object)
    size = len(bytes(parts[4]))
    parts[4] = b"\x00" * size  # the pickle
    file = Payload(as_file(parts))
    assert file.head == {"search_path": ["/x"]}
    with pytest.raises(Exception):  # noqa: B017 (whatever pickle makes of it)
        file.load()
    assert json.loads(bytes(parts[2])) == file.head


def net(guard: object) -> torch.nn.Module:
    network = torch.nn.Linear(2, 2)
    network.guard = guard  # type: ignore[assignment]
    return network


def make_job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "network": functools.partial(torch.nn.Linear, in_features=2, out_features=2),
        "loss": "mse",
        "optimizer": "sgd",
        "train": feed.arrays(np.zeros((4, 2), np.float32), np.zeros((4, 2), np.float32)),
        "batch_size": 2,
        "epochs": 1,
    }
    return Job(**(values | changes))


def run_with(job: Job, worker: object) -> None: ...


@dataclass
class Rest:
    fine: int
    lock: Any


def test_what_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()
    cases = {
        "network (an instance of torch.nn.modules.linear.Linear)": functools.partial(
            run_with, make_job(network=net(lock))
        ),
        "loss (": functools.partial(
            run_with, make_job(loss=lambda output, target, of=lock: output.mean())
        ),
        "b (Rest)": {"a": 1, "b": Rest(1, lock)},
    }
    for words, value in cases.items():
        with pytest.raises(NetworkError) as caught:
            payload.pack({}, value)
        assert f"sent to its workers: {words}" in caught.value.message
        assert "cannot be pickled" in caught.value.message
        assert "lock" in caught.value.message
        assert "function that makes it" in caught.value.hint
    payload.pack({}, functools.partial(run_with, make_job()))
    payload.pack({}, functools.partial(run_with, make_job(network=net("no lock"))))
