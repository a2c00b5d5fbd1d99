"""Job files: YAML with the line of every key, overrides, paths, and round trips."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

import penstock
from penstock import feed, jobfile
from penstock.errors import JobError
from penstock.job import AllReduce, Averaging, Checkpoint, Evaluate, Interval, Job, Stop
from penstock.model import zoo

LENET = Path(penstock.__file__).with_name("demo") / "lenet.yaml"

SMALL = """\
network: penstock.zoo:lenet
loss: cross_entropy
optimizer: {adagrad: {lr: 0.01}}
train: {mnist: {split: train}}
batch_size: 32
epochs: 5
"""


def write(folder: Path, text: str, name: str = "lenet.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message, with the folder of the file left out."""
    with pytest.raises(JobError) as caught:
        Job.from_yaml(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


# Values


def test_the_demo_is_the_job_of_the_article() -> None:
    made = Job.from_yaml(LENET)
    said = Job(
        network=zoo.lenet,
        loss="cross_entropy",
        optimizer=partial(torch.optim.Adagrad, lr=0.01, weight_decay=5e-4),
        train=feed.mnist(),
        test=feed.mnist(split="test"),
        batch_size=32,
        epochs=5,
        workers=2,
        seed=12345,
        strategy=Averaging(every=5),
    )
    assert made == said
    assert made.to_yaml() == said.to_yaml()
    assert made != said.replace(epochs=6)


def test_the_example_is_the_demo() -> None:
    example = Path(__file__).parents[2] / "examples" / "lenet.yaml"
    assert example.is_symlink()
    assert example.resolve() == LENET.resolve()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-1.5", -1.5),
        ("-.inf", float("-inf")),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("yes", "yes"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
        ("'5e-4'", "5e-4"),
        ("!!str 5", "5"),
        ("True", True),
        ("~", None),
        ("", None),
        ("[1, a, {b: 2.0}]", [1, "a", {"b": 2.0}]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    read = jobfile.read(write(tmp_path, f"key: {text}\n")).values["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value",
    ["5e-4", "null", "", "true", "12", "0x1f", ".5", "a: b", "# c", "yes", 1e-5, None, True],
)
def test_what_is_written_is_read_again(tmp_path: Path, value: Any) -> None:
    text = jobfile.write({"key": value, "list": [value], "map": {"inner": value}})
    read = jobfile.read(write(tmp_path, text)).values
    assert read == {"key": value, "list": [value], "map": {"inner": value}}
    assert type(read["key"]) is type(value)


def test_nan_is_a_number(tmp_path: Path) -> None:
    value = jobfile.read(write(tmp_path, "key: .nan\n")).values["key"]
    assert value != value


# What is wrong with the file


def test_a_wrong_key_is_told_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        SMALL + "workers: 2\n\nstrategy: {averaging: {evry: 5}}\n",
    )
    assert refusal(path) == (
        "lenet.yaml:9: strategy.averaging.evry: unknown key\n"
        "  expected one of: every, average_optimizer_state\n"
        "  hint: did you mean 'every'?"
    )


def test_all_that_is_wrong_is_told_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
loss: cros_entropy
optimizer:
  adagrad:
    lrr: 5e-4
train:
  mnist:
    split: trian
batch_size: x
epochs: 0
epochs: -1
evaluate:
  top_k: [1, 0]
checkpoint:
  every: 20
""",
    )
    message = refusal(path)
    heads = [line for line in message.splitlines() if not line.startswith(" ")]
    assert heads == [
        "lenet.yaml: network: missing",
        "lenet.yaml:1: loss: unknown loss 'cros_entropy'",
        "lenet.yaml:4: optimizer.adagrad.lrr: unknown keyword",
        "lenet.yaml:6: train.mnist: mnist: split 'trian': expected one of: train, test",
        "lenet.yaml:8: batch_size: received 'x' (text)",
        "lenet.yaml:10: epochs: the key is there twice (first in line 9)",
        "lenet.yaml:10: epochs: received -1 (whole number)",
        "lenet.yaml:12: evaluate.top_k.1: received 0 (whole number)",
        "lenet.yaml:14: checkpoint.every: received 20 (whole number)",
    ]
    assert "  hint: did you mean 'cross_entropy'?" in message
    assert "  expected such as '200 steps' or '1 epoch'" in message


def test_a_key_that_is_there_twice_is_refused_even_if_both_are_right(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, SMALL + "epochs: 5\n")) == (
        "lenet.yaml:7: epochs: the key is there twice (first in line 6)\n  hint: remove one"
    )


def test_values_that_contradict_each_other_are_told_with_the_line_of_one(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "workers: 3\nshards: 2\nstop: {metric: loss, patience: 1}\n")
    assert [line for line in refusal(path).splitlines() if not line.startswith(" ")] == [
        "lenet.yaml:8: shards: 2 shards for 3 workers",
        "lenet.yaml:9: stop.metric: 'loss' is measured on test, and there is none",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "epochs: 5\nstrategy:\n\taveraging: {every: 5}\n",
            "lenet.yaml:3: a tab where YAML wants spaces\n"
            "  hint: indent with spaces: tabs are not YAML",
        ),
        (
            "epochs: [5\nbatch_size: 3\n",
            "lenet.yaml:2: not YAML: expected ',' or ']', but got ':' "
            "(while parsing a flow sequence, line 1)\n"
            "  hint: check indentation, quotes and brackets here and in the line above",
        ),
        (
            "epochs: 5\nname: a: b\n",
            "lenet.yaml:2: not YAML: mapping values are not allowed here\n"
            "  hint: check indentation, quotes and brackets here and in the line above",
        ),
        (
            "",
            "lenet.yaml: is empty\n  hint: a Job has at least network, loss, optimizer, train, "
            "batch_size and epochs",
        ),
        (
            "# a comment\n",
            "lenet.yaml: is empty\n  hint: a Job has at least network, loss, optimizer, train, "
            "batch_size and epochs",
        ),
        (
            "epochs=5\n",
            "lenet.yaml:1: received 'epochs=5' (text)\n  expected keys and values\n"
            "  hint: such as `batch_size: 32`, with a space after the colon",
        ),
        (
            "name: !!python/name:os.system\n",
            "lenet.yaml:1: tag 'tag:yaml.org,2002:python/name:os.system' on '' is not read here",
        ),
        ("a: &a\n  b: *a\n", "lenet.yaml:1: an alias stands for what it is part of"),
        ("? [a]\n: 1\n", "lenet.yaml:1: a key is a word, not a list or a mapping"),
    ],
)
def test_what_is_not_a_job_file(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(write(tmp_path, text)) == message


def test_a_missing_file_tells_what_is_beside_it(tmp_path: Path) -> None:
    write(tmp_path, SMALL, "other.yaml")
    with pytest.raises(JobError) as caught:
        Job.from_yaml(tmp_path / "lenet.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/lenet.yaml: no such file\n  hint: {tmp_path} holds other.yaml"
    )


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "lenet.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    assert refusal(path).startswith("lenet.yaml: cannot be read: 'utf-8' codec")


def test_a_null_that_stood_for_something_in_python_is_refused(tmp_path: Path) -> None:
    written = Job.from_yaml(write(tmp_path, SMALL)).replace(network=torch.nn.Linear(2, 2)).to_yaml()
    message = refusal(write(tmp_path, written, "resolved.yaml"))
    assert message.startswith("resolved.yaml:2: network: received nothing (null)")


# Overrides


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "strategy: averaging\nstop: {time: 1 hour}\n")
    made = Job.from_yaml(
        path,
        [
            "batch_size=64",
            "strategy.averaging.every=10",
            "optimizer.AdaGrad.weight_decay=5e-4",
            "network.penstock.zoo:lenet.classes=5",
            "checkpoint.every=20 steps",
            "evaluate={every: 2 epochs}",
            "test=mnist",
            "test.mnist.split=test",
            "stop=null",
        ],
    )
    assert made.batch_size == 64
    assert made.strategy == Averaging(every=10)
    assert made.optimizer.describe() == {"adagrad": {"lr": 0.01, "weight_decay": 5e-4}}
    assert made.network.describe() == {"penstock.zoo:lenet": {"classes": 5}}
    assert made.checkpoint == Checkpoint(every="20 steps")
    assert made.evaluate == Evaluate(every="2 epochs", task="classification")
    assert made.test is not None
    assert made.test.describe() == {"mnist": {"split": "test"}}
    assert made.stop is None


def test_another_name_takes_the_place_of_the_former(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "strategy: {averaging: {every: 3}}\n")
    made = Job.from_yaml(
        path, ["optimizer.sgd.momentum=0.9", "strategy.allreduce.bucket_bytes=4096"]
    )
    assert made.optimizer.describe() == {"sgd": {"momentum": 0.9}}
    assert made.strategy == AllReduce(bucket_bytes=4096)
    assert Job.from_yaml(path, ["network={penstock.zoo:lenet: {classes: 3}}"]).network.keywords == {
        "classes": 3
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "batch_size=x",
            "--set batch_size=x: batch_size: received 'x' (text)\n  expected a whole number",
        ),
        (
            "strategy.averaging.evry=3",
            "--set strategy.averaging.evry=3: strategy.averaging.evry: unknown key\n"
            "  expected one of: every, average_optimizer_state\n"
            "  hint: did you mean 'every'?",
        ),
        (
            "checkpoint={kep: 3}",
            "--set checkpoint={kep: 3}: checkpoint.kep: unknown key\n"
            "  expected one of: every, keep, best\n"
            "  hint: did you mean 'keep'?",
        ),
        ("batch_size", "--set batch_size: expected key=value\n  hint: --set batch_size=64"),
        ("=3", "--set =3: expected key=value\n  hint: --set batch_size=64"),
        (
            "stop=[1",
            "--set stop=[1: not YAML: expected ',' or ']', but got '<stream end>' "
            "(while parsing a flow sequence, line 1)\n"
            "  hint: check indentation, quotes and brackets here and in the line above",
        ),
        (
            "stop={time: 1, time: 2}",
            "--set stop={time: 1, time: 2}: stop.time: the key is there twice\n  hint: remove one",
        ),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(write(tmp_path, SMALL), override) == message


def test_an_override_mends_what_is_wrong_in_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "strategy: {averaging: {evry: 5}}\n")
    assert "lenet.yaml:7: strategy.averaging.evry" in refusal(path)
    assert Job.from_yaml(path, ["strategy=averaging"]).strategy == Averaging()


# Paths and names


def test_paths_of_sources_start_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = write(
        tmp_path / "jobs",
        SMALL.replace("{split: train}", "{path: ../digits}")
        + "test: {npz: {path: 's3://bucket/test.npz'}}\nruns: my_runs\n",
    )
    made = Job.from_yaml(path)
    assert made.test is not None
    assert made.train.describe() == {"mnist": {"path": f"{tmp_path}/digits", "split": "train"}}
    assert made.test.describe() == {"npz": {"path": "s3://bucket/test.npz", "x": "x", "y": "y"}}
    assert made.runs == "my_runs"

    made = Job.from_yaml(path, ["train.mnist.path=data", "test={npz: {path: /abs/test.npz}}"])
    assert made.test is not None
    assert made.train.describe() == {"mnist": {"path": f"{tmp_path}/here/data", "split": "train"}}
    assert made.test.describe() == {"npz": {"path": "/abs/test.npz", "x": "x", "y": "y"}}


def test_names_are_looked_up_beside_the_file_and_again_in_a_worker(tmp_path: Path) -> None:
    (tmp_path / "beside_layers.py").write_text("from torch import nn\nlayer = nn.Linear\n")
    (tmp_path / "beside_net.py").write_text(
        "import beside_layers\n"
        "def net(width, depth=2):\n    return beside_layers.layer(width, depth)\n"
    )
    text = SMALL.replace("penstock.zoo:lenet", "{beside_net:net: {width: 3}}")
    before = sys.path[:]
    made = Job.from_yaml(write(tmp_path, text))
    assert sys.path == before
    assert made.name == "net"
    assert made.network.describe() == {"beside_net:net": {"width": 3}}
    assert repr(made.network.make()) == "Linear(in_features=3, out_features=2, bias=True)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, cloudpickle; print(cloudpickle.load(sys.stdin.buffer).network.make())",
        ],
        input=cloudpickle.dumps(made),
        capture_output=True,
        timeout=60,
        check=True,
        cwd="/",
    )
    assert done.stdout.decode().strip() == "Linear(in_features=3, out_features=2, bias=True)"


def test_two_modules_of_one_name_are_not_taken_for_one_another(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, SMALL.replace("penstock.zoo:lenet", "same_name_net:net"))
        (tmp_path / folder / "same_name_net.py").write_text(
            "from torch.nn import Identity as net\n"
        )
    Job.from_yaml(tmp_path / "one" / "lenet.yaml")
    assert refusal(tmp_path / "two" / "lenet.yaml") == (
        f"lenet.yaml:1: network: module 'same_name_net' was loaded from "
        f"{tmp_path}/one/same_name_net.py and is not same_name_net.py\n"
        "  hint: rename one of them, or start a new process"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import nowhere_to_be_found\n",
            "lenet.yaml:1: network: importing {name} failed: "
            "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        (
            "def net(:\n",
            "lenet.yaml:1: network: importing {name} failed: "
            "SyntaxError: invalid syntax ({name}.py, line 1)",
        ),
        ("other = 1\n", "lenet.yaml:1: network: module '{name}' has no 'net'"),
        (
            "net = 1\n",
            "lenet.yaml:1: network: received 1 (whole number)\n"
            "  expected a torch.nn.Module or what makes one",
        ),
    ],
)
def test_modules_that_do_not_work(tmp_path: Path, source: str, message: str) -> None:
    name = f"broken_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    path = write(tmp_path, SMALL.replace("penstock.zoo:lenet", f"{name}:net"))
    assert refusal(path) == message.format(name=name)


def test_a_module_that_is_not_there_tells_where_it_was_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("penstock.zoo:lenet", "missing_nets:net"))
    with pytest.raises(JobError) as caught:
        Job.from_yaml(path)
    assert str(caught.value) == (
        f"{path}:1: network: there is no module 'missing_nets'\n"
        f"  hint: looked in {tmp_path}, {Path.cwd()} and the installed packages"
    )


# Round trips


@pytest.mark.parametrize(
    "more",
    [
        "",
        "strategy: {averaging: {every: 3, average_optimizer_state: false}}\n",
        "stop: {metric: loss, patience: 2, time: 90 minutes}\ntest: mnist\n",
        "clip: {norm: 1}\nprecision: bf16\naccumulate: 2\nthreads: 1\nname: '5e3'\n",
        "schedule: {CosineAnnealingLR: {T_max: 10, eta_min: 1e-5}}\nschedule_every: epoch\n",
        "checkpoint: {every: 200 steps, keep: 1, best: accuracy}\ntest: {mnist: {split: test}}\n",
        "callbacks: ['collections:Counter']\nworkers: 2\nshards: 4\nruns: memory://runs\n",
        "train: {npz: {path: digits.npz}}\n",
        "train: {parquet: {url: a, features: [u, v], target: y, on_bad_record: skip}}\n",
        "train: {parquet: {url: a, features: {column: p, height: 8, width: 9}, target: y}}\n",
        "train: {arrow: {url: 's3://b/a', features: x, target: y}}\n",
        "train: {csv: {url: a, features: x, target: y, delimiter: ;, header: false}}\n",
        "train: {jsonl: {url: a, features: x, target: y, on_bad_record: quarantine}}\n",
        "train: {images: {url: a, height: 8, width: 9, channels: 1, on_bad_record: skip}}\n",
        "train: {text: {url: 'a/*.txt', length: 32, stride: 16}}\n",
    ],
)
def test_resolved_yaml_is_read_as_the_same_job(tmp_path: Path, more: str) -> None:
    start = SMALL.replace("train: {mnist: {split: train}}\n", "") if "train:" in more else SMALL
    made = Job.from_yaml(write(tmp_path, start + more))
    (tmp_path / "runs").mkdir()
    again = Job.from_yaml(write(tmp_path / "runs", made.to_yaml(), "job.yaml"))
    assert again.to_yaml() == made.to_yaml()
    assert again == made
    assert set(jobfile.read(tmp_path / "runs" / "job.yaml").values) == set(Job.model_fields)


def test_keys_of_file_sources_are_checked(tmp_path: Path) -> None:
    def refused(source: str) -> str:
        return refusal(write(tmp_path, SMALL.replace("{mnist: {split: train}}", source)))

    assert refused("{csv: {url: a, features: x, target: y, delimeter: ;}}").startswith(
        "lenet.yaml:4: train.csv.delimeter: unknown key"
    )
    assert "did you mean 'skip'" in refused(
        "{jsonl: {url: a, features: x, target: y, on_bad_record: skp}}"
    )
    assert "did you mean 'height'" in refused(
        "{parquet: {url: a, features: {column: p, heigth: 8, width: 9}, target: y}}"
    )


def test_resolved_yaml_fills_in_what_follows_other_values(tmp_path: Path) -> None:
    made = Job.from_yaml(write(tmp_path, SMALL + "workers: 3\n"))
    values = jobfile.read(write(tmp_path, made.to_yaml(), "job.yaml")).values
    assert next(iter(values)) == "name"
    assert (values["name"], values["shards"]) == ("lenet", 3)
    assert values["evaluate"]["task"] == "classification"
    assert values["strategy"] == {"allreduce": {"bucket_bytes": 4194304, "into_forward": None}}


def test_python_and_yaml_give_one_job(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        SMALL + "schedule: {step: {step_size: 7}}\nstop: {metric: accuracy, patience: 2}\n"
        "test: {mnist: {split: test}}\nevaluate: {every: 10 steps, top_k: [1, 5]}\n",
    )
    said = Job(
        network=zoo.lenet,
        loss=torch.nn.functional.cross_entropy,
        optimizer=partial(torch.optim.Adagrad, lr=0.01),
        schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=7),
        train=feed.mnist(split="train"),
        test=feed.mnist(split="test"),
        batch_size=32,
        epochs=5,
        stop=Stop(metric="accuracy", patience=2),
        evaluate=Evaluate(every=Interval(10, "step"), top_k=(1, 5)),
    )
    assert Job.from_yaml(path) == said
    assert Job.from_yaml(path).to_yaml() == said.to_yaml()
    assert Job.from_yaml(path, ["schedule.step.step_size=8"]) != said
