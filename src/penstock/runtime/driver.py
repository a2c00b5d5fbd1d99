"""The driver of a run: decides, starts the workers, listens until they end, writes the result."""

from __future__ import annotations

import datetime
import functools
import json
import os
import select
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from penstock import errors
from penstock.cluster.launcher import Launcher, WorkerExited, WorkerOutput, WorkerStarted
from penstock.cluster.local import LocalLauncher, warm
from penstock.errors import (
    DataError,
    Interrupted,
    JobError,
    PenstockError,
    RunError,
    WorkerFailed,
    WorkerLost,
)
from penstock.exchange.agreement import Clip
from penstock.exchange.token import new_token
from penstock.feed import Source
from penstock.job import AllReduce, Averaging, Job
from penstock.plan import Plan
from penstock.runtime import entry, loop, payload
from penstock.runtime.checkpoint import latest
from penstock.runtime.coordinator import Coordinator
from penstock.runtime.entry import Assignment
from penstock.runtime.logs import Logs
from penstock.runtime.preload import PRELOAD, TARGET
from penstock.runtime.run import Run
from penstock.runtime.store import Store
from penstock.runtime.worker import Settings, Worker
from penstock.watch.progress import Display, display

START_S = 60.0
"""How long workers may take until all have joined."""
STOP_S = 4.0
"""How long workers may take to end after a stop was asked for, checkpoint included."""
GRACE_S = 1.0
"""How long to wait for the cause after a worker lost its peers."""
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
    )
    wanted = _Wanted(
        name=job.name,
        shards=job.shards if workers is None or "shards" in job.model_fields_set else workers,
        threads=job.threads,
        seed=job.seed,
        device=job.device,
        job_yaml=job.to_yaml(),
        runs=job.runs,
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
    resume: Any = None,
    run_dir: str | None = None,
    progress: bool = True,
    **sources: Source,
) -> Run:
    """Runs one's own training loop on every worker.

    Arguments:
        function: called with a `Worker` in every worker process.
        sources: what `worker.batches(name)` and `worker.evaluate(name)` read, by name.
        keep: how many of the newest checkpoints stay.
        on, workers, shards, threads, seed, strategy, device, runs: as in `Job`.
        resume: a run, or its directory, to go on from.
        run_dir: the run's directory; default a new one in `runs`.
        progress: whether to show how the run goes on standard error.

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
    settings = Settings(chosen, keep=keep, histograms_every=histograms_every, clip=clip or Clip())
    word = name or getattr(function, "__name__", "run").strip("<>")
    wanted = _Wanted(
        name=word,
        shards=shards or workers,
        threads=threads,
        seed=seed,
        device=device,
        job_yaml=f"# An own loop, not a Job: {getattr(function, '__module__', '')}:{word}\n",
        runs=runs,
    )
    return _run(
        function, dict(sources), settings, wanted, on, workers, resume, run_dir, progress, None
    )


@dataclass(frozen=True)
class _Wanted:
    """What is asked for before anything is decided."""

    name: str
    shards: int
    threads: int | None
    seed: int
    device: str
    job_yaml: str
    runs: str


def _run(
    function: Callable[[Worker], None],
    sources: dict[str, Source],
    settings: Settings,
    wanted: _Wanted,
    on: Any,
    workers: int,
    resume: Any,
    run_dir: str | None,
    progress: bool,
    job: Job | None,
) -> Run:
    began = time.perf_counter()
    port = _local_port(on)
    warm(PRELOAD)  # imports while we look at the data
    manifests = {name: source.manifest() for name, source in sources.items()}
    if resume is None:
        store = Store(run_dir or _new_directory(wanted))
        if Store(store.url).exists("plan.json"):
            raise RunError(f"{store.url} is a run already", hint=f"--resume {store.url}")
        plan, resume_step = _decide(wanted, settings, manifests, workers), None
    else:
        store = Store(resume.url if isinstance(resume, Run) else str(resume))
        plan, resume_step = _decided(store, settings, manifests)
    if workers > plan.shards:
        raise JobError(
            f"{workers} workers for {plan.shards} shards",
            hint=f"a run's shards are fixed; at most {plan.shards} workers",
        )
    _check_devices(plan, workers)
    token = new_token()
    coordinator = Coordinator(token, port=port)
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        assignment = Assignment(
            function,
            plan,
            sources,
            settings,
            workers,
            _absolute(store.url),
            resume_step,
            os.path.join(folder, "rendezvous"),
            TIMEOUT_S,
        )
        try:
            packed = payload.pack(entry.head(coordinator.address, token), assignment)
            store.write("job.yaml", wanted.job_yaml.encode())
            store.write("plan.json", json.dumps(plan.to_dict(), indent=1).encode())
            launcher = LocalLauncher(PRELOAD, {"GLOO_SOCKET_IFNAME": "lo"})
            watched = _Watch(coordinator, launcher, store, workers, display(progress), began)
            watched.shown.line(
                f"{wanted.name}  {_workers(workers)} on this machine, {_words(settings.strategy)}"
                + ("" if resume_step is None else f", resumed after step {resume_step}")
            )
            try:
                launcher.start(packed, TARGET, workers)
                watched.until_all_ended()
            finally:
                try:
                    watched.close()
                finally:
                    launcher.close()
        finally:
            coordinator.close()
    watched.write_result(resume_step)
    if watched.error is not None:
        raise watched.error
    return Run(store.url, job)


@dataclass
class _Watch:
    """Listens to the workers of one run, and decides when it has ended."""

    coordinator: Coordinator
    launcher: Launcher
    store: Store
    workers: int
    shown: Display
    began: float
    error: PenstockError | None = None
    stopped: str | None = None
    evaluation: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    checkpointed: int | None = None
    first_step_s: float | None = None

    def __post_init__(self) -> None:
        self._logs = Logs(self.store)
        self._running = set(range(self.workers))
        self._finished: set[int] = set()
        self._failures: dict[int, dict[str, Any]] = {}
        self._joined: set[int] = set()
        self._verdict_at: float | None = None
        self._interrupts = 0
        self._stop_by: float | None = None

    def until_all_ended(self) -> None:
        """Returns when no worker is needed any more; `error` says whether that is a failure."""
        start_by = time.monotonic() + START_S
        with self._interrupts_counted():
            while self._running and self.error is None:
                self._wait()
                with self._writing():
                    for event in self.launcher.poll():
                        self._of_process(event)
                    for rank, message in self.coordinator.poll():
                        if message is not None:
                            self._of_worker(rank, message)
                self._judge()
                if len(self._joined) < self.workers and time.monotonic() > start_by:
                    missing = sorted(set(range(self.workers)) - self._joined)
                    self.error = WorkerLost(
                        f"ranks {missing} did not join within {START_S:.0f} s",
                        hint=f"their output is in {self.store.url}/logs",
                    )

    def close(self) -> None:
        """Takes what workers have printed last, ends the display, writes the logs."""
        with self._writing():
            for event in self.launcher.poll():
                self._of_process(event)
        self.shown.close()
        with self._writing():
            self._logs.close()

    def write_result(self, resumed_from: int | None) -> None:
        """Writes result.json."""
        status = "failed" if self.error else "stopped" if self.stopped else "finished"
        if isinstance(self.error, Interrupted):
            status = "interrupted"
        result = {
            "status": status,
            "stopped": self.stopped,
            "error": None if self.error is None else str(self.error),
            "workers": self.workers,
            "resumed_from": resumed_from,
            "checkpoint": self.checkpointed,
            "seconds": round(time.perf_counter() - self.began, 3),
            "seconds_to_first_step": self.first_step_s,
            "evaluation": self.evaluation,
            **{k: self.progress.get(k) for k in ("step", "epoch", "examples", "loss")},
        }
        with self._writing():
            self.store.write("result.json", json.dumps(result, indent=1).encode())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What cannot be written ends the run, unless something else has ended it before."""
        try:
            yield
        except RunError as error:
            self.error = self.error or error

    def _wait(self) -> None:
        files = [self.coordinator.fileno(), *self.launcher.filenos()]
        select.select(files, [], [], 0.2)

    def _of_process(self, event: WorkerStarted | WorkerOutput | WorkerExited) -> None:
        if isinstance(event, WorkerOutput):
            for line in self._logs.write(event.rank, event.data):
                self.shown.output(event.rank, line)
        elif isinstance(event, WorkerExited):
            for rank, message in self.coordinator.poll():  # what it said before it ended
                if message is not None:
                    self._of_worker(rank, message)
            self._running.discard(event.rank)
            told = event.rank in self._finished or event.rank in self._failures
            if not told and self.error is None:
                self.error = self._lost(event)

    def _of_worker(self, rank: int, message: dict[str, Any]) -> None:
        self._joined.add(rank)
        what = message.get("event")
        if what == "prepared":
            plan = Plan.from_dict(message["plan"])
            self.store.write("plan.json", json.dumps(plan.to_dict(), indent=1).encode())
            for n, line in enumerate(plan.show(self.workers).splitlines()):
                self.shown.line(f"{'plan' if n == 0 else '    '}  {line}")
        elif what == "progress":
            if self.first_step_s is None:
                self.first_step_s = round(time.perf_counter() - self.began, 3)
            self.progress = {k: _number(v) for k, v in message.items()}
            self.shown.progress(self.progress)
        elif what == "evaluated":
            self.evaluation = message["evaluation"]
            values = self.evaluation["metrics"]
            names = [n for n in values if not n.startswith(("micro_", "weighted_"))][:4]
            words = "  ".join(f"{n.replace('_', ' ')} {float(values[n]):.4f}" for n in names)
            self.shown.line(f"step {message['step']:,}  {message['source']}: {words}")
        elif what == "checkpointed":
            self.checkpointed = message["step"]
        elif what == "finished":
            self._finished.add(rank)
            self.stopped = message["stopped"]
        elif what == "failed":
            self._failures[rank] = message

    def _judge(self) -> None:
        """Finds what to blame, and whether to wait any longer."""
        now = time.monotonic()
        if self.error is None and self._failures:
            causes = {r: m for r, m in self._failures.items() if not m["consequence"]}
            if causes:
                rank = min(causes)
                self.error = self._failed(rank, causes[rank])
            else:  # the cause may still be on its way
                self._verdict_at = self._verdict_at or now + GRACE_S
                if now > self._verdict_at or not self._running:
                    rank = min(self._failures)
                    self.error = self._failed(rank, self._failures[rank])
        if self._interrupts and self._stop_by is None:
            self.shown.line("stopping: writing a checkpoint (Ctrl-C again to stop at once)")
            self.coordinator.send({"do": "stop"})
            self._stop_by = now + STOP_S
        over = self._stop_by is not None and (now > self._stop_by or self._interrupts > 1)
        if self._stop_by is not None and (over or not self._running) and self.error is None:
            step = self.checkpointed
            at = "without a checkpoint" if step is None else f"with a checkpoint at step {step:,}"
            self.error = Interrupted(f"stopped {at}", hint=self._how_to_resume())

    def _failed(self, rank: int, message: dict[str, Any]) -> PenstockError:
        kind = getattr(errors, message["kind"], None) if message["ours"] else None
        if kind is None:
            return WorkerFailed(
                f"rank {rank} raised {message['kind']}: {message['message']}\n"
                f"{message['traceback'].rstrip()}{self._last_words(rank)}",
                hint=self._how_to_resume(),
            )
        error: PenstockError = kind(f"rank {rank}: {message['message']}", hint=message["hint"])
        return error

    def _lost(self, event: WorkerExited) -> PenstockError:
        step = self.progress.get("step")
        at = f" after step {step:,}" if step else ""
        process = f"process {event.pid} on " if event.pid else ""
        return WorkerLost(
            f"rank {event.rank} ({process}{socket.gethostname()}) {event}{at}"
            f"{self._last_words(event.rank)}",
            hint=(
                "the kernel may have ended it for want of memory (dmesg); "
                if event.signal == 9
                else ""
            )
            + self._how_to_resume(),
        )

    def _last_words(self, rank: int) -> str:
        lines = self._logs.last(rank)
        return (
            "\n  its last output:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""
        )

    def _how_to_resume(self) -> str:
        if self.checkpointed is None and latest(self.store) is None:
            return "there is no checkpoint yet: run it again"
        return f"to go on from the last checkpoint: --resume {self.store.url}"

    @contextmanager
    def _interrupts_counted(self) -> Iterator[None]:
        """Meanwhile Ctrl-C and SIGTERM ask to stop, instead of raising wherever we are."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def count(number: int, frame: object) -> None:
            self._interrupts += 1

        before = {s: signal.signal(s, count) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _local_port(on: Any) -> int:
    """The port of "local" (any) or "local:PORT"."""
    if isinstance(on, str):
        kind, _, port = on.partition(":")
        if kind == "local" and (not port or port.isdigit()):
            return int(port or 0)
    raise JobError(
        f"on={on!r}: expected 'local' or 'local:PORT'",
        hint=errors.did_you_mean(str(on), ["local"]) or "this version trains on this machine",
    )


def _decide(
    wanted: _Wanted, settings: Settings, manifests: Mapping[str, Any], workers: int
) -> Plan:
    """The decisions of a new run."""
    device = wanted.device
    if device == "auto":
        there = torch.cuda.is_available() and torch.cuda.device_count() >= workers
        device = "cuda" if there else "cpu"
    cores = len(os.sched_getaffinity(0))
    strategy = settings.strategy
    return Plan(
        shards=wanted.shards,
        threads=wanted.threads or max(1, cores // wanted.shards),
        seed=wanted.seed,
        strategy={type(strategy).__name__.lower(): strategy.model_dump()},
        device=device,
        manifests=dict(manifests),
    )


def _decided(
    store: Store, settings: Settings, manifests: Mapping[str, Any]
) -> tuple[Plan, int | None]:
    """The decisions of the run that is resumed, and its last checkpoint."""
    run = Run(store.url)
    saved = latest(store)
    if saved is None and not store.exists("plan.json"):
        raise RunError(
            f"{store.url} has neither a plan nor a checkpoint: its run ended before it began",
            hint="run it again without resume",
        )
    plan = run.plan if saved is None else Plan.from_dict(saved.json()["plan"])
    for name, manifest in manifests.items():
        recorded = plan.manifests.get(name)
        if recorded is None or recorded.fingerprint != manifest.fingerprint:
            was = "none" if recorded is None else f"{recorded.rows:,} records"
            raise DataError(
                f"{name} has changed since the run began: {manifest.rows:,} records in "
                f"{len(manifest.partitions)} partitions, {was} then",
                hint="give the data that it began with, or begin a new run",
            )
    now = {type(settings.strategy).__name__.lower(): settings.strategy.model_dump()}
    if now != plan.strategy:
        raise JobError(
            f"strategy: {now}, and the run began with {plan.strategy}",
            hint="a run keeps its strategy; begin a new one",
        )
    return plan, None if saved is None else saved.step


def _check_devices(plan: Plan, workers: int) -> None:
    if plan.device != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < workers:
        raise JobError(
            f"device: cuda, and this machine has {count} GPUs for {workers} workers",
            hint="fewer workers, or device: cpu",
        )


def _new_directory(wanted: _Wanted) -> str:
    """A folder in `runs` that does not exist yet."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    runs = Store(wanted.runs)
    name, count = f"{wanted.name}-{now}", 1
    while runs.exists(name):
        count += 1
        name = f"{wanted.name}-{now}-{count}"
    return f"{wanted.runs.rstrip('/')}/{name}"


def _absolute(url: str) -> str:
    return url if "://" in url else str(Path(url).absolute())


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and value != value else value


def _words(strategy: AllReduce | Averaging) -> str:
    if isinstance(strategy, AllReduce):
        return "gradients summed every step"
    steps = "step" if strategy.every == 1 else f"{strategy.every} steps"
    return f"parameters averaged every {steps}"


def _workers(number: int) -> str:
    return f"{number} worker" + ("" if number == 1 else "s")
