"""The command: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LENET = ROOT / "examples" / "lenet.yaml"
FAST = ["--set", "epochs=1", "--set", "train.mnist.split=test", "--set", "batch_size=100"]


def penstock(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from penstock.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    folder = tmp_path_factory.mktemp("cli")
    return folder, penstock("run", LENET, *FAST, "--run-dir", "here", "--json", folder=folder)


def test_run_prints_data_and_messages_apart(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = trained
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 2000
    for words in ("lenet  2 workers", "67,780 parameters", "epoch 1/1  10/10", "run    here"):
        assert words in done.stderr
    assert (folder / "here" / "result.json").exists()


def test_evaluate_says_what_the_run_said(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = trained
    again = penstock("evaluate", "here", "--json", folder=folder)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads(done.stdout)
    table = penstock("evaluate", "here", folder=folder)
    assert "class  precision  recall" in table.stdout


def test_resume_needs_only_the_directory(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = trained
    again = penstock("run", "--resume", "here", "--workers", "1", "--json", folder=folder)
    assert again.returncode == 0, again.stderr
    assert "resumed after step 10" in again.stderr
    assert json.loads(again.stdout) == json.loads(done.stdout)


def test_a_second_run_does_not_overwrite_a_first(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = trained
    done = penstock("run", LENET, *FAST, "--run-dir", "here", folder=folder)
    assert done.returncode == 2
    assert "here is a run already\n  hint: --resume here" in done.stderr


def test_validate_tries_one_batch(tmp_path: Path) -> None:
    done = penstock("validate", LENET, folder=tmp_path)
    assert done.returncode == 0
    assert "67,780 parameters" in done.stdout
    wrong = penstock("validate", LENET, "--set", "network=torch.nn:Identity", folder=tmp_path)
    assert wrong.returncode == 2
    assert {path.name for path in tmp_path.iterdir()} <= {"temporary"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "neither JOB.yaml nor --resume RUN"),
        (["run", "lenett.yaml"], "lenett.yaml: no such file"),
        (["run", LENET, "--set", "batch_sise=3"], "did you mean 'batch_size'?"),
        (["run", LENET, "--on", "locl"], "did you mean 'local'?"),
        (["run", LENET, "--on", "local", "--workers", "3", "--set", "shards=2"], "2 shards"),
        (["evaluate", "nowhere"], "nowhere is no run directory"),
        (["rum"], "No such command 'rum'"),
    ],
)
def test_what_cannot_be_is_exit_code_2(
    arguments: list[str | Path], words: str, tmp_path: Path
) -> None:
    done = penstock(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert {path.name for path in tmp_path.iterdir()} <= {"temporary"}


def test_doctor(tmp_path: Path) -> None:
    done = penstock("doctor", "--json", folder=tmp_path)
    assert done.returncode == 0
    found = {finding["name"] for finding in json.loads(done.stdout)}
    assert {"torch", "devices", "cores", "threads", "shared memory", "java", "pyspark"} <= found


def test_doctor_measures_links(tmp_path: Path) -> None:
    done = penstock(
        "doctor", "--network", "--workers", "3", "--save", "links.json", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["link", "latency", "a", "message", "each", "way", "adding"]
    assert [line.split()[0] for line in lines[1:3]] == ["memory", "tcp"]
    assert "over TCP, 3 hosts of one worker would take:" in lines
    chosen = {line.split()[0] for line in lines[6:]}
    assert chosen == {
        "all_reduce", "reduce", "broadcast", "reduce_scatter", "all_gather", "barrier"
    }  # fmt: skip
    saved = json.loads((tmp_path / "links.json").read_text())
    assert saved["hosts"] == [[0, 1, 2]]
    assert saved["near"] != saved["far"]


def test_doctor_that_cannot_save(tmp_path: Path) -> None:
    done = penstock("doctor", "--save", "nowhere/links.json", folder=tmp_path)
    assert done.returncode == 2
    assert "error: --save nowhere/links.json: " in done.stderr


def test_examples_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "own_loop.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "[rank 0] accuracy 0.9" in done.stderr
    assert done.stdout.startswith("runs/train-")
