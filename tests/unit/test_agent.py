"""An agent as Spark would run it: forked by a daemon, with a task's context, against a driver.

The daemon, agents, fork servers and workers are real processes, and the driver's end is a real
coordinator; only Spark's JVM is missing.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.agent import PREFIX, Orders, _lasting
from penstock.cluster.channel import Message
from penstock.cluster.coordinator import Coordinator, Peer
from penstock.cluster.directory import Directory, Told
from penstock.feed import spool
from penstock.feed.columns import Selection
from penstock.feed.intake import Arrival, numbers
from penstock.feed.spooled import SpoolRecords
from penstock.token import new_token

pytest.importorskip("pyspark")

WAIT_S = 10.0
"""How long anything may take that is to happen."""
SOON_S = 3.0
"""How long what is promised within a second may take on a machine with other work."""
UUID = "250b9e52-218e-4a08-b842-676967c6f284"
ROWS = [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[7.0, 8.0]]]
"""Of the column x, by Spark's partition."""
ARRIVAL = Arrival("train", Selection("x", "y"), numbers(4, 2))
"""Of four partitions, two of each of two shards: 0 and 2 of the first."""

DAEMON = """
    import json, os, signal, sys, time, traceback
    import penstock.cluster.agent
    import penstock.feed.intake
    import pyspark
    from pyspark.resource import ResourceInformation

    def batches(partitions, last):
        # All rows of all partitions, as they come below a `coalesce`; then what `last` says.
        import pyarrow as pa

        def some(rows, *places):
            source, partition = zip(*places) if places else ((), ())
            x = pa.array(rows, pa.list_(pa.float64()))
            y = pa.array(range(len(rows)), pa.int64())
            return pa.record_batch(
                {
                    "source": pa.array(source, pa.int32()),
                    "partition": pa.array(partition, pa.int32()),
                    "c0": x,
                    "c1": y,
                }
            )

        if last == "late":
            time.sleep(2)
        rows = [row for some in partitions for row in some]
        places = [(0, n) for n, some in enumerate(partitions) for _ in some]
        yield some(rows, *places)
        more = some([[1.0, 2.0]] * 8192, *[(0, len(partitions))] * 8192)
        while last == "endless":
            yield more
            time.sleep(0.01)
        if last == "stuck":
            time.sleep(60)
        if last == "broken":
            raise OSError("Spark is gone")

    def task(code, context, orders, partitions, last):
        gpus = {"gpu": ResourceInformation("gpu", context.pop("gpus"))}
        pyspark.TaskContext(cpus=2, resources=gpus if gpus["gpu"].addresses else {}, **context)
        before = os.environ.get("PYTHONPATH", "")
        taken = batches(partitions, last)
        orders["arrivals"] = orders["arrivals"].encode("latin-1")
        given = list(penstock.cluster.agent.run(code, orders, taken))
        assert os.environ.get("PYTHONPATH", "") == before
        assert "torch" not in sys.modules
        return f"gave {given}"

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        values = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.update(values["environment"])
            sys.path.insert(0, values["task"]["code"])
            try:
                result = task(**values["task"])
            except BaseException:
                result = traceback.format_exc()
            with open(values["result"], "w") as file:
                file.write(result)
            os._exit(0)
        print(pid, flush=True)
"""

TARGET = """
    import json, os, subprocess, sys, time

    def show(payload):
        spool = os.environ["PENSTOCK_SPOOL"]
        names = ("PENSTOCK_RANK", "CUDA_VISIBLE_DEVICES", "COLOUR")
        print(json.dumps({
            "payload": os.pread(payload, 1000, 0).decode(),
            "spooled": sorted(
                os.path.relpath(r, spool)
                for r, _, f in os.walk(spool, followlinks=True)
                if "end.json" in f
            ),
            "environment": [os.environ.get(name) for name in names],
            "folder": os.getcwd(),
            "preloaded": "colorsys" in sys.modules,
        }))
        return 7

    def sleep(payload):
        print(subprocess.Popen(["sleep", "60"]).pid)
        time.sleep(60)

    from penstock.feed.intake import Intake

    class Broken(Intake):
        def write(self, batch):
            raise ZeroDivisionError("a defect of the sink's")
"""


class Daemon:
    """Forks tasks, as the daemon of Spark's Python workers does.

    Attributes:
        code: the folder of shipped code, with the workers' targets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.code = folder, folder / "code"
        self.code.mkdir()
        (self.code / "target.py").write_text(textwrap.dedent(TARGET))
        (folder / "daemon.py").write_text(textwrap.dedent(DAEMON))
        self.process = subprocess.Popen(
            [sys.executable, folder / "daemon.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            text=True,
        )

    def fork(self, values: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(values), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)


class Driver:
    """A driver of agents."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self.daemon, self.folder = daemon, folder
        self.token = new_token()
        self.coordinator = Coordinator(self.token)
        self.directory: Directory | None = None
        self.elsewhere = False  # whether agents are told that others are of other hosts
        self.said: list[tuple[int, Message | None]] = []
        self.agents: list[Agent] = []
        self.closed = False
        (folder / "local").mkdir()

    def agent(self, **changes: Any) -> Agent:
        """Has an agent forked, and waits until it has joined."""
        agent = self.send(**changes)
        agent.hello = agent.until(lambda m: m.get("role") == "agent")
        return agent

    def send(
        self,
        *,
        rank: int = 0,
        attempt: int = 0,
        gpus: tuple[str, ...] = (),
        partitions: Any = (),
        last: str = "",
        **orders: Any,
    ) -> Agent:
        values: dict[str, Any] = {
            "address": self.coordinator.address,
            "token": self.token,
            "preload": ("colorsys",),
            "sink": "penstock.feed.intake:Intake",
            "arrivals": pickle.dumps([ARRIVAL]).decode("latin-1"),
            "columns": (("c0", "c1"),),
            "owners": (0, 1),
            "folder": str(self.folder),
            "run": "/runs/one",
        }
        result = self.folder / f"result-{len(self.agents)}"
        context = {"partitionId": rank, "attemptNumber": attempt, "taskAttemptId": 40 + attempt}
        task = {
            "code": str(self.daemon.code),
            "context": context | {"gpus": gpus},
            "orders": asdict(Orders(**(values | orders))),
            "partitions": partitions,
            "last": last,
        }
        environment = {"SPARK_LOCAL_DIRS": f"{self.folder / 'local'},/there/is/no/such/folder"}
        pid = self.daemon.fork({"task": task, "environment": environment, "result": str(result)})
        self.agents.append(Agent(self, pid, result))
        return self.agents[-1]

    def poll(self) -> None:
        if not self.closed:
            for peer, message in self.coordinator.poll():
                self.said.append((peer.number, message))
                if self.directory is not None:
                    self._say(self._directed(self.directory, peer, message))

    def _directed(self, directory: Directory, peer: Peer, message: Message | None) -> Told:
        if message is None:
            return directory.gone(peer.number)
        if message is peer.hello:
            return directory.joined(peer.number, message["rank"])
        return directory.heard(peer.number, message)

    def _say(self, told: Told) -> None:
        for agent, message in told:
            if self.elsewhere and "nonce" in message:
                message = message | {"nonce": "of another host"}
            self.coordinator.send(agent, message)

    def folders(self) -> list[Path]:
        """Of agents."""
        return sorted((self.folder / "local").glob(f"{PREFIX}*"))

    def close(self) -> None:
        self.closed = True
        self.coordinator.close()

    def end(self) -> None:
        """Ends all that a test may have left."""
        if not self.closed:
            self.close()
        for agent in self.agents:
            if not is_over([agent.pid]):
                os.kill(agent.pid, signal.SIGKILL)


class Agent:
    """A task, as its driver sees it."""

    def __init__(self, driver: Driver, pid: int, result: Path) -> None:
        self.driver, self.pid, self._result = driver, pid, result
        self.number = 0
        self.hello: Message = {}
        self._heard = len(driver.said)

    def until(self, enough: Callable[[Message], bool], within_s: float = WAIT_S) -> dict[str, Any]:
        """The next message of it that is enough."""
        give_up = time.monotonic() + within_s
        while True:
            while self._heard < len(self.driver.said):
                number, message = self.driver.said[self._heard]
                self._heard += 1
                if message is not None and number == (self.number or number) and enough(message):
                    self.number = number
                    return message
            assert time.monotonic() < give_up, f"only {self.driver.said}"
            time.sleep(0.005)
            self.driver.poll()

    def event(self, name: str, within_s: float = WAIT_S) -> dict[str, Any]:
        return self.until(lambda m: m.get("event") == name, within_s)

    def taken_in(self) -> dict[str, Any]:
        """What it tells when it has read all."""
        return self.event("read")

    def worker(self, what: str, within_s: float = WAIT_S) -> dict[str, Any]:
        """The next event of its worker of that kind."""
        return self.until(lambda m: m.get("what") == what, within_s)

    def do(self, what: str, body: bytes = b"", **values: Any) -> None:
        parts = [body] if body else []
        self.driver.coordinator.send(self.number, {"do": what, **values}, parts)

    def start(self, function: str, generation: int = 1, **environment: str) -> int:
        """Has a worker started; gives its process."""
        values = {"generation": generation, "target": f"target:{function}"}
        self.do("start", b"the payload", environment=environment, **values)
        return int(self.worker("started")["pid"])

    def result(self, within_s: float = WAIT_S) -> str:
        """What came of the task, which ends in time; only after that its process is gone."""
        wait_for(lambda: is_over([self.pid]), within_s, self.driver.poll)
        return self._result.read_text() if self._result.exists() else "killed"


def wait_for(
    condition: Callable[[], bool], within_s: float, meanwhile: Callable[[], None] = lambda: None
) -> None:
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, "not in time"
        meanwhile()
        time.sleep(0.005)


def is_over(pids: list[int]) -> bool:
    """Whether all these processes have ended; nobody may have asked how."""
    return all(state_and_parent(pid)[0] in "ZX" for pid in pids)


def state_and_parent(pid: int) -> tuple[str, int]:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[1])


def family(pid: int) -> list[int]:
    """A process and all that it has started, and they."""
    found = [pid]
    parents = {int(p.name): state_and_parent(int(p.name))[1] for p in Path("/proc").glob("[0-9]*")}
    for each in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == each]
    return found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    made = Daemon(tmp_path_factory.mktemp("daemon"))
    yield made
    made.close()


@pytest.fixture
def driver(daemon: Daemon, tmp_path: Path) -> Iterator[Driver]:
    made = Driver(daemon, tmp_path)
    yield made
    made.end()


def leave(agent: Agent) -> None:
    """Has it leave; nothing of it is left."""
    processes = family(agent.pid)
    agent.do("leave", keep=False)
    assert agent.result() == "gave []"
    assert is_over(processes)


# Joining


def test_it_says_who_it_is(driver: Driver) -> None:
    agent = driver.agent(rank=3, attempt=2, gpus=("1", "5"))
    assert (agent.hello["rank"], agent.hello["attempt"]) == (3, 42)
    assert agent.hello["host"] == socket.gethostname()
    assert agent.hello["facts"]["gpus"] == ["1", "5"]
    assert agent.hello["facts"]["cpus"] == 2
    assert agent.hello["facts"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert not agent.hello["first"]
    leave(agent)
    again = driver.agent(rank=3, attempt=0)  # of its stage, which Spark runs again
    assert again.hello["first"]
    leave(again)


def test_it_does_not_join_another_run(driver: Driver) -> None:
    agent = driver.send(token=new_token())
    assert "TransportError: the agent of rank 0 on" in agent.result()
    assert driver.said == []
    assert driver.folders() == []


def test_it_is_heard_of_while_it_has_nothing_to_say(driver: Driver) -> None:
    agent = driver.agent()
    agent.event("ready")
    for _ in range(2):
        agent.event("heard", within_s=SOON_S)
    leave(agent)


# What it reads


def test_it_is_ready_with_the_first_rows(driver: Driver) -> None:
    agent = driver.agent(last="late")
    agent.event("heard")
    assert all(m is None or m.get("event") != "ready" for _, m in driver.said)
    agent.event("ready")
    leave(agent)


def test_it_leaves_though_spark_computes_rows_still(driver: Driver) -> None:
    agent = driver.agent(last="stuck")
    assert agent.event("ready")["report"] is None
    agent.start("show")
    assert json.loads(agent.worker("output")["data"])["spooled"] == []
    agent.do("leave", keep=False)
    wait_for(lambda: driver.folders() == [], SOON_S)
    os.kill(agent.pid, signal.SIGKILL)  # as Spark does when the job is cancelled


def test_what_comes_is_spooled_and_told(driver: Driver) -> None:
    agent = driver.agent(partitions=ROWS)
    told = [agent.until(lambda m: m.get("event") in ("reading", "sum", "read")) for _ in range(7)]
    assert [m["event"] for m in told] == ["reading", "sum", "sum"] * 2 + ["read"]
    assert [m["partition"] for m in told[:-1]] == [0] * 3 + [2] * 3
    assert [m["of"] for m in told if m["event"] == "sum"] == ["first rows", "rows"] * 2
    assert told[-1]["bad"] == []
    agent.start("show")
    assert json.loads(agent.worker("output")["data"])["spooled"] == ["0/0", "0/2"]
    leave(agent)
    other = driver.agent(partitions=[ROWS[0], [[7.0, 9.0]]])
    again = [other.event("sum") for _ in range(4)]
    assert again[:2] == [m for m in told if m["event"] == "sum"][:2]
    assert again[3]["sum"] != told[5]["sum"]
    leave(other)


def test_first_rows_are_there_while_more_are_computed(driver: Driver) -> None:
    agent = driver.agent(last="endless")
    assert agent.event("reading")["partition"] == 0
    assert agent.event("sum", within_s=4 * WAIT_S)["of"] == "first rows"
    assert all(m is None or m.get("event") != "read" for _, m in driver.said)
    leave(agent)


def test_bad_data_is_told_with_its_row_and_what_to_do(driver: Driver) -> None:
    agent = driver.agent(partitions=[ROWS[0], [[1.0, 2.0], [3.0]]])
    failed = agent.event("failed")
    assert failed["kind"] == "DataError"
    assert "train: partition 1" in failed["message"]
    assert "row 1" in failed["message"]
    assert failed["hint"]
    assert not is_over([agent.pid])  # Spark would take its end for a reason to try again
    assert all(m is None or m.get("event") != "read" for _, m in driver.said)
    leave(agent)
    assert driver.folders() == []


def test_a_partition_that_was_not_counted(driver: Driver) -> None:
    agent = driver.agent(partitions=[ROWS[0], [], [], [], ROWS[1]])
    assert "train: partition 4: expected 0 to 3" in agent.event("failed")["message"]
    leave(agent)


def test_a_sink_that_is_not_there(driver: Driver) -> None:
    agent = driver.agent(sink="penstock.feed.no_such_module:Sink")
    failed = agent.event("failed")
    assert failed["kind"] == "ModuleNotFoundError"
    assert "no_such_module" in failed["message"]
    leave(agent)


def test_a_defect_fails_the_task(driver: Driver) -> None:
    agent = driver.agent(sink="target:Broken", partitions=ROWS)
    assert "ZeroDivisionError: a defect of the sink's" in agent.result()
    assert driver.folders() == []


def test_what_spark_raises_fails_the_task(driver: Driver) -> None:
    agent = driver.agent(partitions=ROWS, last="broken")
    assert "OSError: Spark is gone" in agent.result()
    assert all(m is None or m.get("event") != "failed" for _, m in driver.said)


# What agents share


@pytest.mark.parametrize("elsewhere", [False, True], ids=["of this host", "of another"])
def test_an_agent_has_what_another_reads_for_it(driver: Driver, elsewhere: bool) -> None:
    driver.directory, driver.elsewhere = Directory((0, 1), {"train": ARRIVAL.numbers}), elsewhere
    owner = driver.agent(rank=1)
    owner.taken_in()
    reader = driver.agent(rank=0, partitions=[ROWS[0], [], ROWS[0], ROWS[1]])
    reader.taken_in()
    (mine,) = [f for f in driver.folders() if (f / "spool/0/0/end.json").exists()]
    (its,) = {*driver.folders()} - {mine}
    for partition in (1, 3):
        path = its / f"spool/0/{partition}"
        wait_for(lambda: (path / "end.json").exists(), WAIT_S, driver.poll)  # noqa: B023
        assert path.is_symlink() != elsewhere
        for name in ("000000.arrow", "end.json"):
            read = mine / f"read/0/{partition}" / name
            assert (path / name).read_bytes() == read.read_bytes()
    owner.start("show")
    assert json.loads(owner.worker("output")["data"])["spooled"] == ["0/1", "0/3"]
    reader.start("show")
    assert json.loads(reader.worker("output")["data"])["spooled"] == ["0/0", "0/2"]  # 2 is empty
    for agent in (reader, owner):
        leave(agent)


def test_a_copy_grows_and_goes_on_when_its_reader_was_lost(driver: Driver) -> None:
    driver.directory, driver.elsewhere = Directory((0, 1), {"train": ARRIVAL.numbers}), True
    owner = driver.agent(rank=1)
    owner.taken_in()
    (its,) = driver.folders()
    partitions: list[Any] = [[], []]
    lost = driver.agent(rank=0, partitions=partitions, last="endless")
    copy = its / "spool/0/1"
    wait_for((copy / "000000.arrow").exists, 4 * WAIT_S, driver.poll)
    os.kill(lost.pid, signal.SIGKILL)
    lost.result()
    assert spool.writer_lives(copy) is True  # this agent holds it until it is whole
    again = driver.agent(rank=0, attempt=1, partitions=partitions, last="endless")
    wait_for((copy / "000001.arrow").exists, 4 * WAIT_S, driver.poll)
    records = SpoolRecords(lambda n: copy if n == 0 else None, "train")
    assert len(records) >= 2 * records.windows[1]
    assert driver.directory.conflicts == []
    again.do("leave", keep=False)
    owner.do("leave", keep=False)
    for agent in (again, owner):
        assert agent.result() == "gave []"


def test_a_reader_that_fails_is_known_to_the_owners_worker(driver: Driver) -> None:
    driver.directory, driver.elsewhere = Directory((0, 1), {"train": ARRIVAL.numbers}), True
    owner = driver.agent(rank=1)
    reader = driver.agent(rank=0, partitions=[[], [], [[1.0, 2.0], [3.0]]])
    assert reader.event("failed")["kind"] == "DataError"
    wait_for(lambda: any(driver.folder.glob("local/*/spool/0/1/failed.json")), WAIT_S, driver.poll)
    for agent in (reader, owner):
        leave(agent)


# What outlives it


def test_what_it_has_read_is_there_for_one_that_comes_later(driver: Driver) -> None:
    agent = driver.agent(partitions=ROWS, last="endless")
    told = [agent.until(lambda m: m.get("of") == "rows") for _ in ROWS]
    agent.do("leave", keep=True)
    assert agent.result() == "gave []"
    assert driver.folders() == []
    kept = [(0, m["partition"], int(m["sum"].split()[0]), m["sum"].split()[1]) for m in told]
    directory = Directory((0, 1), {"train": ARRIVAL.numbers}, [each[:2] for each in kept])
    driver.directory = directory
    other, late = (driver.agent(rank=rank, kept=kept) for rank in (1, 0))
    for each in (other, late):
        each.taken_in()
    assert directory.looked
    assert not directory.lacks
    late.start("show")
    assert json.loads(late.worker("output")["data"])["spooled"] == ["0/0", "0/2"]
    leave(other)
    wait_for(lambda: directory.lacks, WAIT_S, driver.poll)
    leave(late)
    assert not list((driver.folder / "local").iterdir())


def test_what_it_has_read_outlives_its_driver(driver: Driver) -> None:
    agent = driver.agent(partitions=ROWS)
    agent.taken_in()
    driver.close()
    assert "the driver is gone" in agent.result(within_s=2 * SOON_S)
    assert driver.folders() == []
    assert len(list((driver.folder / "local").glob("penstock-*/*/*/end.json"))) == len(ROWS)


@pytest.mark.parametrize(
    ("local", "lasting"),
    [
        ("/mnt/spark", "/mnt/spark"),
        (f"/mnt/spark-{UUID}/executor-{UUID}/blockmgr-{UUID}", "/mnt"),
        (f"/nm/usercache/ann/appcache/application_17_0002/blockmgr-{UUID}", "/nm/usercache/ann"),
        (f"/tmp/blockmgr-{UUID}", "/tmp"),
    ],
)
def test_it_outlives_what_is_made_for_an_application(local: str, lasting: str) -> None:
    assert _lasting(Path(local)) == Path(lasting)


# Its worker


def test_a_worker_runs_where_its_driver_does_with_the_payload(driver: Driver) -> None:
    agent = driver.agent(rank=2, gpus=("1", "5"))
    agent.event("ready")
    pid = agent.start("show", generation=3, COLOUR="red")
    output = agent.worker("output")
    assert json.loads(output["data"]) == {
        "payload": "the payload",
        "spooled": [],
        "environment": ["2", "1,5", "red"],
        "folder": str(driver.folder),
        "preloaded": True,
    }
    exited = agent.worker("exited")
    assert (exited["pid"], exited["code"], exited["signal"]) == (pid, 7, None)
    assert {m["generation"] for m in (output, exited)} == {3}
    assert {m["rank"] for m in (output, exited)} == {2}
    leave(agent)


def test_a_folder_that_is_not_on_the_node(driver: Driver) -> None:
    agent = driver.agent(folder="/there/is/no/such/folder")
    agent.event("ready")
    agent.start("show")
    assert json.loads(agent.worker("output")["data"])["folder"] == os.getcwd()
    leave(agent)


def test_end_kills_the_worker_and_what_it_has_started_and_the_next_can_begin(
    driver: Driver,
) -> None:
    agent = driver.agent()
    agent.event("ready")
    for generation in (1, 2):
        pid = agent.start("sleep", generation)
        child = int(agent.worker("output")["data"])
        assert not is_over([pid])
        assert not is_over([child])
        agent.do("end")
        exited = agent.worker("exited", within_s=SOON_S)
        assert (exited["pid"], exited["signal"]) == (pid, signal.SIGKILL)
        assert exited["generation"] == generation
        wait_for(lambda: is_over([pid, child]), SOON_S)  # noqa: B023
    leave(agent)


def test_a_fork_server_that_is_killed_is_told_of_and_made_anew(driver: Driver) -> None:
    agent = driver.agent()
    agent.event("ready")
    worker = agent.start("sleep")
    server = state_and_parent(worker)[1]
    assert state_and_parent(server)[1] == agent.pid
    os.kill(server, signal.SIGKILL)
    exited = agent.worker("exited")
    assert exited["pid"] == worker
    assert "fork server" in exited["cause"]
    agent.start("show", generation=2)
    assert agent.worker("exited")["code"] == 7
    leave(agent)


# Its end


def test_nothing_is_left_when_it_leaves(driver: Driver) -> None:
    agent = driver.agent(partitions=ROWS)
    agent.taken_in()
    worker = agent.start("sleep")
    child = int(agent.worker("output")["data"])
    processes = family(agent.pid)
    assert {worker, child, state_and_parent(worker)[1]} <= {*processes}
    (folder,) = driver.folders()
    assert (folder / "spool/0/0/end.json").exists()
    agent.do("leave", keep=False)
    assert agent.result(within_s=SOON_S) == "gave []"
    assert is_over(processes)
    assert driver.folders() == []


@pytest.mark.parametrize("endless", [False, True], ids=["as it serves", "as it reads"])
def test_it_ends_with_its_driver(driver: Driver, endless: bool) -> None:
    agent = driver.agent(partitions=ROWS, last="endless" if endless else "")
    if endless:
        wait_for(lambda: any((f / "spool/0/2/end.json").exists() for f in driver.folders()), WAIT_S)
    else:
        agent.event("ready")
        agent.start("sleep")
        agent.worker("output")
    processes = family(agent.pid)
    driver.close()
    assert "the driver is gone" in agent.result(within_s=2 * SOON_S)
    wait_for(lambda: is_over(processes), SOON_S)
    assert driver.folders() == []


def test_its_worker_dies_with_it(driver: Driver) -> None:
    agent = driver.agent()
    agent.event("ready")
    agent.start("sleep")
    agent.worker("output")
    processes = family(agent.pid)
    assert len(processes) == 4  # agent, fork server, worker, what that has started
    os.kill(agent.pid, signal.SIGKILL)
    wait_for(lambda: is_over(processes), SOON_S)


def test_it_dies_with_the_daemon(tmp_path: Path) -> None:
    """A driver that is still there does not keep agents of an executor that was killed."""
    daemon = Daemon(tmp_path)
    driver = Driver(daemon, tmp_path)
    try:
        agent = driver.agent()
        agent.event("ready")
        agent.start("sleep")
        agent.worker("output")
        processes = family(agent.pid)
        daemon.process.kill()
        wait_for(lambda: is_over(processes), SOON_S)
    finally:
        driver.end()
        daemon.close()


def test_folders_that_the_killed_have_left_are_removed_and_no_others(driver: Driver) -> None:
    killed, alive = driver.agent(), driver.agent(rank=1)
    for agent in (killed, alive):
        agent.event("ready")
    both = driver.folders()
    assert len(both) == 2
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.result() == "killed"
    fresh = driver.agent()
    fresh.event("ready")
    assert {*both} < {*driver.folders()}  # too young to be taken for left behind
    leave(fresh)
    hour_ago = time.time() - 3600
    for folder in both:
        os.utime(folder / "lock", (hour_ago, hour_ago))
    last = driver.agent()
    last.event("ready")
    assert len({*both} & {*driver.folders()}) == 1
    for agent in (last, alive):
        leave(agent)
    assert driver.folders() == []
