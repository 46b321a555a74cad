"""Correlations between all parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._random import Seed
from .._tree import Params, map_leaves, map_named, named_leaves, pytree_dataclass
from ._checks import check_factors, positive_factor
from ._flat import dtype_of, ravel_columns, without_columns
from ._interface import Covariance, refuse_singular
from ._noise import add_product, shared_noise
from ._operator import Gram, Operator, inverse_transpose
from ._parts import part, squared_lengths, times_power


@pytree_dataclass
class Dense(Covariance):
    """The covariance ``F F^T``, of full rank where ``R >= P`` (the Cholesky factor of a matrix, say).

    A draw is ``F z`` with one ``z`` for all leaves. With fewer columns than parameters the covariance is
    singular: it can be sampled, but not inverted.

    Attributes:
        factors: ``F``, in units of the parameter, leaves ``(*s, R)`` with one ``R``.

    Raises:
        TypeError: If a leaf is not a tensor of floating point.
        ValueError: If a number is not finite, or ranks differ.

    Example:
        >>> import torch, funcbayes as fb
        >>> factors = {"b": torch.tensor([1.0, 0.0]), "w": torch.tensor([[2.0, 1.0]])}
        >>> fb.covariances.Dense(factors).to_dense()
        tensor([[1., 2.],
                [2., 5.]])
    """

    factors: Params

    def __post_init__(self) -> None:
        check_factors(self.factors, "Dense(factors)")

    @property
    def like(self) -> Params:
        """Placeholders without numbers."""
        return without_columns(self.factors)

    def deviations(self, indices: Tensor, seed: Seed) -> Params:
        """Draw ``F z``, leaves ``(S, *s)``."""
        factors, like = named_leaves(self.factors), self.like
        rank = next((leaf.shape[-1] for leaf in factors.values()), 0)
        shared = shared_noise(like, rank, indices, seed)

        def deviate(name: str, leaf: Tensor) -> Tensor:
            start = torch.zeros((len(indices), *leaf.shape), dtype=leaf.dtype, device=leaf.device)
            return add_product(start, shared, factors[name])

        return map_named(deviate, like)

    def diagonal(self) -> Params:
        """Variance of each parameter, leaves ``s``."""
        return map_leaves(lambda leaf: squared_lengths(leaf).to(leaf.dtype), self.factors)

    def operator(self) -> Operator:
        """``F F^T``."""
        return Gram(self._columns())

    def inverse(self) -> Operator:
        """Its inverse, the product of the inverse of a triangular root with its transpose."""
        refuse_singular(self)
        # F^T = Q U gives F F^T = U^T U: the factor, without squaring its condition.
        upper = torch.linalg.qr(self._columns().mT).R
        pivots, dtype = upper.detach().diagonal().abs(), dtype_of(self.factors)
        if is_concrete(pivots) and bool((pivots <= pivots.max() * torch.finfo(dtype).eps).any()):
            raise ValueError(
                "`Dense` can be sampled but has no inverse and no determinant: rows of its factors are "
                f"linearly dependent up to rounding in {dtype}. float64 may help."
            )
        return Gram(inverse_transpose(upper.mT))

    def singular(self) -> str | None:
        """If there are fewer columns than parameters."""
        factors = named_leaves(self.factors).values()
        rank = min((leaf.shape[-1] for leaf in factors), default=0)
        size = sum(leaf.shape[:-1].numel() for leaf in factors)
        return f"its rank is at most {rank}, the columns of its factors, of {size}" if rank < size else None

    def scaled(self, factor: float | Tensor) -> "Dense":
        """The covariance times a positive number."""
        return Dense(times_power(self.factors, positive_factor(factor), 0.5))

    def restricted(self, keep: Callable[[str, Tensor], bool]) -> "Dense":
        """The rows of the leaves with ``keep(path, leaf)``."""
        return Dense(part(self.factors, self.like, keep))

    def _columns(self) -> Tensor:
        return ravel_columns(self.factors, self.factors)
