"""Mean and squared deviations of snapshots, added to a block of snapshots at a time.

A block of ``k`` snapshots is kept as its first and the differences ``r_2, ..., r_k`` of the others from it.
With their sums ``S`` and ``Q``, of ``r`` and of ``r ** 2``, the block has

    mean_b = first + S / k,    M2_b = Q - S ** 2 / k,

``M2`` being the sum of squared deviations from the mean. As the first is one of the values, the subtraction
loses at most a factor of ``k + 1``. Blocks are merged by the pairwise rule of Chan, Golub & LeVeque (1983),
"Algorithms for computing the sample variance", which cancels nothing:

    delta = mean_b - mean,    mean += delta k / (n + k),    M2 += M2_b + delta ** 2 n k / (n + k).

What is left over goes one by one, by Welford's steps. Means are kept as differences from the first snapshot
of all, so that how far the values are from zero does not matter, as it would for Welford's steps on the
values once they differ by less than a mean so far from zero can resolve.
"""

import math
from collections.abc import Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from .._functorch import is_inside_transform
from .._tree import Params


def differences(leaves: Sequence[Tensor], origins: list[Tensor]) -> list[Tensor]:
    """``leaf - origin`` for every leaf, contiguous and in the dtype of the origins, at least float32."""
    wide = [leaf.to(origin.dtype) for leaf, origin in zip(leaves, origins, strict=True)]
    return [difference.contiguous() for difference in _each("sub", wide, origins)]


def merged(
    mean: Params,
    squares: Params,
    count: int,
    block: Sequence[Params],
    origin: Params,
    *,
    is_last_spare: bool,
) -> tuple[Params, Params]:
    """Mean and squared deviations with those of one more block; new tensors.

    Args:
        mean: Of the first ``count`` snapshots, less ``origin``.
        squares: Sum of their squared deviations from their mean.
        count: ``n`` above.
        block: The first of the block, and the differences of at least two others from it.
        origin: The first snapshot of all.
        is_last_spare: Whether nobody needs the last of the block any more, so that it may be written into.
    """
    structure: Any = optree.tree_structure(mean)
    means, found, starts, first, *rows = map(optree.tree_leaves, (mean, squares, origin, *block))
    # In place on what was made here: fresh memory costs more than what is written into it.
    found = _each("addcmul", found, rows[0], rows[0])
    for row in rows[1:]:
        found = _each("addcmul_", found, row, row)
    sums = _each("add_" if is_last_spare else "add", rows[-1], rows[0])
    for row in rows[1:-1]:
        sums = _each("add_", sums, row)
    k, n = len(block), count
    found = _each("addcmul_", found, sums, sums, value=-1 / k)
    delta = _each("add_", _wide_differences(first, starts), sums, alpha=1 / k)
    delta = _each("sub_", delta, means)
    found = _each("addcmul_", found, delta, delta, value=n * k / (n + k))
    means = _each("add_", _each("mul_", delta, k / (n + k)), means)
    return structure.unflatten(means), structure.unflatten(found)


def _wide_differences(wide: list[Tensor], origins: list[Tensor]) -> list[Tensor]:
    return _each("sub", wide, [o.to(leaf.dtype) for leaf, o in zip(wide, origins, strict=True)])


def _each(
    operation: str, leaves: list[Tensor], *others: list[Tensor] | float, **options: float
) -> list[Tensor]:
    """An operation of torch on every leaf, by one call for all of them."""
    if is_inside_transform():  # which does not know those calls, nor lets a shared leaf take a mapped one
        plain = getattr(torch, operation.removesuffix("_"))
        columns = [other if isinstance(other, list) else [other] * len(leaves) for other in others]
        return [plain(*each, **options) for each in zip(leaves, *columns, strict=True)]
    found = getattr(torch, f"_foreach_{operation}")(leaves, *others, **options)
    return leaves if operation.endswith("_") else list(found)


def moments(
    mean: Tensor,
    squares: Tensor,
    count: int,
    recent: Sequence[Tensor],
    size: int,
    origin: Tensor,
    keep: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean less ``origin``, and variance, of one leaf, and the last deviations from the mean so far.

    Args:
        mean: Of the first ``count`` snapshots, less ``origin``.
        squares: Sum of their squared deviations.
        count: How many they are.
        recent: Those that came after, in blocks.
        size: How many snapshots a block has.
        origin: The first snapshot of all.
        keep: How many deviations are wanted.
    """
    deviations = []
    n = count + len(recent)
    first = mean
    for i, row in enumerate(recent):
        t = count + i + 1
        if i % size == 0:
            value = first = row - origin.to(row.dtype)
        else:
            value = first + row
        mean = torch.lerp(mean, value, 1 / t)
        deviation = value - mean
        squares = torch.addcmul(squares, deviation, deviation, value=t / max(t - 1, 1))
        if t > n - keep:
            deviations.append(deviation)
    return mean, squares / n, deviations


def scale_of_columns(scale: float, num_columns: int) -> float:
    """What a deviation is multiplied by to be a column of the covariance's factor."""
    return math.sqrt(scale / max(num_columns - 1, 1))
