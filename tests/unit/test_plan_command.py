"""What `penstock plan` says to what cannot be, and what its page and table show."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.cli import main
from penstock.exchange.cost import Link
from penstock.model.capture import capture
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.making import plan_step
from penstock.plan.picture import picture
from penstock.plan.step import Memory, Stages, StepPlan
from penstock.plan.words import in_time
from penstock.testing.networks import ADAMW, tiny

CPU = Device("a CPU", {"float32": 1e11}, 1e10, 2**30, 1e-6)
LINK = Link(1e-5, 1e9)

Said = tuple[int, str, str]
"""Exit code, standard output, standard error."""


@pytest.fixture
def penstock_(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    """The command, in a folder with a job and a cluster of four devices."""
    monkeypatch.chdir(tmp_path)
    Cluster(1, 4, CPU, LINK, LINK).save("cluster.json")
    Path("job.yaml").write_text(
        "network: penstock.zoo:lenet\nloss: cross_entropy\noptimizer: {sgd: {lr: 0.1}}\n"
        "train: {mnist: {split: train}}\nbatch_size: 8\nepochs: 1\n"
    )

    def call(*words: str) -> Said:
        monkeypatch.setattr("sys.argv", ["penstock", "plan", "job.yaml", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "--on: no cluster is given[^|]*penstock doctor --save cluster.json"),
        ("--on none.json", "none.json: No such file[^|]*doctor --save none.json"),
        ("--on .", ".: Is a directory[^|]*name a file that can be read"),
        ("--explain 0.wieght", "no parameter '0.wieght'[^|]*did you mean '0.weight'"),
        ("--explain 7", "no parameter '7'[^|]*for instance 7.weight, 7.bias\n"),
        ("--explain 0.weight --json", "--explain and --json: expected one of them"),
        ("--explain 0.weight --save a.json", "--explain and --save: expected one of them"),
        ("--diff plan.json --json", "--diff and --json: expected one of them"),
        ("--pin 7.weight", "--pin 7.weight: expected NAME=LAYOUT"),
        ("--pin =S0", "--pin =S0: expected NAME=LAYOUT"),
        ("--pin 7.weight=", "--pin 7.weight=: expected NAME=LAYOUT"),
        ("--pin 7.weight=S0 --pin 7.weight=S1", "7.weight is pinned to S0 already"),
        ("--pin 7.weight=S9", r"S9 is not possible: .* has 2 dims, .* no 9[^|]*possible are \[B\]"),
        ("--diff cluster.json", "cluster.json: not a plan: there is no key 'format'"),
        ("--diff job.yaml", "job.yaml is not JSON: [^|]*--save FILE makes one"),
        ("--save no/plan.json", "--save no/plan.json: there is no folder no\n[^|]*mkdir -p no"),
        ("--picture .", "--picture .: it is a folder"),
    ],
)
def test_what_cannot_be_is_said_in_two_lines(
    penstock_: Callable[..., Said], words: str, says: str
) -> None:
    given = words.split()
    code, out, err = penstock_(*given, *([] if "--on" in given or not given else ON))
    assert (code, out) == (2, "")  # nothing was searched for in vain
    assert re.search(says, err), err
    assert re.fullmatch(r"error: .*\n  hint: .*\n", err)


ON = ["--on", "cluster.json"]


def test_a_plan_that_is_alike_is_said_to_be(penstock_: Callable[..., Said]) -> None:
    code, out, _ = penstock_(*ON, "--save", "plan.json")
    assert code == 0
    assert "data parallel" in out
    assert penstock_(*ON, "--diff", "plan.json") == (0, "", "plan.json decides the same\n")
    code, out, err = penstock_(*ON, "--diff", "plan.json", "--set", "batch_size=16")
    assert (code, err) == (0, "")
    assert "batch: 32 -> 64" in out


@pytest.fixture(scope="module")
def alone() -> StepPlan:
    """Of a mesh of one rank."""
    example = tiny("mlp", torch.float32, 32)
    graph = capture(example.network, example.loss, example.batch, ADAMW)
    return plan_step(graph, Cluster(1, 1, CPU, LINK, LINK), network="mlp", batch=32)


def test_the_page_says_nothing_is_split_where_nothing_is(alone: StepPlan) -> None:
    page = picture(alone)
    for word in ("1 host of 1 device ", "whole on the one rank", "Nothing is exchanged."):
        assert word in page
    assert "split by batch" not in page
    timeline = (((0, "forward", 0.0, 1.0), (0, "backward", 1.0, 3.0)), ())
    staged = replace(alone, stages=Stages(2, 1, 1, ("mm",), 0.2, timeline))
    page = picture(staged)
    for word in ("mesh 1 in each stage", "2 stages of 1 chunk,", "Nothing is exchanged inside a",
                 "whole on a rank of its stage", "3 s of a step of "):  # fmt: skip
        assert word in page


def test_what_stays_is_drawn_no_higher_than_all(alone: StepPlan) -> None:
    memory = Memory(1000, 60, 100, 40, (80, 100, 30), ("a",))
    page = picture(replace(alone, memory=memory))
    both = [points.split() for points in re.findall(r'points="([^"]*)"', page)]
    assert len(both) == 2
    heights = [[float(point.split(",")[1]) for point in points] for points in both]
    assert all(stays >= whole for whole, stays in zip(*heights, strict=True))  # y is downwards
    assert heights[1][2] > heights[0][2]  # 60 of 100


def test_times_in_words() -> None:
    assert [in_time(s) for s in (0, 2e-9, 9.996e-4, 1.25e-2, 0.9999, 1234.5)] == [
        "0 us", "0.002 us", "1 ms", "12.5 ms", "1 s", "1,230 s"
    ]  # fmt: skip
