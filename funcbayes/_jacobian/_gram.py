"""Products of gradients of one leaf with each other."""

import torch
from torch import Tensor

from ._gradients import Outer, RowGradients


def gram(one: RowGradients, two: RowGradients, weight: Tensor) -> Tensor:
    """``g_nk^T diag(weight) g'_ml`` for all rows and columns of two sets of gradients of one network's leaf.

    Args:
        one: ``N`` rows of ``K`` columns.
        two: ``N'`` rows of ``K'`` columns.
        weight: One number, or like the leaf.

    Returns:
        ``(N K, N' K')``, columns inside rows.
    """
    if _is_plain(one) and _is_plain(two) and weight.ndim == 0:
        # For outer products it is a product of two matrices, entry by entry.
        assert isinstance(one, Outer)
        assert isinstance(two, Outer)
        (left, right), (left_2, right_2) = _sides(one), _sides(two)
        inputs = right @ right_2.mT  # (N, N')
        gradients = (left.flatten(0, 1) @ left_2.flatten(0, 1).mT).unflatten(1, left_2.shape[:2])
        product = gradients.unflatten(0, left.shape[:2]) * inputs[:, None, :, None] * weight
        return product.flatten(2).flatten(0, 1)
    found = []
    own = weight.reshape(one.shape[:1].numel(), one.shape[1:].numel()) if weight.ndim else weight
    for part in one.blocks():
        rows = (part.matrices()[0] * own).flatten(2).flatten(0, 1)
        others = [rows @ block.matrices()[0].flatten(2).flatten(0, 1).mT for block in two.blocks()]
        found.append(torch.cat(others, 1))
    return torch.cat(found)


def _is_plain(gradient: RowGradients) -> bool:
    """Whether a gradient is one outer product."""
    return (
        isinstance(gradient, Outer)
        and gradient.right is not None
        and gradient.is_left_gradient
        and gradient.num_positions == 1
        and gradient.left.shape[3] == 1
    )


def _sides(gradient: Outer) -> tuple[Tensor, Tensor]:
    """``(N, K, d_out)`` and ``(N, d_in)``."""
    assert gradient.right is not None
    return gradient.left[:, 0, :, 0, 0].movedim(0, 1), gradient.right[0, 0, :, 0, 0]
