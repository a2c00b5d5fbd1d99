"""The cut of a graph into stages, and the choice of a pipeline."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from penstock.errors import UserError
from penstock.exchange.cost import Link
from penstock.model.capture import capture
from penstock.model.graph import Graph, Node
from penstock.plan.assignment import Assignment
from penstock.plan.costs.hardware import Cluster, Device
from penstock.plan.pipelines.micro_batch import accumulated, cut_batch
from penstock.plan.pipelines.schedule import interleaved
from penstock.plan.pipelines.search import (
    Candidate,
    choose,
    inside_of,
    pipelines,
    send_s,
    stage_counts,
)
from penstock.plan.pipelines.stages import Stages, crossing_bytes, cut
from penstock.plan.search.search import Search
from penstock.testing.assignments import styled
from penstock.testing.networks import SGD, tiny

WIDTH, DEPTH = 16, 8


@functools.cache
def line_of_layers(batch: int = 2, width: int = WIDTH) -> Graph:
    """`DEPTH` equal layers."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(DEPTH)]
    x = torch.randn(batch, width)
    return capture(nn.Sequential(*layers), F.mse_loss, (x, x.clone()), SGD)


@functools.cache
def gpt() -> Graph:
    small = tiny("gpt", batch=2)
    return capture(small.network, small.loss, small.batch, SGD)


def products(node: Node) -> float:
    """As if nothing but matrix products took time."""
    return 1.0 if node.op == "aten.mm.default" else 0.0


def per_stage(stages: Stages, seconds: Callable[[Node], float]) -> list[float]:
    found = [0.0] * stages.count
    for node in stages.graph.nodes:
        if node.phase != "update" and node.name in stages.of:
            found[stages.of[node.name]] += seconds(node)
    return found


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_equal_layers_are_cut_into_equal_stages(count: int) -> None:
    stages = cut(line_of_layers(), count, products, lambda n: n * 1e-9)
    assert stages.count == count
    assert len(set(per_stage(stages, products)[1:])) <= 1  # the first has no gradient of x
    assert all(ahead == back == 2 * WIDTH * 4 for ahead, back in crossing_bytes(stages))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_other_cut_has_a_faster_slowest_stage(count: int) -> None:
    """By trying all of them."""
    graph = line_of_layers()

    def seconds(node: Node) -> float:
        return 1.0 + (len(node.name) * 7 % 5) + 10 * products(node)

    forward = [node for node in graph.nodes if node.phase == "forward"]
    first = {node.call: node.name for node in reversed(forward)}
    names = [node.name for node in forward if first[node.call] == node.name][1:]
    least = min(
        max(per_stage(Stages(graph, chosen), seconds))
        for chosen in itertools.combinations(names, count - 1)
    )
    found = cut(graph, count, seconds, lambda n: 0.0)
    assert max(per_stage(found, seconds)) <= least * 1.05
    uneven = Stages(graph, tuple(names[: count - 1]))
    assert max(per_stage(uneven, seconds)) > least * 1.05  # the control


def test_a_cut_goes_where_little_is_sent() -> None:
    """Through a GPT between blocks, where one activation crosses, and not inside attention."""
    graph = gpt()
    activation = 2 * 8 * 16 * 8
    stages = cut(graph, 3, lambda n: 1.0, lambda n: n * 1e-2)
    assert crossing_bytes(stages) == ((activation, activation),) * 2
    free = cut(graph, 3, lambda n: 1.0, lambda n: 0.0)
    assert max(max(both) for both in crossing_bytes(free)) > activation  # the control


@pytest.mark.parametrize(("count", "byte_s"), [(4, 1e-3), (12, 0.0)])
def test_backward_is_of_the_stage_of_its_forward(count: int, byte_s: float) -> None:
    graph = gpt()
    stages = cut(graph, count, lambda n: 1.0, lambda n: n * byte_s)
    calls: dict[int, set[int]] = {}
    for node in graph.nodes:
        # Sums of gradients are of nothing in forward, and have the number of the loss.
        if node.name in stages.repeated and node.op != "aten.add.Tensor":
            calls.setdefault(node.call, set()).add(stages.of[node.name])
    assert all(len(of) == 1 for of in calls.values())
    for node in graph.nodes:
        for name in node.inputs:
            maker = graph.producer.get(name)
            if maker is None or not {node.name, maker[0].name} <= stages.repeated - stages.late:
                continue
            ahead = stages.of[node.name] - stages.of[maker[0].name]
            if node.phase == maker[0].phase:
                assert ahead >= 0 if node.phase == "forward" else ahead <= 0


def test_parameters_and_their_updates_are_of_one_stage() -> None:
    graph = gpt()
    stages = cut(graph, 4, lambda n: 1.0, lambda n: n * 1e-3)
    assert set(stages.home.values()) == {0, 1, 2, 3}
    for node in graph.nodes:
        if node.phase == "update" and node.name not in stages.copied:
            homes = {stages.home[name] for name in node.inputs if name in stages.home}
            assert homes <= {stages.of[node.name]}
    for name, stage in stages.home.items():
        assert stages.home[name.partition("/")[0]] == stage


def test_what_is_repeated_copied_and_late() -> None:
    stages = cut(gpt(), 2, lambda n: 1.0, lambda n: n * 1e-3)
    graph = stages.graph
    ops = {node.op for node in graph.nodes if node.name in stages.copied}
    assert {"aten.tril.default", "aten.full.default", "aten.t.default"} <= ops
    assert "penstock.uniform.default" not in ops  # which depends on the seed of the micro-batch
    late = [n.name for n in graph.nodes if n.name in stages.late and n.phase != "update"]
    (only,) = late  # the gradient of the words, which two stages have
    assert graph.specs[only].shape == (32, 16)
    assert not Stages(graph, ()).late - {n.name for n in graph.nodes if n.phase == "update"}


def test_more_stages_than_steps_are_refused() -> None:
    with pytest.raises(UserError, match="in 60 stages"):
        cut(line_of_layers(), 60, products, lambda n: 0.0)


def test_a_batch_that_is_not_of_micro_batches_is_refused() -> None:
    graph = line_of_layers()
    with pytest.raises(UserError, match=r"x is \[6, 16\]; expected 2 micro-batches of \[2, 16\]"):
        cut_batch(graph, {"x": torch.zeros(6, WIDTH)}, 2)


def test_micro_batches_draw_numbers_of_their_own() -> None:
    """The same example twice: dropout tells the micro-batches apart, and steps."""
    small = tiny("gpt", batch=2)
    given = small.inputs(gpt())
    twice = given | {name: given[name].repeat(2, 1) for name in ("x", "y")}
    loss = gpt().output("loss").name

    def serial(seed: int) -> float:
        return float(gpt().run(given | {"seed": torch.tensor(seed)})[loss])

    found = float(accumulated(gpt(), 2)(twice | {"seed": torch.tensor(5)})[loss])
    assert found == pytest.approx((serial(10) + serial(11)) / 2, rel=1e-12)
    assert serial(10) != serial(11)


# The choice.

DEVICE = Device("of a test", {"float32": 1e9}, 1e9, 1 << 30, 0.0)
FAST = Link(latency_s=1e-9, bytes_per_s=1e12)
SLOW = Link(latency_s=1e-9, bytes_per_s=1e6)


def data_parallel(graph: Graph, cluster: Cluster) -> Assignment:
    return styled(graph, cluster.mesh, "data")


def test_stages_are_equal_parts_of_the_cluster() -> None:
    def counts(hosts: int, devices: int) -> tuple[int, ...]:
        return stage_counts(Cluster(hosts, devices, DEVICE, FAST, FAST))

    assert counts(1, 1) == ()
    assert counts(1, 4) == (2, 4)
    assert counts(4, 2) == (2, 4, 8)
    assert counts(3, 4) == (3, 6, 12)
    cluster = Cluster(4, 2, DEVICE, FAST, FAST)
    assert [inside_of(cluster, n).mesh for n in (2, 4, 8)] == [(2, 2), (2,), (1,)]
    with pytest.raises(UserError, match="3 stages on 4 hosts"):
        inside_of(cluster, 3)


def test_devices_share_the_link_of_their_host() -> None:
    cluster = Cluster(2, 4, DEVICE, FAST, SLOW)
    assert send_s(cluster, 2, 1e6) == pytest.approx(4.0)  # four devices of one host to the next
    assert send_s(cluster, 4, 1e6) == pytest.approx(2.0)
    assert send_s(cluster, 4, 1e6, sender=0) == pytest.approx(1e-6, rel=0.01)  # in one host


def candidates(cluster: Cluster, ranks: int, micro_batches: int) -> list[Candidate]:
    graph = line_of_layers(8, 64)
    return list(pipelines(graph, cluster, ranks, micro_batches, data_parallel))


def test_the_model_of_equal_stages_is_the_formula() -> None:
    cluster = Cluster(1, 4, DEVICE, FAST, FAST)
    plain, two = candidates(cluster, 4, 8)
    assert plain.sizes == two.sizes == (4, 1)
    for one, share in ((plain, 3 / 11), (two, 3 / 19)):
        # The first stage has no gradient of x to compute, and the last one has the loss.
        assert one.bubble == pytest.approx(share, rel=0.5)
        slowest = max(one.timeline.busy_s(rank) for rank in range(4))
        assert one.timeline.step_s == pytest.approx(slowest / (1 - share), rel=0.05)
    assert two.step_s < plain.step_s
    assert sum(two.held_bytes) > sum(plain.held_bytes)  # more is in flight


def test_slow_links_between_hosts_are_for_pipelines() -> None:
    """Stages on hosts send activations, where data parallel would send all gradients."""
    cluster = Cluster(2, 1, DEVICE, FAST, Link(latency_s=1e-6, bytes_per_s=1e7))
    graphs = functools.cache(lambda batch: line_of_layers(batch, 128))

    def whole(cluster: Cluster) -> float:
        return Search(graphs(16), cluster).find(time_limit_s=20).price.step_s

    found = choose(graphs, cluster, 16, data_parallel, micro_batches=(1, 2))
    assert found is not None
    assert found.fits
    assert found.sizes == (2, 1)
    assert found.stages.count == found.schedule.stages
    assert found.step_s < whole(cluster)
    near = replace(cluster, far=FAST)
    quick = choose(graphs, near, 16, data_parallel, micro_batches=(1, 2))
    assert quick is not None
    assert quick.step_s > whole(near)  # the control: where links cost nothing bubbles do


def test_memory_is_of_a_stage_and_what_is_in_flight() -> None:
    cluster = Cluster(1, 2, DEVICE, FAST, FAST)
    graph = line_of_layers(8, 64)
    weights = 64 * 64 * 4
    few, *_ = candidates(cluster, 2, 2)
    many, *_ = candidates(cluster, 2, 8)
    data = 2 * 8 * 64 * 4
    for one, micro_batches in ((few, 2), (many, 8)):
        for rank, held in enumerate(one.held_bytes):
            layers = sum(one.stages.home[item.name] == rank for item in graph.inputs
                         if item.role == "parameter")  # fmt: skip
            fixed = 3 * layers * weights + micro_batches * data / 2
            flight = one.schedule.in_flight(rank)
            activation = 8 * 64 * 4
            assert fixed < held <= fixed + flight * (layers + 3) * 2 * activation
    small = replace(cluster, device=replace(DEVICE, memory_bytes=1000))
    assert not any(one.fits for one in candidates(small, 2, 2))


def test_the_search_splits_inside_a_stage() -> None:
    """Four devices in two stages: pairs that the search splits; it may use both stages' memory."""
    cluster = Cluster(2, 2, DEVICE, FAST, Link(latency_s=1e-6, bytes_per_s=1e7))
    asked: list[Cluster] = []

    def search(graph: Graph, inside: Cluster) -> Assignment:
        asked.append(inside)
        return Search(graph, inside).find(time_limit_s=10).assignment

    (found,) = pipelines(line_of_layers(8, 64), cluster, 2, 2, search, chunks=(1,))
    assert found.sizes == (2, 2)
    (inside,) = asked
    assert inside.mesh == (2,)
    assert inside.device.memory_bytes == 2 * DEVICE.memory_bytes
    whole = line_of_layers(8, 64)
    layouts = {str(found.assignment.layout_of(whole, name)) for name in ("x", "0.0.weight")}
    assert layouts != {"(B,)"}  # two devices that did the same would be no better than one


def test_nothing_to_cut() -> None:
    alone = Cluster(1, 1, DEVICE, FAST, FAST)
    assert choose(line_of_layers, alone, 16, data_parallel) is None
    pair = Cluster(1, 2, DEVICE, FAST, FAST)
    assert choose(line_of_layers, pair, 1, data_parallel) is None


def test_candidates_can_be_carried_out() -> None:
    (one, two) = candidates(Cluster(1, 2, DEVICE, FAST, FAST), 2, 4)
    assert one.schedule == interleaved(2, 1, 4)
    assert two.schedule == interleaved(2, 2, 4)
    assert two.stages.count == 4
