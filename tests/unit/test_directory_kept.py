"""What an earlier run has read: found by agents that come, or lacking; over random lives of them.

An agent finds on its host what no other has found there before it. Nobody is given the rest to
read, until all come anew.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_directory import OWNERS, PARTITIONS, drop, join, reads, serving, sums, take

from penstock.cluster.directory import Directory, Told

FILLED = [(0, 0), (0, 2), (0, 3), (0, 6)]
"""Of the first source; the second is read."""
KEPT = {"event": "kept"}


@pytest.fixture
def directory() -> Directory:
    return Directory(OWNERS, PARTITIONS, FILLED)


def test_what_is_found_is_taken_and_nothing_lacks(directory: Directory) -> None:
    join(directory, 10, 0)
    for _, partition in FILLED[:2]:
        assert reads(directory, 10, 0, partition) == []
    assert directory.heard(10, KEPT) == []
    assert not directory.looked
    assert not directory.lacks  # that is not known before the other has looked
    assert join(directory, 11, 1) == [(11, take(0, 2, 10))]
    assert reads(directory, 11, 0, 3) == []
    assert reads(directory, 11, 0, 6) == []
    directory.heard(11, KEPT)
    assert directory.looked
    assert not directory.lacks
    directory.validate()
    assert directory.gone(10) == [(11, drop(0, 2))]
    assert directory.lacks


def test_what_nobody_finds_lacks(directory: Directory) -> None:
    for agent, rank in ((10, 0), (11, 1)):
        join(directory, agent, rank)
        directory.heard(agent, KEPT)
    assert directory.lacks


def test_a_double_takes_what_another_of_its_rank_has_found(directory: Directory) -> None:
    """It was given nothing to read it from, as an attempt of a rank that reads has been."""
    join(directory, 10, 0)
    assert reads(directory, 10, 0, 0) == []
    assert join(directory, 12, 0) == [(12, take(0, 0, 10))]
    assert reads(directory, 12, 0, 2) == []
    assert reads(directory, 12, 0, 0) == []  # kept on its host as well
    sums(directory, 12, 0, "rows", "3 1a")
    join(directory, 11, 1)
    directory.gone(10)
    sums(directory, 12, 0, "rows", "3 1a")
    for agent in (11, 12):
        directory.heard(agent, KEPT)
    assert directory.lacks  # who was told to take it has it no longer


def test_those_who_come_anew_read_what_was_kept(directory: Directory) -> None:
    for agent, rank in ((10, 0), (11, 1)):
        join(directory, agent, rank)
        directory.heard(agent, KEPT)
        directory.heard(agent, {"event": "read"})
    assert directory.lacks
    for agent in (10, 11):
        directory.gone(agent)
    directory.again()
    assert directory.looked
    assert not directory.lacks
    assert not directory.all_read
    directory.validate()
    join(directory, 13, 0)
    join(directory, 14, 1)
    assert reads(directory, 13, 0, 2) == [(14, take(0, 2, 13))]
    directory.heard(13, {"event": "read"})
    told = directory.heard(14, {"event": "read"})
    empty = [p for _, message in told if message["source"] == 0 for p in message["partitions"]]
    assert sorted(empty) == [0, 1, 3, 4, 6]  # the data is other now: who trains on it will see


class Agent:
    """An agent as the directory sees it, on a host where something may be kept."""

    def __init__(self, number: int, rank: int, host: list[tuple[int, int]]) -> None:
        self.number, self.rank = number, rank
        self.found, host[:] = list(host), []
        self.todo: list[dict[str, Any]] = [
            {"event": "reading", "source": s, "partition": p} for s, p in self.found
        ]
        self.todo += [KEPT, {"event": "read"}]
        self.taken: dict[tuple[int, int], int] = {}
        self.empty: set[tuple[int, int]] = set()

    def do(self, message: dict[str, Any]) -> None:
        if message["do"] == "empty":
            self.empty |= {(message["source"], p) for p in message["partitions"]}
        elif message["do"] == "take":
            self.taken[message["source"], message["partition"]] = int(message["nonce"][1:])
        else:
            self.taken.pop((message["source"], message["partition"]), None)


def live(kind: type[Directory], seed: int) -> str:
    """Agents come to hosts, look, double and are lost; ends when something lacks, or after a while.

    At every moment at which workers may train, each rank's agents have all that is theirs, from
    agents that are there.
    """
    chance = random.Random(seed)
    kept = [(0, p) for p in PARTITIONS["train"] if chance.random() < 0.7]
    directory = kind(OWNERS, PARTITIONS, kept)
    hosts: list[list[tuple[int, int]]] = [[], [], []]
    for key in kept:
        if chance.random() < 0.99:
            for host in chance.sample(hosts, chance.choice([1, 1, 2])):
                host.append(key)
    agents: dict[int, Agent] = {}
    trained, lost = "never trained", False

    def carry_out(told: Told) -> None:
        for agent, message in told:
            agents[agent].do(message)

    for number in range(80):
        act = chance.random()
        if not agents or (act < 0.2 and len(agents) < 4):
            agents[number] = Agent(number, chance.randrange(2), chance.choice(hosts))
            carry_out(directory.joined(number, agents[number].rank))
            carry_out(directory.heard(number, {"event": "serving", **serving(number)}))
        elif act < 0.23:
            agent = chance.choice(list(agents))
            del agents[agent]
            lost = True
            carry_out(directory.gone(agent))
        else:
            agent = chance.choice(list(agents))
            if agents[agent].todo:
                carry_out(directory.heard(agent, agents[agent].todo.pop(0)))
        directory.validate()
        if directory.lacks:
            found = {key for each in agents.values() for key in each.found}
            assert lost or set(kept) - found or any(each.todo for each in agents.values())
            return "lacks"
        if not directory.looked:
            continue
        trained = "trained"
        for each in agents.values():
            own = {key for key in kept if OWNERS[key[1] % 4] == each.rank}
            told = {(m["source"], m["partition"]) for m in each.todo if m["event"] == "reading"}
            assert own <= set(each.taken) | (set(each.found) - told)
            assert set(each.taken.values()) <= set(agents)
            assert not each.empty & set(kept)
    return trained


def test_whatever_happens_nobody_trains_without_what_was_kept() -> None:
    ends = {live(Directory, seed) for seed in range(400)}
    assert ends == {"lacks", "trained", "never trained"}


class Trusting(Directory):
    """Never misses anything."""

    @property
    def lacks(self) -> bool:
        return False


class Ranked(Directory):
    """Has a rank's agents read for themselves, as where they are given it to read."""

    def _takers(self, key: tuple[int, int]) -> list[int]:
        return [] if self._ranks[key] == self._owner(key) else super()._takers(key)


@pytest.mark.parametrize("kind", [Trusting, Ranked])
def test_one_that_is_wrong_is_found_out(kind: type[Directory]) -> None:
    def all_lives() -> None:
        for seed in range(400):
            live(kind, seed)

    with pytest.raises(AssertionError):
        all_lives()
