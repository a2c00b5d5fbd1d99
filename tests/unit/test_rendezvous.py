"""Keys by which workers find each other: kept by the driver, waited for with a deadline."""

from __future__ import annotations

import datetime
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock.cluster.channel import Channel, Message
from penstock.cluster.coordinator import Coordinator
from penstock.errors import TransportError
from penstock.runtime.rendezvous import Keys, Rendezvous, interface_of
from penstock.token import new_token

Sent = list[tuple[int, Message]]


# The driver's end


def put(key: str, value: str) -> Message:
    return {"event": "set", "key": key, "value": value}


def get(key: str) -> Message:
    return {"event": "get", "key": key}


def answer(key: str, value: str) -> Message:
    return {"do": "set", "key": key, "value": value}


def test_set_before_get() -> None:
    keys = Keys()
    assert keys.take(1, put("a", "x")) == []
    assert keys.take(2, get("a")) == [(2, answer("a", "x"))]
    assert keys.take(1, get("a")) == [(1, answer("a", "x"))]


def test_get_before_set() -> None:
    keys = Keys()
    assert keys.take(2, get("a")) == []
    assert keys.take(1, put("b", "y")) == []
    assert keys.take(1, put("a", "x")) == [(2, answer("a", "x"))]
    assert keys.take(1, put("a", "again")) == []  # who has been told is not told again


def test_several_wait_for_one_key() -> None:
    keys = Keys()
    assert [keys.take(peer, get("a")) for peer in (3, 1, 2)] == [[], [], []]
    assert keys.take(0, put("a", "x")) == [(peer, answer("a", "x")) for peer in (3, 1, 2)]


@pytest.mark.parametrize("order", list(itertools.permutations("SGg")))
def test_in_every_order_each_is_told_once(order: tuple[str, ...]) -> None:
    events = {"S": (0, put("a", "x")), "G": (1, get("a")), "g": (2, get("a"))}
    keys = Keys()
    sent: Sent = []
    for each in order:
        sent += keys.take(*events[each])
    assert sorted(peer for peer, _ in sent) == [1, 2]
    assert all(message == answer("a", "x") for _, message in sent)


# Both ends, over sockets


class Driver:
    """A coordinator in a thread of its own, which keeps the keys of those that join it."""

    def __init__(self) -> None:
        self.token = new_token()
        self.coordinator = Coordinator(self.token)
        self.keys = Keys()
        self.say: list[Message] = []
        """Goes to all before each answer."""
        self._channels: list[Channel] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def rendezvous(self, rank: int, timeout_s: float = 10.0) -> Rendezvous:
        hello = {"role": "worker", "rank": rank}
        channel = Channel(self.coordinator.address, self.token, hello)
        self._channels.append(channel)
        return Rendezvous(channel, timeout_s)

    def end(self) -> None:
        self._over.set()
        self._thread.join(5)
        assert not self._thread.is_alive()
        self.coordinator.close()

    def close(self) -> None:
        self.end()
        for channel in self._channels:
            channel.close()

    def _serve(self) -> None:
        while not self._over.wait(0.001):
            for peer, message in self.coordinator.poll():
                if message is None or message is peer.hello:
                    continue
                for number, told in self.keys.take(peer.number, message):
                    for other in self.say:
                        self.coordinator.send_all("worker", other)
                    self.coordinator.send(number, told)


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    made.close()


@pytest.mark.parametrize("value", [b"\x00\xff any bytes", b"", "words"])
def test_a_value_arrives_as_it_was_set(driver: Driver, value: bytes | str) -> None:
    one, two = driver.rendezvous(0), driver.rendezvous(1)
    one.set("a", value)
    assert two.get("a") == (value.encode() if isinstance(value, str) else value)
    assert one.get("a") == two.get("a")


def test_a_key_is_waited_for(driver: Driver) -> None:
    one, two = driver.rendezvous(0), driver.rendezvous(1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(two.get, "late")
        time.sleep(0.1)
        assert not waiting.done()
        one.set("late", b"here")
        assert waiting.result(5) == b"here"


def test_several_keys_are_waited_for_together(driver: Driver) -> None:
    one, two = driver.rendezvous(0), driver.rendezvous(1)
    one.set("a", b"1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(two.wait, ["a", "b"])
        time.sleep(0.1)
        assert not waiting.done()
        one.set("b", b"2")
        assert waiting.result(5) is None
    assert two.check(["a", "b"])
    assert not two.check(["a", "c"])


def test_a_key_that_nobody_sets_is_named(driver: Driver) -> None:
    alone = driver.rendezvous(0, timeout_s=0.3)
    alone.set("a", b"1")
    for ask in (lambda: alone.get("b"), lambda: alone.wait(["a", "b"])):
        began = time.monotonic()
        with pytest.raises(TransportError, match=r"within 0\.3 s: nobody has set b\n") as caught:
            ask()
        assert 0.3 <= time.monotonic() - began < 3
        assert caught.value.hint
    with pytest.raises(TransportError, match=r"within 0\.1 s: nobody has set c\n"):
        alone.wait(["c"], datetime.timedelta(seconds=0.1))
    assert alone.get("a") == b"1"


def test_a_driver_that_ends_is_noticed_before_the_deadline(driver: Driver) -> None:
    waiting = driver.rendezvous(0, timeout_s=60)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(waiting.get, "a")
        time.sleep(0.1)
        driver.end()
        with pytest.raises(TransportError, match="the driver is gone"):
            asked.result(5)


def test_what_else_the_driver_says_meanwhile_is_kept(driver: Driver) -> None:
    one, two = driver.rendezvous(0), driver.rendezvous(1)
    driver.say.append({"do": "stop"})
    one.set("a", b"1")
    assert two.get("a") == b"1"
    assert two.instructions == [{"do": "stop"}]
    assert two.get("a") == b"1"  # known by now: nobody is asked
    assert two.instructions == [{"do": "stop"}]


# As torch uses it


def in_threads(rendezvous: list[Rendezvous], function: Callable[[Any, int], Any]) -> list[Any]:
    """Calls a function with each rank's gloo group, formed through its rendezvous."""

    def call(rank: int) -> Any:
        store = dist.PrefixStore("group", rendezvous[rank])
        timeout = datetime.timedelta(seconds=10)
        return function(dist.ProcessGroupGloo(store, rank, len(rendezvous), timeout), rank)

    with ThreadPoolExecutor(len(rendezvous)) as pool:
        return list(pool.map(call, range(len(rendezvous)), timeout=30))


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_group_forms(driver: Driver, ranks: int) -> None:
    def add(group: Any, rank: int) -> list[float]:
        tensor = torch.tensor([1.0, 10.0**rank])
        group.allreduce([tensor]).wait()
        return tensor.tolist()

    stores = [driver.rendezvous(rank) for rank in range(ranks)]
    assert in_threads(stores, add) == [[ranks, sum(10.0**r for r in range(ranks))]] * ranks


def test_a_group_that_lacks_a_rank_says_so(driver: Driver) -> None:
    """Of three ranks one does not come: the others end, and name what they waited for."""
    stores = [driver.rendezvous(rank, timeout_s=0.5) for rank in range(2)]

    def form(rank: int) -> None:
        store = dist.PrefixStore("group", stores[rank])
        dist.ProcessGroupGloo(store, rank, 3, datetime.timedelta(seconds=0.5))

    with ThreadPoolExecutor(2) as pool:
        formed = [pool.submit(form, rank) for rank in range(2)]
        for each in formed:
            with pytest.raises(TransportError, match=r"nobody has set group/.*2"):
                each.result(20)


# Interfaces


def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"


@pytest.mark.parametrize("address", ["192.0.2.1", "::1", "no address", ""])
def test_an_address_that_is_not_of_this_machine(address: str) -> None:
    assert interface_of(address) is None
