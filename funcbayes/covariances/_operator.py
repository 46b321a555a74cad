"""Symmetric matrices ``(P, P)`` that are never formed: a diagonal and a product of factors, and inverses.

With ``A = diag(d) + F F^T`` and the capacitance ``C = I + F^T diag(1/d) F = L L^T``, ``F`` of ``(P, R)``,

    A^-1   = diag(1/d) - G G^T    with  G = diag(1/d) F L^-T          (Woodbury 1950)
    det(A) = det(C) prod(d)                                           (Sylvester 1851)

so that covariances and precisions of low rank are all a diagonal plus or minus a product of factors.

The difference cancels where ``F F^T`` is far larger than ``diag(d)``. So quadratic forms and diagonals of
inverses are sums of squares, never negative, with a relative error of some ``eps cond(C) + eps^2 |C|``. Only
the trace of an inverse of low rank times another such, or Kronecker blocks, is a difference still: its error
is relative to ``trace(diag(1/d) other)``, which may be larger.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_ROWS = 1 << 16  # of factors multiplied at a time, where the product would have more numbers than they


class Operator(ABC):
    """A symmetric positive definite matrix; vectors are columns ``(P, k)``."""

    @abstractmethod
    def times(self, columns: Tensor) -> Tensor:
        """``A columns``, ``(P, k)``."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """``(P,)``."""

    @abstractmethod
    def quadratic(self, columns: Tensor) -> Tensor:
        """``trace(columns^T A columns)``, a scalar."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """Log-determinant, a scalar."""

    def split(self) -> tuple[Tensor, Tensor, int] | None:
        """``d, F, sign`` with ``A = diag(d) + sign F F^T``; ``None`` if that would not be small."""
        return None

    def trace_with(self, other: "Operator") -> Tensor:
        """``trace(A other)`` for two matrices that do not :meth:`split`."""
        raise NotImplementedError(
            f"`kl` is not implemented between {type(self).__name__} and {type(other).__name__}."
        )


def trace_of_product(one: Operator, other: Operator) -> Tensor:
    """``trace(one other)``, a scalar."""
    splits = [(left, *parts) for left, right in ((one, other), (other, one)) if (parts := right.split())]
    if not splits:
        return one.trace_with(other)
    left, diagonal, factors, sign = max(splits, key=lambda split: split[-1])  # a sum if one of them is
    return (left.diagonal() * diagonal).sum() + sign * left.quadratic(factors)


@dataclass(frozen=True)
class Gram(Operator):
    """``F F^T``; its determinant is that of a triangular ``F``."""

    factors: Tensor

    def times(self, columns: Tensor) -> Tensor:
        """``A columns``, ``(P, k)``."""
        return self.factors @ (self.factors.mT @ columns)

    def diagonal(self) -> Tensor:
        """``(P,)``."""
        return self.factors.square().sum(-1)

    def quadratic(self, columns: Tensor) -> Tensor:
        """``trace(columns^T A columns)``, a scalar."""
        return (self.factors.mT @ columns).square().sum()

    def logdet(self) -> Tensor:
        """Log-determinant, a scalar."""
        return 2 * self.factors.diagonal().abs().log().sum()

    def split(self) -> tuple[Tensor, Tensor, int]:
        """``d, F, sign`` with ``A = diag(d) + sign F F^T``."""
        return self.factors.new_zeros(len(self.factors)), self.factors, 1


@dataclass(frozen=True)
class Sum(Operator):
    """``diag(d) + F F^T``."""

    d: Tensor
    factors: Tensor

    def times(self, columns: Tensor) -> Tensor:
        """``A columns``, ``(P, k)``."""
        return self.d.unsqueeze(-1) * columns + self.factors @ (self.factors.mT @ columns)

    def diagonal(self) -> Tensor:
        """``(P,)``."""
        return self.d + self.factors.square().sum(-1)

    def quadratic(self, columns: Tensor) -> Tensor:
        """``trace(columns^T A columns)``, a scalar."""
        along = (self.factors.mT @ columns).square().sum()
        return (self.d.unsqueeze(-1) * columns.square()).sum() + along

    def logdet(self) -> Tensor:
        """Log-determinant, a scalar."""
        return self.d.log().sum() + 2 * self.root.diagonal().log().sum()

    def split(self) -> tuple[Tensor, Tensor, int]:
        """``d, F, sign`` with ``A = diag(d) + sign F F^T``."""
        return self.d, self.factors, 1

    @functools.cached_property
    def root(self) -> Tensor:
        """Cholesky factor ``L`` of the capacitance."""
        return root_of_capacitance(self.factors / self.d.sqrt().unsqueeze(-1))


@dataclass(frozen=True)
class Inverse(Operator):
    """``(diag(d) + F F^T)^-1``."""

    of: Sum

    def times(self, columns: Tensor) -> Tensor:
        """``A columns``, ``(P, k)``."""
        return self._fit(columns)[1] / self.of.d.unsqueeze(-1)

    def diagonal(self) -> Tensor:
        """``(P,)``."""
        d, (_, factors, _) = self.of.d, self.split()
        leverage = factors.square().sum(-1) * d
        diagonal = (1 - leverage) / d
        # Leverages are from 0 to 1 and sum to at most R: fewer than 2 R exceed a half, where this cancels.
        rows = leverage.detach().topk(min(2 * factors.shape[-1], len(d))).indices
        return diagonal.scatter(0, rows, self._diagonal_at(rows)) if len(rows) else diagonal

    def quadratic(self, columns: Tensor) -> Tensor:
        """``trace(columns^T A columns)``, a scalar."""
        # v^T A^-1 v = min_x sum (v - F x)^2 / d + |x|^2, where Woodbury's difference would cancel.
        along, across = self._fit(columns)
        return (across.square() / self.of.d.unsqueeze(-1)).sum() + along.square().sum()

    def logdet(self) -> Tensor:
        """Log-determinant, a scalar."""
        return -self.of.logdet()

    def split(self) -> tuple[Tensor, Tensor, int]:
        """``d, F, sign`` with ``A = diag(d) + sign F F^T``."""
        factors = (self.of.factors / self.of.d.unsqueeze(-1)) @ inverse_transpose(self.of.root)
        return 1 / self.of.d, factors, -1

    def _diagonal_at(self, rows: Tensor) -> Tensor:
        """Entries of the diagonal as quadratic forms of unit vectors, in blocks of rows of ``F``."""
        d, factors = self.of.d, self.of.factors
        along = torch.cholesky_solve((factors[rows] / d[rows].unsqueeze(-1)).mT, self.of.root)
        total = along.square().sum(0)
        numbers = torch.arange(len(d), device=d.device).unsqueeze(-1)
        for number, scale, block in zip(
            *(whole.split(_BLOCK_ROWS) for whole in (numbers, d.unsqueeze(-1), factors)), strict=True
        ):
            across = (number == rows).to(d.dtype) - block @ along
            total = total + (across.square() / scale).sum(0)
        return total

    def _fit(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The minimiser ``x = C^-1 F^T (v / d)``, and ``v - F x``, which is ``d A^-1 v``."""
        factors = self.of.factors
        along = torch.cholesky_solve(factors.mT @ (columns / self.of.d.unsqueeze(-1)), self.of.root)
        return along, columns - factors @ along


def capacitance(whitened: Tensor) -> Tensor:
    """``I + M^T M``, ``(R, R)``."""
    identity = torch.eye(whitened.shape[-1], dtype=whitened.dtype, device=whitened.device)
    return identity + whitened.mT @ whitened


def root_of_capacitance(whitened: Tensor) -> Tensor:
    """Lower Cholesky factor of ``I + M^T M``, ``(R, R)``."""
    try:
        return torch.linalg.cholesky(capacitance(whitened))
    except torch.linalg.LinAlgError as err:
        raise RuntimeError(
            "The diagonal part is lost in rounding beside the factors of low rank, which are far larger and "
            "linearly dependent. A larger diagonal part, or fewer factors, helps."
        ) from err


def inverse_transpose(lower: Tensor) -> Tensor:
    """``L^-T`` of a triangular matrix."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.mT, identity, upper=True)
