"""A Job given in Python: what it takes, fills in, refuses, and says of itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from penstock import feed
from penstock.errors import JobError, NetworkError
from penstock.job import (
    AllReduce,
    Averaging,
    Checkpoint,
    Clip,
    Evaluate,
    Events,
    Interval,
    Job,
    Stop,
    direction,
)
from penstock.model import zoo
from penstock.spec import LOSS, OPTIMIZER, SCHEDULE, Maker


class Net(nn.Module):
    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(width, depth)


def half_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 0.5 * functional.mse_loss(output, target)


def only_output(output: torch.Tensor) -> torch.Tensor:
    return output.mean()


def not_a_network() -> int:
    return 3


class Watcher:
    def __init__(self, limit: int = 1) -> None:
        self.limit = limit


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {
        "network": zoo.lenet,
        "loss": "cross_entropy",
        "optimizer": "adagrad",
        "train": feed.mnist(),
        "batch_size": 32,
        "epochs": 5,
    }
    return Job(**{**values, **changes})


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(JobError) as caught:
        make()
    return str(caught.value)


# Filled in


def test_defaults() -> None:
    made = job()
    assert made.name == "lenet"
    assert (made.workers, made.shards, made.threads, made.seed) == (1, 1, None, 0)
    assert made.strategy == AllReduce(bucket_bytes=4 * 2**20)
    assert made.checkpoint == Checkpoint(every="1 epoch", keep=3, best=None)
    assert made.evaluate == Evaluate(every="1 epoch", task="classification", top_k=[1])
    assert made.events == Events(scalars_every=1, histograms_every=0)
    assert (made.stop, made.clip, made.schedule, made.test, made.callbacks) == (None,) * 4 + ((),)
    assert (made.accumulate, made.precision, made.device, made.runs) == (
        1,
        "float32",
        "auto",
        "runs",
    )
    assert made.schedule_every == "step"


def test_defaults_that_follow_other_values() -> None:
    assert job(workers=3).shards == 3
    assert job(workers=3, shards=6).shards == 6
    assert job(network=nn.Linear(2, 2)).name == "linear"
    assert job(network=partial(Net, 3)).name == "net"
    assert job(network=lambda: nn.Linear(2, 2)).name == "job"
    assert job(name="mine").name == "mine"
    assert job(loss="mse").evaluate.task == "regression"
    assert job(loss=nn.MSELoss()).evaluate.task == "regression"
    assert job(loss=nn.CrossEntropyLoss).evaluate.task == "classification"
    assert job(loss=half_loss).evaluate.task is None
    assert job(loss=half_loss, evaluate={"task": "regression"}).evaluate.task == "regression"
    assert Stop(metric="validation_loss", patience=1).mode == "min"
    assert Stop(metric="accuracy", patience=1).mode == "max"
    assert Stop(metric="accuracy", patience=1, mode="min").mode == "min"
    assert (direction("rmse"), direction("f1")) == ("min", "max")


@pytest.mark.parametrize(
    ("time", "time_s"),
    [("30 minutes", 1800.0), ("2 hours", 7200.0), ("90 s", 90.0), ("1.5h", 5400.0), (45, 45.0)],
)
def test_time(time: object, time_s: float) -> None:
    assert Stop(time=time).time_s == time_s


def test_interval() -> None:
    assert Interval.of("200 steps") == Interval(200, "step")
    assert Interval.of("1 epoch") == Interval(1, "epoch")
    assert [str(Interval(2, "epoch")), str(Interval(1, "step"))] == ["2 epochs", "1 step"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("allreduce", AllReduce()),
        ("all_reduce", AllReduce()),
        ("AllReduce", AllReduce()),
        ({"all_reduce": {"bucket_bytes": 4096}}, AllReduce(bucket_bytes=4096)),
        ("averaging", Averaging()),
        ({"averaging": {"every": 7}}, Averaging(every=7)),
        (Averaging(every=7), Averaging(every=7)),
    ],
)
def test_strategy(said: object, expected: object) -> None:
    assert job(strategy=said).strategy == expected


def test_bf16_is_bfloat16() -> None:
    assert job(precision="bf16").precision == "bfloat16"


# What makes things


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("adagrad", torch.optim.Adagrad),
        ("AdaGrad", torch.optim.Adagrad),
        ("AdamW", torch.optim.AdamW),
        ("adam_w", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("torch.optim:RAdam", torch.optim.RAdam),
    ],
)
def test_optimizer_by_name(said: str, expected: type) -> None:
    made = Maker.of(said, OPTIMIZER).make([nn.Parameter(torch.zeros(1))])
    assert type(made) is expected


@pytest.mark.parametrize(
    "said",
    [
        {"adagrad": {"lr": 0.5, "eps": 1e-3}},
        {"torch.optim:Adagrad": {"lr": 0.5, "eps": 1e-3}},
        partial(torch.optim.Adagrad, lr=0.5, eps=1e-3),
    ],
)
def test_optimizer_with_keywords_in_each_way(said: object) -> None:
    maker = Maker.of(said, OPTIMIZER)
    assert maker.describe() == {"adagrad": {"lr": 0.5, "eps": 1e-3}}
    assert maker == Maker.of({"adagrad": {"eps": 1e-3, "lr": 0.5}}, OPTIMIZER)
    assert maker != Maker.of({"adagrad": {"lr": 0.25, "eps": 1e-3}}, OPTIMIZER)
    group = maker.make([nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], group["eps"]) == (0.5, 1e-3)


@pytest.mark.parametrize(
    ("said", "short"),
    [
        ({"CosineAnnealingLR": {"T_max": 3}}, "cosine_annealing"),
        ({"cosine_annealing": {"T_max": 3}}, "cosine_annealing"),
        ({"step": {"step_size": 3}}, "step"),
        (partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=4), "one_cycle"),
    ],
)
def test_schedule(said: object, short: str) -> None:
    maker = Maker.of(said, SCHEDULE)
    described = maker.describe()
    assert isinstance(described, dict)
    assert list(described) == [short]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert isinstance(maker.make(optimizer), lr_scheduler.LRScheduler)


@pytest.mark.parametrize(
    ("said", "described"),
    [
        ("cross_entropy", "cross_entropy"),
        ("torch.nn.functional:cross_entropy", "cross_entropy"),
        (functional.cross_entropy, "cross_entropy"),
        ({"cross_entropy": {"label_smoothing": 0.0}}, {"cross_entropy": {"label_smoothing": 0.0}}),
        ("torch.nn:CrossEntropyLoss", "torch.nn.modules.loss:CrossEntropyLoss"),
        (nn.CrossEntropyLoss, "torch.nn.modules.loss:CrossEntropyLoss"),
        (nn.CrossEntropyLoss(), None),
        (lambda output, target: functional.cross_entropy(output, target), None),
        (
            partial(functional.cross_entropy, ignore_index=-1),
            {"cross_entropy": {"ignore_index": -1}},
        ),
    ],
)
def test_loss_in_each_way_is_the_function_to_call(said: object, described: object) -> None:
    maker = Maker.of(said, LOSS)
    assert maker.describe() == described
    output, target = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([0, 1])
    assert maker.make()(output, target) == functional.cross_entropy(output, target)


def test_callbacks_are_made_of_classes_and_else_taken_as_they_are() -> None:
    watcher = Watcher()
    said = job(callbacks=[watcher, Watcher, partial(Watcher, limit=3), half_loss]).callbacks
    made = [maker.make() for maker in said]
    assert made[0] is watcher
    assert [made[1].limit, made[2].limit] == [1, 3]
    assert made[3] is half_loss


def test_a_source_is_taken_as_it_is() -> None:
    source = feed.arrays(np.zeros((4, 2)), np.zeros(4))
    assert job(train=source).train.make() is source


def test_making_names_what_was_made_and_why_it_failed() -> None:
    optimizer = Maker.of({"adagrad": {"lr": -1}}, OPTIMIZER)
    with pytest.raises(NetworkError) as caught:
        optimizer.make([nn.Parameter(torch.zeros(1))])
    assert str(caught.value) == (
        "optimizer: adagrad(lr=-1) could not be made: ValueError: Invalid learning rate: -1"
    )
    with pytest.raises(NetworkError) as caught:
        job(network=not_a_network).network.make()
    assert str(caught.value) == (
        f"network: function {__name__}.not_a_network gave an instance of builtins.int, "
        "expected a torch.nn.Module or what makes one"
    )


# Refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: job(strategy={"averaging": {"evry": 5}}),
            "strategy.averaging.evry: unknown key\n"
            "  expected one of: every, average_optimizer_state\n"
            "  hint: did you mean 'every'?",
        ),
        (
            lambda: Averaging(evry=5),
            "strategy.averaging.evry: unknown key\n"
            "  expected one of: every, average_optimizer_state\n"
            "  hint: did you mean 'every'?",
        ),
        (
            lambda: job(strategy="averagin"),
            "strategy: unknown strategy 'averagin'\n"
            "  expected one of: allreduce, averaging\n"
            "  hint: did you mean 'averaging'?",
        ),
        (
            lambda: job(strategy={"every": 5}),
            "strategy: unknown strategy 'every'\n"
            "  expected one of: allreduce, averaging\n"
            "  hint: say strategy: {averaging: {every: ...}}",
        ),
        (
            lambda: job(batch_size="32"),
            "batch_size: received '32' (text)\n  expected a whole number",
        ),
        (
            lambda: job(epochs=True),
            "epochs: received True (true or false)\n  expected a whole number",
        ),
        (lambda: job(epochs=0), "epochs: received 0 (whole number)\n  expected at least 1"),
        (
            lambda: job(checkpoint={"every": 200}),
            "checkpoint.every: received 200 (whole number)\n"
            "  expected such as '200 steps' or '1 epoch'",
        ),
        (
            lambda: Stop(time="2 fortnights"),
            "stop.time: received '2 fortnights' (text)\n"
            "  expected such as '90 s', '30 minutes' or '2 hours'",
        ),
        (
            lambda: job(precision="float16"),
            "precision: received 'float16' (text)\n"
            "  expected one of: float32, bfloat16\n"
            "  hint: did you mean 'bfloat16'?",
        ),
        (
            lambda: job(device="gpu"),
            "device: received 'gpu' (text)\n"
            "  expected one of: auto, cpu, cuda\n"
            "  hint: did you mean 'cuda'?",
        ),
        (
            lambda: job(name="a/b"),
            "name: received 'a/b' (text)\n  expected letters, digits and . _ -: it names a folder",
        ),
        (
            lambda: job(clip=0.5),
            "clip: received 0.5 (number)\n  expected a mapping with keys of: norm, value",
        ),
        (lambda: Clip(), "clip: has neither norm nor value\n  expected exactly one of them"),
        (
            lambda: Clip(norm=1, value=1),
            "clip: has both norm and value\n  expected exactly one of them",
        ),
        (
            lambda: Stop(min_delta=0.1),
            "stop: says neither what nor when\n  expected metric with patience, or time",
        ),
        (
            lambda: Stop(metric="accuracy"),
            "stop.metric: is given without patience\n  expected patience as well",
        ),
        (
            lambda: job(workers=4, shards=2),
            "shards: 2 shards for 4 workers\n"
            "  expected 4 or more\n"
            "  hint: a worker carries one shard or more: raise shards or lower workers",
        ),
        (
            lambda: job(stop=Stop(metric="accuracy", patience=2)),
            "stop.metric: 'accuracy' is measured on test, and there is none\n"
            "  hint: add test: what to evaluate on",
        ),
        (
            lambda: job(checkpoint=Checkpoint(best="loss")),
            "checkpoint.best: 'loss' is measured on test, and there is none\n"
            "  hint: add test: what to evaluate on",
        ),
        (
            lambda: job(loss={"mse": {"reduction": "sum"}}),
            "loss.mse.reduction: received 'sum' (text)\n"
            "  expected mean\n"
            "  hint: shards are weighed by their examples, which needs the mean over them",
        ),
        (
            lambda: job(loss="mse", evaluate=Evaluate(top_k=(1, 5))),
            "evaluate.top_k: is for classification, not regression",
        ),
    ],
)
def test_refused(make: Callable[[], object], message: str) -> None:
    assert refusal(make) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: job(optimizer="LBFGS"),
            "optimizer: LBFGS evaluates the loss several times within a step (needs a closure)\n"
            "  hint: use adam, adagrad, sgd or another that steps once from the gradient",
        ),
        (
            lambda: job(schedule=lr_scheduler.ReduceLROnPlateau),
            "schedule: ReduceLROnPlateau needs a metric at every step\n"
            "  hint: use a schedule of the step alone, such as cosine_annealing, "
            "and stop: {metric: ...}",
        ),
        (
            lambda: job(optimizer=partial(torch.optim.Rprop, lrr=0.1)),
            "optimizer.rprop.lrr: unknown keyword\n"
            "  expected one of: lr, etas, step_sizes, capturable, foreach, maximize, "
            "differentiable\n"
            "  hint: did you mean 'lr'?",
        ),
        (
            lambda: job(optimizer={"rprop": {"params": []}}),
            "optimizer.rprop.params: unknown keyword\n"
            "  expected one of: lr, etas, step_sizes, capturable, foreach, maximize, "
            "differentiable",
        ),
        (
            lambda: job(schedule="cosine_annealing"),
            "schedule.cosine_annealing.T_max: missing\n"
            "  hint: say {cosine_annealing: {T_max: ...}}",
        ),
        (
            lambda: job(network=Net),
            "network.net.width: missing\n  hint: say functools.partial(Net, width=...)",
        ),
        (
            lambda: job(network=zoo.lenet, optimizer=torch.optim.SGD([torch.zeros(1)])),
            "optimizer: received an instance of torch.optim.sgd.SGD\n"
            "  expected what makes a torch.optim.Optimizer from parameters\n"
            "  hint: give a class, or functools.partial(..., lr=...): "
            "the job makes its own optimizer",
        ),
        (
            lambda: job(network=Watcher),
            f"network: received class {__name__}.Watcher\n"
            "  expected a torch.nn.Module or what makes one\n"
            "  hint: a network is a subclass of torch.nn.Module",
        ),
        (
            lambda: job(network="lenet"),
            "network: received 'lenet' (text)\n  expected package.module:name",
        ),
        (
            lambda: job(network="penstock.zoo.lenet"),
            "network: received 'penstock.zoo.lenet' (text)\n"
            "  expected package.module:name\n"
            "  hint: did you mean 'penstock.zoo:lenet'?",
        ),
        (
            lambda: job(network={"penstock.zoo:lenet": {"clases": 5}}),
            "network.penstock.zoo:lenet.clases: unknown keyword\n"
            "  expected one of: classes\n"
            "  hint: did you mean 'classes'?",
        ),
        (
            lambda: job(network="torch.nn:Linnear"),
            "network: module 'torch.nn' has no 'Linnear'\n  hint: did you mean 'Linear'?",
        ),
        (
            lambda: job(loss=only_output),
            f"loss: function {__name__}.only_output takes 1 arguments by position\n"
            "  expected 2: input, target",
        ),
        (
            lambda: job(loss=3),
            "loss: received 3 (whole number)\n  expected a callable (output, target) -> scalar",
        ),
        (
            lambda: job(optimizer={"adagrad": 0.1}),
            "optimizer.adagrad: received 0.1 (number)\n  expected keywords and their values",
        ),
        (
            lambda: job(optimizer={"adagrad": {}, "lr": 0.1}),
            "optimizer: received {'adagrad': {}, 'lr': 0.1} (mapping)\n"
            "  expected one key, the name of the optimizer, with its keywords",
        ),
        (
            lambda: job(train=(np.zeros(3), np.zeros(3))),
            "train: received (array([0., 0., 0.]), array([0., 0., 0.])) (tuple)\n"
            "  expected a Source or what makes one\n"
            "  hint: feed.arrays(x, y) makes a Source of numpy arrays or tensors",
        ),
        (
            lambda: job(train=TensorDataset(torch.zeros(2))),
            "train: received an instance of torch.utils.data.dataset.TensorDataset\n"
            "  expected a Source or what makes one\n"
            "  hint: feed.dataset(...) makes a Source of a torch Dataset",
        ),
        (
            lambda: job(test=DataLoader(TensorDataset(torch.zeros(2)))),
            "test: received an instance of torch.utils.data.dataloader.DataLoader\n"
            "  expected a Source or what makes one\n"
            "  hint: feed.dataset(loader.dataset): the job makes its own batches",
        ),
        (
            lambda: job(train={"mnist": {"split": "trian"}}),
            "train.mnist: mnist: split 'trian': expected one of: train, test\n"
            "  hint: did you mean 'train'?",
        ),
    ],
)
def test_refused_makers(make: Callable[[], object], message: str) -> None:
    assert refusal(make) == message


def test_unknown_names_list_what_there_is_without_what_is_refused() -> None:
    message = refusal(lambda: job(optimizer="adagrda"))
    assert message.startswith(
        "optimizer: unknown optimizer 'adagrda'\n  expected one of: adadelta,"
    )
    assert message.endswith(", or package.module:name\n  hint: did you mean 'adagrad'?")
    assert "lbfgs" not in message


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(JobError) as caught:
        Job(loss="mse", optimizer="sgd", train=feed.mnist(), batch_size=0, epochs=1, clips=3)
    assert [line for line in str(caught.value).splitlines() if not line.startswith(" ")] == [
        "network: missing",
        "batch_size: received 0 (whole number)",
        "clips: unknown key",
    ]
    assert "  hint: did you mean 'clip'?" in str(caught.value)


def test_a_job_is_immutable() -> None:
    made = job()
    assert refusal(lambda: setattr(made, "epochs", 3)) == (
        "epochs: Job cannot be changed\n  hint: job.replace(epochs=...) gives another Job"
    )
    assert refusal(lambda: setattr(made.checkpoint, "keep", 9)).startswith("checkpoint.keep: ")
    assert (made.epochs, made.checkpoint.keep) == (5, 3)


# Replaced, written, sent


def test_replace_checks_again_and_defaults_follow() -> None:
    made = job(workers=2, evaluate=Evaluate(batch_size=8))
    other = made.replace(workers=3, loss="mse", network=partial(Net, width=2))
    assert (other.workers, other.shards, other.name) == (3, 3, "net")
    assert other.evaluate == Evaluate(task="regression", batch_size=8)
    assert (made.workers, made.shards, made.evaluate.task) == (2, 2, "classification")
    assert other.optimizer == made.optimizer
    assert job(shards=2).replace(workers=2).shards == 2
    assert refusal(lambda: job(shards=2).replace(workers=3)).startswith("shards: 2 shards for 3")
    assert refusal(lambda: made.replace(epoch=3)).startswith("epoch: unknown key")


def test_what_yaml_cannot_say_is_null_and_tells_what_it_was() -> None:
    text = job(
        network=nn.Linear(2, 2),
        loss=lambda output, target: output.mean(),
        train=feed.arrays(np.zeros((2, 2)), np.zeros(2)),
        callbacks=[Watcher(), half_loss],
    ).to_yaml()
    lines = text.splitlines()
    assert (
        "network: null  # given in Python: an instance of torch.nn.modules.linear.Linear" in lines
    )
    assert any(line.startswith("loss: null  # given in Python: function ") for line in lines)
    assert (
        "train: null  # given in Python: an instance of penstock.feed.arrays.ArraySource" in lines
    )
    start = lines.index("callbacks:")
    assert lines[start + 1 : start + 3] == [
        f"- null  # given in Python: an instance of {__name__}.Watcher",
        f"- {__name__}:half_loss",
    ]


def test_cloudpickle_round_trip() -> None:
    made = job(
        network=partial(zoo.lenet, classes=7),
        test=feed.mnist(split="test"),
        strategy=Averaging(every=3),
        clip=Clip(norm=1.0),
        stop=Stop(time="1 hour"),
        callbacks=[Watcher],
    )
    again = cloudpickle.loads(cloudpickle.dumps(made))
    assert again == made
    assert again != made.replace(epochs=6)
    assert again.to_yaml() == made.to_yaml()
    assert again.replace(workers=2).shards == 2


def test_a_lambda_reaches_another_process() -> None:
    made = job(network=lambda: nn.Linear(3, 4), loss=lambda output, target: output.mean())
    program = (
        "import sys, cloudpickle; job = cloudpickle.load(sys.stdin.buffer); "
        "print(job.network.make(), job.loss.make().__name__, job.train.describe())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=cloudpickle.dumps(made),
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.decode().strip() == (
        "Linear(in_features=3, out_features=4, bias=True) <lambda> {'mnist': {'split': 'train'}}"
    )


def test_runs_takes_a_path() -> None:
    assert job(runs=Path("a") / "b").runs == "a/b"
