"""`Averaging`: a set of parameters per shard; every k steps all take the mean.

Between exchanges shard s updates its own parameters p_s by its own gradients. Then, with n_s the
examples it has seen since the last exchange,

    p = sum_s n_s p_s / sum_s n_s

along the fixed tree; the floating tensors of the optimizer's state likewise, if asked.
(Parameter averaging of Deeplearning4j on Spark; McDonald, Hall, Mann 2010; with one step between
exchanges and SGD, with or without momentum, it equals all-reduce.)
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from penstock.exchange import agreement
from penstock.exchange.agreement import HEADER_SIZE, Clip, Outcome
from penstock.exchange.flat import Layout, by_dtype
from penstock.exchange.group import Group

VOTE_EVERY = 10
"""Steps between votes on stopping and saving, where exchanges are further apart."""

State = dict[torch.Tensor, dict[str, Any]]


class AveragingAgreement:
    """One worker's part in `Averaging`.

    Arguments:
        parameters: name and parameter, in order of registration; all need gradients.
        optimizer: of these parameters.
        own, shards: the shards of this worker, and their number in all.
        every: steps between exchanges.
        average_state: whether the optimizer's state is averaged as well.
        where: names step and shard in errors, given an own shard's index.
    """

    def __init__(
        self,
        group: Group,
        parameters: Sequence[tuple[str, torch.nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        own: range,
        shards: int,
        *,
        every: int,
        average_state: bool,
        clip: Clip,
        where: Callable[[int], str],
    ) -> None:
        self._names = [name for name, _ in parameters]
        self._parameters = [parameter for _, parameter in parameters]
        self._optimizer, self._own, self._every = optimizer, own, every
        self._clip, self._where = clip, where
        device = self._parameters[0].device

        numbered = [(str(n), p) for n, p in enumerate(self._parameters)]
        self._layouts = [Layout.of(g, dtype) for dtype, g in by_dtype(numbered).items()]
        self._gradients = [
            torch.zeros(layout.length, dtype=layout.dtype, device=device)
            for layout in self._layouts
        ]
        self._gradient_views = agreement.gradient_views(
            self._parameters, self._layouts, self._gradients
        )
        self._twin = _state_after_a_step(optimizer, self._parameters)
        all_state = [
            (f"{n}/{key}", value)
            for n, p in enumerate(self._parameters)
            for key, value in self._twin.get(p, {}).items()
            if value is not None
        ]
        in_state = [
            (name, value)
            for name, value in all_state
            if average_state and isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
        self._all_averaged = len(in_state) == len(all_state)
        self._exchanged = agreement.layouts_of(numbered + in_state)

        # What is exchanged lies flat: parameters from the start, state as soon as there is some.
        self._flats = [
            [torch.zeros(x.length, dtype=x.dtype, device=device) for x in self._exchanged]
            for _ in own
        ]
        self._data = [
            agreement.gradient_views(self._parameters, self._exchanged, flats)
            for flats in self._flats
        ]
        for data in self._data:
            for view, p in zip(data, self._parameters, strict=True):
                view.copy_(p.data)
        self._state_views = [self._views_of_state(flats) for flats in self._flats]
        first = optimizer.state
        self._states: list[State] = [first] + [self._copied(first) for _ in own[1:]]
        self._place(0)
        flats = [(layout.dtype, [(0, layout.length)]) for layout in self._exchanged]
        self._sums = agreement.sums_of(group, own, shards, flats, device)
        (self._vote,) = agreement.sums_of(group, own, shards, [], device)
        self._seen: list[tuple[int, float]] = [(0, 0.0)] * len(own)
        """Examples and sum of losses of each own shard since the last exchange."""
        self._i, self._step_examples, self._step_loss = 0, 0, 0.0
        self.steps_apart = 0
        """Steps since the last exchange."""

    @property
    def agreed(self) -> bool:
        return self.steps_apart == 0 and self._all_averaged

    def borders(self) -> dict[str, list[list[int]]]:
        return {str(layout.dtype): [[0, layout.length]] for layout in self._exchanged}

    def activate(self, i: int) -> None:
        if i != self._i:
            self._place(i)
        self._step_examples, self._step_loss = 0, 0.0
        for gradient in self._gradients:
            gradient.zero_()

    def backward(self, loss: torch.Tensor, examples: int, last: bool) -> None:
        self._point_at_gradients()
        weighted = loss if last and not self._step_examples else loss * examples
        weighted.backward()  # type: ignore[no-untyped-call]
        agreement.hide_gradients(self._parameters)  # until the update
        self._step_loss += loss.item() * examples
        if weighted is not loss:
            self._step_examples += examples
            if last:
                for gradient in self._gradients:
                    gradient.div_(self._step_examples)
        else:
            self._step_examples = examples
        if last:
            self._update()

    def skip(self) -> None:
        if self._step_examples:  # the micro-batches that came before
            for gradient in self._gradients:
                gradient.div_(self._step_examples)
            self._update()

    def commit(self, step: int, *, stop: bool = False, save: bool = False) -> Outcome | None:
        self.steps_apart += 1
        if step % self._every == 0:
            return self._exchange(stop, save)
        if step % VOTE_EVERY == 0:
            for i in range(len(self._own)):
                agreement.write_header(self._vote.row(i), 0, 0.0, stop=stop, save=save)
                self._vote.added(i)
            return Outcome.of(self._vote.total())
        return None

    def conclude(self) -> Outcome | None:
        return self._exchange(False, False) if self.steps_apart else None

    def settle(self, parameter: torch.nn.Parameter | None = None) -> None:
        """They are, always."""

    @contextmanager
    def merged(self) -> Iterator[None]:
        if not self.steps_apart:
            yield
            return
        totals, outcome = self._sum_up(False, False)
        examples = outcome.examples
        means = {
            (layout.dtype, slot.name): view.div(examples) if examples else None
            for layout, total in zip(self._exchanged, totals, strict=True)
            for slot, view in zip(layout.slots, layout.views(total), strict=True)
        }
        replaced = [
            p.data if (mean := means[p.dtype, str(n)]) is None else mean
            for n, p in enumerate(self._parameters)
        ]
        with agreement.data_replaced(self._parameters, replaced):
            yield

    @property
    def exchange_bytes(self) -> int:
        """What each shard gives to an exchange."""
        return sum(layout.length * layout.dtype.itemsize for layout in self._exchanged)

    def parameters_of(self, i: int) -> list[torch.Tensor]:
        """The i-th own shard's parameters."""
        return self._data[i]

    def gradients(self) -> list[torch.Tensor]:
        """The active shard's gradient of each parameter, until its next step begins."""
        return self._gradient_views

    def seen(self, i: int) -> tuple[int, float]:
        """Examples and sum of losses of the i-th own shard since the last exchange."""
        return self._seen[i]

    def state_of(self, i: int) -> State:
        """The i-th own shard's optimizer state."""
        return self._states[i]

    def load(
        self, i: int, data: Sequence[torch.Tensor], state: State, seen: tuple[int, float]
    ) -> None:
        """Sets the i-th own shard's parameters, optimizer state and what it has seen."""
        for view, tensor in zip(self._data[i], data, strict=True):
            view.copy_(tensor)
        self._states[i].clear()
        self._states[i].update(state)
        examples, loss = seen
        self._seen[i] = (int(examples), float(loss))

    def _views_of_state(
        self, flats: Sequence[torch.Tensor]
    ) -> list[tuple[torch.nn.Parameter, str, torch.Tensor]]:
        """Parameter, key and place in the flat tensors of each averaged tensor of the state."""
        return [
            (self._parameters[int(number)], key, view)
            for layout, flat in zip(self._exchanged, flats, strict=True)
            for slot, view in zip(layout.slots, layout.views(flat), strict=True)
            for number, _, key in [slot.name.partition("/")]
            if key
        ]

    def _copied(self, state: State) -> State:
        copied: State = defaultdict(dict)
        for p in self._parameters:
            if p in state:
                copied[p] = copy.deepcopy(state[p])
        return copied

    def _place(self, i: int) -> None:
        self._i = i
        for p, view in zip(self._parameters, self._data[i], strict=True):
            p.data = view
        self._optimizer.state = self._states[i]  # type: ignore[assignment]

    def _point_at_gradients(self) -> None:
        for p, view in zip(self._parameters, self._gradient_views, strict=True):
            p.grad = view

    def _update(self) -> None:
        agreement.check_finite(
            self._step_loss,
            self._gradients,
            zip(self._names, self.gradients(), strict=True),
            lambda: self._where(self._i),
        )
        agreement.clip_gradients(self._gradients, self._clip)
        self._point_at_gradients()
        self._optimizer.step()
        examples, loss = self._seen[self._i]
        self._seen[self._i] = (examples + self._step_examples, loss + self._step_loss)

    def _sum_up(self, stop: bool, save: bool) -> tuple[list[torch.Tensor], Outcome]:
        """The sums over shards of their weighted tensors, by layout; and what all say."""
        for i in range(len(self._own)):
            examples, loss = self._seen[i]
            if examples:
                self._lay_flat(i)
            for flat, s in zip(self._flats[i], self._sums, strict=False):
                if examples:
                    torch.mul(flat, examples, out=s.row(i)[: len(flat)])
                else:
                    s.row(i).zero_()
            header = self._sums[-1].row(i)[-HEADER_SIZE:]
            agreement.write_header(header, examples, loss, stop=stop, save=save)
            for s in self._sums:
                s.added(i)
        totals = [s.total() for s in self._sums]
        outcome = Outcome.of(totals[-1][-HEADER_SIZE:])
        lengths = [layout.length for layout in self._exchanged]
        return [total[:n] for total, n in zip(totals, lengths, strict=False)], outcome

    def _lay_flat(self, i: int) -> None:
        """The i-th own shard's state lies in its flat tensors, where optimizers then update it.

        A tensor that an optimizer made anew, or keeps on another device, is copied.
        """
        for p, key, view in self._state_views[i]:
            value = self._states[i][p][key]
            if value is not view:
                view.copy_(value)
                if value.device == view.device:
                    self._states[i][p][key] = view

    def _exchange(self, stop: bool, save: bool) -> Outcome:
        totals, outcome = self._sum_up(stop, save)
        if outcome.examples:
            for i in range(len(self._own)):
                for flat, total in zip(self._flats[i], totals, strict=True):
                    torch.div(total, outcome.examples, out=flat)
                self._adopt_state(i)
        self._seen = [(0, 0.0)] * len(self._own)
        self.steps_apart = 0
        return outcome

    def _adopt_state(self, i: int) -> None:
        """The i-th own shard's state is what its flat tensors hold."""
        for p, key, view in self._state_views[i]:
            if key not in self._states[i].get(p, {}):  # a shard that has made no step yet
                self._states[i][p] = copy.deepcopy(self._twin[p])
            value = self._states[i][p][key]
            if value is view:
                continue
            if value.device == view.device:
                self._states[i][p][key] = view
            else:
                value.copy_(view)


def _state_after_a_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]
) -> State:
    """What the optimizer's state looks like after a first step with zero gradients.

    The step is made on copies; it tells names, shapes and dtypes before any shard has made one.
    """
    twin = copy.deepcopy(optimizer)
    pairs = [
        (ours, theirs)
        for group, copied in zip(optimizer.param_groups, twin.param_groups, strict=True)
        for ours, theirs in zip(group["params"], copied["params"], strict=True)
    ]
    for _, p in pairs:
        p.grad = torch.zeros_like(p)
    twin.step()
    known = set(parameters)
    return {ours: twin.state[p] for ours, p in pairs if ours in known and p in twin.state}
