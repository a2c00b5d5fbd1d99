"""`feed.parquet`: columns to tensors, and what is said of bad files, columns and rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from penstock import feed
from penstock.errors import DataError

LABELS = [0, 1, 2, 3]


def write(path: Path, rows_per_group: int = 2, **columns: Any) -> Path:
    pq.write_table(pa.table({**columns, "y": columns.get("y", LABELS)}), path, rows_per_group)
    return path


def opened(source: feed.Source, pieces: Sequence[feed.Piece]) -> Any:
    """Records that have all come."""
    records: Any = source.open(pieces)
    records.wait(2**62, 30.0)
    return records


def everything(source: feed.Source) -> tuple[Any, Any]:
    records = opened(source, source.manifest().share(0, 1))
    x, y = records.take(np.arange(len(records)))
    return x, y


def tensors(values: np.ndarray[Any, Any], **options: Any) -> pa.Array:
    kind = pa.fixed_shape_tensor(pa.float32(), values.shape[1:], **options)
    flat = pa.array(values.astype(np.float32).ravel())
    return pa.ExtensionArray.from_storage(
        kind, pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    )


GRID = np.arange(24).reshape(4, 2, 3)

COLUMNS: dict[str, tuple[pa.Array, torch.Tensor]] = {
    "int8": (pa.array([1, 2, 3, 4], pa.int8()), torch.tensor([1, 2, 3, 4], dtype=torch.int8)),
    "float64": (pa.array([0.5, 1.5, 2.5, 3.5]), torch.tensor([0.5, 1.5, 2.5, 3.5]).double()),
    "float16": (
        pa.array(np.arange(4, dtype=np.float16)),
        torch.arange(4, dtype=torch.float16),
    ),
    "bool": (pa.array([True, False, False, True]), torch.tensor([True, False, False, True])),
    "codes": (pa.array([7, 8, 7, 7]).dictionary_encode(), torch.tensor([7, 8, 7, 7])),
    "list": (pa.array([[1, 2], [3, 4], [5, 6], [7, 8]]), torch.arange(1, 9).reshape(4, 2)),
    "large list": (
        pa.array([[1.0], [2.0], [3.0], [4.0]], pa.large_list(pa.float32())),
        torch.tensor([[1.0], [2], [3], [4]]),
    ),
    "fixed list": (
        pa.array([[1, 2], [3, 4], [5, 6], [7, 8]], pa.list_(pa.int32(), 2)),
        torch.arange(1, 9, dtype=torch.int32).reshape(4, 2),
    ),
    "nested list": (pa.array(GRID.tolist()), torch.from_numpy(GRID)),
    "tensor": (tensors(GRID), torch.from_numpy(GRID).float()),
    "permuted tensor": (
        tensors(GRID, permutation=[1, 0]),
        torch.from_numpy(GRID).float().transpose(1, 2),
    ),
    "binary": (
        pa.array([b"ab", b"cd", b"ef", b"gh"]),
        torch.tensor([list(b"ab"), list(b"cd"), list(b"ef"), list(b"gh")], dtype=torch.uint8),
    ),
    "fixed binary": (
        pa.array([b"ab", b"cd", b"ef", b"gh"], pa.binary(2)),
        torch.tensor([list(b"ab"), list(b"cd"), list(b"ef"), list(b"gh")], dtype=torch.uint8),
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_is_its_tensor(tmp_path: Path, kind: str) -> None:
    column, expected = COLUMNS[kind]
    path = write(tmp_path / "a.parquet", 3, x=column)
    x, y = everything(feed.parquet(path, features="x", target="y"))
    assert x.dtype == expected.dtype
    assert torch.equal(x, expected)
    assert y.tolist() == LABELS
    # Shards that begin within a row group.
    source = feed.parquet(path, features="x", target="y")
    records = opened(source, source.manifest().share(1, 2))
    assert torch.equal(records.take(np.arange(2))[0], expected[2:])


def test_columns_of_numbers_are_stacked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", a=[1, 2, 3, 4], b=np.float32([5, 6, 7, 8]), c=[0.1] * 4)
    x, y = everything(feed.parquet(path, features=["b", "a", "y"], target="y"))
    assert x.dtype == torch.float32
    assert x.tolist() == [[5, 1, 0], [6, 2, 1], [7, 3, 2], [8, 4, 3]]
    assert y.dtype == torch.int64
    x, _ = everything(feed.parquet(path, features=["a", "c"], target="y"))
    assert x.dtype == torch.float64
    assert x[0].tolist() == [1, 0.1]
    x, _ = everything(feed.parquet(path, features=["a"], target="y"))
    assert x.shape == (4, 1)


def test_a_list_of_one_column_of_lists_is_that_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", x=GRID.reshape(4, 6).tolist())
    x, _ = everything(feed.parquet(path, features=["x"], target="y"))
    assert x.tolist() == GRID.reshape(4, 6).tolist()


def names(source: feed.Source) -> list[tuple[str, int]]:
    return [(partition.name, partition.rows) for partition in source.manifest().partitions]


def test_row_groups_are_partitions_in_order_of_files(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "_temporary").mkdir()
    for name in ["b", "a", "more/c", "_temporary/d", ".e"]:
        write(tmp_path / f"{name}.parquet", 3, x=LABELS)
    (tmp_path / "_SUCCESS").touch()
    expected = [("a.parquet#0", 3), ("a.parquet#1", 1), ("b.parquet#0", 3), ("b.parquet#1", 1)]
    more = [("more/c.parquet#0", 3), ("more/c.parquet#1", 1)]
    for url, partitions in [
        (tmp_path, [*expected, *more]),
        (f"{tmp_path}/", [*expected, *more]),
        (f"{tmp_path}/[ab].parquet", expected),
        (tmp_path / "a.parquet", expected[:2]),
        (f"file://{tmp_path}/a.parquet", expected[:2]),
    ]:
        assert names(feed.parquet(url, features="x", target="y")) == partitions


def test_other_file_systems_serve(tmp_path: Path) -> None:
    local = write(tmp_path / "a.parquet", x=[1, 2, 3, 4])
    fsspec.filesystem("memory").pipe_file("/tables/a.parquet", local.read_bytes())
    for url in ["memory://tables", "memory://tables/*.parquet", "memory://tables/a.parquet"]:
        source = feed.parquet(url, features="x", target="y")
        assert names(source) == [("a.parquet#0", 2), ("a.parquet#1", 2)]
        assert everything(source)[0].tolist() == [1, 2, 3, 4]


def test_empty_files_and_row_groups_are_no_rows(tmp_path: Path) -> None:
    kind = pa.list_(pa.int64())
    write(tmp_path / "a.parquet", x=pa.array([], kind), y=pa.array([], pa.int64()))
    source = feed.parquet(tmp_path, features="x", target="y")
    assert source.manifest().rows == 0
    assert len(opened(source, ())) == 0
    write(tmp_path / "b.parquet", x=[[1], [2], [3], [4]])
    assert everything(feed.parquet(tmp_path, features="x", target="y"))[0].shape == (4, 1)


def test_other_columns_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 4, x=[1, 2, 3, 4], other=[5, 6, 7, 8])
    whole = path.read_bytes()
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    size = column.total_compressed_size
    path.write_bytes(whole[:start] + b"\xff" * size + whole[start + size :])
    assert everything(feed.parquet(path, features="x", target="y"))[0].tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        everything(feed.parquet(path, features="x", target="other"))


GOOD = [[1, 2], [3, 4], [5, 6], [7, 8]]

BAD_COLUMNS: dict[str, tuple[pa.Array, str]] = {
    "null": (pa.array([1, 2, 3, None]), "null in row 3"),
    "null list": (pa.array([[1, 2], [3, 4], [5, 6], None]), "null in row 3"),
    "null in a list": (pa.array([[1, 2], [3, 4], [5, 6], [7, None]]), "null in row 3"),
    "null in a fixed list": (
        pa.array([[1, 2], [3, 4], [5, 6], [None, 8]], pa.list_(pa.int64(), 2)),
        "null in row 3",
    ),
    "null in a nested list": (
        pa.array([*[[[1, 2], [3, 4]]] * 3, [[5, 6], [7, None]]]),
        "null in row 3",
    ),
    "null code": (pa.array([1, 1, 2, None]).dictionary_encode(), "null in row 3"),
    "null tensor": (
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.int64(), [2]),
            pa.array([[1, 2], [3, 4], [5, 6], [None, 8]], pa.list_(pa.int64(), 2)),
        ),
        "null in row 3",
    ),
    "ragged": (pa.array([[1, 2], [3, 4], [5, 6], [7]]), "row 3 holds 1 values, the first row 2"),
    "ragged within": (
        pa.array([[[1], [2]], [[3], [4]], [[5], [6]], [[7], [8, 9]]]),
        "row 3 holds 2 values, the first row 1",
    ),
    "ragged binary": (pa.array([b"ab", b"cd", b"ef", b"ghi"]), "row 3 holds 3 bytes"),
}


@pytest.mark.parametrize("rows_per_group", [4, 3, 1])
@pytest.mark.parametrize("kind", BAD_COLUMNS)
def test_a_bad_row_is_named(tmp_path: Path, kind: str, rows_per_group: int) -> None:
    column, words = BAD_COLUMNS[kind]
    write(tmp_path / "a.parquet", rows_per_group, x=column.slice(0, 3), y=LABELS[:3])
    source = feed.parquet(tmp_path, features="x", target="y")
    assert len(everything(source)[1]) == 3  # the rows before it are good
    write(tmp_path / "b.parquet", rows_per_group, x=column)
    source = feed.parquet(tmp_path, features="x", target="y")
    manifest = source.manifest()
    with pytest.raises(DataError) as caught:
        opened(source, manifest.share(6, 7))  # the last row alone
    assert words in str(caught.value)
    assert f"{tmp_path / 'b.parquet'}: column 'x'" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (["a", "b", "c", "d"], ["is string", "integer codes"]),
        (
            pa.array([["a"], ["b"], ["a"], ["a"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
            ["is list", "integer codes"],
        ),
        ([["a"], ["b"], ["c"], ["d"]], ["is list", "integer codes"]),
        (pa.array([0, 1, 2, 3], pa.timestamp("us")), ["is timestamp", "cast it"]),
        ([{"a": 1}] * 4, ["is struct", "cast it"]),
    ],
)
@pytest.mark.parametrize("role", ["features", "target"])
def test_other_types_are_refused_by_the_manifest(
    tmp_path: Path, column: Any, words: list[str], role: str
) -> None:
    path = write(tmp_path / "a.parquet", x=column, z=LABELS)
    columns = {"features": "z", "target": "z", role: "x"}
    with pytest.raises(DataError) as caught:
        feed.parquet(path, **columns).manifest()
    for word in [*words, f"{path}: column 'x'"]:
        assert word in str(caught.value)


def test_missing_columns_are_named_with_those_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", amount=LABELS, age=LABELS)
    with pytest.raises(DataError) as caught:
        feed.parquet(path, features=["age", "amuont"], target="y").manifest()
    for word in [str(path), "no column 'amuont'", "amount, age, y", "did you mean 'amount'?"]:
        assert word in str(caught.value)
    with pytest.raises(DataError, match="no column 'label'"):
        feed.parquet(path, features="age", target="label").manifest()
    with pytest.raises(DataError, match="no feature columns"):
        feed.parquet(path, features=[], target="y")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(LABELS)] * 3, names=["x", "x", "y"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'x' is there 2 times"):
        feed.parquet(tmp_path, features="x", target="y").manifest()


def test_files_of_different_schemas_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", x=[1, 2, 3, 4], z=["a"] * 4)
    second = write(tmp_path / "b.parquet", x=[1.0, 2.0, 3.0, 4.0], z=LABELS)
    with pytest.raises(DataError) as caught:
        feed.parquet(tmp_path, features="x", target="y").manifest()
    assert f"{second}: column 'x' is double, but int64 in {first}" in str(caught.value)
    write(second, x=[1, 2, 3, 4], z=LABELS)  # a column that nobody asked for may differ
    assert feed.parquet(tmp_path, features="x", target="y").manifest().rows == 8
    write(second, z=LABELS)
    with pytest.raises(DataError, match=r"b\.parquet: no column 'x'"):
        feed.parquet(tmp_path, features="x", target="y").manifest()


def test_lists_are_not_stacked_with_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", x=GOOD, z=LABELS)
    with pytest.raises(DataError, match=r"column 'x' is list(.|\n)*name it alone"):
        feed.parquet(path, features=["z", "x"], target="y").manifest()


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    def manifest(url: Any) -> None:
        feed.parquet(url, features="x", target="y").manifest()

    with pytest.raises(DataError, match=r"no \*\.parquet file; the folder .* is empty"):
        manifest(tmp_path)
    path = write(tmp_path / "a.parquet", x=LABELS)
    with pytest.raises(DataError, match=r"gone\.parquet: no such file.*holds: a\.parquet"):
        manifest(tmp_path / "gone.parquet")
    with pytest.raises(DataError, match=r"b\*: no such file.*no file matches"):
        manifest(f"{tmp_path}/b*")
    whole = path.read_bytes()
    for data in [b"", b"text that is no table", whole[:-20]]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
            manifest(path)


def test_a_file_that_was_changed_after_the_manifest_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 4, x=LABELS)
    source = feed.parquet(path, features="x", target="y")
    pieces = source.manifest().share(0, 1)
    write(path, 4, x=LABELS[:2], y=LABELS[:2])
    with pytest.raises(DataError, match=r"a\.parquet has [\d,]+ bytes where it had"):
        opened(source, pieces)


THREADS = """
import os, sys, threading
import numpy, torch
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
from penstock import feed
assert count() == before, "penstock.feed"
assert "pyarrow" not in sys.modules
feed.mnist(split="test").manifest()
assert count() == before, "mnist"
import pyarrow.parquet
before = count()
source = feed.parquet(sys.argv[1], features=["a", "b", "c"], target="y")
manifest = source.manifest()
assert count() == before, "parquet"
records = source.open(manifest.share(0, 1))
records.wait(1, 30.0)
assert count() <= before + 1, "the thread that reads"
records.take(numpy.arange(len(records)))
assert sorted(t.name for t in threading.enumerate()) == ["MainThread"], "it ends with its work"
pyarrow.parquet.read_table(sys.argv[1])
assert count() > before, "the negative control"
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_neither_import_nor_reading_starts_a_thread(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", a=LABELS, b=LABELS, c=LABELS)
    subprocess.run([sys.executable, "-c", THREADS, str(path)], check=True, timeout=60)
