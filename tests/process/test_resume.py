"""A run that was killed at any moment goes on to the very bits of the run that never stopped."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from test_local import alive, driver, family, until
from torch import nn

from penstock import AllReduce, Averaging, Callback, Job, Run, feed
from penstock.errors import DataError, JobError, RunError

SHARDS = 3
ROWS = 301
STEPS = 26
"""13 steps per epoch (shards of 100 or 101 rows, batches of 8), two epochs."""
STRATEGIES = {"allreduce": AllReduce(), "averaging": Averaging(every=3)}
"""A checkpoint every 4 steps mostly falls between two averagings."""


def job(kind: str, **changes: Any) -> Job:
    """Batch norm has buffers, dropout draws numbers, Adam has state, the schedule counts."""
    numbers = np.random.default_rng(7)
    x = numbers.normal(size=(ROWS, 1, 8, 8)).astype(np.float32)
    y = numbers.integers(0, 5, ROWS)
    torch.manual_seed(11)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(144, 5),
    )
    values: dict[str, Any] = {
        "network": network,
        "loss": "cross_entropy",
        "optimizer": functools.partial(torch.optim.Adam, lr=0.01),
        "schedule": {"cosine_annealing": {"T_max": 40}},
        "train": feed.arrays(x, y),
        "test": feed.arrays(x[:50], y[:50]),
        "batch_size": 8,
        "epochs": 2,
        "shards": SHARDS,
        "threads": 1,
        "seed": 5,
        "strategy": STRATEGIES[kind],
        "checkpoint": {"every": "4 steps", "keep": 100},
    }
    return Job(**(values | changes))


class Trip(Callback):
    """Slows a run so that it can be hit, and stops it for good within a checkpoint's writing.

    Arguments:
        file: while this file of the checkpoint after step `step` is written: half of it is there
            under a name of its own, or, where files appear as they are written, under its name.
    """

    def __init__(self, file: str = "", step: int = 0) -> None:
        self.path = f"{step:08d}/{file}"

    def started(self, worker: Any) -> None:
        from penstock.runtime.store import Store

        whole, path = Store.write, self.path

        def write(store: Store, name: str, data: bytes) -> None:
            if name.endswith(path):
                torn = Path(f"{store.url}/{name}")
                torn.parent.mkdir(parents=True, exist_ok=True)
                torn.write_bytes(data[: len(data) // 2])
                Path(f"{store.url}/tripped").touch()
                time.sleep(60)
            whole(store, name, data)

        Store.write = write  # type: ignore[method-assign]

    def stepped(self, worker: Any) -> None:
        time.sleep(0.005)


DRIVER = """
from penstock.cluster.local import warm
from penstock.runtime.preload import PRELOAD
warm(PRELOAD)  # both processes import torch at once
import sys, cloudpickle, test_resume
from test_resume import Trip, job
cloudpickle.register_pickle_by_value(test_resume)  # workers need not import pytest
strategy, workers, folder, file, step = sys.argv[1:]
trip = Trip(file, int(step)) if file else Trip("-")
job(strategy, callbacks=[trip]).run(workers=int(workers), run_dir=folder, progress=False)
"""

MOMENTS = {
    "before the first step": ("", 0),
    "in a shard's file": ("shard-00001.safetensors", 8),
    "in the network's file": ("network.safetensors", 12),
    "in the manifest's place": ("manifest.json.part", 16),
    "after some checkpoint": ("", 0),
}


def digests(run: Run, step: int | None = None) -> dict[str, str]:
    """Every file of a checkpoint: parameters, buffers, optimizer, random state, cursors, plan."""
    saved = run.checkpoint(step)
    saved.verify()
    files: dict[str, str] = {}
    for path in sorted(Path(run.url, saved.folder).iterdir()):
        if path.name != "manifest.json":
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return files


def losses(run: Run) -> tuple[list[int], list[float]]:
    found = run.scalars("loss")
    return found.steps.tolist(), found.values.tolist()


def same(run: Run, reference: Run) -> None:
    """Asserts that two runs ended in the same bits and tell the same story."""
    assert run.checkpoints[-1] == reference.checkpoints[-1] == STEPS
    assert digests(run) == digests(reference)
    assert run.result["evaluation"] == reference.result["evaluation"]
    assert run.result["loss"] == reference.result["loss"]
    assert losses(run) == losses(reference)
    for tag in ("test/accuracy", "test/loss", "learning_rate"):
        mine, theirs = run.scalars(tag), reference.scalars(tag)
        assert mine.steps.tolist() == theirs.steps.tolist(), tag
        assert mine.values.tolist() == theirs.values.tolist(), tag


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The runs that were never stopped, on one worker, with all their checkpoints."""
    folder = tmp_path_factory.mktemp("references")
    return {
        name: job(name).run(workers=1, run_dir=str(folder / name), progress=False)
        for name in STRATEGIES
    }


@pytest.fixture
def cut(references: dict[str, Run], tmp_path: Path) -> Callable[..., str]:
    """Makes a copy of a reference run as it was when the checkpoint after a step was sealed."""

    def copy(strategy: str, step: int) -> str:
        folder = tmp_path / f"cut-{strategy}-{step}"
        shutil.copytree(references[strategy].url, folder)
        (folder / "result.json").unlink()
        for later in (folder / "checkpoints").iterdir():
            if int(later.name) > step:
                shutil.rmtree(later)
        return str(folder)

    return copy


def test_the_references_tell_of_every_step_once(references: dict[str, Run]) -> None:
    steps, values = losses(references["allreduce"])
    assert steps == list(range(1, STEPS + 1))
    assert len(set(values)) == STEPS
    assert losses(references["averaging"])[0] == list(range(3, STEPS, 3))
    assert digests(references["allreduce"]) != digests(references["averaging"])
    assert references["allreduce"].checkpoints == [0, 4, 8, 12, 16, 20, 24, 26]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_on_other_workers(
    references: dict[str, Run], tmp_path: Path, strategy: str, moment: str
) -> None:
    chance = random.Random(f"{strategy} {moment}")
    before, after = chance.choice([(1, 2), (1, 3), (2, 3), (3, 2), (2, 1)])
    folder = tmp_path / "run"
    file, step = MOMENTS[moment]
    process = driver(DRIVER, strategy, before, folder, file, step, folder=tmp_path)
    checkpoints = folder / "checkpoints"
    if moment == "before the first step":
        hit = folder / "plan.json"
        delay_s = chance.uniform(0, 0.05)
    elif moment == "after some checkpoint":
        hit = checkpoints / f"{chance.choice([4, 8, 12, 16, 20]):08d}" / "manifest.json"
        delay_s = chance.uniform(0, 0.04)
    else:
        hit, delay_s = folder / "tripped", 0.0
        if file.startswith("manifest"):  # all the files are there, and no manifest
            hit = checkpoints / f"{step:08d}" / "state.json"
    try:
        until(hit.exists, 60, f"{hit}; {(tmp_path / 'output').read_text()}")
        time.sleep(delay_s)
    finally:
        everyone = family(process.pid)
        for pid in everyone:
            os.kill(pid, signal.SIGKILL)
    process.wait(5)
    until(lambda: not any(map(alive, everyone)), 5, "all are dead")
    assert not (folder / "result.json").exists()
    if file and not file.startswith("manifest"):
        torn = checkpoints / f"{step:08d}"
        assert (torn / file).exists()
        assert not (torn / "manifest.json").exists()
        assert Run(str(folder)).checkpoints[-1] == step - 4

    resumed = job(strategy).run(workers=after, resume=str(folder), progress=False)
    assert resumed.result["status"] == "finished"
    assert resumed.result["resumed_from"] != STEPS
    same(resumed, references[strategy])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("step", "workers"), [(8, 2), (16, 3)])
def test_killed_twice(
    references: dict[str, Run],
    cut: Callable[..., str],
    strategy: str,
    step: int,
    workers: int,
) -> None:
    """A resumed run can be resumed, and events superseded twice stand once."""
    folder = cut(strategy, step)
    job(strategy).run(workers=workers, resume=folder, progress=False)
    for later in (20, 24, 26):
        shutil.rmtree(f"{folder}/checkpoints/{later:08d}")
    same(job(strategy).run(workers=1, resume=folder, progress=False), references[strategy])


def test_without_superseding_events_would_be_doubled(
    references: dict[str, Run], cut: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cut("allreduce", 12)
    run = job("allreduce").run(workers=1, resume=folder, progress=False)
    assert losses(run) == losses(references["allreduce"])
    from penstock.watch import reader

    def all_of_it(events: Any) -> Any:
        for segment in reversed(events._segments.values()):
            yield segment, None

    monkeypatch.setattr(reader.Events, "_newest_first", all_of_it)
    assert len(losses(run)[0]) == STEPS + (STEPS - 12)


def change(folder: str, step: int, name: str, edit: Callable[[Any], Any]) -> None:
    """Changes a file of a checkpoint, and its manifest so that it fits."""
    path = Path(folder, f"checkpoints/{step:08d}", name)
    if name.endswith(".json"):
        data = json.dumps(edit(json.loads(path.read_text()))).encode()
    else:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        data = safetensors.torch.save(
            edit(safetensors.torch.load(data)), header.get("__metadata__")
        )
    path.write_bytes(data)
    manifest = path.with_name("manifest.json")
    values = json.loads(manifest.read_text())
    for file in values["files"]:
        if file["name"] == name:
            file.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest.write_text(json.dumps(values))


def without(*words: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {
        k: v for k, v in tensors.items() if not any(word in k for word in words)
    }


def other_random(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return tensors | {"random.torch_cpu": generator.get_state()}


def other_buffers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v + 1 if "running_mean" in k else v for k, v in tensors.items()}


def nudged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One bit of one parameter, in the middle of the mantissa: the last one may be rounded off."""
    changed = {k: v.clone() for k, v in tensors.items()}
    key = next(k for k in sorted(changed) if k.endswith("5.bias"))
    changed[key].view(torch.int32)[0] ^= 1 << 12
    return changed


def moved(*path: str, to: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def edit(values: dict[str, Any]) -> dict[str, Any]:
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        assert inner[path[-1]] != to
        inner[path[-1]] = to
        return values

    return edit


SHARD = "shard-00001.safetensors"
TAMPERINGS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "a shard's random state": ("allreduce", SHARD, other_random),
    "a shard's buffers": ("allreduce", SHARD, other_buffers),
    "one bit of a parameter": ("allreduce", "network.safetensors", nudged),
    "no optimizer state": ("allreduce", "optimizer.safetensors", without("optimizer.")),
    "another seed": ("allreduce", "state.json", moved("plan", "seed", to=6)),
    "another place in the epoch": (
        "allreduce",
        "state.json",
        moved("progress", "cursors", "train", "step", to=7),
    ),
    "one bit of a shard's parameter": ("averaging", SHARD, nudged),
    "no optimizer state of a shard": ("averaging", SHARD, without("optimizer.")),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_each_part_of_a_checkpoint_counts(
    references: dict[str, Run], cut: Callable[..., str], what: str
) -> None:
    """The negative control: with any part of it changed, the bits are others."""
    strategy, name, edit = TAMPERINGS[what]
    folder = cut(strategy, 8)
    change(folder, 8, name, lambda values: values)  # writing it anew changes nothing
    change(folder, 8, name, edit)
    run = job(strategy).run(workers=1, resume=folder, progress=False)
    assert (
        digests(run)["network.safetensors"] != digests(references[strategy])["network.safetensors"]
    )


def test_rewritten_as_it_was_a_checkpoint_still_gives_the_same(
    references: dict[str, Run], cut: Callable[..., str]
) -> None:
    """The positive control of the test above."""
    folder = cut("averaging", 8)
    for name in (SHARD, "network.safetensors", "state.json"):
        change(folder, 8, name, lambda values: values)
    same(job("averaging").run(workers=1, resume=folder, progress=False), references["averaging"])


def test_the_schedule_goes_on(references: dict[str, Run], cut: Callable[..., str]) -> None:
    folder = cut("allreduce", 12)
    change(folder, 12, "state.json", moved("schedule", "last_epoch", to=0))
    rates = references["allreduce"].scalars("learning_rate").values
    assert len(set(rates.tolist())) == STEPS
    run = job("allreduce").run(workers=1, resume=folder, progress=False)
    assert run.scalars("learning_rate").values.tolist() != rates.tolist()


@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=5)], ids=STRATEGIES)
def test_early_stopping_remembers(tmp_path: Path, strategy: AllReduce | Averaging) -> None:
    """Stopped at the same step wherever the run was cut, and not a step later when resumed."""
    stopping = job(
        "allreduce",
        strategy=strategy,
        epochs=9,
        evaluate={"every": "4 steps"},
        checkpoint={"every": "2 steps", "keep": 100},
        stop={"metric": "accuracy", "patience": 2, "min_delta": 1.0},
    )
    whole = stopping.run(workers=1, run_dir=str(tmp_path / "whole"), progress=False)
    reason = "accuracy has not improved in 2 evaluations"
    assert (whole.result["status"], whole.result["stopped"]) == ("stopped", reason)
    last = 12  # step 4 is the best, 8 and 12 are no better; not at an averaging
    assert whole.result["step"] == last
    for step in (6, 8, 10, last):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(whole.url, folder)
        for later in (folder / "checkpoints").iterdir():
            if int(later.name) > step:
                shutil.rmtree(later)
        run = stopping.run(workers=2, resume=str(folder), progress=False)
        assert run.result["resumed_from"] == step
        assert (run.result["step"], run.result["stopped"]) == (last, reason)
        assert digests(run) == digests(whole)
        assert run.result["evaluation"] == whole.result["evaluation"]
        tags = (whole.scalars("test/accuracy"), run.scalars("test/accuracy"))
        assert tags[0].steps.tolist() == tags[1].steps.tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_finished_run_makes_no_further_step(
    references: dict[str, Run], cut: Callable[..., str], strategy: str
) -> None:
    folder = cut(strategy, STEPS)
    run = job(strategy).run(workers=3, resume=folder, progress=False)
    assert run.result["resumed_from"] == STEPS
    assert run.result["status"] == "finished"
    same(run, references[strategy])


def test_more_epochs_go_on_where_a_finished_run_ended(
    references: dict[str, Run], tmp_path: Path
) -> None:
    one = job("allreduce", epochs=1).run(workers=2, run_dir=str(tmp_path / "run"), progress=False)
    assert one.result["step"] == STEPS // 2
    two = job("allreduce").run(workers=3, resume=one, progress=False)
    same(two, references["allreduce"])


def test_the_newest_and_the_best_checkpoints_stay(tmp_path: Path) -> None:
    keeping = {
        "checkpoint": {"every": "2 steps", "keep": 2, "best": "accuracy"},
        "evaluate": {"every": "2 steps"},
    }
    whole = job("allreduce", **keeping).run(
        workers=1, run_dir=str(tmp_path / "whole"), progress=False
    )
    scores = whole.scalars("test/accuracy")
    best = int(scores.steps[scores.values.argmax()])  # the first of the highest
    assert best not in (24, 26)  # else the test would show nothing
    assert whole.checkpoints == [best, 24, 26]
    assert whole.checkpoint(best).metric == pytest.approx(scores.values.max())

    one = job("allreduce", epochs=1, **keeping).run(
        workers=2, run_dir=str(tmp_path / "run"), progress=False
    )
    assert len(one.checkpoints) <= 3
    two = job("allreduce", **keeping).run(workers=1, resume=one, progress=False)
    assert two.checkpoints == whole.checkpoints
    assert digests(two, best) == digests(whole, best)
    few = job("allreduce", checkpoint={"every": "2 steps", "keep": 1}).run(
        workers=1, run_dir=str(tmp_path / "few"), progress=False
    )
    assert few.checkpoints == [26]
    assert os.listdir(f"{few.url}/checkpoints") == ["00000026"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(
    references: dict[str, Run], cut: Callable[..., str]
) -> None:
    for name in ("network.safetensors", "state.json", SHARD, "manifest.json"):
        folder = cut("allreduce", 16)
        path = Path(folder, "checkpoints/00000016", name)
        data = bytearray(path.read_bytes())
        if name == "manifest.json":
            del data[len(data) // 2 :]
        else:
            data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(RunError) as caught:
            job("allreduce").run(workers=1, resume=folder, progress=False)
        assert f"checkpoints/00000016/{name}" in caught.value.message
        assert "delete this checkpoint's folder" in caught.value.hint
        shutil.rmtree(path.parent)
        if name == SHARD:
            run = job("allreduce").run(workers=2, resume=folder, progress=False)
            assert run.result["resumed_from"] == 12
            same(run, references["allreduce"])
        shutil.rmtree(folder)


def test_a_folder_without_a_manifest_is_no_checkpoint(
    references: dict[str, Run], cut: Callable[..., str]
) -> None:
    folder = cut("averaging", 16)
    Path(folder, "checkpoints/00000016/manifest.json").unlink()
    Path(folder, "checkpoints/notes.txt").write_text("not a checkpoint either")
    assert Run(folder).checkpoints[-1] == 12
    run = job("averaging").run(workers=1, resume=folder, progress=False)
    assert run.result["resumed_from"] == 12
    same(run, references["averaging"])


def test_resuming_with_other_parts(cut: Callable[..., str]) -> None:
    folder = cut("allreduce", 8)
    before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    fewer = feed.arrays(np.zeros((300, 1, 8, 8), np.float32), np.zeros(300, np.int64))
    with pytest.raises(DataError, match=r"train has changed.* 300 records.* 301 records then"):
        job("allreduce", train=fewer).run(workers=1, resume=folder, progress=False)
    with pytest.raises(JobError, match="a run keeps its strategy"):
        job("averaging").run(workers=1, resume=folder, progress=False)
    with pytest.raises(JobError, match="4 workers for 3 shards"):
        job("allreduce", shards=4).run(workers=4, resume=folder, progress=False)
    with pytest.raises(RunError, match="no run directory"):
        job("allreduce").run(workers=1, resume=f"{folder}/checkpoints", progress=False)
    after = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    assert after == before
    wider = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(RunError, match=r"the network has 1\.weight"):
        job("allreduce", network=wider).run(workers=1, resume=folder, progress=False)


def test_a_new_seed_is_no_new_start(references: dict[str, Run], cut: Callable[..., str]) -> None:
    """What fixes the arithmetic is the run's, whatever the Job that resumes it says."""
    run = job("allreduce", seed=1234).run(workers=1, resume=cut("allreduce", 8), progress=False)
    same(run, references["allreduce"])


def test_a_run_that_never_began(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("# killed before its plan was made\n")
    with pytest.raises(RunError, match="ended before it began"):
        job("allreduce").run(workers=1, resume=str(tmp_path), progress=False)
    run = job("allreduce", epochs=1).run(workers=1, run_dir=str(tmp_path), progress=False)
    assert run.result["status"] == "finished"


def test_a_directory_that_is_a_run_already(cut: Callable[..., str]) -> None:
    folder = cut("allreduce", 8)
    with pytest.raises(RunError, match="is a run already"):
        job("allreduce").run(workers=1, run_dir=folder, progress=False)
    assert Run(folder).checkpoints == [0, 4, 8]
