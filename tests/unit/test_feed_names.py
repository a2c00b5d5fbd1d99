"""The public names of `penstock.feed`."""

from __future__ import annotations

from penstock import feed


def test_the_public_names_are_these() -> None:
    assert feed.__all__ == [
        "Manifest",
        "Partition",
        "Piece",
        "Records",
        "Source",
        "arrays",
        "dataframe",
        "dataset",
        "mnist",
        "npz",
        "parquet",
    ]
    for name in feed.__all__:
        assert callable(getattr(feed, name))
