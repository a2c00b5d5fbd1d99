"""What a device of this machine can do, measured: the `Device` of `penstock doctor --save`.

    flops_per_s          of a product of two matrices, in each dtype
    memory_bytes_per_s   of a copy that no cache holds: bytes read and bytes written
    operator_s           of an addition of one number to another, many times

The fastest of several counts, as a busy machine only makes them slower. But the workers of a host
share its cores and its memory: as many processes as there will be measure at the same time, each
with its share of threads, and of what they find the median is taken. As a program, this module is
one of them:

    python -m penstock.plan.costs.measure DEVICE INDEX THREADS
"""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from penstock.errors import WorkerLost
from penstock.plan.costs.hardware import Device

DEADLINE_S = 120.0
_ENOUGH_S = 0.3
"""So long each measurement goes on, but for two calls at least."""
_DTYPES = {"cpu": ("float32", "float64", "bfloat16"),
           "cuda": ("float32", "float64", "bfloat16", "float16")}  # fmt: skip
_SIDE = {"cpu": 768, "cuda": 8192}
"""Of the matrices: large enough for the kernels' full speed, small enough for slow dtypes."""
_COPIED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
_ADDITIONS = 500

Process = subprocess.Popen[str]


def measure(devices: int, threads: int, memory_bytes: int | None, device: str = "cpu") -> Device:
    """One of this machine's devices, while all of them are at work.

    Arguments:
        devices: how many; as many processes measure at the same time.
        threads: of each.
        memory_bytes: of each; None for what is free on a GPU.
        device: "cpu" or "cuda".

    Raises:
        WorkerLost: a process failed, or had not ended in time; with what it said last.
    """
    with _started(devices, device, threads) as processes:
        for process in processes:
            _line(process)  # all have torch before the first measures
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = [json.loads(_line(process)) for process in processes]

    def typical(name: str) -> float:
        return float(median(values[name] for values in found))

    flops_per_s = {
        dtype: median(values["flops_per_s"][dtype] for values in found) for dtype in _DTYPES[device]
    }
    if memory_bytes is None:
        memory_bytes = int(min(values["memory_bytes"] for values in found))
    speed, operator_s = typical("memory_bytes_per_s"), typical("operator_s")
    return Device(found[0]["name"], flops_per_s, speed, memory_bytes, operator_s)


def of_this_process(device: str, index: int, threads: int) -> dict[str, Any]:
    """What one process finds, as JSON values. Sets the number of its threads."""
    torch.set_num_threads(threads)
    place = torch.device(device, index) if device == "cuda" else torch.device(device)
    memory_bytes = torch.cuda.mem_get_info(place)[0] if device == "cuda" else 0
    with torch.no_grad():
        return {
            "name": _name(place, threads),
            "flops_per_s": {name: _flops_per_s(place, name) for name in _DTYPES[device]},
            "memory_bytes_per_s": _memory_bytes_per_s(place),
            "memory_bytes": memory_bytes,
            "operator_s": _operator_s(place),
        }


def _flops_per_s(place: torch.device, dtype: str) -> float:
    side = _SIDE[place.type]
    one, other = (torch.rand(side, side, device=place).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(one)
    return 2 * side**3 / _least_s(place, lambda: torch.mm(one, other, out=out))


def _memory_bytes_per_s(place: torch.device) -> float:
    one = torch.ones(_COPIED_BYTES[place.type] // 4, device=place)
    other = torch.zeros_like(one)
    return 2 * one.nbytes / _least_s(place, lambda: other.copy_(one))


def _operator_s(place: torch.device) -> float:
    one, other = torch.ones(2, 1, device=place)

    def add() -> None:
        for _ in range(_ADDITIONS):
            torch.add(one, other)

    return _least_s(place, add) / _ADDITIONS


def _least_s(place: torch.device, call: Callable[[], object]) -> float:
    """Of some calls, the seconds of the fastest; the first is not counted."""
    least_s, began = math.inf, time.perf_counter()
    call()
    while True:
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        start = time.perf_counter()
        call()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        end = time.perf_counter()
        least_s = min(least_s, end - start)
        if end - began > _ENOUGH_S:
            return least_s


def _name(place: torch.device, threads: int) -> str:
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    try:
        model = re.search(r"^model name\s*: *(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        model = None
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


@contextmanager
def _started(devices: int, device: str, threads: int) -> Iterator[list[Process]]:
    """The processes, which end at the deadline at the latest; none is left afterwards."""
    processes: list[Process] = []

    def end() -> None:
        for process in processes:
            process.kill()

    watch = threading.Timer(DEADLINE_S, end)
    watch.start()
    try:
        for index in range(devices):
            command = [sys.executable, "-m", __name__, device, str(index), str(threads)]
            pipe = subprocess.PIPE
            processes.append(
                subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
            )
        yield processes
    finally:
        watch.cancel()
        end()
        for process in processes:
            process.communicate()


def _line(process: Process) -> str:
    """The next line that a process prints; it ends, if at the deadline, before it is waited for."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.endswith("\n"):
        return line
    process.kill()
    said = (process.communicate()[1].strip().splitlines() or ["it said nothing"])[-1]
    raise WorkerLost(
        f"measuring this machine: a process ended before it was done: {said}",
        hint=f"each has {DEADLINE_S:g} s; fewer --devices, or end other programs",
    )


if __name__ == "__main__":
    print("ready", flush=True)
    if sys.stdin.readline():
        print(json.dumps(of_this_process(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
