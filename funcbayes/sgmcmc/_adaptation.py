"""What Hamiltonian Monte Carlo learns during its burn-in: step sizes and masses, of each chain by itself."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Hoffman & Gelman (2014), section 3.2.
_GAMMA, _T0, _KAPPA = 0.05, 10, 0.75


@dataclass(frozen=True)
class DualAveraging:
    """Step sizes on their way to a rate of acceptance: Hoffman & Gelman (2014), algorithm 5.

    Attributes:
        log_size: Logarithms of the present step sizes ``(M,)``.
        log_average: Of their averages, which are used in the end.
        error: Running mean of what acceptance lacks, ``H`` with a bar.
        anchor: What the logarithms are drawn to, ``mu``.
        count: Proposals seen, ``m``.
    """

    log_size: Tensor
    log_average: Tensor
    error: Tensor
    anchor: Tensor
    count: int = 0

    @classmethod
    def from_size(cls, size: Tensor) -> "DualAveraging":
        """Begin at these step sizes."""
        return cls(size.log(), size.log(), torch.zeros_like(size), (10 * size).log())

    def updated(self, acceptance: Tensor, target: float) -> "DualAveraging":
        """Take note of the probabilities of acceptance ``(M,)`` of a proposal."""
        m = self.count + 1
        weight = 1 / (m + _T0)
        error = (1 - weight) * self.error + weight * (target - acceptance)
        log_size = self.anchor - math.sqrt(m) / _GAMMA * error
        share = m**-_KAPPA
        log_average = share * log_size + (1 - share) * self.log_average
        return replace(self, log_size=log_size, log_average=log_average, error=error, count=m)


@dataclass(frozen=True)
class Variances:
    """Moments of positions, by Welford's recursion.

    Attributes:
        mean: ``(M, D)``.
        squares: Sums of squared deviations from it.
        count: How many positions.
    """

    mean: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def like(cls, position: Tensor) -> "Variances":
        """Nothing seen yet."""
        return cls(torch.zeros_like(position), torch.zeros_like(position))

    def updated(self, position: Tensor) -> "Variances":
        """Take note of positions ``(M, D)``."""
        n = self.count + 1
        mean = self.mean + (position - self.mean) / n
        squares = self.squares + (position - self.mean) * (position - mean)
        return Variances(mean, squares, n)

    def inverse_masses(self, before: Tensor) -> Tensor:
        """Variances, drawn a little to a thousandth of the inverse masses so far, and so never 0."""
        # With the weights of Stan's reference manual, "Automatic parameter tuning".
        n = self.count
        return n / (n + 5) * self.squares / max(n - 1, 1) + 5 / (n + 5) * 1e-3 * before


def windows(num_burn_in: int) -> tuple[range, frozenset[int]]:
    """During which proposals variances are collected, and after which masses are set by them.

    Chains first get to where the posterior is, and at the end step sizes settle. Between, each window is
    twice as long as the one before: the last has half of all proposals, and what was seen early is forgotten.
    """
    first, stop = math.ceil(0.15 * num_burn_in), math.floor(0.8 * num_burn_in)
    ends, length, at = set(), 25, first
    while at < stop:
        at = stop if at + 3 * length > stop else at + length  # none is left shorter than the next would be
        ends.add(at - 1)
        length *= 2
    return (range(first, stop), frozenset(ends)) if stop - first >= 10 else (range(0), frozenset())
