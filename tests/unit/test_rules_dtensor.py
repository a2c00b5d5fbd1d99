"""Signatures beside those of torch's DTensor, which was written by others, where it has a say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from penstock.model.graph import Node, Ref, Spec, operator_of
from penstock.plan.layout import B, P, Placement, S
from penstock.plan.rules.signatures import Signature, signatures

PARTS = 2
Said = tuple[bool, list[Placement]]
"""Whether DTensor runs the operator on what it is given, and how the outputs lie then."""
Ask = Callable[[Node, dict[str, Spec], Signature], Said]

Shapes = tuple[tuple[int, ...], ...]

CASES: dict[str, tuple[Shapes, tuple[Any, ...], Shapes]] = {
    # operator: shapes of its tensors, its arguments with their names, shapes of its outputs
    "aten.mm.default": (((4, 6), (6, 8)), ("%0", "%1"), ((4, 8),)),
    "aten.bmm.default": (((4, 6, 8), (4, 8, 2)), ("%0", "%1"), ((4, 6, 2),)),
    "aten.add.Tensor": (((4, 6), (6,)), ("%0", "%1"), ((4, 6),)),
    "aten.mul.Tensor": (((4, 6), (4, 6)), ("%0", "%1"), ((4, 6),)),
    "aten.relu.default": (((4, 6),), ("%0",), ((4, 6),)),
    "aten.tanh_backward.default": (((4, 6), (4, 6)), ("%0", "%1"), ((4, 6),)),
    "aten.sum.dim_IntList": (((4, 6, 8),), ("%0", [1], False), ((4, 8),)),
    "aten._softmax.default": (((4, 6, 8),), ("%0", -1, False), ((4, 6, 8),)),
    "aten._log_softmax.default": (((4, 6),), ("%0", 1, False), ((4, 6),)),
    "aten.native_layer_norm.default": (
        ((4, 6, 8), (8,), (8,)), ("%0", [8], "%1", "%2", 1e-5), ((4, 6, 8), (4, 6, 1), (4, 6, 1)),
    ),
    "aten.embedding.default": (((10, 8), (4, 6)), ("%0", "%1"), ((4, 6, 8),)),
    "aten.t.default": (((4, 6),), ("%0",), ((6, 4),)),
    "aten.view.default": (((4, 6, 8),), ("%0", [24, 8]), ((24, 8),)),
}  # fmt: skip


KNOWN_HERE_ALONE = {
    # DTensor knows no operator of backward as linear in the gradient.
    ("aten.tanh_backward.default", Signature((P, B), (P,))),
    # There the indices, which are copied, are said to be partial together with the output.
    ("aten.embedding.default", Signature((S(0), B), (P,))),
    # Nor a lookup as linear in the table.
    ("aten.embedding.default", Signature((P, B), (P,))),
}
"""Proved by numbers in tests/contract/test_rules.py."""


def built(op: str) -> tuple[Node, dict[str, Spec]]:
    shapes, args, results = CASES[op]
    given = tuple(Ref(arg) if isinstance(arg, str) else arg for arg in args)
    indices = {"%1"} if op == "aten.embedding.default" else set()
    specs = {
        f"%{number}": Spec(shape, torch.int64 if f"%{number}" in indices else torch.float32)
        for number, shape in enumerate(shapes)
    }
    names = tuple(f"out{number}" for number in range(len(results)))
    specs |= {name: Spec(shape, torch.float32) for name, shape in zip(names, results)}
    return Node("node", op, given, {}, names, "forward"), specs


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
        from torch.distributed.tensor._op_schema import OpSchema
        from torch.testing._internal.distributed.fake_pg import FakeStore

        propagator = DTensor._op_dispatcher.sharding_propagator
        propagate = propagator.propagate_op_sharding_non_cached
    except (ImportError, AttributeError) as error:
        pytest.skip(f"torch's internals have moved: {error}")
    import torch.distributed as dist

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=PARTS)
    try:
        mesh = init_device_mesh("cpu", (PARTS,))

        def theirs(placement: Placement) -> Any:
            if placement == P:
                return Partial()
            return Shard(placement.dim) if placement.is_split else Replicate()

        def ours(placement: Any) -> Placement:
            if isinstance(placement, Partial):
                return P
            return S(placement.dim) if isinstance(placement, Shard) else B

        def asked(node: Node, specs: dict[str, Spec], signature: Signature) -> Said:
            given = [
                DTensorSpec(mesh, (theirs(placement),), tensor_meta=TensorMeta(
                    torch.Size(specs[name].shape),
                    torch.empty(specs[name].shape, device="meta").stride(), specs[name].dtype))
                for name, placement in zip(node.inputs, signature.inputs, strict=True)
            ]  # fmt: skip
            args, kwargs = node.with_tensors(given)
            said = propagate(OpSchema(operator_of(node.op), args, kwargs))
            found = said.output_spec
            outputs = found if isinstance(found, tuple | list) else (found,)
            runs = not said.needs_redistribute
            if said.redistribute_schema is not None:  # also where only a shape becomes another
                runs = said.redistribute_schema.args_spec == tuple(given)
            return runs, [ours(o.placements[0]) for o in outputs]

        yield asked
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("op", CASES)
def test_what_we_allow_is_allowed_there(op: str, ask: Ask) -> None:
    node, specs = built(op)
    offered = signatures(node, specs, PARTS)
    assert len(offered) > 1
    for signature in offered:
        if (op, signature) in KNOWN_HERE_ALONE:
            continue
        runs, outputs = ask(node, specs, signature)
        assert runs, f"{op}: DTensor would not run {signature} as it is"
        assert tuple(outputs) == signature.outputs, f"{op}: {signature}, and DTensor says {outputs}"


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        ("aten.mm.default", Signature((S(0), S(1)), (P,))),
        ("aten.relu.default", Signature((P,), (P,))),
        ("aten._softmax.default", Signature((S(2),), (S(2),))),
    ],
)
def test_what_is_wrong_is_not(op: str, wrong: Signature, ask: Ask) -> None:
    node, specs = built(op)
    runs, outputs = ask(node, specs, wrong)
    assert not runs or tuple(outputs) != wrong.outputs
    assert wrong not in signatures(node, specs, PARTS)
