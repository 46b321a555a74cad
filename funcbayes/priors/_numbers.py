"""Numbers of a prior: one for all parameters, or one for each leaf."""

import math
from typing import Any

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import Params, named_leaves

Numbers = float | Tensor | Params  # one number, or a tree of numbers or of tensors like the parameters


def check_numbers(value: Any, call: str, *, is_positive: bool) -> None:
    """Refuse numbers that are none, not finite, or not positive where they should be."""
    if isinstance(value, bool | str) or value is None:
        raise TypeError(f"`{call}` should be a number or a tree of numbers, got {type(value).__name__}.")
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(
            f"`{call}` should be one number, or a tree with a number or a tensor for each leaf, got one "
            f"tensor of shape {tuple(value.shape)}."
        )
    for name, number in _named(value).items():
        where = f" for {name!r}" if name else ""
        if isinstance(number, bool) or not isinstance(number, float | int | Tensor):
            raise TypeError(f"`{call}` should be a number, got {type(number).__name__}{where}.")
        low, high = _range(number)
        if not (-math.inf < low and high < math.inf) or (is_positive and low <= 0):
            kind = "positive and finite" if is_positive else "finite"
            shown = f"{low:.3g}" if low == high else f"numbers from {low:.3g} to {high:.3g}"
            raise ValueError(f"`{call}` should be {kind}, got {shown}{where}.")


def by_leaf(
    value: Any, leaves: dict[str, Tensor], dtype: torch.dtype, call: str, field: str
) -> dict[str, Tensor]:
    """The number, or the tensor, of each leaf."""
    if isinstance(value, float | int | Tensor):
        number = torch.as_tensor(value)
        return {name: number.to(leaf.device, dtype) for name, leaf in leaves.items()}
    given, found = named_leaves(value), {}
    for name, leaf in leaves.items():
        if name not in given:
            raise ValueError(f"`{call}` should have a `{field}` for each leaf; {name!r} is missing.")
        number = torch.as_tensor(given[name])
        if number.ndim and number.shape != leaf.shape:
            raise ValueError(
                f"`{call}` should have a `{field}` that is a number, or a tensor like the leaf; that of "
                f"{name!r} has shape {tuple(number.shape)}, not {tuple(leaf.shape)}."
            )
        found[name] = number.to(leaf.device, dtype)
    return found


def _named(value: Any) -> dict[str, Any]:
    return {"": value} if isinstance(value, float | int | Tensor) else named_leaves(value)


def _range(number: float | Tensor) -> tuple[float, float]:
    """Smallest and largest entry; harmless ones where they cannot be seen."""
    if not isinstance(number, Tensor):
        return float(number), float(number)
    if not is_concrete(number) or not number.numel():
        return 1.0, 1.0
    low, high = torch.aminmax(number.detach())
    return float(low), float(high)
