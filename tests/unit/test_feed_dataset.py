"""`feed.dataset`: which objects serve, and what is said of those that do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from penstock import feed
from penstock.errors import DataError


def take(records: Any, rows: list[int]) -> tuple[Any, Any]:
    source = feed.dataset(records)
    return source.open(source.manifest().share(0, 1)).take(np.array(rows, dtype=np.int64))


def test_any_map_of_pairs_serves() -> None:
    x, y = take([(np.float32(i), 10 * i) for i in range(5)], [4, 0, 2])
    assert x.tolist() == [4, 0, 2]
    assert x.dtype == torch.float32
    assert y.tolist() == [40, 0, 20]


def test_halves_may_be_tuples_and_dicts() -> None:
    x, y = take([((torch.ones(2) * i, i), {"class": i}) for i in range(3)], [2, 1])
    assert isinstance(x, tuple)
    assert x[0].tolist() == [[2, 2], [1, 1]]
    assert x[1].tolist() == [2, 1]
    assert y["class"].tolist() == [2, 1]
    x, y = take([((torch.ones(2), 1), {"class": 1})], [])
    assert x[0].shape == (0, 2)
    assert y["class"].shape == (0,)


class Raising(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[int, int]:
        if i == 4:
            raise FileNotFoundError("picture-4.png")
        return i, i


def test_an_error_of_the_dataset_names_the_record_and_is_kept_as_cause() -> None:
    source = feed.dataset(Raising())
    manifest = source.manifest()
    records = source.open(manifest.share(1, 2))  # records 3, 4 and 5
    assert records.take(np.array([0, 2]))[1].tolist() == [3, 5]
    with pytest.raises(DataError, match=r"record 4: .*FileNotFoundError: picture-4\.png") as caught:
        records.take(np.array([0, 1]))
    assert isinstance(caught.value.__cause__, FileNotFoundError)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(1, 1)])


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (Stream(), ["Stream is an IterableDataset", "hint"]),
        (iter([(1, 1)]), ["has no __len__", "hint"]),
        ({1, 2}, ["set has no __getitem__", "hint"]),
        (torch.utils.data.Dataset(), ["Dataset has no __len__", "hint"]),
    ],
)
def test_other_objects_are_refused_at_once(records: Any, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        feed.dataset(records)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (torch.zeros(2), ["record 0 is a Tensor", "a pair", "hint"]),
        ((1, 2, 3), ["record 0 is a tuple of 3", "hint"]),
        ({"x": 1, "y": 2}, ["record 0 is a dict", "hint"]),
        ((1, "cat"), ["the target of record 0", "integer codes"]),
        (((1, (2, 3)), 1), ["the features of record 0", "do not nest"]),
        ((object(), 1), ["record 0 cannot be collated", "object"]),
    ],
)
def test_records_that_are_no_pairs_of_tensors_are_refused_by_the_manifest(
    record: Any, words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        feed.dataset([record] * 3).manifest()
    for word in words:
        assert word in str(caught.value)


def test_a_record_that_does_not_fit_the_others_is_named() -> None:
    records = [(torch.zeros(3 if i != 2 else 4), i) for i in range(4)]
    with pytest.raises(DataError, match="record 2 cannot be collated with record 1"):
        take(records, [1, 3, 2, 0])
