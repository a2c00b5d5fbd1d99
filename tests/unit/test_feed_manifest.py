"""Who owns which rows, and in which order: every row once, whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.feed import Manifest, Partition
from penstock.feed.order import epoch_order, steps_per_epoch

SIZES = st.lists(st.integers(0, 40), max_size=12)


def manifest_of(sizes: list[int], whole: bool) -> Manifest:
    return Manifest(tuple(Partition(f"p{i}", size) for i, size in enumerate(sizes)), whole)


@given(SIZES, st.integers(1, 9), st.booleans())
def test_every_row_belongs_to_one_shard(sizes: list[int], shards: int, whole: bool) -> None:
    manifest = manifest_of(sizes, whole)
    firsts = np.cumsum([0, *sizes])
    ids = []
    for shard in range(shards):
        for piece in manifest.share(shard, shards):
            assert piece.rows > 0
            assert 0 <= piece.start < piece.stop <= sizes[piece.partition]
            assert piece.first_id == firsts[piece.partition] + piece.start
            ids.extend(range(piece.first_id, piece.first_id + piece.rows))
    assert sorted(ids) == list(range(sum(sizes)))
    assert sum(manifest.shard_rows(shards)) == manifest.rows


@given(SIZES, st.integers(1, 9))
def test_shards_differ_by_one_row_at_most(sizes: list[int], shards: int) -> None:
    rows = manifest_of(sizes, whole=False).shard_rows(shards)
    assert max(rows) - min(rows) <= 1


@given(SIZES, st.integers(1, 9))
def test_whole_partitions_are_not_cut(sizes: list[int], shards: int) -> None:
    manifest = manifest_of(sizes, whole=True)
    for shard in range(shards):
        for piece in manifest.share(shard, shards):
            assert piece.partition % shards == shard
            assert piece.rows == sizes[piece.partition]


def test_uneven_partitions_are_cut_unless_whole() -> None:
    assert manifest_of([10, 0, 2], whole=False).shard_rows(2) == (6, 6)
    assert manifest_of([10, 0, 2], whole=True).shard_rows(2) == (12, 0)


def test_a_fingerprint_tells_manifests_apart() -> None:
    manifest = manifest_of([3, 4], whole=False)
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    others = [manifest_of([4, 3], False), manifest_of([3, 4], True), manifest_of([3, 4, 0], False)]
    assert len({m.fingerprint for m in [manifest, *others]}) == 4
    assert manifest_of([3, 4], False).fingerprint == manifest.fingerprint


@given(st.integers(0, 2**64), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 300))
def test_an_epoch_has_every_row_once(seed: int, epoch: int, shard: int, rows: int) -> None:
    order = epoch_order(seed, epoch, shard, rows)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(rows))


def test_an_order_depends_on_seed_epoch_and_shard_only() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (2**32 + 1, 0, 0), (1, 1, 0)]
    orders = {tuple(epoch_order(*key, 50).tolist()) for key in keys}
    assert len(orders) == len(keys)
    np.random.seed(1)
    np.testing.assert_array_equal(epoch_order(0, 1, 2, 50), epoch_order(0, 1, 2, 50))


def test_an_order_stays_the_same_in_every_version() -> None:
    assert epoch_order(7, 3, 1, 12).tolist() == [7, 0, 3, 9, 10, 11, 4, 2, 1, 5, 8, 6]


@pytest.mark.parametrize(
    ("shard_rows", "examples_per_step", "steps"),
    [((10,), 5, 2), ((11,), 5, 3), ((4, 0, 11), 5, 3), ((0, 0), 5, 0), ((1,), 100, 1)],
)
def test_steps_are_those_of_the_largest_shard(
    shard_rows: tuple[int, ...], examples_per_step: int, steps: int
) -> None:
    assert steps_per_epoch(shard_rows, examples_per_step) == steps
