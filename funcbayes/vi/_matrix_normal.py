"""Correlations between the rows, and between the columns, of each leaf."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, map_named, named_leaves, pytree_dataclass
from ..covariances import Covariance, Kronecker
from ..covariances._flat import as_double
from ..covariances._kronecker import Blocks, as_matrix, between, sides, total, transposed, tree_like
from ..covariances._noise import leaf_noise
from ..covariances._operator import Operator
from ._scale import Scale
from ._state import VariationalState, raw_of_identity, triangular


@pytree_dataclass
class MatrixNormalState(VariationalState):
    """A matrix normal for each leaf, independent between leaves: Louizos & Welling (2016), section 3.1.

    A leaf is seen as a matrix ``(d_out, d_in)``, its first axis and all others; leaves with one axis, or
    none, have ``d_in = 1``. A draw is ``M + A Z B^T`` with lower triangular ``A`` and ``B``, so that the
    covariance of the leaf is ``A A^T (x) B B^T``.

    Attributes:
        mean: ``M``, leaves ``s``.
        outputs: ``A`` of each leaf, as :func:`~funcbayes.vi._state.triangular` takes it, ``(d_out, d_out)``.
        inputs: ``B`` likewise, ``(d_in, d_in)``, of leaves with at least two axes, by path.
    """

    mean: Params
    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]

    @classmethod
    def around(cls, mean: Params, scale: float) -> "MatrixNormalState":
        """All parameters independent, with one standard deviation."""
        outputs, inputs = {}, {}
        for name, leaf in named_leaves(mean).items():
            rows, columns = sides(leaf)
            # The scale is that of A times that of B; where both are there, they share it.
            each = scale if leaf.ndim < 2 else scale**0.5
            outputs[name] = raw_of_identity(rows, each, leaf)
            if leaf.ndim >= 2:
                inputs[name] = raw_of_identity(columns, each, leaf)
        return cls(mean, outputs, inputs)

    def scale(self) -> "Roots":
        """The roots of both sides."""
        outputs, inputs = (
            {name: triangular(raw) for name, raw in side.items()} for side in (self.outputs, self.inputs)
        )
        return Roots(self.mean, outputs, inputs)


@dataclass(frozen=True)
class Roots(Scale):
    """Triangular roots ``A`` and ``B`` of each leaf, by path; ``B`` of leaves with at least two axes."""

    mean: Params
    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]

    def draws(self, indices: Tensor, seed: Seed) -> Params:
        """``M + A Z B^T``, leaves ``(S, *s)``."""
        noise = leaf_noise(self.mean, indices, seed)

        def drawn(name: str, mean: Tensor) -> Tensor:
            left, right = self.of(name)
            deviation = between(left, as_matrix(noise[name], 1).to(left.dtype), transposed(right))
            return mean + deviation.reshape(noise[name].shape).to(mean.dtype)

        return map_named(drawn, self.mean)

    def squared_distance(self, deviation: Mapping[str, Tensor]) -> Tensor:
        """``sum |A^-1 D B^-T|^2`` over leaves, a scalar."""
        terms = []
        for name in named_leaves(self.mean):
            left, right = self.of(name)
            values = as_matrix(deviation[name]).to(left.dtype)
            values = torch.linalg.solve_triangular(left, values, upper=False)
            if right is not None:
                values = torch.linalg.solve_triangular(right, values.mT, upper=False)
            terms.append(values.square().sum().to(self.dtype))
        return total(terms)

    def logdet(self) -> Tensor:
        """``2 sum (d_in log det A + d_out log det B)``, a scalar."""
        return self.operator().logdet().to(self.dtype)

    def variance(self) -> Params:
        """Products of the squared lengths of the rows of ``A`` and of ``B``, leaves ``s``."""

        def found(name: str, leaf: Tensor) -> Tensor:
            return spread(*self.of(name)).reshape(leaf.shape).to(leaf.dtype)

        return map_named(found, self.mean)

    def operator(self) -> "RootBlocks":
        """The blocks ``A A^T (x) B B^T``."""
        return RootBlocks(
            tuple(
                (as_double(left), None if right is None else as_double(right))
                for left, right in map(self.of, named_leaves(self.mean))
            )
        )

    def covariance(self) -> Covariance:
        """A :class:`~funcbayes.covariances.Kronecker` one."""
        variance: dict[str, Tensor] = {}
        output_basis: dict[str, Tensor] = {}
        input_basis: dict[str, Tensor | None] = {}
        for name, leaf in named_leaves(self.mean).items():
            left, right = self.of(name)
            # Of a root, not of its square, whose condition is the square.
            output_basis[name], values, _ = torch.linalg.svd(left)
            eigenvalues, input_basis[name] = values.square(), None
            if right is not None:
                input_basis[name], values, _ = torch.linalg.svd(right)
                eigenvalues = torch.outer(eigenvalues, values.square())
            variance[name] = eigenvalues.reshape(leaf.shape).to(leaf.dtype)
        return Kronecker(*(tree_like(self.mean, found) for found in (variance, output_basis, input_basis)))

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The roots of one leaf."""
        return self.outputs[name], self.inputs.get(name)


def spread(left: Tensor, right: Tensor | None) -> Tensor:
    """The diagonal of ``A A^T (x) B B^T``, as ``(d_out, d_in)``, or ``(d_out,)`` without ``B``."""
    lengths = left.square().sum(-1)
    return lengths if right is None else torch.outer(lengths, right.square().sum(-1))


@dataclass(frozen=True)
class RootBlocks(Operator):
    """A block-diagonal matrix with blocks ``A A^T (x) B B^T``; ``B`` of one is ``None``."""

    roots: tuple[tuple[Tensor, Tensor | None], ...]

    def times(self, columns: Tensor) -> Tensor:
        """``S columns``, ``(P, k)``."""
        products = []
        for left, right, rows in self._rows(columns):
            inner = between(left.mT, rows, right)
            products.append(between(left, inner, transposed(right)).flatten(1).mT)
        return torch.cat(products)

    def diagonal(self) -> Tensor:
        """``(P,)``."""
        return torch.cat([spread(left, right).flatten() for left, right in self.roots])

    def quadratic(self, columns: Tensor) -> Tensor:
        """``trace(columns^T S columns)``, a scalar."""
        return total(
            [between(left.mT, rows, right).square().sum() for left, right, rows in self._rows(columns)]
        )

    def logdet(self) -> Tensor:
        """Log-determinant, a scalar."""
        terms = []
        for left, right in self.roots:
            terms.append((1 if right is None else len(right)) * left.diagonal().log().sum())
            if right is not None:
                terms.append(len(left) * right.diagonal().log().sum())
        return 2 * total(terms)

    def trace_with(self, other: Operator) -> Tensor:
        """``trace(S other)``: eigenvalues of the other, weighted by how far ``S`` spreads along them."""
        if not isinstance(other, Blocks):
            return super().trace_with(other)
        terms = []
        for (left, right), block in zip(self.roots, other.blocks, strict=True):
            outputs = between(transposed(block.outputs), left, None).square().sum(-1)
            inputs = left.new_ones(1)
            if right is not None:
                inputs = between(transposed(block.inputs), right, None).square().sum(-1)
            terms.append((block.eigenvalues * torch.outer(outputs, inputs)).sum())
        return total(terms)

    def _rows(self, columns: Tensor) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        """Roots, and columns as rows of matrices ``(k, d_out, d_in)``."""
        shapes = [(len(left), 1 if right is None else len(right)) for left, right in self.roots]
        parts = columns.split([rows * width for rows, width in shapes])
        return [
            (left, right, part.mT.reshape(-1, *shape))
            for (left, right), shape, part in zip(self.roots, shapes, parts, strict=True)
        ]
