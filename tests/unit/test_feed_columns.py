"""Arrow columns as arrays: images, views, and what a schema alone tells."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.errors import DataError
from penstock.feed.columns import BadRows, Place, Selection, dense

PLACE = Place("claims", "x", 100, mend="in the DataFrame")
IMAGE = pa.struct(
    [
        ("origin", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("nChannels", pa.int32()),
        ("mode", pa.int32()),
        ("data", pa.binary()),
    ]
)
MODES = {1: 0, 3: 16, 4: 24}


def pixels(images: int, channels: int, height: int = 2, width: int = 3) -> NDArray[np.uint8]:
    """As tensors have them: (images, channels, height, width), RGB(A)."""
    shape = (images, channels, height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def row(image: NDArray[np.uint8], **changed: Any) -> dict[str, Any]:
    """One tensor as Spark has it, pixel by pixel."""
    channels, height, width = image.shape
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    data = bytes(image[c, i, j] for i in range(height) for j in range(width) for c in order)
    values = {"origin": None, "height": height, "width": width, "nChannels": channels}
    return {**values, "mode": MODES[channels], "data": data, **changed}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_tensors_in_rgb_order(channels: int) -> None:
    expected = pixels(5, channels)
    column = pa.array([row(image) for image in expected], IMAGE)
    np.testing.assert_array_equal(dense(column, PLACE), expected)
    np.testing.assert_array_equal(dense(column.slice(2, 2), PLACE), expected[2:4])
    large = IMAGE.field("data").with_type(pa.large_binary())
    kind = pa.struct([*(IMAGE.field(i) for i in range(5)), large])
    np.testing.assert_array_equal(dense(column.cast(kind), PLACE), expected)
    lists = pa.ListArray.from_arrays([0, 2, 4], column.slice(0, 4))
    np.testing.assert_array_equal(
        dense(lists, PLACE), expected[:4].reshape(2, 2, *expected.shape[1:])
    )
    assert dense(column.slice(0, 0), PLACE, (channels, 2, 3)).shape == (0, channels, 2, 3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mode": -1, "nChannels": -1}, ["row 102", "OpenCV type -1", "could not read"]),
        ({"mode": 21}, ["row 102", "OpenCV type 21 with 3 channels", "make it uint8 in the Data"]),
        ({"mode": 0}, ["row 102", "OpenCV type 0 with 3 channels"]),
        ({"height": 3}, ["row 102", "3 x 3 x 3, the first row of 3 x 2 x 3", "resize"]),
        ({"height": 3, "width": 2}, ["row 102", "3 x 3 x 2"]),
        ({"mode": 0, "nChannels": 1}, ["row 102", "1 x 2 x 3, the first row of 3 x 2 x 3"]),
        ({"data": b"short"}, ["row 102", "holds 5 bytes: expected 18"]),
        ({"data": None}, ["row 102", "0 bytes"]),
        ({"width": None}, ["null in row 102"]),
    ],
)
def test_a_bad_image_is_named(changed: dict[str, Any], words: list[str]) -> None:
    images = [row(image) for image in pixels(4, 3)]
    good = pa.array(images, IMAGE)
    assert dense(good, PLACE).shape == (4, 3, 2, 3)
    images[2] |= changed
    with pytest.raises(DataError) as caught:
        dense(pa.array(images, IMAGE), PLACE)
    for word in ["claims: column 'x'", *words]:
        assert word in str(caught.value)
    assert caught.value.hint


def test_images_are_of_the_size_that_is_known() -> None:
    column = pa.array([row(pixels(1, 3)[0])], IMAGE)
    with pytest.raises(DataError, match="row 100 is an image of 3 x 2 x 3, the first row of 3 x 4"):
        dense(column, PLACE, (3, 4, 4))
    with pytest.raises(DataError, match="null in row 101"):
        dense(pa.array([row(pixels(1, 3)[0]), None], IMAGE), PLACE)


NUMBERS = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(NUMBERS),
        pa.array(NUMBERS.reshape(4, 6).tolist(), pa.list_(pa.float32())),
        pa.array(NUMBERS.reshape(4, 2, 3).tolist(), pa.list_(pa.list_(pa.float32()))),
        pa.array(NUMBERS.reshape(4, 6).tolist(), pa.list_(pa.float32(), 6)),
        pa.array([b"abc", b"def", b"ghi", b"jkl"]),
        pa.array([b"abc", b"def", b"ghi", b"jkl"], pa.large_binary()),
        pa.array([b"abc", b"def", b"ghi", b"jkl"], pa.binary(3)),
        pa.array([row(image) for image in pixels(4, 3)], IMAGE),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_what_can_be_is_a_view(column: pa.Array) -> None:
    for part in (column, column.slice(1, 2)):
        assert lies_in(dense(part, PLACE), column)


def lies_in(array: NDArray[Any], column: pa.Array) -> bool:
    """Whether all of an array's memory is that of one of the column's buffers."""
    low, high = np.lib.array_utils.byte_bounds(array)
    buffers = [buffer for buffer in column.buffers() if buffer is not None]
    return any(buffer.address <= low < high <= buffer.address + buffer.size for buffer in buffers)


def test_a_copy_would_be_seen() -> None:
    for column in (pa.array([True, False]), pa.array([row(i) for i in pixels(4, 4)], IMAGE)):
        assert not lies_in(dense(column, PLACE), column)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)),
    cuts=st.lists(st.integers(0, 5), max_size=3),
    fixed=st.booleans(),
)
def test_lists_are_arrays_however_they_are_cut(
    shape: tuple[int, int, int], cuts: list[int], fixed: bool
) -> None:
    expected = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    inner = pa.list_(pa.int16(), shape[2] if fixed else -1)
    column = pa.array(expected.tolist(), pa.list_(inner))
    borders = [0, *sorted(min(cut, shape[0]) for cut in cuts), shape[0]]
    for low, high in itertools.pairwise(borders):
        found = dense(column.slice(low, high - low), PLACE, shape[1:])
        np.testing.assert_array_equal(found, expected[low:high])


SCHEMA = pa.schema(
    [
        ("amount", pa.float32()),
        ("age", pa.int32()),
        ("paid", pa.bool_()),
        ("code", pa.dictionary(pa.int8(), pa.int64())),
        ("image", IMAGE),
        ("history", pa.list_(pa.float64())),
        ("tensor", pa.fixed_shape_tensor(pa.float32(), [2])),
        ("region", pa.string()),
        ("regions", pa.list_(pa.string())),
        ("when", pa.timestamp("us")),
        ("other", pa.struct([*IMAGE, pa.field("more", pa.int8())])),
        ("twice", pa.int8()),
        ("twice", pa.int8()),
        (
            "vector",
            pa.struct(
                [
                    ("type", pa.int8()),
                    ("size", pa.int32()),
                    ("indices", pa.list_(pa.int32())),
                    ("values", pa.list_(pa.float64())),
                ]
            ),
        ),
    ]
)


def test_a_schema_is_checked_before_there_are_rows() -> None:
    assert Selection("image", "age").check(SCHEMA, PLACE) == {"image": IMAGE, "age": pa.int32()}
    stacked = Selection(("amount", "paid", "code"), "age").check(SCHEMA, PLACE)
    assert list(stacked) == ["amount", "paid", "code", "age"]
    assert list(Selection(("history",), "history").check(SCHEMA, PLACE)) == ["history"]


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ("amuont", ["no column 'amuont'; it has: amount, age,", "did you mean 'amount'?"]),
        ("twice", ["column 'twice' is there 2 times"]),
        ("region", ["column 'region' is string", "integer codes in the DataFrame"]),
        ("regions", ["column 'regions' is list<item: string>", "integer codes"]),
        ("when", ["column 'when' is timestamp", "cast it to numbers in the DataFrame"]),
        ("other", ["column 'other' is struct", "cast it"]),
        ("vector", ["column 'vector' is struct", "vector_to_array"]),
        (("amount", "history"), ["column 'history' is list", "features: history"]),
        (("tensor", "amount"), ["column 'tensor' is", "features: tensor"]),
        (("image", "image"), ["column 'image' is struct", "features: image"]),
    ],
)
def test_a_wrong_column_is_named(features: str | tuple[str, ...], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        Selection(features, "age").check(SCHEMA, PLACE)
    for word in ["claims: ", *words]:
        assert word in str(caught.value)


def test_strings_in_a_dictionary_are_codes() -> None:
    column = pa.array(["b", "a", "b"]).dictionary_encode()
    codes = dense(column, PLACE)
    assert codes.dtype == np.int64
    assert codes.tolist() == [0, 1, 0]
    assert dense(column.slice(1), PLACE).tolist() == [1, 0]
    with pytest.raises(DataError, match="null in row 101"):
        dense(pa.DictionaryArray.from_arrays(pa.array([0, 1]), ["a", None]), PLACE)


def test_all_bad_rows_are_named_at_once() -> None:
    with pytest.raises(BadRows, match="null in row 100") as caught:
        dense(pa.array([None, 1, None]), PLACE)
    assert caught.value.rows.tolist() == [0, 2]
    assert caught.value.reason(1) == "column 'x': null in row 102"
    inner = pa.array([[[1], [2]], [[3], [4, 5]], [[6], [None]], [[7, 7], [7, 7]]])
    with pytest.raises(BadRows, match="row 101 holds 2 values") as caught:
        dense(inner, PLACE)
    assert caught.value.rows.tolist() == [1, 3]


def test_no_features_are_refused() -> None:
    for features in ("", []):
        with pytest.raises(DataError, match="dataframe: no feature columns"):
            Selection.of("dataframe", features, "y")
