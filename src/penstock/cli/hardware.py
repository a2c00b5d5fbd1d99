"""`penstock doctor --save`: this machine, measured, as the cluster that plans are made for."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from penstock.cli import network
from penstock.cli.doctor import memory_limit_bytes
from penstock.errors import UserError
from penstock.exchange.cost import Link
from penstock.plan.costs.hardware import Cluster, read_bytes, read_seconds
from penstock.plan.costs.measure import measure as measure_device

_WORKER_BYTES = 1 << 29
"""What a worker takes before its network. [measured: torch 2.13 and its threads, 2026-11]"""
_MOST_PROCESSES = 64


def far_link(near: Link, hosts: int, bandwidth: str | None, latency: str | None) -> Link:
    """The link between hosts, which cannot be measured from one of them.

    Arguments:
        near: whose figures are taken for what is not said.
        bandwidth, latency: as a person has written them.

    Raises:
        UserError: there are several hosts, and it is not said; or it is no quantity.
    """
    if bandwidth is None and hosts > 1:
        raise UserError(
            f"--hosts {hosts}: how fast are the links between them?",
            hint="--far-bandwidth 10Gbit (of a whole host), and --far-latency 50us",
        )
    far = near
    try:
        if bandwidth is not None:
            far = replace(far, bytes_per_s=read_bytes(bandwidth))
        if latency is not None:
            far = replace(far, latency_s=read_seconds(latency))
    except ValueError as error:
        raise UserError(f"--far-bandwidth or --far-latency: {error}") from error
    if far.bytes_per_s < 1:
        raise UserError(f"--far-bandwidth {bandwidth}: nothing would ever arrive")
    return far


def measure(
    hosts: int, devices: int | None, bandwidth: str | None, latency: str | None, *, cuda: bool
) -> Cluster:
    """This machine, as one of so many hosts that are all like it.

    Arguments:
        devices: of each host; None: its GPUs, or two workers.
        bandwidth, latency: of the link between hosts.
        cuda: a device is a GPU, and not a share of the cores.

    Raises:
        UserError: what is asked for cannot be.
        WorkerLost, TransportError: a process that measures is lost.
    """
    gpus = torch.cuda.device_count() if cuda and torch.cuda.is_available() else 0
    devices = devices or gpus or 2
    if cuda and gpus < 1:
        raise UserError("--cuda: torch sees no GPU here", hint="penstock doctor says why")
    far_link(Link(0.0, 1.0), hosts, bandwidth, latency)  # what is wrong is said at once
    at_once = min(devices, gpus if cuda else _MOST_PROCESSES)
    cores = len(os.sched_getaffinity(0))
    memory_bytes = None if cuda else _memory_bytes(devices)
    kind = "cuda" if cuda else "cpu"
    device = measure_device(at_once, max(1, cores // devices), memory_bytes, kind)
    found = network.measure(max(2, at_once))
    near = found["memory"].near if "memory" in found else found["tcp"].far
    return Cluster(hosts, devices, device, near, far_link(near, hosts, bandwidth, latency))


def check_writable(path: Path) -> None:
    """Before anything is measured for a file that cannot be written.

    Raises:
        UserError: it cannot.
    """
    if not os.access(path if path.exists() else path.parent, os.W_OK) or path.is_dir():
        what = "it cannot be written" if path.exists() else f"no file can be made in {path.parent}"
        raise UserError(f"--save {path}: {what}", hint="name a file that can be made")


def show(cluster: Cluster, console: Console) -> None:
    """Prints what was found, a line for each figure."""
    device = cluster.device
    lines = [("cluster", f"{cluster.hosts} x {cluster.devices} devices"), ("device", device.name)]
    lines += [(name, f"{rate / 1e9:.4g} GFLOP/s") for name, rate in device.flops_per_s.items()]
    lines += [
        ("memory", f"{device.memory_bytes / 2**30:.1f} GiB at "
                   f"{device.memory_bytes_per_s / 1e9:.3g} GB/s"),
        ("an operator", f"{device.operator_s * 1e6:.3g} us"),
    ]  # fmt: skip
    lines += [
        (name, f"{link.latency_s * 1e6:.3g} us, {link.message_s * 1e6:.3g} us a message, "
               f"{link.bytes_per_s / 1e9:.3g} GB/s each way")
        for name, link in (("near", cluster.near), ("far", cluster.far))
    ]  # fmt: skip
    for name, value in lines:
        line = f"{name:<12} {value}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _memory_bytes(devices: int) -> int:
    """What the tensors of each of so many workers may take of this machine's memory."""
    text = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").exists() else ""
    total = re.search(r"^MemTotal:\s+(\d+) kB", text, re.M)
    sizes = [int(total[1]) * 1024] if total else []
    limit = memory_limit_bytes()
    whole = min(sizes + ([limit] if limit else []), default=devices << 33)
    return max(1 << 20, whole // devices - _WORKER_BYTES)
