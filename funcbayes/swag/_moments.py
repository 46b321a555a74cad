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
from .._tree import Params, map_leaves

# Entries worked on at a time: what is read again for the next snapshot stays in a cache.
_BLOCK = 1 << 16


def differences(leaves: Sequence[Tensor], origins: Sequence[Tensor]) -> list[Tensor]:
    """``y = theta - theta_1`` of every leaf, contiguous and in at least float32."""
    wide = [leaf if leaf.dtype.itemsize >= 4 else leaf.float() for leaf in leaves]
    starts = [origin.to(leaf.dtype) for origin, leaf in zip(origins, wide, strict=True)]
    # Many small leaves in one call, which transforms do not know.
    found = map(torch.sub, wide, starts) if is_inside_transform() else torch._foreach_sub(wide, starts)
    return [y.contiguous() for y in found]


def summed(total: Params, squares: Params, shifts: Sequence[Params]) -> tuple[Params, Params]:
    """Add trees ``y_t`` to the sums of ``y_t`` and of ``y_t ** 2``; new tensors."""
    if is_inside_transform():
        for shift in shifts:
            total, squares = map_leaves(torch.add, total, shift), map_leaves(_with_square, squares, shift)
        return total, squares
    return _summed_in_blocks(total, squares, shifts)


def _with_square(squares: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(squares, shift, shift)


def _summed_in_blocks(total: Params, squares: Params, shifts: Sequence[Params]) -> tuple[Params, Params]:
    """In one pass through memory.

    Small leaves are joined first, because a call for each would cost more than its numbers.
    """
    trees = [optree.tree_leaves(tree) for tree in (total, squares, *shifts)]
    sums: list[Any] = [None] * len(trees[0])
    sums_of_squares = list(sums)
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(trees[0]):
        alone = i if leaf.numel() > _BLOCK else None
        groups.setdefault((leaf.dtype, leaf.device, alone), []).append(i)
    for places in groups.values():
        own = [[leaves[i] for i in places] for leaves in trees]
        for out, flat in zip((sums, sums_of_squares), _summed_flat(*map(_joined, own)), strict=True):
            parts = flat.split([leaf.numel() for leaf in own[0]])
            for i, part, leaf in zip(places, parts, own[0], strict=True):
                out[i] = part.view(leaf.shape)
    structure: Any = optree.tree_structure(total)
    return structure.unflatten(sums), structure.unflatten(sums_of_squares)


def _joined(leaves: Sequence[Tensor]) -> Tensor:
    return leaves[0].view(-1) if len(leaves) == 1 else torch.cat([leaf.view(-1) for leaf in leaves])


def _summed_flat(total: Tensor, squares: Tensor, *shifts: Tensor) -> tuple[Tensor, Tensor]:
    """The same of vectors."""
    new_total, new_squares = torch.empty_like(total), torch.empty_like(squares)
    size = _BLOCK if total.device.type == "cpu" else max(1, total.numel())
    blocks = zip(*(v.split(size) for v in (total, squares, new_total, new_squares, *shifts)), strict=True)
    for s, q, new_s, new_q, *ys in blocks:
        for y in ys:
            s = torch.add(s, y, out=new_s)
            q = torch.addcmul(q, y, y, out=new_q)
    return new_total, new_squares


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
