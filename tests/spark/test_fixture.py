"""The cluster of these tests is one: two executors, real failures, and nothing left of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def meeting(folder: Path, tasks: int) -> Callable[[Iterator[Any]], Iterator[Any]]:
    """A function for mapInArrow: waits until so many tasks are in it, then tells its process."""

    def meet(batches: Iterator[Any]) -> Iterator[Any]:
        import os
        import time

        import pyarrow as pa

        rows = sum(batch.num_rows for batch in batches)
        (folder / str(os.getpid())).touch()
        give_up = time.monotonic() + 30
        while len(list(folder.iterdir())) < tasks:
            assert time.monotonic() < give_up, "the others have not come"
            time.sleep(0.02)
        yield pa.record_batch({"pid": pa.array([os.getpid()]), "rows": pa.array([rows])})

    return meet


def met(session: Any, folder: Path, tasks: int = 2) -> set[int]:
    """The Python processes of so many tasks that ran at once."""
    folder.mkdir()
    frame = session.range(0, 2 * tasks, 1, tasks)
    rows = frame.mapInArrow(meeting(folder, tasks), "pid long, rows long").collect()
    assert [row.rows for row in rows] == [2] * tasks
    return {row.pid for row in rows}


def within(seconds: float, what: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + seconds
    while not (done := what()) and time.monotonic() < give_up:
        time.sleep(0.02)
    return done


def test_two_tasks_run_at_once_on_two_executors(cluster: Any, spark: Any, tmp_path: Path) -> None:
    assert met(spark, tmp_path / "met") == set(cluster.python_workers())
    assert len(cluster.executors()) == 2


def test_conf_is_of_one_session(session: Callable[..., Any]) -> None:
    key = "spark.speculation"
    assert session(**{key: True}).conf.get(key) == "true"
    assert session().conf.get(key, None) is None


def test_connect_runs_on_both_executors(cluster: Any, connect: Any, tmp_path: Path) -> None:
    assert type(connect).__module__.startswith("pyspark.sql.connect")
    assert met(connect, tmp_path / "met") == set(cluster.python_workers())


def test_classic_session_after_connect(spark: Any) -> None:
    assert type(spark).__module__ == "pyspark.sql.session"
    assert spark.range(3).count() == 3


def test_killed_worker_takes_its_executor_and_another_replaces_it(
    cluster: Any, spark: Any, tmp_path: Path
) -> None:
    met(spark, tmp_path / "before")
    pythons = cluster.python_workers()
    cluster.kill_worker(next(i for i, w in enumerate(cluster.workers) if w.poll() is None))
    assert within(10, lambda: len(cluster.executors()) == 1)
    assert within(10, lambda: [Path(f"/proc/{pid}").exists() for pid in pythons].count(True) == 1)
    cluster.start_worker()
    assert len(met(spark, tmp_path / "after")) == 2


def test_a_daemon_that_does_not_start_shows_its_log(cluster: Any) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)NoSuchDaemon: ended 1 .*ClassNotFoundException"):
        cluster.start("org.apache.spark.NoSuchDaemon", ready="never")


def test_nothing_is_left_of_a_closed_cluster(cluster: Any) -> None:
    mine = type(cluster)()
    daemons = mine.daemons()
    assert mine.strays(0.0) == []
    left = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env=os.environ | mine.environment,
    )
    assert within(5, lambda: mine.strays(0.0) != [])  # until it is the new program
    assert mine.strays(0.0)[0].startswith(f"{left.pid} {sys.executable}")
    mine.close()
    left.wait(5)
    assert not any(Path(f"/proc/{pid}").exists() for pid in daemons)
    assert not mine.folder.exists()
    host, _, port = mine.url.removeprefix("spark://").partition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 1.0)
