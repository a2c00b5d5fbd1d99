"""What this machine offers for training, what is missing, and how to mend it.

`examine` looks; each finding is made by a function of what was read, with no look of its own.
A `problem` stops training on this machine; a `note` costs speed, or matters to a cluster only.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import pwd
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

_GIB = 1 << 30
_SCARCE_MEMORY_BYTES = 2 * _GIB  # a worker is about 0.5 GiB before its network
_SCARCE_SHARED_BYTES = 1 * _GIB  # gradients' buffers lie there; Docker gives 64 MiB
_SCARCE_DISK_BYTES = 2 * _GIB
_FULL_DISK_BYTES = 64 << 20  # not even a small run's checkpoints fit
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes a number like this for no limit
_FEW_FILES = 1024
_PR_GET_PDEATHSIG = 2  # linux/prctl.h
_SPARK_JAVA = (17, 21)  # Spark 4's documentation, "Downloading"
_DEADLINE_S = 10.0

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at: its name, how it stands, what was found, and what mends it."""

    name: str
    status: Status
    value: str
    fix: str = ""


def examine() -> list[Finding]:
    """Looks at this machine. Starts nothing that outlives the call; takes about a second."""
    system, usable, quota = platform.system(), _affinity(), cpu_quota()
    temporary, current = Path(tempfile.gettempdir()), Path.cwd()
    java = _java_command(os.environ.get("JAVA_HOME"))
    java_says = _java_version_text(java) if java else None
    return [
        find_python(sys.version_info[:3]),
        *_find_torch(max(1, min(usable, int(quota or usable)))),
        find_cores(os.cpu_count() or usable, usable, quota),
        find_memory(_read(Path("/proc/meminfo")), memory_limit_bytes()),
        find_shared_memory(_space(Path("/dev/shm"))),
        find_disk("temporary folder", temporary, _space(temporary), "set TMPDIR"),
        find_disk("current folder", current, _space(current), "start in another folder"),
        find_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        find_loopback(_try_loopback()),
        find_parent_death(system, _prctl_works),
        find_logout(Path("/"), _user()),
        find_java(java_says, _read(Path("/etc/os-release")), java or ""),
        find_pyspark(_installed("pyspark")),
    ]


def show(findings: Iterable[Finding], console: Console) -> None:
    """Prints the findings: a table in a terminal, plain lines elsewhere."""
    findings = list(findings)
    if not console.is_terminal:
        width = max((len(finding.name) for finding in findings), default=0)
        for finding in findings:
            lines = [f"{finding.status:<7}  {finding.name:<{width}}  {finding.value}"]
            if finding.fix:
                lines.append(f"{'':<7}  {'':<{width}}  fix: {finding.fix}")
            for line in lines:
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "", "found", "fix"):
        table.add_column(heading, header_style="bold", overflow="fold")
    for finding in findings:
        status = Text(finding.status, styles[finding.status])
        table.add_row(status, Text(finding.name), Text(finding.value), Text(finding.fix))
    console.print(table)


def find_python(version: Sequence[int]) -> Finding:
    """`version`: (major, minor, micro)."""
    value = ".".join(map(str, version))
    if tuple(version) < (3, 11):
        return Finding("python", "problem", value, "install Python 3.11 or newer")
    return Finding("python", "ok", value)


def _find_torch(cores: int) -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("torch", "problem", f"cannot be imported: {error}", "pip install torch")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    build = "CPU only"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    driver = _read(Path("/proc/driver/nvidia/version"))
    return [
        Finding("torch", "ok", f"{torch.__version__}, built for {build}"),
        find_devices(names, build, driver),
        find_threads(torch.get_num_threads(), cores, os.environ.get("OMP_NUM_THREADS")),
    ]


def find_devices(names: Sequence[str], build: str, driver: str) -> Finding:
    """`names`: GPUs that torch sees; `driver`: what the NVIDIA driver says, if there is one."""
    if names:
        counts = {name: list(names).count(name) for name in names}
        listed = ", ".join(f"{count} x {name}" for name, count in counts.items())
        return Finding("devices", "ok", listed)
    if not driver:
        return Finding("devices", "ok", "no GPU: trains on the CPU")
    return Finding(
        "devices",
        "note",
        f"an NVIDIA driver, but no GPU that torch ({build}) can use",
        "install torch for CUDA as pytorch.org/get-started says, and check `nvidia-smi` and "
        "CUDA_VISIBLE_DEVICES",
    )


def find_threads(threads: int, cores: int, variable: str | None) -> Finding:
    """`variable`: OMP_NUM_THREADS, or None where it is not set."""
    value = f"{threads} by default; OMP_NUM_THREADS is {variable or 'not set'}"
    if threads > cores:
        return Finding("threads", "note", value, f"export OMP_NUM_THREADS={cores}")
    return Finding("threads", "ok", value)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def find_cores(present: int, usable: int, quota: float | None) -> Finding:
    """`usable`: by affinity; `quota`: cores' worth of time that the cgroup grants, if limited."""
    value = f"{usable} of {present} usable"
    if quota is None or quota >= usable:
        return Finding("cores", "ok", value)
    return Finding(
        "cores",
        "note",
        f"{value}, but the cgroup grants the time of {quota:g}",
        f"raise the container's limit (docker run --cpus, Kubernetes resources.limits.cpu), or "
        f"train with at most {max(1, int(quota))} workers",
    )


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process's cgroups (v1 or v2) grant; None without a limit."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        limit, _, period = _read(folder / "cpu.max").partition(" ")
        limit = limit or _read(folder / "cpu.cfs_quota_us")
        period = period or _read(folder / "cpu.cfs_period_us")
        if limit.strip().isdigit() and period.strip().isdigit() and int(period):
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process's cgroups (v1 or v2) grant; None without a limit."""
    limits = []
    for folder in _cgroup_folders(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.strip().isdigit() and int(limit) < _UNLIMITED_BYTES:
            limits.append(int(limit))
    return min(limits, default=None)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The cgroup's own folder and those above it, of every hierarchy with this controller.

    In a container the path may be the host's, of which only the top is mounted: that counts too.
    """
    mounted = root / "sys/fs/cgroup"
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tops = [mounted / controllers, mounted / controller] if controllers else []
        for top in tops or [mounted, mounted / "unified"]:
            own = top / path.lstrip("/")
            folders += [f for f in (own, *own.parents) if f.is_relative_to(top) and f.is_dir()]
    return folders


def find_memory(meminfo: str, limit_bytes: int | None) -> Finding:
    """`meminfo`: /proc/meminfo; `limit_bytes`: of the cgroup."""
    sizes = {n: int(kib) * 1024 for n, kib in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.M)}
    if not {"MemTotal", "MemAvailable"} <= sizes.keys():
        return Finding("memory", "ok", "not known on this system")
    available = sizes["MemAvailable"]
    value = f"{_gib(available)} available of {_gib(sizes['MemTotal'])}"
    if limit_bytes is not None and limit_bytes < sizes["MemTotal"]:
        available = min(available, limit_bytes)
        value += f"; the cgroup grants {_gib(limit_bytes)}"
    if available < _SCARCE_MEMORY_BYTES:
        fix = "end other programs, raise the container's limit (docker run --memory), or train "
        return Finding("memory", "note", value, fix + "with fewer workers")
    return Finding("memory", "ok", value)


def _space(folder: Path) -> tuple[int, int] | None:
    """(total, free) in bytes; None where the folder is missing or may not be written."""
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free


def find_shared_memory(space: tuple[int, int] | None) -> Finding:
    """`space`: (total, free) of /dev/shm in bytes; None where it cannot be written."""
    container = "in a container docker run --shm-size=8g, or in Kubernetes an emptyDir of medium "
    container += "Memory at /dev/shm"
    if space is None:
        value = "/dev/shm is missing or may not be written"
        fix = f"mount -t tmpfs -o mode=1777 tmpfs /dev/shm; {container}"
        return Finding("shared memory", "problem", value, fix)
    total, free = space
    value = f"{_gib(free)} free of {_gib(total)} in /dev/shm"
    if free < _SCARCE_SHARED_BYTES:
        return Finding(
            "shared memory", "note", value, f"mount -o remount,size=8G /dev/shm; {container}"
        )
    return Finding("shared memory", "ok", value)


def find_disk(name: str, folder: Path, space: tuple[int, int] | None, elsewhere: str) -> Finding:
    """`space`: (total, free) of the folder in bytes; None where it cannot be written.

    `elsewhere`: how to use another one.
    """
    if space is None:
        value = f"{folder} is missing or may not be written"
        return Finding(name, "problem", value, f"mend its rights, or {elsewhere}")
    value = f"{_gib(space[1])} free in {folder}"
    fix = f"delete what is not needed, or {elsewhere}"
    if space[1] < _FULL_DISK_BYTES:
        return Finding(name, "problem", value, fix)
    if space[1] < _SCARCE_DISK_BYTES:
        return Finding(name, "note", value, fix)
    return Finding(name, "ok", value)


def find_open_files(soft: int, hard: int) -> Finding:
    """The limits on open files, as `getrlimit` gives them; -1 is none."""
    infinite = resource.RLIM_INFINITY
    shown = ["unlimited" if limit in (infinite, -1) else f"{limit:,}" for limit in (soft, hard)]
    value = f"{shown[0]}, at most {shown[1]}"
    if shown[0] != "unlimited" and soft < _FEW_FILES:
        fix = f"ulimit -n {_FEW_FILES * 8 if shown[1] == 'unlimited' else min(hard, 8192)}"
        return Finding("open files", "note", value, fix)
    return Finding("open files", "ok", value)


def _try_loopback() -> str:
    """Empty if a socket of this machine reaches another one, else what went wrong."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(2)
            with socket.create_connection(server.getsockname(), timeout=2):
                server.accept()[0].close()
    except OSError as error:
        return str(error)
    return ""


def find_loopback(error: str) -> Finding:
    """`error`: why 127.0.0.1 could not be reached; empty if it was."""
    if error:
        fix = "ip link set lo up, and let the firewall or sandbox pass 127.0.0.1"
        return Finding("loopback", "problem", f"127.0.0.1 not reached: {error}", fix)
    return Finding("loopback", "ok", "127.0.0.1 reached")


def _prctl_works() -> bool:
    signal = ctypes.c_int()
    try:
        result = ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(signal), 0, 0, 0)
    except (OSError, AttributeError):
        return False
    return bool(result == 0)


def find_parent_death(system: str, works: Callable[[], bool]) -> Finding:
    """`works`: whether the kernel can signal a process when its parent dies (prctl)."""
    if system == "Linux" and works():
        return Finding(
            "parent-death signal", "ok", "workers end with the process that started them"
        )
    return Finding(
        "parent-death signal",
        "note",
        "not available: workers may outlive a killed driver",
        "use Linux, or let the sandbox pass prctl; else end left-over workers by hand",
    )


def _user() -> str:
    """The user's name, or number where a container gives it no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def find_logout(root: Path, user: str) -> Finding:
    """Whether systemd-logind ends the workers of `user` at logout; configuration below `root`."""
    if not (root / "run/systemd/system").is_dir():
        return Finding("logout", "ok", "no systemd: workers outlive a logout under nohup or tmux")
    settings = read_logind(root)
    kills = settings.get("KillUserProcesses", "yes").lower() in ("1", "yes", "y", "true", "t", "on")
    only = settings.get("KillOnlyUsers", "").split()
    spared = settings.get("KillExcludeUsers", "root").split()
    if not kills or user in spared or (only and user not in only):
        return Finding("logout", "ok", "workers may outlive a logout, under nohup or tmux")
    return Finding(
        "logout",
        "note",
        "systemd ends the workers at logout (KillUserProcesses=yes)",
        f"loginctl enable-linger {user}, and start with systemd-run --user --scope penstock run "
        "...; or set KillUserProcesses=no under [Login] in /etc/systemd/logind.conf and restart "
        "systemd-logind",
    )


def read_logind(root: Path) -> dict[str, str]:
    """systemd-logind's settings, as man 5 logind.conf orders its files.

    A setting that a distribution ships commented out states its compiled default (`yes` upstream,
    `no` on Debian); any file that sets it comes before that.
    """
    places = [root / place for place in ("etc", "run", "usr/local/lib", "usr/lib", "lib")]
    mains = [place / "systemd/logind.conf" for place in places]
    main = next((text for path in mains if (text := _read(path))), "")
    dropins: dict[str, Path] = {}
    for place in reversed(places):
        dropins |= {path.name: path for path in place.glob("systemd/logind.conf.d/*.conf")}
    settings = dict(re.findall(r"^#(Kill\w+)=[ \t]*(.*?)[ \t]*$", main, re.M))
    for text in (main, *(_read(dropins[name]) for name in sorted(dropins))):
        settings |= dict(re.findall(r"^[ \t]*(\w+)[ \t]*=[ \t]*(.*?)[ \t]*$", text, re.M))
    return settings


def _java_command(home: str | None) -> str | None:
    """The java that Spark would start: JAVA_HOME's, or the path's."""
    return str(Path(home) / "bin/java") if home else shutil.which("java")


def _java_version_text(command: str) -> str:
    try:
        done = subprocess.run(
            [command, "-version"], capture_output=True, text=True, timeout=_DEADLINE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr + done.stdout


def parse_java_version(text: str) -> int | None:
    """The feature release in `java -version`'s words: 17 for "17.0.15", 8 for "1.8.0_392"."""
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(match[1]) if match else None


def find_java(version_text: str | None, os_release: str, command: str) -> Finding:
    """`version_text`: what `command` -version says; None where there is no java."""
    debian = re.search(r'^VERSION_ID="?(\d+)', os_release, re.M)
    newer = "ID=debian" in os_release.splitlines() and debian is not None and int(debian[1]) >= 13
    fix = f"for Spark: apt install openjdk-{21 if newer else 17}-jre-headless"
    if version_text is None:
        return Finding("java", "note", "none: only Spark needs it", fix)
    version = parse_java_version(version_text)
    if version is None:
        first = (version_text.strip().splitlines() or ["it says nothing"])[0]
        value = f"{command} does not tell its version: {first}"
        return Finding("java", "note", value, f"{fix}, and mend JAVA_HOME")
    if version not in _SPARK_JAVA:
        value = f"{version} ({command}); Spark 4 needs {' or '.join(map(str, _SPARK_JAVA))}"
        return Finding("java", "note", value, f"{fix}, and point JAVA_HOME at it")
    return Finding("java", "ok", f"{version} ({command})")


def _installed(distribution: str) -> str | None:
    """Its version, if it can be imported."""
    if importlib.util.find_spec(distribution) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def find_pyspark(version: str | None) -> Finding:
    """`version`: of the installed pyspark, None if there is none."""
    fix = "pip install 'pyspark>=4'"
    if version is None:
        return Finding(
            "pyspark", "note", "not installed: training on this machine does without", fix
        )
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < 4:
        return Finding("pyspark", "note", f"{version}; Penstock needs 4 or newer", fix)
    return Finding("pyspark", "ok", version)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f} GiB"
