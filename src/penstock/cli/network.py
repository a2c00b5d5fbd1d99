"""`penstock doctor --network`: what links between processes of this machine can do.

Some processes meet twice, in memory that they share and over TCP on the loopback interface, and
measure their links as workers do when a run begins. As a program, this module is one of them:

    python -m penstock.cli.network RANK WORKERS FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from penstock.errors import TransportError
from penstock.exchange.cost import ADDING, Links, Table, simulate

DEADLINE_S = 60.0
_SHOWN_BYTES = (1 << 10, 256 << 10, 64 << 20)
_UNITS = ((1e-6, "us"), (1e-3, "ms"), (1.0, "s"))

Rows = list[list[str]]


def measure(workers: int) -> dict[str, Links]:
    """The links of so many processes: over "tcp", and in "memory" where they can share it.

    Raises:
        TransportError: they did not meet, or not end in time; with what they printed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="penstock-") as folder,
        _started(workers, folder) as processes,
    ):
        give_up = time.monotonic() + DEADLINE_S
        printed = []
        for process in processes:
            try:
                printed.append(process.communicate(timeout=max(0.0, give_up - time.monotonic())))
            except subprocess.TimeoutExpired as error:
                raise TransportError(
                    f"measuring: {workers} processes had not ended after {DEADLINE_S:g} s",
                    hint="penstock doctor tells whether 127.0.0.1 can be reached",
                ) from error
    for rank, (process, (_, errors)) in enumerate(zip(processes, printed, strict=True)):
        if process.returncode != 0:
            last = (errors.strip().splitlines() or ["it printed nothing"])[-1]
            raise TransportError(f"measuring: process {rank} ended by {process.returncode}: {last}")
    return {name: Links.from_json(links) for name, links in json.loads(printed[0][0]).items()}


def for_planning(found: dict[str, Links]) -> Links:
    """This machine as one host: its memory, and TCP on the loopback interface as what is beyond."""
    tcp = found["tcp"]
    inside = found.get("memory", tcp)
    return replace(inside, hosts=(tuple(range(tcp.world_size)),), far=tcp.far)


def show(found: dict[str, Links], console: Console) -> None:
    """Prints links, topologies and their simulated times: tables in a terminal, else plain."""
    tcp = found["tcp"]
    links = [
        [
            name,
            _time(link.latency_s),
            _time(link.message_s),
            f"{link.bytes_per_s / 1e9:.2f} GB/s",
            f"{of.reduce_bytes_per_s / 1e9:.1f} GB/s",
        ]
        for name, of in sorted(found.items())
        for link in [of.near if name == "memory" else of.far]
    ]
    _print(["link", "latency", "a message", "each way", "adding"], links, console)
    if "memory" not in found:
        console.print("memory: these processes cannot share any; see penstock doctor")
    console.print(f"\nover TCP, {tcp.world_size} hosts of one worker would take:")
    headings = ["collective", "up to", "topology", *(_size(size) for size in _SHOWN_BYTES)]
    _print(headings, choices(tcp), console)


def choices(links: Links) -> Rows:
    """Each collective's topologies, up to which size, and their simulated times at some sizes."""
    rows = []
    for collective, kinds in Table.of(links).rows.items():
        for row in kinds["exact" if collective in ADDING else "any"]:
            times = [simulate(collective, row.topology, links, n).time_s for n in _SHOWN_BYTES]
            up_to = "any size" if row.up_to_bytes is None else _size(row.up_to_bytes)
            rows.append([collective, up_to, row.topology, *map(_time, times)])
    return rows


def _print(headings: Sequence[str], rows: Rows, console: Console) -> None:
    if console.is_terminal:
        grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in headings:
            grid.add_column(heading, header_style="bold")
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in [list(headings), *rows]:
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def _time(seconds: float) -> str:
    unit, name = next((u for u in _UNITS if seconds < 1000 * u[0]), _UNITS[-1])
    return (
        f"{seconds / unit:.3g} {name}" if seconds < 100 * unit else f"{seconds / unit:.0f} {name}"
    )


def _size(num_bytes: int) -> str:
    for bits, name in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << bits:
            return f"{num_bytes >> bits} {name}"
    return f"{num_bytes} B"


@contextmanager
def _started(workers: int, folder: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes; none is left afterwards."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(workers):
            command = [sys.executable, "-m", __name__, str(rank), str(workers), folder]
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _main(rank: int, workers: int, folder: str) -> dict[str, Any]:
    """One of the processes; returns the links, as JSON values."""
    import torch
    import torch.distributed as dist

    from penstock.exchange.collectives import Call
    from penstock.exchange.network import OPERATION, measure_links
    from penstock.exchange.peers import Peers
    from penstock.exchange.shm import NoMemory, ShmTransport, possible
    from penstock.exchange.tcp import TcpTransport
    from penstock.exchange.transport import Transport

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    everyone = tuple(range(workers))
    found = {}
    for through in ("memory", "tcp"):
        store = dist.FileStore(f"{folder}/{through}", workers)  # type: ignore[attr-defined]
        peers = Peers.meet(store, rank, workers, address="127.0.0.1", timeout_s=DEADLINE_S / 2)
        hosts = tuple((one,) for one in everyone) if through == "tcp" else (everyone,)
        try:
            if through == "memory" and not possible():
                continue
            transport: Transport = (
                TcpTransport(peers) if through == "tcp" else ShmTransport(peers, everyone)
            )
        except NoMemory:
            continue
        call = Call(transport, 0, OPERATION, DEADLINE_S / 2)
        found[through] = measure_links(call, hosts).to_json()
        peers.gather(b"")  # nobody leaves while another still measures
        transport.close()
    return found


if __name__ == "__main__":
    print(json.dumps(_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
