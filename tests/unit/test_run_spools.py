"""A run's folder of spools: made, kept or removed, and swept when it is old."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from penstock.errors import RunError
from penstock.runtime.spools import KEPT_S, RunSpools


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PENSTOCK_SPOOL", raising=False)
    return tmp_path


def test_it_goes_with_the_run(temporary: Path) -> None:
    spools = RunSpools("/runs/one")
    (spools.folder / "spool").mkdir()
    spools.keep = False
    spools.close()
    assert not list(temporary.iterdir())


def test_it_stays_for_a_run_that_goes_on(temporary: Path) -> None:
    spools = RunSpools("/runs/one")
    (spools.folder / "spool").mkdir()
    spools.close()
    again = RunSpools("/runs/one")
    assert again.folder == spools.folder
    assert (again.folder / "spool").is_dir()
    assert RunSpools("/elsewhere/one").folder != spools.folder
    again.close()


def test_an_empty_one_goes_in_any_case(temporary: Path) -> None:
    RunSpools("/runs/one").close()
    assert not list(temporary.iterdir())


def test_a_run_is_run_once_at_a_time() -> None:
    spools = RunSpools("/runs/one")
    with pytest.raises(RunError, match="/runs/one is being run by another process"):
        RunSpools("/runs/one")
    spools.close()
    RunSpools("/runs/one").close()


def test_what_is_old_and_unused_is_swept() -> None:
    old, fresh, used = (RunSpools(f"/runs/{name}") for name in ("old", "fresh", "used"))
    for spools in (old, fresh, used):
        (spools.folder / "spool").mkdir()
    old.close()
    fresh.close()
    for spools in (old, used):
        then = time.time() - KEPT_S - 60
        os.utime(spools.folder, (then, then))
    RunSpools("/runs/next").close()
    assert not old.folder.exists()
    assert fresh.folder.exists()
    assert used.folder.exists()
    used.close()


def test_the_variable_says_where(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SPOOL", str(temporary / "large-disk"))
    spools = RunSpools("/runs/one")
    assert spools.folder.is_relative_to(temporary / "large-disk")
    spools.close()
