"""Correlations between all parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, map_leaves, map_named, named_leaves, pytree_dataclass
from ..covariances import Covariance, Dense
from ..covariances._flat import at_least_single, dtype_of
from ..covariances._noise import shared_noise
from ..covariances._operator import Gram, Operator
from ._scale import Scale
from ._state import VariationalState, raw_of_identity, triangular


@pytree_dataclass
class FullRankState(VariationalState):
    """The covariance ``L L^T`` with a lower triangular ``L``, Kucukelbir et al. (2017), section 2.4.

    Attributes:
        mean: Location, leaves ``s``.
        raw: A matrix ``(P, P)``, rows in the order of the leaves: below its diagonal are the entries of
            ``L``, whose diagonal is the softplus of its own; what is above has no effect.
    """

    mean: Params
    raw: Tensor

    @classmethod
    def around(cls, mean: Params, scale: float) -> "FullRankState":
        """All parameters independent, with one standard deviation."""
        leaves = named_leaves(mean)
        like = next(iter(leaves.values())).new_empty((), dtype=at_least_single(dtype_of(mean)))
        return cls(mean, raw_of_identity(sum(leaf.numel() for leaf in leaves.values()), scale, like))

    def scale(self) -> "Triangular":
        """The root."""
        return Triangular(self.mean, triangular(self.raw))


@dataclass(frozen=True)
class Triangular(Scale):
    """A lower triangular root ``L`` of the covariance, ``(P, P)``, rows in the order of the leaves."""

    mean: Params
    root: Tensor

    def draws(self, indices: Tensor, seed: Seed) -> Params:
        """``mean + L z`` with one ``z`` for all leaves, leaves ``(S, *s)``."""
        noise = shared_noise(self.mean, self.num_params, indices, seed).to(self.root.dtype)
        return map_leaves(torch.add, self.mean, self._tree(noise @ self.root.mT))

    def squared_distance(self, deviation: Mapping[str, Tensor]) -> Tensor:
        """``|L^-1 d|^2``, a scalar."""
        parts = [deviation[name].reshape(-1).to(self.root.dtype) for name in named_leaves(self.mean)]
        vector = torch.cat(parts).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.root, vector, upper=False).square().sum()

    def logdet(self) -> Tensor:
        """Twice the sum of the logarithms of the diagonal of ``L``, a scalar."""
        return 2 * self.root.diagonal(dim1=-2, dim2=-1).log().sum()

    def variance(self) -> Params:
        """Squared lengths of the rows of ``L``, leaves ``s``."""
        rows = self._tree(self.root.square().sum(-1).unsqueeze(0))
        return map_leaves(lambda leaf: leaf[0], rows)

    def operator(self) -> Operator:
        """``L L^T``."""
        return Gram(self.root)

    def covariance(self) -> Covariance:
        """A :class:`~funcbayes.covariances.Dense` one."""
        return Dense(map_leaves(lambda leaf: leaf.movedim(0, -1), self._tree(self.root.mT)))

    def _tree(self, rows: Tensor) -> Params:
        """``(S, P)`` as a tree with leaves ``(S, *s)``."""
        leaves = named_leaves(self.mean)
        parts = rows.split([leaf.numel() for leaf in leaves.values()], dim=-1)
        named = dict(zip(leaves, parts, strict=True))
        return map_named(
            lambda name, leaf: named[name].reshape(len(rows), *leaf.shape).to(leaf.dtype), self.mean
        )
