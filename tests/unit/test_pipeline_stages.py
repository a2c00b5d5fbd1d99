"""The cut of a graph into stages, and the choice of a pipeline."""

from __future__ import annotations

import functools
import itertools
import random
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
from penstock.plan.pipelines import model
from penstock.plan.pipelines.inside import Insides
from penstock.plan.pipelines.micro_batch import accumulated, cut_batch
from penstock.plan.pipelines.model import (
    Candidate,
    inside_of,
    pipelines,
    send_s,
    stage_counts,
)
from penstock.plan.pipelines.promise import Promise, bubble
from penstock.plan.pipelines.schedule import interleaved, simulate
from penstock.plan.pipelines.search import MAX_TASKS, choose
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

    found = choose(graphs, cluster, 16, data_parallel, micro_batches=(1, 2)).best
    assert found is not None
    assert found.fits
    assert found.sizes == (2, 1)
    assert found.stages.count == found.schedule.stages
    assert found.step_s < whole(cluster)
    near = replace(cluster, far=FAST)
    quick = choose(graphs, near, 16, data_parallel, micro_batches=(1, 2)).best
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


def bounds(graph: Graph, cluster: Cluster, ranks: int, micro_batches: int) -> list[float]:
    """Of one chunk and of two: `graph` is of the whole batch of 64."""
    promise, inside = Promise(graph, 64, cluster), inside_of(cluster, ranks)
    return [promise.least_s(ranks, micro_batches, chunks, inside) for chunks in (1, 2)]


@pytest.mark.parametrize("style", ["data", "greedy"])
@pytest.mark.parametrize(("ranks", "times"), [(2, 1), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_no_pipeline_takes_less_than_the_bound(ranks: int, times: int, style: str) -> None:
    """However it is split and cut; and the bound says something."""
    device = replace(DEVICE, operator_s=1e-6)
    cluster, count = Cluster(2, 4, device, FAST, FAST), ranks * times
    whole = line_of_layers(64, 64)
    numbers = random.Random(ranks + times)

    def search(graph: Graph, inside: Cluster) -> Assignment:
        if style == "data":
            return data_parallel(graph, inside)
        return Search(graph, inside).find(time_limit_s=5).assignment

    found = list(pipelines(line_of_layers(64 // count, 64), cluster, ranks, count, search))
    found = [one for one in found if one.schedule.stages <= 8]
    for one, least_s in zip(found, bounds(whole, cluster, ranks, count)):
        assert least_s <= one.step_s
        assert least_s > 0.4 * one.step_s
    one = found[0]
    forward = [node for node in one.graph.nodes if node.phase == "forward"]
    first = {node.call: node.name for node in reversed(forward)}
    places = [node.name for node in forward if first[node.call] == node.name][1:]
    times_of = model._times(one.graph, one.assignment, model.ClusterPrices(
        one.graph, inside_of(cluster, ranks), inside_of(cluster, ranks).mesh))  # fmt: skip
    for _ in range(10):
        cuts = sorted(numbers.sample(range(len(places)), ranks - 1))
        stages = Stages(one.graph, tuple(places[at] for at in cuts))
        step_s = model.step_of(stages, one.schedule, cluster, times_of).step_s
        assert step_s >= bounds(whole, cluster, ranks, count)[0]


def test_no_stages_have_less_of_a_bubble_than_the_bound() -> None:
    """Of random times; the formula of equal stages is none, as shorter ones at the end show."""
    numbers = random.Random(5)
    beaten = 0
    for _ in range(200):
        ranks, chunks = numbers.randint(2, 5), numbers.randint(1, 3)
        count = ranks * numbers.randint(1, 3)
        forward = [numbers.uniform(0.1, 1) / (1 + stage) for stage in range(ranks * chunks)]
        step_s = simulate(interleaved(ranks, chunks, count), forward, forward).step_s
        micro_s = 2 * sum(forward)
        assert step_s >= bubble(ranks, count, chunks) * micro_s * (1 - 1e-9)
        beaten += step_s < (count + (ranks - 1) / chunks) / ranks * micro_s * (1 - 1e-9)
    third = [1 / 9, 2 / 9]
    two = simulate(interleaved(2, 1, 2), third[::-1], [2 * one for one in third[::-1]])
    assert bubble(2, 2, 1) == pytest.approx(4 / 3)
    assert 4 / 3 < two.step_s < 3 / 2


def counted(graphs: Callable[[int], Graph]) -> tuple[Callable[[int], Graph], list[int]]:
    asked: list[int] = []

    def capture_at(examples: int) -> Graph:
        asked.append(examples)
        return graphs(examples)

    return capture_at, asked


def test_what_cannot_be_faster_is_not_even_captured() -> None:
    cluster = Cluster(1, 4, DEVICE, FAST, FAST)
    graphs, asked = counted(lambda batch: line_of_layers(batch, 64))
    everything = choose(graphs, cluster, 16, data_parallel)
    assert everything.best is not None
    # Of 2 stages with 2, 4, 8 and 16 micro-batches, of 4 with 4, 8 and 16.
    assert everything.modelled + everything.unlikely == 7
    assert len(set(asked)) > 2
    graphs, asked = counted(lambda batch: line_of_layers(batch, 64))
    none = choose(graphs, cluster, 16, data_parallel, below_s=everything.best.step_s / 10)
    assert (none.best, none.impossible, none.modelled, asked) == (None, 7, 0, [16])
    assert none.words == "of 7 numbers of stages and micro-batches: ruled out by a bound 7"
    # And what can be is found as if nothing were known.
    some = choose(graphs, cluster, 16, data_parallel, below_s=everything.best.step_s * 1.2)
    assert some.best is not None
    assert some.best.step_s == everything.best.step_s
    assert 0 < some.modelled < 7
    assert some.impossible + some.unlikely + some.modelled == 7


def test_the_time_limit_ends_the_looking_and_is_told() -> None:
    cluster = Cluster(1, 4, DEVICE, FAST, FAST)
    found = choose(lambda n: line_of_layers(n, 64), cluster, 16, data_parallel, time_limit_s=0.0)
    assert found.best is not None
    assert (found.modelled, found.left) == (1, 6)
    assert found.words.endswith(": tried 1, left out (no time) 6")


def test_a_schedule_of_too_many_tasks_is_left_out() -> None:
    cluster = Cluster(1, 4, DEVICE, FAST, FAST)
    batch, times = 2**13, 2**11
    assert 2 * 2 * (2 * times) <= MAX_TASKS < 2 * 4 * (4 * times)
    graphs, asked = counted(lambda n: line_of_layers(n, 64))
    found = choose(graphs, cluster, batch, data_parallel, micro_batches=(1, times))
    assert found.left == 1
    assert found.impossible + found.unlikely + found.modelled == 3
    assert batch // (4 * times) not in asked


def test_known_ways_come_before_the_search() -> None:
    """Pipelines are compared by them; two are searched, and the better of both is taken."""
    cluster = Cluster(1, 4, DEVICE, FAST, FAST)
    split: dict[str, list[int]] = {"known": [], "searched": []}

    def known(graph: Graph, part: Cluster) -> list[Assignment]:
        split["known"].append(part.ranks)
        return [styled(graph, part.mesh, "data"), styled(graph, part.mesh, "data")]

    def search(graph: Graph, part: Cluster) -> Assignment:
        split["searched"].append(part.ranks)
        return Search(graph, part).find(time_limit_s=5).assignment

    found = choose(lambda n: line_of_layers(n, 64), cluster, 16, search, known=known)
    assert len(split["known"]) == found.modelled > 2
    assert len(split["searched"]) == 2
    alone = choose(lambda n: line_of_layers(n, 64), cluster, 16, data_parallel)
    assert found.best is not None
    assert alone.best is not None
    assert found.best.step_s <= alone.best.step_s


def test_gradients_count_once_a_step_inside() -> None:
    """Over links on which one exchange of gradients takes as long as several micro-batches: the
    search of a step splits nothing, that of a micro-batch of many its examples."""
    cluster = Cluster(2, 2, DEVICE, Link(1e-6, 3e6), Link(1e-6, 3e6))
    whole = functools.cache(lambda n: line_of_layers(n, 64))
    insides = Insides(whole, 2048, pins=None, gap=0.0, time_limit_s=10)
    graph, part = insides.micro_batch(128), inside_of(cluster, 2)
    prices = Search(graph, part)
    micro = prices.price(insides.searched(graph, part))
    once = prices.find(gap=0.0).price
    assert once.step_s <= micro.step_s
    assert micro.compute_s + micro.exchange_s < once.compute_s + once.exchange_s
    (fastest, *_) = insides.known(graph, part)
    assert (
        prices.price(fastest).held_bytes == prices.price(prices.preset("data_parallel")).held_bytes
    )


def test_nothing_to_cut() -> None:
    alone = Cluster(1, 1, DEVICE, FAST, FAST)
    assert choose(line_of_layers, alone, 16, data_parallel).best is None
    pair = Cluster(1, 2, DEVICE, FAST, FAST)
    assert choose(line_of_layers, pair, 1, data_parallel).best is None


def test_candidates_can_be_carried_out() -> None:
    (one, two) = candidates(Cluster(1, 2, DEVICE, FAST, FAST), 2, 4)
    assert one.schedule == interleaved(2, 1, 4)
    assert two.schedule == interleaved(2, 2, 4)
    assert two.stages.count == 4
