"""A diagonal plus a matrix of low rank, as SWAG has it."""

from collections.abc import Callable

from torch import Tensor

from .._random import Seed
from .._tree import Params, map_named, named_leaves, pytree_dataclass
from ._checks import check_factors, check_variance, positive_factor, zero_variance
from ._diagonal import scaled_noise
from ._flat import ravel, ravel_columns
from ._interface import Covariance, refuse_singular
from ._noise import add_product, shared_noise
from ._operator import Inverse, Operator, Sum
from ._parts import part, squared_lengths, times_power


@pytree_dataclass
class LowRankPlusDiagonal(Covariance):
    """The covariance ``diag(variance) + F F^T``, of rank ``R`` beside its diagonal.

    A draw is ``sqrt(variance) * z1 + F z2`` with one ``z2`` for all leaves (Maddox et al. 2019, eq. 1).
    What needs an inverse costs ``P R^2`` by Woodbury's identity.

    Attributes:
        variance: Diagonal part, in squared units of the parameter, zero or positive; leaves ``s``. Where it
            is zero the covariance can be sampled, but not inverted.
        factors: ``F``, in units of the parameter, leaves ``(*s, R)`` with one ``R``, which may be 0.

    Raises:
        TypeError: If a leaf is not a tensor of floating point.
        ValueError: If a variance is negative, a number is not finite, or the trees do not match.

    Example:
        >>> import torch, funcbayes as fb
        >>> variance, factors = {"w": torch.ones(2)}, {"w": torch.tensor([[1.0], [2.0]])}
        >>> fb.covariances.LowRankPlusDiagonal(variance, factors).to_dense()
        tensor([[2., 2.],
                [2., 5.]])
    """

    variance: Params
    factors: Params

    def __post_init__(self) -> None:
        check_variance(self.variance, "LowRankPlusDiagonal(variance, ...)")
        check_factors(self.factors, "LowRankPlusDiagonal(..., factors)", self.variance)

    @property
    def like(self) -> Params:
        """The diagonal part."""
        return self.variance

    def deviations(self, indices: Tensor, seed: Seed) -> Params:
        """Draw ``sqrt(variance) * z1 + F z2``, leaves ``(S, *s)``."""
        factors = named_leaves(self.factors)
        rank = next((leaf.shape[-1] for leaf in factors.values()), 0)
        shared = shared_noise(self.variance, rank, indices, seed)
        own = scaled_noise(self.variance, indices, seed)
        return map_named(lambda name, noise: add_product(noise, shared, factors[name]), own)

    def diagonal(self) -> Params:
        """Variance of each parameter, leaves ``s``."""
        factors = named_leaves(self.factors)

        def sum_of(name: str, variance: Tensor) -> Tensor:
            return (squared_lengths(factors[name]) + variance).to(variance.dtype)

        return map_named(sum_of, self.variance)

    def operator(self) -> Operator:
        """``diag(variance) + F F^T``."""
        return self._sum()

    def inverse(self) -> Operator:
        """Its inverse."""
        refuse_singular(self)
        return Inverse(self._sum())

    def singular(self) -> str | None:
        """Where the diagonal part is zero, which Woodbury's identity cannot invert."""
        return zero_variance(self.variance)

    def scaled(self, factor: float | Tensor) -> "LowRankPlusDiagonal":
        """The covariance times a positive number."""
        factor = positive_factor(factor)
        return LowRankPlusDiagonal(
            times_power(self.variance, factor, 1), times_power(self.factors, factor, 0.5)
        )

    def restricted(self, keep: Callable[[str, Tensor], bool]) -> "LowRankPlusDiagonal":
        """The rows of the leaves with ``keep(path, leaf)``."""
        variance, factors = (part(tree, self.like, keep) for tree in (self.variance, self.factors))
        return LowRankPlusDiagonal(variance, factors)

    def _sum(self) -> Sum:
        return Sum(ravel(self.variance, self.like), ravel_columns(self.factors, self.like))
