"""A SparkSession: which one, what is known of its cluster, and what of it cannot work.

The checks are pure functions of facts; only `session_of` and `facts_of` ask Spark.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from penstock.errors import JobError, UserError

KILL_KEYS = (
    "spark.python.worker.killOnIdleTimeout",
    "spark.sql.execution.pyspark.udf.killOnIdleTimeout",
)
KEYS = (
    "spark.master",
    "spark.driver.host",
    "spark.task.cpus",
    "spark.executor.cores",
    "spark.executor.instances",
    "spark.cores.max",
    "spark.executor.memory",
    "spark.executor.memoryOverhead",
    "spark.executor.pyspark.memory",
    "spark.speculation",
    "spark.dynamicAllocation.enabled",
    "spark.dynamicAllocation.maxExecutors",
    "spark.executor.resource.gpu.amount",
    "spark.task.resource.gpu.amount",
    *KILL_KEYS,
)
SLOTS_S = 10.0
"""How long executors may take to register before too few slots are taken for a fact."""
ANSWER_S = 10.0
"""How long a Connect server may take to answer: Spark's client would try for ten minutes."""
MASTERS = r"spark://|k8s://|sc://|yarn$|local\[|local-cluster\["


@dataclass(frozen=True)
class Facts:
    """What is known of a session's cluster before anything starts.

    Arguments:
        where: in words, for people.
        host: of this process, as the executors reach it.
        classic: whether it is a classic session and no Connect.
        conf: the values of `KEYS` that are set.
        slots: tasks that can run at once, or None where Spark does not tell.
    """

    where: str
    host: str
    classic: bool
    conf: Mapping[str, str] = field(default_factory=dict)
    slots: int | None = None

    @property
    def task_cpus(self) -> int:
        return int(self.conf.get("spark.task.cpus", "1"))

    @property
    def task_gpus(self) -> Fraction:
        return Fraction(self.conf.get("spark.task.resource.gpu.amount", "0"))

    @property
    def dynamic(self) -> bool:
        return self.conf.get("spark.dynamicAllocation.enabled", "false").lower() == "true"

    def notes(self) -> list[str]:
        """What is worth saying though it can work."""
        notes = []
        if self.conf.get("spark.speculation", "false").lower() == "true":
            notes.append(
                "spark.speculation is on: a double of an agent stands by, and holds a slot"
            )
        if self.dynamic:
            notes.append("spark.dynamicAllocation is on: executors come as agents wait for slots")
        if limit := self.conf.get("spark.executor.pyspark.memory"):
            notes.append(f"spark.executor.pyspark.memory={limit} limits workers as well")
        return notes

    def check(self, workers: int, device: str) -> None:
        """What cannot work.

        Raises:
            JobError: fewer slots than workers, or no GPU for `device: cuda`; names the key.
        """
        most = self._most_slots()
        if most is not None and most < workers:
            raise JobError(
                f"{workers} workers need {workers} slots at once; the cluster has {most}"
                f" ({self._keys_of_slots()})",
                hint=f"workers: {most}, or more executors (spark.cores.max, "
                "spark.executor.instances), or a smaller spark.task.cpus"
                if most
                else "no executor has registered: does the cluster have free cores and memory "
                "(spark.executor.memory), and can its nodes reach this driver?",
            )
        for key in KILL_KEYS:
            if self.conf.get(key, "false").lower() == "true":
                raise JobError(
                    f"{key}=true: Spark would kill agents, which give it nothing until they end",
                    hint=f"{key}=false for this session",
                )
        if device == "cuda" and not self.task_gpus:
            raise JobError(
                "device: cuda, and spark.task.resource.gpu.amount is not set: tasks get no GPU",
                hint="spark.executor.resource.gpu.amount and spark.task.resource.gpu.amount "
                "(a fraction lets workers share one), or device: cpu",
            )

    def missing(self) -> str:
        """Why agents may be missing, and the fix."""
        most = self._most_slots()
        known = "" if most is None else f"slots {most} ({self._keys_of_slots()}); "
        return known + (
            "free slots may be taken by other jobs of this session or other applications: "
            "Spark's UI shows them; fewer workers, or more executors"
        )

    def slots_per_executor(self, cores: int) -> int:
        """Tasks that run at once on an executor of so many cores, its GPUs counted."""
        slots = cores // self.task_cpus
        gpus = self.conf.get("spark.executor.resource.gpu.amount")
        if gpus is not None and self.task_gpus:
            # A task's part of a GPU is a part of one: at 0.4 two GPUs have 4 and not 5.
            share = min(self.task_gpus, Fraction(1))
            slots = min(slots, math.floor(1 / share) * int(gpus) // math.ceil(self.task_gpus))
        return slots

    def _most_slots(self) -> int | None:
        """Tasks that can ever run at once; None where neither Spark nor its keys tell."""
        if self.slots is not None and not self.dynamic:
            return self.slots
        master = self.conf.get("spark.master", "")
        managed = master.startswith(("yarn", "k8s://"))
        cores = int(self.conf.get("spark.executor.cores", "1" if managed else "0"))
        bounds = []
        total = self.conf.get("spark.cores.max")
        if total is not None and master.startswith("spark://"):  # YARN does not look at it
            if cores:
                bounds.append(int(total) // cores * self.slots_per_executor(cores))
            else:  # of executors as large as the nodes are
                bounds.append(int(total) // self.task_cpus)
        executor_key = self._executor_key()
        # A standalone cluster gives more executors than instances, if it has them.
        if cores and executor_key in self.conf and (self.dynamic or managed):
            bounds.append(int(self.conf[executor_key]) * self.slots_per_executor(cores))
        return min(bounds, default=None)

    def _executor_key(self) -> str:
        if self.dynamic:
            return "spark.dynamicAllocation.maxExecutors"
        return "spark.executor.instances"

    def _keys_of_slots(self) -> str:
        """The keys that make the number of slots, as far as they are set."""
        known = {"spark.task.cpus": "1"} | dict(self.conf)
        keys = [
            self._executor_key(),
            "spark.executor.cores",
            "spark.cores.max",
            "spark.task.cpus",
        ]
        if self.task_gpus:
            keys += ["spark.executor.resource.gpu.amount", "spark.task.resource.gpu.amount"]
        return ", ".join(f"{key}={known[key]}" for key in keys if key in known)


def is_spark(on: Any) -> bool:
    """Whether `on` names a Spark master or is a session."""
    if isinstance(on, str):
        return re.match(MASTERS, on) is not None
    return hasattr(on, "createDataFrame") and hasattr(on, "range")


def session_of(on: Any, name: str, conf: Mapping[str, str] | None = None) -> tuple[Any, bool]:
    """The session that `on` means, and whether it was made here and is to be stopped.

    Arguments:
        on: a SparkSession, or a master's URL ("sc://" for a Connect server).
        name: of the application.
        conf: for a session that is made here.

    Raises:
        UserError: pyspark or Java is missing, or the master does not answer.
    """
    if not isinstance(on, str):
        return on, False
    connect = on.startswith("sc://")
    try:
        from pyspark.sql import SparkSession

        if connect:
            importlib.import_module("grpc")
    except ImportError as error:
        raise UserError(
            f"on={on!r}: pyspark, or what it needs, is not installed: {error}",
            hint="pip install 'penstock[spark]'",
        ) from error
    # Executors' default is "python3", whatever that is on a node: better the driver's own path,
    # save in containers, whose paths are their own. Spark reads the variable and not its key.
    python = (conf or {}).get("spark.pyspark.python")
    if python or not on.startswith("k8s://"):
        os.environ.setdefault("PYSPARK_PYTHON", python or sys.executable)
    active = has_session()
    if active and not connect:
        from pyspark import SparkContext

        have = str(getattr(SparkContext._active_spark_context, "master", "Connect"))
        if have != on:
            raise JobError(
                f"on={on!r}: this process has a session already, on {have}",
                hint="give that session: on=spark; or stop it first",
            )
    builder = SparkSession.builder.appName(f"penstock {name}")
    for key, value in (conf or {}).items():
        builder = builder.config(key, value)
    try:
        if connect:
            _wait_for_server(on)
        elif on.startswith("spark://"):
            _wait_for_master(on)
        builder = builder.remote(on) if connect else builder.master(on)
        return builder.getOrCreate(), not active
    except Exception as error:
        doctor = "" if connect else "penstock doctor: does it find Java? and "
        raise UserError(
            f"on={on!r}: no session: {_first_line(error)}",
            hint=f"{doctor}does {'the server' if connect else 'the master'} answer at this "
            "address?",
        ) from error


def facts_of(session: Any, workers: int) -> Facts:
    """What the session tells. Waits a little for executors that are still registering."""
    conf = {key: value for key in KEYS if (value := _read(session.conf.get, key)) is not None}
    classic = not type(session).__module__.startswith("pyspark.sql.connect")
    master = conf.get("spark.master", "Spark")
    if not classic:
        return Facts(f"on {master} by Connect", _address_towards(session), False, conf)
    host = conf.get("spark.driver.host", "127.0.0.1")
    facts = Facts(f"on {master}", host, True, conf, _slots(session))
    may_come = not facts.dynamic and not master.startswith("local[")
    give_up = time.monotonic() + (SLOTS_S if may_come else 0.0)
    while facts.slots is not None and facts.slots < workers and time.monotonic() < give_up:
        time.sleep(0.1)
        facts = replace(facts, slots=_slots(session))
    return facts


def _read(get: Callable[..., Any], key: str) -> str | None:
    try:
        value = get(key, None)
    except Exception:  # some keys are the server's secret
        return None
    return None if value is None else str(value)


def _slots(session: Any) -> int | None:
    """Tasks that can run at once, as Spark itself counts them for barrier stages."""
    try:
        scala = session.sparkContext._jsc.sc()
        profile = scala.resourceProfileManager().defaultResourceProfile()
        return int(scala.maxNumConcurrentTasks(profile))
    except Exception:  # not in this version
        return None


def _address_towards(session: Any) -> str:
    """This machine's address on the way to a Connect server."""
    url = str(session.client._builder.url.geturl()) if hasattr(session, "client") else ""
    found = re.search(r"//([^:/;]+)(?::(\d+))?", url)
    if not found:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((found[1], int(found[2] or 15002)))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def has_session() -> bool:
    """Whether this process has a classic session, or this thread one of Connect."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    return SparkContext._active_spark_context is not None or (
        SparkSession.getActiveSession() is not None
    )


def _wait_for_master(url: str) -> None:
    """Returns when one of the masters of "spark://host:port,host:port" answers, else raises."""
    failures = []
    for address in url.removeprefix("spark://").split(","):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{address!r} is no host:port")
        try:
            socket.create_connection((host, int(port)), ANSWER_S).close()
            return
        except OSError as error:
            failures.append(f"{address}: {error}")
    raise ConnectionError("; ".join(failures))


def _wait_for_server(url: str) -> None:
    """Returns when a Connect server answers, and raises when it has not in time."""
    import grpc  # type: ignore[import-untyped]
    from pyspark.sql.connect.client import DefaultChannelBuilder

    with DefaultChannelBuilder(url).toChannel() as channel:
        try:
            grpc.channel_ready_future(channel).result(ANSWER_S)
        except grpc.FutureTimeoutError as error:
            raise TimeoutError(f"no answer within {ANSWER_S:g} s") from error


def _first_line(error: Exception) -> str:
    """What an error says first; of a Java exception that Python was told of, the exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    java = next((line.removeprefix(": ") for line in lines if line.startswith(": ")), None)
    return java or next(iter(lines), type(error).__name__)
