"""Step sizes and temperatures: numbers, or functions of the number of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._functorch import is_concrete, physical

# From the number of the step, an int64 scalar, to a number.
Schedule = Callable[[Tensor], float | Tensor]


def positive_number(value: Any, call: str) -> float:
    """A positive, finite number as a float."""
    return _number(value, call, zero=False)


def number_from_zero(value: Any, call: str) -> float:
    """A number that is finite and at least 0, as a float."""
    return _number(value, call, zero=True)


def step_size_of(value: float | Schedule, call: str) -> float | Schedule:
    """A step size or a schedule of such, refused if it is none."""
    return _constant(value, f"{call}(step_size=...)", zero=False)


def temperature_of(value: float | Schedule, call: str) -> float | Schedule:
    """A temperature or a schedule of such, refused if it is none."""
    return _constant(value, f"{call}(temperature=...)", zero=True)


def step_size_at(value: float | Schedule, step: Tensor, call: str) -> float | Tensor:
    """The step size at a step."""
    return _at(value, step, f"{call}(step_size=...)", zero=False)


def temperature_at(value: float | Schedule, step: Tensor, call: str) -> float | Tensor:
    """The temperature at a step."""
    return _at(value, step, f"{call}(temperature=...)", zero=True)


def refuse_negative(value: float | Tensor, message: str) -> None:
    """Refuse a number below 0 (or NaN), where it can be seen."""
    low = value if not isinstance(value, Tensor) else float(value.min()) if _is_visible(value) else 0.0
    if not low >= 0:
        raise ValueError(f"{message}, got {low:.4g}.")


def plus(base: Tensor, factor: float | Tensor, term: Tensor) -> Tensor:
    """``base + factor * term``, with one factor for each chain if it has an axis of them."""
    if not isinstance(factor, Tensor):
        return torch.add(base, term, alpha=factor)
    return torch.addcmul(base, over(factor, base), term)


def over(factor: Tensor, leaf: Tensor) -> Tensor:
    """One number a chain in the dtype of a leaf, with axes that broadcast against it."""
    # Shapes as a transform shows them: without the axis that it maps over.
    ones = (1,) * (leaf.ndim - factor.ndim)
    return factor.to(leaf.device, leaf.dtype).reshape(factor.shape + ones)


def _constant(value: float | Schedule, call: str, *, zero: bool) -> float | Schedule:
    if callable(value):
        return value
    return _number(value, call, zero=zero, kind="a number or a function of the step")


def _number(value: Any, call: str, *, zero: bool, kind: str = "a number") -> float:
    """A finite number above 0, or at least 0 if ``zero``."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"`{call}` should be {kind}, got {type(value).__name__}.")
    if getattr(value, "ndim", 0):
        raise TypeError(
            f"`{call}` should be {kind}, got {type(value).__name__} of shape {tuple(value.shape)}."
        )
    number = float(value)
    if not (number >= 0 if zero else number > 0) or math.isinf(number):
        raise ValueError(f"`{call}` should be {_range(zero)}, got {number}.")
    return number


def _range(zero: bool) -> str:
    return "at least 0 and finite" if zero else "positive and finite"


def _at(value: float | Schedule, step: Tensor, call: str, *, zero: bool) -> float | Tensor:
    if not callable(value):
        return value
    # A function may look at the number of the step, which a transform would not let it.
    steps = physical(step).unique()
    found = [_given(value(one), call, zero=zero) for one in steps]
    if len(found) == 1:
        return found[0]
    table = torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in found])
    return torch.where(step.unsqueeze(-1) == steps, table.to(step.device), 0.0).sum(-1)


def _given(found: Any, call: str, *, zero: bool) -> float | Tensor:
    """What a function gave for a step."""
    if not isinstance(found, Tensor):
        return _number(found, call, zero=zero, kind="a function that gives numbers")
    if found.shape:
        raise ValueError(
            f"`{call}` should be a function that gives a number for each step, got shape "
            f"{tuple(found.shape)}."
        )
    if _is_visible(found):
        _number(found, call, zero=zero)
    return found.double()  # square roots are taken before they are rounded to the dtype of a leaf


def _is_visible(value: Tensor) -> bool:
    """Whether looking is possible, and does not make an accelerator wait."""
    return is_concrete(value) and value.device.type == "cpu"
