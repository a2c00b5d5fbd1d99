"""What every source of data promises (`penstock.feed.Source`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from penstock import feed
from penstock.feed.idx import CARRIED, read_idx
from penstock.feed.spooled import SpoolRecords

ROWS = 23


@dataclass
class Case:
    """A source and the records that it must give, in order of their ids."""

    source: feed.Source
    x: NDArray[Any]
    y: NDArray[Any]


def values() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x = np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32)
    return x, np.arange(100, 100 + ROWS)


def arrays_case(folder: Path) -> Case:
    x, y = values()
    return Case(feed.arrays(x, torch.from_numpy(y)), x, y)


def partitions_case(folder: Path) -> Case:
    x, y = values()
    return Case(feed.arrays(x, y, partitions=[10, 0, 9, 4]), x, y)


def npz_case(folder: Path) -> Case:
    x, y = values()
    np.savez(folder / "records.npz", images=x, labels=y)
    return Case(feed.npz(folder / "records.npz", x="images", y="labels"), x, y)


def mnist_case(folder: Path) -> Case:
    images = read_idx(str(CARRIED / "t10k-images-idx3-ubyte.gz"))
    labels = read_idx(str(CARRIED / "t10k-labels-idx1-ubyte.gz"))
    x = torch.from_numpy(images.copy())[:, None].float().mul(1 / 255)
    return Case(feed.mnist(split="test"), x.numpy(), labels.astype(np.int64))


def dataset_case(folder: Path) -> Case:
    x, y = values()
    records = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    return Case(feed.dataset(records), x, y)


def parquet_case(folder: Path) -> Case:
    x, y = values()
    for name, rows in [("b", slice(9, ROWS)), ("a", slice(0, 9))]:
        lists = pa.FixedSizeListArray.from_arrays(pa.array(x[rows].ravel()), 3)
        table = pa.table({"label": y[rows], "unused": y[rows], "features": lists})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=5)
    return Case(feed.parquet(folder, features="features", target="label"), x, y)


def arrow_case(folder: Path) -> Case:
    x, y = values()
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 3)
    table = pa.table({"label": y, "unused": y, "features": lists})
    with (
        pa.OSFile(str(folder / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table.slice(0, 14), 4)
    with (
        pa.OSFile(str(folder / "b.arrows"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table.slice(14), 4)
    return Case(feed.arrow(folder, features="features", target="label"), x, y)


def csv_case(folder: Path) -> Case:
    x, y = values()
    for name, rows in [("b", range(9, ROWS)), ("a", range(9))]:
        lines = [f"{x[i, 0].item()},{y[i]},{x[i, 1].item()},text" for i in rows]
        (folder / f"{name}.csv").write_text("\n".join(["u,label,v,w", *lines]) + "\n")
    source = feed.csv(folder, features=["u", "v"], target="label")
    return Case(source, x[:, :2].astype(np.float32), y)


def jsonl_case(folder: Path) -> Case:
    x, y = values()
    for name, rows in [("b", range(9, ROWS)), ("a", range(9))]:
        lines = [json.dumps({"x": x[i].tolist(), "y": int(y[i])}) for i in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return Case(feed.jsonl(folder, features="x", target="y"), x.astype(np.float32), y)


def text_case(folder: Path) -> Case:
    data = np.random.default_rng(0).integers(0, 256, 100, dtype=np.uint8)
    (folder / "a.txt").write_bytes(data[:60].tobytes())
    (folder / "b.txt").write_bytes(data[60:].tobytes())
    starts = np.array([*range(0, 55, 4), *range(60, 95, 4)])  # 14 and 9 records
    rows = starts[:, None] + np.arange(5)
    return Case(feed.text(folder, length=4), data[rows[:, :4]], data[rows[:, 1:]])


CASES: list[Callable[[Path], Case]] = [
    arrays_case,
    partitions_case,
    npz_case,
    mnist_case,
    dataset_case,
    parquet_case,
    arrow_case,
    csv_case,
    jsonl_case,
    text_case,
]


@pytest.fixture(params=CASES, ids=lambda case: case.__name__.removesuffix("_case"))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    made: Case = request.param(tmp_path)
    return made


def ids_of(pieces: tuple[feed.Piece, ...]) -> list[int]:
    return [piece.first_id + i for piece in pieces for i in range(piece.rows)]


def opened(source: feed.Source, pieces: tuple[feed.Piece, ...]) -> feed.Records:
    """The records, once they have all come."""
    records = source.open(pieces)
    if isinstance(records, SpoolRecords):
        records.wait(2**62, 60.0)
    return records


def check(records: feed.Records, ids: list[int], case: Case) -> None:
    """All records, taken in an order of no order, are those with these ids."""
    assert len(records) == len(ids)
    rows = np.random.default_rng(1).permutation(len(ids))
    x, y = records.take(rows)
    assert isinstance(x, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    expected = [ids[row] for row in rows]
    assert x.numpy().dtype == case.x.dtype
    assert y.numpy().dtype == case.y.dtype
    np.testing.assert_array_equal(x.numpy(), case.x[expected])
    np.testing.assert_array_equal(y.numpy(), case.y[expected])


def test_it_is_a_source(case: Case) -> None:
    assert isinstance(case.source, feed.Source)
    assert not isinstance(case, feed.Source)


@pytest.mark.parametrize("shards", [1, 2, 5, 30])
def test_shards_give_every_record_once(case: Case, shards: int) -> None:
    manifest = case.source.manifest()
    assert manifest.rows == len(case.y)
    seen: list[int] = []
    for shard in range(shards):
        pieces = manifest.share(shard, shards)
        check(opened(case.source, pieces), ids_of(pieces), case)
        seen += ids_of(pieces)
    assert sorted(seen) == list(range(len(case.y)))


def test_pieces_may_come_in_any_order(case: Case) -> None:
    manifest = case.source.manifest()
    pieces = tuple(reversed([p for shard in range(4) for p in manifest.share(shard, 4)]))
    assert ids_of(pieces) != sorted(ids_of(pieces))
    check(opened(case.source, pieces), ids_of(pieces), case)


def test_rows_may_repeat_and_be_none(case: Case) -> None:
    records = opened(case.source, case.source.manifest().share(0, 1))
    x, y = records.take(np.array([3, 3, 0]))
    assert y.tolist() == case.y[[3, 3, 0]].tolist()
    x, y = records.take(np.array([], dtype=np.int64))
    assert x.shape == (0, *case.x.shape[1:])
    assert y.shape == (0, *case.y.shape[1:])


def test_a_batch_is_the_callers(case: Case) -> None:
    records = opened(case.source, case.source.manifest().share(0, 1))
    rows = np.arange(4)
    x, y = records.take(rows)
    kept = copy.deepcopy((x, y))
    x.add_(1)
    y.add_(1)
    again_x, again_y = records.take(rows)
    assert torch.equal(again_x, kept[0])
    assert torch.equal(again_y, kept[1])
    assert not torch.equal(x, again_x)


def test_manifests_repeat(case: Case) -> None:
    again = cloudpickle.loads(cloudpickle.dumps(case.source))
    assert case.source.manifest() == case.source.manifest() == again.manifest()


@pytest.mark.parametrize("after_manifest", [True, False])
def test_a_pickled_source_gives_the_same(case: Case, after_manifest: bool) -> None:
    manifest = copy.deepcopy(case.source).manifest()
    if after_manifest:
        case.source.manifest()
    # Bytes as buffers: arrays come back read-only, as they do from shared memory.
    buffers: list[Any] = []
    pickled = cloudpickle.dumps(case.source, protocol=5, buffer_callback=buffers.append)
    source = cloudpickle.loads(pickled, buffers=[bytes(b.raw()) for b in buffers])
    pieces = manifest.share(1, 2)
    check(opened(source, pieces), ids_of(pieces), case)


def test_a_description_makes_the_same_source(case: Case) -> None:
    described = case.source.describe()
    if described is None:
        assert type(case.source).__name__ in ("ArraySource", "DatasetSource")
        return
    ((name, values),) = described.items()
    source = getattr(feed, name)(**values)
    assert source.describe() == described
    manifest = source.manifest()
    assert manifest == case.source.manifest()
    pieces = manifest.share(0, 2)
    check(opened(source, pieces), ids_of(pieces), case)
