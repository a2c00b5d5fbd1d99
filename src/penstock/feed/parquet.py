"""Records from Parquet files: each row group is a partition, each row a record.

pyarrow is imported inside the functions that use it: its import starts a thread, and worker
processes are forked from a server that must have one thread only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from penstock.errors import DataError
from penstock.feed.columns import Features, Selection
from penstock.feed.files import opened
from penstock.feed.source import Source
from penstock.feed.table import READ_BYTES, Chunk, Part, TableSource

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def parquet(
    url: str | os.PathLike[str],
    *,
    features: Features,
    target: str,
    on_bad_record: str = "error",
) -> Source:
    """Records from a Parquet file, a folder of them, or a glob, on any fsspec URL.

    A column of numbers or booleans is a tensor (batch,); lists of one length, nested or not, are
    (batch, d, ...); a fixed-shape tensor is (batch, ...) as it says; binary of one length is
    uint8 (batch, length); an image as Spark has it is uint8 (batch, channels, height, width);
    dictionary-encoded strings are their codes, int64 (batch,), where all files have one dictionary.
    Dtypes stay as they are. Only the columns named are read, and a worker reads only its own rows.

    Arguments:
        url: a file; a folder, whose `*.parquet` files count at any depth, save those whose path
            has a part that starts with "_" or "."; or a glob. Files are sorted by path.
        features: a column, taken as its tensor; or several columns of numbers, stacked as float32
            (batch, columns), or as float64 if one of them is. A list of one column of numbers is
            (batch, 1); a list of one other column is that column. Encoded images are said by
            `Image`.
        target: a column, taken as its tensor.
        on_bad_record: what becomes of nulls and of values of another length or size than the
            first good row's: "error"; "skip" leaves such rows out; "quarantine" also keeps them in
            the run's folder. To leave rows out, `manifest()` must read all of them.

    Raises:
        DataError: from `manifest()` for missing or damaged files, missing columns, and columns of
            other types or of another type in another file; from the records of `open()` for bad
            rows. Rows are counted from 0 in each file.
    """
    selection = Selection.of("parquet", features, target)
    return TableSource(os.fspath(url), selection, ParquetFormat(), on_bad_record)


class ParquetFormat:
    """Row groups are parts."""

    name = "parquet"
    suffixes: tuple[str, ...] = (".parquet",)
    single = False

    def describe(self) -> dict[str, Any]:
        return {}

    def parts(self, url: str, path: str, check: Callable[[pa.Schema, str], None]) -> Iterator[Part]:
        with _parquet_file(url, path) as file:
            check(file.schema_arrow, path)
            for number in range(file.metadata.num_row_groups):
                yield Part(path, number, file.metadata.row_group(number).num_rows)

    def chunks(
        self, url: str, part: Part, names: Sequence[str], batch_rows: int | None
    ) -> Iterator[Chunk]:
        with _parquet_file(url, part.path) as file:
            if part.number >= file.metadata.num_row_groups:
                raise DataError(
                    f"{part.path}: there is no row group {part.number} any more",
                    hint="the file was changed after the run began; start a new run",
                )
            group = file.metadata.row_group(part.number)
            row_bytes = _uncompressed_bytes(group, names) // max(group.num_rows, 1)
            fitting = max(1, min(READ_BYTES // max(row_bytes, 1), 65536))
            for batch in file.iter_batches(
                batch_size=min(batch_rows or fitting, fitting),
                row_groups=[part.number],
                columns=list(names),
                use_threads=False,
            ):
                yield Chunk(batch, batch.num_rows)


def _uncompressed_bytes(group: Any, names: Sequence[str]) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(
        column.total_uncompressed_size
        for column in columns
        if column.path_in_schema.partition(".")[0] in names
    )


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
