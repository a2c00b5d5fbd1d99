"""Arrow columns to arrays, a row of one for a row of the other: what any table's source does.

A column of numbers or booleans is an array (batch,); lists of one length, nested or not, are
(batch, d, ...); a fixed-shape tensor is (batch, ...) as it says; binary of one length is uint8
(batch, length). An image as Spark has it (`pyspark.ml.image`) is uint8 (batch, channels, height,
width), its channels in the order RGB(A) where Spark's are BGR(A), or a single one; all images of a
column have one size, and those of another OpenCV type than uint8 (CV_32F and the like) are refused.
Strings that Arrow keeps as codes into a dictionary are their codes, int64 (batch,); what a code
means is for `converter` to watch. Dtypes stay as they are, and what has one length and no nulls is
a view of Arrow's own memory (booleans excepted, which are bits there).

pyarrow is imported inside the functions that use it: its import starts a thread, and worker
processes are forked from a server that must have one thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

Features: TypeAlias = "str | Sequence[str] | Image | Mapping[str, Any]"
"""What a user says: a column, several, or encoded images (a mapping, in a Job file)."""
IMAGE_FIELDS = ("origin", "height", "width", "nChannels", "mode", "data")
UINT8_MODES = {1: 0, 3: 16, 4: 24}
"""OpenCV's type (CV_8UC1, CV_8UC3, CV_8UC4) by number of channels."""


class BadRows(DataError):
    """Rows that are not what their column says; the message is of the first.

    Arguments:
        rows: their indices in the array that was looked at, ascending.
        reason: of the i-th of them, what is wrong, without the place.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        rows: Sequence[int] | NDArray[np.int64] = (),
        reason: Callable[[int], str] = str,
    ) -> None:
        super().__init__(message, hint=hint)
        self.rows = np.asarray(rows, np.int64)
        self.reason = reason


@dataclass(frozen=True)
class Place:
    """Where values come from, for messages.

    Arguments:
        where: the file, or the source and partition.
        column: its name.
        first_row: of the values, as counted there.
        numbers: of the rows, counted from `first_row`, where they do not follow on each other.
        per_row: how many values a row holds.
        mend: the end of a hint: when or where the user puts things right.
    """

    where: str
    column: str
    first_row: int = 0
    per_row: int = 1
    mend: str = "before the file is written"
    numbers: NDArray[np.int64] | None = None

    def row(self, value: int) -> int:
        row = value // self.per_row
        return self.first_row + (row if self.numbers is None else int(self.numbers[row]))

    def error(self, what: str, hint: str) -> DataError:
        return DataError(f"{self.where}: column {self.column!r}{what}", hint=hint)

    def bad(self, odd: NDArray[np.intp], what: Callable[[int], str], hint: str) -> BadRows:
        """The error for bad values.

        Arguments:
            odd: their indices, ascending.
            what: of a value, by its index, what is wrong with it.
        """
        rows, firsts = np.unique(odd // self.per_row, return_index=True)

        def reason(i: int) -> str:
            return f"column {self.column!r}{what(int(odd[firsts[i]]))}"

        return BadRows(f"{self.where}: {reason(0)}", hint=hint, rows=rows, reason=reason)


@dataclass(frozen=True)
class Image:
    """A column of encoded images (JPEG, PNG, ...), decoded on their way to a batch.

    Features are then uint8 (batch, channels, height, width).

    Arguments:
        column: of binary, a whole file in each row.
        height, width: in pixels; an image of another size is resized, bilinearly.
        channels: 3 for RGB or 1 for grey, whatever the files have.
    """

    column: str
    height: int
    width: int
    channels: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.column, str) or not self.column:
            raise DataError(f"Image: column {self.column!r}: expected the name of a column")
        for name in ("height", "width"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise DataError(
                    f"Image: {name} {size!r}: expected a whole number of pixels, at least 1"
                )
        if self.channels not in (1, 3):
            raise DataError(f"Image: channels {self.channels!r}: expected 3 (RGB) or 1 (grey)")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Image:
        """As a Job file says it: `{column: photo, height: 224, width: 224}`."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise DataError(
                    f"features: unknown key {key!r}: an encoded image has {', '.join(known)}",
                    hint=did_you_mean(str(key), known),
                )
        for key in known[:3]:
            if key not in values:
                raise DataError(
                    f"features: an encoded image needs {key}",
                    hint="features: {column: photo, height: 224, width: 224}",
                )
        return cls(**values)


@dataclass(frozen=True)
class Selection:
    """The columns that a source takes.

    Arguments:
        features: a column, taken as its array; or several columns of numbers, stacked as float32
            (batch, columns), or as float64 if one of them is. A list of one column of numbers is
            (batch, 1); a list of one other column is that column. Or an `Image`.
        target: a column, taken as its array.
    """

    features: str | tuple[str, ...] | Image
    target: str

    @classmethod
    def of(cls, source: str, features: Features, target: str) -> Selection:
        """What the user says to `source`."""
        if not features:
            raise DataError(f"{source}: no feature columns", hint="name at least one in features")
        if isinstance(features, Mapping):
            features = Image.of(features)
        return cls(features if isinstance(features, (str, Image)) else tuple(features), target)

    @property
    def feature_names(self) -> tuple[str, ...]:
        if isinstance(self.features, Image):
            return (self.features.column,)
        return (self.features,) if isinstance(self.features, str) else self.features

    @property
    def names(self) -> list[str]:
        """Every column once."""
        return list(dict.fromkeys([*self.feature_names, self.target]))

    def describe(self) -> dict[str, Any]:
        """As a Job file says it."""
        features: Any = self.features
        if isinstance(features, Image):
            features = asdict(features)
        elif not isinstance(features, str):
            features = list(features)
        return {"features": features, "target": self.target}

    def check(self, schema: pa.Schema, place: Place) -> dict[str, pa.DataType]:
        """The types of the columns: all that can be checked before there are rows.

        Arguments:
            place: of any column.

        Raises:
            DataError: a column is missing, or there several times, or of a type that no array is
                made of; or there are several features, and one of them is not of numbers.
        """
        types = {name: column_type(schema, replace(place, column=name)) for name in self.names}
        for name in self.feature_names if len(self.feature_names) > 1 else ():
            if not _is_scalar(types[name]):
                raise replace(place, column=name).error(
                    f" is {types[name]}: several features are stacked, and must be numbers",
                    f"name it alone, as features: {name}, or write its values as columns",
                )
        if isinstance(self.features, Image) and not _is_binary(types[self.features.column]):
            raise replace(place, column=self.features.column).error(
                f" is {types[self.features.column]}: encoded images are binary",
                f"name the column of the files' bytes, or make one {place.mend}",
            )
        return types


def column_type(schema: pa.Schema, place: Place) -> pa.DataType:
    """The type of the column that `place` names, of which an array can be made.

    Raises:
        DataError: there is no such column, or there are several, or its type is another.
    """
    indices = schema.get_all_field_indices(place.column)
    if not indices:
        raise DataError(
            f"{place.where}: no column {place.column!r}; it has: {', '.join(schema.names)}",
            hint=did_you_mean(place.column, schema.names),
        )
    if len(indices) > 1:
        raise place.error(f" is there {len(indices)} times", "give every column its own name")
    kind = schema.field(indices[0]).type
    _refuse_type(kind, kind, place)
    return kind


def unsuitable(kind: str, column: str, place: Place) -> DataError:
    """The error for a column of type `column`, since no array can be made of `kind` in it."""
    hint = "cast it to numbers"
    if kind in ("string", "large_string"):
        hint = "turn strings into integer codes"
    elif kind.startswith("struct<type: ") and "indices: " in kind:  # Spark ML's vectors
        hint = "make an array of it by pyspark.ml.functions.vector_to_array"
    return place.error(
        f" is {column}: expected numbers, lists of numbers, or binary", f"{hint} {place.mend}"
    )


def dense(array: pa.Array, place: Place, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """The values of a column as an array with a row for each, a view wherever it can be.

    Arguments:
        array: of a type that `column_type` lets pass.
        place: of its first value.
        shape: of a row, where it is known; else the first value decides it.

    Raises:
        DataError: a null, or rows of unequal lengths or sizes; names the row.
    """
    import pyarrow as pa
    from pyarrow.compute import list_value_length

    if array.null_count:
        raise _null(array.is_null(), place)
    kind = array.type
    if isinstance(kind, pa.FixedShapeTensorType):
        dense(array.storage, place)  # for nulls within a tensor
        return np.asarray(array.to_numpy_ndarray())
    if pa.types.is_dictionary(kind) and _is_string(kind.value_type):
        if array.dictionary.null_count and (decoded := array.dictionary_decode()).null_count:
            raise _null(decoded.is_null(), place)
        codes: NDArray[np.int64] = array.indices.to_numpy().astype(np.int64, copy=False)
        return codes
    if pa.types.is_dictionary(kind):
        return dense(array.dictionary_decode(), place, shape)
    if _is_number(kind):
        return np.asarray(array.to_numpy(zero_copy_only=False))
    if pa.types.is_fixed_size_binary(kind):
        length = kind.byte_width
        _common_length(np.full(len(array), length), place, shape, "bytes")
        data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
        return data[array.offset * length :][: len(array) * length].reshape(len(array), length)
    if _is_binary(kind):
        offsets, data = ragged(array, place)
        length = _common_length(np.diff(offsets), place, shape, "bytes")
        return data[offsets[0] : offsets[-1]].reshape(len(array), length)
    if _is_image(kind):
        return _pixels(array, place, shape)
    lengths = list_value_length(array).to_numpy(zero_copy_only=False)
    length = _common_length(lengths, place, shape, "values")
    inner = replace(place, per_row=place.per_row * max(length, 1))
    values = dense(array.flatten(), inner, None if shape is None else shape[1:])
    return values.reshape(len(array), length, *values.shape[1:])


def ragged(array: pa.Array, place: Place) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Binary of any lengths: row i is bytes[offsets[i] : offsets[i + 1]], both views of Arrow's.

    Raises:
        DataError: a null; names the row.
    """
    import pyarrow as pa

    if array.null_count:
        raise _null(array.is_null(), place)
    array = array.cast(pa.large_binary())
    _, offset_buffer, value_buffer = array.buffers()
    if not len(array):
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset :][: len(array) + 1]
    return offsets, np.frombuffer(value_buffer or b"", np.uint8)


def _null(is_null: pa.Array, place: Place) -> BadRows:
    odd = np.flatnonzero(is_null.to_numpy(zero_copy_only=False))
    return place.bad(
        odd, lambda i: f": null in row {place.row(i)}", f"fill or drop nulls {place.mend}"
    )


def _pixels(array: pa.Array, place: Place, shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
    """Spark's images, each row by row from the top with its channels side by side."""
    from pyarrow.compute import binary_length

    height, width, channels, mode = (dense(array.field(name), place) for name in IMAGE_FIELDS[1:5])
    known = np.zeros(len(array), bool)
    for number, uint8_mode in UINT8_MODES.items():
        known |= (channels == number) & (mode == uint8_mode)
    odd = np.flatnonzero(~known)
    if len(odd):
        raise place.bad(
            odd,
            lambda i: (
                f": row {place.row(i)} is an image of OpenCV type {mode[i]} with "
                f"{channels[i]} channels: expected uint8 with 1, 3 or 4 (type 0, 16 or 24)"
            ),
            f"make it uint8 {place.mend}; type -1 is an image that Spark could not read: drop it",
        )
    sizes = np.stack([channels, height, width], axis=1)
    size = tuple(sizes[0].tolist()) if shape is None and len(array) else shape or (0, 0, 0)
    odd = np.flatnonzero((sizes != size).any(axis=1))
    if len(odd):
        raise place.bad(
            odd,
            lambda i: (
                f": row {place.row(i)} is an image of {_by(sizes[i])}, the first row "
                f"of {_by(size)} (channels x height x width): expected one size"
            ),
            f"resize images to one size {place.mend}",
        )
    length = int(np.prod(size))
    lengths = binary_length(array.field("data").fill_null(b"")).to_numpy(zero_copy_only=False)
    odd = np.flatnonzero(lengths != length)
    if len(odd):
        raise place.bad(
            odd,
            lambda i: (
                f": row {place.row(i)} is an image of {_by(size)} (channels x height x "
                f"width) and holds {lengths[i]} bytes: expected {length}"
            ),
            "read or make the images again",
        )
    values = dense(array.field("data"), place, (length,))
    images = values.reshape(len(array), size[1], size[2], size[0])
    if size[0] == 3:
        images = images[..., ::-1]
    elif size[0] == 4:
        images = images[..., [2, 1, 0, 3]]
    return images.transpose(0, 3, 1, 2)


def _common_length(
    lengths: NDArray[Any], place: Place, shape: tuple[int, ...] | None, noun: str
) -> int:
    if shape is None:
        expected = int(lengths[0]) if len(lengths) else 0
    else:
        expected = shape[0]
    odd = np.flatnonzero(lengths != expected)
    if len(odd):
        encoded = "; encoded images: feed.Image(...) in features" if noun == "bytes" else ""
        raise place.bad(
            odd,
            lambda i: (
                f": row {place.row(i)} holds {lengths[i]} {noun}, the first row "
                f"{expected}: expected one length"
            ),
            f"pad or cut them to one length {place.mend}{encoded}",
        )
    return expected


def _refuse_type(kind: pa.DataType, column: pa.DataType, place: Place) -> None:
    import pyarrow as pa

    if pa.types.is_dictionary(kind) and kind is column and _is_string(kind.value_type):
        return
    if pa.types.is_dictionary(kind) or _is_list(kind):
        _refuse_type(kind.value_type, column, place)
    elif isinstance(kind, pa.FixedShapeTensorType):
        _refuse_type(kind.storage_type, column, place)
    elif not (_is_number(kind) or _is_binary(kind) or _is_image(kind)):
        raise unsuitable(str(kind), str(column), place)


def _is_number(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _is_scalar(kind: pa.DataType) -> bool:
    """Whether a row of it is one number."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_string(kind.value_type) or _is_number(kind.value_type)
    return _is_number(kind)


def _is_string(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_binary(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
    )


def _is_image(kind: pa.DataType) -> bool:
    from pyarrow import types

    if not types.is_struct(kind) or {field.name for field in kind} != set(IMAGE_FIELDS):
        return False
    numbers = all(types.is_integer(kind.field(name).type) for name in IMAGE_FIELDS[1:5])
    return numbers and _is_binary(kind.field("data").type)


def _by(size: Iterable[int]) -> str:
    return " x ".join(str(length) for length in size)
