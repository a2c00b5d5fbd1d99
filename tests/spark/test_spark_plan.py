"""A job whose data is a DataFrame is planned: its first rows tell the shapes of all."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from torch import nn

import penstock
from penstock import Job, feed
from penstock.cli import main
from penstock.errors import DataError
from penstock.exchange.cost import Link
from penstock.plan import Cluster
from penstock.plan.costs.hardware import Device

ROWS, WIDTH = 100, 24
TWO = Cluster(
    1,
    2,
    Device("a device", {"float32": 1e12}, 1e11, 2**30, 1e-6),
    Link(1e-5, 1e9),
    Link(1e-5, 1e9),
)


def arrays(width: int) -> tuple[Any, Any]:
    """Features float32 (ROWS, width), and labels int64 (ROWS,)."""
    x = np.random.default_rng(0).random((ROWS, width), np.float32)
    return x, np.arange(ROWS, dtype=np.int64) % 4


def frame(session: Any, x: Any, y: Any) -> Any:
    rows = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    table = pa.table({"x": rows.cast(pa.list_(pa.float32())), "y": y, "more": [None] * len(y)})
    return session.createDataFrame(table)


def job(train: Any, width: int = WIDTH) -> Job:
    network = functools.partial(nn.Linear, width, 4)
    return Job(
        network=network,
        loss="cross_entropy",
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        train=train,
        batch_size=16,
        epochs=1,
    )


def doubled(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([x, x], 1), y


def test_a_dataframe_is_planned_as_its_rows_in_arrays(
    spark: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    there = frame(spark, *arrays(WIDTH))
    data = feed.dataframe(there, features="x", target="y")
    found = penstock.plan(job(data), TWO)
    same = penstock.plan(job(feed.arrays(*arrays(WIDTH))), TWO)
    assert found.fingerprint == same.fingerprint
    assert found.batch == 32
    wider = penstock.plan(job(feed.arrays(*arrays(WIDTH + 1)), WIDTH + 1), TWO)
    assert found.fingerprint != wider.fingerprint  # so it is the rows' own width that told
    twice = penstock.plan(job(feed.map(data, doubled), 2 * WIDTH), TWO)
    assert twice.layers != found.layers

    # By a table's name, of this process's session; as the command says it, too.
    there.createOrReplaceTempView("digits")
    said = {"dataframe": {"frame": "digits", "features": "x", "target": "y"}}
    values = {
        "network": {"torch.nn:Linear": {"in_features": WIDTH, "out_features": 4}},
        "loss": "cross_entropy",
        "optimizer": {"sgd": {"lr": 0.1}},
        "train": said,
        "batch_size": 16,
        "epochs": 1,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    TWO.save(tmp_path / "cluster.json")
    command = ["plan", str(tmp_path / "job.yaml"), "--on", str(tmp_path / "cluster.json"), "--json"]
    monkeypatch.setattr(sys, "argv", ["penstock", *command])
    with pytest.raises(SystemExit) as left:
        main()
    out = capfd.readouterr()
    assert not left.value.code, out.err
    assert f"float32[4, {WIDTH}]" in out.out

    # What is wrong is told as elsewhere.
    ragged = "select * from values (array(1.0f, 2.0f), 0), (array(1.0f), 1) as t(x, y)"
    for wrong, words in [
        (there.where("y > 9"), ["train: there are no rows in dataframe", "its filter"]),
        ("select x as xx, y from digits", ["no column 'x'; it has: xx, y", "did you mean 'xx'?"]),
        (ragged, ["train: column 'x': row 1 holds 1 values, the first row 2", "pad or cut"]),
        ("digitss", ["dataframe 'digitss': [TABLE_OR_VIEW_NOT_FOUND]"]),
        (
            "select x, cast(raise_error('too late') as int) as y from digits",
            ["train: Spark cannot compute the first rows", "too late", "frame.show()"],
        ),
    ]:
        with pytest.raises(DataError) as caught:
            penstock.plan(job(feed.dataframe(wrong, features="x", target="y"), 2), TWO)
        for word in words:
            assert word in str(caught.value)
    skipping = feed.dataframe(ragged, features="x", target="y", on_bad_record="skip")
    assert penstock.plan(job(skipping, 2), TWO).batch == 32
