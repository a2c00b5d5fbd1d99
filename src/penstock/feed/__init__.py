"""Records to tensors: sources of data that any worker can open, and who owns which rows.

Agents on Spark import it too: torch is imported inside the functions that use it.
"""

from __future__ import annotations

from penstock.feed.arrays import arrays, npz
from penstock.feed.dataframe import dataframe
from penstock.feed.dataset import dataset
from penstock.feed.idx import mnist
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.parquet import parquet
from penstock.feed.source import Records, Source

__all__ = [
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
