"""Records to tensors: sources of data that any worker can open, and who owns which rows.

Agents on Spark import it too: torch is imported inside the functions that use it.
"""

from __future__ import annotations

from penstock.feed.arrays import arrays, npz
from penstock.feed.arrow import arrow
from penstock.feed.columns import Image
from penstock.feed.csv import csv
from penstock.feed.dataframe import dataframe
from penstock.feed.dataset import dataset
from penstock.feed.idx import mnist
from penstock.feed.images import images
from penstock.feed.jsonlines import jsonl
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.mapped import map
from penstock.feed.parquet import parquet
from penstock.feed.source import Records, Rows, Source, Stage, Stream
from penstock.feed.stream import stream
from penstock.feed.text import text

__all__ = [
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
