"""Programs between processes: what they give is what one process gives, through memory and TCP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from penstock.errors import UserError
from penstock.model.capture import capture
from penstock.model.graph import Spec
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, Layout
from penstock.plan.programs.groups import connected, of_mesh
from penstock.plan.programs.interpret import interpret, joined, renewed, scattered
from penstock.plan.programs.lower import lower
from penstock.plan.programs.program import (
    Exchange,
    Finish,
    Free,
    Given,
    Instruction,
    Program,
    Receive,
    Send,
    Value,
)
from penstock.plan.programs.verify import verify
from penstock.testing.assignments import Style, cluster, styled
from penstock.testing.group import in_processes
from penstock.testing.networks import ADAMW, following, tiny

pytestmark = pytest.mark.usefixtures("deadline", "nothing_left")

STEPS = 3
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Task:
    """What a rank's process does: some steps of its program."""

    programs: tuple[Program, ...]
    whole: dict[str, torch.Tensor]
    rendezvous: str
    share_memory: bool

    def __call__(self, group: Any) -> list[dict[str, torch.Tensor]]:
        torch.set_num_threads(1)
        program = self.programs[group.rank]
        store = dist.FileStore(self.rendezvous, group.world_size)  # type: ignore[attr-defined]
        near = self.share_memory
        groups = connected(store, group.rank, program.sizes, timeout_s=30.0, share_memory=near)
        try:
            own, found = scattered(program, self.whole), []
            for _ in range(STEPS):
                found.append(interpret(program, groups, own))
                own = renewed(program, own, found[-1])
            group.barrier()  # nobody leaves while another is in its last step
        finally:
            groups.close()
        return found


@pytest.mark.parametrize(
    ("name", "style", "sizes", "through"),
    [
        ("mlp", "data", (2,), "memory"),
        ("mlp", "zero", (2, 2), "tcp"),
        ("lenet", "model", (2,), "tcp"),
        ("lenet", "mixed", (2, 2), "memory"),
        ("gpt", "zero", (2,), "memory"),
        ("gpt", "data", (4,), "memory"),
    ],
    ids=str,
)
def test_three_steps(
    name: str, style: Style, sizes: tuple[int, ...], through: str, tmp_path: Path
) -> None:
    example = tiny(name)
    graph = capture(example.network, example.loss, example.batch, ADAMW)
    routes = Routes(cluster(sizes), sizes)
    programs = lower(graph, styled(graph, sizes, style), routes, bucket_bytes=2048, in_flight=2)
    assert any(isinstance(i, Exchange) and len(i.moves) > 1 for i in programs[0].instructions)
    inputs = example.inputs(graph)
    task = Task(programs, inputs, str(tmp_path / "rendezvous"), through == "memory")
    results = in_processes(math.prod(sizes), task, through=through)
    for step in range(STEPS):
        expected = graph.run(inputs)
        found = joined(graph, programs, [of_rank[step] for of_rank in results])
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            difference = (found[key].double() - tensor.double()).abs().max()
            assert float(difference) <= TOLERANCE, key
        inputs = following(graph, inputs, expected)


SPEC = Spec((3, 2), torch.float32)


def there_and_back(rank: int) -> Program:
    """Rank 0 sends two tensors to rank 1, which sends the second back."""
    values = {name: Value(tensor, (B,), SPEC) for name, tensor in ("aa", "bb", "cb")}
    first: tuple[Instruction, ...] = (
        Send(0, "a", 1, 0),
        Send(1, "b", 1, 1),
        Receive(2, "c", 1, 0),
        Finish(0),
        Finish(1),
        Free(("a", "b")),
        Finish(2),
    )
    second: tuple[Instruction, ...] = (
        Receive(0, "a", 0, 0),
        Finish(0),
        Receive(1, "b", 0, 1),
        Finish(1),
        Send(2, "b", 0, 0),
        Finish(2),
        Free(("b",)),
    )
    inputs: dict[str, Layout] = {} if rank else {"a": (B,), "b": (B,)}
    given = "a" if rank else "c"
    return Program(
        rank=rank,
        coordinates=(rank,),
        sizes=(2,),
        instructions=second if rank else first,
        values=values,
        inputs=inputs,
        outputs=(Given("output", given, given, given),),
        renewed={},
    )


LETTERS = {"a": torch.arange(6.0).view(3, 2), "b": torch.arange(6.0, 12.0).view(2, 3).t()}


def sending(group: Any, rendezvous: str) -> dict[str, torch.Tensor]:
    store = dist.FileStore(rendezvous, group.world_size)  # type: ignore[attr-defined]
    groups = connected(store, group.rank, (2,), timeout_s=20.0, sends=True)
    try:
        given = interpret(there_and_back(group.rank), groups, LETTERS)
        group.barrier()
    finally:
        groups.close()
    return given


def test_tensors_are_sent_from_rank_to_rank(tmp_path: Path) -> None:
    verify([there_and_back(0), there_and_back(1)])
    first, second = in_processes(2, partial(sending, rendezvous=str(tmp_path / "rendezvous")))
    assert torch.equal(first["c"], LETTERS["b"])
    assert torch.equal(second["a"], LETTERS["a"])


def of_a_mesh(group: Any, rendezvous: str) -> tuple[list[int], str]:
    """The sum over each axis of a DeviceMesh of torch's own."""
    store = dist.FileStore(rendezvous, group.world_size)  # type: ignore[attr-defined]
    dist.init_process_group("penstock", store=store, rank=group.rank, world_size=group.world_size)
    message = ""
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2))
        groups = of_mesh(mesh)
        sums = []
        for axis in range(2):
            tensor = torch.tensor([float(group.rank)])
            groups.line(axis).all_reduce(tensor).wait()
            sums.append(int(tensor))
        try:
            groups.send(tensor, 0, 0)
        except UserError as error:
            message = str(error)
        return sums, message
    finally:
        dist.destroy_process_group()


def test_groups_of_a_mesh_of_torch(tmp_path: Path) -> None:
    task = partial(of_a_mesh, rendezvous=str(tmp_path / "rendezvous"))
    found = in_processes(4, task)
    assert [sums for sums, _ in found] == [[2, 1], [4, 1], [2, 5], [4, 5]]
    assert "no group of all ranks" in found[0][1]
