"""Several hosts on one machine: network namespaces, joined by a switch of limited bandwidth.

    host 0 [eth0 10.77.0.1] ──── port0 ┐
    host 1 [eth0 10.77.0.2] ──── port1 ┤ bridge [10.77.0.254]      in a namespace of its own: the
     ...                               ┘                           machine's network is not touched

Each host has a network, a name (which all can resolve) and a /dev/shm of its own; files and
processes are the machine's. A namespace lives as long as a process in it. One shell holds each:
when it is told to, or this process dies, it kills whatever else runs there, and the kernel takes
back namespace, links and mounts. So nothing is left, however a test ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import pickle
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from penstock.cluster.launcher import WorkerExited, WorkerOutput, WorkerStarted
from penstock.cluster.local import LocalWorkers, in_memory
from penstock.runtime.payload import Payload, pack
from penstock.runtime.preload import PRELOAD

Function = Callable[[Store, int, int], Any]
"""What runs on each rank: called with a store that all ranks reach, the rank, the world size."""

GONE = object()
"""The result of a rank that ended without one, as one that is killed does."""

BURST = "256kb"
"""[measured] What a link lets through at once: at 1 Gbit/s TCP gets 0.93 of the line with 256 KiB,
0.57 with 32 KiB (AMD EPYC, 2 cores, Linux 6.18, 2026-11)."""
QUEUE = "50ms"
"""How long a packet may wait at a link's end before it is dropped."""
START_S = 20.0
"""How long commands that make the network, and the start of a process, may take."""
END_S = 10.0
"""How long killed processes may take to be gone."""

NETWORK, SWITCH = "10.77.0.0/24", "10.77.0.254"

PROGRAMS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname", "find")

# `$1` is the name and `$2` the table of names of all hosts. The end of its input is the end of the
# process that made it. What runs here may start more while it is being killed: hence the loop.
HOLD = r"""
hostname "$1" && mount -t tmpfs tmpfs /dev/shm && printf '%s' "$2" > /dev/shm/hosts &&
mount --bind /dev/shm/hosts /etc/hosts && rm /dev/shm/hosts && ip link set lo up && echo up || exit
read -r _
while
    others=0
    for path in $(find -L /proc/[0-9]*/ns/net -samefile /proc/$$/ns/net 2> /dev/null); do
        pid=${path#/proc/}; pid=${pid%%/*}
        [ "$pid" != $$ ] && kill -KILL "$pid" 2> /dev/null && others=1
    done
    [ $others = 1 ]
do :; done
"""

TRIAL = f"""
mount -t tmpfs tmpfs /dev/shm && ip link add bridge type bridge &&
ip link add port type veth peer name eth0 &&
tc qdisc add dev port root tbf rate 1gbit burst {BURST} latency {QUEUE}
"""


@functools.cache
def unavailable() -> str | None:
    """Why there can be no hosts on this machine, for skipping a test; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)}"
    command = ["unshare", "--net", "--mount", "--uts", "sh", "-c", TRIAL]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=START_S)
    except subprocess.TimeoutExpired:
        return f"a network namespace was not made within {START_S:g} s"
    return f"the kernel refuses: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def hosts(count: int, bandwidth_bits_per_s: int | None = None) -> Iterator[Hosts]:
    """Hosts for the length of a `with`.

    Arguments:
        count: of hosts, 1 to 200.
        bandwidth_bits_per_s: of each host's link, in each direction, headers of Ethernet included;
            None for what the machine gives.

    Raises:
        RuntimeError: there can be none here (see `unavailable`), or a command failed.
    """
    made = Hosts(count, bandwidth_bits_per_s)
    try:
        yield made
    finally:
        made.close()


class Hosts:
    """Hosts 0 to `count` - 1, up and joined; `hosts` makes them."""

    def __init__(self, count: int, bandwidth_bits_per_s: int | None = None) -> None:
        if not 1 <= count <= 200:
            raise ValueError(f"{count} hosts; 1 to 200 fit into the network {NETWORK}")
        if why := unavailable():
            raise RuntimeError(f"no hosts on this machine: {why}")
        self.count = count
        self._started: list[subprocess.Popen[Any]] = []
        self._holders: list[subprocess.Popen[bytes]] = []
        addresses = {self.name(host): self.address(host) for host in range(count)}
        addresses |= {"switch": SWITCH}
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in addresses.items())
        try:
            for name in addresses:
                self._holders.append(_hold(name, table))
            self._join_all(bandwidth_bits_per_s)
        except BaseException:
            self.close()
            raise

    def name(self, host: int) -> str:
        """What gethostname says there."""
        return f"host{host}"

    def address(self, host: int) -> str:
        """Where its network is reached from the other hosts, as "10.77.0.1"."""
        return f"10.77.0.{host + 1}"

    def start(
        self,
        host: int,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Starts a program on a host, in this process's folder and a session of its own.

        The process is the program itself, so signals to it reach it. It ends with the host.

        Arguments:
            env: variables beside this process's own.
            options: as of `subprocess.Popen`.
        """
        inside = ["env", f"--chdir={os.getcwd()}", *argv]
        started = subprocess.Popen(
            [*self._entering(host), "--mount", "--uts", *inside],
            env=dict(os.environ) | dict(env or {}),
            start_new_session=True,
            **options,
        )
        self._started.append(started)
        return started

    def cut(self, host: int) -> None:
        """Pulls a host's cable: from now on what it sends and what is sent to it is lost."""
        self._in_switch(["ip", "link", "set", f"port{host}", "down"])

    def join(self, host: int) -> None:
        """Puts the cable back."""
        self._in_switch(["ip", "link", "set", f"port{host}", "up"])

    def store(self, timeout_s: float = 60.0) -> TCPStore:
        """A store that all hosts reach; it is served by this process, at the switch, so it outlives
        any host that is cut off or rank that is killed."""
        made: list[TCPStore | BaseException] = []

        def serve() -> None:
            # A thread may be in another network than its process; a socket stays in its own.
            try:
                _enter(self._holders[-1].pid, ["net"])
                made.append(_store(SWITCH, 0, timeout_s, serve=True))
            except BaseException as error:
                made.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        if isinstance(made[0], BaseException):
            raise made[0]
        return made[0]

    def ranks(
        self,
        function: Function,
        hosts_by_rank: Sequence[int],
        *,
        env: Mapping[str, str] | None = None,
        store_timeout_s: float = 60.0,
    ) -> Ranks:
        """Calls a function on ranks in processes of their own; use it as a context.

        The environment is as under torchrun, so `init_process_group(backend)` works there too.

        Arguments:
            function: is pickled, as its results are.
            hosts_by_rank: the host on which each rank runs.
            env: variables for all ranks.
            store_timeout_s: how long a rank waits for a key of the store.
        """
        holders = [self._holders[host].pid for host in hosts_by_rank]
        return Ranks(function, hosts_by_rank, holders, self.store(), env or {}, store_timeout_s)

    def run(
        self,
        function: Function,
        hosts_by_rank: Sequence[int],
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> list[Any]:
        """Calls a function on ranks, as `ranks` does, and waits for what each returns, or GONE.

        Raises:
            RuntimeError: a rank raised, with its traceback; or had not ended after `timeout_s`.
        """
        with self.ranks(function, hosts_by_rank, env=env) as ranks:
            return ranks.wait(timeout_s=timeout_s)

    def close(self) -> None:
        """Kills all that runs on the hosts, and takes them down."""
        for holder in self._holders:
            assert holder.stdin is not None
            # A line, because a child of this process may have inherited the other end.
            with contextlib.suppress(BrokenPipeError):
                holder.stdin.write(b"\n")
                holder.stdin.close()
        for process in [*self._holders, *self._started]:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for holder in self._holders:
            assert holder.stdout is not None
            holder.stdout.close()
        self._holders, self._started = [], []

    def _join_all(self, bandwidth_bits_per_s: int | None) -> None:
        shape = f"root tbf rate {bandwidth_bits_per_s}bit burst {BURST} latency {QUEUE}"
        switch = [
            "link add bridge type bridge",
            f"address add {SWITCH}/24 dev bridge",
            "link set bridge up",
        ]
        for host, holder in enumerate(self._holders[:-1]):
            switch.append(f"link add port{host} type veth peer name eth0 netns {holder.pid}")
            switch.append(f"link set port{host} master bridge up")
        self._in_switch(["ip", "-batch", "-"], switch)
        for host in range(self.count):
            enter = self._entering(host)
            lines = [f"address add {self.address(host)}/24 dev eth0", "link set eth0 up"]
            _command([*enter, "ip", "-batch", "-"], lines)
            if bandwidth_bits_per_s is not None:
                _command([*enter, "tc", "-batch", "-"], [f"qdisc add dev eth0 {shape}"])
        if bandwidth_bits_per_s is not None:
            lines = [f"qdisc add dev port{host} {shape}" for host in range(self.count)]
            self._in_switch(["tc", "-batch", "-"], lines)

    def _in_switch(self, command: Sequence[str], lines: Sequence[str] = ()) -> None:
        _command([*self._entering(-1), *command], lines)

    def _entering(self, host: int) -> list[str]:
        return ["nsenter", f"--target={self._holders[host].pid}", "--net"]


class Ranks:
    """Ranks that run on hosts; `Hosts.ranks` starts them. At the end of its `with`, all are killed.

    Attributes:
        store: the one that the ranks have.
        pids: by rank, once `wait` or `started` has returned.
    """

    def __init__(
        self,
        function: Function,
        hosts_by_rank: Sequence[int],
        holders: Sequence[int],
        store: TCPStore,
        environment: Mapping[str, str],
        store_timeout_s: float,
    ) -> None:
        self.store = store
        self.world_size = len(hosts_by_rank)
        self.pids: dict[int, int] = {}
        self._running, self._printed = set(range(self.world_size)), bytearray()
        self._folder = tempfile.TemporaryDirectory(prefix="penstock-")
        task = _Task(function, self.world_size, tuple(holders), self._folder.name, store_timeout_s)
        shared = {
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": store.host,
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # a client of this store, rank 0 too
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        self._workers = LocalWorkers(PRELOAD, shared | dict(environment))
        payload = in_memory(pack({"search_path": sys.path}, task))
        try:
            for rank, host in enumerate(hosts_by_rank):
                before = list(hosts_by_rank[:rank])
                own = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(before.count(host)),
                    "LOCAL_WORLD_SIZE": str(list(hosts_by_rank).count(host)),
                }
                self._workers.start_rank(rank, payload, f"{__name__}:main", own)
        finally:
            os.close(payload)

    def started(self, timeout_s: float = START_S) -> dict[int, int]:
        """Waits until all ranks have a process, and returns their ids, for sending signals."""
        self._poll(lambda: len(self.pids) == self.world_size, timeout_s)
        return self.pids

    def wait(self, ranks: Sequence[int] | None = None, *, timeout_s: float = 60.0) -> list[Any]:
        """Waits until these ranks (None: all) have ended.

        Returns:
            What each of them returned, or GONE, in their order here.

        Raises:
            RuntimeError: one raised, with its traceback; or had not ended after `timeout_s`.
        """
        awaited = list(range(self.world_size)) if ranks is None else list(ranks)
        in_time = self._poll(lambda: self._running.isdisjoint(awaited), timeout_s)
        results: list[Any] = []
        for rank in awaited:
            path = Path(self._folder.name) / f"result-{rank}"
            failed, value = pickle.loads(path.read_bytes()) if path.exists() else (False, GONE)
            if failed:
                raise RuntimeError(f"rank {rank} raised:\n{value}")
            results.append(value)
        if not in_time:
            late = sorted(self._running.intersection(awaited))
            raise RuntimeError(f"ranks {late} had not ended after {timeout_s:g} s")
        return results

    def close(self) -> None:
        """Kills the ranks that still run; shows what all have printed."""
        try:
            self._workers.close()
        finally:
            sys.stderr.write(self._printed.decode(errors="replace"))
            self._printed.clear()
            self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _poll(self, until: Callable[[], bool], timeout_s: float) -> bool:
        give_up = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > give_up:
                return False
            select.select(self._workers.filenos(), [], [], 0.2)
            for event in self._workers.poll():
                if isinstance(event, WorkerStarted):
                    self.pids[event.rank] = event.pid
                elif isinstance(event, WorkerExited):
                    self._running.discard(event.rank)
                elif isinstance(event, WorkerOutput):
                    self._printed += event.data
        return True


@dataclass(frozen=True)
class _Task:
    function: Function
    world_size: int
    holders: tuple[int, ...]  # by rank: a process in the namespaces of its host
    folder: str
    store_timeout_s: float


def main(fd: int) -> int:
    """A rank's process."""
    rank = int(os.environ["RANK"])
    packed = Payload(fd)
    sys.path[:] = packed.head["search_path"]
    task: _Task = packed.load()
    here = os.getcwd()
    _enter(task.holders[rank], ["net", "uts", "mnt"])
    os.chdir(here)  # another mount namespace begins at its root
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = _store(address, port, task.store_timeout_s, serve=False)
        result = (False, task.function(store, rank, task.world_size))
    except Exception:
        result = (True, traceback.format_exc())
    path = Path(task.folder) / f"result-{rank}"
    path.with_suffix(".part").write_bytes(pickle.dumps(result))
    path.with_suffix(".part").rename(path)
    return 0


def _hold(name: str, table: str) -> subprocess.Popen[bytes]:
    """Makes a host's namespaces, and the process that holds them."""
    holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "--uts", "sh", "-c", HOLD, "hold", name, table],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C in the terminal is the test's alone
    )
    assert holder.stdout is not None
    ready, _, _ = select.select([holder.stdout], [], [], START_S)
    if not ready or holder.stdout.readline() != b"up\n":
        holder.kill()
        holder.communicate()
        raise RuntimeError(f"{name} did not come up within {START_S:g} s; its message is above")
    return holder


def _command(command: Sequence[str], lines: Sequence[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=START_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}\n{text}")


def _enter(pid: int, namespaces: Sequence[str]) -> None:
    """Moves this thread, for good, into namespaces of another process."""
    libc = ctypes.CDLL(None, use_errno=True)
    opened = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in namespaces]
    for fd in opened:
        if libc.setns(fd, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter a namespace of process {pid}")
        os.close(fd)


def _store(address: str, port: int, timeout_s: float, *, serve: bool) -> TCPStore:
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(address, port, None, serve, timeout, wait_for_workers=False)
