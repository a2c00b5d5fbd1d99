"""Records from Arrow IPC files, each record batch a partition, and IPC streams, each a partition.

pyarrow is imported inside the functions that use it, as in `columns`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from penstock.errors import DataError
from penstock.feed.columns import Features, Selection
from penstock.feed.files import opened
from penstock.feed.source import Source
from penstock.feed.table import Chunk, Part, TableSource

if TYPE_CHECKING:
    import pyarrow as pa

_MAGIC = b"ARROW1"


def arrow(
    url: str | os.PathLike[str],
    *,
    features: Features,
    target: str,
    on_bad_record: str = "error",
) -> Source:
    """Records from Arrow IPC files (Feather 2 is the same) or streams, on any fsspec URL.

    Columns become tensors as `parquet` says; of a file, only those named are read. A stream has no
    table of contents: to count its rows, `manifest()` must read it.

    Arguments:
        url: a file; a folder, whose `*.arrow`, `*.arrows`, `*.feather` and `*.ipc` files count at
            any depth; or a glob. Files are sorted by path.
        features, target, on_bad_record: as `parquet` has them.

    Raises:
        DataError: as `parquet`.
    """
    selection = Selection.of("arrow", features, target)
    return TableSource(os.fspath(url), selection, ArrowFormat(), on_bad_record)


class ArrowFormat:
    """Record batches are parts, and so is a whole stream."""

    name = "arrow"
    suffixes: tuple[str, ...] = (".arrow", ".arrows", ".feather", ".ipc")
    single = False

    def describe(self) -> dict[str, Any]:
        return {}

    def parts(self, url: str, path: str, check: Callable[[pa.Schema, str], None]) -> Iterator[Part]:
        with _reading(url, path) as (file, is_file):
            if not is_file:
                check(_stream(file).schema, path)
                yield Part(path, 0)
                return
            schema = _file(file).schema
            check(schema, path)
            # A batch tells its rows only when it is read: of the narrowest column, then.
            narrow = min(range(len(schema)), key=lambda i: _width(schema.field(i).type))
            reader = _file(file, [narrow])
            for number in range(reader.num_record_batches):
                yield Part(path, number, reader.get_batch(number).num_rows)

    def chunks(
        self, url: str, part: Part, names: Sequence[str], batch_rows: int | None
    ) -> Iterator[Chunk]:
        with _reading(url, part.path) as (file, is_file):
            if not is_file:
                for batch in _stream(file):
                    yield Chunk(batch, batch.num_rows)
                return
            schema = _file(file).schema
            reader = _file(file, sorted(schema.get_field_index(name) for name in names))
            if part.number >= reader.num_record_batches:
                raise DataError(
                    f"{part.path}: there is no record batch {part.number} any more",
                    hint="the file was changed after the run began; start a new run",
                )
            batch = reader.get_batch(part.number)
            yield Chunk(batch, batch.num_rows)


@contextmanager
def _reading(url: str, path: str) -> Iterator[tuple[IO[bytes], bool]]:
    """The file, and whether it is one with a table of contents."""
    import pyarrow as pa

    with opened(url, path) as file:
        is_file = file.read(len(_MAGIC)) == _MAGIC
        file.seek(0)
        try:
            yield file, is_file
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: cannot be read as Arrow: {error}", hint="write or copy it again"
            ) from error


def _file(file: IO[bytes], columns: Sequence[int] = ()) -> pa.RecordBatchFileReader:
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=list(columns))
    return pa.ipc.open_file(pa.PythonFile(file, "r"), options=options)


def _stream(file: IO[bytes]) -> pa.RecordBatchStreamReader:
    import pyarrow as pa

    options = pa.ipc.IpcReadOptions(use_threads=False)
    return pa.ipc.open_stream(pa.PythonFile(file, "r"), options=options)


def _width(kind: pa.DataType) -> int:
    """Bits of a value; many where they differ."""
    try:
        return int(kind.bit_width)
    except ValueError:
        return 2**31
