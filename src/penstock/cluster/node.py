"""What a node of a cluster has, and what keeps it from training.

`facts` runs on nodes that may not have Penstock yet: it is sent by value, and leans on nothing but
the standard library, imported inside. The records are named tuples since dataclasses cannot be
made where this source runs under a name that is no module's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SCARCE_SHARED_BYTES = 128 << 20  # Docker and Kubernetes give 64 MiB


def size(num_bytes: float) -> str:
    """A number of bytes in words: "412 KB"."""
    for unit in ("bytes", "KB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


class Facts(NamedTuple):
    """What a node has, or the driver.

    Arguments:
        python: version, "3.11.7".
        platform: "linux-x86_64".
        packages: versions of what Penstock requires; None is missing.
        memory_bytes: what a new process may still take, the cgroup's limit counted; None where it
            is not known, as below.
        memory_limit_bytes: the cgroup's limit, or None without one.
        shared_bytes: free in /dev/shm; None where it cannot be written.
        cores: usable, by affinity and the cgroup's share of time.
        temporary, temporary_bytes: the temporary folder, and what is free there.
    """

    host: str
    python: str
    executable: str
    platform: str
    packages: Mapping[str, str | None]
    memory_bytes: int | None
    memory_limit_bytes: int | None
    shared_bytes: int | None
    cores: int
    temporary: str
    temporary_bytes: int | None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Facts:
        """Of what `facts` gave, other keys ignored."""
        return cls(*(values[name] for name in cls._fields))


def facts(root: str = "/") -> dict[str, Any]:
    """This machine's `Facts`, as JSON values; runs on nodes without Penstock, and is quick.

    Arguments:
        root: where /proc, /sys and /dev are looked for.
    """
    import contextlib
    import importlib.metadata
    import importlib.util
    import os
    import re
    import shutil
    import socket
    import sys
    import sysconfig
    import tempfile

    unlimited_bytes = 1 << 60  # cgroup v1 writes a number like this for no limit

    def read(path: str) -> str:
        try:
            with open(os.path.join(root, path)) as file:
                return file.read()
        except OSError:
            return ""

    def number(path: str) -> int | None:
        text = read(path).strip()
        return int(text) if text.isdigit() else None

    def cgroups(controller: str) -> list[str]:
        # The cgroup's own folder and those above it. In a container the path may be the host's,
        # of which only the top is mounted.
        found = []
        for line in read("proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            parts = path.strip("/").split("/")
            for top in (controllers, controller) if controllers else ("", "unified"):
                ups = [os.path.join(top, *parts[:count]) for count in range(len(parts) + 1)]
                found += [os.path.join("sys/fs/cgroup", up) for up in ups]
        return found

    def memory() -> tuple[int | None, int | None]:
        free, limits = [], []
        if available := re.search(r"^MemAvailable:\s+(\d+) kB", read("proc/meminfo"), re.M):
            free.append(int(available[1]) * 1024)
        for group in cgroups("memory"):
            for names in (
                ("memory.max", "memory.current"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            ):
                limit, used = (number(os.path.join(group, name)) for name in names)
                if limit is not None and limit < unlimited_bytes:
                    files = os.path.join(group, "memory.stat")  # what the kernel gives back first
                    cached = re.findall(r"^(?:total_)?inactive_file (\d+)", read(files), re.M)
                    limits.append(limit)
                    free.append(max(0, limit - (used or 0) + max(map(int, cached), default=0)))
        return min(free, default=None), min(limits, default=None)

    def cores() -> int:
        usable = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            usable = len(os.sched_getaffinity(0))
        shares = [float(usable)]
        for group in cgroups("cpu"):
            limit, _, period = read(os.path.join(group, "cpu.max")).strip().partition(" ")
            limit = limit or read(os.path.join(group, "cpu.cfs_quota_us")).strip()
            period = period or read(os.path.join(group, "cpu.cfs_period_us")).strip()
            if limit.isdigit() and period.isdigit() and int(period):
                shares.append(int(limit) / int(period))
        return max(1, int(min(shares)))

    def free_bytes(folder: str) -> int | None:
        try:
            return shutil.disk_usage(folder).free if os.access(folder, os.W_OK | os.X_OK) else None
        except OSError:
            return None

    def required() -> list[str]:
        try:
            lines = importlib.metadata.requires("penstock") or []
        except importlib.metadata.PackageNotFoundError:
            lines = []
        known = "torch numpy pydantic pyyaml fsspec pyarrow safetensors cloudpickle tensorboard"
        names = [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
        return names or [*known.split(), "protobuf", "rich", "scipy", "typer"]

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "unknown" if importlib.util.find_spec(name) else None

    temporary = ""
    with contextlib.suppress(OSError):
        temporary = tempfile.gettempdir()
    memory_bytes, limit_bytes = memory()
    return {
        "host": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "executable": sys.executable,
        "platform": sysconfig.get_platform(),
        "packages": {name: version(name) for name in sorted(required())},
        "memory_bytes": memory_bytes,
        "memory_limit_bytes": limit_bytes,
        "shared_bytes": free_bytes(os.path.join(root, "dev/shm")),
        "cores": cores(),
        "temporary": temporary,
        "temporary_bytes": free_bytes(temporary),
    }


class Problem(NamedTuple):
    """What is wrong with a node, and what mends it.

    Arguments:
        fatal: whether it keeps the node from training, and is no mere note.
        rank: whose agent runs there, where that is known.
    """

    what: str
    fix: str
    fatal: bool = True
    rank: int | None = None


def problems(
    node: Facts,
    wanted: Facts,
    need_bytes: int,
    *,
    rank: int | None = None,
    compiled: Sequence[str] = (),
) -> list[Problem]:
    """What keeps a node from training, or makes it train differently.

    Arguments:
        wanted: the driver's facts: what the node should be like.
        need_bytes: memory that the node's worker takes.
        rank: for the problems.
        compiled: of `Code`.
    """
    ship = "or ship the whole environment"
    host, found = node.host, list[Problem]()

    def problem(what: str, fix: str, fatal: bool = True) -> None:
        found.append(Problem(f"{host}: {what}", fix, fatal, rank))

    if _release(node.python) != _release(wanted.python):
        problem(
            f"Python {node.python} ({node.executable}); the driver has {wanted.python}",
            f"spark.pyspark.python: a Python {'.'.join(_release(wanted.python))} of the nodes, "
            f"{ship}",
        )
    if node.platform != wanted.platform:
        only = f", and {compiled[0]} only runs on the driver's" if compiled else ""
        problem(
            f"platform {node.platform}; the driver has {wanted.platform}{only}",
            "nodes and a driver of one platform; the bits of the result may differ",
            fatal=bool(compiled),
        )
    missing = [n for n, want in wanted.packages.items() if want and not node.packages.get(n)]
    if missing:
        versions = [_exact(name, wanted.packages[name]) for name in missing]
        problem(
            f"{' and '.join(filter(None, [', '.join(missing[:-1]), missing[-1]]))} not installed "
            f"for {node.executable}",
            f"on the nodes: pip install {' '.join(versions)}; {ship}",
        )
    for name, want in wanted.packages.items():
        have = node.packages.get(name)
        if have is None or want is None or have == want:
            continue
        fix = f"on the nodes: pip install {_exact(name, want)}; {ship}"
        if name == "torch":
            other = _release(have) != _release(want)
            bits = "" if other else ": the bits of the result may differ"
            problem(f"torch {have}; the driver has {want}{bits}", fix, fatal=other)
        elif _release(have)[0] != _release(want)[0]:
            problem(f"{name} {have}; the driver has {want}", fix, fatal=False)
    if node.memory_bytes is not None and node.memory_bytes < need_bytes:
        limit = node.memory_limit_bytes
        granted = "" if limit is None else f"; its cgroup grants {size(limit)}"
        problem(
            f"{size(node.memory_bytes)} of memory free, {size(need_bytes)} needed{granted}",
            "smaller batches, fewer workers on a node, or a larger spark.executor.memoryOverhead",
        )
    if node.shared_bytes is None or node.shared_bytes < SCARCE_SHARED_BYTES:
        free = "cannot be written"
        if node.shared_bytes is not None:
            free = f"has {size(node.shared_bytes)} free: gradients lie there"
        problem(
            f"/dev/shm {free}",
            "docker run --shm-size=8g, or in Kubernetes an emptyDir of medium Memory at /dev/shm",
            fatal=node.shared_bytes is None,
        )
    return found


def _release(version: str) -> tuple[str, ...]:
    """Major and minor: ("2", "13") of "2.13.0+cu128"."""
    return tuple(version.partition("+")[0].split(".")[:2])


def _exact(name: str, version: str | None) -> str:
    known = version is not None and version != "unknown"
    return f"{name}=={str(version).partition('+')[0]}" if known else name
