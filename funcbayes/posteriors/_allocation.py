"""Which of several alternatives a numbered draw takes: low-discrepancy, so every prefix is fair."""

import math

import torch
from torch import Tensor

from .._random import Seed, fold

# Steps of Weyl sequences: fractional parts of square roots, whose continued fractions are periodic,
# hence multiples of each are spread evenly on the circle. Those near 0 or 1 start slowly.
_ROOTS = (2, 3, 5, 6, 7, 8, 11, 12, 13, 14, 15, 19, 21, 22, 23, 29, 31, 32, 33, 34, 41, 43, 44, 46, 47)
_STEPS = tuple(s for s in (math.sqrt(n) % 1 for n in _ROOTS) if 0.15 < s < 0.85)


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
    if weights is None:
        # Blocks of K draws, each a permutation of its own: sorting random keys makes one.
        block_keys = fold(fold(site, "block"), torch.div(indices, num_choices, rounding_mode="floor"))
        order = fold(block_keys[:, None], torch.arange(num_choices)).argsort(dim=1)
        return order.gather(1, (indices % num_choices)[:, None])[:, 0]
    hashed = fold(torch.as_tensor(site), torch.arange(2))
    shift = (hashed[0] & ((1 << 52) - 1)).double() / (1 << 52)
    # Indexed by a tensor of one entry, because torch 2.9 asks an index without axes for its value.
    step = torch.tensor(_STEPS, dtype=torch.float64)[hashed[1:] % len(_STEPS)]
    position = (shift + step * indices) % 1.0
    ends = weights.detach().double().cpu().cumsum(0)
    return (position[:, None] >= ends / ends[-1]).sum(1).clamp_max(num_choices - 1)
