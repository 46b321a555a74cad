"""How far a Gaussian spreads, in numbers that mean something: what a state's raw numbers are turned into."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, named_leaves
from ..covariances import Covariance
from ..covariances._flat import at_least_single, dtype_of
from ..covariances._operator import Operator


class Scale(ABC):
    """A root of the covariance ``S`` of a Gaussian, differentiable in what it was made of.

    Attributes:
        mean: Location, leaves of any shape ``s``.
    """

    mean: Params

    @abstractmethod
    def draws(self, indices: Tensor, seed: Seed) -> Params:
        """Draw parameters, leaves ``(S, *s)``.

        Args:
            indices: Draw numbers, int64 ``(S,)``; draw ``i`` depends on the Gaussian, ``seed`` and ``i``
                alone.
            seed: Int, or int64 scalar tensor.
        """

    @abstractmethod
    def squared_distance(self, deviation: Mapping[str, Tensor]) -> Tensor:
        """``d^T S^-1 d`` for a deviation by path, leaves ``s``, a scalar."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """Log-determinant of ``S``, a scalar."""

    @abstractmethod
    def variance(self) -> Params:
        """Variance of each parameter, leaves ``s``."""

    @abstractmethod
    def operator(self) -> Operator:
        """``S`` as a matrix ``(P, P)``."""

    @abstractmethod
    def covariance(self) -> Covariance:
        """``S`` as a posterior has it."""

    def log_prob(self, params: Params) -> Tensor:
        """Log density of one value of the parameters, leaves ``s``, a scalar."""
        given = named_leaves(params)
        deviation = {name: given[name] - leaf for name, leaf in named_leaves(self.mean).items()}
        constant = self.num_params * math.log(2 * math.pi)
        return -0.5 * (self.squared_distance(deviation) + self.logdet() + constant)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, a scalar: ``1/2 [P (1 + log 2 pi) + logdet S]``."""
        return 0.5 * (self.num_params * (1 + math.log(2 * math.pi)) + self.logdet())

    @property
    def num_params(self) -> int:
        """``P``."""
        return sum(leaf.numel() for leaf in named_leaves(self.mean).values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that sums over parameters are found in."""
        return at_least_single(dtype_of(self.mean))
