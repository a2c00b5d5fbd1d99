"""`Cluster`: what a plan is made for: hosts, the devices of each, and the links between them.

    {
      "hosts": 2,
      "devices": 8,
      "device": {
        "name": "a CPU of 4 cores",
        "flops_per_s": {"float32": 2e11, "bfloat16": 1e11},
        "memory_bytes_per_s": "20 GB/s",
        "memory_bytes": "16 GiB",
        "operator_s": "5 us"
      },
      "near": {"latency_s": "20 us", "bytes_per_s": "4 GB/s", "message_s": "2 us"},
      "far":  {"latency_s": "100 us", "bytes_per_s": "10 Gbit/s", "message_s": "5 us"}
    }

`penstock doctor --save cluster.json` measures such a file; one for machines that are not there is
written by hand. A quantity is a number in the key's unit, or text with a unit of its own (`bit` and
`B`, decimal or binary prefixes; `s`, `ms`, `us`, `ns`). `message_s` is 0 where it is left out, and
`far` as `near` where there is one host.

`devices` are those of each host. `near` is a device's link to the others of its host; `far` is a
host's link to the other hosts, which its devices share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from penstock.errors import UserError, did_you_mean
from penstock.exchange.cost import Link
from penstock.plan.files import read_json, write_json

MAX_DEVICES = 4096
"""Of a whole cluster; what the simulator of exchange is tested for."""

_FILE = "penstock doctor --save makes one; penstock.plan.costs.hardware shows one"

_NEAREST = {
    "float64": ("float32",),
    "float16": ("bfloat16", "float32"),
    "bfloat16": ("float16", "float32"),
}
"""Whose FLOP/s to take for a dtype that is not given; float32 for all others."""

_TWICE = ("float64", "complex64")
"""Of a dtype twice as wide as the one whose figure is taken, as many bytes are half the numbers."""


@dataclass(frozen=True)
class Device:
    """What computes: a worker's share of a host's cores, or a GPU.

    Arguments:
        name: for people.
        flops_per_s: of a large matrix product, by the dtype's name ("float32").
        memory_bytes_per_s: of memory, bytes read and bytes written together.
        memory_bytes: what the tensors of one rank may take.
        operator_s: what launching an operator costs, however small.
    """

    name: str
    flops_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    memory_bytes: int
    operator_s: float

    def flops_of(self, dtype: torch.dtype) -> float:
        """FLOP/s in a dtype; of the nearest one where it is not given."""
        name = str(dtype).removeprefix("torch.")
        if name in self.flops_per_s:
            return self.flops_per_s[name]
        for near in (*_NEAREST.get(name, ()), "float32"):
            if near in self.flops_per_s:
                return self.flops_per_s[near] / (2 if name in _TWICE else 1)
        return min(self.flops_per_s.values())


@dataclass(frozen=True)
class Cluster:
    """A mesh of hosts x devices, all alike.

    Arguments:
        hosts: their number.
        devices: of each host.
        device: what each is.
        near: between two devices of a host: each device's own link.
        far: between two hosts: each host's link, which its devices share.
    """

    hosts: int
    devices: int
    device: Device
    near: Link
    far: Link

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.devices < 1 or self.ranks > MAX_DEVICES:
            raise UserError(
                f"a cluster of {self.hosts} hosts of {self.devices} devices; expected 1 to "
                f"{MAX_DEVICES} devices in all",
                hint="hosts and devices are whole numbers of at least 1; devices are of each host",
            )

    @property
    def ranks(self) -> int:
        """Of all hosts, one for each device."""
        return self.hosts * self.devices

    @property
    def mesh(self) -> tuple[int, ...]:
        """Sizes of the mesh's axes: hosts and devices, without one of which there is but one."""
        return tuple(n for n in (self.hosts, self.devices) if n > 1) or (1,)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {
            "device": asdict(self.device) | {"flops_per_s": dict(self.device.flops_per_s)}
        }

    @classmethod
    def from_json(cls, values: Any, source: str = "the cluster") -> Cluster:
        """What `to_json` gave, or a person has written.

        Arguments:
            source: whose values they are, for errors: the file's name.

        Raises:
            UserError: a key is unknown or missing, or its value is none; names `source` and it.
        """
        reader = _Reader(source)
        values = reader.object("", values, [f.name for f in fields(cls)], optional=("far",))
        hosts, devices = (reader.count(key, values[key]) for key in ("hosts", "devices"))
        near = reader.link("near", values["near"])
        if "far" not in values and hosts > 1:
            raise reader.missing("far", f"the link between the {hosts} hosts, written as near")
        far = reader.link("far", values["far"]) if "far" in values else near
        if hosts * devices > MAX_DEVICES:
            most = f"at most {MAX_DEVICES} devices in all, {devices} on each host"
            raise reader.wrong("hosts", hosts, most)
        return cls(hosts, devices, reader.device("device", values["device"]), near, far)

    def save(self, path: str | Path) -> None:
        """Writes the file.

        Raises:
            UserError: it cannot be made.
        """
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Reads a file.

        Raises:
            UserError: it is not there, not JSON, or not a cluster's; names file, line or key.
        """
        missing = f"penstock doctor --save {path} makes one of this machine"
        values = read_json(path, missing=missing, wrong=_FILE)
        return cls.from_json(values, str(path))


_NUMBER = r"\s*([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*"
_PREFIX = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15} | {
    f"{prefix}i": 1 << 10 * power for power, prefix in enumerate("KMGTP", 1)
}
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "\u00b5s": 10**6, "ns": 10**9}


def read_bytes(text: str) -> float:
    """Bytes of text such as "16 GiB" or "1e9bit"; after "/s", bytes per second.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(_NUMBER + r"([kKMGTP]?i?)(bit|B|)(?:/s)?\s*", text)
    if not found:
        raise ValueError(f"{text!r} is no number of bytes: expected such as 16GiB or 10Gbit")
    number, prefix, unit = found.groups()
    factor = _PREFIX.get("k" if prefix == "K" else prefix)
    if factor is None:
        raise ValueError(f"{text!r} has an unknown prefix: expected one of{', '.join(_PREFIX)}")
    return float(number) * factor / (8 if unit == "bit" else 1)


def read_seconds(text: str) -> float:
    """Seconds of text such as "20 us" or "1e-4".

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(_NUMBER + r"([mun\u00b5]?s|)\s*", text)
    if not found:
        raise ValueError(f"{text!r} is no time: expected such as 50us")
    return float(found[1]) / _PER_SECOND[found[2] or "s"]


class _Reader:
    """Reads JSON values; knows whose they are when something is wrong."""

    def __init__(self, source: str) -> None:
        self._source = source

    def wrong(self, key: str, got: object, expected: str, hint: str = _FILE) -> UserError:
        got = "null" if got is None else repr(got)  # as JSON has it
        return UserError(f"{self._source}: {key} is {got}; expected {expected}", hint=hint)

    def missing(self, key: str, expected: str) -> UserError:
        return UserError(f"{self._source}: {key} is not given; expected {expected}", hint=_FILE)

    def object(
        self, key: str, values: Any, names: Iterable[str], optional: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The values, which are an object of these keys and no others."""
        names, inside = list(names), f"{key}." if key else ""
        if not isinstance(values, dict):
            raise self.wrong(key or "all of it", values, f"an object of {', '.join(names)}")
        for name in values:
            if name not in names:
                hint = did_you_mean(str(name), names) or f"there are {', '.join(names)}"
                raise UserError(f"{self._source}: there is no key {inside}{name}", hint=hint)
        for name in names:
            if name not in values and name not in optional:
                whole = f"{key} to be " if key else ""
                raise self.missing(f"{inside}{name}", f"{whole}an object of {', '.join(names)}")
        return values

    def device(self, key: str, values: Any) -> Device:
        values = self.object(key, values, [f.name for f in fields(Device)])
        if not isinstance(values["name"], str):
            raise self.wrong(f"{key}.name", values["name"], "text")
        flops = values["flops_per_s"]
        if not isinstance(flops, dict) or not flops:
            raise self.wrong(f"{key}.flops_per_s", flops, 'such as {"float32": 2e11}')
        known = sorted(n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype))
        for name in flops:
            if name not in known:
                raise UserError(
                    f"{self._source}: {key}.flops_per_s has {name!r}, which is no dtype",
                    hint=did_you_mean(name, known) or "float32, bfloat16, float16, float64",
                )
        return Device(
            values["name"],
            {n: self.quantity(f"{key}.flops_per_s.{n}", value) for n, value in flops.items()},
            self.quantity(f"{key}.memory_bytes_per_s", values["memory_bytes_per_s"]),
            int(self.quantity(f"{key}.memory_bytes", values["memory_bytes"])),
            self.quantity(f"{key}.operator_s", values["operator_s"]),
        )

    def link(self, key: str, values: Any) -> Link:
        names = [f.name for f in fields(Link)]
        values = self.object(key, values, names, optional=("message_s",))
        read = {n: self.quantity(f"{key}.{n}", values[n]) for n in names if n in values}
        return Link(**read)

    def count(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= MAX_DEVICES:
            raise self.wrong(key, value, f"a whole number from 1 to {MAX_DEVICES}")
        return value

    def quantity(self, key: str, value: Any) -> float:
        """A number, or text with a unit: above 0, if it is no time."""
        is_time = key.endswith("_s") and not key.endswith("per_s")
        try:
            if isinstance(value, str) and is_time:
                value = read_seconds(value)
            elif isinstance(value, str) and "bytes" in key:
                value = read_bytes(value)
        except ValueError as error:
            raise self.wrong(key, value, str(error).rpartition("expected ")[2]) from error
        least = 0.0 if is_time else 1.0
        if type(value) in (int, float) and least <= value < 1e21:
            return float(value)
        raise self.wrong(key, value, f"a number of at least {least:g}")
