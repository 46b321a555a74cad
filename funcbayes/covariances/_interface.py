"""What a covariance structure can do."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, difference, named_leaves
from ._flat import dtype_of, ravel, unravel
from ._operator import Operator


class Covariance(ABC):
    """Covariance of a Gaussian over the parameters of a tree.

    A structure says how it is sampled and gives its matrix and its inverse as an
    :class:`~funcbayes.covariances._operator.Operator`; everything else follows from these. Trees passed in
    and out have the parameters of the mean, and no ``Fixed`` leaves; results have their dtypes.
    """

    @abstractmethod
    def deviations(self, indices: Tensor, seed: Seed) -> Params:
        """Draw deviations from the mean.

        Args:
            indices: Draw numbers, int64 ``(S,)``.
            seed: Draw ``i`` depends on the covariance, ``seed`` and ``i`` alone.

        Returns:
            Leaves ``(S, *s)``, new tensors that the caller may overwrite.
        """

    @property
    @abstractmethod
    def like(self) -> Params:
        """Leaves ``s`` with the shapes and dtypes of the parameters; their numbers mean nothing."""

    @abstractmethod
    def operator(self) -> Operator:
        """The covariance as a matrix ``(P, P)``."""

    @abstractmethod
    def inverse(self) -> Operator:
        """The precision as a matrix ``(P, P)``.

        Raises:
            ValueError: If there is none.
        """

    @abstractmethod
    def singular(self) -> str | None:
        """Why there is no precision, in words; ``None`` if there is one, or its numbers cannot be seen."""

    @abstractmethod
    def scaled(self, factor: float | Tensor) -> Self:
        """The covariance times a positive number, of the same structure."""

    @abstractmethod
    def restricted(self, keep: Callable[[str, Tensor], bool]) -> Self:
        """The marginal over the leaves with ``keep(path, leaf)``, of the same structure."""

    def diagonal(self) -> Params:
        """Variance of each parameter, leaves ``s``."""
        return unravel(self.operator().diagonal(), self.like)

    def matvec(self, vector: Params) -> Params:
        """Multiply the covariance with a tree."""
        column = self._column(vector, "matvec")
        return unravel(self.operator().times(column).squeeze(-1), self.like)

    def solve(self, vector: Params) -> Params:
        """Multiply the inverse covariance, the precision, with a tree."""
        column = self._column(vector, "solve")
        return unravel(self.inverse().times(column).squeeze(-1), self.like)

    def quadratic_form(self, vector: Params) -> Tensor:
        """``v^T precision v``, summed over all parameters, a scalar."""
        column = self._column(vector, "quadratic_form")
        return self.inverse().quadratic(column).to(dtype_of(self.like))

    def logdet(self) -> Tensor:
        """Log-determinant of the covariance over all parameters, a scalar."""
        return -self.inverse().logdet().to(dtype_of(self.like))

    def to_dense(self) -> Tensor:
        """The matrix ``(P, P)``: leaves in the order of their sorted paths, each of them row-major."""
        size = sum(leaf.numel() for leaf in named_leaves(self.like).values())
        operator = self.operator()
        one = operator.diagonal()
        identity = torch.eye(size, dtype=one.dtype, device=one.device)
        return operator.times(identity).to(dtype_of(self.like))

    def _column(self, vector: Params, call: str) -> Tensor:
        differing = difference(vector, self.like)
        if differing:
            raise ValueError(f"`{call}(vector)` should have the leaves of the covariance; {differing}.")
        return ravel(vector, self.like).unsqueeze(-1)


def refuse_singular(covariance: Covariance) -> None:
    """Raise if there is no precision."""
    reason = covariance.singular()
    if reason:
        raise ValueError(
            f"`{type(covariance).__name__}` can be sampled but has no inverse and no determinant: {reason}. "
            "Leave certain parameters out of it, or give them a positive variance."
        )
