"""Idx files, MNIST, and its download from a mirror."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import pickle
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from penstock import feed
from penstock.errors import DataError
from penstock.feed import idx
from penstock.feed.idx import CARRIED, read_idx

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx_bytes(array: NDArray[Any]) -> bytes:
    code = next(c for c, d in idx.DTYPES.items() if np.dtype(d) == array.dtype.newbyteorder(">"))
    head = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return head + array.astype(idx.DTYPES[code]).tobytes()


def write(folder: Path, images: bytes | None, labels: bytes | None) -> Path:
    for name, data in [(IMAGES, images), (LABELS, labels)]:
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def digits(rows: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    images = np.random.default_rng(0).integers(0, 256, (rows, 28, 28), dtype=np.uint8)
    return images, np.arange(rows, dtype=np.uint8)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_reads_every_dtype(tmp_path: Path, dtype: str, packed: bool) -> None:
    array = (np.arange(24).reshape(2, 3, 4) * 5).astype(dtype)
    data = idx_bytes(array)
    (tmp_path / "a").write_bytes(gzip.compress(data) if packed else data)
    read = read_idx(str(tmp_path / "a"))
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


def test_the_package_carries_real_records() -> None:
    source = feed.mnist()
    manifest = source.manifest()
    assert manifest.rows == 10_000
    assert feed.mnist(split="test").manifest().rows == 2_000
    records = source.open(manifest.share(0, 1))
    x, y = records.take(np.arange(10_000))
    assert x.shape == (10_000, 1, 28, 28)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert (x.min().item(), x.max().item()) == (0, 1)
    # The mean and deviation of MNIST's pixels are 0.1307 and 0.3081.
    assert x.mean().item() == pytest.approx(0.1307, abs=0.002)
    assert x.std().item() == pytest.approx(0.3081, abs=0.002)
    assert y.bincount().min() > 800
    assert len(y.bincount()) == 10


def test_any_file_system_and_plain_files_serve() -> None:
    images, labels = digits(7)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/digits/{IMAGES}", idx_bytes(images))
    memory.pipe_file(f"/digits/{LABELS}.gz", gzip.compress(idx_bytes(labels)))
    source = feed.mnist("memory://digits")
    x, y = source.open(source.manifest().share(0, 1)).take(np.arange(7))
    assert torch.equal((x[:, 0] * 255).round().to(torch.uint8), torch.from_numpy(images))
    assert y.tolist() == labels.tolist()


def test_a_worker_is_sent_no_records_and_keeps_only_its_own() -> None:
    source = feed.mnist(split="test")
    manifest = source.manifest()
    assert len(pickle.dumps(source)) < 500
    records = pickle.loads(pickle.dumps(source)).open(manifest.share(0, 20))
    assert 100 * 28 * 28 < len(pickle.dumps(records)) < 101 * (28 * 28 + 8) + 1000


def bad_files() -> dict[str, tuple[bytes | None, bytes | None, list[str]]]:
    images, labels = (idx_bytes(array) for array in digits(5))
    packed = gzip.compress(images)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    wrong_sum = packed[:-8] + b"\0\0\0\0" + packed[-4:]
    size = 16 + 5 * 784
    return {
        "missing": (images, None, [f"{LABELS}: no such file", f"holds: {IMAGES}", "fetch"]),
        "empty": (b"", labels, [IMAGES, "0 bytes", "too short"]),
        "header only": (images[:10], labels, [IMAGES, "10 bytes", "3 dims"]),
        "magic": (b"\x89PNG" + images, labels, [IMAGES, "magic number 0x89504e47"]),
        "dtype": (b"\0\0\x0a\x03" + images[4:], labels, [IMAGES, "0x00000a03"]),
        "truncated": (images[:-7], labels, [IMAGES, f"expected {size}", f"found {size - 7}"]),
        "too long": (images + b"\0", labels, [IMAGES, f"expected {size}", f"found {size + 1}"]),
        "truncated gzip": (packed[:-900], labels, [IMAGES, f"expected {size}", "breaks off"]),
        "gzip without its sum": (packed[:-8], labels, [IMAGES, f"found {size}", "breaks off"]),
        "gzip header only": (packed[:5], labels, [IMAGES, "0 bytes", "breaks off"]),
        "damaged gzip": (bytes(damaged), labels, [IMAGES, "damaged gzip"]),
        "wrong sum": (wrong_sum, labels, [IMAGES, "damaged gzip"]),
        "counts": (images, idx_bytes(digits(4)[1]), [IMAGES, "5 images", LABELS, "4 labels"]),
        "not images": (labels, labels, [IMAGES, "uint8 (5,)", "(records, 28, 28)"]),
        "not labels": (images, images, [LABELS, "uint8 (5, 28, 28)", "(records,)"]),
    }


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_refused_by_the_manifest(tmp_path: Path, name: str) -> None:
    images, labels, words = bad_files()[name]
    write(tmp_path, images, labels)
    with pytest.raises(DataError) as caught:
        feed.mnist(tmp_path).manifest()
    for word in words:
        assert word in str(caught.value)


def test_the_same_files_unharmed_are_accepted(tmp_path: Path) -> None:
    images, labels = (idx_bytes(array) for array in digits(5))
    assert feed.mnist(write(tmp_path, gzip.compress(images), labels)).manifest().rows == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "tets"}, ["'tets'", "train, test", "did you mean 'test'?"]),
        ({"fetch": True}, ["local folder"]),
        ({"path": "s3://bucket/mnist", "fetch": True}, ["local folder", "s3://bucket"]),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        feed.mnist(**arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder served as the mirror, with the carried files for the published ones."""
    folder = tmp_path / "mirror"
    shutil.copytree(CARRIED, folder)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(idx, "MIRROR", f"http://127.0.0.1:{server.server_port}/")
    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.glob("*.gz")}
    monkeypatch.setattr(idx, "MD5", sums)
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_fetch_downloads_what_is_missing(mirror: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "data"
    assert feed.mnist(target, "test", fetch=True).manifest().rows == 2_000
    assert sorted(path.name for path in target.iterdir()) == [
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ]
    shutil.rmtree(mirror)  # now nothing more can be had: what is there is not fetched again
    assert feed.mnist(target, "test", fetch=True).manifest().rows == 2_000
    with pytest.raises(DataError, match=r"train-images.*cannot be downloaded.*404"):
        feed.mnist(target, "train", fetch=True).manifest()


def test_fetch_keeps_nothing_with_a_wrong_md5(mirror: Path, tmp_path: Path) -> None:
    (mirror / f"{LABELS}.gz").write_bytes(gzip.compress(b"another file"))
    with pytest.raises(DataError, match=rf"{LABELS}\.gz: md5 [0-9a-f]{{32}} of \d+ bytes"):
        feed.mnist(tmp_path / "data", fetch=True).manifest()
    assert [path.name for path in (tmp_path / "data").iterdir()] == [f"{IMAGES}.gz"]


def test_fetch_without_a_server_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idx, "MIRROR", "http://127.0.0.1:1/")
    with pytest.raises(DataError, match=r"cannot be downloaded(.|\n)*by other means"):
        feed.mnist(tmp_path, fetch=True).manifest()
    assert list(tmp_path.iterdir()) == []
