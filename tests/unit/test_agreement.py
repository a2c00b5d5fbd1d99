"""What a step of `AllReduce` and of `Averaging` does, without data and processes."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from penstock.errors import Diverged, TransportError
from penstock.exchange import tree
from penstock.exchange.agreement import Clip, Outcome
from penstock.exchange.averaging import AveragingAgreement
from penstock.exchange.gradients import GradientAgreement
from penstock.exchange.group import Group
from penstock.exchange.into_forward import obstacle, watch
from penstock.exchange.shard_sum import ShardSum
from penstock.testing import assert_close, assert_same_bits
from penstock.testing.group import in_threads

Agreement = GradientAgreement | AveragingAgreement
Losses = Callable[[nn.Module, int, int], list[tuple[torch.Tensor, int]]]
"""Of network, step and shard: the mean loss of each micro-batch, and its number of examples."""

SHARDS = 3
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@dataclass
class Rank:
    """What one rank has in the end."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    agreement: Agreement
    outcomes: list[Outcome | None] = field(default_factory=list)
    error: Exception | None = None

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.network.named_parameters()}


def agreement_on(
    group: Group,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    every: int | None = None,
    average_state: bool = True,
    bucket_bytes: int = 1,
    clip: Clip | None = None,
    into_forward: bool = False,
    watched: bool = True,
) -> Agreement:
    """`Averaging` with `every`, else `AllReduce`; a bucket for each parameter by default."""
    own = tree.assign(SHARDS, group.world_size)[group.rank]
    arguments: Any = (
        group,
        [(name, p) for name, p in network.named_parameters() if p.requires_grad],
        optimizer,
        own,
        SHARDS,
    )
    more: Any = {
        "clip": clip or Clip(),
        "where": lambda i: f"shard {own[i]} on rank {group.rank}",
    }
    if every is None:
        agreement = GradientAgreement(
            *arguments, bucket_bytes=bucket_bytes, borders=None, into_forward=into_forward, **more
        )
        if into_forward and watched:
            trained = [p for p in network.parameters() if p.requires_grad]
            watch(network, optimizer, trained, agreement.settle)
        return agreement
    return AveragingAgreement(*arguments, every=every, average_state=average_state, **more)


def train(
    template: nn.Module,
    losses: Losses,
    workers: int,
    *,
    steps: int = 3,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    **options: Any,
) -> list[Rank]:
    """So many steps of all shards, on loopback."""

    def work(group: Group) -> Rank:
        network = copy.deepcopy(template)
        made = optimizer([p for p in network.parameters() if p.requires_grad])
        agreement = agreement_on(group, network, made, **options)
        rank = Rank(network, made, agreement)
        own = tree.assign(SHARDS, group.world_size)[group.rank]
        try:
            for step in range(1, steps + 1):
                for i, shard in enumerate(own):
                    agreement.activate(i)
                    parts = losses(network, step, shard)
                    for n, (loss, examples) in enumerate(parts):
                        agreement.backward(loss, examples, n + 1 == len(parts))
                    if not parts:
                        agreement.skip()
                rank.outcomes.append(agreement.commit(step, stop=step == group.rank + 2))
            agreement.settle()
        except (Diverged, TransportError) as error:
            rank.error = error
        return rank

    ranks: list[Rank] = in_threads(workers, work)
    return ranks


def plain(
    template: nn.Module,
    losses: Losses,
    *,
    steps: int = 3,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
) -> dict[str, torch.Tensor]:
    """The same in plain PyTorch: the mean loss over all examples of all shards."""
    network = copy.deepcopy(template)
    made = optimizer([p for p in network.parameters() if p.requires_grad])
    for step in range(1, steps + 1):
        parts = [part for shard in range(SHARDS) for part in losses(network, step, shard)]
        made.zero_grad()
        total = sum(examples for _, examples in parts)
        torch.stack([loss.double() * examples / total for loss, examples in parts]).sum().backward()
        for p in network.parameters():
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        made.step()
    return {name: p.detach() for name, p in network.named_parameters()}


def numbers(*key: int, shape: tuple[int, ...] = (6, 4)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(k * 1009**n for n, k in enumerate(key)) + 1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Branches(nn.Module):
    """Even shards use one branch, odd shards the other; nobody uses the third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4, dtype=torch.float64)
        self.branches = nn.ModuleList(nn.Linear(4, 2, dtype=torch.float64) for _ in range(3))
        self.nothing = nn.Parameter(torch.empty(0, dtype=torch.float64))

    def losses(self, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        return [
            (self.branches[shard % 2](self.stem(numbers(step, shard))).square().mean(), 2 + shard)
        ]


class Tied(nn.Module):
    """One weight in two layers, used twice in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(4, 4, dtype=torch.float64)
        self.b = nn.Linear(4, 4, dtype=torch.float64)
        self.b.weight = self.a.weight

    def losses(self, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        x = numbers(step, shard)
        for layer in (self.a, self.b, self.a):
            x = torch.tanh(layer(x))
        return [(x.square().mean(), 6)]


class Mixed(nn.Module):
    """float32 and float64, and a frozen layer between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.single = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.double_ = nn.Linear(4, 2, dtype=torch.float64)

    def losses(self, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        x = self.frozen(torch.tanh(self.single(numbers(step, shard).float())))
        return [(self.double_(x.double()).square().mean(), 6)]


class MicroBatches(Branches):
    """Two micro-batches; in the second step, the second shard has nothing, the third has one."""

    def losses(self, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        parts = [
            (self.branches[n % 2](self.stem(numbers(step, shard, n))).square().mean(), 2 + n)
            for n in range(2)
        ]
        return parts[: (2, 0, 1)[shard]] if step == 2 else parts


NETWORKS = [Branches, Tied, Mixed, MicroBatches]


def losses_of(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
    found: list[tuple[torch.Tensor, int]] = network.losses(step, shard)
    return found


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("every", [None, 1], ids=["all-reduce", "averaging"])
def test_a_step_takes_the_mean_gradient_of_all_examples(
    kind: Callable[[], nn.Module], every: int | None
) -> None:
    """(With SGD, averaging after each step is the same.)"""
    template = kind()
    before = {name: p.detach().clone() for name, p in template.named_parameters()}
    expected = plain(template, losses_of)
    (alone,) = train(template, losses_of, 1, every=every)
    tolerance = 1e-7 if kind is Mixed else 1e-13  # of float32, and of float64
    assert_close(alone.parameters, expected, tolerance)
    with pytest.raises(AssertionError):
        assert_close(before, expected, 1e-3)
    untouched = {n: p for n, p in before.items() if n.startswith(("frozen", "branches.2"))}
    # Averaging takes (n a + m a) / (n + m), which may round.
    tolerance = 0.0 if every is None else 1e-15
    assert_close({name: alone.parameters[name] for name in untouched}, untouched, tolerance)
    for workers in (2, 3):
        for rank in train(template, losses_of, workers, every=every):
            assert_same_bits(rank.parameters, alone.parameters)
            assert [o.loss for o in rank.outcomes if o] == [o.loss for o in alone.outcomes if o]
    assert all(p.grad is None for p in alone.network.parameters() if not p.requires_grad)


@pytest.mark.parametrize("bucket_bytes", [1, 100, 10**9])
def test_buckets_do_not_change_the_sum(bucket_bytes: int) -> None:
    (alone,) = train(Branches(), losses_of, 1)
    for rank in train(Branches(), losses_of, 3, bucket_bytes=bucket_bytes):
        assert_same_bits(rank.parameters, alone.parameters)


@pytest.mark.parametrize("every", [None, 2])
def test_an_outcome_is_what_all_shards_say(every: int | None) -> None:
    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        zero = [network.weight.sum() * 0 for _ in range(2)]
        return [] if shard == 1 else [(zero[0] + step, 1), (zero[1] + step + 4 * shard, 3)]

    for rank in train(nn.Linear(2, 2), losses, 2, steps=4, every=every):
        first, second, third, fourth = rank.outcomes
        assert first == (None if every else Outcome(8, 1 + 24 / 8, False, False))
        assert third == (None if every else Outcome(8, 3 + 24 / 8, True, False))  # rank 1 wished it
        assert second is not None
        assert fourth is not None
        expected = (16, 1.5 + 24 / 8) if every else (8, 2 + 24 / 8)
        assert (second.examples, second.loss, second.stop) == (*expected, True)  # rank 0 wished it
        assert not fourth.stop


def test_a_step_without_examples_changes_nothing() -> None:
    template = Branches()
    for every in (None, 1):
        for rank in train(template, lambda network, step, shard: [], 2, every=every):
            assert_same_bits(rank.parameters, dict(template.named_parameters()))
            assert [o.examples for o in rank.outcomes if o] == [0, 0, 0]
            assert all(math.isnan(o.loss) for o in rank.outcomes if o)


class Layers(nn.Module):
    """Says when backward has come to its first layer."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)))
        self.events = events

    def loss(self, use_last: bool = True) -> torch.Tensor:
        x = self.layers[0](numbers(1))
        x.register_hook(lambda gradient: self.events.append("first layer"))
        x = self.layers[1](x)
        return (self.layers[2](x) if use_last else x).square().mean()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens; the numbers in it are of buckets that are sent."""
    found: list[Any] = []
    send = ShardSum.send

    def spied(self: ShardSum, bucket: int, *, sync: bool = False) -> None:
        found.append(bucket)
        send(self, bucket, sync=sync)

    monkeypatch.setattr(ShardSum, "send", spied)
    return found


def layers_on_one_worker(events: list[Any]) -> tuple[Layers, Agreement]:
    network = Layers(events)

    def make(group: Group) -> Agreement:
        return agreement_on(group, network, SGD(network.parameters()))

    (agreement,) = in_threads(1, make)
    assert agreement.borders()["torch.float64"] == [
        [start, start + length]
        for start, length in zip((0, 8, 24, 32, 48, 56), (8, 16, 8, 16, 8, 16), strict=True)
    ]
    return network, agreement


def test_buckets_are_sent_while_the_last_shards_backward_goes_on(events: list[Any]) -> None:
    network, agreement = layers_on_one_worker(events)
    for i in range(SHARDS):
        agreement.activate(i)
        for last in (False, True):  # micro-batches
            agreement.backward(network.loss(), 6, last)
        events.append("ended")
    agreement.commit(1)
    assert events == [
        *(["first layer", "first layer", "ended"] * 2),
        *["first layer"],  # a micro-batch that is not the last
        *[0, 1, 2, 3, "first layer", 4, "ended", 5],  # the last bucket waits for the check
    ]


def test_a_bucket_without_gradient_holds_up_those_behind_it(events: list[Any]) -> None:
    """Every rank must send in the same order, whatever its gradients depend on."""
    network, agreement = layers_on_one_worker(events)
    for i in range(SHARDS):
        agreement.activate(i)
        agreement.backward(network.loss(use_last=i + 1 < SHARDS), 6, True)
        events.append("ended")
    agreement.commit(1)
    assert events == [*(["first layer", "ended"] * SHARDS), 0, 1, 2, 3, 4, 5]


class Roots(nn.Module):
    """The gradient of `second` is infinite where its square root is of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(3))
        self.second = nn.Parameter(torch.ones(3))
        self.third = nn.Parameter(torch.ones(3))

    def losses(self, bad: str) -> list[tuple[torch.Tensor, int]]:
        zero = self.second.detach() if bad == "gradient" else 0
        loss = (self.first + self.third.square()).sum() + (self.second - zero).sqrt().sum()
        return [(loss * (math.nan if bad == "loss" else 0.1), 4)]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("bad", "parameter", "loss"), [("gradient", "second", r"\d\.\d+"), ("loss", "first", "nan")]
)
def test_divergence_is_named_and_nobody_commits_the_step(
    bad: str, parameter: str, loss: str, workers: int
) -> None:
    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        return network.losses(bad if (step, shard) == (2, 1) else "")  # type: ignore[no-any-return]

    (one_step,) = train(Roots(), losses, 1, steps=1)
    ranks = train(Roots(), losses, workers)
    owner = next(r for r, own in enumerate(tree.assign(SHARDS, workers)) if 1 in own)
    with pytest.raises(
        Diverged,
        match=f"shard 1 on rank {owner}: the loss is {loss}; the first parameter whose gradient is "
        f"not finite is {parameter}",
    ):
        raise ranks[owner].error or AssertionError("no error")
    for rank in ranks:
        assert isinstance(rank.error, Diverged if rank is ranks[owner] else TransportError)
        assert len(rank.outcomes) == 1
        assert_same_bits(rank.parameters, one_step.parameters)
    for rank in train(Roots(), lambda n, step, shard: n.losses(""), workers):
        assert rank.error is None
        with pytest.raises(AssertionError):
            assert_same_bits(rank.parameters, one_step.parameters)


def test_a_shard_that_diverges_between_averagings_makes_no_step() -> None:
    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        return network.losses("loss" if (step, shard) == (2, 1) else "")  # type: ignore[no-any-return]

    ranks = train(Roots(), losses, 3, every=3)
    for rank in ranks:
        assert isinstance(rank.error, Diverged if rank is ranks[1] else TransportError)
    (after_one,) = train(Roots(), losses, 1, steps=1, every=2)
    assert torch.equal(ranks[1].parameters["first"], after_one.agreement.parameters_of(1)[0])
    assert not torch.equal(ranks[0].parameters["first"], ranks[1].parameters["first"])


ADAM = partial(torch.optim.Adam, lr=0.1)
ADAGRAD = partial(torch.optim.Adagrad, lr=0.1)


@pytest.mark.parametrize("optimizer", [SGD, ADAM, ADAGRAD], ids=["momentum", "adam", "adagrad"])
@pytest.mark.parametrize("average_state", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_shard_without_examples_adopts_the_mean(
    optimizer: Any, average_state: bool, workers: int
) -> None:
    """Shards 0 and 2 work; shard 1 does not until the first averaging is over."""

    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        return [] if shard == 1 and step <= 2 else losses_of(network, step, shard)

    options: Any = {"optimizer": optimizer, "every": 2, "average_state": average_state}
    ranks = train(Branches(), losses, workers, steps=2, **options)
    shards = [(rank, i) for rank in ranks for i in range(SHARDS // workers)]
    data = [parameters_of(rank, i) for rank, i in shards]
    states = [state_of(rank, i) for rank, i in shards]
    assert all(rank.agreement.agreed is average_state for rank in ranks)
    for shard in (1, 2):
        assert_same_bits(data[shard], data[0])
        if average_state:
            assert_same_bits(states[shard], states[0])
    assert states[0]
    if not average_state:
        with pytest.raises(AssertionError):
            assert_same_bits(states[2], states[0])
        if optimizer is not ADAGRAD:  # which has its state from the beginning
            assert states[1] == {}
    # It goes on from there, with a first step of its own.
    (longer,) = train(Branches(), losses, 1, steps=3, **options)
    with pytest.raises(AssertionError, match=r"stem\.weight: 16 of 16"):
        assert_same_bits(parameters_of(longer, 1), data[1])
    if optimizer is ADAM:
        assert state_of(longer, 1)["stem.weight/step"].item() == (3 if average_state else 1)


def parameters_of(rank: Rank, i: int) -> dict[str, torch.Tensor]:
    """The i-th own shard's parameters."""
    names = [name for name, _ in rank.network.named_parameters() if name != "nothing"]
    found = [p for p in rank.agreement.parameters_of(i) if p.numel()]
    return {name: p.clone() for name, p in zip(names, found, strict=True)}


def state_of(rank: Rank, i: int) -> dict[str, torch.Tensor]:
    """The i-th own shard's optimizer state."""
    assert isinstance(rank.agreement, AveragingAgreement)
    state = rank.agreement.state_of(i)
    return {
        f"{name}/{key}": value.clone()
        for name, p in rank.network.named_parameters()
        for key, value in state.get(p, {}).items()
        if p.numel()
    }


def test_averaging_weighs_by_examples() -> None:
    """Shard s moves the weight to -(s + 1) with s + 1 examples; the second has none."""

    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        return [] if shard == 1 else [(network.weight.sum() * (shard + 1), shard + 1)]

    template = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(template.weight)
    for workers in (1, 2, 3):
        for rank in train(
            template, losses, workers, steps=1, every=1, optimizer=partial(torch.optim.SGD, lr=1.0)
        ):
            assert rank.parameters["weight"].item() == -(1 * 1 + 3 * 3) / (1 + 3)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("every", [None, 1, 2])
def test_zero_grad_between_batches_does_no_harm(every: int | None, set_to_none: bool) -> None:
    """As loops written elsewhere call it, before each backward."""
    (expected,) = train(MicroBatches(), losses_of, 1, every=every)

    def work(group: Group) -> Rank:
        network = MicroBatches()
        optimizer = SGD(network.parameters())
        agreement = agreement_on(group, network, optimizer, every=every)
        for step in range(1, 4):
            for i in range(SHARDS):
                agreement.activate(i)
                parts = len(network.losses(step, i))
                for n in range(parts):
                    optimizer.zero_grad(set_to_none)
                    loss, examples = network.losses(step, i)[n]
                    agreement.backward(loss, examples, n + 1 == parts)
                    optimizer.zero_grad(set_to_none)
                if not parts:
                    agreement.skip()
            agreement.commit(step)
        return Rank(network, optimizer, agreement)

    (found,) = in_threads(1, work)
    assert_same_bits(found.parameters, expected.parameters)


@pytest.mark.parametrize(
    ("clip", "wanted"),
    [(Clip(norm=1.0), [0.6, 0.8]), (Clip(value=3.5), [3.0, 3.5]), (Clip(norm=9.0), [3.0, 4.0])],
)
@pytest.mark.parametrize("every", [None, 1])
def test_gradients_are_clipped_over_all_parameters(
    clip: Clip, wanted: list[float], every: int | None
) -> None:
    """The gradient is (3, 4), in parameters of two dtypes."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(1))
            self.b = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        return [((3 * network.a + 4 * network.b).sum(), 2)]

    optimizer = partial(torch.optim.SGD, lr=1.0)
    for rank in train(Two(), losses, 2, steps=1, optimizer=optimizer, every=every, clip=clip):
        assert [-p.item() for p in rank.parameters.values()] == pytest.approx(wanted, rel=1e-5)


class Recurrent(nn.Module):
    """Keeps its parameters in a list of its own as well; the last layer uses the first's weight,
    without calling it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 4, dtype=torch.float64)
        self.lstm = nn.LSTM(4, 4, dtype=torch.float64)
        self.scale = nn.ParameterList([torch.ones(4, dtype=torch.float64)])

    def losses(self, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        x = self.lstm(numbers(step, shard))[0] * self.scale[0]
        x = nn.functional.linear(x, self.embed.weight, self.embed.bias)
        return [(self.embed(x).square().mean(), 6)]


OPTIMIZERS = {
    "sgd": SGD,
    "adamw": partial(torch.optim.AdamW, lr=0.1, amsgrad=True),
    "adagrad, fused": partial(torch.optim.Adagrad, lr=0.1, fused=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [*NETWORKS, Recurrent])
def test_an_exchange_that_goes_on_into_forward_changes_no_bit(
    kind: Callable[[], nn.Module], name: str
) -> None:
    template, optimizer = kind(), OPTIMIZERS[name]
    options: Any = {"steps": 6, "optimizer": optimizer, "clip": Clip(value=0.05)}
    (alone,) = train(template, losses_of, 1, **options)
    for workers in (1, 2, 3):
        for rank in train(template, losses_of, workers, into_forward=True, **options):
            assert rank.error is None
            assert_same_bits(rank.parameters, alone.parameters)
            assert_same_bits(state(rank), state(alone))
            assert rank.outcomes[-1] == alone.outcomes[-1]


def state(rank: Rank) -> dict[str, torch.Tensor]:
    states = rank.optimizer.state_dict()["state"]
    return {f"{n}/{k}": v for n, each in states.items() for k, v in each.items() if v is not None}


class OneLayer(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(4, 2, dtype=torch.float64)

    def losses(self, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        return [(self(numbers(step, shard)).square().mean(), 6)]


def test_unwatched_parameters_are_read_before_they_are_updated() -> None:
    """The negative control of the test above. Of most, autograd notices it."""
    options: Any = {"steps": 4, "into_forward": True, "watched": False}
    for kind in (Branches, Recurrent):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            train(kind(), losses_of, 1, **options)
    (alone,) = train(OneLayer(), losses_of, 1, steps=4)
    (watched,) = train(OneLayer(), losses_of, 1, steps=4, into_forward=True)
    assert_same_bits(watched.parameters, alone.parameters)
    (unwatched,) = train(OneLayer(), losses_of, 1, **options)
    with pytest.raises(AssertionError):
        assert_same_bits(unwatched.parameters, alone.parameters)


def test_only_what_is_read_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Layers([])
    finished: list[int] = []
    finish = ShardSum.finish

    def spied(self: ShardSum, bucket: int) -> None:
        finished.append(bucket)
        finish(self, bucket)

    monkeypatch.setattr(ShardSum, "finish", spied)

    def make(group: Group) -> Agreement:
        return agreement_on(group, network, SGD(network.parameters()), into_forward=True)

    (agreement,) = in_threads(1, make)
    for i in range(SHARDS):
        agreement.activate(i)
        agreement.backward(network.loss(), 6, True)
    agreement.commit(1)
    assert set(finished) == {5}  # the first layer's weight, which backward comes to last
    network.layers[1].weight.sum()
    assert set(finished) == {5, 3}
    network.layers[0](numbers(1))
    assert set(finished) == {5, 3, 4}
    network.layers.state_dict()
    assert set(finished) == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_a_copy_of_a_watched_network_is_an_ordinary_one(copied: Callable[[Any], Any]) -> None:
    asked: list[nn.Parameter] = []
    network = OneLayer()
    watch(network, SGD(network.parameters()), list(network.parameters()), asked.append)
    other = copied(network)
    assert {id(p) for p in asked} == {id(network.weight), id(network.bias)}
    asked.clear()
    assert type(other._parameters) is dict
    other(numbers(1))
    assert not asked
    assert_same_bits(other.state_dict(), network.state_dict())
    assert asked


OBSTACLES: dict[str, Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer, Clip]]] = {
    "norm": lambda n: (n, SGD(n.parameters()), Clip(norm=1.0)),
    "LBFGS": lambda n: (n, torch.optim.LBFGS(n.parameters()), Clip()),
    "lr is a tensor": lambda n: (n, SGD(n.parameters(), lr=torch.tensor(0.1)), Clip()),
    "compiled": lambda n: (torch.jit.script(n), SGD(n.parameters()), Clip()),
    "hooks": lambda n: (n, hooked(n), Clip()),
    "the network has not": lambda n: (
        n,
        SGD([*n.parameters(), nn.Parameter(torch.ones(1))]),
        Clip(),
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("words", OBSTACLES)
def test_what_cannot_be_updated_one_by_one_is_not(words: str) -> None:
    assert re.search(words, str(obstacle(*OBSTACLES[words](nn.Linear(2, 2)))))
    network = nn.Linear(2, 2)
    assert obstacle(network, SGD(network.parameters()), Clip(value=1.0)) is None


def hooked(network: nn.Module) -> torch.optim.Optimizer:
    optimizer = SGD(network.parameters())
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


class Busy(nn.Module):
    """Reads its parameters in the middle of all sorts of things, and keeps its children's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))
        self.kept: list[nn.Parameter] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.kept:
            self.kept += [self.a.bias, self.b.bias]
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)) + sum(self.kept))))

    def in_inference(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            self(x)
        return self(x).square().mean()

    def in_a_transform(self, x: torch.Tensor) -> torch.Tensor:
        slope = torch.func.jacrev(lambda one: self(one).sum())(x[0])
        return self(x).square().mean() + slope.square().sum()

    def copied(self, x: torch.Tensor) -> torch.Tensor:
        weights = dict(self.b._parameters) | {**self.c._parameters}
        return self(x).square().mean() + weights["bias"].square().sum()  # type: ignore[union-attr]

    def attacked(self, x: torch.Tensor) -> torch.Tensor:
        """By a backward of the loop's own (FGSM), whose gradients are not the step's."""
        near = x.clone().requires_grad_()
        self(near).square().mean().backward()
        self.zero_grad()
        assert near.grad is not None
        return self(x + 0.1 * near.grad.sign()).square().mean()


@pytest.mark.parametrize("what", ["in_inference", "in_a_transform", "copied", "attacked"])
def test_a_parameter_may_be_read_in_the_middle_of_anything(what: str) -> None:
    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        return [(getattr(network, what)(numbers(step, shard)), 6)]

    options: Any = {"steps": 4, "optimizer": partial(torch.optim.Adam, lr=0.1)}
    template = Busy()
    (alone,) = train(template, losses, 1, **options)
    for rank in train(template, losses, 2, into_forward=True, **options):
        assert_same_bits(rank.parameters, alone.parameters)


def test_in_autocast_an_update_is_as_outside() -> None:
    """Adafactor multiplies matrices."""

    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        with torch.autocast("cpu", torch.bfloat16):
            return [(network(numbers(step, shard).float()).float().square().mean(), 6)]

    torch.manual_seed(0)
    template = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    options: Any = {"steps": 4, "optimizer": partial(torch.optim.Adafactor, lr=0.1)}
    (alone,) = train(template, losses, 1, **options)
    (late,) = train(template, losses, 1, into_forward=True, **options)
    assert_same_bits(late.parameters, alone.parameters)


def test_what_wants_one_update_for_all_gets_it() -> None:
    """Hooks of the optimizer, and groups that are added, after training has begun."""
    stepped = []

    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        if step == 2 and shard == 0:
            optimizer = optimizers[-1]
            optimizer.state_dict()  # waits for what is under way
            optimizer.register_step_post_hook(lambda *_: stepped.append(step))
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        if step == 3:
            steps = [s["step"].item() for s in optimizers[-1].state_dict()["state"].values()]
            assert set(steps) == {2.0}
        return losses_of(network, step, shard)

    optimizers: list[torch.optim.Optimizer] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.Adam(parameters, lr=0.1))
        return optimizers[-1]

    (alone,) = train(Branches(), losses, 1, optimizer=make, steps=4)
    expected = len(stepped)
    assert expected == 3
    (late,) = train(Branches(), losses, 1, optimizer=make, steps=4, into_forward=True)
    assert len(stepped) == 2 * expected
    assert_same_bits(late.parameters, alone.parameters)


def test_the_optimizers_state_is_that_of_one_step() -> None:
    """state_dict waits for all parameters."""

    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        if shard == 0:
            states = optimizers[-1].state_dict()["state"].values()
            assert {state["step"].item() for state in states} == ({step - 1} if step > 1 else set())
        return losses_of(network, step, shard)

    optimizers: list[torch.optim.Optimizer] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.Adam(parameters, lr=0.1))
        return optimizers[-1]

    train(Branches(), losses, 1, optimizer=make, steps=4, into_forward=True)


def test_gradient_that_comes_after_its_bucket_was_sent_is_not_lost_in_silence() -> None:
    """A layer used twice, in reentrant checkpoints, gets its gradient in two parts."""

    def losses(network: Any, step: int, shard: int) -> list[tuple[torch.Tensor, int]]:
        x = network[0](numbers(step, shard))
        for _ in range(2):
            x = checkpoint(network[1], x, use_reentrant=True)
        return [(network[2](x).square().mean(), 6)]

    torch.manual_seed(0)
    template = nn.Sequential(*(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)))
    with pytest.raises(RuntimeError, match=r"parameter 1\.\w+ got more gradient after it seemed"):
        train(template, losses, 1)
    (whole,) = train(template, losses, 1, bucket_bytes=10**6)
    assert_close(whole.parameters, plain(template, losses), 1e-13)
