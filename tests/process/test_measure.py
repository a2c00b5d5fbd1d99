"""`penstock doctor --save` makes a file of which plans can be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from penstock.plan.costs.hardware import Cluster


def test_doctor_makes_a_cluster(tmp_path: Path) -> None:
    command = "doctor --save cluster.json --hosts 3 --devices 2 --far-bandwidth 1e9bit"
    done = subprocess.run(
        [sys.executable, "-c", "from penstock.cli import main; main()", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    said = [line.split()[0] for line in done.stdout.splitlines()]
    rates = ["float32", "float64", "bfloat16"]
    assert said == ["cluster", "device", *rates, "memory", "an", "near", "far"]
    cluster = Cluster.load(tmp_path / "cluster.json")
    assert cluster.mesh == (3, 2)
    assert cluster.far.bytes_per_s == 1.25e8
    assert cluster.far.latency_s == cluster.near.latency_s > 0
    assert 1e8 < cluster.device.flops_per_s["float32"] < 1e13
    assert 1e8 < cluster.device.memory_bytes_per_s < 1e13
    assert 1 << 28 < cluster.device.memory_bytes < 1 << 44
