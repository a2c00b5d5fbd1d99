"""Every error Penstock raises on purpose.

PenstockError
├── UserError            what was given cannot be: mend it and run again        (exit code 2)
│   ├── JobError             a key of a Job
│   ├── DataError            a file, row, column or partition
│   ├── NetworkError         a network, loss or optimizer
│   └── RunError             a run directory: missing, incomplete, not writable
├── TrainingError        training itself ended the run                          (exit code 1)
│   ├── WorkerFailed         the user's code raised in a worker
│   └── Diverged             loss or gradient not finite
├── PlanError            a plan contradicts itself: Penstock's own fault        (exit code 1)
├── Interrupted          Ctrl-C or SIGTERM; resumable                               (exit code 130)
└── Fault                the machine's doing: the run can go on from its last   (exit code 3)
    │                    checkpoint
    ├── WorkerLost           a worker process died
    └── TransportError       a peer is gone, or did not answer in time

A message says what was received and what was expected, and names the file, line, key, rank or
tensor at fault; the hint says what to do.
"""

from __future__ import annotations

import difflib


class PenstockError(Exception):
    """Base of all.

    Arguments:
        message: what was received, what was expected, and where.
        hint: what to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint)


def _rebuild(kind: type[PenstockError], message: str, hint: str) -> PenstockError:
    return kind(message, hint=hint)


class UserError(PenstockError):
    """What was given cannot be; nothing was started or harmed."""

    exit_code = 2


class JobError(UserError):
    """A key of a Job is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A file, row, column or partition is not what it should be."""


class NetworkError(UserError):
    """A network, loss or optimizer cannot be made or used as the Job says."""


class RunError(UserError):
    """A run directory is missing, incomplete, or cannot be written."""


class TrainingError(PenstockError):
    """Training itself ended the run."""

    exit_code = 1


class WorkerFailed(TrainingError):
    """The user's code raised in a worker; the message carries its traceback and rank."""


class Diverged(TrainingError):
    """Loss or gradient not finite: names step, shard and parameter."""


class PlanError(PenstockError):
    """A plan, or a rank's program of it, contradicts itself: names rank, instruction and tensor."""


class Interrupted(PenstockError, KeyboardInterrupt):
    """A run was asked to stop, by Ctrl-C or SIGTERM."""

    exit_code = 130


class Fault(PenstockError):
    """The machine's doing, not the user's: the run can go on from its last checkpoint."""

    exit_code = 3


class WorkerLost(Fault):
    """A worker process died without a word."""


class TransportError(Fault, RuntimeError):
    """A peer is gone, or did not answer before the deadline. PyTorch's programs expect a
    RuntimeError where a collective fails."""


def did_you_mean(word: str, known: list[str]) -> str:
    """`did you mean 'x'?` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""
