"""Quantities as a person reads them."""

from __future__ import annotations


def in_bytes(num_bytes: float) -> str:
    """As `1.5 GB`; decimal."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        number = float(f"{num_bytes:.0f}" if unit == "B" else f"{num_bytes:.3g}")
        if abs(number) < 1000 or unit == "TB":
            return f"{number:,g} {unit}"
        num_bytes /= 1000
    raise AssertionError


def in_time(seconds: float) -> str:
    """As `1.25 ms`."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        number = f"{seconds * factor:.3g}"
        if float(number) >= 1 or unit == "us":
            return f"{float(number):,g} {unit}"
    raise AssertionError("the last unit takes any")
