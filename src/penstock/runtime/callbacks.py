"""`Callback`: what a user's object is told during a run, in every worker alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.runtime.evaluation import Evaluation
    from penstock.runtime.worker import Worker


class Callback:
    """Override what you need. All workers call the same methods in the same order.

    A plain function given as a callback is `stepped`.
    """

    def started(self, worker: Worker) -> None:
        """The network is prepared (or restored); no step has been made."""

    def stepped(self, worker: Worker) -> None:
        """A step has ended."""

    def evaluated(self, worker: Worker, evaluation: Evaluation) -> None:
        """The network has been scored on the test source."""

    def ended(self, worker: Worker) -> None:
        """Training has ended; `worker.stopped` says why if before the last epoch."""
