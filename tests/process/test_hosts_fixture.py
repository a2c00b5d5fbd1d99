"""Hosts on one machine: each has a network, a name and a /dev/shm of its own; nothing is left."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock.testing import hosts as hosts_module
from penstock.testing.hosts import GONE, Hosts, hosts, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")

LIMIT_BITS_PER_S = 100_000_000
NUM_BYTES = 5_000_000
LEAVE_S = 10.0


def network_of(pid: int) -> str:
    """The network namespace in which a process is."""
    return os.readlink(f"/proc/{pid}/ns/net")


def host_of(pid: int) -> str:
    """The network namespace of the host that a process runs on; waits until it has entered it."""
    assert within(LEAVE_S, lambda: network_of(pid) != network_of(os.getpid()))
    return network_of(pid)


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def in_use(networks: set[str]) -> set[str]:
    """Those of these network namespaces that still have a process."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.add(network_of(int(process.name)))
    return found & networks


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    give_up = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


def meet(store: dist.Store, rank: int, address: str) -> socket.socket:
    """A connection between ranks 0 and 1; rank 0 listens on `address`."""
    if rank == 0:
        with socket.create_server((address, 0)) as listener:
            listener.settimeout(20)
            store.set("port", str(listener.getsockname()[1]))
            connection, _ = listener.accept()
    else:
        connection = socket.create_connection((address, int(store.get("port"))), timeout=20)
    connection.settimeout(20)
    return connection


def swap(address: str, store: dist.Store, rank: int, world_size: int) -> float:
    """Sends and receives NUM_BYTES at once; returns the bits per second of what came."""
    with meet(store, rank, address) as connection:
        connection.sendall(b"ready") if rank else connection.recv(5, socket.MSG_WAITALL)
        began = time.monotonic()
        sender = threading.Thread(target=connection.sendall, args=(bytes(NUM_BYTES),))
        sender.start()
        buffer, got = bytearray(1 << 18), 0
        while got < NUM_BYTES:
            count = connection.recv_into(buffer)
            assert count, "closed early"
            got += count
        seconds = time.monotonic() - began
        sender.join(20)
        store.set(f"done {rank}", "")
        store.wait(["done 0", "done 1"])
    return 8 * NUM_BYTES / seconds


def test_links_have_the_bandwidth_asked_for_in_both_directions() -> None:
    def rates(bandwidth_bits_per_s: int | None) -> list[float]:
        with hosts(2, bandwidth_bits_per_s) as net:
            return net.run(functools.partial(swap, net.address(0)), [0, 1])

    # A machine that is busy with other things can only slow it down: the best of three.
    tries = [min(rates(LIMIT_BITS_PER_S)) for _ in range(3)]
    assert 0.85 < max(tries) / LIMIT_BITS_PER_S < 1.15, tries
    assert max(rates(None)) > 3 * LIMIT_BITS_PER_S


HEAR = """
import socket, sys
listener = socket.create_server(("0.0.0.0", 7000))
print("listens", flush=True)
connection, _ = listener.accept()
while data := connection.recv(100):
    print(data.decode(), flush=True)
"""
SAY = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 7000), timeout=20)
for line in sys.stdin:
    connection.sendall(line.strip().encode())
"""


def heard(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """The next line that a process prints, or None where none comes in time."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline().decode().strip() if ready else None


@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_is_cut_off_hears_and_says_nothing_until_it_joins(host: int) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with contextlib.ExitStack() as processes, hosts(3) as net:
        hear = processes.enter_context(net.start(0, [sys.executable, "-c", HEAR], **pipes))
        assert heard(hear, 20) == "listens"
        argv = [sys.executable, "-c", SAY, net.address(0)]
        say = processes.enter_context(net.start(1, argv, **pipes))
        assert say.stdin is not None
        net.cut(2)
        say.stdin.write(b"another is cut\n")
        assert heard(hear, 20) == "another is cut"
        net.cut(host)
        say.stdin.write(b"this one is cut\n")
        assert heard(hear, 0.5) is None
        net.join(host)
        assert heard(hear, 20) == "this one is cut"  # TCP sends again what was lost
    assert say.returncode == -signal.SIGKILL


def look_around(store: dist.Store, rank: int, world_size: int) -> dict[str, Any]:
    """What a rank sees of its host, once all have left a file; and a sum over all ranks."""
    Path(f"/dev/shm/of-{rank}").touch()
    dist.init_process_group("gloo")
    total = torch.tensor([2.0**rank])
    dist.all_reduce(total)
    seen = {
        "name": socket.gethostname(),
        "address": socket.gethostbyname(socket.gethostname()),
        "files": sorted(os.listdir("/dev/shm")),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "local": (os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"]),
        "folder": os.getcwd(),
        "sum": total.item(),
    }
    dist.barrier()
    dist.destroy_process_group()
    return seen


def test_ranks_of_one_host_share_its_memory_and_name_and_no_others() -> None:
    with hosts(2) as net:
        first, far, second = net.run(look_around, [0, 1, 0])
    here = {"interfaces": ["eth0", "lo"], "folder": os.getcwd(), "sum": 7.0}
    near = {"name": "host0", "address": "10.77.0.1", "files": ["of-0", "of-2"], **here}
    assert first == {**near, "local": ("0", "2")}
    assert second == {**near, "local": ("1", "2")}
    assert far == {
        "name": "host1",
        "address": "10.77.0.2",
        "files": ["of-1"],
        "local": ("0", "1"),
        **here,
    }
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("of-")]


def fail(store: dist.Store, rank: int, world_size: int) -> str:
    if rank == 1:
        raise ValueError("of this rank")
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 3:
        time.sleep(1000)
    return "ended"


def test_how_ranks_end_is_told_apart() -> None:
    with hosts(1) as net, net.ranks(fail, [0, 0, 0, 0]) as ranks:
        assert ranks.wait([2, 0]) == [GONE, "ended"]
        with pytest.raises(RuntimeError, match=r"(?s)rank 1 raised:.*ValueError: of this rank"):
            ranks.wait([0, 1])
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"ranks \[3\] had not ended after 0.3 s"):
            ranks.wait([0, 3], timeout_s=0.3)
        assert time.monotonic() - began < 10
        os.kill(ranks.started()[3], signal.SIGKILL)
        assert ranks.wait([3]) == [GONE]


STUBBORN = """
trap '' HUP INT TERM
setsid sleep 1000 &
(kill -STOP $$)
"""
"""A program that is stopped and cannot be asked to end, and another that has left its session."""


def test_nothing_is_left() -> None:
    links = socket.if_nameindex()
    with hosts(2) as net:
        assert socket.if_nameindex() == links
        process = net.start(1, ["sh", "-c", STUBBORN])
        ranks = net.ranks(fail, [0, 0, 0, 0])
        networks = {host_of(pid) for pid in [process.pid, ranks.started()[3]]}
        assert within(LEAVE_S, lambda: stopped(process.pid))
        assert len(in_use(networks)) == 2
    ranks.close()
    assert within(LEAVE_S, lambda: not in_use(networks))
    assert process.returncode == -signal.SIGKILL
    assert socket.if_nameindex() == links


ABANDON = """
import sys, time
from penstock.testing.hosts import hosts
with hosts(1) as net:
    print(net.start(0, ["sh", "-c", sys.argv[1]]).pid, flush=True)
    time.sleep(1000)
"""


def test_hosts_go_with_the_process_that_made_them() -> None:
    command = [sys.executable, "-c", ABANDON, STUBBORN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        try:
            pid = int(heard(process, 60) or 0)
            networks = {host_of(pid)}
            assert within(LEAVE_S, lambda: stopped(pid))
        finally:
            process.kill()
    assert within(LEAVE_S, lambda: not in_use(networks))


def test_why_there_can_be_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def says(name: str, value: object, of: object = hosts_module) -> str | None:
        with monkeypatch.context() as patch:
            patch.setattr(of, name, value)
            return unavailable.__wrapped__()

    assert unavailable() is None
    assert says("geteuid", lambda: 1000, os) == "network namespaces need root"
    assert says("PROGRAMS", ("ip", "no-such-program")) == "not installed: no-such-program"
    refused = says("TRIAL", "echo not permitted >&2; false")
    assert refused == "the kernel refuses: not permitted"


def test_how_many_hosts_there_can_be() -> None:
    with pytest.raises(ValueError, match="0 hosts; 1 to 200"):
        Hosts(0)
