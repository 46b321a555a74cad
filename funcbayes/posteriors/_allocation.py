"""Which of several alternatives a numbered draw takes: low-discrepancy, so every prefix is fair."""

import math

import torch
from torch import Tensor

from .._functorch import physical
from .._random import Seed, fold

# Fractional parts of multiples of the golden ratio are spread over the circle as evenly as any are.
_STEP = (math.sqrt(5) - 1) / 2
_BLOCK = 8  # draws that are shuffled among themselves


def allocate(indices: Tensor, weights: Tensor | None, num_choices: int, site: Seed) -> Tensor:
    """Choose an alternative for every draw.

    Args:
        indices: Draw numbers, int64 ``(S,)``.
        weights: Probabilities ``(K,)`` that sum to 1, or ``None`` for equal ones.
        num_choices: ``K``.
        site: Key of this place of allocation; different sites are unrelated.

    Returns:
        Choices in ``range(K)``, int64 ``(S,)``. Choice ``i`` depends on ``i`` and the site alone, and
        the first ``n`` choices are close to proportional to the weights for every ``n``.
    """
    if weights is None:  # every K draws are a permutation
        return _shuffled(indices, num_choices, site) % num_choices
    # Shuffled, because two sites that followed such a sequence in step would meet some pairs of choices
    # only; in small blocks, because across their ends the sequence is as fair as it is in order.
    shift = (fold(site, "shift") & ((1 << 52) - 1)) / (1 << 52)
    position = (shift + _STEP * _shuffled(indices, _BLOCK, site).double()) % 1.0
    ends = weights.detach().double().cpu().cumsum(0)
    return (position[:, None] >= ends / ends[-1]).sum(1).clamp_max(num_choices - 1)


def _shuffled(indices: Tensor, size: int, site: Seed) -> Tensor:
    """Numbers with every block of ``size`` shuffled by a permutation of its own: sorting random keys."""
    blocks = torch.div(indices, size, rounding_mode="floor")
    order = fold(fold(fold(site, "block"), blocks)[:, None], torch.arange(size)).argsort(dim=1)
    return blocks * size + order.gather(1, (indices % size)[:, None])[:, 0]


def allocate_ranked(
    indices: Tensor, weights: Tensor | None, num_choices: int, site: Seed
) -> tuple[Tensor, Tensor]:
    """Choose as :func:`allocate` does, and number the draws within their alternatives.

    Returns:
        Choices, and ranks: how many draws before a draw have made its choice; int64 ``(S,)`` both. What
        an alternative allocates in turn reads the rank, and so meets each of its own alternatives
        whatever the pattern of the choices above.
    """
    if weights is None:  # every block of K draws has each alternative once
        return allocate(indices, None, num_choices, site), torch.div(
            indices, num_choices, rounding_mode="floor"
        )
    # Inside a transform the largest number of all its entries serves as well.
    earlier = torch.arange(int(physical(indices).max()) + 1 if indices.numel() else 0)
    choices = allocate(earlier, weights, num_choices, site)
    is_choice = choices[:, None] == torch.arange(num_choices)
    ranks = (is_choice.cumsum(0) * is_choice).sum(1) - 1
    return choices.gather(0, indices), ranks.gather(0, indices)
