"""`feed.arrays` and `feed.npz`: what they keep, and what they refuse."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from penstock import feed
from penstock.errors import DataError


def everything(source: feed.Source) -> tuple[Any, Any]:
    records = source.open(source.manifest().share(0, 1))
    return records.take(np.arange(len(records)))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", "float64", "bool"])
def test_dtypes_stay(dtype: str) -> None:
    x = np.array([[0, 1], [1, 0]]).astype(dtype)
    taken, _ = everything(feed.arrays(x, [0, 1]))
    assert taken.dtype == getattr(torch, dtype)
    assert taken.tolist() == x.tolist()


def test_tuples_and_dicts_keep_their_form() -> None:
    a, b = np.arange(6).reshape(3, 2), torch.arange(3.0)
    x, y = everything(feed.arrays((a, b), {"class": [0, 1, 2], "box": a}))
    assert isinstance(x, tuple)
    assert torch.equal(x[0], torch.from_numpy(a))
    assert torch.equal(x[1], b)
    assert list(y) == ["class", "box"]
    assert y["class"].tolist() == [0, 1, 2]


def test_views_and_foreign_byte_orders_become_plain_arrays() -> None:
    x = np.arange(12, dtype=">i4").reshape(3, 4).T
    taken, _ = everything(feed.arrays(x, np.arange(4)))
    assert taken.tolist() == x.tolist()


def test_arrays_are_pickled_out_of_band() -> None:
    source = feed.arrays(torch.zeros(1000, 100)[:, ::2], np.zeros(1000))
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(source, protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 2000
    assert sum(len(buffer.raw()) for buffer in buffers) == 1000 * 50 * 4 + 1000 * 8


def test_partitions_are_whole() -> None:
    manifest = feed.arrays(np.zeros(5), np.zeros(5), partitions=[2, 0, 3]).manifest()
    assert manifest.whole
    assert [partition.rows for partition in manifest.partitions] == [2, 0, 3]
    assert not feed.arrays(np.zeros(5), np.zeros(5)).manifest().whole


@pytest.mark.parametrize(
    ("x", "y", "partitions", "words"),
    [
        (np.zeros((10, 2)), np.zeros(9), None, ["x has 10 rows", "y has 9"]),
        ((np.zeros(3), np.zeros(4)), np.zeros(3), None, ["x[0] has 3 rows", "x[1] has 4"]),
        (np.zeros(3), {"a": np.zeros(2)}, None, ["x has 3", "y['a'] has 2"]),
        (np.zeros(3), np.zeros(3), [1, 1], ["[1, 1]", "sum to 2", "3 rows"]),
        (np.zeros(3), np.zeros(3), [4, -1], ["[4, -1]", "3 rows"]),
        (np.zeros(2), ["cat", "dog"], None, ["y is list", "numbers"]),
        (np.array([{}, {}]), np.zeros(2), None, ["x is object", "numbers"]),
        (torch.zeros(2, dtype=torch.bfloat16), np.zeros(2), None, ["x is torch.bfloat16"]),
        (np.float32(1), np.zeros(2), None, ["x is a single value"]),
        ((), np.zeros(2), None, ["x is empty"]),
    ],
)
def test_bad_arrays_are_refused(x: Any, y: Any, partitions: Any, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        feed.arrays(x, y, partitions=partitions)
    for word in words:
        assert word in str(caught.value)


def test_npz_reads_any_file_system_and_keeps_only_a_shard() -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.arange(10.0), y=np.arange(10))
    fsspec.filesystem("memory").pipe_file("/feed/records.npz", buffer.getvalue())
    source = feed.npz("memory://feed/records.npz")
    x, _ = source.open(source.manifest().share(1, 2)).take(np.arange(5))
    assert x.tolist() == [5, 6, 7, 8, 9]
    assert len(pickle.dumps(source)) < 500  # though the file has been read


def npz_bytes(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_bytes() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npz_bytes(features=[1], y=[1]), ["no array 'x'", "features, y"]),
        (npz_bytes(x=[1, 2], y=[1]), ["'x' has 2 rows", "'y' has 1"]),
        (npz_bytes(x=np.array([{}], dtype=object), y=[1]), ["array 'x'", "cannot be read"]),
        (npz_bytes(x=["a"], y=[1]), ["'x' is", "numbers"]),
        (npz_bytes(x=np.zeros(100), y=np.zeros(100))[:-30], ["not an .npz file"]),
        (npz_bytes(x=np.arange(1000), y=[1]).replace(b"\x07\0\0\0", b"\x08\0\0\0"), ["array 'x'"]),
        (b"nothing of the sort", ["not an .npz file"]),
        (b"", ["not an .npz file"]),
        (npy_bytes(), ["a single array"]),
    ],
)
def test_bad_npz_files_are_refused_by_the_manifest(
    tmp_path: Path, data: bytes, words: list[str]
) -> None:
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(DataError) as caught:
        feed.npz(tmp_path / "bad.npz").manifest()
    for word in [*words, "bad.npz"]:
        assert word in str(caught.value)


def test_a_missing_npz_file_lists_its_folder(tmp_path: Path) -> None:
    (tmp_path / "other.npz").touch()
    with pytest.raises(DataError, match=r"gone\.npz: no such file.*holds: other\.npz"):
        feed.npz(tmp_path / "gone.npz").manifest()
    with pytest.raises(DataError, match="there is no folder"):
        feed.npz(tmp_path / "nowhere" / "gone.npz").manifest()
    with pytest.raises(DataError, match="nosuch://"):
        feed.npz("nosuch://gone.npz").manifest()
