"""A run that is resumed takes what was read before it was stopped: Spark computes nothing again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_spark_faults import AGENT, EVERY, STEPS, Kills, job, same, until
from test_training import SIZES, digits, here

from penstock import Job, Run, feed
from penstock.errors import Interrupted, WorkerLost

KNOWN = STEPS // 2 + EVERY // 2
"""The step of the first checkpoint after an epoch: it knows what the DataFrames held."""
TEST = [30, 0, 20, 10]
"""Rows of the test DataFrame's partitions."""


def noted(session: Any, notes: Path, split: str, sizes: list[int]) -> Any:
    """As `test_training.frame`, with a note for all that Spark computes, even for the shuffle."""

    def note(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            (notes / f"{split}-{uuid.uuid4().hex}").touch()
            yield batch

    notes.mkdir(exist_ok=True)
    x, y = digits(split, sum(sizes))
    part = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    images = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    columns = {"x": images.cast(pa.list_(pa.float32())), "y": y, "part": part}
    rows = session.createDataFrame(pa.table(columns | {"row": np.arange(len(y))}))
    by_id = rows.mapInArrow(note, rows.schema).repartitionById(len(sizes), "part")
    return by_id.sortWithinPartitions("row")


def on_spark(session: Any, notes: Path, **changes: Any) -> Job:
    frames = (noted(session, notes, s, n) for s, n in (("train", SIZES), ("test", TEST)))
    train, test = (feed.dataframe(each, features="x", target="y") for each in frames)
    return job(train, test=test, **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that was never stopped, on this machine."""
    folder = tmp_path_factory.mktemp("whole")
    return job(here(*digits(), SIZES)).run(workers=1, run_dir=str(folder / "run"), progress=False)


def lingers(worker: Any) -> None:
    """A callback that leaves time to stop a run in its second epoch."""
    time.sleep(0.1 if worker.global_step > KNOWN else 0)


def interrupted(session: Any, run: Path, notes: Path, **changes: Any) -> None:
    """A run that gets a Ctrl-C in its second epoch."""

    def interrupt() -> None:
        until((run / f"checkpoints/{KNOWN:08}/manifest.json").exists, "the second epoch")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    asked = on_spark(session, notes, callbacks=[lingers], **changes)
    with pytest.raises(Interrupted):
        asked.run(on=session, run_dir=str(run), progress=False)
    thread.join()


def resumed(session: Any, run: Path, notes: Path, whole: Run, **changes: Any) -> set[str]:
    """Goes on to the same bits; of which DataFrames something was computed meanwhile."""
    shutil.rmtree(notes)
    going_on = on_spark(session, notes, **changes)
    going_on = going_on.run(on=session, resume=str(run), progress=False)
    assert KNOWN <= going_on.result["resumed_from"] < STEPS
    same(going_on, whole)
    return {path.name.partition("-")[0] for path in notes.iterdir()}


def kept(cluster: Any) -> list[Path]:
    """The spools that are kept on the cluster, of which both nodes are this machine."""
    return sorted(cluster.folder.glob("local/penstock-*/agents-*/*"))


@pytest.fixture(autouse=True)
def _nothing_kept(cluster: Any) -> Iterator[None]:
    for left in cluster.folder.glob("local/penstock-*"):
        shutil.rmtree(left)
    yield
    assert not list(cluster.folder.glob("local/penstock-*"))


def test_what_was_read_is_taken_by_another_session(
    cluster: Any, session: Callable[..., Any], whole: Run, tmp_path: Path
) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    interrupted(session(), run, notes)
    assert {path.name.partition("-")[0] for path in notes.iterdir()} == {"train", "test"}
    assert len(kept(cluster)) == 6  # those with rows
    assert resumed(session(), run, notes, whole) == set()


@pytest.mark.torture
def test_what_nobody_has_counted_yet_is_read(
    cluster: Any, spark: Any, whole: Run, tmp_path: Path
) -> None:
    run, notes, late = tmp_path / "run", tmp_path / "notes", {"evaluate": {"every": "2 epochs"}}
    interrupted(spark, run, notes, **late)
    assert len(kept(cluster)) == 6
    assert resumed(spark, run, notes, whole, **late) == {"test"}


def remove(spool: Path) -> None:
    shutil.rmtree(spool)


def cut(spool: Path) -> None:
    os.truncate(spool / "000000.arrow", 100)


@pytest.mark.parametrize("harm", [remove, pytest.param(cut, marks=pytest.mark.torture)])
def test_all_is_read_where_one_is_not_what_it_was(
    cluster: Any, spark: Any, whole: Run, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    interrupted(spark, run, notes)
    harm(kept(cluster)[0])
    assert resumed(spark, run, notes, whole) == {"train", "test"}


@pytest.mark.torture
def test_what_was_taken_is_lost_with_its_agent_and_read(
    cluster: Any, spark: Any, whole: Run, tmp_path: Path
) -> None:
    """An agent may have taken all, or nothing: both die, one after the other."""
    run, notes = tmp_path / "run", tmp_path / "notes"
    interrupted(spark, run, notes)
    kills = Kills(tmp_path, (AGENT, 0, 38), (AGENT, 1, 42))
    assert resumed(spark, run, notes, whole, callbacks=[kills]) == {"train", "test"}
    assert Run(str(run)).result["restarts"] == 2


@pytest.mark.torture
def test_a_fault_keeps_what_the_other_agents_have(
    cluster: Any, spark: Any, whole: Run, tmp_path: Path
) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    kills = Kills(tmp_path, (AGENT, 0, 38))
    with pytest.raises(WorkerLost):
        on_spark(spark, notes, callbacks=[kills], max_restarts=0).run(
            on=spark, run_dir=str(run), progress=False
        )
    assert 0 < len(kept(cluster)) < 6
    assert resumed(spark, run, notes, whole) == {"train", "test"}


@pytest.mark.torture
def test_nothing_is_kept_that_nobody_will_know(cluster: Any, spark: Any, tmp_path: Path) -> None:
    """Who goes on from the first epoch does not know what was in it."""
    notes, kills = tmp_path / "notes", Kills(tmp_path, (AGENT, 0, 10))
    with pytest.raises(WorkerLost):
        on_spark(spark, notes, callbacks=[kills], max_restarts=0).run(
            on=spark, run_dir=str(tmp_path / "run"), progress=False
        )
    assert not kept(cluster)


DRIVER = """
import sys, pathlib, cloudpickle, test_going_on, test_spark_faults as faults, test_training
from pyspark.sql import SparkSession
for module in (test_going_on, faults, test_training):
    cloudpickle.register_pickle_by_value(module)  # workers need not import pytest
master, run, notes = sys.argv[1:]
spark = SparkSession.builder.master(master).getOrCreate()
asked = test_going_on.on_spark(spark, pathlib.Path(notes), callbacks=[test_going_on.lingers])
asked.run(on=spark, run_dir=run, progress=False)
"""


@pytest.mark.torture
def test_a_driver_that_is_killed_need_not_say_so(
    cluster: Any, session: Callable[..., Any], whole: Run, tmp_path: Path
) -> None:
    run, notes, said = tmp_path / "run", tmp_path / "notes", tmp_path / "output"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with said.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.url, str(run), str(notes)],
            env=os.environ | cluster.environment | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    known = run / f"checkpoints/{KNOWN:08}/manifest.json"
    try:
        until(lambda: process.poll() is not None or known.exists(), "the second epoch")
        assert process.poll() is None, said.read_text()
    finally:
        process.kill()
        process.wait(5)
    assert cluster.strays() == []
    assert len(kept(cluster)) == 6
    assert resumed(session(), run, notes, whole) == set()
