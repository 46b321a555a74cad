"""Numbers that a prior is made of: one for all parameters, or one for each leaf."""

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import Fixed, Params, named_leaves

Numbers = float | Tensor | Params  # one number, or a tree of numbers or of tensors like the parameters


class Range(NamedTuple):
    """Where numbers should be: between two ends and not at them, in words ``named``."""

    low: float
    high: float
    named: str


FINITE = Range(-math.inf, math.inf, "finite")
POSITIVE = Range(0.0, math.inf, "positive and finite")
PROBABILITY = Range(0.0, 1.0, "above 0 and below 1")


def check_numbers(value: Any, allowed: Range, call: str) -> None:
    """Refuse what is neither a number nor a tree of them, and numbers out of range.

    Args:
        value: What the user gave.
        allowed: Where numbers should be.
        call: How the user called us: ``"`priors.Normal(precision=...)`"``.
    """
    if value is None:
        raise TypeError(f"{call} should be a number or a tree of numbers, got None.")
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(_not_one(value, call))
    for name, number in named_leaves(value).items():
        if isinstance(number, Fixed):  # old parameters as a location have such leaves, too
            continue
        where = f" for {name!r}" if name else ""
        kind = str(number.dtype) if isinstance(number, Tensor) else type(number).__name__
        is_real = isinstance(number, numbers.Real) or (isinstance(number, Tensor) and not number.is_complex())
        if not is_real or kind in ("bool", "torch.bool"):
            raise TypeError(f"{call} should be a number or a tree of numbers, got {kind}{where}.")
        _check_range(number, allowed, call, where)


def by_leaf(value: Any, leaves: dict[str, Tensor], dtype: torch.dtype, call: str) -> dict[str, Tensor]:
    """The number of each leaf, or the numbers, in one dtype and on the device of the leaf.

    Only shapes are looked at, so it works inside transforms.
    """
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(_not_one(value, call))
    if isinstance(value, numbers.Real | Tensor):
        one = _as_tensor(value, dtype, None)
        return {name: one.to(leaf.device) for name, leaf in leaves.items()}
    given, found = named_leaves(value), {}
    for name, leaf in leaves.items():
        if name not in given:
            raise ValueError(f"{call} should have a number for each leaf; {name!r} is missing.")
        if isinstance(given[name], Fixed):
            raise ValueError(f"{call} should have a number for each leaf; {name!r} is Fixed, no parameter.")
        number = _as_tensor(given[name], dtype, leaf.device)
        if number.ndim and number.shape != leaf.shape:
            raise ValueError(
                f"{call} should have a number, or a tensor like the leaf, for each leaf; {name!r} has shape "
                f"{tuple(number.shape)}, not {tuple(leaf.shape)}."
            )
        found[name] = number
    return found


def check_rounded(found: dict[str, Tensor], allowed: Range, call: str) -> None:
    """Refuse numbers that are out of range in the dtype that a density is computed in."""
    seen = None
    for name, number in found.items():
        if number is not seen:  # one number for all is looked at once
            _check_range(number, allowed, call, f" for {name!r} in {number.dtype}")
        seen = number


def _as_tensor(number: Any, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device, dtype)
    return torch.tensor(float(number), dtype=dtype, device=device)  # infinite where it does not fit


def _not_one(value: Tensor, call: str) -> str:
    return (
        f"{call} should be one number, or a tree with a number or a tensor for each leaf, got one tensor of "
        f"shape {tuple(value.shape)}."
    )


def _check_range(number: Any, allowed: Range, call: str, where: str) -> None:
    if isinstance(number, Tensor):
        if not is_concrete(number) or not number.numel():
            return  # nothing can be seen, or there is nothing to see
        low, high = (float(end) for end in torch.aminmax(number.detach()))  # both NaN if an entry is
    else:
        low = high = float(number)
    if not (low > allowed.low and high < allowed.high):
        shown = f"{low:.3g}" if low == high or math.isnan(low) else f"numbers from {low:.3g} to {high:.3g}"
        raise ValueError(f"{call} should be {allowed.named}, got {shown}{where}.")
