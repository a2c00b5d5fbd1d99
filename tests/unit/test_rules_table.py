"""What the rules say, operator by operator; that it is true is shown in tests/contract."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from penstock.model.graph import Graph, Input, Node, Ref, Spec
from penstock.plan.layout import B, P, S, everyone, in_words
from penstock.plan.rules.formula import read
from penstock.plan.rules.signatures import (
    Signature,
    combinations,
    has_rule,
    localized,
    signatures,
    units_of,
)
from penstock.plan.rules.views import groups

Shape = tuple[int, ...]


def node_of(
    op: str, shapes: dict[str, Shape], results: list[Shape | None], *args: Any,
    dtypes: dict[str, torch.dtype] | None = None,
) -> tuple[Node, dict[str, Spec]]:  # fmt: skip
    """A node, of tensors a, b, .. in float32 if not said otherwise, that gives 0, 1, .."""
    names = tuple(None if shape is None else str(k) for k, shape in enumerate(results))
    made = {name: shape for name, shape in zip(names, results) if name and shape is not None}
    specs = {
        name: Spec(shape, (dtypes or {}).get(name, torch.float32))
        for name, shape in (shapes | made).items()
    }
    given = tuple(Ref(a) if isinstance(a, str) and a in shapes else a for a in args)
    return Node("node", f"aten.{op}", given, {}, names, "forward"), specs


def said(node: Node, specs: dict[str, Spec], parts: int = 2, **units: Any) -> set[str]:
    offered = signatures(node, specs, parts, units.get("units"))
    assert len(set(offered)) == len(offered)
    assert set(offered[0].inputs) <= {B}
    assert set(offered[0].outputs) <= {B, None}
    return {str(signature) for signature in offered[1:]}


def test_mm() -> None:
    node, specs = node_of("mm.default", {"a": (4, 6), "b": (6, 8)}, [(4, 8)], "a", "b")
    assert said(node, specs) == {
        "S0, B -> S0", "B, S1 -> S1", "S1, S0 -> P", "P, B -> P", "B, P -> P",
    }  # fmt: skip


def test_a_bias_counts_once_where_channels_are_summed() -> None:
    shapes = {"a": (4, 6, 7, 7), "b": (8, 6, 3, 3), "c": (8,)}
    how = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    node, specs = node_of("convolution.default", shapes, [(4, 8, 7, 7)], "a", "b", "c", *how)
    assert said(node, specs) == {
        "S0, B, B -> S0", "B, S0, S0 -> S1", "S1, S1, P -> P", "P, B, P -> P", "B, P, P -> P",
    }  # fmt: skip


def test_a_gradient_that_is_not_computed_forbids_nothing() -> None:
    shapes = {"a": (4, 8, 7, 7), "b": (4, 6, 7, 7), "c": (8, 6, 3, 3)}
    how = ([8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, True])
    results = [None, (8, 6, 3, 3), (8,)]
    node, specs = node_of("convolution_backward.default", shapes, results, "a", "b", "c", *how)
    assert said(node, specs) == {
        "S0, S0, B -> _, P, P", "S1, B, S0 -> _, S0, S0", "B, S1, S1 -> _, S1, B",
        "P, B, B -> _, P, P", "B, P, B -> _, P, B",
    }  # fmt: skip


def test_what_has_no_dims_is_copied_or_partial() -> None:
    node, specs = node_of("mul.Tensor", {"a": (), "b": ()}, [()], "a", "b")
    assert said(node, specs) == {"P, B -> P", "B, P -> P"}


@pytest.mark.parametrize(("number", "expected"), [(0.0, True), (1.0, False)])
def test_with_a_number_added_a_sum_is_not_linear(number: float, expected: bool) -> None:
    node, specs = node_of("add.Tensor", {"a": (4,)}, [(4,)], "a", number)
    assert said(node, specs) == {"S0 -> S0"} | ({"P -> P"} if expected else set())


def test_broadcast() -> None:
    node, specs = node_of("add.Tensor", {"a": (4, 1, 6), "b": (5, 1)}, [(4, 5, 6)], "a", "b")
    assert said(node, specs) == {
        "S0, B -> S0", "B, S0 -> S1", "S2, B -> S2", "P, P -> P",
    }  # fmt: skip


def test_neither_masks_nor_rounded_numbers_are_partial() -> None:
    bools = {"a": torch.bool, "0": torch.int64}
    node, specs = node_of("sum.dim_IntList", {"a": (4, 6)}, [(6,)], "a", [0], dtypes=bools)
    assert said(node, specs) == {"S0 -> P", "S1 -> S0"}
    node, specs = node_of("_to_copy.default", {"a": (4,)}, [(4,)], "a", dtypes={"0": torch.int64})
    assert said(node, specs) == {"S0 -> S0"}


def test_no_rule() -> None:
    node, specs = node_of("linalg_inv_ex.default", {"a": (4, 4)}, [(4, 4), ()], "a")
    assert not has_rule(node.op)
    assert [str(s) for s in signatures(node, specs, 2)] == ["B -> B, B"]
    assert has_rule("aten.mm.default")
    assert has_rule("aten.view.default")


def test_dims_smaller_than_the_axis_are_whole() -> None:
    node, specs = node_of("relu.default", {"a": (3, 5)}, [(3, 5)], "a")
    assert said(node, specs, 2) == said(node, specs, 3) == {"S0 -> S0", "S1 -> S1"}
    assert said(node, specs, 4) == {"S1 -> S1"}


def test_two_sizes_under_one_letter_are_not_split() -> None:
    """As queries and keys of grouped heads: what belongs together a letter cannot say."""
    node, specs = node_of("bmm.default", {"a": (4, 2, 6), "b": (2, 6, 8)}, [(4, 2, 8)], "a", "b")
    formula = read("bik, bkj -> bij", node, specs)
    assert formula is not None
    found = {str(signature) for signature in formula.signatures(node, specs, 2, {})}
    assert not any("S0" in words.partition(",")[0] for words in found)
    assert "S1, B -> S1" in found


class TestRows:
    def test_embedding(self) -> None:
        shapes, integers = {"a": (10, 8), "b": (4, 6)}, {"b": torch.int64}
        node, specs = node_of("embedding.default", shapes, [(4, 6, 8)], "a", "b", dtypes=integers)
        assert said(node, specs) == {
            "S0, B -> P", "S1, B -> S2", "B, S0 -> S0", "B, S1 -> S1", "P, B -> P",
        }  # fmt: skip
        rows = (Signature((S(0), B), (P,)),)
        assert rows in combinations(node, specs, (3,))
        calls = [localized(node, specs, rows, (3,), (rank,)) for rank in range(3)]
        assert {call.op for call in calls} == {"penstock.embedding_part.default"}
        assert [call.args[2] for call in calls] == [0, 3, 6]
        assert all(call.inputs == node.inputs and call.outputs == node.outputs for call in calls)

    def test_rows_of_padding_have_no_gradient(self) -> None:
        gradient, rows = torch.ones(4, 2), torch.tensor([0, 3, 4, 3])
        part = torch.ops.penstock.embedding_part_backward.default(gradient, rows, 3, 2, 3)
        assert part.tolist() == [[0, 0], [1, 1]]
        part = torch.ops.penstock.embedding_part_backward.default(gradient, rows, 3, 2, -1)
        assert part.tolist() == [[2, 2], [1, 1]]


class TestPartsOfArguments:
    def test_shapes_and_places_are_of_the_part(self) -> None:
        node, specs = node_of("expand.default", {"a": (1, 5)}, [(4, 5)], "a", [4, -1])
        chosen = (Signature((B,), (S(0),)), Signature((S(1),), (S(1),)))
        assert chosen in combinations(node, specs, (2, 2))
        sizes = [localized(node, specs, chosen, (2, 2), c).args[1] for c in everyone((2, 2))]
        assert sizes == [[2, 2], [2, 3], [2, 2], [2, 3]]

    def test_random_numbers_of_a_part_are_those_of_the_whole(self) -> None:
        args = (Ref("seed"), 7, [5, 4], [0, 0], [5, 4])
        node = Node(
            "u", "penstock.uniform.default", args, {"dtype": torch.float64}, ("u",), "forward"
        )
        specs = {"seed": Spec((), torch.int64), "u": Spec((5, 4), torch.float64)}
        chosen = (Signature((B,), (S(0),)),)
        assert chosen in combinations(node, specs, (2,))
        seed = torch.tensor(3)

        def numbers(node: Node) -> torch.Tensor:
            args, kwargs = node.with_tensors([seed])
            return node.results(node.function(*args, **kwargs))["u"]

        parts = [numbers(localized(node, specs, chosen, (2,), (rank,))) for rank in range(2)]
        assert torch.equal(torch.cat(parts), numbers(node))
        assert [len(part) for part in parts] == [2, 3]

    def test_what_speaks_of_no_size_is_called_as_it_is(self) -> None:
        node, specs = node_of("mm.default", {"a": (4, 6), "b": (6, 8)}, [(4, 8)], "a", "b")
        chosen = (Signature((S(0), B), (S(0),)),)
        assert localized(node, specs, chosen, (2,), (1,)) is node


def view(one: Shape, other: Shape) -> tuple[Node, dict[str, Spec]]:
    return node_of("view.default", {"a": one}, [other], "a", list(other))


def of_one(one: Shape, other: Shape) -> Graph:
    node, specs = view(one, other)
    return Graph((Input("a", "data", "a"),), (node,), (), specs)


class TestViews:
    @pytest.mark.parametrize(
        ("one", "other", "expected"),
        [
            ((4, 6, 3, 5), (24, 15), (((0, 1), (0,)), ((2, 3), (1,)))),
            ((4, 1, 6), (1, 4, 6), (((0,), (1,)), ((2,), (2,)))),
            ((4, 6), (6, 4), (((0, 1), (0, 1)),)),
            ((1, 1), (1,), ()),
        ],
    )
    def test_groups(self, one: Shape, other: Shape, expected: tuple[Any, ...]) -> None:
        assert groups(one, other) == expected

    def test_units_come_and_go(self) -> None:
        fold, unfold = view((5, 4, 3), (20, 3)), view((20, 3), (5, 4, 3))
        assert said(*fold) == {"S0 -> S0/4", "S2 -> S1", "P -> P"}
        assert said(*unfold) == {"S0/4 -> S0", "S1 -> S2", "P -> P"}
        assert said(*view((5, 4), (4, 5))) == {"P -> P"}  # 2 rows of 4 are not whole rows of 5

    def test_where_batches_are_even_there_are_no_units(self) -> None:
        assert said(*view((6, 4, 3), (24, 3))) == {"S0 -> S0", "S2 -> S1", "P -> P"}
        assert said(*view((24, 3), (6, 4, 3))) == {"S0 -> S0", "S1 -> S2", "P -> P"}
        assert units_of(of_one((6, 4, 3), (24, 3)), (2,)) == {}
        assert units_of(of_one((6, 4, 3), (24, 3)), (2, 3)) == {}

    def test_units_of_a_graph(self) -> None:
        assert units_of(of_one((5, 4, 3), (20, 3)), (2,)) == {20: (4,)}
        assert units_of(of_one((20, 3), (5, 4, 3)), (2,)) == {20: (4,)}
        assert units_of(of_one((5, 4, 3), (20, 3)), (6,)) == {}  # nobody can split 5 rows in 6

    def test_all_others_take_units_as_they_are(self) -> None:
        node, specs = node_of("mm.default", {"a": (20, 6), "b": (6, 8)}, [(20, 8)], "a", "b")
        plain, more = said(node, specs), said(node, specs, units={20: (4,), 99: (9,)})
        assert more - plain == {"S0/4, B -> S0/4"}
        assert plain < more

    def test_parts_of_uneven_parts(self) -> None:
        """6 rows of 3: 2 x 2 ranks cut 3 rows into 1 and 2, and 9 numbers into 4 and 5."""
        node, specs = view((6, 3), (18,))
        one = Signature((S(0),), (S(0),))
        assert (one,) in combinations(node, specs, (2,))
        assert (one, one) not in combinations(node, specs, (2, 2))
        units = units_of(of_one((6, 3), (18,)), (2, 2))
        assert units == {18: (3,)}
        cut = Signature((S(0),), (S(0, 3),))
        assert (cut, cut) in combinations(node, specs, (2, 2), units)


def test_combinations_are_possible_on_the_mesh() -> None:
    node, specs = node_of("relu.default", {"a": (4, 8)}, [(4, 8)], "a")
    offered = combinations(node, specs, (2, 3))
    found = [in_words(tuple(s.inputs[0] for s in chosen)) for chosen in offered]
    assert found[0] == "[B, B]"
    assert "[S1, S1]" in found
    assert "[S0, S0]" not in found  # 2 rows for 3 ranks
    assert len(found) == math.prod(len(signatures(node, specs, size)) for size in (2, 3)) - 1
