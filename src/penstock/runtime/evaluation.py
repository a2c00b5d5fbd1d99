"""How good a network is, exactly, however its test rows are spread over shards.

Each shard adds its batches to an accumulator; the states of all shards, flat arrays of one size,
are gathered by whoever can talk, and merged in the order of the shards. Nothing here communicates.

Classification counts: with n[t, p] rows of class t taken for class p,

    precision(c) = n[c, c] / sum_t n[t, c]        recall(c) = n[c, c] / sum_p n[c, p]
    f1(c) = 2 n[c, c] / (sum_t n[t, c] + sum_p n[c, p])

and 0 where a denominator is 0. Their macro average is over the classes that occur as a target or
a prediction, weighted averages weigh classes by their targets, micro averages pool the counts:
all as scikit-learn does when it is called with `zero_division=0`. Counts are integers, so any
split of the rows gives equal results.

Regression keeps, for each output, the targets' mean and M2 = sum (y - mean)^2 beside the sums of
squared and absolute errors. Two parts A and B merge as (T. F. Chan, G. H. Golub and R. J. LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances", Stanford
STAN-CS-79-773, 1979, formulas 2.1)

    d = mean_B - mean_A      mean = mean_A + d n_B / n      M2 = M2_A + M2_B + d^2 n_A n_B / n

A mean is held as an anchor (the first target seen) plus an offset from it, which keeps the digits
that a large mean would take (the shifted data of the same authors, The American Statistician
37(3), 1983): anchors subtract exactly, and the offsets are as small as the spread.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.errors import DataError, JobError, NetworkError, did_you_mean

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default: targets that count nowhere
_MAX_CONFUSION_CLASSES = 1024  # 8 MiB of counts; past it only each class's own counts are kept
_MAX_SHOWN = 20  # classes or outputs in a printed table


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a test over some rows found. Prints as a table in a terminal and in a notebook.

    Attributes:
        kind: "classification", "regression", or "loss" where only that was asked for.
        examples: the rows counted; for sequences, their positions.
        metrics: single numbers by name. Classification: accuracy, top_5_accuracy (for each k asked
            for), precision, recall, f1 (macro averages), and weighted_ and micro_ before these
            three. Regression: mean_squared_error, root_mean_squared_error, mean_absolute_error and
            r2, averaged evenly over outputs. NaN where there are too few rows to tell.
        columns: one number for each class (precision, recall, f1, support) or output (the
            metrics), float64, (classes,) or (outputs,).
        confusion: rows of class t taken for class p, int64 (classes, classes), t first; None for
            a regression, and for more than 1,024 classes.
        loss: mean loss of the examples, if it was computed.
    """

    kind: str
    examples: int
    metrics: dict[str, float]
    columns: dict[str, NDArray[np.float64]] = field(repr=False)
    confusion: NDArray[np.int64] | None = field(default=None, repr=False)
    loss: float | None = None

    @property
    def accuracy(self) -> float:
        """The fraction of examples taken for their own class. An AttributeError in a regression."""
        if "accuracy" not in self.metrics:
            raise AttributeError(f"a {self.kind} has no accuracy, only {', '.join(self.metrics)}")
        return self.metrics["accuracy"]

    def numbers(self) -> dict[str, float]:
        """The metrics, and the loss if it was computed, by name."""
        return self.metrics | ({} if self.loss is None else {"loss": self.loss})

    def metric(self, name: str) -> float:
        """One of `numbers`.

        Raises:
            JobError: there is none of this name.
        """
        known = self.numbers()
        if name not in known:
            raise JobError(
                f"metric {name!r}: this evaluation has {', '.join(known)}",
                hint=did_you_mean(name, list(known)),
            )
        return known[name]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; NaN and infinities as strings that `float` reads."""
        return {
            "kind": self.kind,
            "examples": self.examples,
            "loss": None if self.loss is None else _to_json(self.loss),
            "metrics": {name: _to_json(value) for name, value in self.metrics.items()},
            "columns": {
                name: [_to_json(v) for v in c.tolist()] for name, c in self.columns.items()
            },
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """What `to_dict` was made from."""
        confusion = values["confusion"]
        return cls(
            kind=values["kind"],
            examples=values["examples"],
            metrics={name: float(value) for name, value in values["metrics"].items()},
            columns={
                name: np.array([float(value) for value in column], np.float64)
                for name, column in values["columns"].items()
            },
            confusion=None if confusion is None else np.array(confusion, np.int64),
            loss=None if values["loss"] is None else float(values["loss"]),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Evaluation) and self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        return "\n\n".join(
            [self._summary(), *("\n".join(_aligned(table)) for table in self._tables())]
        )

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(self._summary())}</p>"]
        for head, *rows in self._tables():
            parts.append("<table><thead><tr>")
            parts += [f"<th>{html.escape(cell)}</th>" for cell in head]
            parts.append("</tr></thead><tbody>")
            for name, *cells in rows:
                parts.append(f"<tr><th>{html.escape(name)}</th>")
                parts += [f'<td style="text-align: right">{html.escape(c)}</td>' for c in cells]
                parts.append("</tr>")
            parts.append("</tbody></table>")
        return "".join(parts)

    def _summary(self) -> str:
        shown = {} if self.loss is None else {"loss": self.loss}
        shown |= {
            n: v for n, v in self.metrics.items() if not n.startswith(("weighted_", "micro_"))
        }
        words = [f"{_title(name)} {_number(value)}" for name, value in shown.items()]
        return "   ".join([*words, f"{self.examples:,} examples"])

    def _tables(self) -> list[list[list[str]]]:
        """Each table as rows of cells; a row's first cell is its name."""
        count = len(next(iter(self.columns.values())))
        shown = min(count, _MAX_SHOWN)
        what = "class" if self.kind == "classification" else "output"
        table = [[what, *map(_title, self.columns)]]
        for i in range(shown):
            cells = [
                f"{int(column[i]):,}" if name == "support" else _number(float(column[i]))
                for name, column in self.columns.items()
            ]
            table.append([str(i), *cells])
        if shown < count:
            table.append([f"... {count:,}", *("" for _ in self.columns)])
        if self.confusion is None or count > _MAX_SHOWN:
            return [table]
        confusion = [["target \\ predicted", *map(str, range(count))]]
        confusion += [[str(t), *(f"{n:,}" for n in row)] for t, row in enumerate(self.confusion)]
        return [table, confusion]


class Classification:
    """Counts of a classifier's answers.

    Arguments:
        num_classes: how many classes there are, at least 2.
        top_k: for which k to count the rows whose class is among the k highest outputs. Equal
            outputs rank by class, as in `argmax`; an output that is NaN ranks above the target's.
    """

    def __init__(self, num_classes: int, top_k: Sequence[int] = (1,)) -> None:
        if num_classes < 2:
            raise NetworkError(
                f"a classification into {num_classes} classes; expected at least 2",
                hint="an output of one logit counts as 2 classes",
            )
        self.num_classes = num_classes
        self.top_k = tuple(sorted({int(k) for k in top_k}))
        if self.top_k and self.top_k[0] < 1:
            raise NetworkError(f"top_k of {self.top_k[0]}; expected 1 or more")
        kept = num_classes if num_classes <= _MAX_CONFUSION_CLASSES else 0
        self._hits = np.zeros(len(self.top_k), np.int64)
        self._correct, self._predicted, self._actual = np.zeros((3, num_classes), np.int64)
        self._confusion = np.zeros((kept, kept), np.int64)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Counts a batch.

        Arguments:
            output: (batch, classes) or (batch, classes, time, ...), as `cross_entropy` takes it;
                or, for two classes, one logit each: (batch,) or (batch, 1).
            target: labels (batch,) or (batch, time, ...), of any dtype; -100 counts nowhere.

        Raises:
            NetworkError: the shapes do not fit.
            DataError: a label is not one of the classes: names its row of the batch.
        """
        output = output.detach()
        if not output.ndim:
            raise self._misfit(output, target)
        expected = (*output.shape[:1], *output.shape[2:])
        fitting = [expected, (*expected, 1)]
        if self.num_classes == 2 and (output.ndim == 1 or output.shape[1] == 1):
            fitting.append(tuple(output.shape))
            logits = output.reshape(-1)
            scores = torch.stack((torch.zeros_like(logits), logits), 1)
        elif output.ndim > 1 and output.shape[1] == self.num_classes:
            scores = output.movedim(1, -1).reshape(-1, self.num_classes)
        else:
            raise self._misfit(output, target)
        if tuple(target.shape) not in fitting:
            raise self._misfit(output, target)
        labels = self._labels(target)
        counted = labels != IGNORE_INDEX
        if not counted.all():
            on_device = torch.from_numpy(counted).to(scores.device)
            labels, scores = labels[counted], scores[on_device]
        predicted = scores.argmax(1).cpu().numpy()
        self._actual += np.bincount(labels, minlength=self.num_classes)
        self._predicted += np.bincount(predicted, minlength=self.num_classes)
        self._correct += np.bincount(labels[labels == predicted], minlength=self.num_classes)
        if self._confusion.size:
            np.add.at(self._confusion.reshape(-1), labels * self.num_classes + predicted, 1)
        if any(k > 1 for k in self.top_k):
            own = torch.from_numpy(labels).to(scores.device).unsqueeze(1)
            score = scores.gather(1, own)
            classes = torch.arange(self.num_classes, device=scores.device)
            ahead = ~(scores <= score) | ((scores == score) & (classes < own))
            rank = ahead.sum(1).cpu().numpy()
        else:
            rank = np.where(labels == predicted, 0, self.num_classes)
        self._hits += [int((rank < k).sum()) for k in self.top_k]

    def state(self) -> NDArray[np.int64]:
        """Everything counted, flat: of one size for the same classes and k."""
        head = [self.num_classes, len(self.top_k), *self.top_k]
        counts = (self._hits, self._correct, self._predicted, self._actual)
        return np.concatenate([np.array(head), *counts, self._confusion.reshape(-1)])

    @classmethod
    def from_state(cls, state: NDArray[np.int64]) -> Classification:
        """The accumulator whose `state()` this was."""
        state = np.asarray(state, np.int64)
        num_classes, num_k = int(state[0]), int(state[1])
        self = cls(num_classes, state[2 : 2 + num_k].tolist())
        borders = np.cumsum([2 + num_k, num_k, num_classes, num_classes, num_classes])
        _, hits, correct, predicted, actual, confusion = np.split(state.copy(), borders)
        self._hits, self._correct, self._predicted, self._actual = hits, correct, predicted, actual
        self._confusion = confusion.reshape(self._confusion.shape)
        return self

    @classmethod
    def merge(cls, states: Sequence[NDArray[np.int64]]) -> Classification:
        """One accumulator of all shards' states (one or more)."""
        merged = cls.from_state(states[0])
        head = slice(0, 2 + len(merged.top_k))
        for number, state in enumerate(states):
            if not np.array_equal(state[head], states[0][head]):
                raise ValueError(f"state {number} is of other classes or top_k than state 0")
        total = np.sum(np.stack([np.asarray(state, np.int64) for state in states]), axis=0)
        total[head] = states[0][head]
        return cls.from_state(total)

    def result(self, loss: float | None = None) -> Evaluation:
        """What was found; `loss`, the mean over all examples, is carried along."""
        examples = int(self._actual.sum())
        precision = _ratio(self._correct, self._predicted)
        recall = _ratio(self._correct, self._actual)
        f1 = _ratio(2 * self._correct, self._predicted + self._actual)
        columns = {"precision": precision, "recall": recall, "f1": f1}
        metrics = {"accuracy": self._correct.sum() / examples if examples else math.nan}
        for k, hits in zip(self.top_k, self._hits):
            if k > 1:
                metrics[f"top_{k}_accuracy"] = hits / examples if examples else math.nan
        occurs = (self._predicted + self._actual) > 0
        weights = _ratio(self._actual, np.full_like(self._actual, examples))
        metrics |= {n: c[occurs].mean() if occurs.any() else 0.0 for n, c in columns.items()}
        metrics |= {f"weighted_{name}": column @ weights for name, column in columns.items()}
        pooled = self._correct.sum() / examples if examples else 0.0
        metrics |= {f"micro_{name}": pooled for name in columns}
        return Evaluation(
            kind="classification",
            examples=examples,
            metrics={name: float(value) for name, value in metrics.items()},
            columns=columns | {"support": self._actual.astype(np.float64)},
            confusion=self._confusion.copy() if self._confusion.size else None,
            loss=loss,
        )

    def _labels(self, target: Tensor) -> NDArray[np.int64]:
        """The labels of a batch, one after the other, checked."""
        given = target.detach().reshape(-1).cpu()
        labels: NDArray[np.int64] = given.to(torch.int64).numpy()
        bad = ((labels < 0) | (labels >= self.num_classes)) & (labels != IGNORE_INDEX)
        if given.is_floating_point():
            bad |= given.double().numpy() != labels
        if bad.any():
            position = np.unravel_index(int(bad.argmax()), target.shape)
            row = ", position ".join(map(str, position))
            raise DataError(
                f"row {row} of a test batch has the label {given[int(bad.argmax())].item()}; "
                f"expected a whole number from 0 to {self.num_classes - 1}",
                hint="check the target column, and the network's number of classes",
            )
        return labels

    def _misfit(self, output: Tensor, target: Tensor) -> NetworkError:
        return NetworkError(
            f"an output of shape {tuple(output.shape)} and a target of shape "
            f"{tuple(target.shape)} for {self.num_classes} classes; expected "
            f"(batch, {self.num_classes}, ...) and (batch, ...)",
            hint="targets are labels, not one-hot; two classes may have one logit: (batch, 1)",
        )


class Regression:
    """Sums of a regression's errors.

    Arguments:
        num_outputs: how many numbers the network gives for a row.
    """

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs
        self._examples = 0
        self._sums = np.zeros((5, num_outputs), np.float64)

    def update(self, output: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Arguments:
            output: (batch, ...) of `num_outputs` numbers a row; (batch,) for a single one.
            target: as many numbers.

        Raises:
            NetworkError: the shapes do not fit.
        """
        shape = (len(output), self.num_outputs)
        if output.numel() != shape[0] * shape[1] or target.numel() != output.numel():
            raise NetworkError(
                f"an output of shape {tuple(output.shape)} and a target of shape "
                f"{tuple(target.shape)} for {self.num_outputs} outputs; expected "
                f"(batch, {self.num_outputs}) for both",
                hint="check the network's last layer and the target columns",
            )
        if not shape[0]:
            return
        found = output.detach().reshape(shape).to("cpu", torch.float64).numpy()
        wanted = target.detach().reshape(shape).to("cpu", torch.float64).numpy()
        error = found - wanted
        anchor = wanted[0]
        offset = (wanted - anchor).mean(0)
        m2 = ((wanted - anchor - offset) ** 2).sum(0)
        batch = np.stack((anchor, offset, m2, (error**2).sum(0), np.abs(error).sum(0)))
        self._add(shape[0], batch)

    def state(self) -> NDArray[np.float64]:
        """Everything summed, flat: of one size for the same number of outputs."""
        return np.concatenate([[self.num_outputs, self._examples], self._sums.reshape(-1)])

    @classmethod
    def from_state(cls, state: NDArray[np.float64]) -> Regression:
        """The accumulator whose `state()` this was."""
        self = cls(int(state[0]))
        self._examples = int(state[1])
        self._sums = np.array(state[2:], np.float64).reshape(5, self.num_outputs)
        return self

    @classmethod
    def merge(cls, states: Sequence[NDArray[np.float64]]) -> Regression:
        """One accumulator of all shards' states (one or more), added in this order."""
        merged = cls.from_state(states[0])
        for number, state in enumerate(states[1:], 1):
            part = cls.from_state(state)
            if part.num_outputs != merged.num_outputs:
                raise ValueError(f"state {number} is of other outputs than state 0")
            merged._add(part._examples, part._sums)
        return merged

    def _add(self, examples: int, sums: NDArray[np.float64]) -> None:
        """Chan's formulas; see the top of this file."""
        if not examples:
            return
        if not self._examples:
            self._examples, self._sums = examples, sums.copy()
            return
        total = self._examples + examples
        anchor, offset, m2, squared, absolute = self._sums
        delta = (sums[0] - anchor) + (sums[1] - offset)
        m2 = m2 + sums[2] + delta**2 * (self._examples * examples / total)
        offset = offset + delta * (examples / total)
        self._sums = np.stack((anchor, offset, m2, squared + sums[3], absolute + sums[4]))
        self._examples = total

    def result(self, loss: float | None = None) -> Evaluation:
        """What was found; `loss`, the mean over all examples, is carried along.

        R2 of one row is NaN; of targets that are all equal, 1 without errors and 0 with any.
        """
        _, _, m2, squared, absolute = self._sums
        count = self._examples or math.nan
        varies = m2 != 0
        r2 = np.where(squared == 0, 1.0, 0.0)
        r2[varies] = 1 - squared[varies] / m2[varies]
        if self._examples < 2:
            r2[:] = math.nan
        columns = {
            "mean_squared_error": squared / count,
            "root_mean_squared_error": np.sqrt(squared / count),
            "mean_absolute_error": absolute / count,
            "r2": r2,
        }
        return Evaluation(
            kind="regression",
            examples=self._examples,
            metrics={name: float(column.mean()) for name, column in columns.items()},
            columns=columns,
            loss=loss,
        )


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """part / whole, and 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole != 0)


def _to_json(value: float) -> float | str:
    return float(value) if math.isfinite(value) else str(value)


def _title(name: str) -> str:
    return {"f1": "F1", "r2": "R2"}.get(name, name.replace("_", " "))


def _number(value: float) -> str:
    """Four decimals, or four digits where those would say little."""
    if value == 0 or 1e-3 <= abs(value) < 1e5 or not math.isfinite(value):
        return f"{value:.4f}"
    return f"{value:.3e}"


def _aligned(table: list[list[str]]) -> list[str]:
    """The rows of a table as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        ).rstrip()
        for row in table
    ]
