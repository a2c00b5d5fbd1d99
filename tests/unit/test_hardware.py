"""A cluster's file says what is wrong with it, and the mesh is what it says."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.cli import hardware as command
from penstock.errors import UserError, WorkerLost
from penstock.exchange.cost import Link
from penstock.plan.costs import hardware, measure
from penstock.plan.costs.hardware import Cluster, Device, read_bytes, read_seconds

DEVICE = Device("made up", {"float32": 2e11, "bfloat16": 1e11}, 2e10, 1 << 34, 5e-6)
CLUSTER = Cluster(2, 8, DEVICE, Link(2e-5, 4e9, 2e-6), Link(1e-4, 1.25e9, 5e-6))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    CLUSTER.save(tmp_path / "cluster.json")
    assert Cluster.load(tmp_path / "cluster.json") == CLUSTER
    assert replace(CLUSTER, hosts=3) != CLUSTER


def test_the_file_of_the_docstring_is_one(tmp_path: Path) -> None:
    assert hardware.__doc__ is not None
    text = hardware.__doc__[hardware.__doc__.index("{") : hardware.__doc__.rindex("}") + 1]
    (tmp_path / "cluster.json").write_text(text)
    found = Cluster.load(tmp_path / "cluster.json")
    assert (found.hosts, found.devices, found.mesh) == (2, 8, (2, 8))
    assert found.device.memory_bytes == 16 << 30
    assert found.device.memory_bytes_per_s == 20e9
    assert found.far == Link(1e-4, 1.25e9, 5e-6)
    assert found.near.message_s == 2e-6


def test_a_single_host_needs_no_far_link() -> None:
    values = CLUSTER.to_json() | {"hosts": 1}
    del values["far"], values["near"]["message_s"]
    found = Cluster.from_json(values)
    assert found.far == found.near == Link(2e-5, 4e9, 0.0)


ABSENT = object()


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def changed(values: dict[str, Any]) -> None:
        *inner, last = path.split(".")
        for name in inner:
            values = values[name]
        if value is ABSENT:
            del values[last]
        else:
            values[last] = value

    return changed


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (change("host", 3), "there is no key host\n  hint: did you mean 'hosts'?"),
        (change("far.latency", 3), "no key far.latency\n  hint: did you mean 'latency_s'?"),
        (change("device.flops", 3), "no key device.flops\n  hint: did you mean 'flops_per_s'?"),
        (change("devices", ABSENT), "devices is not given"),
        (change("far", ABSENT), "far is not given; expected the link between the 2 hosts"),
        (change("near.bytes_per_s", ABSENT), "near.bytes_per_s is not given"),
        (change("hosts", 0), "hosts is 0; expected a whole number from 1 to 4096"),
        (change("hosts", 2.5), "hosts is 2.5"),
        (change("devices", True), "devices is True"),
        (change("hosts", 513), "hosts is 513; expected at most 4096 devices in all, 8 on each"),
        (change("near", 3), "near is 3; expected an object of latency_s, bytes_per_s"),
        (change("near.bytes_per_s", 0), "near.bytes_per_s is 0; expected a number of at least 1"),
        (change("near.latency_s", -1), "near.latency_s is -1; expected a number of at least 0"),
        (change("near.latency_s", True), "near.latency_s is True; expected a number"),
        (change("near.latency_s", False), "near.latency_s is False; expected a number"),
        (change("near.latency_s", None), "near.latency_s is null; expected a number"),
        (change("near.latency_s", "1.2.3 us"), "near.latency_s is '1.2.3 us'; expected such as 50"),
        (change("far.bytes_per_s", "1 Gb"), "far.bytes_per_s is '1 Gb'; expected such as 16GiB"),
        (change("far.latency_s", "1 hour"), "far.latency_s is '1 hour'; expected such as 50us"),
        (change("device.name", 3), "device.name is 3; expected text"),
        (change("device.flops_per_s", {}), 'flops_per_s is {}; expected such as {"float32"'),
        (change("device.flops_per_s.flaot32", 1e9), "no dtype\n  hint: did you mean 'float32'?"),
        (change("device.flops_per_s.float32", "fast"), "flops_per_s.float32 is 'fast'"),
        (change("device.operator_s", float("nan")), "device.operator_s is nan"),
    ],
)
def test_what_is_wrong_is_named(
    changed: Callable[[dict[str, Any]], None], says: str, tmp_path: Path
) -> None:
    values = copy.deepcopy(CLUSTER.to_json())
    changed(values)
    (tmp_path / "mine.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        Cluster.load(tmp_path / "mine.json")
    assert caught.value.hint
    assert "mine.json: " in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json.*\n.*doctor --save"):
        Cluster.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"hosts": 1,}')
    with pytest.raises(UserError, match=r"bad\.json is not JSON: .*line 1"):
        Cluster.load(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match=r"all of it is \[1\]; expected an object"):
        Cluster.load(tmp_path / "list.json")
    with pytest.raises(UserError, match="name a file"):
        CLUSTER.save(tmp_path / "no" / "folder.json")


@pytest.mark.parametrize(
    ("hosts", "devices", "mesh"),
    [(2, 8, (2, 8)), (1, 8, (8,)), (8, 1, (8,)), (1, 1, (1,)), (512, 8, (512, 8)),
     (1, 4096, (4096,))],
)  # fmt: skip
def test_meshes(hosts: int, devices: int, mesh: tuple[int, ...]) -> None:
    assert replace(CLUSTER, hosts=hosts, devices=devices).mesh == mesh


def test_dtypes_that_are_not_given_are_as_near_ones() -> None:
    rates = {
        torch.float32: 2e11,
        torch.bfloat16: 1e11,
        torch.float16: 1e11,
        torch.float64: 1e11,
        torch.int64: 2e11,
        torch.bool: 2e11,
    }
    assert {dtype: DEVICE.flops_of(dtype) for dtype in rates} == rates
    half = replace(DEVICE, flops_per_s={"float16": 3e11, "float64": 1e10})
    assert half.flops_of(torch.bfloat16) == 3e11
    assert half.flops_of(torch.float32) == 1e10
    assert half.flops_of(torch.float64) == 1e10


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("16GiB", 16 << 30), ("1e9bit", 1.25e8), ("10 Gbit/s", 1.25e9), ("4 GB/s", 4e9), ("7", 7),
     ("2kB", 2000), ("2KiB", 2048), ("1.5 MiB", 3 << 19)],
)  # fmt: skip
def test_bytes_in_words(text: str, num_bytes: float) -> None:
    assert read_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "fast", "-1GB", "1 Gb", "1 iB", "GB", "1GB/h", "1..2GB"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ValueError):
        read_bytes(text)


def test_seconds_in_words() -> None:
    found = [read_seconds(text) for text in ("50us", "50 µs", "5e-5", "0.05 ms", "50000ns")]
    assert found == pytest.approx([5e-5] * 5)
    for text in ("", "fast", "1 h", "us"):
        with pytest.raises(ValueError):
            read_seconds(text)


def test_the_far_link_is_said_where_there_are_hosts() -> None:
    near = Link(1e-5, 4e9, 1e-6)
    assert command.far_link(near, 1, None, None) == near
    assert command.far_link(near, 2, "1e9bit", "50us") == Link(5e-5, 1.25e8, 1e-6)
    for hosts, bandwidth, latency, says in (
        (2, None, "1ms", "--hosts 2: how fast"),
        (2, "1 furlong", None, "'1 furlong' is no number of bytes"),
        (2, "0GB", None, "nothing would ever arrive"),
        (2, "1GB", "soon", "'soon' is no time"),
    ):
        with pytest.raises(UserError, match=says):
            command.far_link(near, hosts, bandwidth, latency)


def test_one_process_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_ENOUGH_S", 0.0)
    monkeypatch.setattr(measure, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(measure, "_COPIED_BYTES", {"cpu": 1 << 20})
    threads = torch.get_num_threads()
    try:
        found = measure.of_this_process("cpu", 0, 1)
    finally:
        torch.set_num_threads(threads)
    assert found["name"].endswith(", 1 thread")
    assert 1e6 < found["flops_per_s"]["float32"] < 1e13
    assert 1e6 < found["memory_bytes_per_s"] < 1e13
    assert 1e-8 < found["operator_s"] < 1e-2


def test_the_fastest_call_but_the_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 5.0, 5.0, 7.0, 7.0, 10.0])
    monkeypatch.setattr(measure, "_ENOUGH_S", 9.0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    assert measure._least_s(torch.device("cpu"), lambda: calls.append(1)) == 2.0
    assert len(calls) == 4


def test_a_process_that_fails_is_said() -> None:
    with pytest.raises(WorkerLost, match="no_such_device"):
        measure.measure(1, 1, 1 << 30, "no_such_device")


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEADLINE_S", 0.05)
    with pytest.raises(WorkerLost, match=r"it said nothing\n.*each has 0\.05 s"):
        measure.measure(1, 1, 1 << 30)
