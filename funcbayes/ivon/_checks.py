"""Checks of arguments that several functions take."""

from numbers import Real
from typing import Any

from .._checks import positive_number


def positive_or_none(value: Any, call: str) -> float | None:
    """A positive number as a float, or ``None``."""
    return None if value is None else positive_number(value, call)


def fraction(value: Any, call: str) -> float:
    """A number from 0 to below 1 as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{call}` should be a number, got {type(value).__name__}.")
    number = float(value)
    if not 0 <= number < 1:
        raise ValueError(f"`{call}` should be at least 0 and below 1, got {number}.")
    return number
