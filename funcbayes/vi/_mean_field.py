"""Independent parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._random import Seed
from .._tree import Params, map_leaves, map_named, named_leaves, pytree_dataclass, select, tensors
from ..covariances import Covariance, Diagonal
from ..covariances._flat import as_double, unravel
from ..covariances._noise import leaf_noise
from ..covariances._operator import Operator, Sum
from ._scale import Scale
from ._state import VariationalState, softplus_inverse


@pytree_dataclass
class MeanFieldState(VariationalState):
    """Independent Gaussians, Blundell et al. (2015), section 3.2.

    Attributes:
        mean: Location, leaves ``s``.
        rho: Standard deviations are ``softplus(rho)``, leaves ``s``.
    """

    mean: Params
    rho: Params

    @classmethod
    def around(cls, mean: Params, scale: float) -> "MeanFieldState":
        """All parameters with one standard deviation."""
        return cls(mean, map_leaves(lambda leaf: softplus_inverse(torch.full_like(leaf, scale)), mean))

    def scale(self) -> "Independent":
        """Standard deviations."""
        mean, rho = (
            torch.cat([leaf.reshape(-1) for leaf in tensors(tree)]) for tree in (self.mean, self.rho)
        )
        std = F.softplus(rho)
        return Independent(self.mean, unravel(std, self.mean), mean, std)


@dataclass(frozen=True)
class Independent(Scale):
    """Standard deviations of independent parameters.

    Attributes:
        mean: Location, leaves ``s``.
        std: Leaves ``s``.
        flat_mean: The location of all leaves, ``(P,)``: one operation takes less time than one a leaf.
        flat_std: Likewise.
    """

    mean: Params
    std: Params
    flat_mean: Tensor
    flat_std: Tensor

    def draws(self, indices: Tensor, seed: Seed) -> Params:
        """``mean + std z``, leaves ``(S, *s)``."""
        return self.drawn(indices, seed, frozenset(named_leaves(self.mean)))

    def drawn(self, indices: Tensor, seed: Seed, names: frozenset[str]) -> Params:
        """The same draws of some of the leaves."""
        mean = select(self.mean, lambda name, _: name in names)
        noise, std = leaf_noise(mean, indices, seed), named_leaves(self.std)
        return map_named(lambda name, leaf: torch.addcmul(leaf, noise[name], std[name]), mean)

    def deviations(self, indices: Tensor, seed: Seed, names: frozenset[str]) -> dict[str, Tensor]:
        """``std z`` of some of the leaves by path, ``(S, *s)`` each: those of the same draws."""
        noise = leaf_noise(select(self.mean, lambda name, _: name in names), indices, seed)
        return {name: noise[name] * std for name, std in named_leaves(self.std).items() if name in names}

    def squared_distance(self, deviation: Mapping[str, Tensor]) -> Tensor:
        """``sum (d / std)^2``, a scalar."""
        leaves = named_leaves(self.std).items()
        terms = [(deviation[name] / std).to(self.dtype).square().sum() for name, std in leaves]
        return torch.stack(terms).sum()

    def logdet(self) -> Tensor:
        """``2 sum log std``, a scalar."""
        std = self.flat_std.to(self.dtype)
        return 2 * std.clamp_min(torch.finfo(self.dtype).tiny).log().sum()

    def variance(self) -> Params:
        """Variances, leaves ``s``."""
        return unravel(self.flat_std.square(), self.mean)

    def operator(self) -> Operator:
        """``diag(std^2)``."""
        variance = as_double(self.flat_std).square()
        return Sum(variance, variance.new_zeros(len(variance), 0))

    def covariance(self) -> Covariance:
        """A :class:`~funcbayes.covariances.Diagonal` one."""
        return Diagonal(map_leaves(torch.clone, self.variance()))
