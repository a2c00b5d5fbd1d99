"""Spools that stay on a host: kept and taken whole, by one, and by nobody else's leave."""

from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.feed import kept as kept_module
from penstock.feed.columns import Selection
from penstock.feed.dataframe import manifest_of
from penstock.feed.intake import Arrival, Intake, numbers
from penstock.feed.kept import KEPT_S, KeptSpools, own_folder
from penstock.feed.manifest import NO_CHECKSUM, Manifest, Part, counted
from penstock.feed.spool import SpoolEnd, SpoolWriter

RUN = "/runs/one"


def spool(folder: Path, rows: int = 5) -> SpoolEnd:
    writer = SpoolWriter(folder, "train")
    writer.write({"x": np.arange(rows, dtype=np.float32), "y": np.arange(rows)})
    return writer.close()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def test_what_is_kept_is_taken_once_as_it_was(place: Path, tmp_path: Path) -> None:
    end = spool(tmp_path / "read")
    before = files(tmp_path / "read")
    KeptSpools(place, RUN).keep("key", tmp_path / "read")
    assert not (tmp_path / "read").exists()
    again, to = KeptSpools(place, RUN), tmp_path / "again" / "0"
    assert not KeptSpools(place, "/runs/other").take("key", end.rows, end.checksum, to)
    assert not again.take("other key", end.rows, end.checksum, to)
    assert again.take("key", end.rows, end.checksum, to)
    assert files(to) == before
    assert not again.take("key", end.rows, end.checksum, tmp_path / "again" / "1")


def test_of_two_that_keep_the_same_one_does(place: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        end = spool(tmp_path / name)
        KeptSpools(place, RUN).keep("key", tmp_path / name)
    assert KeptSpools(place, RUN).take("key", end.rows, end.checksum, tmp_path / "taken")
    assert not KeptSpools(place, RUN).take("key", end.rows, end.checksum, tmp_path / "again")


def test_of_many_that_race_for_one_one_has_it(place: Path, tmp_path: Path) -> None:
    count = 30
    ends = []
    for number in range(count):
        ends.append(spool(tmp_path / "read", number + 1))
        KeptSpools(place, RUN).keep(f"{number}", tmp_path / "read")
    has: list[list[int]] = [[], [], []]
    start = threading.Barrier(len(has))

    def take(who: int) -> None:
        spools = KeptSpools(place, RUN)
        start.wait(10)
        for number, end in enumerate(ends):
            to = tmp_path / f"{who}" / f"{number}"
            if spools.take(f"{number}", end.rows, end.checksum, to):
                has[who].append(number)

    threads = [threading.Thread(target=take, args=(who,)) for who in range(len(has))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(number for each in has for number in each) == list(range(count))


def test_what_is_not_what_it_was_is_nobodys(place: Path, tmp_path: Path) -> None:
    for number in range(3):
        end = spool(tmp_path / "read")
        KeptSpools(place, RUN).keep(f"{number}", tmp_path / "read")
    spools = KeptSpools(place, RUN)
    os.truncate(spools.folder / "0" / end.segments[0].name, 100)
    (spools.folder / "1" / "end.json").write_text("{")
    for key, checksum in (("0", end.checksum), ("1", end.checksum), ("2", "01234567")):
        assert not spools.take(key, end.rows, checksum, tmp_path / "taken")
        assert not (tmp_path / "taken").exists()
        assert not (spools.folder / key).exists()


def test_nothing_is_left(place: Path, tmp_path: Path) -> None:
    spool(tmp_path / "read")
    spools = KeptSpools(place, RUN)
    spools.keep("key", tmp_path / "read")
    assert list(place.iterdir())
    spools.remove()
    spools.remove()
    assert not list(place.iterdir())


def test_nothing_is_left_by_many_who_remove_it(place: Path, tmp_path: Path) -> None:
    for _ in range(30):
        spool(tmp_path / "read")
        KeptSpools(place, RUN).keep("key", tmp_path / "read")
        spools = [KeptSpools(place, RUN) for _ in range(3)]
        threads = [threading.Thread(target=each.remove) for each in spools]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert not list(place.iterdir())


def test_what_is_old_is_removed_by_whoever_comes(place: Path, tmp_path: Path) -> None:
    for run in ("old", "fresh"):
        spool(tmp_path / "read")
        KeptSpools(place, run).keep("key", tmp_path / "read")
    old, fresh = (KeptSpools(place, run).folder for run in ("old", "fresh"))
    then = time.time() - KEPT_S - 60
    os.utime(old, (then, then))
    KeptSpools(place, RUN)
    assert sorted(fresh.parent.iterdir()) == [fresh]


def test_what_another_user_may_write_to_is_not_used(place: Path, tmp_path: Path) -> None:
    end = spool(tmp_path / "read")
    KeptSpools(place, RUN).keep("key", tmp_path / "read")
    ours = place / f"penstock-{os.getuid()}"
    ours.chmod(0o777)
    assert not KeptSpools(place, RUN).take("key", end.rows, end.checksum, tmp_path / "taken")
    spool(tmp_path / "read")
    with pytest.raises(PermissionError, match="not a folder of this user alone"):
        KeptSpools(place, RUN).keep("key", tmp_path / "read")
    ours.chmod(0o700)
    assert KeptSpools(place, RUN).take("key", end.rows, end.checksum, tmp_path / "taken")


def test_a_link_of_anybodys_is_not_followed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (place / "mine").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        own_folder(place / "mine")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_used(place: Path, tmp_path: Path) -> None:
    end = spool(tmp_path / "read")
    KeptSpools(place, RUN).keep("key", tmp_path / "read")
    os.chown(place / f"penstock-{os.getuid()}", 12345, 12345)
    assert not KeptSpools(place, RUN).take("key", end.rows, end.checksum, tmp_path / "taken")


def test_a_machine_that_has_started_anew_keeps_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was flushed before."""
    end = spool(tmp_path / "read")
    KeptSpools(place, RUN).keep("key", tmp_path / "read")
    (tmp_path / "boot").write_text("another one")
    with monkeypatch.context() as patch:
        patch.setattr(kept_module, "BOOT", tmp_path / "boot")
        assert not KeptSpools(place, RUN).take("key", end.rows, end.checksum, tmp_path / "taken")
    assert KeptSpools(place, RUN).take("key", end.rows, end.checksum, tmp_path / "taken")


# What is known of a manifest


def test_what_a_manifest_counted() -> None:
    parts = [
        Part(partition=0, rows=3, checksum="0000001a", layout="x"),
        Part(partition=1, rows=0, checksum="0000002b", layout=""),  # of no rows
        Part(partition=2, rows=0, checksum=NO_CHECKSUM, layout=""),  # there to fill up
        Part(partition=3, rows=4, checksum="0000003c", layout="x"),
    ]
    known = counted(manifest_of("train", parts))
    assert known == {0: (3, "0000001a"), 1: (0, "0000002b"), 3: (4, "0000003c")}
    assert {*known} == {*numbers(3, 2)}
    assert counted(Manifest((), whole=True, open=True)) == {}


def test_a_partition_without_rows_is_one(tmp_path: Path) -> None:
    assert SpoolWriter(tmp_path / "empty", "train").close().checksum != NO_CHECKSUM


# An agent's intake


class Told(list[dict[str, Any]]):
    def of(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self if each["event"] == event]


def intake(folder: Path, told: Told, features: str = "x", name: str = "train") -> Intake:
    folder.mkdir()
    arrivals = [Arrival(name, Selection(features, "y"), numbers(4, 2))]
    return Intake(str(folder), pickle.dumps(arrivals), [("c0", "c1")], told.append)


def batch(partition: int, rows: int) -> Any:
    import pyarrow as pa

    return pa.record_batch(
        {
            "source": pa.array([0] * rows, pa.int32()),
            "partition": pa.array([partition] * rows, pa.int32()),
            "c0": pa.array(np.arange(rows) + 10.0 * partition),
            "c1": pa.array(np.arange(rows)),
        }
    )


def left_by_another(tmp_path: Path, place: Path) -> list[tuple[int, int, int, str]]:
    """Three partitions were begun, of which two were read to their end; what they were."""
    told = Told()
    sink = intake(tmp_path / "before", told)
    sink.resume(str(place), RUN, ())
    for partition, rows in ((0, 3), (1, 4), (2, 5)):
        sink.write(batch(partition, rows))
    sink.leave(True)
    sink.abandon()
    sums = [each for each in told.of("sum") if each["of"] == "rows"]
    assert len(sums) == 2
    rows_and_checksums = [each["sum"].split() for each in sums]
    return [
        (0, each["partition"], int(rows), checksum)
        for each, (rows, checksum) in zip(sums, rows_and_checksums, strict=True)
    ]


def test_an_agent_has_what_another_has_read_to_its_end(tmp_path: Path, place: Path) -> None:
    wanted, told = left_by_another(tmp_path, place), Told()
    sink = intake(tmp_path / "after", told)
    sink.resume(str(place), RUN, wanted)
    assert [each["partition"] for each in told.of("reading")] == [p for _, p, _, _ in wanted]
    assert [each["sum"] for each in told.of("sum")] == [f"{r} {c}" for _, _, r, c in wanted]
    for source, partition, rows, _ in wanted:
        end = SpoolEnd.read(sink.reading(source, partition))
        assert end is not None
        assert end.rows == rows
    sink.leave(True)  # and it may be stopped as well
    told = Told()
    intake(tmp_path / "once more", told).resume(str(place), RUN, wanted)
    assert len(told.of("reading")) == 2


@pytest.mark.parametrize("other", ["rows", "checksum", "partition", "column", "source", "run"])
def test_an_agent_has_nothing_else(tmp_path: Path, place: Path, other: str) -> None:
    (one, *_), told = left_by_another(tmp_path, place), Told()
    source, partition, rows, checksum = one
    wanted = {
        "rows": (source, partition, rows + 1, checksum),
        "checksum": (source, partition, rows, "01234567"),
        "partition": (source, partition + 1, rows, checksum),
    }.get(other, one)
    features = "z" if other == "column" else "x"
    sink = intake(tmp_path / "after", told, features, "test" if other == "source" else "train")
    sink.resume(str(place), "/runs/other" if other == "run" else RUN, [wanted])
    assert told == []


def test_a_run_that_is_over_leaves_nothing(tmp_path: Path, place: Path) -> None:
    wanted = left_by_another(tmp_path, place)
    sink = intake(tmp_path / "after", Told())
    sink.resume(str(place), RUN, wanted[:1])  # the other one is still there
    sink.leave(False)
    assert not list(place.iterdir())
