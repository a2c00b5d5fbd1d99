"""A real Spark standalone cluster: a master and two workers, as JVMs of their own, on loopback.

One cluster serves all tests, and so does the JVM in which this process's classic sessions live. A
session, or a Spark Connect server, is a test's own, and takes both workers while it lives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

START_S = 60.0
"""How long a daemon may take to be ready."""
LEAVE_S = 10.0
"""How long the processes of an ended session or daemon may take to be gone."""
NUM_WORKERS = 2
MARK = "PENSTOCK_TEST_CLUSTER"
"""In the environment of every process of a cluster: its executors and their Pythons inherit it."""
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:-UsePerfData"
"""These JVMs live for seconds and share few cores: the first compiler and one collector."""
DEFAULTS = {
    "spark.ui.enabled": "false",
    "spark.master.rest.enabled": "false",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.memory": "512m",
    "spark.executor.memory": "600m",
    "spark.executor.cores": "1",
    # With all executors there before the first task, a test knows how many there are.
    "spark.cores.max": str(NUM_WORKERS),
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
    "spark.sql.shuffle.partitions": "2",
}
"""For every application on the cluster, unless a test says otherwise."""


class Cluster:
    """A Spark standalone cluster whose workers have one core each.

    Its daemons die with this process by a signal of the kernel, and executors and their Pythons
    end when their worker does.

    Attributes:
        url: spark://127.0.0.1:PORT
        workers: the worker daemons by index, also those that were killed.
        folder: of all that its processes write.
    """

    def __init__(self) -> None:
        import pyspark

        self.home = Path(pyspark.__file__).parent
        self.folder = Path(tempfile.mkdtemp(prefix="spark-cluster-"))
        self.environment = {
            MARK: self.folder.name,
            "SPARK_HOME": str(self.home),
            "SPARK_CONF_DIR": str(self.folder / "conf"),
            "SPARK_LOCAL_DIRS": str(self.folder / "local"),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_DAEMON_MEMORY": "512m",  # also of a Connect server, which refuses less
            "JDK_JAVA_OPTIONS": f"{JAVA_OPTIONS} -Djava.io.tmpdir={self.folder / 'temporary'}",
            "PYSPARK_PYTHON": sys.executable,
            "TMPDIR": str(self.folder / "temporary"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        for name in ("conf", "local", "temporary", "log"):
            (self.folder / name).mkdir()
        defaults = DEFAULTS | {"spark.sql.warehouse.dir": str(self.folder / "warehouse")}
        (self.folder / "conf" / "spark-defaults.conf").write_text(
            "".join(f"{key} {value}\n" for key, value in defaults.items())
        )
        self.workers: list[subprocess.Popen[bytes]] = []
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self.url = self.start(
                "org.apache.spark.deploy.master.Master",
                *("--host", "127.0.0.1", "--port", "0", "--webui-port", "0"),
                ready=r"Starting Spark master at (spark://\S+)(?s:.*)elected leader",
            )[1]
            for _ in range(NUM_WORKERS):
                self.start_worker()
        except BaseException:
            self.close()
            raise

    def start(self, main: str, *arguments: str, ready: str) -> tuple[subprocess.Popen[bytes], str]:
        """Starts a daemon of the cluster.

        Arguments:
            main: its Java class.
            ready: a pattern of its log when it is ready.

        Returns:
            The process, and what the pattern's first group matched.
        """
        logs = self.folder / "log"
        log = logs / f"{len(os.listdir(logs))}-{main.rpartition('.')[2]}"
        with log.open("wb") as out:
            daemon = subprocess.Popen(
                # The launcher's shell becomes the JVM, so the signal reaches the JVM itself.
                ["setpriv", "--pdeathsig", "KILL", self.home / "bin" / "spark-class", main]
                + list(arguments),
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=self.folder,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        give_up = time.monotonic() + START_S
        while (found := re.search(ready, text := log.read_text())) is None:
            if daemon.poll() is not None or time.monotonic() > give_up:
                tail = "\n".join(text.splitlines()[-30:])
                state = "not ready" if daemon.returncode is None else f"ended {daemon.returncode}"
                self.end(daemon)
                raise RuntimeError(f"{main}: {state} within {START_S:.0f} s; its log:\n{tail}")
            time.sleep(0.02)
        return daemon, found[1]

    def end(self, daemon: subprocess.Popen[bytes]) -> None:
        """Kills a daemon, and waits until it is gone."""
        daemon.kill()
        daemon.wait(LEAVE_S)
        self._daemons.remove(daemon)

    def start_worker(self) -> int:
        """Starts one more worker; returns its index."""
        # Hosts of their own: Spark never puts a speculative copy on a host that has an attempt.
        host = f"127.0.0.{len(self.workers) + 2}"
        daemon, _ = self.start(
            "org.apache.spark.deploy.worker.Worker",
            *("--host", host, "--port", "0", "--webui-port", "0"),
            *("--cores", "1", "--memory", "1g", "--work-dir", str(self.folder / "work")),
            self.url,
            ready=r"(Successfully registered) with master",
        )
        self.workers.append(daemon)
        return len(self.workers) - 1

    def kill_worker(self, index: int) -> None:
        """Kills a worker daemon at once (kill -9); its executors notice, and end."""
        self.end(self.workers[index])

    def restore(self) -> None:
        """Ends workers that a test added, and replaces those that it killed."""
        live = [i for i, worker in enumerate(self.workers) if worker.poll() is None]
        for index in live[NUM_WORKERS:]:
            self.kill_worker(index)
        for _ in range(NUM_WORKERS - len(live)):
            self.start_worker()

    def executors(self) -> list[int]:
        """The executors' JVMs."""
        return [p for p in self.processes() if "CoarseGrainedExecutorBackend" in command_of(p)]

    def python_workers(self) -> list[int]:
        """The Python processes in which executors run tasks, busy or idle."""
        pythons = {p: parent_of(p) for p in self.processes() if "pyspark.daemon" in command_of(p)}
        executors = self.executors()
        daemons = {python for python, parent in pythons.items() if parent in executors}
        return [python for python, parent in pythons.items() if parent in daemons]

    def daemons(self) -> set[int]:
        """The master, the workers, and what else was started with `start` and was not ended."""
        return {daemon.pid for daemon in self._daemons}

    def processes(self) -> list[int]:
        """All processes of the cluster: daemons, executors, and what these started."""
        mark = f"{MARK}={self.folder.name}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # it ended meanwhile, or is another user's
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return sorted(found)

    def strays(self, within_s: float = LEAVE_S) -> list[str]:
        """What is left beside the daemons after `within_s`: the commands of processes."""
        give_up = time.monotonic() + within_s
        while left := [p for p in self.processes() if p not in self.daemons()]:
            if time.monotonic() > give_up:
                return [f"{pid} {command_of(pid)}" for pid in left]
            time.sleep(0.02)
        return []

    def close(self) -> None:
        """Kills all processes of the cluster and removes its folder."""
        while self._daemons:
            self.end(self._daemons[-1])
        give_up = time.monotonic() + LEAVE_S
        while left := self.processes():
            if time.monotonic() > give_up:
                raise RuntimeError(f"not killed: {[command_of(pid) for pid in left]}")
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)
            time.sleep(0.02)
        shutil.rmtree(self.folder)


def command_of(pid: int) -> str:
    """The command line of a process; of one that is gone, nothing."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    """The parent of a process; of one that is gone, 0."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster that all tests share."""
    pytest.importorskip("pyspark")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    cluster = Cluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def gateway(cluster: Cluster) -> Iterator[Any]:
    """The JVM of this process's classic sessions, which outlives them; it ends when told to."""
    from pyspark import SparkContext
    from pyspark.java_gateway import launch_gateway

    log = cluster.folder / "log" / "gateway"
    with log.open("wb") as out, pytest.MonkeyPatch.context() as patch:
        for name in cluster.environment.keys() - {MARK}:
            patch.setenv(name, cluster.environment[name])
        gateway = launch_gateway(popen_kwargs={"stdout": out, "stderr": out})
    SparkContext._ensure_initialized(gateway=gateway)
    yield gateway
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait(LEAVE_S)
    SparkContext._gateway = SparkContext._jvm = None


@pytest.fixture
def stays(cluster: Cluster, gateway: Any) -> Callable[[], set[int]]:
    """The daemons, this process's JVM, and what the daemons' shells have left.

    A shell became the JVM, which never asks for the ends of what the shell had started.
    """

    def pids() -> set[int]:
        daemons = cluster.daemons()
        numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        zombies = {p for p in numbers if parent_of(p) in daemons and not command_of(p)}
        return daemons | zombies | {gateway.proc.pid}

    return pids


@pytest.fixture(autouse=True)
def _guarded(deadline: None, nothing_left: None, cluster: Cluster) -> Iterator[None]:
    """Every test has a deadline, leaves nothing behind, and finds the cluster as it should be."""
    yield
    strays = cluster.strays()
    cluster.restore()
    assert not strays, f"left on the cluster: {strays}"
    folders = [f.name for f in (cluster.folder / "temporary").glob("penstock-*")]
    assert not folders, f"temporary folders left on the cluster: {folders}"


@pytest.fixture
def session(
    cluster: Cluster, gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Makes a classic SparkSession on the cluster, with conf as keywords; stops the one before.

    With the conf of `DEFAULTS` all executors are there when it returns.
    """
    from pyspark.sql import SparkSession

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)

    def stop() -> None:
        if (active := SparkSession.getActiveSession()) is not None:
            active.stop()

    def make(**conf: Any) -> Any:
        stop()
        name = os.environ.get("PYTEST_CURRENT_TEST", "test")
        return SparkSession.builder.master(cluster.url).appName(name).config(map=conf).getOrCreate()

    yield make
    stop()


@pytest.fixture
def spark(session: Callable[..., Any]) -> Any:
    """A classic SparkSession on the cluster."""
    return session()


@pytest.fixture
def connect_server(cluster: Cluster) -> Iterator[Callable[..., str]]:
    """Starts a Spark Connect server on the cluster, with conf as keywords; gives its URL."""
    servers = []

    def make(**conf: Any) -> str:
        conf = {
            "spark.master": cluster.url,
            "spark.connect.grpc.binding.address": "127.0.0.1",
            "spark.connect.grpc.binding.port": "0",
        } | conf
        server, port = cluster.start(
            "org.apache.spark.deploy.SparkSubmit",
            *[word for key, value in conf.items() for word in ("--conf", f"{key}={value}")],
            *("--class", "org.apache.spark.sql.connect.service.SparkConnectServer"),
            "spark-internal",
            ready=r"Spark Connect server started at: \S*:(\d+)",
        )
        servers.append(server)
        return f"sc://127.0.0.1:{port}"

    yield make
    for server in servers:
        cluster.end(server)


@pytest.fixture
def connect(connect_server: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A SparkSession over Spark Connect."""
    from pyspark.sql import SparkSession

    # pyspark sets it for good; then no classic session could be made after this test.
    monkeypatch.setenv("SPARK_CONNECT_MODE_ENABLED", "1")
    session = SparkSession.builder.remote(connect_server()).create()
    yield session
    session.stop()
