"""Programs as they are written: what is brought where, when, together, and for how long."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.errors import PlanError, TransportError
from penstock.model.capture import capture
from penstock.model.graph import Graph, Input, Node, Output, Phase, Ref, Spec
from penstock.plan.assignment import Assignment
from penstock.plan.costs.routes import Routes
from penstock.plan.layout import B, Layout, P, Placement, S
from penstock.plan.programs.groups import in_this_process
from penstock.plan.programs.interpret import run_all
from penstock.plan.programs.lower import lower
from penstock.plan.programs.program import Call, Exchange, Finish, Free, Instruction, Local, Program
from penstock.plan.programs.verify import verify
from penstock.plan.rules.formula import Signature
from penstock.testing.assignments import Style, cluster, styled
from penstock.testing.networks import SGD, tiny

SPEC = Spec((8, 6), torch.float64)


@functools.cache
def mlp() -> Graph:
    example = tiny("mlp")
    return capture(example.network, example.loss, example.batch, SGD)


def programs(style: Style, sizes: tuple[int, ...], **options: Any) -> tuple[Program, ...]:
    graph = mlp()
    assignment = styled(graph, sizes, style)
    found = lower(graph, assignment, Routes(cluster(sizes), sizes), **options)
    verify(found, graph, assignment)
    return found


class Drawn:
    """A graph by hand, of tensors of one shape, and how it is split."""

    def __init__(self, sizes: tuple[int, ...], **inputs: Layout) -> None:
        self.sizes, self.layouts = sizes, inputs
        self.nodes: list[Node] = []
        self.signatures: dict[str, tuple[Signature, ...]] = {}
        self.outputs: list[Output] = []
        self.roles: dict[str, Any] = {}

    def add(
        self,
        name: str,
        reads: dict[str, Layout],
        layout: Layout,
        phase: Phase = "forward",
        op: str = "aten.neg.default",
    ) -> Drawn:
        args = tuple(Ref(read) for read in reads)
        self.nodes.append(Node(name, op, args, {}, (name,), phase))
        self.signatures[name] = tuple(
            Signature(tuple(of[axis] for of in reads.values()), (layout[axis],))
            for axis in range(len(self.sizes))
        )
        return self

    def gives(self, name: str, role: Any = "output", target: str = "") -> Drawn:
        self.outputs.append(Output(role, target or name, name))
        return self

    def graph(self) -> Graph:
        names = [*self.layouts, *(node.name for node in self.nodes)]
        return Graph(
            tuple(Input(n, self.roles.get(n, "data"), n) for n in self.layouts),
            tuple(self.nodes),
            tuple(self.outputs),
            dict.fromkeys(names, SPEC),
        )

    def lower(self, **options: Any) -> tuple[Program, ...]:
        graph = self.graph()
        assignment = Assignment(self.sizes, self.layouts, self.signatures)
        routes = Routes(cluster(self.sizes), self.sizes)
        found = lower(graph, assignment, routes, **options)
        verify(found, graph, assignment)
        return found


def kinds(program: Program) -> list[str]:
    """Instructions in a word each."""

    def word(item: Instruction) -> str:
        match item:
            case Call(node):
                return node.name
            case Exchange():
                return f"{item.kind} {' '.join(move.source for move in item.moves)}"
            case Local():
                return f"{item.kind} {item.source}"
            case Finish(number):
                return f"finish {number}"
            case _:
                return ""

    return [word(item) for item in program.instructions if not isinstance(item, Free)]


def one(*placements: Placement) -> Layout:
    return placements


def test_a_value_is_brought_once_for_all_its_readers() -> None:
    drawn = Drawn((2,), x=one(S(0)))
    for name in ("a", "b", "c"):
        drawn.add(name, {"x": one(B)}, one(B))
    drawn.add("d", {"x": one(S(0))}, one(S(0)))
    for name in "abcd":
        drawn.gives(name)
    first, second = drawn.lower()
    assert kinds(first) == ["all_gather x", "finish 0", "a", "b", "c", "d"]
    assert kinds(first) == kinds(second)
    # Control: read in another layout, it goes there, too.
    drawn.add("e", {"x": one(S(1))}, one(S(1))).gives("e")
    assert kinds(drawn.lower()[0])[-3:] == ["all_to_all x", "finish 1", "e"]


def test_a_value_is_finished_right_before_it_is_read() -> None:
    """What is between its node and its reader runs meanwhile."""
    drawn = Drawn((2,), x=one(S(0)), y=one(B))
    drawn.add("a", {"x": one(S(0))}, one(S(0)))
    drawn.add("b", {"y": one(B)}, one(B)).add("c", {"b": one(B)}, one(B))
    drawn.add("d", {"a": one(B)}, one(B))
    drawn.gives("c").gives("d")
    assert kinds(drawn.lower()[0]) == ["a", "all_gather a", "b", "c", "finish 0", "d"]


def test_what_backward_reads_is_brought_when_it_is_read() -> None:
    """It would lie about in the meantime."""
    drawn = Drawn((2,), x=one(S(0)))
    drawn.add("a", {"x": one(S(0))}, one(S(0))).add("b", {"x": one(S(0))}, one(S(0)))
    drawn.add("c", {"a": one(B)}, one(B), "backward").gives("b").gives("c")
    assert kinds(drawn.lower()[0]) == ["a", "b", "all_gather a", "finish 0", "c"]


def test_local_hops() -> None:
    drawn = Drawn((2,), x=one(B), y=one(S(1)))
    drawn.add("a", {"x": one(S(0))}, one(S(0))).add("b", {"x": one(P)}, one(P))
    drawn.add("c", {"y": one(P)}, one(P))
    for name in "abc":
        drawn.gives(name)
    first, second = (
        [i for i in p.instructions if isinstance(i, Local)] for p in drawn.lower(bucket_bytes=0)
    )
    assert [item.kind for item in first] == ["slice", "same", "place"]
    assert [item.kind for item in second] == ["slice", "zeros", "place"]
    assert [item.box for item in first] == [((0, 4), (0, 6)), (), ((0, 8), (0, 3))]
    assert [item.box for item in second] == [((4, 8), (0, 6)), (), ((0, 8), (3, 6))]


def backward(*names: str) -> Drawn:
    """Gradients of a step of data parallelism, each followed by its update."""
    weights = {f"w{name}": one(B) for name in names}
    drawn = Drawn((2,), x=one(P), **weights)
    for name in names:
        drawn.roles[f"w{name}"] = "parameter"
        drawn.add(name, {"x": one(P)}, one(P), "backward")
        drawn.add(f"u{name}", {f"w{name}": one(B)}, one(B), "update")
        drawn.add(f"n{name}", {f"u{name}": one(B), name: one(B)}, one(B), "update",
                  "aten.add.Tensor")  # fmt: skip
        drawn.gives(f"n{name}", "parameter", f"w{name}")
    return drawn


def buckets(found: Sequence[Program]) -> list[list[str]]:
    return [
        [move.source for move in item.moves]
        for item in found[0].instructions
        if isinstance(item, Exchange)
    ]


def test_gradients_travel_in_buckets_in_the_order_of_backward() -> None:
    drawn = backward("a", "b", "c", "d", "e")
    size = SPEC.num_bytes
    assert buckets(drawn.lower(bucket_bytes=2 * size)) == [["a", "b"], ["c", "d"], ["e"]]
    assert buckets(drawn.lower(bucket_bytes=3 * size)) == [["a", "b", "c"], ["d", "e"]]
    assert buckets(drawn.lower()) == [["a", "b", "c", "d", "e"]]
    assert buckets(drawn.lower(bucket_bytes=0)) == [[name] for name in "abcde"]
    assert buckets(drawn.lower(bucket_bytes=size)) == [[name] for name in "abcde"]


def test_a_bucket_begins_with_its_last_member_and_updates_follow_its_finish() -> None:
    found = backward("a", "b", "c", "d").lower(bucket_bytes=2 * SPEC.num_bytes)
    assert kinds(found[0]) == [
        *("a", "b", "all_reduce a b", "c", "d", "all_reduce c d"),
        *("finish 0", "ua", "na", "ub", "nb", "finish 1", "uc", "nc", "ud", "nd"),
    ]
    after = {i.node.name: i.after for i in found[0].instructions if isinstance(i, Call)}
    assert [after[name] for name in ("a", "na", "ua", "nb", "nc")] == [None, 0, 0, 0, 1]


def test_only_so_many_buckets_are_under_way() -> None:
    found = backward("a", "b", "c").lower(bucket_bytes=0, in_flight=1)
    assert kinds(found[0]) == [
        *("a", "all_reduce a", "b", "all_reduce b", "finish 0", "ua", "na"),
        *("c", "all_reduce c", "finish 1", "ub", "nb", "finish 2", "uc", "nc"),
    ]


def test_updates_that_wait_for_nothing_stay_where_they_are() -> None:
    drawn = Drawn((2,), x=one(B), w=one(B))
    drawn.roles["w"] = "parameter"
    drawn.add("g", {"x": one(B)}, one(B), "backward").add("h", {"x": one(B)}, one(B), "backward")
    drawn.nodes.insert(1, Node("n", "aten.add.Tensor", (Ref("w"), Ref("g")), {}, ("n",), "update"))
    drawn.signatures["n"] = (Signature((B, B), (B,)),)
    drawn.gives("h").gives("n", "parameter", "w")
    (first, _) = drawn.lower()
    assert kinds(first) == ["g", "n", "h"]
    assert [i.after for i in first.instructions if isinstance(i, Call)] == [None] * 3
    assert first.renewed == {"w": "n"}


def test_what_depends_on_a_bucket_is_not_in_it() -> None:
    """As the norm of gradients, which is itself summed, and by which they are then scaled."""
    drawn = Drawn((2,), x=one(P), w=one(B))
    drawn.roles["w"] = "parameter"
    drawn.add("g", {"x": one(P)}, one(P), "backward")
    drawn.add("square", {"g": one(B)}, one(B), "update")
    drawn.add("norm", {"square": one(P)}, one(P), "update")
    drawn.add("n", {"g": one(B), "norm": one(B)}, one(B), "update", "aten.add.Tensor")
    drawn.gives("n", "parameter", "w")
    (first, second) = drawn.lower()
    assert kinds(first) == [
        *("g", "all_reduce g", "finish 0", "square", "same square", "norm"),
        *("all_reduce norm", "finish 1", "n"),
    ]
    assert kinds(second)[4] == "zeros square"


def test_buckets_along_two_axes() -> None:
    """The second exchange of a bucket begins when a newer bucket begins, and not at once."""
    drawn = Drawn((2, 2), x=one(P, P), wa=one(B, B), wb=one(B, B))
    for name in "ab":
        drawn.roles[f"w{name}"] = "parameter"
        drawn.add(name, {"x": one(P, P)}, one(P, P), "backward")
        drawn.add(f"n{name}", {f"w{name}": one(B, B), name: one(B, B)}, one(B, B), "update",
                  "aten.add.Tensor")  # fmt: skip
        drawn.gives(f"n{name}", "parameter", f"w{name}")
    found = drawn.lower(bucket_bytes=0)
    words = kinds(found[0])
    begun = [i for i in found[0].instructions if isinstance(i, Exchange)]
    # Scattered along one axis, summed along the other, and gathered.
    assert [item.moves[0].source[0] for item in begun] == ["a", "b", "a", "a", "b", "b"]
    assert [item.axis for item in begun] == [0, 0, 1, 0, 1, 0]
    assert words.index("b") < words.index("finish 0")


def test_all_ranks_begin_the_same_in_one_order() -> None:
    for style, sizes in (("zero", (2, 2)), ("mixed", (2, 2)), ("model", (3,))):
        found = programs(style, sizes, bucket_bytes=1000)  # type: ignore[arg-type]
        assert len({tuple(kinds(program)) for program in found}) <= 2 ** len(sizes)
        begun = {
            tuple((i.number, i.kind, i.axis, i.sequence) for i in p.instructions
                  if isinstance(i, Exchange))
            for p in found
        }  # fmt: skip
        assert len(begun) == 1
        assert len(next(iter(begun))) > 10


def digest() -> str:
    found = programs("zero", (2, 2))
    return hashlib.sha256("".join(line for p in found for line in p.lines()).encode()).hexdigest()


def test_programs_do_not_depend_on_hash_seeds() -> None:
    """Another process, with another seed, writes the same."""
    other = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import {__name__} as test; print(test.digest())"],
        cwd=Path(__file__).parent,
        env=other,
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.strip() == digest()
    assert len(digest()) == 64


def test_frees_are_of_what_nobody_reads_any_more() -> None:
    """All but outputs and what the next step needs; parameters at their last use."""
    program = programs("zero", (2,), bucket_bytes=1000)[1]
    freed = Counter(
        name for item in program.instructions if isinstance(item, Free) for name in item.names
    )
    assert set(freed.values()) == {1}
    given = {item.value for item in program.outputs}
    assert freed.keys() == program.values.keys() - given
    assert {"5.weight", "5.weight/momentum_buffer", "x", "y", "lr.0"} <= freed.keys()
    held, peak = set(program.inputs), 0
    for item in program.instructions:
        if isinstance(item, Call):
            held |= {name for name in item.node.outputs if name}
        elif isinstance(item, Free):
            held -= {*item.names}
        peak = max(peak, len(held))
    assert peak < len(program.values) / 2


def test_inputs_that_stay_are_not_freed() -> None:
    drawn = Drawn((2,), x=one(B), w=one(B), frozen=one(B))
    drawn.roles |= {"w": "parameter", "frozen": "parameter"}
    drawn.add("a", {"x": one(B), "frozen": one(B)}, one(B), op="aten.add.Tensor")
    drawn.add("n", {"w": one(B)}, one(B), "update").gives("a").gives("n", "parameter", "w")
    found = drawn.lower()
    frees = [n for i in found[0].instructions if isinstance(i, Free) for n in i.names]
    assert sorted(frees) == ["w", "x"]


def test_a_layout_that_cannot_be() -> None:
    drawn = Drawn((9,), x=one(B)).add("a", {"x": one(S(0))}, one(S(0))).gives("a")
    with pytest.raises(PlanError, match=r"x float64\[8, 6\]: there is no way from \[B\] to \[S0\]"):
        drawn.lower()


def test_one_rank_of_a_large_mesh() -> None:
    """A rank's program is written without those of the others."""
    sizes = (64, 64)
    spec = Spec((4096, 128), torch.float32)
    graph = Graph((Input("x", "data", "x"),), (), (Output("output", "x", "x"),), {"x": spec})
    assignment = Assignment(sizes, {"x": (S(0), S(0))}, {}, {"x": (S(0), S(1))})
    (last,) = lower(graph, assignment, Routes(cluster(sizes), sizes), ranks=[4095])
    assert (last.rank, last.coordinates) == (4095, (63, 63))
    (item,) = (i for i in last.instructions if isinstance(i, Exchange))
    assert item.ranks == tuple(range(4032, 4096))
    assert last.values["x@[S0, S1]"].spec == Spec((64, 2), torch.float32)


def test_words_and_numbers() -> None:
    program = programs("zero", (2, 2), bucket_bytes=1000)[3]
    lines = list(program.lines())
    assert lines[0] == "     input 1.weight float64[4, 12] of [S0, S0]"
    assert any("all_gather 0 on axis 1 [2, 3]: " in line for line in lines)
    assert any("(after " in line for line in lines)
    assert lines[-1].startswith("     state ")
    summary = program.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["instructions"]["call"] == len(mlp().nodes)
    assert sum(summary["calls"].values()) == len(mlp().nodes)
    total = sum(of["number"] for of in summary["exchanges"].values())
    assert total == summary["instructions"]["exchange"] > 0
    exchanges = [i for i in program.instructions if isinstance(i, Exchange)]
    sent = sum(of["sent_bytes"] for of in summary["exchanges"].values())
    assert sent == sum(map(program.sent_bytes, exchanges)) > 0


def test_the_interpreter_names_what_fails() -> None:
    drawn = Drawn((2,), x=one(S(0)))
    drawn.add("a", {"x": one(S(0))}, one(S(0))).gives("a")
    found = drawn.lower()
    whole = torch.zeros(8, 6, dtype=torch.float64)
    assert torch.equal(run_all(drawn.graph(), found, {"x": whole + 1})[0]["a"], whole - 1)
    with pytest.raises(
        PlanError, match=r"rank 0, instruction 0, .*: a is float32\[4, 6\], and was"
    ):
        run_all(drawn.graph(), found, {"x": whole.float()})


def test_a_rank_that_fails_ends_the_others() -> None:
    """At once: nobody waits for the deadline of what will not come."""
    letters = in_this_process((2,), timeout_s=30.0)
    into = torch.empty(2)
    letter = letters[0].receive(into, 1, 0)
    letters[1].send(torch.ones(2), 0, 0)
    letter.wait()
    assert into.tolist() == [1.0, 1.0]
    letters[1].send(torch.ones(3), 0, 0)
    with pytest.raises(TransportError, match=r"rank 0: receive from rank 1, .*3.* expected"):
        letters[0].receive(into, 1, 0).wait()
    letters[1].abort("a test")
    for tag in (0, 1):
        with pytest.raises(TransportError, match="another rank has failed"):
            letters[0].receive(into, 1, tag).wait()
    with pytest.raises(TransportError, match="a test"):
        letters[0].line(0).all_reduce(into).wait()
