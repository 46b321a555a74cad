"""A precision of a diagonal plus a matrix of low rank, as a Laplace approximation has it."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, map_leaves, map_named, named_leaves, pytree_dataclass
from ._checks import check_factors, check_precision, positive_factor
from ._flat import at_least_single, dtype_of, ravel, ravel_columns
from ._interface import Covariance
from ._noise import add_product, leaf_noise, over, project, rotate
from ._operator import Inverse, Operator, Sum, inverse_transpose, root_of_capacitance
from ._parts import part, times_matrix, times_power


@pytree_dataclass
class LowRankPrecision(Covariance):
    """The covariance ``(diag(precision) + F F^T)^-1``: a diagonal minus a matrix of rank ``R``.

    With ``C = I + F^T diag(1 / precision) F`` variances, densities and entropies have a relative error of
    some ``eps cond(C) + eps^2 |C|``, ``eps`` of double precision, before they are rounded to the leaves'
    dtype. Draws are differences, with an absolute error of some ``eps / sqrt(precision)`` in that dtype.

    Attributes:
        precision: Diagonal part, in one over squared units of the parameter, positive; leaves ``s``.
        factors: ``F``, in one over units of the parameter, leaves ``(*s, R)`` with one ``R``, which may be 0.

    Raises:
        TypeError: If a leaf is not a tensor of floating point.
        ValueError: If a precision is not positive, a number is not finite, or the trees do not match.

    Example:
        >>> import torch, funcbayes as fb
        >>> precision, factors = {"w": torch.ones(2)}, {"w": torch.tensor([[1.0], [0.0]])}
        >>> fb.covariances.LowRankPrecision(precision, factors).to_dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000]])
    """

    precision: Params
    factors: Params

    def __post_init__(self) -> None:
        check_precision(self.precision, "LowRankPrecision(precision, ...)")
        check_factors(self.factors, "LowRankPrecision(..., factors)", self.precision)

    @property
    def like(self) -> Params:
        """The diagonal part of the precision."""
        return self.precision

    def deviations(self, indices: Tensor, seed: Seed) -> Params:
        """Draw with ``P`` normals, leaves ``(S, *s)``."""
        # With D = diag(precision), M = D^-1/2 F and I + M^T M = L L^T a square root of (I + M M^T)^-1 is
        #     I - M K M^T,    K = L^-T (L + I)^-1                             (Andrews 1968)
        # for K + K^T - K M^T M K^T = (L L^T)^-1. Unlike one from eigenvectors it has derivatives where
        # eigenvalues coincide.
        dtype = at_least_single(dtype_of(self.precision))
        scale = {name: leaf.to(dtype).rsqrt() for name, leaf in named_leaves(self.precision).items()}
        whitened = {
            name: leaf.to(dtype) * scale[name].unsqueeze(-1)
            for name, leaf in named_leaves(self.factors).items()
        }
        noise = leaf_noise(self.precision, indices, seed)
        along = [project(noise[name].to(dtype), leaf) for name, leaf in whitened.items() if leaf.numel()]
        if along:
            lower = root_of_capacitance(ravel_columns(whitened, whitened))
            identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
            right = torch.linalg.solve_triangular(lower + identity, identity, upper=False)
            weight = torch.linalg.solve_triangular(lower.mT, right, upper=True).to(dtype)  # K
            coefficients = -rotate(functools.reduce(torch.add, along), weight)
            noise = {name: add_product(noise[name], coefficients, leaf) for name, leaf in whitened.items()}

        def deviate(name: str, precision: Tensor) -> Tensor:
            std = scale[name].to(precision.dtype)
            return torch.mul(noise[name], std, out=over(noise[name], std))

        return map_named(deviate, self.precision)

    def operator(self) -> Operator:
        """``(diag(precision) + F F^T)^-1``."""
        return Inverse(self._sum())

    def inverse(self) -> Operator:
        """``diag(precision) + F F^T``."""
        return self._sum()

    def singular(self) -> str | None:
        """Never."""
        return None

    def scaled(self, factor: float | Tensor) -> "LowRankPrecision":
        """The covariance times a positive number."""
        factor = positive_factor(factor)
        return LowRankPrecision(
            times_power(self.precision, factor, -1), times_power(self.factors, factor, -0.5)
        )

    def restricted(self, keep: Callable[[str, Tensor], bool]) -> "LowRankPrecision":
        """The marginal over the leaves ``a`` with ``keep(path, leaf)``, the rest ``b`` integrated out."""
        # The Schur complement of b in the precision is, by Woodbury's identity,
        #     D_a + F_a (I + F_b^T D_b^-1 F_b)^-1 F_a^T.
        kept = {name for name, leaf in named_leaves(self.like).items() if keep(name, leaf)}
        precision, factors = self._part(lambda name, leaf: name in kept)
        others = self._part(lambda name, leaf: name not in kept)
        if named_leaves(others[0]):
            lower = Sum(ravel(others[0], others[0]), ravel_columns(others[1], others[0])).root
            factors = map_leaves(lambda leaf: times_matrix(leaf, inverse_transpose(lower)), factors)
        return LowRankPrecision(precision, factors)

    def _part(self, keep: Callable[[str, Tensor], bool]) -> tuple[Params, Params]:
        return part(self.precision, self.like, keep), part(self.factors, self.like, keep)

    def _sum(self) -> Sum:
        return Sum(ravel(self.precision, self.like), ravel_columns(self.factors, self.like))
