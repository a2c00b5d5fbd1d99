"""Records from Parquet files: each row group is a partition, each row a record.

pyarrow is imported inside the functions that use it: its import starts a thread, and worker
processes are forked from a server that must have one thread only.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.errors import DataError
from penstock.feed.arrays import ArrayRecords
from penstock.feed.columns import Layout, Place, Selection, dense, fill
from penstock.feed.files import contents, locate, opened
from penstock.feed.manifest import Manifest, Partition, Piece
from penstock.feed.source import Records, Source

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def parquet(url: str | os.PathLike[str], *, features: str | Sequence[str], target: str) -> Source:
    """Records from a Parquet file, a folder of them, or a glob, on any fsspec URL.

    A column of numbers or booleans is a tensor (batch,); lists of one length, nested or not, are
    (batch, d, ...); a fixed-shape tensor is (batch, ...) as it says; binary of one length is
    uint8 (batch, length); an image as Spark has it is uint8 (batch, channels, height, width).
    Dtypes stay as they are. Only the columns named are read, and a worker holds only its own rows,
    all of them in memory.

    Arguments:
        url: a file; a folder, whose `*.parquet` files count at any depth, save those whose path
            has a part that starts with "_" or "."; or a glob. Files are sorted by path.
        features: a column, taken as its tensor; or several columns of numbers, stacked as float32
            (batch, columns), or as float64 if one of them is. A list of one column of numbers is
            (batch, 1); a list of one other column is that column.
        target: a column, taken as its tensor.

    Raises:
        DataError: from `manifest()` for missing or damaged files, missing columns, and columns of
            other types or of another type in another file; from `open()` for nulls and for lists
            or binary of unequal lengths. Rows are counted from 0 in each file.
    """
    return ParquetSource(os.fspath(url), Selection.of("parquet", features, target))


@dataclass(frozen=True)
class RowGroup:
    """Row group number `group` of a file; its first row is row `first_row` of the file."""

    path: str
    group: int
    first_row: int
    rows: int


class ParquetSource:
    """Parquet files. What `manifest()` learns of them travels with the source: it is small."""

    def __init__(self, url: str, selection: Selection) -> None:
        self._url, self._selection = url, selection
        self._learnt: tuple[tuple[RowGroup, ...], Layout] | None = None

    def manifest(self) -> Manifest:
        groups, _ = self._learnt = self._learn()
        start = len(
            posixpath.commonpath([posixpath.dirname(group.path) for group in groups] or [""])
        )
        return Manifest(
            tuple(
                Partition(f"{group.path[start:].lstrip('/')}#{group.group}", group.rows)
                for group in groups
            )
        )

    def open(self, pieces: Sequence[Piece]) -> Records:
        if self._learnt is None:
            self._learnt = self._learn()
        groups, layout = self._learnt
        x, y = layout.empty(sum(piece.rows for piece in pieces))
        done = 0
        for piece in pieces:  # filled piece by piece: no more than one row group is held twice
            group = groups[piece.partition]
            table = self._read(group).slice(piece.start, piece.rows)
            for name, out in self._selection.outputs(x, y, layout):
                place = Place(group.path, name, group.first_row + piece.start)
                fill(out[done : done + piece.rows], table.column(name), place)
            done += piece.rows
        return ArrayRecords(x, y)

    def describe(self) -> dict[str, Any]:
        return {"parquet": {"url": self._url, **self._selection.describe()}}

    def _learn(self) -> tuple[tuple[RowGroup, ...], Layout]:
        """Reads every file's footer, and one row."""
        groups: list[RowGroup] = []
        types: dict[str, pa.DataType] = {}
        paths = _files(self._url)
        for path in paths:
            with _parquet_file(self._url, path) as file:
                place = Place(path, self._selection.target)
                for name, found in self._selection.check(file.schema_arrow, place).items():
                    if found != types.setdefault(name, found):
                        raise Place(path, name).error(
                            f" is {found}, but {types[name]} in {paths[0]}",
                            "all files must have the same columns; write them anew with one schema",
                        )
                first_row = 0
                for number in range(file.metadata.num_row_groups):
                    rows = file.metadata.row_group(number).num_rows
                    groups.append(RowGroup(path, number, first_row, rows))
                    first_row += rows
        return tuple(groups), self._layout(groups, types, paths[0])

    def _layout(
        self, groups: Sequence[RowGroup], types: dict[str, pa.DataType], path: str
    ) -> Layout:
        import pyarrow as pa

        group = next((group for group in groups if group.rows), None)
        if group is None:
            row = {name: pa.array([], kind) for name, kind in types.items()}
        else:
            path = group.path
            with _parquet_file(self._url, path) as file:
                batch = next(
                    file.iter_batches(
                        batch_size=1,
                        row_groups=[group.group],
                        columns=self._selection.names,
                        use_threads=False,
                    )
                )
                row = {name: batch.column(name) for name in types}
        first_row = group.first_row if group else 0
        return self._selection.layout(
            {name: dense(row[name], Place(path, name, first_row)) for name in row}
        )

    def _read(self, group: RowGroup) -> pa.Table:
        with _parquet_file(self._url, group.path) as file:
            if (
                group.group >= file.metadata.num_row_groups
                or file.metadata.row_group(group.group).num_rows != group.rows
            ):
                raise DataError(
                    f"{group.path}: row group {group.group} no longer has {group.rows} rows",
                    hint="the file was changed after the run began; start a new run",
                )
            return file.read_row_group(
                group.group, columns=self._selection.names, use_threads=False
            )


def _files(url: str) -> list[str]:
    """Paths on the file system of the URL, sorted."""
    fs, root = locate(url)
    if fs.isfile(root):
        return [root]
    if fs.isdir(root):
        found = [path for path in fs.find(root) if path.endswith(".parquet")]
        found = [path for path in found if not _is_hidden(path[len(root) :])]
        if not found:
            raise DataError(f"{url}: no *.parquet file; {contents(fs, root)}")
        return sorted(found)
    matches = [path for path in fs.glob(root) if fs.isfile(path)]
    if not matches:
        raise DataError(
            f"{url}: no such file or folder, and no file matches it; "
            f"{contents(fs, posixpath.dirname(root))}"
        )
    return sorted(matches)


def _is_hidden(path: str) -> bool:
    """As Spark and pyarrow have it: `_temporary`, `.part-0.parquet.crc`."""
    return any(part.startswith(("_", ".")) for part in path.split("/"))


@contextmanager
def _parquet_file(url: str, path: str) -> Iterator[pq.ParquetFile]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with opened(url, path) as handle:
        try:
            # Without threads, here and in reads: a worker has as many as its plan says, to compute.
            with pq.ParquetFile(handle, pre_buffer=False) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: cannot be read as Parquet: {error}", hint="write or copy it again"
            ) from error
