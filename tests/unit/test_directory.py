"""Who reads what and who must have it: messages, losses, doubles, and random lives of agents."""

from __future__ import annotations

import random
from typing import Any

import pytest

from penstock.cluster.directory import Directory, Told

OWNERS = (0, 0, 1, 1)
"""Four shards of two ranks."""
PARTITIONS = {"train": (0, 1, 2, 3, 4, 6), "test": (0, 1, 2, 3)}


@pytest.fixture
def directory() -> Directory:
    return Directory(OWNERS, PARTITIONS)


def serving(agent: int) -> dict[str, Any]:
    return {"address": ["127.0.0.1", agent], "folder": f"/folder-{agent}", "nonce": f"n{agent}"}


def join(directory: Directory, agent: int, rank: int) -> Told:
    told = directory.joined(agent, rank)
    assert directory.heard(agent, {"event": "serving", **serving(agent)}) == []
    return told


def reads(directory: Directory, agent: int, source: int, partition: int) -> Told:
    return directory.heard(agent, {"event": "reading", "source": source, "partition": partition})


def sums(directory: Directory, agent: int, partition: int, of: str, value: str) -> None:
    told = {"event": "sum", "source": 0, "partition": partition, "of": of, "sum": value}
    assert directory.heard(agent, told) == []


def take(source: int, partition: int, agent: int) -> dict[str, Any]:
    return {"do": "take", "source": source, "partition": partition, **serving(agent)}


def drop(source: int, partition: int) -> dict[str, Any]:
    return {"do": "drop", "source": source, "partition": partition}


def test_an_owner_takes_what_another_reads(directory: Directory) -> None:
    assert join(directory, 10, 0) == join(directory, 11, 1) == []
    assert reads(directory, 10, 0, 0) == []  # rank 0's own
    assert reads(directory, 10, 0, 2) == [(11, take(0, 2, 10))]
    assert reads(directory, 11, 0, 4) == [(10, take(0, 4, 11))]
    assert reads(directory, 11, 1, 3) == []
    directory.validate()


def test_one_that_comes_later_is_told_what_is_known(directory: Directory) -> None:
    join(directory, 10, 0)
    for partition in (0, 2, 6):
        assert reads(directory, 10, 0, partition) == []
    assert join(directory, 11, 1) == [(11, take(0, 2, 10)), (11, take(0, 6, 10))]


def test_what_nobody_reads_has_no_rows(directory: Directory) -> None:
    join(directory, 10, 0)
    join(directory, 11, 1)
    for partition in (0, 2):
        reads(directory, 10, 0, partition)
    reads(directory, 11, 1, 3)
    assert directory.heard(10, {"event": "read"}) == []
    assert not directory.all_read
    told = directory.heard(11, {"event": "read"})
    assert directory.all_read
    assert told == [
        (10, {"do": "empty", "source": 0, "partitions": [1, 4]}),
        (10, {"do": "empty", "source": 1, "partitions": [0, 1]}),
        (11, {"do": "empty", "source": 0, "partitions": [3, 6]}),
        (11, {"do": "empty", "source": 1, "partitions": [2]}),
    ]
    directory.gone(11)
    assert join(directory, 12, 1) == [(12, take(0, 2, 10)), *told_to(told, 11, 12)]


def told_to(told: Told, agent: int, other: int) -> Told:
    """What an agent was told, as another would be."""
    return [(other, message) for to, message in told if to == agent]


def test_what_was_read_is_lost_with_its_reader_and_comes_again(directory: Directory) -> None:
    join(directory, 10, 0)
    join(directory, 11, 1)
    reads(directory, 10, 0, 2)
    reads(directory, 10, 0, 0)
    sums(directory, 10, 2, "first rows", "1a")
    assert directory.gone(10) == [(11, drop(0, 2))]
    assert directory.gone(10) == []
    assert join(directory, 12, 0) == []
    assert reads(directory, 12, 0, 2) == [(11, take(0, 2, 12))]
    sums(directory, 12, 2, "first rows", "1a")
    sums(directory, 12, 2, "rows", "9 2b")
    assert directory.conflicts == []
    directory.gone(12)
    join(directory, 13, 0)
    reads(directory, 13, 0, 2)
    sums(directory, 13, 2, "first rows", "1a")
    assert directory.conflicts == []
    sums(directory, 13, 2, "rows", "9 3c")
    ((agent, error),) = directory.conflicts
    assert agent == 13
    assert "train: partition 2 was read again, by rank 0" in error.message
    assert "the checksum of its rows is 9 3c: expected 9 2b" in error.message
    assert "sortWithinPartitions" in error.hint


def test_a_double_is_taken_from_when_the_first_is_lost(directory: Directory) -> None:
    join(directory, 10, 0)
    join(directory, 11, 1)
    join(directory, 12, 0)  # stands by
    assert reads(directory, 10, 0, 2) == [(11, take(0, 2, 10))]
    assert reads(directory, 12, 0, 2) == []
    sums(directory, 10, 2, "first rows", "1a")
    sums(directory, 12, 2, "first rows", "2b")  # of no account as long as nobody takes it
    assert directory.conflicts == []
    assert directory.gone(10) == [(11, take(0, 2, 12))]
    ((agent, _),) = directory.conflicts
    assert agent == 12


def test_a_double_of_an_owner_takes_as_well_what_its_rank_does_not_read(
    directory: Directory,
) -> None:
    join(directory, 10, 0)
    join(directory, 11, 1)
    reads(directory, 10, 0, 2)
    assert reads(directory, 11, 0, 3) == []
    assert join(directory, 12, 1) == [(12, take(0, 2, 10))]
    assert reads(directory, 12, 0, 3) == []
    assert directory.gone(11) == directory.gone(12) == []


def test_agents_that_all_come_anew_read_all_anew(directory: Directory) -> None:
    join(directory, 10, 0)
    directory.heard(10, {"event": "read"})
    directory.gone(10)
    directory.again()
    join(directory, 11, 1)
    assert directory.heard(11, {"event": "read"}) == []
    assert not directory.all_read


def test_who_is_not_there_is_not_heard(directory: Directory) -> None:
    assert reads(directory, 10, 0, 2) == []
    join(directory, 11, 1)
    assert told_to(join(directory, 12, 1), 12, 12) == []


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_owners_have_what_is_there(seed: int) -> None:
    live(Directory(OWNERS, PARTITIONS), seed)


class Forgetful(Directory):
    """Does not tell that who provided something is gone."""

    def gone(self, agent: int) -> Told:
        super().gone(agent)
        return []


def test_a_directory_that_forgets_is_found_out() -> None:
    def all_lives() -> None:
        for seed in range(60):
            live(Forgetful(OWNERS, PARTITIONS), seed)

    with pytest.raises(AssertionError):
        all_lives()


def live(directory: Directory, seed: int) -> None:
    """Messages are carried out by a model of agents; readers come, read, double, and are lost."""
    chance = random.Random(seed)
    given = {
        rank: [key for key in all_keys() if chance.random() < 0.9 and key[1] % 2 == rank]
        for rank in (0, 1)
    }
    agents: dict[int, Model] = {}

    def carry_out(told: Told) -> None:
        for agent, message in told:
            agents[agent].do(message)

    for number in range(120):
        directory.validate()
        act = chance.random()
        ranks = [model.rank for model in agents.values()]
        if (act < 0.15 and len(agents) < 4) or not agents:
            rank = chance.randrange(2)
            agents[number] = Model(number, rank, list(given[rank]))
            carry_out(join(directory, number, rank))
        elif act < 0.25:
            agent = chance.choice(list(agents))
            del agents[agent]
            carry_out(directory.gone(agent))
        else:
            agent = chance.choice(list(agents))
            carry_out(agents[agent].step(directory))
        assert len(ranks) <= 4
    for rank in (0, 1):
        if rank not in [model.rank for model in agents.values()]:
            agents[1000 + rank] = Model(1000 + rank, rank, list(given[rank]))
            carry_out(join(directory, 1000 + rank, rank))
    for agent in list(agents):
        while agents[agent].todo is not None:
            carry_out(agents[agent].step(directory))
    directory.validate()
    filled = {key for keys in given.values() for key in keys}
    for model in agents.values():
        own = {key for key in all_keys() if OWNERS[key[1] % 4] == model.rank}
        assert model.has() == own & filled
        assert model.empty == own - filled
        assert set(model.taken.values()) <= set(agents)
    assert directory.conflicts == []


def all_keys() -> list[tuple[int, int]]:
    return [(s, p) for s, some in enumerate(PARTITIONS.values()) for p in some]


class Model:
    """An agent as the directory sees it."""

    def __init__(self, number: int, rank: int, given: list[tuple[int, int]]) -> None:
        self.number, self.rank = number, rank
        self.todo: list[tuple[int, int]] | None = given
        self.read: set[tuple[int, int]] = set()
        self.taken: dict[tuple[int, int], int] = {}
        self.empty: set[tuple[int, int]] = set()

    def step(self, directory: Directory) -> Told:
        if self.todo is None:
            return []
        if not self.todo:
            self.todo = None
            return directory.heard(self.number, {"event": "read"})
        key = self.todo.pop(0)
        self.read.add(key)
        return reads(directory, self.number, *key)

    def do(self, message: dict[str, Any]) -> None:
        if message["do"] == "empty":
            self.empty |= {(message["source"], p) for p in message["partitions"]}
            return
        key = message["source"], message["partition"]
        assert OWNERS[key[1] % 4] == self.rank
        if message["do"] == "take":
            self.taken[key] = int(message["nonce"][1:])
        else:
            self.taken.pop(key, None)

    def has(self) -> set[tuple[int, int]]:
        own = {key for key in self.read if OWNERS[key[1] % 4] == self.rank}
        return own | set(self.taken)
