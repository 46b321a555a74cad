"""Checks of arguments that several functions take."""

import math
from numbers import Real
from typing import Any


def positive(value: Any, call: str) -> float:
    """A positive number as a float.

    Args:
        value: What the user gave.
        call: How the user called us: ``"ivon.init(hess_init=...)"``.
    """
    if not 0 < _real(value, call) < math.inf:
        raise ValueError(f"`{call}` should be positive and finite, got {value}.")
    return float(value)


def positive_or_none(value: Any, call: str) -> float | None:
    """The same, or ``None``."""
    return None if value is None else positive(value, call)


def fraction(value: Any, call: str) -> float:
    """A number from 0 to below 1 as a float."""
    if not 0 <= _real(value, call) < 1:
        raise ValueError(f"`{call}` should be at least 0 and below 1, got {value}.")
    return float(value)


def _real(value: Any, call: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{call}` should be a number, got {type(value).__name__}.")
    return float(value)
