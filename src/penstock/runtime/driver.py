"""The driver of a run: decides, has its agents start the workers, and writes how it ended."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.cluster.coordinator import Coordinator
from penstock.errors import Fault, Interrupted, JobError, PenstockError, RunError
from penstock.exchange.agreement import Clip
from penstock.feed import Manifest, Source
from penstock.feed.bad import bad_of
from penstock.feed.dataframe import DataFrameSource
from penstock.feed.filling import SPOOL
from penstock.feed.mapped import origin, replaced
from penstock.job import AllReduce, Averaging, Job
from penstock.plan import Plan
from penstock.runtime import entry, loop, payload
from penstock.runtime.checkpoint import latest
from penstock.runtime.decisions import (
    Wanted,
    check_unchanged,
    decide,
    decided,
    frozen_network,
    new_directory,
)
from penstock.runtime.entry import Assignment
from penstock.runtime.membership import Membership
from penstock.runtime.place import Asked, Here, OnSpark, at
from penstock.runtime.run import Run
from penstock.runtime.spools import RunSpools
from penstock.runtime.store import Store
from penstock.runtime.supervisor import Payload, Supervisor
from penstock.runtime.worker import Settings, Worker
from penstock.token import new_token
from penstock.watch.progress import display

STOP_S = 4.0
"""How long workers may take to end after a stop was asked for, checkpoint included."""
TIMEOUT_S = 300.0
"""How long a collective waits for a peer."""


def run_job(
    job: Job,
    *,
    on: Any = "local",
    workers: int | None = None,
    resume: Any = None,
    run_dir: str | None = None,
    progress: bool = True,
    trace: bool = False,
) -> Run:
    """Trains a Job; see `Job.run`."""
    sources = {"train": job.train.make()}
    if job.test is not None:
        sources["test"] = job.test.make()
    settings = Settings(
        job.strategy,
        keep=job.checkpoint.keep,
        scalars_every=job.events.scalars_every,
        histograms_every=job.events.histograms_every,
        clip=Clip() if job.clip is None else Clip(job.clip.norm, job.clip.value),
        trace=trace,
    )
    wanted = Wanted(
        name=job.name,
        shards=job.shards if workers is None or "shards" in job.model_fields_set else workers,
        threads=job.threads,
        seed=job.seed,
        device=job.device,
        job_yaml=job.to_yaml(),
        runs=job.runs,
        max_restarts=job.max_restarts if job.recovery == "restart" else 0,
    )
    return _run(
        functools.partial(loop.train, job),
        sources,
        settings,
        wanted,
        on,
        workers or job.workers,
        resume,
        run_dir,
        progress,
        job,
    )


def launch(
    function: Callable[[Worker], None],
    /,
    *,
    on: Any = "local",
    workers: int = 1,
    shards: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    strategy: AllReduce | Averaging | None = None,
    clip: Clip | None = None,
    keep: int = 3,
    histograms_every: int = 0,
    device: str = "auto",
    runs: str = "runs",
    name: str | None = None,
    max_restarts: int = 3,
    resume: Any = None,
    run_dir: str | None = None,
    progress: bool = True,
    trace: bool = False,
    **sources: Source,
) -> Run:
    """Runs one's own training loop on every worker.

    Arguments:
        function: called with a `Worker` in every worker process.
        sources: what `worker.batches(name)` and `worker.evaluate(name)` read, by name.
        keep: how many of the newest checkpoints stay.
        on, workers, shards, threads, seed, strategy, device, runs, max_restarts: as in `Job`.
        resume: a run, or its directory, to go on from.
        run_dir: the run's directory; default a new one in `runs`.
        progress: whether to show how the run goes on standard error.
        trace: whether every rank writes a trace, as in `Job.run`.

    Returns:
        The Run.
    """
    for key, source in sources.items():
        if not isinstance(source, Source):
            raise JobError(
                f"launch: {key}={type(source).__name__} is neither an argument nor a source",
                hint="sources come from penstock.feed, such as feed.arrays(x, y)",
            )
    chosen = AllReduce() if strategy is None else strategy
    settings = Settings(
        chosen, keep=keep, histograms_every=histograms_every, clip=clip or Clip(), trace=trace
    )
    word = name or getattr(function, "__name__", "run").strip("<>")
    wanted = Wanted(
        name=word,
        shards=shards or workers,
        threads=threads,
        seed=seed,
        device=device,
        job_yaml=f"# An own loop, not a Job: {getattr(function, '__module__', '')}:{word}\n",
        runs=runs,
        max_restarts=max_restarts,
    )
    return _run(
        function, dict(sources), settings, wanted, on, workers, resume, run_dir, progress, None
    )


def _run(
    function: Callable[[Worker], None],
    sources: dict[str, Source],
    settings: Settings,
    wanted: Wanted,
    on: Any,
    workers: int,
    resume: Any,
    run_dir: str | None,
    progress: bool,
    job: Job | None,
) -> Run:
    began = time.perf_counter()
    with ExitStack() as stack:
        place = at(on, wanted.name, workers)
        stack.callback(place.close)
        frames = {
            name: frame
            for name, source in sources.items()
            if isinstance(frame := origin(source), DataFrameSource)
        }
        place.check(frames, workers, wanted.device)
        plan: Plan | None = None
        resume_step: int | None = None
        if resume is None:
            store = Store(run_dir or new_directory(wanted))
            if store.exists("plan.json"):
                raise RunError(f"{store.url} is a run already", hint=f"--resume {store.url}")
        else:
            store = Store(resume.url if isinstance(resume, Run) else str(resume))
            plan, resume_step = decided(store, settings)
        url = _absolute(store.url)
        for bad in (bad_of(source) for source in sources.values()):
            bad.folder = f"{url}/quarantine"
        manifests = {
            name: Manifest((), whole=True, open=True) if name in frames else source.manifest()
            for name, source in sources.items()
        }
        if plan is not None:
            check_unchanged(plan, manifests)
        shards = wanted.shards if plan is None else plan.shards
        if workers > shards:
            raise JobError(
                f"{workers} workers for {shards} shards",
                hint=f"a run's shards are fixed; at most {shards} workers",
            )
        spools = RunSpools(url) if isinstance(place, Here) else None
        if spools is not None:  # on a cluster each agent has its own
            stack.callback(spools.close)
        token, shown = new_token(), display(progress)
        coordinator = Coordinator(token, host=place.address[0], port=place.address[1])
        stack.callback(coordinator.close)
        spooled = {
            name: replaced(sources[name], frame.spooled(name, number))
            for number, (name, frame) in enumerate(frames.items())
        }
        generations = _Generations(
            function,
            {**sources, **spooled},
            settings,
            wanted,
            workers,
            place,
            store,
            manifests,
            plan,
            resume_step,
            entry.head(coordinator.address, token, place.search_path),
            {} if spools is None else {SPOOL: str(spools.folder)},
        )
        generations.rehearse()
        store.write("job.yaml", wanted.job_yaml.encode())
        began_with = {} if plan is None or resume_step is None else plan.manifests
        asked = Asked(wanted.name, url, workers, shards, wanted.device, frames, began_with, token)
        launcher = stack.enter_context(place.opened(asked, shown.line))
        membership = Membership(
            workers,
            max_restarts=wanted.max_restarts,
            gather_s=place.gather_s,
            regather_s=place.regather_s,
            stop_s=STOP_S,
            now_s=time.monotonic(),
        )
        supervisor = Supervisor(
            launcher,
            coordinator,
            membership,
            place.admit,
            generations.next,
            store,
            workers,
            shown,
            began,
        )
        supervisor.shown.line(
            f"{wanted.name}  {_workers(workers)} {launcher.where}, {_words(settings.strategy)}"
            + ("" if resume_step is None else f", resumed after step {resume_step}")
        )
        for name, source in sources.items():  # what was found while they were counted
            supervisor.leave_out(name, bad_of(source).count, bad_of(source).line())
        try:
            supervisor.run()
        finally:
            supervisor.close()
        supervisor.write_result(resume_step)
        goes_on = isinstance(supervisor.error, Interrupted | Fault)
        launcher.keep = goes_on and _counted(store, frames)
        if spools is not None:
            spools.keep = goes_on
    if supervisor.error is not None:
        raise supervisor.error
    return Run(store.url, job)


@dataclass
class _Generations:
    """What the workers of each generation run: the same plan, from the last checkpoint on."""

    function: Callable[[Worker], None]
    sources: dict[str, Source]
    settings: Settings
    wanted: Wanted
    workers: int
    place: Here | OnSpark
    store: Store
    manifests: dict[str, Manifest]
    plan: Plan | None
    resume_step: int | None
    head: dict[str, Any]
    environment: dict[str, str]

    def rehearse(self) -> None:
        """What can be found wrong before anything starts is."""
        payload.pack(self.head, {"function": self.function, **self.sources})

    def next(self, facts: Mapping[int, Mapping[str, Any]]) -> tuple[Payload, dict[str, str]]:
        """The next generation's payload, and variables for its environment.

        Arguments:
            facts: of each rank's node.
        """
        device, backend = self.place.devices(facts)
        if self.plan is None:
            threads = self.place.threads(self.wanted.shards)
            self.plan = decide(self.wanted, self.settings, self.manifests, threads, device)
        else:
            check_unchanged(self.plan, self.manifests)
            saved = latest(self.store)
            self.resume_step = None if saved is None else saved.step
            if saved is not None:
                self.plan = Plan.from_dict(saved.json()["plan"])
        self.store.write("plan.json", json.dumps(self.plan.to_dict(), indent=1).encode())
        assignment = Assignment(
            self.function,
            self.plan,
            self.sources,
            self.settings,
            self.workers,
            _absolute(self.store.url),
            self.resume_step,
            backend,
            TIMEOUT_S,
            frozen_network(self.store),
        )
        environment = self.place.environment(self.plan.threads) | self.environment
        return payload.pack(self.head, assignment), environment


def _counted(store: Store, frames: Iterable[str]) -> bool:
    """Whether a run that goes on from here knows what rows a DataFrame had."""
    with suppress(PenstockError):
        if (saved := latest(store)) is not None:
            manifests = Plan.from_dict(saved.json()["plan"]).manifests
            return any(not manifests[name].open for name in frames)
    return False


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).absolute())


def _words(strategy: AllReduce | Averaging) -> str:
    if isinstance(strategy, AllReduce):
        return "gradients summed every step"
    steps = "step" if strategy.every == 1 else f"{strategy.every} steps"
    return f"parameters averaged every {steps}"


def _workers(number: int) -> str:
    return f"{number} worker" + ("" if number == 1 else "s")
