"""Encoded images: folders of classes, columns of files, and the stage that decodes them."""

from __future__ import annotations

import builtins
import io
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as pillow

from penstock import feed
from penstock.errors import DataError, JobError
from penstock.feed.decode import ALL_BAD

RNG = np.random.default_rng(0)


def encoded(
    color: tuple[int, int, int], size: int = 6, form: str = "png", mode: str = "RGB"
) -> bytes:
    """A picture of one color."""
    pixels = np.broadcast_to(np.array(color, np.uint8), (size, size, 3))
    file = io.BytesIO()
    pillow.fromarray(np.ascontiguousarray(pixels)).convert(mode).save(file, form)
    return file.getvalue()


def batch(source: Any) -> feed.Rows:
    """All records, decoded, and their ids."""
    records = source.open(source.manifest().share(0, 1))
    records.wait(2**62, 30.0)
    ids = np.arange(len(records))
    rows = feed.Rows(*records.take(ids), ids)
    for stage in source.stages:
        rows = stage.apply(rows, np.random.default_rng(0))
    return rows


def pictures(folder: Path) -> Path:
    """Twelve pictures in classes cat and dog, red as their class and green as their number."""
    for label, name in enumerate(["cat", "dog"]):
        (folder / name / "more").mkdir(parents=True)
        for i in range(6):
            path = folder / name / ("more" if i % 2 else "") / f"{i}.png"
            path.write_bytes(encoded((100 * label, 10 * i, 7)))
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "_cache").mkdir()
    (folder / "_cache" / "a.png").write_bytes(b"")
    return folder


def test_a_folder_of_classes(tmp_path: Path) -> None:
    source: Any = feed.images(pictures(tmp_path), height=4, width=5)
    assert source.classes == ("cat", "dog")
    rows = batch(source)
    assert rows.x.shape == (12, 3, 4, 5)
    assert str(rows.x.dtype) == "torch.uint8"
    assert str(rows.y.dtype) == "torch.int64"
    assert (rows.x[:, 0, 0, 0] == 100 * rows.y).all()
    found = sorted((int(y), int(x[1, 0, 0]) // 10) for x, y in zip(rows.x, rows.y, strict=True))
    assert found == [(label, i) for label in (0, 1) for i in range(6)]
    assert set(rows.y[:4].tolist()) == {0, 1}, "an order that mixes the classes"
    manifest = source.manifest()
    assert manifest == pickle.loads(pickle.dumps(source)).manifest()
    (tmp_path / "dog" / "7.png").write_bytes(encoded((0, 0, 0)))
    assert source.manifest().fingerprint != manifest.fingerprint
    assert source.describe() == {
        "images": {"url": str(tmp_path), "height": 4, "width": 5, "channels": 3}
    }


def test_a_spool_of_other_pictures_of_the_same_size_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_SPOOL", str(tmp_path / "spools"))
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    (folder / "a.bmp").write_bytes(encoded((1, 2, 3), form="bmp"))
    source: Any = feed.images(folder.parent, height=6, width=6)
    assert batch(source).x[0, :, 0, 0].tolist() == [1, 2, 3]
    (folder / "a.bmp").write_bytes(encoded((4, 5, 6), form="bmp"))
    again: Any = feed.images(folder.parent, height=6, width=6)
    assert batch(again).x[0, :, 0, 0].tolist() == [4, 5, 6]
    assert again.manifest() == source.manifest()


def test_shards_share_the_images(tmp_path: Path) -> None:
    source: Any = feed.images(pictures(tmp_path), height=2, width=2)
    manifest = source.manifest()
    whole = batch(source)
    found: list[int] = []
    for shard in range(5):
        records = source.open(manifest.share(shard, 5))
        records.wait(2**62, 30.0)
        found += records.take(np.arange(len(records)))[1].tolist()
    assert found == whole.y.tolist()


def test_other_file_systems_serve(tmp_path: Path) -> None:
    pictures(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/pets", recursive=True)
    rows = batch(feed.images("memory://pets", height=2, width=2))
    assert sorted(rows.y.tolist()) == [0] * 6 + [1] * 6


def test_images_are_resized_and_turned_into_the_channels_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, data in {
        "1.jpg": encoded((200, 200, 200), 31, "jpeg", "L"),
        "2.gif": encoded((200, 200, 200), 3, "gif"),
        "3.png": encoded((200, 200, 200), 8, "png", "RGBA"),
    }.items():
        (tmp_path / "a" / name).write_bytes(data)
    assert (batch(feed.images(tmp_path, height=8, width=8)).x == 200).all()
    grey = batch(feed.images(tmp_path, height=8, width=8, channels=1)).x
    assert grey.shape == (3, 1, 8, 8)
    assert (grey == 200).all()
    half = np.zeros((2, 2, 3), np.uint8)
    half[:, 1] = 200
    file = io.BytesIO()
    pillow.fromarray(half).save(file, "png")
    (tmp_path / "a" / "2.gif").unlink()
    (tmp_path / "a" / "1.jpg").unlink()
    (tmp_path / "a" / "3.png").write_bytes(file.getvalue())
    expected = np.asarray(pillow.fromarray(half).resize((4, 2), pillow.Resampling.BILINEAR))
    x = batch(feed.images(tmp_path, height=2, width=4)).x[0]
    assert x.numpy().tolist() == expected.transpose(2, 0, 1).tolist()


@pytest.mark.parametrize("bad", [b"", b"no image", encoded((9, 9, 9), 64, "jpeg")[:300]])
def test_images_that_cannot_be_decoded(tmp_path: Path, bad: bytes) -> None:
    pictures(tmp_path)
    (tmp_path / "dog" / "more" / "3.png").write_bytes(bad)
    with pytest.raises(DataError, match=r"more/3\.png is an image that cannot be decoded: \w+: "):
        batch(feed.images(tmp_path, height=2, width=2))
    for mode in ("skip", "quarantine"):
        source: Any = feed.images(tmp_path, height=2, width=2, on_bad_record=mode)
        source.bad.folder = str(tmp_path / "kept")
        records = source.open(source.manifest().share(0, 1))
        records.wait(2**62, 30.0)
        (stage,) = source.stages
        for _ in range(2):  # in a later epoch, it is left out, and not counted again
            ids = np.arange(100, 112)
            taken = feed.Rows(*records.take(np.arange(12)), np.arange(12))
            rows = stage.apply(taken, np.random.default_rng(0))
            assert len(rows.x) == len(rows.y) == len(rows.ids) == 11
            assert (rows.x[:, 0, 0, 0] == 100 * rows.y).all()
            (left_out,) = set(range(12)) - set(rows.ids.tolist())
            assert len(ids) == 12
        assert source.bad.count == 1
        assert source.bad.sample[0].row == left_out
        assert (tmp_path / "kept").exists() == (mode == "quarantine")


def test_when_every_image_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(ALL_BAD):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"none")
    with pytest.raises(DataError, match="every record is bad"):
        batch(feed.images(tmp_path, height=2, width=2, on_bad_record="skip"))
    (tmp_path / "a" / "0.png").unlink()
    assert len(batch(feed.images(tmp_path, height=2, width=2, on_bad_record="skip")).ids) == 0


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded((1, 1, 1)))
    with pytest.raises(DataError, match=r"no image in a folder of a class; .*holds: a\.png"):
        feed.images(tmp_path, height=2, width=2).manifest()
    with pytest.raises(DataError, match="no such folder"):
        feed.images(tmp_path / "gone", height=2, width=2).manifest()
    with pytest.raises(DataError, match="height 0"):
        feed.images(tmp_path, height=0, width=2)
    with pytest.raises(DataError, match="channels 2"):
        feed.images(tmp_path, height=2, width=2, channels=2)


def test_a_file_that_went_away_is_an_error(tmp_path: Path) -> None:
    source: Any = feed.images(pictures(tmp_path), height=2, width=2)
    pieces = source.manifest().share(0, 1)
    (tmp_path / "dog" / "2.png").unlink()
    records = source.open(pieces)
    with pytest.raises(DataError, match=r"an image cannot be read: .*2\.png"):
        records.wait(2**62, 30.0)


@pytest.mark.parametrize("said", ["Image", "mapping"])
def test_a_column_of_encoded_images(tmp_path: Path, said: str) -> None:
    photos: list[Any] = [encoded((i, 0, 0), 3 + i) for i in range(5)]
    pq.write_table(pa.table({"photo": photos, "y": np.arange(5)}), tmp_path / "a.parquet", 2)
    features: Any = {"column": "photo", "height": 4, "width": 4}
    described = {**features, "channels": 3}
    features = feed.Image(**features) if said == "Image" else features
    source = feed.parquet(tmp_path, features=features, target="y")
    rows = batch(source)
    assert rows.x[:, 0, 0, 0].tolist() == rows.y.tolist() == [0, 1, 2, 3, 4]
    assert source.describe() == {
        "parquet": {"url": str(tmp_path), "features": described, "target": "y"}
    }
    photos[1:3] = [None, b"none"]
    table = pa.table({"photo": photos, "y": np.arange(5)})
    pq.write_table(table, tmp_path / "a.parquet", 2)
    with pytest.raises(DataError, match="column 'photo': null in row 1"):
        batch(feed.parquet(tmp_path, features=features, target="y"))
    skipping: Any = feed.parquet(tmp_path, features=features, target="y", on_bad_record="skip")
    assert batch(skipping).y.tolist() == [0, 3, 4]
    assert [bad.reason.partition(":")[0] for bad in skipping.bad.sample] == [
        "column 'photo'",
        "record 1 is an image that cannot be decoded",
    ]


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"column": "a", "height": 2, "widht": 2}, "'widht'(.|\n)*did you mean 'width'"),
        ({"column": "a", "height": 2}, "needs width"),
        ({"column": "a", "height": 2, "width": 2.5}, "width 2.5"),
        ({"column": "", "height": 2, "width": 2}, "column ''"),
    ],
)
def test_images_are_checked_when_they_are_said(features: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        feed.parquet("a.parquet", features=features, target="y")


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = feed.images(pictures(tmp_path), height=2, width=2, on_bad_record="skip")
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name == "PIL":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(JobError, match=r"penstock\[images\]"):
        batch(source)
