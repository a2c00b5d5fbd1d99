"""What goes wrong in a run is an error that names its cause, costs no checkpoint, and ends all."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from test_local import alive, driver, family, until
from test_resume import digests, job, losses
from torch import nn

import penstock
from penstock import Averaging, Job, Run, feed
from penstock.cluster import local
from penstock.errors import (
    DataError,
    Diverged,
    Interrupted,
    NetworkError,
    PenstockError,
    RunError,
    TransportError,
    UserError,
    WorkerFailed,
    WorkerLost,
)
from penstock.runtime.preload import PRELOAD
from penstock.runtime.store import Store

ROWS = 96


def small(x: Any = None, y: Any = None, **changes: Any) -> Job:
    """A job of 6 steps per epoch on two shards."""
    numbers = np.random.default_rng(1)
    x = numbers.normal(size=(ROWS, 6)).astype(np.float32) if x is None else x
    y = numbers.integers(0, 3, ROWS) if y is None else y
    torch.manual_seed(2)
    values: dict[str, Any] = {
        "network": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        "loss": "cross_entropy",
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "train": feed.arrays(x, y),
        "batch_size": 8,
        "epochs": 2,
        "workers": 2,
        "threads": 1,
        "checkpoint": {"every": "2 steps", "keep": 100},
        "max_restarts": 0,
    }
    return Job(**(values | changes))


def at_step(step: int, rank: int, act: Callable[[], Any]) -> Callable[[Any], None]:
    """A callback that acts on one rank after one step."""

    def stepped(worker: Any) -> None:
        if worker.global_step == step and worker.rank == rank:
            act()

    return stepped


def quiet(job: Job, folder: Path, **arguments: Any) -> Run:
    return job.run(run_dir=str(folder), progress=False, **arguments)


def finite(run: Run) -> bool:
    saved = run.checkpoint()
    saved.verify()
    tensors, _ = saved.tensors("network.safetensors")
    return all(t.isfinite().all() for t in tensors.values())


# Bad input


def test_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    missing = small(train=feed.mnist(tmp_path / "data"))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: no such file") as caught:
        quiet(missing, tmp_path / "run")
    assert caught.value.hint
    assert not (tmp_path / "run").exists()


def test_a_truncated_file(tmp_path: Path) -> None:
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (10, 28, 28))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + bytes(10 * 784 - 1))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 10]) + bytes(10))
    with pytest.raises(
        DataError, match=r"train-images-idx3-ubyte: expected 7856 bytes .* found 7855"
    ):
        quiet(small(train=feed.mnist(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    table = pa.table({"amount": [1.0, 2.0], "paid": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    train = feed.parquet(str(tmp_path / "t.parquet"), features=["amuont"], target="paid")
    with pytest.raises(DataError, match="amuont") as caught:
        quiet(small(train=train), tmp_path / "run")
    assert "amount" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_label_out_of_range_names_its_record(tmp_path: Path) -> None:
    y = np.arange(ROWS) % 3
    y[77] = 5
    with pytest.raises(
        DataError, match=r"rank 1: record 77 of train has label 5; the network has 3"
    ):
        quiet(small(y=y), tmp_path / "run")
    run = Run(str(tmp_path / "run"))
    assert run.result["status"] == "failed"
    assert "record 77" in run.result["error"]
    assert finite(run)
    y[77] = 2
    assert quiet(small(y=y), tmp_path / "good").result["status"] == "finished"


def test_features_of_another_shape_name_the_batch(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"the network cannot take this batch") as caught:
        quiet(small(x=np.zeros((ROWS, 7), np.float32)), tmp_path / "run")
    assert "features (8, 7) float32, target (8,) int64" in caught.value.message
    assert re.search(r"step 1, shard [01], records \d+, .* and 4 more", caught.value.message)


@pytest.mark.parametrize("strategy", ["allreduce", Averaging(every=4)])
def test_a_loss_that_is_not_finite(tmp_path: Path, strategy: Any) -> None:
    """Shard 1 owns the records from 48 on, and meets record 60 in the first epoch."""
    x = np.random.default_rng(1).normal(size=(ROWS, 6)).astype(np.float32)
    x[60, 2] = np.nan
    with pytest.raises(Diverged) as caught:
        quiet(small(x=x, strategy=strategy, checkpoint={"every": "1 step"}), tmp_path / "run")
    message = caught.value.message
    assert "shard 1 on rank 1: the loss is nan" in message
    assert message.endswith("the first parameter whose gradient is not finite is 0.weight")
    assert caught.value.exit_code == 1
    run = Run(str(tmp_path / "run"))
    step = run.checkpoints[-1] + 1
    assert f"step {step}," in message
    assert finite(run)
    x[60, 2] = 0
    good = quiet(small(x=x, strategy=strategy), tmp_path / "good")
    assert finite(good)


def test_a_gradient_that_is_not_finite_under_a_finite_loss(tmp_path: Path) -> None:
    def train(worker: Any) -> None:
        network, _ = worker.prepare(
            nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)),
            functools.partial(torch.optim.SGD, lr=0.1),
        )
        for batch in worker.batches("train", epochs=1, batch_size=8):
            worker.step(network[0](batch.x).mean() + (network[1].bias * 0).sqrt().sum())

    with pytest.raises(Diverged, match=r"step 1, shard 0 on rank 0: .* is not finite is 1\.bias"):
        penstock.launch(
            train,
            run_dir=str(tmp_path / "run"),
            progress=False,
            train=feed.arrays(np.ones((ROWS, 6), np.float32), np.zeros(ROWS)),
        )


def test_a_run_directory_that_nodes_do_not_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a worker a folder of another machine looks like one without the plan."""
    write = Store.write

    def unseen(store: Store, name: str, data: bytes) -> None:
        if name != "plan.json":
            write(store, name, data)

    monkeypatch.setattr(Store, "write", unseen)
    with pytest.raises(RunError, match=r"run is not to be seen from") as caught:
        quiet(small(), tmp_path / "run")
    assert "share" in caught.value.hint


def test_a_network_that_cannot_be_pickled_is_named(tmp_path: Path) -> None:
    network = nn.Linear(6, 3)
    network.guard = threading.Lock()
    with pytest.raises(NetworkError, match=r"network \(an instance of .*Linear\)") as caught:
        quiet(small(network=network), tmp_path / "run")
    assert "lock" in caught.value.message
    assert "function that makes it" in caught.value.hint


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 cannot be used"):
            quiet(small(), tmp_path / "run", on=f"local:{port}")
    run = quiet(small(), tmp_path / "run", on=f"local:{port}")
    assert run.result["status"] == "finished"


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"file/run/job\.yaml cannot be written") as caught:
        quiet(small(), tmp_path / "file/run")
    assert caught.value.hint
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of some size, or gives it another."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: str) -> Path:
        options = f"size={size}" if not os.path.ismount(folder) else f"remount,size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("only root can mount a small disk")
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("no disk can be mounted here")
        return folder

    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    wide = small(network=nn.Sequential(nn.Linear(6, 3000), nn.Tanh(), nn.Linear(3000, 3)))
    # A checkpoint takes 280 kB (120 of parameters, 120 of momentum), the first one 160. The third
    # is the last that fits, and leaves 80 kB for what is smaller.
    disk = small_disk("824k")
    with pytest.raises(
        RunError, match=r"rank \d: .*/checkpoints/0000000\d/.*cannot be written.*No space"
    ) as caught:
        quiet(wide, disk / "run")
    assert "free space" in caught.value.hint
    run = Run(str(disk / "run"))
    step = run.checkpoints[-1]
    assert step == 4
    assert finite(run)
    assert not list(Path(run.url).rglob("*.part"))

    small_disk("8m")
    resumed = wide.run(resume=run, progress=False)
    assert resumed.result["resumed_from"] == step
    assert digests(resumed) == digests(quiet(wide, tmp_path / "whole"))


def test_a_disk_that_was_full_from_the_start(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("64k")
    (disk / "filler").write_bytes(bytes(64 << 10))
    with pytest.raises(RunError, match=r"run/job\.yaml cannot be written.*No space"):
        quiet(small(), disk / "run")


# Workers that fail


@pytest.mark.parametrize("length", [10, 1_000_000])
def test_what_a_worker_raises_is_told_with_rank_and_traceback(tmp_path: Path, length: int) -> None:
    def overflow() -> None:
        raise KeyError("y" * length)

    with pytest.raises(WorkerFailed) as caught:
        quiet(small(callbacks=[at_step(3, 1, overflow)]), tmp_path / "run")
    assert caught.value.message.startswith("rank 1 raised KeyError: 'yyy")
    assert "in overflow" in caught.value.message
    assert "--resume" in caught.value.hint
    assert caught.value.exit_code == 1
    assert Run(str(tmp_path / "run")).checkpoints[-1] == 2


def test_the_one_that_raises_is_blamed_and_not_those_who_waited_for_it(tmp_path: Path) -> None:
    def train(worker: Any) -> None:
        network, _ = worker.prepare(nn.Linear(6, 1), functools.partial(torch.optim.SGD, lr=0.1))
        for batch in worker.batches("train", epochs=1, batch_size=8):
            if worker.rank == 1 and worker.global_step == 2:
                worker._group.close()  # the others see at once that it is gone
                time.sleep(0.5)
                raise RuntimeError("the cause")
            worker.step(network(batch.x).mean())

    with pytest.raises(WorkerFailed, match="rank 1 raised RuntimeError: the cause"):
        penstock.launch(
            train,
            workers=3,
            run_dir=str(tmp_path / "run"),
            progress=False,
            train=feed.arrays(np.ones((ROWS, 6), np.float32), np.zeros(ROWS)),
        )


def test_an_error_that_only_follows_from_another_is_told_if_there_is_no_other(
    tmp_path: Path,
) -> None:
    def train(worker: Any) -> None:
        raise TransportError(f"all_gather: rank {1 - worker.rank} did not come")

    with pytest.raises(TransportError, match="rank 0: all_gather: rank 1 did not come"):
        penstock.launch(train, workers=2, run_dir=str(tmp_path / "run"), progress=False)
    assert Run(str(tmp_path / "run")).result["status"] == "failed"


def dies(note: Path, end: Callable[[], Any]) -> Callable[[], None]:
    """Notes the process and the time, then ends."""

    def act() -> None:
        note.write_text(f"{os.getpid()} {time.time()}")
        end()

    return act


ENDS: dict[str, tuple[Callable[[], Any], str]] = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
    "crashed": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by SIGSEGV"),
    "left": (lambda: os._exit(7), "ended with exit code 7"),
    "left as if done": (lambda: os._exit(0), "ended with exit code 0"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_worker_that_dies_while_others_wait_for_it(tmp_path: Path, how: str) -> None:
    end, words = ENDS[how]
    dying = job("allreduce", callbacks=[at_step(9, 1, dies(tmp_path / "note", end))])
    with pytest.raises(WorkerLost) as caught:
        quiet(dying, tmp_path / "run", workers=3)
    told_at = time.time()
    pid, died_at = (tmp_path / "note").read_text().split()
    assert told_at - float(died_at) < 2
    assert f"rank 1 (process {pid} on {socket.gethostname()}) {words}" in caught.value.message
    assert f"--resume {tmp_path / 'run'}" in caught.value.hint
    assert caught.value.exit_code == 3
    assert family(os.getpid()) == [os.getpid(), waiting_server()]  # the others were ended

    run = Run(str(tmp_path / "run"))
    assert run.result["status"] == "failed"
    assert run.checkpoints[-1] == 8
    if how == "killed":
        resumed = job("allreduce").run(workers=2, resume=run, progress=False)
        whole = quiet(job("allreduce"), tmp_path / "whole", workers=1)
        assert digests(resumed) == digests(whole)
        assert losses(resumed) == losses(whole)


def waiting_server() -> int:
    return local._idle[PRELOAD].process.pid


def test_the_last_words_of_a_worker_that_died(tmp_path: Path) -> None:
    def end() -> None:
        print("first line")
        os.write(2, b"terminate called: no newline")
        os._exit(134)

    with pytest.raises(WorkerLost) as caught:
        quiet(small(callbacks=[at_step(1, 1, end)]), tmp_path / "run")
    assert "first line\n    terminate called: no newline" in caught.value.message


def test_the_fork_server_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "note"

    def end() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        note.write_text(f"{os.getpid()} {child.pid}")
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(WorkerLost, match="its fork server, which was killed by SIGKILL"):
        quiet(small(callbacks=[at_step(3, 1, end)]), tmp_path / "run")
    pids = [int(pid) for pid in note.read_text().split()]
    until(lambda: not any(map(alive, pids)), 2, "the worker and its child end")
    resumed = small().run(resume=str(tmp_path / "run"), progress=False)
    assert resumed.result["resumed_from"] == 2
    assert digests(resumed) == digests(quiet(small(), tmp_path / "whole"))


# Drivers that are killed or interrupted

DRIVER = """
from penstock.cluster.local import warm
from penstock.runtime.preload import PRELOAD
warm(PRELOAD)
import sys, time, cloudpickle, test_resume
from penstock.errors import Interrupted
cloudpickle.register_pickle_by_value(test_resume)
what, strategy, folder = sys.argv[1:]

def stepped(worker):
    time.sleep(0.03)
    if what == "stubborn" and worker.global_step == 9:
        open(folder + "/sleeping", "w").close()
        time.sleep(60)

job = test_resume.job(strategy, callbacks=[stepped], epochs=2)
try:
    job.run(workers=2, run_dir=folder, progress=False)
except Interrupted as error:
    print("interrupted:", error)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs that were never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return {s: quiet(job(s), folder / s, workers=1) for s in ("allreduce", "averaging")}


def begun(tmp_path: Path, what: str, strategy: str = "allreduce") -> subprocess.Popen[bytes]:
    """A driver whose run is under way."""
    run = tmp_path / "run"
    process = driver(DRIVER, what, strategy, run, folder=tmp_path)
    sign = run / "sleeping" if what == "stubborn" else run / "checkpoints/00000008/manifest.json"
    until(sign.exists, 60, (tmp_path / "output").read_text())
    return process


def ended(process: subprocess.Popen[bytes], everyone: list[int], seconds: float) -> float:
    """Waits for the workers' end, at most so long, then for all; how long the workers took."""
    workers = everyone[2:]
    took_s = until(lambda: not any(map(alive, workers)), seconds, "the workers end")
    assert process.wait(20) == 130
    until(lambda: not any(map(alive, everyone)), 2, "nothing is left")
    return took_s


@pytest.mark.parametrize("killed", [1, 2], ids=["alone", "with the fork server"])
def test_the_driver_is_killed(tmp_path: Path, killed: int) -> None:
    process = begun(tmp_path, "stubborn")
    everyone = family(process.pid)
    assert len(everyone) == 4  # itself, the fork server, two workers
    for pid in everyone[:killed]:
        os.kill(pid, signal.SIGKILL)
    process.wait(5)
    until(lambda: not any(map(alive, everyone)), 2, "nothing is left")


@pytest.mark.parametrize(
    ("number", "strategy"), [(signal.SIGINT, "averaging"), (signal.SIGTERM, "allreduce")]
)
def test_asked_to_stop(
    tmp_path: Path, whole: dict[str, Run], strategy: str, number: signal.Signals
) -> None:
    process = begun(tmp_path, "willing", strategy)
    everyone = family(process.pid)
    os.killpg(process.pid, number)  # as a terminal does
    ended(process, everyone, 5)
    output = (tmp_path / "output").read_text()
    run = Run(str(tmp_path / "run"))
    step = run.checkpoints[-1]
    assert 8 < step < 26
    assert f"interrupted: stopped with a checkpoint at step {step}" in output
    assert f"--resume {run.url}" in output
    assert run.result["status"] == "interrupted"
    resumed = job(strategy).run(workers=3, resume=run, progress=False)
    assert resumed.result["resumed_from"] == step
    assert digests(resumed) == digests(whole[strategy])
    assert losses(resumed) == losses(whole[strategy])
    assert resumed.result["evaluation"] == whole[strategy].result["evaluation"]


def test_a_worker_that_does_not_heed_the_stop(tmp_path: Path) -> None:
    process = begun(tmp_path, "stubborn")
    everyone = family(process.pid)
    process.send_signal(signal.SIGINT)
    assert ended(process, everyone, 5) > 3  # it was given time to write a checkpoint
    assert Run(str(tmp_path / "run")).checkpoints[-1] == 8


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    process = begun(tmp_path, "stubborn")
    everyone = family(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # else the two are one
    process.send_signal(signal.SIGINT)
    ended(process, everyone, 2)
    assert "checkpoint at step 8" in (tmp_path / "output").read_text()


def test_interrupted_in_this_process(tmp_path: Path) -> None:
    """The handlers are the caller's own again afterwards."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def interrupt_driver() -> None:
        os.kill(int(os.environ["DRIVER"]), signal.SIGINT)

    os.environ["DRIVER"] = str(os.getpid())
    interrupted = small(callbacks=[at_step(3, 0, interrupt_driver)], epochs=500)
    with pytest.raises(KeyboardInterrupt) as caught:
        quiet(interrupted, tmp_path / "run")
    assert isinstance(caught.value, Interrupted)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# More than one run


def test_in_a_thread_that_is_not_the_main_one(tmp_path: Path) -> None:
    found: list[Run | BaseException] = []

    def go() -> None:
        try:
            found.append(quiet(small(), tmp_path / "run"))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    thread.join(60)
    assert isinstance(found[0], Run), found
    assert found[0].result["status"] == "finished"


def test_two_runs_at_once_in_one_process(tmp_path: Path) -> None:
    found: dict[str, Run | BaseException] = {}
    jobs = {  # made here: threads would share the generator that weights are drawn from
        name: small(optimizer=functools.partial(torch.optim.SGD, lr=lr), epochs=4)
        for name, lr in (("a", 0.1), ("b", 0.2))
    }

    def go(name: str) -> None:
        try:
            found[name] = quiet(jobs[name], tmp_path / name)
        except BaseException as error:
            found[name] = error

    threads = [threading.Thread(target=go, args=(name,)) for name in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, asked in jobs.items():
        at_once = found[name]
        assert isinstance(at_once, Run), at_once
        assert digests(at_once) == digests(quiet(asked, tmp_path / f"{name}-alone"))


def test_one_run_after_another_with_a_failure_between(tmp_path: Path) -> None:
    first = quiet(small(), tmp_path / "first")
    server = waiting_server()
    with pytest.raises(PenstockError):
        quiet(small(callbacks=[at_step(2, 0, lambda: os._exit(1))]), tmp_path / "failed")
    second = quiet(small(), tmp_path / "second")
    assert digests(first) == digests(second)
    assert waiting_server() == server  # and it was kept


# What workers print


def test_what_workers_print_is_shown_and_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def speak(worker: Any) -> None:
        if worker.global_step == 1:
            print(f"from step 1 of {worker.rank}")
            os.write(2, b"and from C\n")
            print("no end", end="", flush=True)

    run = small(callbacks=[speak]).run(run_dir=str(tmp_path / "run"))
    captured = capfd.readouterr()
    assert captured.out == ""
    for rank in (0, 1):
        assert f"[rank {rank}] from step 1 of {rank}\n" in captured.err
        logs = sorted(Path(run.url, "logs").glob(f"rank-{rank}.*.log"))
        text = "".join(path.read_text() for path in logs)
        assert text == f"from step 1 of {rank}\nand from C\nno end"
    assert captured.err.count("and from C") == 2

    quiet(small(), tmp_path / "silent")
    assert capfd.readouterr() == ("", "")


def test_logs_of_a_resumed_run_go_on(tmp_path: Path) -> None:
    def speak(worker: Any) -> None:
        print(f"step {worker.global_step}")

    def fail() -> None:
        raise ValueError

    with pytest.raises(WorkerFailed):
        quiet(small(callbacks=[speak, at_step(5, 0, fail)]), tmp_path / "run")
    (tmp_path / "run/logs/.hidden").write_text("of some other program")
    small(callbacks=[speak]).run(resume=str(tmp_path / "run"), progress=False)
    text = "".join(p.read_text() for p in sorted((tmp_path / "run/logs").glob("rank-0.*")))
    first = [f"step {n}" for n in range(1, 6)]
    assert text.splitlines() == first + [f"step {n}" for n in range(5, 13)]
