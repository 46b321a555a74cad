"""Independent parameters, and a few directions in which all of them vary together."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._random import Seed, fold
from .._tree import Params, map_leaves, map_named, named_leaves, pytree_dataclass
from ..covariances import Covariance, LowRankPlusDiagonal
from ..covariances._flat import ravel, ravel_columns
from ..covariances._noise import add_product, leaf_noise, shared_noise
from ..covariances._operator import Operator, Sum, capacitance
from ._scale import Scale
from ._state import VariationalState, softplus_inverse


@pytree_dataclass
class LowRankState(VariationalState):
    """The covariance ``diag(softplus(rho)^2) + F F^T``, Ong, Nott & Smith (2018), section 3.

    Attributes:
        mean: Location, leaves ``s``.
        rho: Standard deviations of the diagonal part are ``softplus(rho)``, leaves ``s``.
        factors: ``F``, in units of the parameter, leaves ``(*s, R)``.
    """

    mean: Params
    rho: Params
    factors: Params

    @classmethod
    def around(cls, mean: Params, scale: float, rank: int, seed: Seed) -> "LowRankState":
        """All parameters with one standard deviation on average, half of the variance in the factors."""
        # Zero factors would be a saddle point: there the gradient in them is zero in expectation.
        half = scale * 0.5**0.5
        rho = map_leaves(lambda leaf: softplus_inverse(torch.full_like(leaf, half)), mean)
        columns = leaf_noise(mean, torch.arange(rank), fold(seed, "vi.init"))
        factors = map_named(lambda name, _: columns[name].movedim(0, -1) * (half / rank**0.5), mean)
        return cls(mean, rho, factors)

    def scale(self) -> "DiagonalAndFactors":
        """Standard deviations, and factors."""
        return DiagonalAndFactors(self.mean, map_leaves(F.softplus, self.rho), self.factors)


@dataclass(frozen=True)
class DiagonalAndFactors(Scale):
    """Standard deviations of the diagonal part, leaves ``s``, and factors, leaves ``(*s, R)``."""

    mean: Params
    std: Params
    factors: Params

    def draws(self, indices: Tensor, seed: Seed) -> Params:
        """``mean + std z1 + F z2`` with one ``z2`` for all leaves, leaves ``(S, *s)``."""
        own, factors = leaf_noise(self.mean, indices, seed), named_leaves(self.factors)
        shared = shared_noise(self.mean, next(iter(factors.values())).shape[-1], indices, seed)
        std = named_leaves(self.std)

        def drawn(name: str, mean: Tensor) -> Tensor:
            return add_product(torch.addcmul(mean, own[name], std[name]), shared, factors[name])

        return map_named(drawn, self.mean)

    def squared_distance(self, deviation: Mapping[str, Tensor]) -> Tensor:
        """``d^T S^-1 d``, a scalar."""
        vector, whole = ravel(dict(deviation), self.mean), self._sum()
        # min_x |(d - F x) / std|^2 + |x|^2, a sum of squares where Woodbury's difference would cancel.
        along = torch.cholesky_solve(whole.factors.mT @ (vector / whole.d).unsqueeze(-1), whole.root)
        across = vector - (whole.factors @ along).squeeze(-1)
        return ((across.square() / whole.d).sum() + along.square().sum()).to(self.dtype)

    def logdet(self) -> Tensor:
        """Log-determinant, a scalar."""
        return self._sum().logdet().to(self.dtype)

    def variance(self) -> Params:
        """``std^2`` plus the squared lengths of the rows of ``F``, leaves ``s``."""
        factors = named_leaves(self.factors)
        return map_named(lambda name, std: std.square() + factors[name].square().sum(-1), self.std)

    def operator(self) -> Operator:
        """``diag(std^2) + F F^T``."""
        return self._sum()

    def covariance(self) -> Covariance:
        """A :class:`~funcbayes.covariances.LowRankPlusDiagonal` one."""
        variance = map_leaves(torch.square, self.std)
        return LowRankPlusDiagonal(variance, map_leaves(torch.clone, self.factors))

    def _sum(self) -> "_SumInTraining":
        variance = map_leaves(torch.square, self.std)
        return _SumInTraining(ravel(variance, self.mean), ravel_columns(self.factors, self.mean))


@dataclass(frozen=True)
class _SumInTraining(Sum):
    """A sum whose root is not a number where there is none: the ELBO then says in which step that was."""

    @functools.cached_property
    def root(self) -> Tensor:
        root, failed = torch.linalg.cholesky_ex(capacitance(self.factors / self.d.sqrt().unsqueeze(-1)))
        return torch.where(failed > 0, torch.nan, root)
