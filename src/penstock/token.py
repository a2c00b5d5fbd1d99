"""Proof that a peer knows the run's token, without sending it.

Each side sends a random challenge; the other answers HMAC-SHA256(token, its role + challenge).
Comparison takes constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets


def new_token() -> str:
    """A token for one run: 64 hexadecimal digits."""
    return secrets.token_hex(32)


def challenge() -> str:
    """A challenge: 32 hexadecimal digits, never used twice."""
    return secrets.token_hex(16)


def proof(token: str, role: str, challenge: str) -> str:
    """What a peer in this role answers to a challenge."""
    return hmac.new(token.encode(), f"{role}:{challenge}".encode(), hashlib.sha256).hexdigest()


def proves(token: str, role: str, challenge: str, answer: object) -> bool:
    """Whether the answer proves knowledge of the token."""
    return isinstance(answer, str) and hmac.compare_digest(
        proof(token, role, challenge), answer.encode("ascii", "replace").decode()
    )
