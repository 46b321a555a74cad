"""Sums from which the mean and the variance of snapshots follow.

With ``y_t = theta_t - theta_1``, the sums of ``y_t`` and of ``y_t ** 2`` give

    mean = theta_1 + S / n,    var = Q / n - (S / n) ** 2.

The subtraction loses at most a factor of ``n + 1``: as ``theta_1`` is one of the values,
``(theta_1 - mean) ** 2 <= n var``, hence ``Q / n = var + (theta_1 - mean) ** 2 <= (n + 1) var``. How far the
values are from zero does not matter (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample
variance", on shifted data), as it does for ``E[theta^2] - E[theta]^2``, and for Welford's steps too once
snapshots differ by less than a mean so far from zero can resolve.
"""

import math
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from .._functorch import is_inside_transform
from .._tree import Params


def differences(leaves: Sequence[Tensor], origins: Sequence[Tensor]) -> list[Tensor]:
    """``y = theta - theta_1`` of every leaf, contiguous and in at least float32."""
    wide = [leaf if leaf.dtype.itemsize >= 4 else leaf.float() for leaf in leaves]
    starts = [origin.to(leaf.dtype) for origin, leaf in zip(origins, wide, strict=True)]
    found = map(torch.sub, wide, starts) if is_inside_transform() else torch._foreach_sub(wide, starts)
    return [y.contiguous() for y in found]


def summed(total: Params, squares: Params, shifts: Sequence[Params]) -> tuple[Params, Params]:
    """Add trees ``y_t`` to the sums of ``y_t`` and of ``y_t ** 2``; new tensors."""
    structure: Any = optree.tree_structure(total)
    sums, sums_of_squares, *rows = map(optree.tree_leaves, (total, squares, *shifts))
    if is_inside_transform():  # which the calls for many leaves at once do not know
        for row in rows:
            sums = [*map(torch.add, sums, row)]
            sums_of_squares = [*map(_with_square, sums_of_squares, row)]
        return structure.unflatten(sums), structure.unflatten(sums_of_squares)
    first, *others = rows
    sums = torch._foreach_add(sums, first)
    sums_of_squares = torch._foreach_addcmul(sums_of_squares, first, first)
    for row in others:  # into tensors that were made here
        torch._foreach_add_(sums, row)
        torch._foreach_addcmul_(sums_of_squares, row, row)
    return structure.unflatten(sums), structure.unflatten(sums_of_squares)


def _with_square(squares: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(squares, shift, shift)


def moments(
    total: Tensor, squares: Tensor, shifts: Sequence[Tensor], count: int, keep: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean and variance of ``y_t`` of one leaf, and the last deviations ``y_t - mean of y_1 ... y_t``.

    Args:
        total: Sum of the first ``count`` values.
        squares: Sum of their squares.
        shifts: The values that came after.
        count: How many are in the sums.
        keep: How many deviations are wanted.
    """
    deviations = []
    n = count + len(shifts)
    for t, shift in enumerate(shifts, start=count + 1):
        total, squares = total + shift, _with_square(squares, shift)
        if t > n - keep:
            deviations.append(shift - total / t)
    mean = total / n
    return mean, (squares / n - mean**2).clamp_min(0.0), deviations


def scale_of_columns(scale: float, num_columns: int) -> float:
    """What a deviation is multiplied by to be a column of the covariance's factor."""
    return math.sqrt(scale / max(num_columns - 1, 1))
