"""What is known of a Spark cluster before a run, and what of it cannot work; without a JVM."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest

from penstock.cluster import session
from penstock.cluster.session import KILL_KEYS, Facts, is_spark, session_of
from penstock.errors import JobError, UserError
from penstock.runtime import place

STANDALONE = {"spark.master": "spark://host:7077"}
YARN = {"spark.master": "yarn"}
TASK_GPUS, EXECUTOR_GPUS = "spark.task.resource.gpu.amount", "spark.executor.resource.gpu.amount"
DYNAMIC = {"spark.dynamicAllocation.enabled": "true"}
MOST = "spark.dynamicAllocation.maxExecutors"


def facts(conf: Mapping[str, str] | None = None, slots: int | None = None) -> Facts:
    """A classic session's where slots are given, else one over Connect."""
    return Facts("on spark://host:7077", "127.0.0.1", slots is not None, conf or {}, slots)


def most(found: Facts) -> int | None:
    """The largest number of workers that is let pass, below 50."""
    passing = None
    for workers in range(50):
        try:
            found.check(workers, "cpu")
        except JobError:
            return passing
        passing = workers
    return None


# Slots against workers


def test_fewer_slots_than_workers() -> None:
    conf = STANDALONE | {"spark.executor.cores": "4", "spark.cores.max": "8"}
    found = facts(conf | {"spark.task.cpus": "3"}, slots=2)
    found.check(2, "cpu")
    with pytest.raises(JobError) as caught:
        found.check(3, "cpu")
    assert caught.value.message == (
        "3 workers need 3 slots at once; the cluster has 2 "
        "(spark.executor.cores=4, spark.cores.max=8, spark.task.cpus=3)"
    )
    assert caught.value.hint.startswith("workers: 2, or more executors")


def test_no_slots_at_all() -> None:
    with pytest.raises(JobError, match=r"the cluster has 0 \(spark\.task\.cpus=1\)") as caught:
        facts(slots=0).check(1, "cpu")
    assert "no executor has registered" in caught.value.hint
    assert "spark.executor.memory" in caught.value.hint
    assert "workers: 0" not in caught.value.hint


def test_keys_of_gpus_are_named_where_they_count() -> None:
    with pytest.raises(JobError) as caught:
        facts({TASK_GPUS: "0.25", EXECUTOR_GPUS: "1"}, slots=4).check(5, "cuda")
    assert f"{EXECUTOR_GPUS}=1, {TASK_GPUS}=0.25" in caught.value.message
    with pytest.raises(JobError) as caught:
        facts({EXECUTOR_GPUS: "1"}, slots=4).check(5, "cpu")
    assert "gpu" not in caught.value.message


@pytest.mark.parametrize(
    ("conf", "cores", "slots"),
    [
        ({}, 8, 8),
        ({"spark.task.cpus": "3"}, 8, 2),
        ({TASK_GPUS: "0.25", EXECUTOR_GPUS: "1"}, 8, 4),
        ({TASK_GPUS: "0.25", EXECUTOR_GPUS: "2"}, 8, 8),
        ({TASK_GPUS: "0.25", EXECUTOR_GPUS: "2"}, 3, 3),
        ({TASK_GPUS: "0.5", EXECUTOR_GPUS: "3"}, 8, 6),
        ({TASK_GPUS: "0.4", EXECUTOR_GPUS: "2"}, 8, 4),  # a task takes parts of one GPU only
        ({TASK_GPUS: "1", EXECUTOR_GPUS: "2"}, 8, 2),
        ({TASK_GPUS: "1.0", EXECUTOR_GPUS: "2"}, 8, 2),
        ({TASK_GPUS: "2", EXECUTOR_GPUS: "5"}, 8, 2),
        ({TASK_GPUS: "2", EXECUTOR_GPUS: "1"}, 8, 0),
        ({EXECUTOR_GPUS: "2"}, 8, 8),
        ({TASK_GPUS: "1"}, 8, 8),
    ],
)
def test_slots_of_an_executor(conf: dict[str, str], cores: int, slots: int) -> None:
    assert facts(conf).slots_per_executor(cores) == slots


def test_a_fraction_of_a_gpu_is_exact() -> None:
    assert facts({TASK_GPUS: "0.25"}).task_gpus == Fraction(1, 4)
    assert facts({TASK_GPUS: "0.1", EXECUTOR_GPUS: "1"}).slots_per_executor(99) == 10
    assert facts().task_gpus == 0


# Where Spark does not tell: over Connect, and with executors that come and go


@pytest.mark.parametrize(
    ("conf", "bound"),
    [
        (STANDALONE, None),
        (STANDALONE | {"spark.cores.max": "5"}, 5),
        (STANDALONE | {"spark.cores.max": "5", "spark.task.cpus": "2"}, 2),
        (STANDALONE | {"spark.cores.max": "8", "spark.executor.cores": "3"}, 6),
        (
            STANDALONE
            | {"spark.cores.max": "9", "spark.executor.cores": "3", "spark.task.cpus": "2"},
            3,
        ),
        # More executors than instances come, where a standalone cluster has cores for them.
        (STANDALONE | {"spark.executor.instances": "1", "spark.executor.cores": "2"}, None),
        (STANDALONE | {"spark.cores.max": "8", TASK_GPUS: "1", EXECUTOR_GPUS: "2"}, 8),
        (YARN, None),
        (YARN | {"spark.executor.instances": "3"}, 3),
        (YARN | {"spark.executor.instances": "3", "spark.executor.cores": "4"}, 12),
        (YARN | {"spark.executor.instances": "3", "spark.cores.max": "2"}, 3),
        ({"spark.master": "k8s://https://host", "spark.executor.instances": "2"}, 2),
        ({"spark.master": "local[4]", "spark.cores.max": "1"}, None),
        ({"spark.executor.instances": "1", "spark.cores.max": "1"}, None),
    ],
)
def test_over_connect_the_keys_that_are_set_bound_the_slots(
    conf: dict[str, str], bound: int | None
) -> None:
    assert most(facts(conf)) == bound


@pytest.mark.parametrize("slots", [None, 0, 1, 99])
@pytest.mark.parametrize(
    ("conf", "bound"),
    [
        ({}, None),
        ({MOST: "3"}, None),  # of executors of any size
        ({MOST: "3", "spark.executor.cores": "2"}, 6),
        ({MOST: "3", "spark.executor.cores": "4", "spark.task.cpus": "3"}, 3),
        (YARN | {MOST: "3"}, 3),
        (YARN | {MOST: "3", "spark.executor.instances": "1"}, 3),
        (STANDALONE | {MOST: "3", "spark.executor.cores": "2", "spark.cores.max": "4"}, 4),
        ({MOST: "2147483647", "spark.executor.cores": "2"}, None),
    ],
)
def test_dynamic_allocation_is_bounded_by_its_most_executors(
    conf: dict[str, str], bound: int | None, slots: int | None
) -> None:
    """What runs now says nothing: executors come when agents wait for slots."""
    assert most(facts(DYNAMIC | conf, slots)) == bound


def test_the_bound_of_dynamic_allocation_is_named() -> None:
    conf = DYNAMIC | {MOST: "2", "spark.executor.cores": "1", "spark.executor.instances": "1"}
    with pytest.raises(JobError, match=f"{MOST}=2, spark.executor.cores=1") as caught:
        facts(conf).check(3, "cpu")
    assert "spark.executor.instances=" not in caught.value.message
    off = facts(conf | {"spark.dynamicAllocation.enabled": "false"}, slots=3)
    off.check(3, "cpu")


# Other keys


@pytest.mark.parametrize("key", KILL_KEYS)
def test_killing_on_idleness_is_refused(key: str) -> None:
    for off in ({}, {key: "false"}):
        facts(off, slots=1).check(1, "cpu")
    with pytest.raises(JobError, match=rf"^{key}=true: Spark would kill agents") as caught:
        facts({key: "TRUE"}, slots=1).check(1, "cpu")
    assert caught.value.hint == f"{key}=false for this session"


def test_a_gpu_is_asked_for_and_tasks_get_none() -> None:
    found = facts({EXECUTOR_GPUS: "1"}, slots=2)
    found.check(2, "cpu")
    found.check(2, "auto")
    with pytest.raises(JobError, match=rf"device: cuda, and {TASK_GPUS} is not set") as caught:
        found.check(2, "cuda")
    assert EXECUTOR_GPUS in caught.value.hint
    facts({TASK_GPUS: "0.5"}, slots=2).check(2, "cuda")


def test_what_is_worth_saying() -> None:
    assert facts(slots=1).notes() == []
    conf = {"spark.speculation": "true", "spark.executor.pyspark.memory": "2g"}
    notes = facts(DYNAMIC | conf).notes()
    assert [note.split()[0] for note in notes] == [
        "spark.speculation",
        "spark.dynamicAllocation",
        "spark.executor.pyspark.memory=2g",
    ]
    off = {"spark.speculation": "false", "spark.dynamicAllocation.enabled": "false"}
    assert facts(off).notes() == []


def test_why_agents_may_be_missing() -> None:
    said = facts({"spark.task.cpus": "2"}, slots=3).missing()
    assert said.startswith("slots 3 (spark.task.cpus=2); free slots may be taken by other jobs")
    assert facts().missing().startswith("free slots may be taken")


# What `on` means


@pytest.mark.parametrize(
    "on",
    [
        "spark://host:7077",
        "spark://a:7077,b:7077",
        "k8s://https://host:6443",
        "sc://host",
        "yarn",
        "local[2]",
        "local[*]",
        "local-cluster[2,1,1024]",
    ],
)
def test_names_of_masters(on: str) -> None:
    assert is_spark(on)


@pytest.mark.parametrize(
    "on",
    ["", "local", "local:7070", "sprk://host:7077", "spark:/host", "yarn-client", "host:7077"]
    + ["my spark://host", None, 5, ["spark://host"], {"on": "yarn"}],
)
def test_what_is_no_master(on: object) -> None:
    assert not is_spark(on)


def test_a_session_is_known_by_what_it_can_do() -> None:
    pytest.importorskip("pyspark")
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql.connect.session import SparkSession as Remote

    assert is_spark(SparkSession)
    assert is_spark(Remote)
    assert not is_spark(DataFrame)
    given = object()
    assert session_of(given, "run") == (given, False)


@pytest.mark.parametrize(
    ("on", "hint"),
    [
        ("sprk://host:7077", "did you mean 'spark'?"),
        ("yarm", "did you mean 'yarn'?"),
        ("local:port", "did you mean 'local'?"),
        (7077, "local is this machine"),
    ],
)
def test_a_place_that_is_none(on: object, hint: str) -> None:
    with pytest.raises(JobError, match="expected 'local', 'local:PORT', a Spark master") as caught:
        place.at(on, "run", 2)
    assert repr(on) in caught.value.message
    assert caught.value.hint == hint


def alone(code: str, **variables: str) -> list[str]:
    """The lines that code prints in a Python of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


ASK = """
from penstock.cluster.session import session_of
from penstock.errors import UserError
try:
    session_of({on!r}, "run")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("on", "missing"), [("spark://host:7077", "pyspark"), ("sc://host", "grpc")]
)
def test_without_pyspark_the_extra_is_named(on: str, missing: str) -> None:
    if missing == "grpc":
        pytest.importorskip("pyspark")
    block = f"import sys; sys.modules[{missing!r}] = None\n"
    message, hint = alone(block + ASK.format(on=on))
    assert message.startswith(f"on={on!r}: pyspark, or what it needs, is not installed:")
    assert missing in message
    assert hint == "  hint: pip install 'penstock[spark]'"


def test_without_java_the_doctor_is_named() -> None:
    pytest.importorskip("pyspark")
    with socket.create_server(("127.0.0.1", 0)) as master:
        on = f"spark://127.0.0.1:{master.getsockname()[1]}"
        message, hint = alone(ASK.format(on=on), JAVA_HOME="/there/is/no/java")
    assert message.startswith(f"on='{on}': no session: [JAVA_GATEWAY_EXITED]")
    assert "penstock doctor" in hint


def test_nobody_at_the_master_is_told_at_once() -> None:
    pytest.importorskip("pyspark")
    message, hint = alone(ASK.format(on="spark://127.0.0.1:1"))
    assert "no session: 127.0.0.1:1: [Errno 111] Connection refused" in message
    assert "does the master answer" in hint
    message, _ = alone(ASK.format(on="spark://somewhere"))
    assert "'somewhere' is no host:port" in message


@pytest.fixture
def grpc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Connect speaks; variables that a session sets are forgotten."""
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    return pytest.importorskip("grpc")


def test_a_connect_server_that_does_not_answer(grpc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spark's own client tries again for ten minutes."""
    monkeypatch.setattr(session, "ANSWER_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        on = f"sc://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"^on='{on}': no session: no answer within 0\.3 s"):
            session_of(on, "run")
    assert time.monotonic() - began < 5


def test_a_server_that_answers(grpc: Any) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        session._wait_for_server(f"sc://127.0.0.1:{port}")
    finally:
        server.stop(None).wait(5)


def test_the_url_of_a_connect_server_that_cannot_be(grpc: Any) -> None:
    with pytest.raises(UserError, match=r"INVALID_CONNECT_URL.*'/path' must be empty") as caught:
        session_of("sc://host:15002/path", "run")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("An error occurred while calling o1.x.\n: java.Bad: no master\n\tat a.b", "java.Bad: no"),
        ("\n  first\nsecond", "first"),
        ("", "ValueError"),
    ],
)
def test_the_line_of_an_error_that_says_it(said: str, line: str) -> None:
    assert session._first_line(ValueError(said)).startswith(line)
