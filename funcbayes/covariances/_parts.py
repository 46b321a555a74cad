"""Trees times a number, and parts of trees."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._tree import Params, map_leaves, named_leaves, select
from ._flat import at_least_single


def times_power(tree: Params, number: float | Tensor, power: float) -> Params:
    """``tree * number**power``, leaves keep their dtypes."""

    def times(leaf: Tensor) -> Tensor:
        return leaf * (number.to(leaf) if isinstance(number, Tensor) else number) ** power

    return map_leaves(times, tree)


def times_matrix(leaf: Tensor, matrix: Tensor) -> Tensor:
    """``leaf matrix`` for a leaf ``(*s, k)`` and a matrix ``(k, m)``, in the dtype of the leaf."""
    dtype = at_least_single(leaf.dtype)
    return (leaf.to(dtype) @ matrix.to(dtype)).to(leaf.dtype)


def squared_lengths(leaf: Tensor) -> Tensor:
    """Sums of squares along the last axis of a leaf ``(*s, k)``, in at least single precision."""
    wide = leaf.to(at_least_single(leaf.dtype))
    return torch.einsum("...k,...k->...", wide, wide)  # without a tensor of squares


def part(tree: Params, like: Params, keep: Callable[[str, Tensor], bool]) -> Params:
    """The leaves of ``tree`` for which ``keep(path, leaf)`` is true of those of ``like``."""
    kept = {name for name, leaf in named_leaves(like).items() if keep(name, leaf)}
    return select(tree, lambda name, leaf: name in kept)
