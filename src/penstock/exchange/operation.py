"""What ranks must issue alike: the name of a collective and its turn, for comparing and errors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Operation:
    """One collective, as every rank describes it.

    Arguments:
        kind: such as "all_reduce".
        detail: what else must be the same on all ranks: reduction, dtype, shape, root.
    """

    kind: str
    detail: str = ""

    @cached_property
    def text(self) -> str:
        """As it is said in errors: "all_reduce of sum float32 (3, 4)"."""
        return f"{self.kind} of {self.detail}" if self.detail else self.kind

    @cached_property
    def signature(self) -> int:
        """64 bits by which ranks see that they mean the same; never 0."""
        digest = hashlib.blake2b(self.text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") or 1


@dataclass(slots=True)
class Turn:
    """One operation as it was issued.

    Arguments:
        sequence: of the operation in its group, for errors.
        timeout_s: how long to wait for a rank.
    """

    sequence: int
    operation: Operation
    timeout_s: float

    @property
    def what(self) -> str:
        """As it is said in errors: "barrier, number 7"."""
        return f"{self.operation.text}, number {self.sequence}"
