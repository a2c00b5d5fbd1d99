"""The doctor: what each finding makes of made-up machines, and that this one can train."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from penstock.cli import doctor
from penstock.cli.doctor import Finding

GIB = 1 << 30


def lay(root: Path, files: dict[str, str]) -> Path:
    """A made-up root folder of these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_this_machine_can_train() -> None:
    findings = doctor.examine()
    assert [f for f in findings if f.status == "problem"] == []
    assert len({f.name for f in findings}) == len(findings) == 15
    assert all(f.fix for f in findings if f.status != "ok")
    assert all(f.value for f in findings)


def test_python() -> None:
    assert doctor.find_python((3, 11, 2)) == Finding("python", "ok", "3.11.2")
    old = doctor.find_python((3, 10, 14))
    assert (old.status, old.value) == ("problem", "3.10.14")


def test_devices() -> None:
    found = doctor.find_devices(["H200", "H200", "L4"], "CUDA 12.8", "NVRM")
    assert (found.status, found.value) == ("ok", "2 x H200, 1 x L4")
    assert doctor.find_devices([], "CPU only", "").status == "ok"
    unused = doctor.find_devices([], "CPU only", "NVRM version: 570")
    assert unused.status == "note"
    assert "CPU only" in unused.value


def test_threads() -> None:
    assert doctor.find_threads(2, 2, None).status == "ok"
    many = doctor.find_threads(64, 2, "64")
    assert (many.status, many.fix) == ("note", "export OMP_NUM_THREADS=2")
    assert many.value == "64 by default; OMP_NUM_THREADS is 64"


def test_cores() -> None:
    assert doctor.find_cores(8, 4, None) == Finding("cores", "ok", "4 of 8 usable")
    assert doctor.find_cores(8, 4, 4.0).status == "ok"
    limited = doctor.find_cores(8, 4, 1.5)
    assert limited.status == "note"
    assert limited.value == "4 of 8 usable, but the cgroup grants the time of 1.5"
    assert "at most 1 workers" in limited.fix


def test_cgroup_v2_takes_the_tightest_limit_on_the_way_up(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/memory.max": "max\n",
            "sys/fs/cgroup/pod/container/memory.max": "2147483648\n",
            "sys/fs/cgroup/other/cpu.max": "1000 100000\n",
        },
    )
    assert doctor.cpu_quota(root) == 1.5
    assert doctor.memory_limit_bytes(root) == 2 * GIB


def test_cgroup_v1_by_its_controllers_folders(tmp_path: Path) -> None:
    root = lay(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",  # the host's path is hidden
        },
    )
    assert doctor.cpu_quota(root) == 2
    assert doctor.memory_limit_bytes(root) == GIB


def test_no_cgroup_limit_is_none(tmp_path: Path) -> None:
    assert doctor.cpu_quota(tmp_path) is None
    root = lay(
        tmp_path,
        {
            "proc/self/cgroup": "2:memory:/\n0::/\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert doctor.cpu_quota(root) is None
    assert doctor.memory_limit_bytes(root) is None


def test_memory() -> None:
    meminfo = "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n"
    found = doctor.find_memory(meminfo, None)
    assert found == Finding("memory", "ok", "8.0 GiB available of 16.0 GiB")
    limited = doctor.find_memory(meminfo, GIB)
    assert limited.status == "note"
    assert limited.value.endswith("the cgroup grants 1.0 GiB")
    assert doctor.find_memory(meminfo, 64 * GIB) == found
    assert doctor.find_memory("", None).status == "ok"


def test_shared_memory() -> None:
    assert doctor.find_shared_memory((8 * GIB, 4 * GIB)) == Finding(
        "shared memory", "ok", "4.0 GiB free of 8.0 GiB in /dev/shm"
    )
    docker = doctor.find_shared_memory((64 << 20, 64 << 20))
    assert docker.status == "note"
    assert "--shm-size=8g" in docker.fix
    assert doctor.find_shared_memory(None).status == "problem"


@pytest.mark.parametrize(
    ("free", "status"), [(50 * GIB, "ok"), (GIB, "note"), (1 << 20, "problem"), (None, "problem")]
)
def test_disk(free: int | None, status: str) -> None:
    space = None if free is None else (100 * GIB, free)
    found = doctor.find_disk("temporary folder", Path("/t"), space, "set TMPDIR")
    assert found.status == status
    assert "/t" in found.value
    assert ("set TMPDIR" in found.fix) == (status != "ok")


def test_open_files() -> None:
    assert doctor.find_open_files(1024, -1).value == "1,024, at most unlimited"
    assert doctor.find_open_files(1024, 4096).status == "ok"
    assert doctor.find_open_files(-1, -1).status == "ok"
    few = doctor.find_open_files(256, 4096)
    assert (few.status, few.fix) == ("note", "ulimit -n 4096")
    assert doctor.find_open_files(256, -1).fix == "ulimit -n 8192"


def test_loopback() -> None:
    assert doctor.find_loopback("").status == "ok"
    found = doctor.find_loopback("[Errno 1] Operation not permitted")
    assert found.status == "problem"
    assert "Operation not permitted" in found.value


def test_parent_death() -> None:
    assert doctor.find_parent_death("Linux", lambda: True).status == "ok"
    assert doctor.find_parent_death("Linux", lambda: False).status == "note"
    assert doctor.find_parent_death("Darwin", lambda: True).status == "note"


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({"etc/systemd/logind.conf": "[Login]\n#KillUserProcesses=no\n"}, False),
        ({"etc/systemd/logind.conf": "[Login]\n#KillUserProcesses=yes\n"}, True),
        ({}, True),
        ({"etc/systemd/logind.conf": "[Login]\nKillUserProcesses = yes\n"}, True),
        ({"usr/lib/systemd/logind.conf": "[Login]\n#KillUserProcesses=no\n"}, False),
        (
            {
                "etc/systemd/logind.conf": "[Login]\nKillUserProcesses=yes\n",
                "etc/systemd/logind.conf.d/10-mine.conf": "[Login]\nKillUserProcesses=no\n",
            },
            False,
        ),
        (
            {  # the later name counts, wherever it lies; of one name, /etc's
                "etc/systemd/logind.conf.d/10-a.conf": "[Login]\nKillUserProcesses=no\n",
                "run/systemd/logind.conf.d/20-b.conf": "[Login]\nKillUserProcesses=yes\n",
                "usr/lib/systemd/logind.conf.d/20-b.conf": "[Login]\nKillUserProcesses=no\n",
            },
            True,
        ),
        (
            {
                "etc/systemd/logind.conf": "#KillUserProcesses=no\n",
                "etc/systemd/logind.conf.d/a.conf": "#KillUserProcesses=yes\nKillOnlyUsers=bob\n",
            },
            False,
        ),
        ({"etc/systemd/logind.conf": "KillUserProcesses=yes\nKillOnlyUsers=bob\n"}, False),
        ({"etc/systemd/logind.conf": "KillUserProcesses=1\nKillOnlyUsers=bob ada\n"}, True),
        ({"etc/systemd/logind.conf": "KillUserProcesses=on\nKillExcludeUsers=ada root\n"}, False),
    ],
)
def test_logout(tmp_path: Path, files: dict[str, str], ends: bool) -> None:
    assert doctor.find_logout(lay(tmp_path, files), "ada").status == "ok"  # systemd does not run
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    found = doctor.find_logout(tmp_path, "ada")
    assert found.status == ("note" if ends else "ok")
    assert ("loginctl enable-linger ada" in found.fix) == ends


def test_root_is_spared_by_default(tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert doctor.find_logout(tmp_path, "root").status == "ok"
    lay(tmp_path, {"etc/systemd/logind.conf": "KillExcludeUsers=\n"})
    assert doctor.find_logout(tmp_path, "root").status == "note"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime', 17),
        ('openjdk version "21" 2023-09-19', 21),
        ('java version "1.8.0_392"', 8),
        ('Picked up JAVA_TOOL_OPTIONS: -Xmx1g\nopenjdk version "11.0.2"', 11),
        ("command not found", None),
    ],
)
def test_java_versions(text: str, version: int | None) -> None:
    assert doctor.parse_java_version(text) == version
    found = doctor.find_java(text, "", "/usr/bin/java")
    assert found.status == ("ok" if version in (17, 21) else "note")
    assert "/usr/bin/java" in found.value


@pytest.mark.parametrize(
    ("release", "package"),
    [
        ('ID=debian\nVERSION_ID="12"\n', "openjdk-17-jre-headless"),
        ('VERSION_ID="13"\nID=debian\n', "openjdk-21-jre-headless"),
        ('ID=ubuntu\nVERSION_ID="24.04"\n', "openjdk-17-jre-headless"),
        ("", "openjdk-17-jre-headless"),
    ],
)
def test_java_is_installed_by_the_package_there_is(release: str, package: str) -> None:
    found = doctor.find_java(None, release, "")
    assert found.status == "note"
    assert found.fix == f"for Spark: apt install {package}"


def test_pyspark() -> None:
    assert doctor.find_pyspark("4.3.0") == Finding("pyspark", "ok", "4.3.0")
    for version in (None, "3.5.1"):
        found = doctor.find_pyspark(version)
        assert (found.status, found.fix) == ("note", "pip install 'pyspark>=4'")


FINDINGS = [
    Finding("python", "ok", "3.11.2"),
    Finding("pyspark", "note", "none [x]", "pip install 'pyspark>=4'" + " and so on" * 20),
]


def test_shown_plainly_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO(), width=40)
    doctor.show(FINDINGS, console)
    assert console.file.getvalue().splitlines() == [
        "ok       python   3.11.2",
        "note     pyspark  none [x]",
        f"                  fix: {FINDINGS[1].fix}",
    ]


def test_shown_as_a_table_in_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="standard")
    doctor.show(FINDINGS, console)
    text = console.file.getvalue()
    assert "\x1b[32mok" in text
    assert "\x1b[33mnote" in text
    assert "none [x]" in text
    assert "pyspark>=4" in text.replace("\x1b[0m", "")


def test_looks_fail_softly(tmp_path: Path) -> None:
    assert doctor._space(tmp_path / "missing") is None
    assert doctor._space(tmp_path) is not None
    assert doctor._installed("no_such_library_anywhere") is None
    assert doctor._installed("torch") is not None
    assert doctor.parse_java_version(doctor._java_version_text(str(tmp_path / "java"))) is None
    assert doctor._java_version_text(sys.executable)  # a program that is not java still answers
    assert doctor._java_command("/opt/jdk") == "/opt/jdk/bin/java"
