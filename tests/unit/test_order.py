"""The order in which buckets are sent, where the next forward need not wait for all."""

from __future__ import annotations

import itertools

import pytest

from penstock.exchange.order import sending_order


def forward_waits_s(order: list[int], ready_s: list[float], takes_s: list[float]) -> float:
    """When the last layer's forward may begin, if each layer's takes a tenth of a second."""
    now_s, there_s = 0.0, {}
    for bucket in order:
        now_s = there_s[bucket] = max(now_s, ready_s[bucket]) + takes_s[bucket]
    forward_s = 0.0
    for bucket in reversed(range(len(order))):
        forward_s = max(forward_s, there_s[bucket]) + 0.1
    return forward_s


def test_a_slow_line_sends_the_first_layers_first() -> None:
    ready_s = [0.1, 0.2, 0.3, 0.4]
    assert sending_order(ready_s, [1.0] * 4) == [0, 3, 2, 1]
    assert sending_order(ready_s, [None] * 4) == [0, 3, 2, 1]


def test_a_fast_line_sends_them_as_they_come() -> None:
    assert sending_order([0.1, 0.2, 0.3, 0.4], [0.05] * 4) == [0, 1, 2, 3]


def test_between_them_the_line_is_never_idle() -> None:
    ready_s = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert sending_order(ready_s, [1.5] * 6) == [0, 1, 3, 4, 5, 2]
    assert sending_order([], []) == []


@pytest.mark.parametrize("takes_s", [0.1, 0.5, 2.0])
def test_no_order_is_much_better(takes_s: float) -> None:
    ready_s = [0.2, 0.4, 0.6, 0.8, 1.0]
    takes = [takes_s, 3 * takes_s, takes_s, 0.5 * takes_s, takes_s]
    ours = forward_waits_s(sending_order(ready_s, takes), ready_s, takes)
    every = [
        forward_waits_s(list(order), ready_s, takes) for order in itertools.permutations(range(5))
    ]
    assert ours <= 1.1 * min(every)
