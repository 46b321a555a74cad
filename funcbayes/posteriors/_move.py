"""Moving posteriors between devices and dtypes."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from .._tree import is_repeated, map_leaves, repeated

_T = TypeVar("_T")


def to(posterior: _T, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> _T:
    """Copy a posterior, or any tree of tensors, to another device or dtype.

    Args:
        posterior: Left as it is.
        device: Where the copy lives; ``None`` to stay.
        dtype: Floating-point dtype of the copy's floating-point tensors; ``None`` to keep theirs.

    Returns:
        A tree of the same structure. Tensors that need no change are shared.

    Example:
        >>> import torch, funcbayes as fb
        >>> fb.to(fb.Point({"w": torch.ones(2)}), dtype=torch.float64).params["w"].dtype
        torch.float64
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`to(dtype=...)` should be a floating-point dtype, got {dtype}.")

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if is_repeated(leaf):
            one = leaf[0]
            moved = move(one)
            return leaf if moved is one else repeated(moved, len(leaf))
        return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

    return map_leaves(move, posterior)
