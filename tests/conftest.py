"""What tests with processes of their own share: a deadline, and that nothing is left behind."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE_S = 120
"""How long a test with processes may take."""
LEAVE_S = 5.0
"""How long what a test used may take to be gone."""
OURS = ("penstock", "torch_", "gloo")
"""How names of shared memory begin that a run may have made; other programs have theirs."""
FORK_SERVER = "penstock.cluster.forkserver"


@pytest.fixture
def deadline() -> Iterator[None]:
    """Ends a test that hangs: dumps the stacks of all threads, lists its processes, and raises."""

    def over(number: int, frame: object) -> None:
        processes = "\n".join(f"  {pid} {state_of(pid)}" for pid in descendants())
        raise TimeoutError(f"the test took more than {DEADLINE_S} s; its processes:\n{processes}")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(DEADLINE_S + 1)
    # A main thread that is stuck in C raises nothing: then at least the stacks are seen.
    faulthandler.dump_traceback_later(DEADLINE_S, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def stays() -> Callable[[], set[int]]:
    """The processes that tests share and that outlive each; a folder's conftest.py says which."""
    return set


@pytest.fixture
def nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: Callable[[], set[int]]
) -> Iterator[None]:
    """Afterwards no process, shared memory, temporary folder or listening port is left.

    The fork server stays, as it does for a driver's life.
    """
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    looks: dict[str, Callable[[], set[str]]] = {
        "processes": lambda: {f"{p} {state_of(p)}" for p in set(descendants()) - stays()},
        "shared memory": lambda: {
            f.name for f in Path("/dev/shm").iterdir() if f.name.startswith(OURS)
        },
        "temporary folders": lambda: {f.name for f in folder.glob("penstock-*")},
        "listening ports": lambda: listening(set(descendants()) - stays()),
    }
    before = {what: look() for what, look in looks.items()}
    yield
    give_up = time.monotonic() + LEAVE_S
    for what, look in looks.items():
        while (left := look() - before[what]) and time.monotonic() < give_up:
            time.sleep(0.02)
        assert not left, f"{what} left: {sorted(left)}"


def descendants() -> list[int]:
    """The processes that this one started and theirs, without the fork servers themselves."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [os.getpid()]
    for pid in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == pid]
    return [p for p in found[1:] if FORK_SERVER not in state_of(p) or parents[p] != os.getpid()]


def state_of(pid: int) -> str:
    """State and command line of a process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return f"{state} {words}"


def listening(processes: set[int]) -> set[str]:
    """The TCP ports on which this process and `processes` listen."""
    sockets = set()
    for pid in {os.getpid(), *processes}:
        try:
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                sockets.add(os.readlink(fd))
        except (FileNotFoundError, ProcessLookupError):
            continue
    ports = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # 0A: it listens
                ports.add(f"port {int(fields[1].rpartition(':')[2], 16)}")
    return ports
