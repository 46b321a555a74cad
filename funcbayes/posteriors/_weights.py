"""Weights of alternatives: the members of an ensemble, the components of a mixture."""

import torch
from torch import Tensor

from .._functorch import is_concrete


def normalized(
    weights: Tensor | None, count: int, call: str, of_what: str, device: torch.device | None
) -> tuple[Tensor, bool]:
    """Weights divided by their sum, and whether all are equal; equal ones for ``None``.

    Args:
        weights: Finite, not negative, not all zero, ``(K,)``; a sequence of numbers will do.
        count: ``K``.
        call: The public call, for messages.
        of_what: What they are the weights of, for messages.
        device: Where equal weights are made.
    """
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64, device=device), True
    try:
        weights = torch.as_tensor(weights)
    except (TypeError, ValueError) as err:
        raise TypeError(f"`{call}` should have numbers, got {type(weights).__name__}.") from err
    if weights.shape != (count,):
        raise ValueError(
            f"`{call}` should have one weight for each of {count} {of_what}, got shape "
            f"{tuple(weights.shape)}."
        )
    if is_concrete(weights) and not bool(
        (weights >= 0).all() & weights.isfinite().all() & (weights.sum() > 0)
    ):
        raise ValueError(
            f"`{call}` should have weights that are finite, not negative, and not all zero, got "
            f"{weights.tolist()}."
        )
    weights = weights / weights.sum()
    return weights, is_concrete(weights) and bool((weights == weights[0]).all())


def probabilities(weights: Tensor, is_equal: bool) -> Tensor:
    """Weights in double precision, not as they are stored, which may be rounded after a conversion."""
    if is_equal:
        return torch.full(weights.shape, 1 / weights.shape[-1], dtype=torch.float64)
    weights = weights.double()
    return weights / weights.sum()
