"""How workers find each other: torch.distributed's store, kept by the driver.

The driver holds a generation's few keys; workers set and read them over the channel on which they
have proved the run's token. (Gloo's own connections, once formed, prove nothing.)
"""

from __future__ import annotations

import base64
import datetime
import fcntl
import select
import socket
import struct
import time
from collections import defaultdict
from typing import Any

import torch.distributed as dist

from penstock.cluster.channel import Channel, Message
from penstock.errors import TransportError

SIOCGIFADDR = 0x8915
LOOK_S = 0.1


class Rendezvous(dist.Store):  # type: ignore[misc,name-defined]
    """A worker's end.

    Arguments:
        channel: to the driver; nothing else reads from it until the group has formed.
        timeout_s: how long to wait for a key.
    """

    def __init__(self, channel: Channel, timeout_s: float) -> None:
        super().__init__()
        self._channel, self._timeout_s = channel, timeout_s
        self._known: dict[str, bytes] = {}
        self.instructions: list[Message] = []
        """What else the driver has said meanwhile."""

    def set(self, key: str, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._channel.send({"event": "set", "key": key, "value": base64.b64encode(data).decode()})

    def get(self, key: str) -> bytes:
        self._need([key], self._timeout_s)
        return self._known[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        self._need(keys, self._timeout_s if timeout is None else timeout.total_seconds())

    def check(self, keys: list[str]) -> bool:
        self._look()
        return all(key in self._known for key in keys)

    def _need(self, keys: list[str], timeout_s: float) -> None:
        give_up = time.monotonic() + timeout_s
        missing = [key for key in keys if key not in self._known]
        for key in missing:
            self._channel.send({"event": "get", "key": key})
        while missing := [key for key in missing if key not in self._known]:
            if time.monotonic() > give_up:
                raise TransportError(
                    f"the group did not form within {timeout_s:g} s: nobody has set {missing[0]}",
                    hint="a worker that does not start; its output is in the run's logs",
                )
            select.select([self._channel], [], [], LOOK_S)
            self._look()

    def _look(self) -> None:
        for message in self._channel.receive():
            if message.get("do") == "set":
                self._known[message["key"]] = base64.b64decode(message["value"])
            else:
                self.instructions.append(message)


class Keys:
    """The driver's end, for one generation."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._wanted: defaultdict[str, list[int]] = defaultdict(list)

    def take(self, peer: int, message: Message) -> list[tuple[int, Message]]:
        """What to send to whom, after a peer has set or asked for a key."""
        key = message["key"]
        if message["event"] == "set":
            self._values[key] = message["value"]
        else:
            self._wanted[key].append(peer)
        if key not in self._values:
            return []
        answer = {"do": "set", "key": key, "value": self._values[key]}
        return [(wanting, answer) for wanting in self._wanted.pop(key, [])]


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface with an IPv4 address, such as "eth0"."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
