"""Training on GPUs; skipped where there is none."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock import AllReduce, Averaging, Checkpoint, Job, feed, zoo
from penstock.testing import assert_same_bits, parameters_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def job(folder: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "network": zoo.lenet,
        "loss": "cross_entropy",
        "optimizer": partial(torch.optim.Adagrad, lr=0.01),
        "train": feed.mnist(split="test"),
        "test": feed.mnist(split="test"),
        "batch_size": 50,
        "epochs": 2,
        "shards": 2,
        "device": "cuda",
        "checkpoint": Checkpoint(every="7 steps", keep=99),
        "runs": str(folder),
    }
    return Job(**values | changes)


@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=5)])
def test_resumed_on_one_gpu(tmp_path: Path, strategy: Any) -> None:
    whole = job(tmp_path, strategy=strategy).run(progress=False)
    assert whole.evaluation is not None
    assert whole.evaluation.accuracy > 0.7
    expected = parameters_of(whole)
    for step in whole.checkpoints:
        if step > 14:
            shutil.rmtree(f"{whole.url}/checkpoints/{step:08d}")
    again = job(tmp_path, strategy=strategy).run(resume=whole, progress=False)
    assert again.result["resumed_from"] == 14
    assert_same_bits(parameters_of(again), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("strategy", [AllReduce(), Averaging(every=5)])
def test_same_bits_on_one_and_two_gpus(tmp_path: Path, strategy: Any) -> None:
    runs = [
        job(tmp_path, strategy=strategy, workers=n).run(progress=False, run_dir=f"{tmp_path}/{n}")
        for n in (1, 2)
    ]
    assert_same_bits(parameters_of(runs[0]), parameters_of(runs[1]))
