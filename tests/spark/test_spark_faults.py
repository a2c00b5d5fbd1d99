"""What dies under a run on Spark costs the steps since the checkpoint, and never the bits."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import SIZES, digits, frame, here
from torch import nn

from penstock import Callback, Job, Run, feed
from penstock.cluster.launcher import AgentJoined, AgentLost
from penstock.cluster.spark import SparkLauncher
from penstock.errors import WorkerLost
from penstock.runtime.place import OnSpark

EVERY = 4
"""Steps from one checkpoint to the next."""
STEPS = 44
"""22 per epoch: the largest partition has 170 rows, in batches of 8."""
PROCESS, FORK_SERVER, AGENT, SPARK_DAEMON, EXECUTOR, NODE = range(6)
"""A training process, and from what it descends: the last is Spark's worker daemon."""
RESUMED_S = 20.0
"""From a kill until the rank trains again, a new executor's JVM included; on a quiet machine 5 s
do."""
ENDED_S = 5.0
"""From the end of a driver, or what stops it, until nothing of its run is left."""


def state_and_parent(pid: int) -> tuple[str, int]:
    """Of a process; of one that is gone, nothing and 0."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)


def ancestor(generations: int) -> int:
    """The process from which this one descends in so many generations; 0 is itself."""
    pid = os.getpid()
    for _ in range(generations):
        _, pid = state_and_parent(pid)
    return pid


def generation() -> int:
    return int(os.environ["PENSTOCK_GENERATION"])


class Kills(Callback):
    """Kills what a rank's training process descends from after a step; writes down when.

    Arguments:
        folder: for the notes: "killed-1" and "started-2" in seconds, by generation.
        deaths: what, which rank and after which step, one for each generation from the first on.
    """

    def __init__(self, folder: Path, *deaths: tuple[int, int, int]) -> None:
        self.folder, self.deaths = folder, deaths

    def note(self, what: str) -> None:
        (self.folder / f"{what}-{generation()}").write_text(str(time.time()))

    def started(self, worker: Any) -> None:
        if worker.rank == 0:
            self.note("started")

    def stepped(self, worker: Any) -> None:
        if generation() > len(self.deaths):
            return
        what, *at = self.deaths[generation() - 1]
        if at == [worker.rank, worker.global_step]:
            victim = ancestor(what)
            self.note("killed")
            os.kill(victim, signal.SIGKILL)
            time.sleep(60)

    def pause_s(self, number: int) -> float:
        """From a kill to the first step of the next generation."""
        killed, started = f"killed-{number}", f"started-{number + 1}"
        read = [float((self.folder / name).read_text()) for name in (killed, started)]
        return read[1] - read[0]


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Appears when a double of an agent is told to stand by, or to leave."""
    sign = tmp_path / "double"

    def watch(name: str) -> None:
        tell = getattr(SparkLauncher, name)

        def told(launcher: SparkLauncher, *values: Any) -> None:
            sign.touch()
            tell(launcher, *values)

        monkeypatch.setattr(SparkLauncher, name, told)

    watch("wait")
    watch("leave")
    return sign


class Awaits(Callback):
    """Holds a step of a generation until a file is there, and a second more."""

    def __init__(self, file: Path, of_generation: int, step: int) -> None:
        self.file, self.at = file, (of_generation, step)

    def stepped(self, worker: Any) -> None:
        if (generation(), worker.global_step) == self.at:
            until(self.file.exists, f"{self.file}")
            time.sleep(1)


def slow(pause_s: float, of_generation: int) -> Callable[[Any], None]:
    """A callback that makes the steps of a generation last longer."""
    return lambda worker: time.sleep(pause_s if generation() == of_generation else 0)


def job(train: Any, **changes: Any) -> Job:
    """Batch norm has buffers, dropout draws numbers, Adam has state."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10)
    )
    values: dict[str, Any] = {
        "network": network,
        "loss": "cross_entropy",
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01),
        "train": train,
        "batch_size": 8,
        "epochs": 2,
        "workers": 2,
        "shards": 4,
        "threads": 1,
        "seed": 5,
        "checkpoint": {"every": f"{EVERY} steps", "keep": 3},
    }
    return Job(**(values | changes))


def on_spark(session: Any, **changes: Any) -> Job:
    x, y = digits()
    source = feed.dataframe(frame(session, x, y, SIZES), features="x", target="y")
    return job(source, **changes)


def same(run: Run, whole: Run) -> None:
    """Asserts that two runs ended in the same bits and tell the same story."""

    def digests(of: Run) -> dict[str, str]:
        folder = Path(of.url, of.checkpoint().folder)
        assert of.checkpoint().step == STEPS
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.glob("*.safetensors")
        }

    assert digests(run) == digests(whole)
    mine, theirs = run.scalars("loss"), whole.scalars("loss")
    assert mine.steps.tolist() == theirs.steps.tolist() == list(range(1, STEPS + 1))
    assert mine.values.tolist() == theirs.values.tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that lost nothing, on this machine."""
    folder = tmp_path_factory.mktemp("whole")
    return job(here(*digits(), SIZES)).run(workers=1, run_dir=str(folder / "run"), progress=False)


def until(happened: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < give_up, what
        time.sleep(0.02)


def told(said: str) -> list[tuple[str, ...]]:
    """What was said of losses: rank, what has happened to it, step, checkpoint, restart."""
    pattern = r"rank (\d) (.*) after step (\d+).*; goes on from the checkpoint of step (\d+) "
    return re.findall(pattern + r"\(restart (\d)", said)


def test_all_that_can_die_beneath_a_worker(
    spark: Any, whole: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One after the other, in an order and at steps drawn by lot."""
    chance = random.Random(2)
    order = [PROCESS, FORK_SERVER, AGENT, SPARK_DAEMON, EXECUTOR]
    chance.shuffle(order)
    steps = sorted(chance.sample(range(6, STEPS, EVERY), len(order)))  # each after a checkpoint
    deaths = [(what, chance.randrange(2), step) for what, step in zip(order, steps)]
    kills = Kills(tmp_path, *deaths)
    dying = on_spark(spark, callbacks=[kills], max_restarts=len(deaths))
    run = dying.run(on=spark, run_dir=str(tmp_path / "run"))
    said = capfd.readouterr().err
    same(run, whole)
    assert run.result["restarts"] == len(deaths)
    for number, (loss, (what, rank, step)) in enumerate(zip(told(said), deaths, strict=True), 1):
        who, happened, after, saved, restart = loss
        assert (who, restart) == (str(rank), str(number)), said
        word = "killed by SIGKILL" if what in (PROCESS, FORK_SERVER) else "was lost"
        assert word in happened, said
        assert int(saved) == (step - 1) // EVERY * EVERY
        assert int(saved) <= int(after) <= step
    pauses = {what: kills.pause_s(n) for n, what in enumerate(order, 1)}
    assert max(pauses.values()) < RESUMED_S, pauses


@pytest.mark.torture
def test_a_rank_that_spark_takes_for_done(
    cluster: Any,
    session: Callable[..., Any],
    whole: Run,
    tmp_path: Path,
    double: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a slot to spare, the loss of one rank's executor has Spark run the other's task again;
    the double leaves, Spark counts that rank as done, and does not bring it back when it is lost.
    Nor is the rank given to the double, which takes its time to leave.
    """
    gathered: list[int] = []
    again, poll = SparkLauncher._gather_again, SparkLauncher.poll
    there: dict[int, int] = {}  # ranks by agent

    def gather_again(launcher: SparkLauncher) -> Any:
        gathered.append(1)
        return again(launcher)

    def told(launcher: SparkLauncher) -> Any:
        events = poll(launcher)
        for event in events:
            if isinstance(event, AgentJoined):
                assert event.rank not in there.values(), f"{event} beside one of {there}"
                there[event.agent] = event.rank
            elif isinstance(event, AgentLost):
                there.pop(event.agent, None)
        return events

    monkeypatch.setattr(SparkLauncher, "_gather_again", gather_again)
    monkeypatch.setattr(SparkLauncher, "poll", told)
    cluster.start_worker()
    spark = session(**{"spark.cores.max": "3"})
    kills = Kills(tmp_path, (EXECUTOR, 1, 10), (AGENT, 0, 14))
    dying = on_spark(spark, callbacks=[Awaits(double, of_generation=2, step=13), kills])
    run = dying.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    same(run, whole)
    assert run.result["restarts"] == 2
    assert gathered == [1]
    assert kills.pause_s(2) < RESUMED_S


def test_a_node_that_dies(
    cluster: Any, spark: Any, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without another the run ends in time, and says what is missing; with one it goes on."""
    kills = Kills(tmp_path, (NODE, 1, 14))
    dying = on_spark(spark, callbacks=[kills])
    with monkeypatch.context() as patch:
        patch.setattr(OnSpark, "regather_s", 4.0)
        with pytest.raises(WorkerLost, match=r"rank 1 still absent after 4 s") as caught:
            dying.run(on=spark, run_dir=str(tmp_path / "run"), progress=False)
    assert time.time() - float((tmp_path / "killed-1").read_text()) < 4.0 + RESUMED_S
    assert "after rank 1 was lost: its agent on" in caught.value.message
    assert "slots 1 (" in caught.value.hint  # as it is now
    assert f"--resume {tmp_path / 'run'}" in caught.value.hint
    assert caught.value.exit_code == 3

    cluster.start_worker()
    again = on_spark(spark, callbacks=[Kills(tmp_path, (NODE, 0, 30))])
    (tmp_path / "killed-1").unlink()
    with ThreadPoolExecutor() as pool:
        # Not the other way round: a daemon dies with the thread that has started it.
        going_on = pool.submit(again.run, on=spark, resume=str(tmp_path / "run"), progress=False)
        until((tmp_path / "killed-1").exists, "the second death")
        cluster.start_worker()
        resumed = going_on.result()
    same(resumed, whole)
    assert (resumed.result["resumed_from"], resumed.result["restarts"]) == (12, 1)


def resume(spark: Any, url: Path, whole: Run) -> None:
    """Asserts that a run that ended before its time goes on to the same bits."""
    run = on_spark(spark).run(on=spark, resume=str(url), progress=False)
    assert 8 <= run.result["resumed_from"] < STEPS
    same(run, whole)


BEGUN = "checkpoints/00000008/manifest.json"
DRIVER = """
import sys, cloudpickle, test_spark_faults as faults, test_training
from penstock.errors import Interrupted
from pyspark.sql import SparkSession
for module in (faults, test_training):
    cloudpickle.register_pickle_by_value(module)  # workers need not import pytest
master, folder = sys.argv[1:]
spark = SparkSession.builder.master(master).getOrCreate()
try:
    asked = faults.on_spark(spark, callbacks=[faults.slow(0.05, of_generation=1)])
    asked.run(on=spark, run_dir=folder, progress=False)
except Interrupted as error:
    print("interrupted:", error, flush=True)
    spark.stop()
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.torture)]
)
def test_the_driver_is_stopped(
    cluster: Any,
    session: Callable[..., Any],
    whole: Run,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    run = tmp_path / "run"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.url, str(run)],
            env=os.environ | cluster.environment | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    until(
        lambda: process.poll() is not None or (run / BEGUN).exists(),
        (tmp_path / "output").read_text(),
    )
    assert process.poll() is None, (tmp_path / "output").read_text()
    time.sleep(random.Random(number).uniform(0, 0.3))
    if number == signal.SIGKILL:
        process.kill()
        process.wait(5)
    else:
        os.killpg(process.pid, number)  # as a terminal does
    assert cluster.strays(ENDED_S) == []
    if number == signal.SIGINT:
        assert process.wait(5) == 130
        assert "interrupted: stopped with a checkpoint" in (tmp_path / "output").read_text()
    resume(session(), run, whole)


def test_the_session_is_stopped(
    cluster: Any, spark: Any, session: Callable[..., Any], whole: Run, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped: list[float] = []

    def stop() -> None:
        until((run / BEGUN).exists, "the run begins")
        stopped.append(time.monotonic())
        spark.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    asked = on_spark(spark, callbacks=[slow(0.05, of_generation=1)])
    with pytest.raises(WorkerLost, match=r"Spark's session ended: \S"):
        asked.run(on=spark, run_dir=str(run), progress=False)
    assert time.monotonic() - stopped[0] < ENDED_S
    thread.join()
    assert cluster.strays(ENDED_S - (time.monotonic() - stopped[0])) == []
    resume(session(), run, whole)


def test_a_speculative_double_stands_by_and_takes_over(
    session: Callable[..., Any],
    whole: Run,
    tmp_path: Path,
    double: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    speculation = {
        "spark.speculation": "true",
        "spark.speculation.interval": "100ms",
        "spark.speculation.task.duration.threshold": "500ms",
    }
    spark = session(**speculation)
    kills = Kills(tmp_path, (AGENT, 0, 10))
    asked = on_spark(spark, callbacks=[Awaits(double, of_generation=1, step=9), kills])
    run = asked.run(on=spark, workers=1, run_dir=str(tmp_path / "run"))
    assert "spark.speculation is on: a double of an agent stands by" in capfd.readouterr().err
    same(run, whole)
    assert run.result["restarts"] == 1
    assert kills.pause_s(1) < RESUMED_S
