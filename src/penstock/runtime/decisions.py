"""What a run fixes before it begins, from what is asked for and what data there is."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import DataError, JobError, RunError
from penstock.exchange.network import Network
from penstock.feed import Manifest
from penstock.plan import Plan
from penstock.runtime.batches import UNCHANGED
from penstock.runtime.checkpoint import latest
from penstock.runtime.run import Run
from penstock.runtime.store import Store
from penstock.runtime.worker import Settings

NETWORK = "network.json"


@dataclass(frozen=True)
class Wanted:
    """What is asked for before anything is decided."""

    name: str
    shards: int
    threads: int | None
    seed: int
    device: str
    job_yaml: str
    runs: str
    max_restarts: int


def decide(
    wanted: Wanted, settings: Settings, manifests: Mapping[str, Manifest], threads: int, device: str
) -> Plan:
    """The plan of a new run.

    Arguments:
        threads: of each worker, where none are asked for.
        device: what `device: auto` is here.
    """
    strategy = settings.strategy
    return Plan(
        shards=wanted.shards,
        threads=wanted.threads or threads,
        seed=wanted.seed,
        strategy={type(strategy).__name__.lower(): strategy.model_dump()},
        device=device if wanted.device == "auto" else wanted.device,
        manifests=dict(manifests),
    )


def decided(store: Store, settings: Settings) -> tuple[Plan, int | None]:
    """The plan of the run that is resumed, and its last checkpoint.

    Raises:
        RunError: it has none.
        JobError: its strategy was another one.
    """
    run = Run(store.url)
    saved = latest(store)
    if saved is None and not store.exists("plan.json"):
        raise RunError(
            f"{store.url} has neither a plan nor a checkpoint: its run ended before it began",
            hint="run it again without resume",
        )
    plan = run.plan if saved is None else Plan.from_dict(saved.json()["plan"])
    now = {type(settings.strategy).__name__.lower(): settings.strategy.model_dump()}
    if now != plan.strategy:
        raise JobError(
            f"strategy: {now}, and the run began with {plan.strategy}",
            hint="a run keeps its strategy; begin a new one",
        )
    return plan, None if saved is None else saved.step


def frozen_network(store: Store) -> Network | None:
    """What the run's workers measured when they first met, if they were on more than one host.

    It is taken as long as the workers are on the same hosts; `connect` sees to that.

    Raises:
        RunError: what is there is not what was written.
    """
    if not store.exists(NETWORK):
        return None
    try:
        return Network.from_json(json.loads(store.read(NETWORK)))
    except (ValueError, RunError) as error:
        why = error.message if isinstance(error, RunError) else str(error)
        raise RunError(
            f"{store.url}/{NETWORK}: {why}",
            hint="put back what was there, or delete it: the network is then measured anew",
        ) from error


def check_unchanged(plan: Plan, manifests: Mapping[str, Manifest]) -> None:
    """The data is what the run began with.

    Raises:
        DataError: it is not; names the source.
    """
    for name, manifest in manifests.items():
        recorded = plan.manifests.get(name)
        if manifest.open and recorded is not None:
            continue  # the workers see when they have read it
        if recorded is None or recorded.fingerprint != manifest.fingerprint:
            was = "none" if recorded is None else f"{recorded.rows:,} records"
            raise DataError(
                f"{name} has changed since the run began: {manifest.rows:,} records in "
                f"{len(manifest.partitions)} partitions, {was} then"
                f"{'' if recorded is None else _first_other(recorded, manifest)}",
                hint=UNCHANGED,
            )


def _first_other(recorded: Manifest, manifest: Manifest) -> str:
    pairs = zip(recorded.partitions, manifest.partitions, strict=False)
    other = next(((then, now) for then, now in pairs if then != now), None)
    if other is None:
        return ""
    then, now = (f"{partition.name} of {partition.rows:,}" for partition in other)
    return f"; {then} is now {now}"


def new_directory(wanted: Wanted) -> str:
    """A folder in `runs` that does not exist yet."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    runs = Store(wanted.runs)
    name, count = f"{wanted.name}-{now}", 1
    while runs.exists(name):
        count += 1
        name = f"{wanted.name}-{now}-{count}"
    return f"{wanted.runs.rstrip('/')}/{name}"


def devices(facts: Mapping[int, Mapping[str, Any]]) -> tuple[str, str]:
    """What "auto" is on a cluster, and how its GPUs talk, by what the agents of all ranks report.

    Returns:
        "cuda" where every rank has a GPU, else "cpu"; and the backend of torch.distributed for
        tensors there: NCCL refuses two ranks on one device, which gloo does not.
    """
    gpus = [(f.get("host"), tuple(f.get("gpus", ()))) for f in facts.values()]
    if not gpus or not all(addresses for _, addresses in gpus):
        return "cpu", "gloo"
    distinct = {(host, addresses[0]) for host, addresses in gpus}
    return "cuda", "nccl" if len(distinct) == len(gpus) else "gloo"
