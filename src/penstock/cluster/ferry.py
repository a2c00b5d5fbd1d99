"""How spools come from the agent that reads them to one on another host, as they are written.

    taker  -> giver    {"event": "next", "source", "partition", "number"}
    giver  -> taker    {"do": "segment" | "end" | "failed", "source", "partition", "number"}, and
                       the file's bytes

The giver answers when there is an answer: segment `number` is sealed, or there is no such segment
as the spool has ended, or has failed. Both prove the run's token to each other (see `channel`). A
taker copies one spool at a time from each giver, which reads one at a time as well; what it copies
is held until whole, so that it can be gone on with from another giver of the same rows.
"""

from __future__ import annotations

import contextlib
import mmap
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from penstock.cluster.channel import Channel, Message
from penstock.cluster.coordinator import Coordinator
from penstock.errors import TransportError

LOOK_S = 0.01
"""How often a giver looks for what it was asked for and does not have yet."""
IDLE_S = 0.2
AGAIN_S = 0.5
"""From a failed attempt to reach a giver to the next."""
REACH_S = 20.0
"""How long a giver may be out of reach; if it is lost, the driver tells so before."""

Find = Callable[[int, int, int], tuple[str, Path] | None]
"""Of a source, partition and number: ("segment" | "end" | "failed", its file), or None as yet."""


class Copy(Protocol):
    """A spool that comes from elsewhere."""

    number: int
    """Of the next segment."""

    def put(self, what: str, number: int, data: bytes | bytearray) -> bool:
        """Takes what `Find` found there, unless it has it already; whether it is whole now."""
        ...


class Giver:
    """Gives what this agent reads to others, from a thread.

    Arguments:
        token: of the run.
        host: the address to listen at.
        find: what there is.
        failed: called with an error that has ended the thread.
    """

    def __init__(
        self, token: str, host: str, find: Find, failed: Callable[[BaseException], None]
    ) -> None:
        self._coordinator = Coordinator(token, host=host)
        self.address = self._coordinator.address
        self._find, self._failed = find, failed
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="penstock-giver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, and all connections."""
        self._over.set()
        self._thread.join(10 * IDLE_S)
        self._coordinator.close()

    def _run(self) -> None:
        asked: dict[int, tuple[int, int, int]] = {}  # by taker
        try:
            while not self._over.is_set():
                select.select([self._coordinator.fileno()], [], [], LOOK_S if asked else IDLE_S)
                for peer, message in self._coordinator.poll():
                    if message is None:
                        asked.pop(peer.number, None)
                    elif message is not peer.hello:
                        what = message["source"], message["partition"], message["number"]
                        asked[peer.number] = tuple(map(int, what))  # type: ignore[assignment]
                for taker, key in list(asked.items()):
                    if found := self._find(*key):
                        del asked[taker]
                        self._give(taker, key, *found)
        except BaseException as error:
            self._failed(error)

    def _give(self, taker: int, key: tuple[int, int, int], what: str, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                body = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError:  # the folder is being removed: this agent leaves
            return
        head = dict(zip(("source", "partition", "number"), key, strict=True))
        self._coordinator.send(taker, {"do": what, **head}, [memoryview(body)])


class Taker:
    """Copies spools from one giver, one after the other, in a thread.

    Arguments:
        address, token: of the giver, of the run.
        hello: who this is.
        copy: the copy of a source's partition to go on with; None: there is nothing to do.
        failed: called with an error that has ended the thread.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        hello: Message,
        copy: Callable[[int, int], Copy | None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._address, self._token, self._hello = address, token, hello
        self._copy, self._failed = copy, failed
        self._changed = threading.Condition()
        self._wanted: list[tuple[int, int]] = []  # the first one is being copied
        self._over = False
        self._thread = threading.Thread(target=self._run, name="penstock-taker", daemon=True)
        self._thread.start()

    def take(self, source: int, partition: int) -> None:
        """Has it copied after those that were asked for before."""
        with self._changed:
            if (source, partition) not in self._wanted:
                self._wanted.append((source, partition))
            self._changed.notify()

    def drop(self, source: int, partition: int) -> None:
        """It is not to be had here any more."""
        with self._changed, contextlib.suppress(ValueError):
            self._wanted.remove((source, partition))

    def close(self) -> None:
        """Ends the thread, what it copies unfinished."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join(10 * IDLE_S)

    def _wants(self, key: tuple[int, int]) -> bool:
        return not self._over and self._wanted[:1] == [key]

    def _run(self) -> None:
        channel: Channel | None = None
        reached = time.monotonic()
        try:
            while (key := self._next()) is not None:
                copy = self._copy(*key)
                try:
                    if channel is None:
                        channel = Channel(self._address, self._token, self._hello)
                    if copy is None or self._fetched(channel, copy, key):
                        self.drop(*key)
                    reached = time.monotonic()
                except (TransportError, OSError) as error:
                    if isinstance(error, OSError) and error.filename is not None:
                        raise  # of a file of ours
                    if channel is not None:
                        channel.close()
                        channel, reached = None, time.monotonic()
                    if self._wants(key) and time.monotonic() > reached + REACH_S:
                        raise TransportError(
                            f"rank {self._hello['rank']} cannot take partition {key[1]} of source "
                            f"{key[0]} from the agent at {':'.join(map(str, self._address))}: "
                            f"{error}",
                            hint="agents of a run must reach each other: is there a firewall "
                            "between nodes?",
                        ) from error
                    time.sleep(AGAIN_S)
        except BaseException as error:
            self._failed(error)
        finally:
            if channel is not None:
                channel.close()

    def _next(self) -> tuple[int, int] | None:
        with self._changed:
            while not self._wanted and not self._over:
                self._changed.wait(IDLE_S)
            return None if self._over else self._wanted[0]

    def _fetched(self, channel: Channel, copy: Copy, key: tuple[int, int]) -> bool:
        """Copies a spool; whether it was wanted until it was whole."""
        while self._wants(key):
            asked: dict[str, Any] = {"source": key[0], "partition": key[1], "number": copy.number}
            channel.send({"event": "next", **asked})
            while (answer := self._answer(channel, asked)) is None:
                if not self._wants(key):
                    return False
            if copy.put(answer["do"], answer["number"], answer["body"]):
                return True
        return False

    def _answer(self, channel: Channel, asked: dict[str, Any]) -> Message | None:
        """The answer, if it comes soon; those to earlier questions are passed over."""
        select.select([channel], [], [], IDLE_S)
        for message in channel.receive():
            if {name: message[name] for name in asked} == asked:
                return message
        return None
