"""What tests of training need: numbers compared, and the loop that they are compared with."""

from penstock.testing.numerics import (
    Trained,
    assert_close,
    assert_same_bits,
    parameters_of,
    serial,
)

__all__ = ["Trained", "assert_close", "assert_same_bits", "parameters_of", "serial"]
