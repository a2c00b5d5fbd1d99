"""A run that loses workers goes on by itself, to the very bits of the run that lost none."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_local import alive, driver, family, until
from test_resume import STEPS, STRATEGIES, digests, job, losses, same

from penstock import AllReduce, Callback, Job, Run
from penstock.errors import WorkerFailed, WorkerLost

EVERY = 4
"""Steps from one checkpoint of the job to the next."""


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


ENDS: dict[str, tuple[Callable[[], Any], str]] = {
    "killed": (kill(signal.SIGKILL), "was killed by SIGKILL"),
    "crashed": (kill(signal.SIGSEGV), "was killed by SIGSEGV"),
    "left": (lambda: os._exit(3), "ended with exit code 3"),
}


class Acts(Callback):
    """Acts after a step of a generation, on one rank.

    Arguments:
        generations: 1 is the first.
    """

    def __init__(
        self, step: int, rank: int, act: Callable[[], Any], generations: tuple[int, ...] = (1,)
    ) -> None:
        self.step, self.rank, self.act, self.generations = step, rank, act, generations

    def stepped(self, worker: Any) -> None:
        generation = int(os.environ["PENSTOCK_GENERATION"])
        if (worker.global_step, worker.rank) == (self.step, self.rank) and (
            generation in self.generations
        ):
            self.act()


def quiet(asked: Job, folder: Path, workers: int) -> Run:
    return asked.run(workers=workers, run_dir=str(folder), progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The runs that lost no worker."""
    folder = tmp_path_factory.mktemp("whole")
    return {kind: quiet(job(kind), folder / kind, 1) for kind in STRATEGIES}


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("how", ENDS)
def test_a_worker_that_dies_costs_the_steps_since_the_checkpoint(
    whole: dict[str, Run],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    how: str,
) -> None:
    chance = random.Random(f"{kind} {how}")
    workers = chance.choice([2, 3])
    step, rank = chance.randrange(2, STEPS), chance.randrange(workers)
    end, words = ENDS[how]
    dying = job(kind, callbacks=[Acts(step, rank, end)])
    run = dying.run(workers=workers, run_dir=str(tmp_path / "run"))
    same(run, whole[kind])
    assert run.result["status"] == "finished"
    assert run.result["restarts"] == 1
    assert run.result["resumed_from"] is None
    said = capfd.readouterr().err
    told = re.findall(r"rank (\d) \(process \d+ on \S+\) (.*?)(?: after step (\d+))?; (.*)", said)
    saved = (step - 1) // EVERY * EVERY  # the callback is called before a step's checkpoint
    goes_on = f"goes on from the checkpoint of step {saved} (restart 1 of 3)"
    assert [(who, what, then) for who, what, _, then in told] == [(str(rank), words, goes_on)]
    assert saved <= int(told[0][2] or 0) <= step
    assert said.count("plan  ") == 1


def test_twice_and_by_two_ranks_at_once(
    whole: dict[str, Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    deaths = [
        Acts(7, 1, kill(signal.SIGKILL)),
        Acts(10, 0, kill(signal.SIGSEGV), generations=(2,)),
        Acts(10, 2, kill(signal.SIGKILL), generations=(2,)),
    ]
    run = job("averaging", callbacks=deaths).run(workers=3, run_dir=str(tmp_path / "run"))
    same(run, whole["averaging"])
    assert run.result["restarts"] == 2  # two deaths of one generation are one loss
    said = capfd.readouterr().err
    assert re.findall(r"from the checkpoint of step (\d+) \(restart (\d) of 3\)", said) == [
        ("4", "1"),
        ("8", "2"),
    ]


def test_before_the_first_checkpoint_it_begins_again(
    whole: dict[str, Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Early(Callback):
        def __setstate__(self, state: dict[str, Any]) -> None:
            if os.environ["PENSTOCK_RANK"] == "1" and os.environ["PENSTOCK_GENERATION"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)

        def __getstate__(self) -> dict[str, Any]:
            return {"some": "state"}

    early = job("allreduce", callbacks=[Early()])
    run = early.run(workers=2, run_dir=str(tmp_path / "run"))
    same(run, whole["allreduce"])
    said = capfd.readouterr().err
    assert "was killed by SIGKILL; goes on from the beginning (restart 1 of 3)" in said


def test_the_fork_server_dies_and_another_is_started(whole: dict[str, Run], tmp_path: Path) -> None:
    def act() -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    run = quiet(job("allreduce", callbacks=[Acts(11, 1, act)]), tmp_path / "run", 2)
    same(run, whole["allreduce"])
    assert run.result["restarts"] == 1


def test_what_was_told_after_the_checkpoint_is_superseded(
    whole: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the events of the lost steps are there, and do not count."""

    def write(worker: Any) -> None:
        if worker.rank == 0 and worker.global_step == 14:
            worker._recorder.flush()

    dying = job("allreduce", callbacks=[write, Acts(15, 1, kill(signal.SIGKILL))])
    run = quiet(dying, tmp_path / "run", 2)
    assert losses(run) == losses(whole["allreduce"])
    from penstock.watch import reader

    def all_of_it(events: Any) -> Any:
        for segment in reversed(events._segments.values()):
            yield segment, None

    monkeypatch.setattr(reader.Events, "_newest_first", all_of_it)
    lost = (13, 14)
    assert sorted(losses(run)[0]) == sorted([*range(1, STEPS + 1), *lost])


def test_lost_more_often_than_it_may_be(whole: dict[str, Run], tmp_path: Path) -> None:
    everyone = (1, 2, 3)
    dying = Acts(9, 1, kill(signal.SIGSEGV), everyone)
    with pytest.raises(WorkerLost) as caught:
        quiet(job("allreduce", callbacks=[dying], max_restarts=2), tmp_path / "run", 2)
    message = caught.value.message
    assert re.match(r"rank 1 \(process \d+ on \S+\) was killed by SIGSEGV", message)
    assert message.endswith("after 2 restarts")
    assert caught.value.exit_code == 3
    assert f"--resume {tmp_path / 'run'}" in caught.value.hint
    failed = Run(str(tmp_path / "run"))
    assert (failed.result["status"], failed.result["restarts"]) == ("failed", 2)
    assert failed.checkpoints[-1] == 8
    resumed = job("allreduce").run(workers=3, resume=failed, progress=False)
    same(resumed, whole["allreduce"])


@pytest.mark.parametrize("without", [{"recovery": "none"}, {"max_restarts": 0}], ids=str)
def test_without_recovery_the_first_loss_is_the_end(
    tmp_path: Path, without: dict[str, Any]
) -> None:
    dying = job("allreduce", callbacks=[Acts(6, 0, kill(signal.SIGKILL))], **without)
    with pytest.raises(WorkerLost, match=r"rank 0 \(process \d+ on \S+\) was killed by SIGKILL"):
        quiet(dying, tmp_path / "run", 2)
    run = Run(str(tmp_path / "run"))
    assert (run.result["status"], run.result["restarts"]) == ("failed", 0)
    assert run.checkpoints[-1] == 4


@pytest.mark.parametrize("generation", [1, 2])
def test_an_error_of_the_user_is_not_tried_again(tmp_path: Path, generation: int) -> None:
    def fail() -> None:
        with open(tmp_path / "failures", "a") as file:
            file.write("once\n")
        raise KeyError("of the user")

    callbacks = [
        Acts(5, 1, kill(signal.SIGKILL), generations=tuple(range(1, generation))),
        Acts(7, 0, fail, generations=(generation,)),
    ]
    with pytest.raises(WorkerFailed, match="rank 0 raised KeyError: 'of the user'"):
        quiet(job("allreduce", callbacks=callbacks), tmp_path / "run", 2)
    assert (tmp_path / "failures").read_text() == "once\n"
    assert Run(str(tmp_path / "run")).result["restarts"] == generation - 1


# Interrupted between generations

DRIVER = """
from penstock.cluster.local import warm
from penstock.runtime.preload import PRELOAD
warm(PRELOAD)
import os, sys, time, cloudpickle, test_recovery, test_resume
from penstock.errors import Interrupted
cloudpickle.register_pickle_by_value(test_recovery)
cloudpickle.register_pickle_by_value(test_resume)
folder, slow = sys.argv[1], sys.argv[2] == "slow"

class Slow(test_recovery.Callback):
    def started(self, worker):
        if slow and os.environ["PENSTOCK_GENERATION"] == "2":
            open(folder + "/waiting", "w").close()
            time.sleep(60)

    def stepped(self, worker):
        time.sleep(0.03)

def die():
    open(folder + "/dies", "w").close()
    os.kill(os.getpid(), 9)

callbacks = [Slow(), test_recovery.Acts(10, 1, die)]
try:
    test_resume.job("allreduce", callbacks=callbacks).run(
        workers=2, run_dir=folder, progress=False
    )
except Interrupted as error:
    print("interrupted:", error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("moment", ["at the loss", "soon after it", "before the first step"])
def test_interrupted_between_generations(
    whole: dict[str, Run], tmp_path: Path, moment: str
) -> None:
    folder = tmp_path / "run"
    slow = moment == "before the first step"
    process = driver(DRIVER, folder, "slow" if slow else "", folder=tmp_path)
    sign = folder / ("waiting" if slow else "dies")
    until(sign.exists, 60, f"{sign}; {(tmp_path / 'output').read_text()}")
    if moment == "soon after it":
        time.sleep(random.Random(moment).uniform(0.02, 0.1))
    everyone = family(process.pid)
    process.send_signal(signal.SIGINT)
    until(lambda: not any(map(alive, everyone[2:])), 5, "the workers end")
    assert process.wait(20) == 130
    output = (tmp_path / "output").read_text()
    assert "interrupted: stopped with a checkpoint at step" in output
    run = Run(str(folder))
    assert run.result["status"] == "interrupted"
    assert run.checkpoints[-1] >= 8
    resumed = job("allreduce").run(workers=1, resume=run, progress=False)
    assert digests(resumed) == digests(whole["allreduce"])
    assert losses(resumed) == losses(whole["allreduce"])


class Falls(torch.nn.Linear):
    """A layer in whose forward one worker dies: who first calls it so often."""

    def __init__(self, inputs: int, outputs: int, path: Path, calls: int) -> None:
        super().__init__(inputs, outputs)
        self.path, self.calls = path, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls -= self.training
        if self.calls == 0:
            with contextlib.suppress(FileExistsError), self.path.open("x"):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def test_a_worker_that_dies_in_a_forward_into_which_the_exchange_goes_on(tmp_path: Path) -> None:
    """When some layers are of the last step, and some of the one before."""

    def run(name: str, calls: int, into_forward: bool, workers: int) -> Run:
        torch.manual_seed(11)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3),
            torch.nn.Flatten(),
            Falls(144, 20, tmp_path / name / "fallen", calls),
            torch.nn.ReLU(),
            torch.nn.Linear(20, 5),
        )
        (tmp_path / name).mkdir()
        strategy = AllReduce(bucket_bytes=256, into_forward=into_forward)
        asked = job("allreduce", network=network, strategy=strategy)
        return quiet(asked, tmp_path / name / "run", workers)

    undisturbed = run("undisturbed", -1, False, 1)
    lost = run("lost", 11, True, 3)
    assert (tmp_path / "lost" / "fallen").exists()
    assert lost.result["restarts"] == 1
    assert losses(lost) == losses(undisturbed)
    assert lost.result["evaluation"] == undisturbed.result["evaluation"]
    assert digests(lost) | {"state.json": ""} == digests(undisturbed) | {"state.json": ""}
