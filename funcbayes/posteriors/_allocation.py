"""Which of several alternatives a numbered draw takes: low-discrepancy, so every prefix is fair."""

import functools

import torch
from torch import Tensor

from .._functorch import is_concrete, physical
from .._random import Seed, fold

_NUM_QUOTIENTS = 40  # of a continued fraction: more would not change a double
_BLOCK = 8  # draws that are shuffled among themselves
_DIRECT_NUMEL = 1 << 14  # up to so many random keys are sorted at once, whatever blocks they belong to
_TABLE_NUMEL = 1 << 22  # beyond, so many keys of different blocks are


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
    # A step of its own keeps a site apart from others in the long run. Shuffled, because two steps may be
    # close to a simple relation, and would then meet some pairs of choices only for a long time; in small
    # blocks, because across their ends the sequence is as fair as it is in order.
    shift = (fold(site, "shift") & ((1 << 52) - 1)) / (1 << 52)
    position = (shift + _step(fold(site, "step")) * _shuffled(indices, _BLOCK, site).double()) % 1.0
    ends = weights.detach().double().cpu().cumsum(0)
    return (position[:, None] >= ends / ends[-1]).sum(1).clamp_max(num_choices - 1)


def _step(key: Seed) -> float | Tensor:
    """Step of a Weyl sequence: its multiples spread evenly on the circle.

    They do if all quotients of its continued fraction are small. Here each is 1 or 2, by a bit of the key.
    """
    step: float | Tensor = 0.5
    for bit in range(_NUM_QUOTIENTS):
        step = 1 / (1 + (key >> bit & 1) + step)
    return step


def _shuffled(indices: Tensor, size: int, site: Seed) -> Tensor:
    """Numbers with every block of ``size`` shuffled by a permutation of its own."""
    blocks = torch.div(indices, size, rounding_mode="floor")
    within = indices % size
    if isinstance(site, Tensor) or not is_concrete(indices) or indices.numel() * size <= _DIRECT_NUMEL:
        return blocks * size + _orders(site, blocks, size).gather(1, within[:, None])[:, 0]
    present, which = blocks.unique(return_inverse=True)
    shuffled, step = torch.empty_like(indices), max(_TABLE_NUMEL // size, 1)
    for start in range(0, len(present), step):
        some = present[start : start + step]
        if len(some) == 1:
            orders = _order(site, int(some), size)[None]
        else:
            orders = _orders(site, some, size)
        chosen = (which >= start) & (which < start + step)
        order = orders[which[chosen] - start, within[chosen]]
        shuffled[chosen] = blocks[chosen] * size + order
    return shuffled


def _orders(site: Seed, blocks: Tensor, size: int) -> Tensor:
    """A permutation a block, ``(S, size)``: sorting random keys makes one."""
    return fold(fold(fold(site, "block"), blocks)[:, None], torch.arange(size)).argsort(dim=1)


@functools.lru_cache(maxsize=4)  # draws are asked for chunk by chunk, and many chunks share a block
def _order(site: int, block: int, size: int) -> Tensor:
    return _orders(site, torch.tensor([block]), size)[0]


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
        ranks = torch.div(indices, num_choices, rounding_mode="floor")
        return allocate(indices, None, num_choices, site), ranks
    # Inside a transform the largest number of all its entries serves as well. Up to a power of 2, so that
    # chunk after chunk finds what the first has computed.
    largest = int(physical(indices).max()) if indices.numel() else 0
    count = max(64, 1 << largest.bit_length())
    if isinstance(site, Tensor) or not is_concrete(weights):
        choices, ranks = _ranked(count, weights, num_choices, site)
    else:
        choices, ranks = _remembered(count, tuple(weights.tolist()), site)
    return choices.gather(0, indices), ranks.gather(0, indices)


@functools.lru_cache(maxsize=16)
def _remembered(count: int, weights: tuple[float, ...], site: int) -> tuple[Tensor, Tensor]:
    return _ranked(count, torch.tensor(weights, dtype=torch.float64), len(weights), site)


def _ranked(count: int, weights: Tensor, num_choices: int, site: Seed) -> tuple[Tensor, Tensor]:
    """Choices and ranks of the first draws."""
    choices = allocate(torch.arange(count), weights, num_choices, site)
    ranks = torch.zeros_like(choices)
    for k in range(num_choices):
        is_choice = choices == k
        ranks = ranks + (is_choice.cumsum(0) - 1) * is_choice
    return choices, ranks
