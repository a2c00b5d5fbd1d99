"""The public names of `penstock.feed`."""

from __future__ import annotations

from penstock import feed


def test_the_public_names_are_these() -> None:
    assert feed.__all__ == [
        "Image",
        "Manifest",
        "Partition",
        "Piece",
        "Records",
        "Rows",
        "Source",
        "Stage",
        "Stream",
        "arrays",
        "arrow",
        "csv",
        "dataframe",
        "dataset",
        "images",
        "jsonl",
        "map",
        "mnist",
        "npz",
        "parquet",
        "stream",
        "text",
    ]
    for name in feed.__all__:
        assert callable(getattr(feed, name))
