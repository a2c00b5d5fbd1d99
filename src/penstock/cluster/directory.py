"""Where every partition of a run's DataFrames lies, and which agents must have it: a pure machine.

An agent reads the partitions that Spark gives it and tells of each at its first row. Partition p of
a source belongs to shard p mod S, so the agents of the rank that carries this shard must have it.
If it is Spark's task of this rank that reads the partition, they do so themselves, each attempt for
itself; else they take it from its provider, the first agent that reads it and is still there. What
agents tell comes in; messages to agents go out:

    agent -> directory   {"event": "serving", "address", "folder", "nonce"}   where it can be taken
                         {"event": "kept"}                      all that it has from before, below
                         {"event": "reading", "source", "partition"}          its first row
                         {"event": "sum", "source", "partition", "of", "sum"} of its rows
                         {"event": "read"}                                    all that it was given
    directory -> agent   {"do": "take", "source", "partition", "address", "folder", "nonce"}
                         {"do": "drop", "source", "partition"}: who had it is gone
                         {"do": "empty", "source", "partitions"}: they have no rows

What an earlier run has read may be kept, and is then not read at all: an agent tells of what it
found as if it had read it, and at the end that this was all. Once agents of all ranks have looked,
each such partition has a provider, or the directory `lacks` it. Then, be it at the beginning or
since a provider is gone, all agents are to come anew and to read everything (`again`): those that
are there were given nothing to read it from.

A partition that is read again, since who read it was lost, must have the same rows in the same
order: of every provider the sums must be those of the one before. Where they are not, an agent is
in `conflicts`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import DataError

Key = tuple[int, int]
"""Source and partition."""
Told = list[tuple[int, dict[str, Any]]]
"""Messages, each with the agent that is to have it."""


@dataclass
class _Agent:
    rank: int
    serves: dict[str, Any] = field(default_factory=dict)
    sums: dict[Key, dict[str, str]] = field(default_factory=dict)


class Directory:
    """What agents have and need.

    Arguments:
        owners: the rank that carries each shard.
        partitions: by name of a source, in their order, the numbers of its partitions.
        kept: those that have rows, and that no agent is given to read as long as they are kept.

    Attributes:
        conflicts: agents that have read a partition again and found other rows, each with the
            error; the caller takes them out.
    """

    def __init__(
        self,
        owners: Sequence[int],
        partitions: Mapping[str, Sequence[int]],
        kept: Collection[Key] = (),
    ) -> None:
        self.conflicts: list[tuple[int, DataError]] = []
        self._owners = owners
        self._names = list(partitions)
        self._keys = {(s, p) for s, some in enumerate(partitions.values()) for p in some}
        self._agents: dict[int, _Agent] = {}
        self._readers: dict[Key, list[int]] = {}  # the first one is the provider
        self._ranks: dict[Key, int] = {}  # of readers
        self._sums: dict[Key, dict[str, str]] = {}  # of providers up to now
        self._read: set[int] = set()  # ranks
        self._looked: set[int] = set()  # ranks that have told what they have from before
        self._kept = set(kept)
        self._filled: set[Key] = set()  # partitions that have a row

    @property
    def all_read(self) -> bool:
        """Whether every rank has read all that it was given."""
        return self._read >= {*self._owners}

    @property
    def looked(self) -> bool:
        """Whether it is known what is kept, if anything was to be."""
        return not self._kept or self._looked >= {*self._owners}

    @property
    def lacks(self) -> bool:
        """Whether something is not kept that was to be, or no longer."""
        return self.looked and not all(self._readers.get(key) for key in self._kept)

    def joined(self, agent: int, rank: int) -> Told:
        """An agent is there: what it needs of what is known."""
        self._agents[agent] = _Agent(rank)
        told: Told = []
        for key in sorted(self._readers):
            if self._readers[key] and agent in self._takers(key):
                told.append((agent, self._take(key)))
        return told + (self._empty([agent]) if self.all_read else [])

    def heard(self, agent: int, message: Mapping[str, Any]) -> Told:
        """An agent tells of itself."""
        about = self._agents.get(agent)
        if about is None:
            return []
        match message["event"]:
            case "serving":
                about.serves = {name: message[name] for name in ("address", "folder", "nonce")}
            case "reading":
                return self._reading(agent, (message["source"], message["partition"]))
            case "kept":
                self._looked.add(about.rank)
            case "sum":
                key = message["source"], message["partition"]
                about.sums.setdefault(key, {})[message["of"]] = message["sum"]
                if self._readers[key][:1] == [agent]:
                    self._compare(key)
            case "read" if about.rank not in self._read:
                self._read.add(about.rank)
                if self.all_read:
                    return self._empty(self._agents)
        return []

    def gone(self, agent: int) -> Told:
        """An agent is gone, and what it has read with it."""
        told: Told = []
        if self._agents.pop(agent, None) is None:
            return told
        for key, readers in self._readers.items():
            if agent not in readers:
                continue
            takers, provided = self._takers(key), readers[0] == agent
            readers.remove(agent)
            if provided and readers:
                told += [(taker, self._take(key)) for taker in takers]
                self._compare(key)
            elif provided:
                told += [(taker, {"do": "drop"} | _words(key)) for taker in takers]
        return told

    def again(self) -> None:
        """All agents come anew, and are given all partitions, perhaps others than before."""
        if self._kept or not self.all_read:
            self._read.clear()
        for key in self._kept:  # whether it has rows now is seen when it is read
            self._filled.discard(key)
            self._readers.pop(key, None)
        self._kept.clear()

    def validate(self) -> None:
        """Asserts what must hold between any two events."""
        for key, readers in self._readers.items():
            assert key in self._filled, f"{key} is read and has no row"
            assert set(readers) <= set(self._agents), f"{key} is read by {readers}, who are gone"
            assert len(set(readers)) == len(readers), f"{key} is read twice by one of {readers}"
            ranks = {self._agents[agent].rank for agent in readers}
            assert ranks <= {self._ranks[key]}, f"{key} is read by agents of ranks {ranks}"
        if self._kept and self.looked and not self.lacks:
            assert self._kept <= {key for key, some in self._readers.items() if some}
        assert self._filled <= self._keys, f"{self._filled - self._keys} are of no source"

    def _reading(self, agent: int, key: Key) -> Told:
        assert key in self._keys, f"agent {agent} reads {key}: no partition of a source"
        readers = self._readers.setdefault(key, [])
        if key in self._kept and readers:
            return []  # on two hosts: one will do
        readers.append(agent)
        self._ranks[key] = self._agents[agent].rank
        self._filled.add(key)
        if readers[0] != agent:
            return []
        return [(taker, self._take(key)) for taker in self._takers(key)]

    def _take(self, key: Key) -> dict[str, Any]:
        provider = self._agents[self._readers[key][0]]
        return {"do": "take"} | _words(key) | provider.serves

    def _empty(self, agents: Sequence[int] | Mapping[int, Any]) -> Told:
        """Tells agents which of their partitions have no rows."""
        return [
            (agent, {"do": "empty", "source": source, "partitions": numbers})
            for agent in agents
            for source in range(len(self._names))
            if (numbers := list(self._without_rows(source, self._agents[agent].rank)))
        ]

    def _without_rows(self, source: int, rank: int) -> Iterator[int]:
        for key in sorted(self._keys - self._filled):
            if key[0] == source and self._owner(key) == rank:
                yield key[1]

    def _owner(self, key: Key) -> int:
        return self._owners[key[1] % len(self._owners)]

    def _takers(self, key: Key) -> list[int]:
        """The agents that must have a partition and do not read it themselves."""
        owner = self._owner(key)
        if self._ranks[key] == owner and key not in self._kept:
            return []
        owners = (agent for agent, about in self._agents.items() if about.rank == owner)
        return [agent for agent in owners if agent not in self._readers[key]]

    def _compare(self, key: Key) -> None:
        about = self._agents[self._readers[key][0]]
        known, found = self._sums.setdefault(key, {}), about.sums.get(key, {})
        for of, value in found.items():
            if known.setdefault(of, value) != value:
                error = DataError(
                    f"{self._names[key[0]]}: partition {key[1]} was read again, by rank "
                    f"{about.rank}, and the checksum of its {of} is {value}: expected {known[of]}, "
                    "as before: Spark has computed other rows, or the same in another order",
                    hint="rows come out of a shuffle in any order: sortWithinPartitions after it, "
                    "or write the DataFrame to files and read it from there",
                )
                self.conflicts.append((self._readers[key][0], error))


def _words(key: Key) -> dict[str, int]:
    return {"source": key[0], "partition": key[1]}
