"""A worker's heap keeps what a step frees."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = 50
PAGES = 4 * 3 * 256
"""Of one step."""

CODE = f"""
import resource, torch
from penstock.runtime.heap import keep_freed_memory

def step():
    return [torch.empty(3 << 18).fill_(1.0) for _ in range(4)]  # 3 MiB each

keep_freed_memory()
step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**variables: str) -> int:
    """Pages faulted in by so many steps in a Python of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_steps_fault_in_no_page_anew() -> None:
    assert faults() < 10 * PAGES  # some, until the heap is as large as it ever has to be


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_what_the_user_has_set_stands() -> None:
    threshold = str(128 << 10)  # glibc's own to begin with; set, it does not move
    assert faults(MALLOC_MMAP_THRESHOLD_=threshold) > STEPS * PAGES * 0.9
