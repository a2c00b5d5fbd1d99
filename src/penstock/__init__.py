"""Penstock trains one PyTorch model on many machines, with the same bits on however many."""

from penstock import errors, feed
from penstock.job import (
    AllReduce,
    Averaging,
    Checkpoint,
    Clip,
    Evaluate,
    Events,
    Job,
    Stop,
)
from penstock.model import zoo
from penstock.runtime.callbacks import Callback
from penstock.runtime.driver import launch
from penstock.runtime.run import Run
from penstock.runtime.worker import Worker

__all__ = [
    "AllReduce",
    "Averaging",
    "Callback",
    "Checkpoint",
    "Clip",
    "Evaluate",
    "Events",
    "Job",
    "Run",
    "Stop",
    "Worker",
    "errors",
    "feed",
    "launch",
    "zoo",
]
