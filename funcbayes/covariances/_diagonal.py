"""Independent parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, map_leaves, map_named, pytree_dataclass
from ._checks import check_variance, positive_factor, zero_variance
from ._flat import ravel
from ._interface import Covariance, refuse_singular
from ._noise import leaf_noise, over
from ._operator import Operator, Sum
from ._parts import part, times_power


@pytree_dataclass
class Diagonal(Covariance):
    """A diagonal covariance.

    Attributes:
        variance: Variance of each parameter, in squared units of the parameter, zero or positive; a
            tree like the mean's parameters, leaves ``s``.

    Raises:
        TypeError: If a leaf is not a tensor of floating point.
        ValueError: If a variance is negative or not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> fb.covariances.Diagonal({"w": torch.full((2, 3), 0.25)}).logdet()
        tensor(-8.3178)
    """

    variance: Params

    def __post_init__(self) -> None:
        check_variance(self.variance, "Diagonal(variance)")

    @property
    def like(self) -> Params:
        """The variance."""
        return self.variance

    def deviations(self, indices: Tensor, seed: Seed) -> Params:
        """Draw ``sqrt(variance) * z``, leaves ``(S, *s)``."""
        return scaled_noise(self.variance, indices, seed)

    def diagonal(self) -> Params:
        """Variance of each parameter, leaves ``s``."""
        return self.variance

    def operator(self) -> Operator:
        """``diag(variance)``."""
        variance = ravel(self.variance, self.like)
        return Sum(variance, variance.new_zeros(len(variance), 0))

    def inverse(self) -> Operator:
        """``diag(1 / variance)``."""
        refuse_singular(self)
        precision = 1 / ravel(self.variance, self.like)
        return Sum(precision, precision.new_zeros(len(precision), 0))

    def singular(self) -> str | None:
        """Where a variance is zero."""
        return zero_variance(self.variance)

    def scaled(self, factor: float | Tensor) -> "Diagonal":
        """Variances times a positive number."""
        return Diagonal(times_power(self.variance, positive_factor(factor), 1))

    def restricted(self, keep: Callable[[str, Tensor], bool]) -> "Diagonal":
        """The variances of the leaves with ``keep(path, leaf)``."""
        return Diagonal(part(self.variance, self.like, keep))


def scaled_noise(variance: Params, indices: Tensor, seed: Seed) -> Params:
    """``sqrt(variance) * z``, leaves ``(S, *s)``."""
    noise = leaf_noise(variance, indices, seed)
    std = map_leaves(torch.sqrt, variance)
    return map_named(lambda name, s: torch.mul(noise[name], s, out=over(noise[name], s)), std)
