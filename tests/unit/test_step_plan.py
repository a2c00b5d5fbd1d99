"""Plans as files, in words and as a picture; and what is planned when memory is short."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import penstock
from penstock import feed
from penstock.cli import main
from penstock.cli.plan import show
from penstock.errors import JobError, NetworkError, UserError
from penstock.exchange.cost import Link
from penstock.job import Averaging, Clip, Job
from penstock.model import zoo
from penstock.model.capture import capture
from penstock.model.graph import Graph
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, S
from penstock.plan.making import plan_pipeline, plan_step
from penstock.plan.memory.footprint import footprint
from penstock.plan.memory.liveness import Lifetimes
from penstock.plan.picture import picture
from penstock.plan.pipelines.schedule import interleaved
from penstock.plan.pipelines.staged import staged
from penstock.plan.pipelines.stages import Stages as Cut
from penstock.plan.programs.lower import lower
from penstock.plan.rules.signatures import Signature
from penstock.plan.step import (
    Stages,
    StepPlan,
    combination_in_words,
    read_combination,
)
from penstock.plan.words import in_time
from penstock.testing.networks import ADAMW, tiny

LINK = Link(2e-5, 1e9, 2e-6)
CPU = Device("CPU", {"float32": 1e11}, 2e10, 1 << 30, 5e-6)
FOUR = Cluster(1, 4, CPU, LINK, LINK)


def graph_of(name: str = "gpt", batch: int = 32) -> Graph:
    example = tiny(name, torch.float32, batch)
    return capture(example.network, example.loss, example.batch, ADAMW)


@pytest.fixture(scope="module")
def plan() -> StepPlan:
    return plan_step(graph_of(), FOUR, network="gpt", batch=32)


def test_a_file_is_read_as_it_was_written(plan: StepPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    read = StepPlan.load(tmp_path / "plan.json")
    assert read.to_json() == plan.to_json()
    assert read.fingerprint == plan.fingerprint
    assert read.assignment.nodes == plan.assignment.nodes
    assert read.memory == plan.memory
    assert not list(read.differences(plan))


def test_the_fingerprint_is_of_what_was_decided(plan: StepPlan) -> None:
    assert plan_step(graph_of(), FOUR, network="other").fingerprint != plan.fingerprint  # batch
    again = plan_step(graph_of(), FOUR, network="another", batch=32)
    assert again.fingerprint == plan.fingerprint
    assert replace(plan, recomputed=("mm",)).fingerprint != plan.fingerprint


def test_what_was_changed_by_hand_is_refused(plan: StepPlan, tmp_path: Path) -> None:
    values = plan.to_json()
    name = next(iter(values["inputs"]))
    values["inputs"][name] = "[S0]" if values["inputs"][name] != "[S0]" else "[B]"
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="fingerprint") as caught:
        StepPlan.load(file)
    assert "changed by hand" in caught.value.hint
    for text, what in (("{}", "not a plan"), ("[", "not JSON"), ('{"format": 9}', "format 9")):
        file.write_text(text)
        with pytest.raises(UserError, match=what):
            StepPlan.load(file)
    with pytest.raises(UserError, match="No such file"):
        StepPlan.load(tmp_path / "none.json")


def test_a_plan_is_of_one_graph(plan: StepPlan) -> None:
    plan.check(graph_of())
    with pytest.raises(UserError, match="the plan is of the step"):
        plan.check(graph_of(batch=16))


def test_differences_name_what_lies_otherwise(plan: StepPlan) -> None:
    weight = next(n for n in plan.assignment.inputs if n.endswith("weight"))
    now = plan.assignment.inputs[weight]
    other = (S(0),) if now == (B,) else (B,)
    inputs = dict(plan.assignment.inputs) | {weight: other}
    changed = replace(plan, assignment=replace(plan.assignment, inputs=inputs))
    assert list(plan.differences(changed)) == [
        f"{weight}: {list(now)!r} -> {list(other)!r}".replace("'", "")
    ]


def test_signatures_in_words() -> None:
    chosen = (Signature((S(0), B), (S(0), None)), Signature((), (B,)))
    words = combination_in_words(chosen)
    assert words == ["S0, B -> S0, _", " -> B"]
    assert read_combination(words) == chosen
    with pytest.raises(ValueError, match="no signature"):
        read_combination(["S0, B"])


def test_the_picture_shows_all_of_it(plan: StepPlan) -> None:
    timeline = (((0, "forward", 0.0, 1.0), (0, "backward", 1.0, 3.0)), ())
    staged = replace(plan, stages=Stages(2, 1, 4, ("mm",), 0.2, timeline))
    page = picture(staged)
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 3
    assert all(ElementTree.fromstring(drawing) for drawing in drawings)  # well-formed
    assert plan.memory is not None
    for layer in plan.layers:
        assert layer.splits in page or ">" in layer.splits
    assert f"plan {plan.fingerprint}" not in page  # of the one without stages
    assert staged.fingerprint in page
    assert "stage 1" in page
    assert "data parallel" in page


def test_the_table(plan: StepPlan) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(plan, console)
    text = console.export_text()
    for word in ("gpt", "data parallel", "megatron", "zero", "peak", plan.fingerprint):
        assert word in text


def test_programs_hold_what_their_graph_holds() -> None:
    """Of one rank: the same peak as the graph's own, but for what the end of the step frees."""
    graph = graph_of("mlp", batch=4096)
    one = Cluster(1, 1, CPU, LINK, LINK)
    found = plan_step(graph, one)
    (program,) = lower(graph, found.assignment, Routes(one, (1,)))
    mine = footprint(program).peak_bytes
    assert mine == Lifetimes.of_graph(graph, "renewed").peak_bytes
    halves = plan_step(graph, Cluster(1, 2, CPU, LINK, LINK))
    assert halves.memory is not None
    assert halves.memory.peak_bytes < mine


def test_short_memory_has_forward_run_again() -> None:
    example = tiny("mlp", torch.float32, 4096)
    layers = [nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(12)]
    network = nn.Sequential(*layers, nn.Linear(12, 10))
    graph = capture(network, example.loss, example.batch, ADAMW)
    one = Cluster(1, 1, CPU, LINK, LINK)
    free = plan_step(graph, one)
    assert free.memory is not None
    assert free.recomputed == ()
    limit = int(0.7 * free.memory.peak_bytes)
    short = plan_step(graph, replace(one, device=replace(CPU, memory_bytes=limit)))
    assert short.memory is not None
    assert short.recomputed
    assert short.memory.peak_bytes <= limit
    assert short.times.step_s > free.times.step_s
    assert any("run again" in note for note in short.notes)


def test_what_does_not_fit_says_what_would() -> None:
    def graph(batch: int) -> Graph:
        return graph_of("mlp", batch)

    small = replace(Cluster(1, 1, CPU, LINK, LINK), device=replace(CPU, memory_bytes=200_000))
    with pytest.raises(NetworkError, match=r"no plan fits: .* expected at most 200 kB") as caught:
        plan_step(graph(4096), small, batch=4096, at_batch=graph)
    assert re.search(r"Largest at the peak: \S+ of \d", caught.value.message)
    fitting = int(re.findall(r"would fit: a batch of (\d+): ", caught.value.hint)[0])
    assert plan_step(graph(fitting), small).times.peak_bytes is not None
    with pytest.raises(NetworkError):
        plan_step(graph(2 * fitting), small)
    tiny_one = replace(small, device=replace(CPU, memory_bytes=1000))
    with pytest.raises(NetworkError) as caught:
        plan_step(graph(4096), tiny_one, batch=4096)
    assert "more devices" in caught.value.hint or "nothing fits" in caught.value.hint


def job(**changes: Any) -> Job:
    x, y = torch.randn(64, 12), torch.randint(10, (64,))
    values: dict[str, Any] = {
        "network": partial(zoo.mlp, inputs=12, hidden=(16, 8), classes=10),
        "loss": "cross_entropy",
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "train": feed.arrays(x, y),
        "batch_size": 8,
        "epochs": 1,
        "name": "small",
    }
    return Job(**values | changes)


def test_a_job_is_planned() -> None:
    found = penstock.plan(job(), FOUR)
    assert isinstance(found, penstock.plan.StepPlan)
    assert (found.network, found.batch) == ("small", 32)  # a shard for each device
    assert penstock.plan(job(shards=2), FOUR).batch == 16
    assert penstock.plan(job(shards=2, accumulate=3), FOUR).batch == 48
    clipped = penstock.plan(job(clip=Clip(norm=1.0)), FOUR)
    assert any("norm" in name for name in clipped.assignment.nodes)
    pinned = penstock.plan(job(), FOUR, pins={"1.weight": "S0"})
    assert pinned.assignment.inputs["1.weight"] == (S(0),)
    with pytest.raises(JobError, match="strategy Averaging"):
        penstock.plan(job(strategy=Averaging(every=5)), FOUR)


SLOW = Cluster(4, 1, CPU, LINK, Link(2e-5, 1e8, 2e-6))
"""Hosts of one device: between them 2 MB take as long as 2e9 operations."""


def wide_job() -> Job:
    """Eight layers with 4 million weights each, of which a micro-batch sends 2,048 activations."""
    x, y = torch.randn(64, 2048), torch.randint(2048, (64,))
    layers = partial(zoo.mlp, inputs=2048, hidden=(2048,) * 7, classes=2048)
    return job(network=layers, train=feed.arrays(x, y), batch_size=16)


def wide(cluster: Cluster, **options: Any) -> StepPlan:
    return penstock.plan(wide_job(), cluster, **options)


def wide_graph(examples: int) -> Graph:
    one = wide_job()
    with torch.device("meta"):
        batch = torch.empty(examples, 2048), torch.empty(examples, dtype=torch.int64)
        network = one.network.make()
    return capture(network, one.loss.make(), batch, one.optimizer.make)


def test_a_pipeline_comes_out_where_it_is_faster() -> None:
    """Unasked, over slow links; by so much that it is no matter of rounding; and it can run."""
    found = wide(SLOW)
    without = wide(SLOW, pipelines=False)
    assert without.stages is None
    assert not any("pipeline" in note for note in without.notes)
    assert found.origin == "pipeline"
    assert found.stages is not None
    assert found.stages.number == 4
    assert found.beside["without a pipeline"] == without.times
    # A rank cannot compute for longer than the step takes; and of four it computes a good part.
    assert found.times.step_s / 4 < found.times.compute_s < found.times.step_s
    assert found.times.step_s < 0.8 * without.times.step_s
    why, looked_at, *_ = found.notes
    assert re.search(r"a pipeline: \d+ micro-batches send at most .* over a cut each way", why)
    assert in_time(without.times.step_s) in why
    assert re.search(r"of \d+ numbers of stages and micro-batches: .*tried \d+", looked_at)
    graph = wide_graph(64 // found.stages.micro_batches)
    assert graph.fingerprint == found.graph
    schedule = interleaved(4, found.stages.chunks, found.stages.micro_batches)
    stages = Cut(graph, found.stages.cuts)
    routes = Routes(Cluster(1, 1, CPU, LINK, LINK), (1,))
    staged(stages, found.assignment, schedule, routes).check()


def test_a_pipeline_that_only_looks_faster_is_not_taken() -> None:
    """By a little: the guess is that it would be faster, and its model says that it is not."""
    best = plan_pipeline(wide_graph, SLOW, 64)
    assert best is not None
    assert best.notes[0].endswith("without one no plan fits")
    without = wide(SLOW, pipelines=False)
    fast = replace(without, times=replace(without.times, step_s=0.97 * best.times.step_s))
    kept = plan_pipeline(wide_graph, SLOW, 64, beside=fast)
    assert kept is not None
    assert (kept.stages, kept.origin) == (None, without.origin)
    assert re.search(r"no pipeline is faster: .* tried [1-9]", kept.notes[-1])


def test_no_pipeline_where_links_are_fast() -> None:
    fast = replace(SLOW, far=Link(1e-6, 1e11, 1e-7))
    found = wide(fast)
    assert found.stages is None
    (note,) = (note for note in found.notes if "pipeline" in note)
    assert re.match(r"no pipeline is faster: of 8 numbers .*: ruled out by a bound \d+", note)


def test_pins_and_statistics_of_a_batch_are_kept() -> None:
    """A pipeline would put a pin of four hosts on one, and norms on micro-batches."""
    pinned = wide(SLOW, pins={"1.weight": "B"})
    assert pinned.stages is None
    assert "no pipeline was tried: pins are of the whole mesh" in pinned.notes
    layers = [nn.Sequential(nn.Linear(2048, 2048), nn.BatchNorm1d(2048)) for _ in range(8)]
    x, y = torch.randn(64, 2048), torch.randint(2048, (64,))
    normed = job(network=nn.Sequential(*layers), train=feed.arrays(x, y), batch_size=16)
    found = penstock.plan(normed, SLOW)
    assert found.stages is None
    assert any("running_mean is of the whole batch" in note for note in found.notes)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    FOUR.save("cluster.json")
    (tmp_path / "job.yaml").write_text(
        "network: penstock.zoo:lenet\nloss: cross_entropy\noptimizer: {sgd: {lr: 0.1}}\n"
        "train: {mnist: {split: train}}\nbatch_size: 8\nepochs: 1\n"
    )

    def penstock_(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["penstock", *words])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    plan = ("plan", "job.yaml", "--on", "cluster.json")
    code, out, _ = penstock_(*plan, "--save", "plan.json", "--picture", "plan.html")
    assert code == 0
    assert "data parallel" in out
    assert "no pipeline is faster" in out
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert StepPlan.load("plan.json").fingerprint in out
    code, out, _ = penstock_(*plan, "--diff", "plan.json")
    assert (code, out) == (0, "")
    code, out, _ = penstock_(*plan, "--no-pipelines")
    assert code == 0
    assert "pipeline" not in out
    code, out, _ = penstock_(*plan, "--diff", "plan.json", "--pin", "7.weight=S1")
    assert "7.weight: " in out
    code, _, err = penstock_(*plan, "--pin", "7.weigt=S0")
    assert code == 2
    assert "did you mean '7.weight'?" in err
    code, _, err = penstock_("plan", "job.yaml", "--on", "none.json")
    assert code == 2
    assert "penstock doctor --save none.json" in err
