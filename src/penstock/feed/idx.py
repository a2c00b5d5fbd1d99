"""The idx format, and MNIST, which is published in it.

An idx file is: two zero bytes, a byte for the dtype, a byte for the number of dims, each dim as a
big-endian uint32, then the values, big-endian, in C order (LeCun, "The MNIST database").
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import os
import posixpath
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError, did_you_mean
from penstock.feed.arrays import rows_of
from penstock.feed.files import contents, locate, opened
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.source import Records, Source

if TYPE_CHECKING:
    import torch

DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

SPLITS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}

CARRIED = Path(__file__).with_name("mnist")
"""The folder of the records that the package carries: 10,000 to train, 2,000 to test."""

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_FETCH_DEADLINE_S = 60.0  # without a byte


def mnist(
    path: str | os.PathLike[str] | None = None, split: str = "train", *, fetch: bool = False
) -> Source:
    """The MNIST handwritten digits, or any data set in its four idx files.

    Features are float32 (batch, 1, 28, 28) in [0, 1], the target int64 (batch,).

    Arguments:
        path: a folder on any fsspec URL that holds the original files, gzipped or not; None: the
            part that the package carries, 10,000 records to train and 2,000 to test.
        split: "train" or "test".
        fetch: download what is missing into `path`, then a local folder.

    Raises:
        DataError: here for arguments that cannot be; from `manifest()` for whatever is wrong with
            the files.
    """
    if split not in SPLITS:
        raise DataError(
            f"mnist: split {split!r}: expected one of: {', '.join(SPLITS)}",
            hint=did_you_mean(split, list(SPLITS)),
        )
    if fetch and (path is None or "://" in os.fspath(path)):
        raise DataError(
            f"mnist: fetch needs a local folder as path, not {path}",
            hint="give path: data, or leave fetch out for the records that the package carries",
        )
    return MnistSource(None if path is None else os.fspath(path), split, fetch)


class MnistSource:
    """Idx files in a folder; each process reads them for itself."""

    def __init__(self, path: str | None, split: str, fetch: bool) -> None:
        self._path, self._split, self._fetch = path, split, fetch
        self._parsed: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None

    def manifest(self) -> Manifest:
        self._parsed = self._parse()
        return Manifest((Partition(SPLITS[self._split][0], len(self._parsed[1])),))

    def open(self, pieces: Sequence[Piece]) -> Records:
        images, labels = self._parsed or self._parse()
        return MnistRecords(rows_of(images, pieces), rows_of(labels, pieces))

    def describe(self) -> dict[str, Any]:
        values: dict[str, Any] = {"split": self._split}
        if self._path is not None:
            values = {"path": self._path, **values}
        if self._fetch:
            values["fetch"] = True
        return {"mnist": values}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parsed": None}

    def _parse(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        folder = str(CARRIED) if self._path is None else self._path
        names = SPLITS[self._split]
        if self._fetch:
            for name in names:
                _fetch(Path(folder), name)
        images_url, labels_url = (_find(folder, name) for name in names)
        images, labels = read_idx(images_url), read_idx(labels_url)
        if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
            raise DataError(
                f"{images_url}: {images.dtype} {images.shape}: expected uint8 (records, 28, 28)"
            )
        if labels.dtype != np.uint8 or labels.ndim != 1:
            raise DataError(
                f"{labels_url}: {labels.dtype} {labels.shape}: expected uint8 (records,)"
            )
        if len(images) != len(labels):
            raise DataError(
                f"{images_url} holds {len(images)} images but {labels_url} holds "
                f"{len(labels)} labels",
                hint="take both files from the same data set and split",
            )
        return images[:, None], labels.astype(np.int64)


class MnistRecords:
    """Images stay uint8 in memory; a batch becomes float32 when it is taken.

    Arguments:
        images: (records, 1, 28, 28) uint8.
        labels: (records,) int64.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._labels)

    def take(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        images = torch.from_numpy(self._images.take(rows, axis=0))
        labels = torch.from_numpy(self._labels.take(rows))
        return images.to(torch.float32).mul_(1 / 255), labels


def read_idx(url: str) -> NDArray[Any]:
    """The array of an idx file, gzipped or not, on any fsspec URL; in native byte order.

    Raises:
        DataError: missing, not idx, damaged, or not as long as its header says.
    """
    with opened(url) as file:
        data = file.read()
    ending = ""
    if data[:2] == b"\x1f\x8b":  # by content: a browser may have unpacked a file and kept its name
        try:
            data = gzip.decompress(data)
        except EOFError:
            data = zlib.decompressobj(wbits=31).decompress(data)
            ending = ", where its gzip stream breaks off"
        except (zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{url}: damaged gzip file: {error}", hint="copy or download it again"
            ) from error
    if len(data) < 4:
        raise DataError(f"{url}: {len(data)} bytes{ending}: too short for an idx header")
    zeros, dtype, num_dims = int.from_bytes(data[:2]), data[2], data[3]
    if zeros != 0 or dtype not in DTYPES:
        raise DataError(
            f"{url}: wrong magic number 0x{data[:4].hex()}: expected 0x0000 and a dtype of "
            f"{', '.join(f'0x{code:02x}' for code in DTYPES)} and the number of dims",
            hint="is it an idx file?",
        )
    start = 4 + 4 * num_dims
    if len(data) < start:
        raise DataError(f"{url}: {len(data)} bytes{ending}: too short for {num_dims} dims")
    shape = tuple(int(dim) for dim in np.frombuffer(data, ">u4", num_dims, offset=4))
    expected = start + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if len(data) != expected or ending:
        raise DataError(
            f"{url}: expected {expected} bytes for shape {shape}, found {len(data)}{ending}",
            hint="copy or download it again",
        )
    array = np.frombuffer(data, DTYPES[dtype], offset=start).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _find(folder: str, name: str) -> str:
    """The URL of a file in a folder, as it is or gzipped."""
    fs, root = locate(folder)
    for candidate in (name, f"{name}.gz"):
        if fs.isfile(posixpath.join(root, candidate)):
            return posixpath.join(folder, candidate)
    raise DataError(
        f"{posixpath.join(folder, name)}: no such file, nor {name}.gz; {contents(fs, root)}",
        hint="fetch: true downloads it; without path, the records that the package carries serve",
    )


def _fetch(folder: Path, name: str) -> None:
    """Download a file into a local folder, unless it is there, gzipped or not."""
    packed = f"{name}.gz"
    if (folder / name).exists() or (folder / packed).exists():
        return
    url = MIRROR + packed
    try:
        with urllib.request.urlopen(url, timeout=_FETCH_DEADLINE_S) as response:
            data = response.read()
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise DataError(
            f"{url}: cannot be downloaded: {error}",
            hint=f"put {packed} into {folder} by other means",
        ) from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != MD5[packed]:
        raise DataError(
            f"{url}: md5 {found} of {len(data)} bytes: expected {MD5[packed]}",
            hint="the download is damaged or is another file; nothing was kept",
        )
    # A name of its own, then a rename: two processes may fetch at once, and either may die.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f"{packed}.", dir=folder)
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, folder / packed)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise DataError(f"{folder / packed}: cannot be written: {error}") from error
