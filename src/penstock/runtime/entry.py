"""Where a worker process begins: joins its run, calls the training function, tells how it ended."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from penstock.errors import PenstockError, TransportError
from penstock.exchange.loopback import loopback
from penstock.exchange.torch_transport import TorchTransport
from penstock.exchange.transport import Transport
from penstock.feed import Source
from penstock.plan import Plan
from penstock.runtime.channel import Channel
from penstock.runtime.checkpoint import Checkpoint
from penstock.runtime.payload import Payload
from penstock.runtime.shards import seed
from penstock.runtime.store import Store
from penstock.runtime.worker import Interrupt, Settings, Worker


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
        store_path: a file for the rendezvous of the process group.
        timeout_s: how long a collective may wait for a peer.
    """

    function: Callable[[Worker], None]
    plan: Plan
    sources: dict[str, Source]
    settings: Settings
    workers: int
    run_url: str
    resume_step: int | None
    store_path: str
    timeout_s: float


def main(fd: int) -> int:
    """A worker's life. Returns its exit code; the driver has been told why by then."""
    rank = int(os.environ["PENSTOCK_RANK"])
    packed = Payload(fd)
    sys.path[:] = packed.head["search_path"]
    channel = Channel(tuple(packed.head["address"]), packed.head["token"], rank)
    try:
        assignment: Assignment = packed.load()
        stopped = _work(assignment, rank, channel)
    except BaseException as error:
        channel.send(_failure(error))
        return 1
    channel.send({"event": "finished", "stopped": stopped})
    return 0


def head(address: tuple[str, int], token: str) -> dict[str, Any]:
    """What a worker must know before it can load its assignment."""
    return {"address": address, "token": token, "search_path": sys.path}


def _work(job: Assignment, rank: int, channel: Channel) -> str | None:
    torch.set_num_threads(job.plan.threads)
    store = Store(job.run_url)
    saved = None if job.resume_step is None else Checkpoint(store, job.resume_step)
    transport = _join(job, rank)
    worker = Worker(
        transport,
        job.plan,
        job.sources,
        job.settings,
        store,
        saved,
        channel.send,
        channel.receive,
    )
    seed(job.plan.seed, 0)  # a network may be made before `worker.prepare`
    with contextlib.suppress(Interrupt):
        job.function(worker)
    worker.finish()
    transport.barrier()
    transport.close()
    return worker.stopped


def _join(job: Assignment, rank: int) -> Transport:
    cuda = job.plan.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if job.workers == 1:
        return loopback(1)[0]
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    return TorchTransport(backend, job.store_path, rank, job.workers, job.timeout_s)


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
