"""The backend "penstock" under PyTorch's own programs, beside gloo."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_programs import collectives, faults, training
from torch_programs.ranks import Ranks

ORDER_TOLERANCE = 1e-5
"""Three or more float32 gradients are added in another order by gloo: a few roundings of 2^-24 in
each of some steps, on values about 1."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def stays(ranks: Ranks) -> Callable[[], set[int]]:
    return lambda: ranks.pids


def same(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            same(a, b, tolerance) for a, b in zip(one, other, strict=True)
        )
    return not isinstance(one, list) and math.isclose(one, other, abs_tol=tolerance, rel_tol=0)


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_equal_gloos(ranks: Ranks, world_size: int) -> None:
    ours = ranks.run(collectives.every, world_size=world_size)
    gloos = ranks.run(collectives.every, world_size=world_size, backend="gloo")
    compared = 0
    for rank in range(world_size):
        assert ours[rank].keys() == gloos[rank].keys()
        for dtype, answers in gloos[rank].items():
            assert ours[rank][dtype].keys() == answers.keys()
            for name, gloo in answers.items():
                if not isinstance(gloo, str):  # gloo does not refuse it
                    assert ours[rank][dtype][name] == gloo, f"{name}, {dtype}, rank {rank}"
                    compared += 1
    assert compared > 200 * world_size
    assert ours[0] != ours[1]  # ranks have their own values


def test_collectives_that_gloo_does_not_have(ranks: Ranks) -> None:
    for answers in ranks.run(collectives.only_here, world_size=3):
        for name, values in answers.items():
            half = len(values) // 2
            assert values[:half] == values[half:], name


def test_works(ranks: Ranks) -> None:
    ranks.run(collectives.works, world_size=3)


def test_functional_collectives(ranks: Ranks) -> None:
    ranks.run(collectives.functional_collectives, world_size=3)


def test_sub_groups_at_once(ranks: Ranks) -> None:
    ranks.run(collectives.sub_groups, world_size=4)


@pytest.mark.parametrize(
    ("program", "arguments", "options", "world_size"),
    [
        (training.ddp, (False,), {}, 2),
        (training.ddp, (False,), {"static_graph": True}, 2),
        (training.ddp, (False,), {"gradient_as_bucket_view": True}, 3),
        (training.ddp, (True,), {"find_unused_parameters": True}, 2),
        (training.sharded, (), {}, 2),
        (training.hybrid, (), {}, 4),
        (training.redistributed, (), {}, 2),
        (training.redistributed, (), {}, 3),
        (training.pipelined, ("gpipe",), {}, 2),
        (training.pipelined, ("1f1b",), {}, 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_training_reaches_what_it_reaches_on_gloo(
    ranks: Ranks, program: Any, arguments: Any, options: dict[str, Any], world_size: int
) -> None:
    ours, gloos = (
        ranks.run(_called, program, arguments, options, world_size=world_size, backend=backend)
        for backend in ("penstock", "gloo")
    )
    tolerance = 0.0 if world_size == 2 else ORDER_TOLERANCE  # a sum of two has no order
    for rank in range(world_size):
        assert same(ours[rank], gloos[rank], tolerance)


def _called(program: Any, arguments: Any, options: dict[str, Any]) -> Any:
    return program(*arguments, **options)


def test_plain_torchrun(tmp_path: Path) -> None:
    program = Path(__file__).parent / "torch_programs" / "plain.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(program), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0]["world_size"] == 2


def test_a_rank_killed_in_ddp_is_an_exception_and_the_others_go_on(ranks: Ranks) -> None:
    ours = ranks.run(training.survived, "penstock", True, world_size=3, backend=None)
    assert ranks.exit_code(2) == -signal.SIGKILL
    calm = ranks.run(training.survived, "penstock", False, world_size=3, backend=None)
    assert ours[2] is None
    for rank in (0, 1):
        assert "rank 2" in ours[rank]["error"], ours[rank]
        assert ours[rank]["s"] < 5
        assert "error" not in calm[rank]
        assert ours[rank]["parameters"] == calm[rank]["parameters"]  # bitwise


def test_monitored_barrier_names_all_that_are_missing(ranks: Ranks) -> None:
    told = ranks.run(faults.missing, world_size=4, backend=None)
    text, seconds = told[0]
    assert text.startswith("TransportError")
    assert all(f"rank {missing} " in text for missing in (1, 2, 3))
    assert "rank 0 " not in text
    assert 0.4 < seconds < 5


def test_abort_releases_all_and_they_meet_anew(ranks: Ranks) -> None:
    told = ranks.run(faults.aborted, world_size=3, backend=None)
    assert [sorted(answers) for answers in told] == [
        ["afterwards", "recv"],
        ["afterwards", "sync"],
        ["afterwards", "future", "work"],
    ]
    for answers in told:
        for name, (text, seconds) in answers.items():
            assert "rank 0 has had enough" in text, name
            assert seconds < 5
    assert told[2]["work"][0].startswith("TransportError")


def test_what_cannot_be_is_an_error_that_says_what_to_do(ranks: Ranks) -> None:
    for answers in ranks.run(faults.refused):
        assert {name for name, (text, _) in answers.items() if "hint: " in text} >= {
            "device",
            "sparse",
            "parts",
            "splits",
        }, answers
        assert "no such reduction" in answers["avg"][0]
        assert "meta" in answers["device"][0]


def test_registering_again_is_harmless() -> None:
    from penstock import torch_backend

    before = torch.distributed.Backend._plugins["PENSTOCK"]
    torch_backend.register()
    assert torch.distributed.Backend._plugins["PENSTOCK"] is before
    assert "cpu" not in torch.distributed.Backend.backend_capability.get("nccl", [])
    assert torch.distributed.Backend.default_device_backend_map["cpu"] == "gloo"
