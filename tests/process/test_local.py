"""Workers as processes of this machine: the launcher's contract, and what its fork server imports.

`family`, `alive`, `until`, `search_path` and `driver` serve the other tests of processes too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.cluster import local
from penstock.cluster.launcher import Event, WorkerExited, WorkerOutput, WorkerStarted
from penstock.cluster.local import LocalWorkers
from penstock.errors import Fault
from penstock.runtime.preload import PRELOAD

HERE = Path(__file__).parent

TARGETS = """
import json, os, signal, subprocess, sys, time

def tell(fd):
    rank = int(os.environ["PENSTOCK_RANK"])
    print(json.dumps({
        "rank": rank, "mine": os.environ.get("MINE"), "extra": os.environ.get("EXTRA"),
        "folder": os.getcwd(), "payload": os.pread(fd, 1000, 0).decode(), "pid": os.getpid(),
        "big": len(os.environ.get("BIG", "")), "argument": os.environ.get("ODD"),
    }))
    return 7 * rank

def sleep(fd):
    time.sleep(60)
    return 0

def parent(fd):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid)
    if os.environ.get("THEN") == "return":
        return 0
    time.sleep(60)

def first_sleeps(fd):
    time.sleep(60 if os.environ["PENSTOCK_RANK"] == "0" else 0)
    return 0

def raises(fd):
    raise ValueError("a cause")

def aborts(fd):
    print("no newline", end="", flush=True)
    os.kill(os.getpid(), signal.SIGABRT)
    time.sleep(60)
"""


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == one]
    return found


def alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def until(happened: Callable[[], object], seconds: float, what: str) -> float:
    """Waits until something has happened; returns how long that took, in seconds."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.002)
    return time.monotonic() - began


def search_path(folder: Path) -> str:
    """What PYTHONPATH must be for a folder to come first."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def driver(code: str, *arguments: object, folder: Path) -> subprocess.Popen[bytes]:
    """A driver in a process of its own; its output is in `folder`/output."""
    with open(folder / "output", "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": search_path(HERE)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what a terminal sends to all in it is this driver's alone
        )


@pytest.fixture
def preload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Modules for a fork server of this test's own: fast to start, as it does not need torch."""
    (tmp_path / "targets.py").write_text(TARGETS)
    monkeypatch.setenv("PYTHONPATH", search_path(tmp_path))
    modules = ("targets", "json")
    yield modules
    local.acquire(modules).close()


def drain(launcher: LocalWorkers, seconds: float = 20.0) -> list[Event]:
    """All events until every worker that was started has ended."""
    events: list[Event] = []
    give_up = time.monotonic() + seconds
    while launcher._running:
        assert time.monotonic() < give_up, f"workers {launcher._running} still run: {events}"
        events += launcher.poll()
        time.sleep(0.005)
    return events


def ends(events: list[Event]) -> dict[int, WorkerExited]:
    return {e.rank: e for e in events if isinstance(e, WorkerExited)}


def printed(events: list[Event]) -> dict[int, str]:
    found: dict[int, str] = {}
    for e in events:
        if isinstance(e, WorkerOutput):
            found[e.rank] = found.get(e.rank, "") + e.data.decode()
    return found


def first_line(launcher: LocalWorkers, rank: int) -> str:
    """Waits for a worker's first line."""
    text = ""
    give_up = time.monotonic() + 20
    while "\n" not in text:
        assert time.monotonic() < give_up, f"rank {rank} printed nothing"
        text += printed(launcher.poll()).get(rank, "")
        time.sleep(0.005)
    return text.splitlines()[0]


def test_workers_get_what_they_are_given_and_their_ends_are_told(
    preload: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINE", "driver's")
    monkeypatch.setenv("EXTRA", "overridden")
    os.environb[b"ODD"] = b"not utf-8: \xff"
    monkeypatch.chdir(tmp_path)
    launcher = LocalWorkers(preload, {"EXTRA": "launcher's"})
    launcher.start([b"one ", memoryview(b"payload")], "targets:tell", 2)
    events = drain(launcher)
    launcher.close()
    del os.environb[b"ODD"]

    told = {rank: json.loads(text) for rank, text in printed(events).items()}
    for rank in (0, 1):
        assert told[rank]["rank"] == rank
        assert told[rank]["mine"] == "driver's"
        assert told[rank]["extra"] == "launcher's"
        assert told[rank]["folder"] == str(tmp_path)
        assert told[rank]["payload"] == "one payload"
        assert told[rank]["argument"].encode(errors="surrogateescape") == b"not utf-8: \xff"
    started = {e.rank: e for e in events if isinstance(e, WorkerStarted)}
    assert {r: e.pid for r, e in started.items()} == {r: told[r]["pid"] for r in (0, 1)}
    assert {r: (e.code, e.signal) for r, e in ends(events).items()} == {0: (0, None), 1: (7, None)}
    assert str(ends(events)[1]) == "ended with exit code 7"


def test_an_environment_longer_than_a_message(
    preload: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = LocalWorkers(preload)
    for number in range(20):  # 1.2 MB: an execve takes no more than 128 kB in one variable
        monkeypatch.setenv(f"LONG{number}", "x" * 60_000)
    launcher.close()
    launcher = LocalWorkers(preload, {"BIG": "y" * 500_000})
    launcher.start([b""], "targets:tell", 1)
    events = drain(launcher)
    launcher.close()
    assert json.loads(printed(events)[0])["big"] == 500_000


def test_what_a_worker_raises_and_what_kills_it_is_told(preload: tuple[str, ...]) -> None:
    launcher = LocalWorkers(preload)
    launcher.start([b""], "targets:raises", 1)
    events = drain(launcher)
    assert ends(events)[0].code == 1
    assert "ValueError: a cause" in printed(events)[0]
    launcher.close()

    launcher = LocalWorkers(preload)
    launcher.start([b""], "targets:aborts", 1)
    events = drain(launcher)
    launcher.close()
    assert ends(events)[0].signal == signal.SIGABRT
    assert str(ends(events)[0]) == "was killed by SIGABRT"
    assert printed(events)[0] == "no newline"  # told before its end


def test_kill_ends_one_worker_and_what_it_has_started(preload: tuple[str, ...]) -> None:
    launcher = LocalWorkers(preload)
    launcher.start([b""], "targets:parent", 2)
    children = {}
    while len(children) < 2:
        for rank, text in printed(launcher.poll()).items():
            children[rank] = int(text)
        time.sleep(0.005)
    launcher.kill(0)
    until(lambda: not alive(children[0]), 5, "the killed worker's child ends")
    until(lambda: 0 in ends(launcher.poll()), 5, "its end is told")
    assert alive(children[1])
    assert launcher._running == {1}
    launcher.close()
    until(lambda: not alive(children[1]), 5, "the other's child ends")


@pytest.mark.parametrize("then", ["return", "die"])
def test_what_a_worker_leaves_behind_ends_with_it(preload: tuple[str, ...], then: str) -> None:
    launcher = LocalWorkers(preload, {"THEN": then})
    launcher.start([b""], "targets:parent", 1)
    child = int(first_line(launcher, 0))
    if then == "die":
        assert alive(child)
        os.kill(launcher._pids[0], signal.SIGKILL)
    drain(launcher)
    until(lambda: not alive(child), 5, "the child ends")
    launcher.close()


def test_close_ends_all_and_keeps_the_server(preload: tuple[str, ...]) -> None:
    launcher = LocalWorkers(preload)
    server = launcher._server.process.pid
    launcher.start([b""], "targets:sleep", 3)
    until(lambda: launcher.poll() is not None and len(launcher._pids) == 3, 20, "all have begun")
    pids = list(launcher._pids.values())
    began = time.monotonic()
    launcher.close()
    assert time.monotonic() - began < 3
    assert not any(map(alive, pids))

    again = LocalWorkers(preload)
    assert again._server.process.pid == server
    again.start([b""], "targets:tell", 1)
    assert ends(drain(again))[0].code == 0  # and nothing of the earlier run's ends
    again.close()
    assert len(os.listdir(f"/proc/{server}/fd")) <= 6  # it has closed what it was handed


def test_close_at_once_after_start(preload: tuple[str, ...]) -> None:
    launcher = LocalWorkers(preload)
    launcher.start([b""], "targets:sleep", 2)
    launcher.close()
    assert len(family(launcher._server.process.pid)) == 1


def test_the_end_of_the_server_is_the_end_of_its_workers(preload: tuple[str, ...]) -> None:
    launcher = LocalWorkers(preload)
    launcher.start([b""], "targets:parent", 2)
    children: dict[int, int] = {}
    while len(children) < 2:
        children |= {rank: int(text) for rank, text in printed(launcher.poll()).items()}
        time.sleep(0.005)
    pids = list(launcher._pids.values())
    os.kill(launcher._server.process.pid, signal.SIGKILL)
    events = drain(launcher, 5)
    found = ends(events)
    assert {rank: e.pid for rank, e in found.items()} == launcher._pids
    assert str(found[0]).endswith("with its fork server, which was killed by SIGKILL")
    until(lambda: not any(map(alive, pids)), 2, "the workers end")
    until(lambda: not any(map(alive, children.values())), 2, "what they have started ends")
    launcher.close()

    again = LocalWorkers(preload)
    assert again._server is not launcher._server
    again.start([b""], "targets:tell", 1)
    assert ends(drain(again))[0].code == 0
    again.close()


def test_a_server_that_cannot_import_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    launcher = LocalWorkers(("no_such_module_anywhere",))
    try:
        launcher.start([b""], "targets:tell", 1)
        message = str(ends(drain(launcher))[0])
    except Fault as error:  # it was gone before it was asked
        message = str(error)
    launcher.close()
    assert "fork server" in message
    assert "message is above" in message
    assert "No module named 'no_such_module_anywhere'" in capfd.readouterr().err


def test_a_server_with_a_second_thread_refuses_to_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(0.5,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", search_path(tmp_path))
    launcher = LocalWorkers(("threaded",))
    try:
        launcher.start([b""], "threaded:none", 1)
        drain(launcher)
    except Fault:
        pass
    launcher.close()
    assert "2 threads" in capfd.readouterr().err


def test_two_launchers_at_once_have_a_server_each(preload: tuple[str, ...]) -> None:
    local.warm(preload)
    one, two = LocalWorkers(preload, {"MINE": "one"}), LocalWorkers(preload, {"MINE": "two"})
    assert one._server is not two._server
    for launcher in (one, two):
        launcher.start([b""], "targets:tell", 2)
    seen = {name: printed(drain(x)) for name, x in (("one", one), ("two", two))}
    for name, by_rank in seen.items():
        assert {json.loads(text)["mine"] for text in by_rank.values()} == {name}
        assert set(by_rank) == {0, 1}
    servers = [one._server, two._server]
    one.close()
    two.close()
    assert sum(server.usable for server in servers) == 1  # one is kept


def test_a_waiting_server_is_used_and_a_dead_one_is_not(preload: tuple[str, ...]) -> None:
    local.warm(preload)
    waiting = local._idle[preload]
    local.warm(preload)
    assert local._idle[preload] is waiting
    launcher = LocalWorkers(preload)
    assert launcher._server is waiting
    launcher.close()
    os.kill(waiting.process.pid, signal.SIGKILL)
    waiting.process.wait(5)
    launcher = LocalWorkers(preload)
    assert launcher._server is not waiting
    launcher.start([b""], "targets:tell", 1)
    assert ends(drain(launcher))[0].code == 0
    launcher.close()


def test_the_fork_server_runs_one_thread_after_its_imports() -> None:
    launcher = LocalWorkers(PRELOAD)
    launcher.start([b""], "os:isatty", 1)  # ready once a worker of it has ended
    assert ends(drain(launcher, 60))[0].code == 0
    assert len(os.listdir(f"/proc/{launcher._server.process.pid}/task")) == 1
    launcher.close()


LOOK = """
import importlib, json, os, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
import torch
print(json.dumps({
    "threads": len(os.listdir("/proc/self/task")),
    "compiler": "torch._dynamo" in sys.modules,
    "cuda": torch.cuda.is_initialized(),
}))
"""


def fresh(code: str, *arguments: str, **environment: str) -> object:
    """What a new interpreter prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_the_imports_start_no_thread_no_compiler_and_no_cuda() -> None:
    found = fresh(LOOK, json.dumps(PRELOAD), OPENBLAS_NUM_THREADS="1")
    assert found == {"threads": 1, "compiler": False, "cuda": False}


def test_the_look_at_imports_can_fail(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(
        "import sys, threading, time, types\n"
        "sys.modules['torch._dynamo'] = types.ModuleType('torch._dynamo')\n"
        "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    )
    found = fresh(LOOK, '["busy"]', OPENBLAS_NUM_THREADS="1", PYTHONPATH=search_path(tmp_path))
    assert isinstance(found, dict)
    assert found["compiler"]
    assert found["threads"] > 1


TORCHS_OWN = """
import json, sys, torch
torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1).zero_grad()
print(json.dumps("torch._dynamo" in sys.modules))
"""


def test_optimizers_import_the_compiler_where_nobody_prevents_it() -> None:
    """Else `penstock.runtime.optimizers` has become needless."""
    assert fresh(TORCHS_OWN) is True


LATER = """
import json, sys, torch
import penstock.runtime.optimizers
p = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([p], lr=0.1)
p.sum().backward()
optimizer.zero_grad()
before = "torch._dynamo" in sys.modules

import torch._dynamo
seen = []
def backend(graph, inputs):
    seen.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
    return graph

@torch.compile(backend=backend)
def step(x):
    loss = (p * x).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss * 2

step(torch.ones(3))
wrapped = torch.optim.Optimizer.zero_grad.__wrapped__
print(json.dumps({
    "before": before,
    "disabled": bool(getattr(wrapped.__dict__["__dynamo_disable"], "_torchdynamo_disable", False)),
    "compiled": len(seen) > 0,
    "p": p.tolist(),
    "grad": p.grad is None,
}))
"""


def test_once_the_compiler_is_imported_it_leaves_optimizers_alone() -> None:
    found = fresh(LATER)
    assert found == {
        "before": False,
        "disabled": True,
        "compiled": True,
        "p": pytest.approx([0.9, 0.9, 0.9]),
        "grad": True,
    }
