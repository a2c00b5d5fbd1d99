"""What an operator computes, as far as splitting goes; and the signatures that follow from it.

A `Formula` labels the dims of an operator's tensors, as einsum does, and says of which products of
its inputs each output is the sum. As text, which `read` takes together with a node:

    ik, kj -> ij                      mm
    nc.., oc.. + o -> no..            a convolution and its bias
    *, *! -> *                        div: of any dims, broadcast, not linear in the second

    letter  a dim; what has the same letter has the same dim
    .       a dim that is never split
    *       any number of dims, broadcast as torch does
    ()      no dims
    !       behind an input: what is computed is not linear in it
    , +     between factors, between terms
    (02)    behind an output: it is of these inputs alone, as one product

Words stand for the operator's tensors and numbers in order of its schema; what is not given is left
out, and a number is a constant factor. From the formula follow the placements on one axis:

    a letter that an output has     S there and wherever the letter is, B elsewhere
    a letter that an output lacks   the output is a sum over it: P; a term that lacks the letter too
                                    must not count once per rank: one of its factors is P
    no letter                       P, if in each term one factor is P and the others are B

A letter that outputs alone have is of dims that the operator makes by itself (zeros, rows of a
gradient): each rank makes its part, as `localize` says.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from penstock.model.graph import Node, Ref, Spec, operator_of
from penstock.plan.layout import B, P, Placement, S

Specs = Mapping[str, Spec]
"""Of tensors, by name."""
Units = Mapping[int, tuple[int, ...]]
"""For dims of a size, the units above 1 by which they may be cut."""
Labels = tuple[str | None, ...]
"""Of a tensor's dims; None for one that is never split."""
Term = frozenset[int]
"""The inputs that are its factors."""


@dataclass(frozen=True)
class Signature:
    """A way to run an operator on one axis, so that the parts' results are those of the whole.

    Arguments:
        inputs: one for each of the node's inputs.
        outputs: one for each of its outputs, None where that is not computed.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement | None, ...]

    def __str__(self) -> str:
        given = ", ".join(map(repr, self.inputs))
        return f"{given} -> {', '.join('_' if o is None else repr(o) for o in self.outputs)}"


@dataclass(frozen=True)
class Formula:
    """See above.

    Arguments:
        inputs, outputs: labels of each; None for an output that is not computed.
        terms: of each output, the terms whose sum it is.
        linear: the inputs in which terms are linear.
        unread: inputs of which shape and dtype count alone.
        zeros: whether all outputs are zeros, which are P as well.
    """

    inputs: tuple[Labels, ...]
    outputs: tuple[Labels | None, ...]
    terms: tuple[tuple[Term, ...], ...]
    linear: frozenset[int]
    unread: frozenset[int] = frozenset()
    zeros: bool = False

    def whole(self, *labels: str) -> Formula:
        """The same, where dims of these labels are never split."""

        def held(tensor: Labels) -> Labels:
            return tuple(None if label in labels else label for label in tensor)

        outputs = tuple(None if output is None else held(output) for output in self.outputs)
        return replace(self, inputs=tuple(map(held, self.inputs)), outputs=outputs)

    def signatures(self, node: Node, specs: Specs, parts: int, units: Units) -> Iterator[Signature]:
        """Those that follow for an axis of so many ranks, without the one of B alone."""
        formula, sizes = self._sized(node, specs)
        for label, size in sizes.items():
            for found in formula._along(label):
                for unit in (1, *units.get(size, ())):
                    if size % unit == 0 and size // unit >= parts:
                        yield _cut_by(found, unit)
        yield from formula._along(None)
        if self.zeros:
            outputs = tuple(None if output is None else P for output in self.outputs)
            yield Signature((B,) * len(self.inputs), outputs)
        if self.unread:
            inputs = tuple(P if i in self.unread else B for i in range(len(self.inputs)))
            yield Signature(inputs, tuple(None if o is None else B for o in self.outputs))

    def _sized(self, node: Node, specs: Specs) -> tuple[Formula, dict[str, int]]:
        """The same, with None for dims of one row that are broadcast; and each label's size."""
        named = [
            *zip(node.inputs, self.inputs, strict=True),
            *zip(node.outputs, self.outputs, strict=True),
        ]
        found: dict[str, set[int]] = {}
        for name, labels in named:
            for label, size in zip(labels or (), specs[name].shape if name else ()):
                if label is not None:
                    found.setdefault(label, set()).add(size)
        # Of two sizes, neither of them 1, the operator does something that a label cannot say.
        sizes = {label: max(of) for label, of in found.items() if len(of - {1}) <= 1}

        def kept(name: str | None, labels: Labels | None) -> Labels | None:
            if name is None or labels is None:
                return None
            shape = specs[name].shape
            return tuple(
                label if label in sizes and size == sizes[label] else None
                for label, size in zip(labels, shape, strict=True)
            )

        tensors = [kept(name, labels) for name, labels in named]
        count = len(self.inputs)
        inputs, outputs = tuple(labels or () for labels in tensors[:count]), tuple(tensors[count:])
        return replace(self, inputs=inputs, outputs=outputs), sizes

    def _along(self, label: str | None) -> Iterator[Signature]:
        """With this label split; or, without one, with nothing split and something partial."""
        # Sums of which every term must be partial by a factor of its own, to count but once.
        sums: list[tuple[Term, ...]] = []
        for output, terms in zip(self.outputs, self.terms, strict=True):
            if output is None:
                continue
            if label is None:
                sums.append(terms)
            elif label not in output and any(self._has(term, label) for term in terms):
                sums.append(tuple(term for term in terms if not self._has(term, label)))
        if label is not None:
            sums = [tuple(itertools.chain(*sums))]
        seen = set()
        for terms in sums:
            for chosen in itertools.product(*(sorted(term & self.linear) for term in terms)):
                partial = frozenset(chosen)
                if partial not in seen and (partial or label is not None):
                    seen.add(partial)
                    signature = self._signature(label, partial)
                    if signature is not None:
                        yield signature

    def _signature(self, label: str | None, partial: frozenset[int]) -> Signature | None:
        inputs = []
        for number, labels in enumerate(self.inputs):
            if label is not None and label in labels:
                inputs.append(S(labels.index(label)))
            else:
                inputs.append(P if number in partial else B)
        outputs: list[Placement | None] = []
        for output, terms in zip(self.outputs, self.terms, strict=True):
            # How often each term is cut into parts that are to be added up.
            counts = {len(term & partial) + self._has(term, label) for term in terms}
            if output is None:
                outputs.append(None)
            elif label is not None and label in output:
                if any(term & partial for term in terms):
                    return None
                outputs.append(S(output.index(label)))
            elif counts <= {0}:
                outputs.append(B)
            elif counts == {1}:
                outputs.append(P)
            else:
                return None
        return Signature(tuple(inputs), tuple(outputs))

    def _has(self, term: Term, label: str | None) -> bool:
        return label is not None and any(label in self.inputs[number] for number in term)


def product(
    inputs: Sequence[Labels], outputs: Sequence[Labels | None], nonlinear: Sequence[int] = ()
) -> Formula:
    """Each output is a product of all inputs."""
    every = frozenset(range(len(inputs)))
    return Formula(
        tuple(inputs), tuple(outputs), ((every,),) * len(outputs), every - frozenset(nonlinear)
    )


def total(
    inputs: Sequence[Labels], outputs: Sequence[Labels | None], nonlinear: Sequence[int] = ()
) -> Formula:
    """Each output is a sum of the inputs but for the nonlinear, which are factors of all."""
    factors = frozenset(nonlinear)
    terms = tuple(factors | {number} for number in range(len(inputs)) if number not in factors)
    linear = frozenset(range(len(inputs))) - factors
    return Formula(tuple(inputs), tuple(outputs), (terms,) * len(outputs), linear)


def _cut_by(signature: Signature, unit: int) -> Signature:
    def cut(placement: Placement) -> Placement:
        return S(placement.dim, unit) if placement.is_split else placement

    outputs = tuple(None if output is None else cut(output) for output in signature.outputs)
    return Signature(tuple(map(cut, signature.inputs)), outputs)


def read(text: str, node: Node, specs: Specs) -> Formula | None:
    """The formula of a node; None if its tensors have other numbers of dims than the text."""
    sums, results = _parsed(text)
    given = _given(node)
    inputs: list[Labels | None] = []
    linear: set[int] = set()
    terms: list[Term] = []
    for words in sums:
        factors: set[int] = set()
        present, vanishes = False, False
        for word, is_linear in words:
            value = next(given, None)
            present |= value is not None
            if isinstance(value, Ref):
                if is_linear:
                    linear.add(len(inputs))
                factors.add(len(inputs))
                inputs.append(_labels(word, len(specs[value.name].shape)))
            elif value is not None:
                vanishes |= is_linear and value == 0
        # A term of numbers alone remains, without a factor: the sum with it is not linear.
        if present and not vanishes:
            terms.append(frozenset(factors))
    every = frozenset(range(len(inputs)))
    outputs: list[Labels | None] = []
    of: list[tuple[Term, ...]] = []
    for name, (word, numbers) in zip(node.outputs, results, strict=True):
        outputs.append(None if name is None else _labels(word, len(specs[name].shape)))
        of.append(tuple(terms) if numbers is None else (every & numbers,))
        if name is not None and outputs[-1] is None:
            return None
    if None in inputs or len(inputs) != len(node.inputs):
        return None
    known = cast("tuple[Labels, ...]", tuple(inputs))
    return Formula(known, tuple(outputs), tuple(of), frozenset(linear))


def _labels(word: str, dims: int) -> Labels | None:
    """Of a tensor of so many dims; the last that a star stands for is "*0"."""
    letters: list[str | None] = [None if letter == "." else letter for letter in word]
    if "*" in letters:
        place, more = letters.index("*"), dims - len(letters) + 1
        letters[place : place + 1] = [f"*{number}" for number in reversed(range(more))]
    return tuple(letters) if len(letters) == dims else None


@functools.cache
def _parsed(
    text: str,
) -> tuple[list[list[tuple[str, bool]]], list[tuple[str, frozenset[int] | None]]]:
    """Of each term the words, and whether it is linear in each; the outputs and their factors."""
    left, right = text.split("->")
    sums = [
        [(word.strip("!()"), not word.endswith("!")) for word in term.replace(",", " ").split()]
        for term in left.split("+")
    ]
    results: list[tuple[str, frozenset[int] | None]] = []
    for word in right.replace(",", " ").split():
        found = re.fullmatch(r"([^(]*)\((\d*)\)|([^()]+)", word)
        assert found is not None, text
        factors = frozenset(map(int, found[2])) if found[2] else None
        results.append((found[1] or found[3] or "", factors))
    return sums, results


def argument(node: Node, name: str) -> Any:
    """What a node gives its operator as an argument of this name, or its default."""
    place, default = _places(node.op)[name]
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, default)


def place_of(op: str, name: str) -> int:
    """Of the argument of this name."""
    return _places(op)[name][0]


def _given(node: Node) -> Iterator[Any]:
    """What a node gives its operator for each tensor and number of the schema; None for nothing."""
    return (argument(node, name) for name in _tensors_and_numbers(node.op))


@functools.cache
def _places(op: str) -> dict[str, tuple[int, Any]]:
    """Of each argument, its place and its default."""
    arguments = operator_of(op)._schema.arguments  # type: ignore[attr-defined]
    return {a.name: (place, a.default_value) for place, a in enumerate(arguments)}


@functools.cache
def _tensors_and_numbers(op: str) -> tuple[str, ...]:
    wanted = ("Tensor", "Optional[Tensor]", "number", "Optional[number]")
    arguments = operator_of(op)._schema.arguments  # type: ignore[attr-defined]
    return tuple(a.name for a in arguments if str(a.type) in wanted)
