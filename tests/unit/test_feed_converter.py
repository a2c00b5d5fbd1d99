"""Arrow batches to what a spool keeps: views, codes, stacked columns, and bad rows by masks."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import DataError
from penstock.feed.bad import BadRecords
from penstock.feed.columns import Image, Place, Selection
from penstock.feed.converter import Converter, Known
from penstock.feed.segment import Ragged

PLACE = Place("claims: partition 3", "", mend="in the DataFrame")


def converter(features: Any = "x", mode: str = "error", known: Known | None = None) -> Converter:
    return Converter(Selection.of("test", features, "y"), PLACE, BadRecords(mode), known)


def batch(**columns: Any) -> pa.RecordBatch:
    rows = len(next(iter(columns.values())))
    columns.setdefault("y", np.arange(rows))
    return pa.record_batch(
        {n: c if isinstance(c, pa.Array) else pa.array(c) for n, c in columns.items()}
    )


def test_what_can_be_is_a_view_of_arrows_memory() -> None:
    x = pa.array(np.arange(24, dtype=np.float32).reshape(4, 6).tolist(), pa.list_(pa.float32()))
    values = converter().convert(batch(x=x))
    address = values["x"].__array_interface__["data"][0]
    assert any(b is not None and b.address <= address < b.address + b.size for b in x.buffers())
    assert values["y"].tolist() == [0, 1, 2, 3]
    stacked = converter(["a", "b"]).convert(batch(a=[1, 2], b=[0.5, 1.5]))["x"]
    assert stacked.dtype == np.float64
    assert stacked.tolist() == [[1, 0.5], [2, 1.5]]


def test_rows_are_counted_over_batches() -> None:
    ours = converter()
    ours.convert(batch(x=[1, 2, 3]))
    with pytest.raises(DataError, match=r"claims: partition 3: column 'x': null in row 4"):
        ours.convert(batch(x=[4, None]))


def test_strings_in_a_dictionary_are_their_codes() -> None:
    ours = converter()
    strings = pa.DictionaryArray.from_arrays(pa.array([2, 0, 1], pa.int8()), ["a", "b", "c"])
    codes = ours.convert(batch(x=strings))["x"]
    assert codes.dtype == np.int64
    assert codes.tolist() == [2, 0, 1]
    # The first so many of the same values mean the same.
    fewer = pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.int8()), ["a", "b"])
    assert ours.convert(batch(x=fewer))["x"].tolist() == [1, 0]
    assert converter(["x", "y"]).convert(batch(x=fewer))["x"].tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["a", "c"], "value 1 of the dictionary is 'c', but 'b' in"),
        (["b", "a", "c"], "value 0 of the dictionary is 'b', but 'a' in"),
        (["a", "b", "c", "d"], "value 3 of the dictionary is 'd', but nothing in"),
    ],
)
def test_another_dictionary_is_refused(values: list[str], words: str) -> None:
    first = converter()
    first.convert(batch(x=pa.DictionaryArray.from_arrays(pa.array([0, 2]), ["a", "b", "c"])))
    for mode in ("error", "skip"):
        other = converter(mode=mode, known=first.known)
        other.at(Place("claims: partition 5", "", mend="in the DataFrame"))
        with pytest.raises(DataError) as caught:
            other.convert(batch(x=pa.DictionaryArray.from_arrays(pa.array([0]), values)))
        assert f"claims: partition 5: column 'x': {words} claims: partition 3" in str(caught.value)
        assert "unify_dictionaries" in caught.value.hint


def test_numbers_in_dictionaries_stand_for_themselves() -> None:
    ours = converter()
    for numbers in ([7, 8], [9, 7]):
        column = pa.array(numbers).dictionary_encode()
        assert ours.convert(batch(x=column))["x"].tolist() == numbers


def test_a_schema_that_changes_names_column_and_partition() -> None:
    first = converter()
    first.convert(batch(x=[1, 2]))
    with pytest.raises(DataError, match=r"partition 3: column 'x' is double, but int64 before"):
        first.convert(batch(x=[1.0]))
    first.at(Place("claims: partition 4", "", mend="in the DataFrame"))
    with pytest.raises(DataError, match=r"4: column 'x' is double, but int64 in claims: part.* 3"):
        first.convert(batch(x=[1.0]))
    with pytest.raises(DataError, match=r"partition 4: no column 'x'"):
        first.convert(batch(z=[1.0]))
    wide = pa.array([[1, 2, 3]])
    lists = converter()
    lists.convert(batch(x=[[1, 2]]))
    with pytest.raises(DataError, match="row 1 holds 3 values, the first row 2"):
        lists.convert(batch(x=wide))


TENSOR = pa.fixed_shape_tensor(pa.int64(), [2])
SPARK = [("origin", pa.string()), *((n, pa.int32()) for n in ("height", "width", "nChannels"))]
IMAGE = pa.struct([*SPARK, ("mode", pa.int32()), ("data", pa.binary())])


def picture(value: int, **changed: Any) -> dict[str, Any]:
    good = {"origin": "", "height": 2, "width": 1, "nChannels": 1, "mode": 0}
    return {**good, "data": bytes([value, value]), **changed}


KINDS: dict[str, tuple[pa.Array, list[int], list[str]]] = {
    "nulls": (pa.array([None, 1, 2, None, 4]), [0, 3], ["null in row 0", "null in row 3"]),
    "lengths": (
        pa.array([[1, 2], [3], [4, 5], [6, 7, 8], [9, 9]]),
        [1, 3],
        ["row 1 holds 1 values", "row 3 holds 3 values"],
    ),
    "nulls in lists": (
        pa.array([[1, 2], [None, 3], None, [4, None], [9, 9]]),
        [1, 2, 3],
        ["null in row 2", "null in row 1", "null in row 3"],
    ),
    "nested": (
        pa.array([[[1], [2]], [[1], [2, 3]], [[3], [4]], [[5]], [[6], None]]),
        [1, 3, 4],
        ["row 3 holds 1 values", "null in row 4", "row 1 holds 2 values"],
    ),
    "bytes": (pa.array([b"ab", b"", b"cd", b"efg", None]), [1, 3, 4], ["null in row 4"]),
    "tensors": (
        pa.ExtensionArray.from_storage(
            TENSOR,
            pa.array([[1, 2], [3, None], [5, 6], [None, None], [7, 8]], TENSOR.storage_type),
        ),
        [1, 3],
        ["null in row 1"],
    ),
    "codes": (
        pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 2, 0]), ["a", "b", None]),
        [1, 3],
        ["null in row 1", "null in row 3"],
    ),
    "images": (
        pa.array(
            [picture(1), picture(2, mode=-1), picture(3), picture(4, data=b"x"), picture(5)], IMAGE
        ),
        [1, 3],
        ["row 1 is an image of OpenCV type -1", "row 3 is an image of 1 x 2 x 1 (ch"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_rows_are_left_out(kind: str) -> None:
    column, odd, reasons = KINDS[kind]
    good = [row for row in range(5) if row not in odd]
    with pytest.raises(DataError, match=rf"column 'x'.* row {odd[0]}|{reasons[0]}"):
        converter().convert(batch(x=column))
    bad = BadRecords("skip")
    ours = Converter(Selection("x", "y"), replace_row(100), bad)
    values = ours.convert(batch(x=column))
    expected = converter().convert(batch(x=column.take(pa.array(good))))["x"]
    assert values["x"].tolist() == expected.tolist()
    assert values["y"].tolist() == good
    assert sorted(record.row for record in bad.sample) == [100 + row for row in odd]
    said = " | ".join(record.reason for record in bad.sample)
    for reason in reasons:
        assert reason.replace("row ", "row 10") in said
    # Cut into batches of one row, they are the same.
    again = converter(mode="skip")
    rows = [again.convert(batch(x=column.slice(i, 1), y=[i])) for i in range(5)]
    assert [y for row in rows for y in row["y"].tolist()] == good


def replace_row(first_row: int) -> Place:
    return Place(PLACE.where, "", first_row, mend=PLACE.mend)


def test_quarantine_keeps_the_values(tmp_path: Any) -> None:
    bad = BadRecords("quarantine", str(tmp_path))
    ours = Converter(Selection(("a", "b"), "y"), PLACE, bad)
    values = ours.convert(batch(a=[1, None, 3], b=[1.5, 2.5, None]))
    assert values["x"].tolist() == [[1, 1.5]]
    (path,) = tmp_path.iterdir()
    assert '"row": 1' in path.read_text()
    assert '"record": {"a": null, "b": 2.5, "y": 1}' in path.read_text()
    assert '"record": {"a": 3, "b": null, "y": 2}' in path.read_text()


def test_the_first_row_that_is_good_in_all_columns_decides() -> None:
    """And not one whose other columns are bad: whatever the batches."""
    x, y = pa.array([[1, 2, 3], [4, 5], [6, 7]]), pa.array([None, 1, 2])
    for cut in range(4):
        ours = converter(mode="skip")
        parts = [batch(x=x, y=y).slice(0, cut), batch(x=x, y=y).slice(cut)]
        rows = [row for part in parts for row in ours.convert(part)["x"].tolist()]
        assert rows == [[4, 5], [6, 7]]


def test_numbers_of_rows_may_leave_some_out() -> None:
    ours = converter()
    with pytest.raises(DataError, match="null in row 7"):
        ours.convert(batch(x=[1, None]), np.array([2, 7]))
    ours = converter()
    ours.convert(batch(x=[1, 2]), np.array([2, 7]))
    with pytest.raises(DataError, match="null in row 8"):
        ours.convert(batch(x=pa.array([None], pa.int64())))


def test_encoded_images_are_bytes() -> None:
    column = pa.array([b"one", b"", b"three"])
    ours = converter(Image("x", 4, 4))
    x = ours.convert(batch(x=column).slice(1))["x"]
    assert isinstance(x, Ragged)
    assert [x[i].tobytes() for i in range(len(x))] == [b"", b"three"]
    assert ours.known.row_bytes is None
    with pytest.raises(DataError, match="null in row 2"):
        ours.convert(batch(x=pa.array([None, b"x"])))
    with pytest.raises(DataError, match="column 'x' is int64: encoded images are binary"):
        converter(Image("x", 4, 4)).convert(batch(x=[1]))
    skipping = converter(Image("x", 4, 4), "skip")
    x = skipping.convert(batch(x=pa.array([None, b"x"])))["x"]
    assert [x[i].tobytes() for i in range(len(x))] == [b"x"]


def test_what_is_known_travels() -> None:
    ours = converter(["a", "b"])
    ours.convert(batch(a=[1], b=[2]))
    known = pickle.loads(pickle.dumps(ours.known))
    assert known.row_bytes == 2 * 4 + 8
    assert known.empty["x"].shape == (0, 2)
    assert converter().known.row_bytes == 0


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=1, max_size=3))),
    cuts=st.lists(st.integers(0, 30), max_size=4),
)
def test_good_rows_are_those_like_the_first_however_they_are_cut(
    rows: list[list[int] | None], cuts: list[int]
) -> None:
    length = next((len(row) for row in rows if row is not None), 0)
    good = [i for i, row in enumerate(rows) if row is not None and len(row) == length]
    bad = BadRecords("skip")
    ours = Converter(Selection("x", "y"), PLACE, bad)
    whole = batch(x=pa.array(rows, pa.list_(pa.int64())), y=np.arange(len(rows)))
    borders = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    found: list[int] = []
    for low, high in itertools.pairwise(borders):
        values = ours.convert(whole.slice(low, high - low))
        assert values["x"].tolist() == [rows[i] for i in values["y"].tolist()]
        found += values["y"].tolist()
    assert found == good
    assert bad.count == len(rows) - len(good)
