"""Checks of arguments that many public functions take."""

import math
import operator
from numbers import Real
from typing import Any

from torch import nn

from ._tree import Params, difference, named_leaves


def positive_int(value: Any, call: str) -> int:
    """A count as an int; refused if it is none, or below 1.

    Args:
        value: An int, or anything that stands for one, as NumPy's integers do.
        call: How the user called us: ``"predict(num_samples=...)"``.
    """
    return _int_from(1, value, call)


def int_from_zero(value: Any, call: str) -> int:
    """A count that may be 0 as an int; see :func:`positive_int`."""
    return _int_from(0, value, call)


def _int_from(least: int, value: Any, call: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{call}` should be an int, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"`{call}` should be at least {least}, got {value}.")
    return operator.index(value)


def positive_number(value: Any, call: str) -> float:
    """A positive, finite number as a float.

    Args:
        value: An int or a float, or anything that stands for one, as NumPy's numbers do.
        call: How the user called us: ``"ivon.init(hess_init=...)"``.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{call}` should be a number, got {type(value).__name__}.")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"`{call}` should be positive and finite, got {number}.")
    return number


def check_model(fn: Any, call: str) -> None:
    """Refuse what is not a pure function."""
    if isinstance(fn, nn.Module):
        raise TypeError(
            f"`{call}(fn, ...)` should be given a function of (params, x), got an nn.Module, "
            f"{type(fn).__name__}. Wrap it with `fn, params = make_functional(module)`."
        )
    if not callable(fn):
        raise TypeError(
            f"`{call}(fn, ...)` should be given a function of (params, x), got {type(fn).__name__}."
        )


def check_callback(callback: Any, call: str) -> None:
    """Refuse what is neither a function nor ``None``."""
    if callback is not None and not callable(callback):
        raise TypeError(f"`{call}(callback=...)` should be a function, got {type(callback).__name__}.")


def check_num_data(num_data: Any, num_rows: int, call: str) -> int:
    """A number of rows of the whole data as an int; refused if it is less than those of a batch.

    Args:
        num_data: What the user gave.
        num_rows: Rows of the batch.
        call: How the user called us: ``"vi.negative_elbo"``.
    """
    num_data = positive_int(num_data, f"{call}(num_data=...)")
    if num_rows == 0:
        raise ValueError(f"`{call}` should be given batches of at least one row, got one without any.")
    if num_data < num_rows:
        raise ValueError(
            f"`{call}(num_data=...)` should be the number of rows of the whole data, at least the {num_rows} "
            f"of this batch, got {num_data}."
        )
    return num_data


def check_covers(covered: Params, params: Params, call: str) -> None:
    """Refuse a distribution over leaves that differ from those of the model's parameters.

    Args:
        covered: The leaves that it is over.
        params: Parameters of the model; ``None``, or without any of these leaves, if it is to bring them.
        call: How the user called us: ``"vi.negative_elbo(fn, params, state, ...)"``.
    """
    own = named_leaves(covered)
    there = {name: leaf for name, leaf in named_leaves(params).items() if name in own}
    differing = difference(own, there) if there else None
    if differing:
        raise ValueError(f"`{call}` should have a state over leaves of `params`; in it {differing}.")
