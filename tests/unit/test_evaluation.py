"""Evaluation: equal to scikit-learn, and the same however the rows are split over shards."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as reference
from torch import Tensor

from penstock.errors import DataError, NetworkError
from penstock.runtime.evaluation import Classification, Evaluation, Regression


def random_case(
    seed: int, rows: int, classes: int, used: int | None = None
) -> tuple[Tensor, Tensor]:
    """Outputs (rows, classes) and labels (rows,) out of the first `used` classes."""
    random = torch.Generator().manual_seed(seed)
    output = torch.randn(rows, classes, generator=random)
    target = torch.randint(used or classes, (rows,), generator=random)
    output[torch.arange(rows), target] += 1
    return output, target


def counted(output: Tensor, target: Tensor, classes: int, *top_k: int) -> Evaluation:
    accumulator = Classification(classes, top_k or (1,))
    accumulator.update(output, target)
    return accumulator.result()


def check_against_sklearn(found: Evaluation, predicted: Any, target: Any, classes: int) -> None:
    labels = range(classes)
    assert found.confusion is not None
    assert found.confusion.dtype == np.int64
    np.testing.assert_array_equal(
        found.confusion, reference.confusion_matrix(target, predicted, labels=labels)
    )
    assert found.accuracy == reference.accuracy_score(target, predicted)
    names = ("precision", "recall", "f1", "support")
    by_class = reference.precision_recall_fscore_support(
        target, predicted, labels=labels, zero_division=0
    )
    for name, expected in zip(names, by_class):
        np.testing.assert_allclose(found.columns[name], expected, rtol=1e-12, atol=0)
    for average, prefix in (("macro", ""), ("weighted", "weighted_"), ("micro", "micro_")):
        expected = reference.precision_recall_fscore_support(
            target, predicted, average=average, zero_division=0
        )
        for name, value in zip(names[:3], expected):
            assert found.metrics[prefix + name] == pytest.approx(value, rel=1e-12), prefix + name


@pytest.mark.parametrize("seed", range(12))
def test_classification_equals_sklearn(seed: int) -> None:
    classes = [2, 3, 10, 40][seed % 4]
    rows = [1, 17, 300][seed % 3]
    used = max(1, classes // 2) if seed % 2 else None  # classes that are never a target
    output, target = random_case(seed, rows, classes, used)
    if seed % 3 == 1:
        output[:, classes - 1] = -100  # a class that is never predicted either
    found = counted(output, target, classes)
    assert found.examples == rows
    check_against_sklearn(found, output.argmax(1), target, classes)


def test_a_class_that_never_occurs_does_not_lower_the_macro_average() -> None:
    output = torch.eye(4)[[0, 1, 0]]
    found = counted(output, torch.tensor([0, 1, 1]), 4)
    check_against_sklearn(found, [0, 1, 0], [0, 1, 1], 4)
    assert found.columns["recall"].tolist() == [1, 0.5, 0, 0]
    assert found.metrics["recall"] == 0.75
    wrong = counted(torch.eye(4)[[0, 1, 3]], torch.tensor([0, 1, 1]), 4)  # class 3: predicted only
    assert wrong.metrics["recall"] == 0.5


@pytest.mark.parametrize("k", [2, 3, 5])
def test_top_k_equals_sklearn(k: int) -> None:
    output, target = random_case(3, 200, 8)
    found = counted(output, target, 8, 1, k)
    expected = reference.top_k_accuracy_score(target, output, k=k, labels=range(8))
    assert found.metrics[f"top_{k}_accuracy"] == expected
    assert found.metrics["accuracy"] < expected


def test_equal_outputs_are_no_hit_for_everyone() -> None:
    output, target = torch.zeros(4, 4), torch.arange(4)
    found = counted(output, target, 4, 2, 3)
    assert found.accuracy == 0.25
    assert (found.metrics["top_2_accuracy"], found.metrics["top_3_accuracy"]) == (0.5, 0.75)
    output[:] = math.nan
    assert counted(output, target, 4, 3).metrics["top_3_accuracy"] == 0


def test_shards_give_the_very_same_counts() -> None:
    output, target = random_case(5, 257, 6, used=4)
    whole = counted(output, target, 6, 1, 2)
    for borders in ([257], [0, 257], [1, 1, 200, 257], [50, 51, 120, 256, 257]):
        states = []
        start = 0
        for stop in borders:
            shard = Classification(6, (1, 2))
            for batch in range(start, stop, 40):
                rows = slice(batch, min(batch + 40, stop))
                shard.update(output[rows], target[rows])
            states.append(shard.state())
            start = stop
        assert {(s.shape, s.dtype.name) for s in states} == {(states[0].shape, "int64")}
        assert Classification.merge(states).result() == whole
        np.testing.assert_array_equal(Classification.from_state(states[-1]).state(), states[-1])
    assert Classification.merge(states[:-1]).result() != whole
    with pytest.raises(ValueError, match="state 1"):
        Classification.merge([states[0], Classification(5, (1, 2)).state()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.bfloat16])
@pytest.mark.parametrize("shapes", [((50,), (50,)), ((50, 1), (50,)), ((50, 1), (50, 1))])
def test_one_logit_is_two_classes(dtype: torch.dtype, shapes: Any) -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=random)
    logits[0] = 0
    target = torch.randint(2, (50,), generator=random)
    found = counted(logits.reshape(shapes[0]), target.to(dtype).reshape(shapes[1]), 2)
    check_against_sklearn(found, logits > 0, target, 2)


def test_sequences_count_each_position_but_the_ignored() -> None:
    random = torch.Generator().manual_seed(1)
    output = torch.randn(6, 5, 9, generator=random)
    target = torch.randint(5, (6, 9), generator=random)
    target[0, 3:] = target[4] = -100
    found = counted(output, target, 5, 1, 2)
    kept = target != -100
    assert found.examples == int(kept.sum()) == 39
    check_against_sklearn(found, output.argmax(1)[kept], target[kept], 5)
    rows = output.movedim(1, 2)[kept]
    expected = reference.top_k_accuracy_score(target[kept], rows, k=2, labels=range(5))
    assert found.metrics["top_2_accuracy"] == expected
    ignored = counted(output, torch.full_like(target, -100), 5)
    assert ignored.examples == 0
    assert math.isnan(ignored.accuracy)
    assert ignored.metrics["f1"] == 0


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (torch.tensor([0, 1, 3, 9]), "row 2 of a test batch has the label 3; .* from 0 to 2"),
        (torch.tensor([0, -1, 2, 1]), "row 1 of a test batch has the label -1"),
        (torch.tensor([0, 1, 2, 0.5]), r"row 3 of a test batch has the label 0\.5"),
        (torch.tensor([math.nan, 1, 2, 0]), "row 0 of a test batch has the label nan"),
    ],
)
def test_labels_out_of_range_name_their_row(target: Tensor, words: str) -> None:
    accumulator = Classification(3)
    before = accumulator.state()
    with pytest.raises(DataError, match=words):
        accumulator.update(torch.zeros(4, 3), target)
    np.testing.assert_array_equal(accumulator.state(), before)


def test_a_label_in_a_sequence_names_its_position() -> None:
    target = torch.zeros(2, 4, dtype=torch.int64)
    target[1, 2] = 7
    with pytest.raises(DataError, match="row 1, position 2 of a test batch has the label 7"):
        Classification(3).update(torch.zeros(2, 3, 4), target)


@pytest.mark.parametrize(
    ("output", "target", "classes"),
    [((4, 3), (4, 3), 3), ((4, 3), (5,), 3), ((4, 2), (4,), 3), ((4,), (4,), 3), ((), (), 2),
     ((4, 3, 2), (2, 4), 3)],
)  # fmt: skip
def test_shapes_that_do_not_fit(output: Any, target: Any, classes: int) -> None:
    with pytest.raises(NetworkError, match=f"{classes} classes; expected"):
        Classification(classes).update(torch.zeros(output), torch.zeros(target, dtype=torch.int64))


def test_many_classes_keep_no_matrix() -> None:
    output, target = random_case(2, 50, 2_000)
    found = counted(output, target, 2_000, 5)
    assert found.confusion is None
    assert found.accuracy == reference.accuracy_score(target, output.argmax(1))
    assert found.metrics["f1"] == pytest.approx(
        reference.f1_score(target, output.argmax(1), average="macro", zero_division=0), rel=1e-12
    )
    assert len(str(found).splitlines()) < 30


def regression_reference(output: Any, target: Any) -> dict[str, Any]:
    raw = {"multioutput": "raw_values"}
    return {
        "mean_squared_error": reference.mean_squared_error(target, output, **raw),
        "root_mean_squared_error": reference.root_mean_squared_error(target, output, **raw),
        "mean_absolute_error": reference.mean_absolute_error(target, output, **raw),
        "r2": reference.r2_score(target, output, **raw),
    }


@pytest.mark.parametrize("mean", [0.0, 1e6, 1e9])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_equals_sklearn_however_it_is_split(
    mean: float, parts: int, outputs: int
) -> None:
    random = np.random.default_rng(parts)
    target = mean + random.standard_normal((1_003, outputs))
    output = target + random.standard_normal(target.shape) * 0.3
    borders = np.sort(random.integers(0, len(target), parts - 1)).tolist()
    states = []
    for rows in np.split(np.arange(len(target)), borders):
        shard = Regression(outputs)
        for batch in np.array_split(rows, 3):
            shard.update(torch.from_numpy(output[batch]), torch.from_numpy(target[batch]))
        states.append(shard.state())
    assert {(s.shape, s.dtype.name) for s in states} == {((2 + 5 * outputs,), "float64")}
    states.insert(1, Regression(outputs).state())  # a shard without rows
    found = Regression.merge(states).result()
    assert found.examples == 1_003
    for name, expected in regression_reference(output, target).items():
        np.testing.assert_allclose(found.columns[name], expected, rtol=1e-12, err_msg=name)
        assert found.metrics[name] == pytest.approx(np.mean(expected), rel=1e-12)


def test_the_textbook_formula_would_not_do() -> None:
    """Negative control: sums of squares lose at this mean what the test above asks for."""
    target = 1e6 + np.random.default_rng(0).standard_normal(1_003)
    m2 = (target**2).sum() - target.sum() ** 2 / len(target)
    assert abs(m2 / (np.var(target) * len(target)) - 1) > 1e-6


def test_float32_errors_are_taken_in_float64() -> None:
    target = torch.full((4,), 1e4) + torch.arange(4)
    output = (target + torch.tensor([0.1, -0.2, 0.3, 0.4])).half().float()
    accumulator = Regression(1)
    accumulator.update(output, target.unsqueeze(1))
    expected = reference.mean_squared_error(target.double(), output.double())
    assert accumulator.result().metrics["mean_squared_error"] == pytest.approx(expected, rel=1e-14)


def test_constant_targets_are_as_in_sklearn() -> None:
    target = torch.tensor([[3.0, 3.0, 1.0], [3.0, 3.0, 2.0], [3.0, 3.0, 4.0]]).double()
    output = target + torch.tensor([0.0, 1.0, 0.5])
    shards = [Regression(3), Regression(3)]
    shards[0].update(output[:1], target[:1])
    shards[1].update(output[1:], target[1:])
    found = Regression.merge([shard.state() for shard in shards]).result()
    expected = reference.r2_score(target, output, multioutput="raw_values")
    assert expected[:2].tolist() == [1, 0]
    np.testing.assert_allclose(found.columns["r2"], expected, rtol=1e-12)


def test_one_row_has_errors_but_no_r2() -> None:
    accumulator = Regression(1)
    accumulator.update(torch.tensor([2.0]), torch.tensor([1.0]))
    metrics = accumulator.result().metrics
    assert metrics["mean_squared_error"] == 1
    assert math.isnan(metrics["r2"])
    assert math.isnan(Regression(1).result().metrics["mean_squared_error"])


def test_regression_shapes_that_do_not_fit() -> None:
    with pytest.raises(NetworkError, match="2 outputs; expected"):
        Regression(2).update(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="state 1"):
        Regression.merge([Regression(1).state(), Regression(2).state()])


def test_merging_follows_the_order_given() -> None:
    random = torch.Generator().manual_seed(0)
    states = []
    for rows in (3, 50, 7):
        shard = Regression(1)
        shard.update(torch.randn(rows, generator=random), torch.randn(rows, generator=random))
        states.append(shard.state())
    first, again = Regression.merge(states).state(), Regression.merge(states).state()
    assert first.tobytes() == again.tobytes()
    assert Regression.merge(states[::-1]).state().tobytes() != first.tobytes()


def test_an_evaluation_goes_through_json() -> None:
    accumulator = Classification(3, (1, 2))
    accumulator.update(*random_case(0, 20, 3))
    regression = Regression(2)
    regression.update(torch.ones(1, 2), torch.zeros(1, 2))  # its r2 is NaN
    for found in (accumulator.result(loss=0.25), accumulator.result(), regression.result(math.inf)):
        back = Evaluation.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
        assert back == found
        assert str(back) == str(found)
    assert accumulator.result(loss=0.25) != accumulator.result(loss=0.5)
    assert math.isnan(back.metrics["r2"])
    assert back.loss == math.inf
    with pytest.raises(AttributeError, match="a regression has no accuracy"):
        _ = back.accuracy
    with pytest.raises(FrozenInstanceError):
        back.loss = 0.0  # type: ignore[misc]


def test_it_prints_as_tables() -> None:
    accumulator = Classification(3, (1, 2))
    accumulator.update(torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2]))
    assert str(accumulator.result(loss=0.5)).splitlines() == [
        "loss 0.5000   accuracy 0.7500   top 2 accuracy 0.7500   precision 0.8333   recall 0.8333"
        "   F1 0.7778   4 examples",
        "",
        "class  precision  recall      F1  support",
        "0         1.0000  1.0000  1.0000        1",
        "1         0.5000  1.0000  0.6667        1",
        "2         1.0000  0.5000  0.6667        2",
        "",
        "target \\ predicted  0  1  2",
        "0                   1  0  0",
        "1                   0  1  0",
        "2                   0  1  1",
    ]
    page = accumulator.result()._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 2
    assert '<td style="text-align: right">0.6667</td>' in page
    regression = Regression(1)
    regression.update(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    assert str(regression.result()).splitlines()[2:] == [
        "output  mean squared error  root mean squared error  mean absolute error      R2",
        "0                   2.0000                   1.4142               1.0000  0.1111",
    ]
