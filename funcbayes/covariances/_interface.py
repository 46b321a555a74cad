"""What a covariance structure can do."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params


class Covariance(ABC):
    """Covariance of a Gaussian over the parameters of a tree.

    Trees passed in and out have the parameters of the mean, and no ``Fixed`` leaves.
    """

    @abstractmethod
    def deviations(self, indices: Tensor, seed: Seed) -> Params:
        """Draw deviations from the mean.

        Args:
            indices: Draw numbers, int64 ``(S,)``.
            seed: Draw ``i`` depends on the covariance, ``seed`` and ``i`` alone.

        Returns:
            Leaves ``(S, *s)``.
        """

    @abstractmethod
    def diagonal(self) -> Params:
        """Variance of each parameter, leaves ``s``."""

    @abstractmethod
    def matvec(self, vector: Params) -> Params:
        """Multiply the covariance with a tree."""

    @abstractmethod
    def solve(self, vector: Params) -> Params:
        """Multiply the inverse covariance, the precision, with a tree."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """Log-determinant of the covariance over all parameters, a scalar."""

    @abstractmethod
    def quadratic_form(self, vector: Params) -> Tensor:
        """``v^T precision v``, summed over all parameters, a scalar."""


def total(terms: list[Tensor]) -> Tensor:
    """Sum of scalars, 0 if there are none."""
    return torch.stack(terms).sum() if terms else torch.zeros(())
