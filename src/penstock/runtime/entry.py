"""Where a worker process begins: joins its run, calls the training function, tells how it ended."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from penstock.cluster.channel import Channel, Message
from penstock.errors import PenstockError, RunError, TransportError
from penstock.exchange.communicator import Communicator
from penstock.exchange.connect import alone, connect
from penstock.exchange.group import Group
from penstock.exchange.network import Network
from penstock.exchange.torch_group import TorchGroup
from penstock.feed import Source
from penstock.plan import Plan
from penstock.runtime.checkpoint import Checkpoint
from penstock.runtime.heap import keep_freed_memory
from penstock.runtime.payload import Payload
from penstock.runtime.rendezvous import Rendezvous, interface_of
from penstock.runtime.shards import seed
from penstock.runtime.store import Store
from penstock.runtime.worker import Interrupt, Settings, Worker
from penstock.watch import trace as traces
from penstock.watch.trace import Trace


@dataclass(frozen=True)
class Assignment:
    """What the driver hands to every worker.

    Arguments:
        function: called with the worker.
        sources: by name.
        settings: how workers work, beside the plan.
        workers: their number.
        run_url: the run directory.
        resume_step: the checkpoint to go on from, or None.
        backend: of torch.distributed for tensors on GPUs: "nccl", or "gloo" where workers share.
        timeout_s: how long a collective may wait for a peer.
        network: as it was measured when the run began, or None.
    """

    function: Callable[[Worker], None]
    plan: Plan
    sources: dict[str, Source]
    settings: Settings
    workers: int
    run_url: str
    resume_step: int | None
    backend: str
    timeout_s: float
    network: Network | None


def main(fd: int) -> int:
    """A worker's life. Returns its exit code; the driver has been told why by then."""
    rank, generation = int(os.environ["PENSTOCK_RANK"]), int(os.environ["PENSTOCK_GENERATION"])
    packed = Payload(fd)
    if packed.head["search_path"] is not None:
        sys.path[:] = packed.head["search_path"]
    hello = {"role": "worker", "rank": rank, "generation": generation}
    channel = Channel(tuple(packed.head["address"]), packed.head["token"], hello)
    try:
        assignment: Assignment = packed.load()
        stopped = _work(assignment, rank, generation, channel)
    except BaseException as error:
        channel.send(_failure(error))
        return 1
    channel.send({"event": "finished", "stopped": stopped})
    return 0


def head(
    address: tuple[str, int], token: str, search_path: list[str] | None = None
) -> dict[str, Any]:
    """What a worker must know before it can load its assignment.

    Arguments:
        address, token: of the driver.
        search_path: where modules are; None: where the worker's own Python finds them.
    """
    return {"address": address, "token": token, "search_path": search_path}


def _work(job: Assignment, rank: int, generation: int, channel: Channel) -> str | None:
    torch.set_num_threads(job.plan.threads)
    keep_freed_memory()
    store = Store(job.run_url)
    if not store.exists("plan.json"):
        raise RunError(
            f"the run directory {job.run_url} is not to be seen from {socket.gethostname()}",
            hint="runs: a folder that all nodes share, or a URL such as hdfs://... or s3://...",
        )
    traced = _traced(store, rank, generation) if job.settings.trace else nullcontext()
    with traced as trace:
        return _train(job, rank, channel, store, trace)


@contextmanager
def _traced(store: Store, rank: int, generation: int) -> Iterator[Trace]:
    """A trace that is written when the work ends, however it does."""
    again = f".generation-{generation}" if generation > 1 else ""
    name, trace = f"{traces.FOLDER}/rank-{rank}{again}.json", Trace(rank)
    store.write(name, trace.to_json())  # where that cannot be, it is said before any training
    try:
        yield trace
    except BaseException:
        with suppress(RunError):  # what ended the work is what counts
            store.write(name, trace.to_json())
        raise
    store.write(name, trace.to_json())


def _train(
    job: Assignment, rank: int, channel: Channel, store: Store, trace: Trace | None
) -> str | None:
    saved = None if job.resume_step is None else Checkpoint(store, job.resume_step)
    rendezvous = Rendezvous(channel, job.timeout_s)
    if trace is not None:
        trace.begin("wait for all ranks to meet")
    group = _join(job, rank, channel, rendezvous)
    if trace is not None:
        trace.end()
    if isinstance(group, Communicator):
        group.observer = trace
    early = rendezvous.instructions

    def receive() -> list[Message]:
        instructions = early + channel.receive()
        early.clear()
        return instructions

    worker = Worker(
        group,
        job.plan,
        job.sources,
        job.settings,
        store,
        saved,
        channel.send,
        receive,
        trace,
    )
    seed(job.plan.seed, 0)  # a network may be made before `worker.prepare`
    with suppress(Interrupt):
        job.function(worker)
    worker.finish()
    group.barrier()
    group.close()
    return worker.stopped


def _join(job: Assignment, rank: int, channel: Channel, rendezvous: Rendezvous) -> Group:
    if job.plan.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if job.workers == 1:
        return alone()
    if job.plan.device == "cpu":
        address = channel.local_address  # by which peers reach this machine as well
        group = connect(
            rendezvous,
            rank,
            job.workers,
            timeout_s=job.timeout_s,
            address=address,
            network=job.network,
        )
        if rank == 0 and group.network not in (None, job.network):
            channel.send({"event": "network", "network": group.network.to_json()})
        return group
    if interface := interface_of(channel.local_address):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    backend = f"cpu:gloo,cuda:{job.backend}"
    return TorchGroup(backend, rendezvous, rank, job.workers, job.timeout_s)


def _failure(error: BaseException) -> dict[str, Any]:
    """How a failure is told: an error of ours as it is, anything else with its traceback."""
    ours = isinstance(error, PenstockError)
    return {
        "event": "failed",
        "kind": type(error).__name__,
        "ours": ours,
        "consequence": isinstance(error, TransportError),
        "message": error.message if isinstance(error, PenstockError) else str(error),
        "hint": error.hint if isinstance(error, PenstockError) else "",
        "traceback": "".join(traceback.format_exception(error)),
    }
