"""A step of training bounded by four things at once: each of them alone, and all together.

    disk        encoded images in Parquet files on a file system that gives so many bytes a second
    decode      Pillow, in the feed's stage: PNG to pixels, and to one size
    compute     forward, backward and update of a small network
    exchange    the gradients' sum between two hosts, joined by 1 Gbit/s

    python benchmarks/overlap.py [--steps 96] [--rounds 3] [--disk 35e6] [--trace FOLDER]

Two workers, each on a host of its own: a network namespace, whose link the kernel holds to 1 Gbit/s
(needs root). They are Penstock's own, feed, loop and exchange, on a group that meets between the
hosts as it does between machines. In every round each measures, with the other worker, the same
steps: disk until all rows are spooled; decode of what is spooled; compute; exchange; then a first
epoch with all of it, of which the aim is 1.1 x the slowest of the four. Printed are medians of
milliseconds a step; what each stage of the feed did with its time, as the events have it; and where
the trace of the last round lies (chrome://tracing, ui.perfetto.dev).

What this can and cannot show on two cores: a worker has one, so what decode and compute take of it,
and the system's and our own work for disk and network, must fit into a step of the slowest. Sizes
are chosen so: the disk is the slowest, with 119 ms for the 4.2 MB of 32 images; the exchange takes
64 ms of the wire, and decode and compute some 20 ms each. Forward needs the updated parameters, so
exchange and compute overlap in backward alone, in any framework that sums each step; but both
together take less than the disk. The epoch's time has its beginning in it, when the first segment
(16 MiB: 4 steps) is not there yet, and its end, when the last one is worked off.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hosts have no names in reverse

import fsspec
import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem

from penstock import AllReduce, Worker, feed
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import connect
from penstock.plan import Plan
from penstock.runtime.batches import Cursor, Feed
from penstock.runtime.heap import keep_freed_memory
from penstock.runtime.store import Store
from penstock.runtime.supply import Supply
from penstock.runtime.worker import Settings
from penstock.testing.hosts import hosts, unavailable
from penstock.watch import read_events
from penstock.watch.trace import Trace

BATCH, WORKERS = 32, 2
SIDE, SIZE = 208, 128
"""Of the images as they are stored, and as the network takes them, in pixels."""
BITS_PER_S = 1_000_000_000
ALONE = ("disk", "decode", "compute", "exchange")


class SlowFile(io.FileIO):
    """A file that is read no faster than its disk allows."""

    def __init__(self, path: str, disk: SlowDisk) -> None:
        super().__init__(path, "rb")
        self._disk = disk

    def readinto(self, buffer: Any) -> int:
        # In pieces, as a disk gives it: who waits for the first does not wait for all.
        count = super().readinto(memoryview(buffer)[:PIECE_BYTES]) or 0
        self._disk.give(count)
        return count

    def read(self, size: int = -1) -> bytes:
        data = bytearray(size if size >= 0 else os.fstat(self.fileno()).st_size - self.tell())
        view = memoryview(data)
        while len(view) and (count := self.readinto(view)):
            view = view[count:]
        return bytes(data[: len(data) - len(view)])


PIECE_BYTES = 1 << 20


class SlowDisk(LocalFileSystem):  # type: ignore[misc]
    """This machine's files at so many bytes a second, for each process: `slow://` URLs.

    `bytes_per_s` is set before use; a piece that was asked for late does not come faster for it.
    """

    protocol = ("slow",)
    bytes_per_s = float("inf")
    _free_at_s = 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).removeprefix("slow://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return SlowFile(path, self)

    def give(self, count: int) -> None:
        now = time.monotonic()
        cls = type(self)
        cls._free_at_s = max(cls._free_at_s, now) + count / cls.bytes_per_s
        time.sleep(cls._free_at_s - now)


def network() -> torch.nn.Module:
    """1.8 million parameters: 7.4 MB of gradients, which the wire takes some 64 ms for."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 4, stride=4),
        torch.nn.ReLU(),
        torch.nn.AvgPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 16 * 16, 448),
        torch.nn.ReLU(),
        torch.nn.Linear(448, 10),
    )


def loss_of(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(net(x.float() / 255), y)


def write(folder: str, rows: int) -> None:
    """Parquet files of encoded images, in which no byte can be saved."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    random, encoded = np.random.default_rng(0), []
    for _ in range(64):
        file = io.BytesIO()
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        encoded.append(file.getvalue())
    for number in range(2 * WORKERS):
        count = rows // (2 * WORKERS)
        images = [encoded[random.integers(64)] for _ in range(count)]
        pq.write_table(
            pa.table({"image": images, "label": random.integers(0, 10, count)}),
            f"{folder}/{number}.parquet",
            row_group_size=64,
            use_dictionary=False,
            compression="none",
        )


@dataclass
class Measured:
    """One of the workers, and the seconds a step of what it measures."""

    group: Communicator
    folder: str
    steps: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        image = feed.Image("image", height=SIZE, width=SIZE)
        self.source = feed.parquet(f"slow://{self.folder}/data", features=image, target="label")
        self.plan = Plan(WORKERS, 1, 0, None, "cpu", {"train": self.source.manifest()})

    def round(self, number: int) -> dict[str, float]:
        found = {}
        own = range(self.group.rank, self.group.rank + 1)
        manifest = self.plan.manifests["train"]
        seen = Feed("train", self.source, manifest, own, WORKERS, 0, torch.device("cpu"))
        found["disk"] = self.timed(self.spooling(number, "alone"), lambda: self.disk(seen))
        found["decode"] = self.timed(lambda: None, lambda: self.decode(seen))
        worker, net = self.worker(f"alone-{number}", None)
        x = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
        y = torch.randint(0, 10, (BATCH,))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        found["compute"] = self.timed(lambda: None, lambda: self.compute(net, optimizer, x, y))
        gradients = torch.zeros(sum(p.numel() for p in net.parameters()))
        found["exchange"] = self.timed(lambda: None, lambda: self.exchange(gradients))
        worker.finish()
        trace = Trace(self.group.rank)
        self.group.observer = trace
        worker, net = self.worker(f"all-{number}", trace)
        found["all"] = self.timed(self.spooling(number, "all"), lambda: self.all(worker, net))
        worker.finish()
        self.group.observer = None
        Path(self.folder, f"rank-{self.group.rank}.json").write_bytes(trace.to_json())
        return found

    def timed(self, before: Callable[[], None], run: Callable[[], None]) -> float:
        before()
        self.group.barrier()
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) / self.steps

    def spooling(self, number: int, what: str) -> Callable[[], None]:
        """Has what is read from here on go to a spool of its own."""

        def before() -> None:
            SlowDisk.bytes_per_s = self.bytes_per_s
            name = f"spool-{self.group.rank}-{number}-{what}"
            os.environ["PENSTOCK_SPOOL"] = f"{self.folder}/{name}"

        return before

    def disk(self, seen: Feed) -> None:
        records, _ = seen._open(0)
        records.wait(sys.maxsize, 300.0)  # type: ignore[attr-defined]

    def decode(self, seen: Feed) -> None:
        with Supply(seen, functools.partial(seen.requests, Cursor(BATCH, 1), 1)) as supply:
            assert sum(1 for _ in supply.batches()) == self.steps

    def compute(
        self,
        net: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        for _ in range(self.steps):
            optimizer.zero_grad()
            loss_of(net, x, y).backward()
            optimizer.step()

    def exchange(self, gradients: torch.Tensor) -> None:
        for _ in range(self.steps):
            self.group.all_reduce(gradients, sync=True)

    def all(self, worker: Worker, net: torch.nn.Module) -> None:
        for batch in worker.batches("train", epochs=1, batch_size=BATCH):
            worker.step(loss_of(net, batch.x, batch.y))
        assert worker.global_step == self.steps

    def worker(self, name: str, trace: Trace | None) -> tuple[Worker, torch.nn.Module]:
        store = Store(f"{self.folder}/{name}")
        settings = Settings(AllReduce())
        worker = Worker(
            self.group,
            self.plan,
            {"train": self.source},
            settings,
            store,
            None,
            json.dumps,
            list,
            trace,
        )
        net, _ = worker.prepare(network, functools.partial(torch.optim.SGD, lr=0.01))
        return worker, net


def rank_of(
    store: Any, rank: int, world_size: int, folder: str, steps: int, rounds: int, disk: float
) -> list[dict[str, float]]:
    """What runs on each host."""
    torch.set_num_threads(1)
    keep_freed_memory()
    fsspec.register_implementation("slow", SlowDisk, clobber=True)
    group = connect(store, rank, world_size, timeout_s=120.0)
    measured = Measured(group, folder, steps, disk)
    found = [measured.round(number) for number in range(rounds)]
    group.barrier()
    group.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", type=float, default=35e6, help="bytes per second, each worker's")
    parser.add_argument("--trace", help="where the trace is put; a temporary folder")
    options = parser.parse_args()
    if why := unavailable():
        sys.exit(f"no hosts here: {why}")
    from collectives import hardware  # type: ignore[import-not-found]
    from overlap import rank_of  # type: ignore[import-not-found]  # by name: a class has a lock

    print(hardware())
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        Path(folder, "data").mkdir()
        write(f"{folder}/data", options.steps * BATCH * WORKERS)
        run = functools.partial(
            rank_of,
            folder=folder,
            steps=options.steps,
            rounds=options.rounds,
            disk=options.disk,
        )
        with hosts(WORKERS, BITS_PER_S) as net:
            found = net.run(run, range(WORKERS), timeout_s=120 + options.rounds * options.steps)
        disk_bytes = sum(p.stat().st_size for p in Path(folder, "data").iterdir()) / WORKERS
        step_s = disk_bytes / options.disk / options.steps
        print(f"\na step's bytes are {1e3 * step_s:.1f} ms of the disk's rate")
        show([{k: max(r[k] for r in both) for k in both[0]} for both in zip(*found)])
        stages(f"{folder}/all-{options.rounds - 1}/events")
        kept = Path(options.trace or tempfile.mkdtemp(prefix="penstock-trace-"))
        kept.mkdir(parents=True, exist_ok=True)
        for rank in range(WORKERS):
            shutil.copy(f"{folder}/rank-{rank}.json", kept)
        print(f"\ntrace: {kept}/rank-0.json and rank-1.json")


def show(rounds: list[dict[str, float]]) -> None:
    """Milliseconds a step, of the slower worker, and what they add up to."""
    print(f"\n{'':12}{'ms/step':>10}{'least':>10}{'most':>10}")
    for name in (*ALONE, "all"):
        values = [1e3 * found[name] for found in rounds]
        print(f"{name:12}{statistics.median(values):10.1f}{min(values):10.1f}{max(values):10.1f}")
    total = statistics.median(sum(found[name] for name in ALONE) for found in rounds)
    ratio = statistics.median(f["all"] / max(f[name] for name in ALONE) for f in rounds)
    print(f"one after the other they take {1e3 * total:.1f} ms")
    print(f"all together take {ratio:.3f} x the slowest alone (aim: 1.1 at most)")


def stages(events: str) -> None:
    """What the stages of rank 0's feed did in the last round."""
    seen = read_events(events)
    print(f"\n{'':12}{'busy':>10}{'starved':>10}{'blocked':>10}")
    busy = {}
    for stage in ("read", "decode", "compute"):
        shares = [
            float(np.mean(seen.scalars(f"feed/{stage}/{what}").values))
            for what in ("busy", "starved", "blocked")
        ]
        busy[stage] = shares[0]
        print(f"{stage:12}" + "".join(f"{share:10.0%}" for share in shares))
    print(f"bounded by {max(busy, key=lambda stage: busy[stage])}")


if __name__ == "__main__":
    main()
