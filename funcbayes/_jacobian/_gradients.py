"""Gradients of one leaf, row by row and column by column, in the form in which a layer gives them.

A *column* is a cotangent of the outputs; there are ``K`` of them for each of ``N`` rows and ``M`` members.
The gradient of a leaf of ``P`` numbers is a matrix ``(K, P)`` a row, which is formed only where nothing else
will do: for a linear layer it is an outer product of an output gradient and an input, and sums of its
squares, or its products with a covariance, are products of small matrices.

All results are of the members first.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# A block of gradients that are formed has at most so many bytes.
BLOCK_BYTES = 32 << 20


class RowGradients(ABC):
    """Gradients of one leaf of shape ``s``, a matrix ``(d_out, d_in)``: its first axis, and all others.

    Attributes:
        shape: Shape ``s`` of the leaf.
    """

    shape: torch.Size

    @abstractmethod
    def rows(self, part: slice) -> "RowGradients":
        """The gradients of some of the rows."""

    @abstractmethod
    def columns(self, part: slice) -> "RowGradients":
        """The gradients for some of the columns."""

    @abstractmethod
    def matrices(self) -> Tensor:
        """All of them, ``(M, N, K, d_out, d_in)``, in memory of their own."""

    @property
    @abstractmethod
    def counts(self) -> tuple[int, int, int]:
        """``M, N, K``."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether what they are made of is finite."""

    def blocks(self, nbytes: int = BLOCK_BYTES) -> Iterator["RowGradients"]:
        """The gradients, so many rows at a time that :meth:`matrices` has some ``nbytes``."""
        members, num_rows, columns = self.counts
        each = max(members * columns * self.shape.numel() * 4, 1)
        size = max(nbytes // each, 1)
        for start in range(0, num_rows, size):
            yield self.rows(slice(start, start + size))

    def pieces(self, nbytes: int = BLOCK_BYTES) -> Iterator["RowGradients"]:
        """The same for sums over columns, too: if one row has more bytes, it has several pieces."""
        members, _, columns = self.counts
        size = max(nbytes // max(members * self.shape.numel() * 4, 1), 1)
        for block in self.blocks(nbytes):
            for start in range(0, columns, size):
                yield block if size >= columns else block.columns(slice(start, start + size))

    def sum_of_squares(self, nbytes: int = BLOCK_BYTES) -> Tensor:
        """Sum over rows and columns of the squared gradients, ``(M, d_out, d_in)``.

        Args:
            nbytes: Bytes of gradients that may be formed at a time.
        """
        return functools.reduce(
            torch.add, (piece.matrices().square_().sum((1, 2)) for piece in self.pieces(nbytes))
        )

    @abstractmethod
    def turned(self, outputs: Tensor | None, inputs: Tensor | None) -> "RowGradients":
        """``U^T gradient V``: in the basis of ``U`` ``(M, d_out, d_out)`` and ``V`` ``(M, d_in, d_in)``.

        ``None`` is an identity.
        """

    @abstractmethod
    def weighed(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Find ``A, B`` ``(M, N, K, R)`` with ``A B^T = gradient diag(variance) gradient^T`` in each row.

        ``A`` is ``B`` with its columns multiplied by numbers that are not negative.

        Args:
            variance: ``(M, d_out, d_in)``.
        """

    def variances(self, variance: Tensor) -> Tensor:
        """The diagonal of ``gradient diag(variance) gradient^T`` in each row, ``(M, N, K)``.

        Args:
            variance: ``(M, d_out, d_in)``.
        """
        weights = variance.flatten(1)[:, None, :, None]
        return torch.cat(
            [(part.matrices().square_().flatten(3) @ weights).squeeze(-1) for part in self.blocks()], 1
        )


@dataclass(frozen=True)
class Outer(RowGradients):
    """Sums of outer products over positions: ``sum_t left_t right_t^T``, as layers with a weight matrix have.

    Attributes:
        left: ``(K or 1, M, N, G, T, d_out / G)``, for the first axis of the leaf. Layers in ``G`` groups have
            a block for each, one after another on that axis.
        right: ``(K or 1, M, N, G, T, d_in)``, for the other axes; ``None`` for ones, as for a bias.
        shape: Shape of the leaf.
        is_left_gradient: Whether ``left`` is what depends on the columns.
    """

    left: Tensor
    right: Tensor | None
    shape: torch.Size
    is_left_gradient: bool = True

    @property
    def counts(self) -> tuple[int, int, int]:
        """``M, N, K``."""
        gradient = self.left if self.is_left_gradient or self.right is None else self.right
        return gradient.shape[1], gradient.shape[2], gradient.shape[0]

    def is_finite(self) -> bool:
        """Whether both sides are finite."""
        return all(bool(side.isfinite().all()) for side in (self.left, self.right) if side is not None)

    @property
    def num_positions(self) -> int:
        """``T``."""
        return self.left.shape[4]

    def rows(self, part: slice) -> "Outer":
        """The gradients of some of the rows."""
        right = None if self.right is None else self.right[:, :, part]
        return Outer(self.left[:, :, part], right, self.shape, self.is_left_gradient)

    def columns(self, part: slice) -> "Outer":
        """The gradients for some of the columns."""
        if self.is_left_gradient or self.right is None:
            return Outer(self.left[part], self.right, self.shape, self.is_left_gradient)
        return Outer(self.left, self.right[part], self.shape, self.is_left_gradient)

    def matrices(self) -> Tensor:
        """``(M, N, K, d_out, d_in)``."""
        members, num_rows, columns = self.counts
        if self.right is None:
            return self.left.sum(4).flatten(3).movedim(0, 2).unsqueeze(-1)
        groups, d_left, d_right = self.left.shape[3], self.left.shape[-1], self.right.shape[-1]
        if self.num_positions == 1 and groups == 1:
            left, right = (side[..., 0, 0, :].movedim(0, 2) for side in (self.left, self.right))
            return left.unsqueeze(-1) * right.unsqueeze(-2)  # (M, N, K, L, 1) * (M, N, K, 1, R)
        # Columns beside the width of their side, so that there is one product a row.
        left, right = _columns_inside(self.left), _columns_inside(self.right)
        sums = left.mT @ right  # (M, N, G, K L, R) or (M, N, G, L, K R)
        if self.is_left_gradient:
            sums = sums.unflatten(3, (columns, d_left))
        else:
            sums = sums.unflatten(4, (columns, d_right)).movedim(4, 3)
        return sums.movedim(3, 2).reshape(members, num_rows, columns, groups * d_left, d_right)

    def sum_of_squares(self, nbytes: int = BLOCK_BYTES) -> Tensor:
        """``(M, d_out, d_in)``."""
        if self.num_positions > 1 and self.right is not None:
            return super().sum_of_squares(nbytes)
        if self.right is None:
            return self._summed().square().sum((0, 2)).flatten(1).unsqueeze(-1)
        # Without a sum over positions squares of products are products of squares.
        left, right = (side[..., 0, :].square().sum(0) for side in (self.left, self.right))  # (M, N, G, .)
        sums = left.movedim(1, -1) @ right.movedim(1, 2)  # (M, G, L, N) @ (M, G, N, R)
        return sums.flatten(1, 2)

    def turned(self, outputs: Tensor | None, inputs: Tensor | None) -> RowGradients:
        """``U^T gradient V``."""
        if self.left.shape[3] > 1 or self._is_cheaper_formed():
            return Formed(self.matrices(), self.shape).turned(outputs, inputs)
        left, right = _once_for_rows(self.left), self.right
        if right is None and self.num_positions > 1:  # a bias: there are fewer sums than positions to turn
            left = left.sum(4, keepdim=True)
        if outputs is not None:
            left = _in_basis(left, outputs)
        if inputs is not None and right is not None:
            right = _in_basis(right, inputs)
        elif inputs is not None:  # (M, 1, 1)
            left = left * inputs[None, :, None, None]
        left = left.expand(-1, -1, self.left.shape[2], -1, -1, -1)
        return Outer(left, right, self.shape, self.is_left_gradient)

    def weighed(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """``(M, N, K, R)``, with ``R`` one side's width where there is one position."""
        if self.right is None:
            summed = self._summed().flatten(3).movedim(0, 2)
            return summed * variance.flatten(1)[:, None, None], summed
        if self.num_positions > 1:
            return _weighed(self.matrices(), variance)
        gradient, weights = self._apart(variance)
        gradient = gradient.flatten(3).movedim(0, 2)
        return gradient * weights.flatten(2).unsqueeze(2), gradient

    def variances(self, variance: Tensor) -> Tensor:
        """``(M, N, K)``."""
        if self.right is None:
            gradient, weights = _once_for_rows(self.left).sum(4), variance.movedim(2, 1)  # (M, 1, G L)
        elif self.num_positions > 1:
            return super().variances(variance)
        else:
            gradient, weights = self._apart(variance)
        squares = _once_for_rows(gradient).square().flatten(3).movedim(0, 2)  # (M, N or 1, K, .)
        weights = weights.flatten(2)  # (M, N or 1, .)
        if squares.shape[1] == 1:
            return (weights @ squares[:, 0].mT).expand(-1, self.left.shape[2], -1)
        return (squares @ weights.unsqueeze(-1)).squeeze(-1)

    def _summed(self) -> Tensor:
        """The left side, or its sum over positions: ``(K, M, N, G, d_out / G)``."""
        return self.left.squeeze(4) if self.num_positions == 1 else self.left.sum(4)

    def _apart(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient ``(K, M, N, G, .)`` and the variances of what it multiplies, ``(M, N, G, .)``.

        Only where there is one position.
        """
        # sum_oi (l_o r_i)^2 v_oi = sum_o l_o^2 (sum_i v_oi r_i^2): the side that all columns share goes
        # first.
        assert self.right is not None
        left, right = (side.squeeze(4) for side in (self.left, self.right))  # (K or 1, M, N, G, .)
        gradient, other = (left, right[0]) if self.is_left_gradient else (right, left[0])
        variance = variance.unflatten(1, (left.shape[3], -1))  # (M, G, L, R)
        variance = variance.mT if self.is_left_gradient else variance
        if variance.shape[1] == 1:
            return gradient, torch.bmm(other.squeeze(2).square(), variance.squeeze(1)).unsqueeze(2)
        return gradient, torch.einsum("mngo,mgoi->mngi", other.square(), variance)

    def _is_cheaper_formed(self) -> bool:
        """Whether there are more positions than numbers that the matrices of one row have, each a side."""
        if self.right is None or self.num_positions == 1:
            return False
        columns = self.counts[2]
        wide, other = (self.right, self.left) if self.is_left_gradient else (self.left, self.right)
        return self.num_positions > columns * other.shape[-1] and wide.shape[-1] > 1


@dataclass(frozen=True)
class Formed(RowGradients):
    """Gradients that are given as they are.

    Attributes:
        values: ``(M, N, K, d_out, d_in)``.
        shape: Shape of the leaf.
    """

    values: Tensor
    shape: torch.Size

    @property
    def counts(self) -> tuple[int, int, int]:
        """``M, N, K``."""
        return self.values.shape[0], self.values.shape[1], self.values.shape[2]

    def is_finite(self) -> bool:
        """Whether all are finite."""
        return bool(self.values.isfinite().all())

    def rows(self, part: slice) -> "Formed":
        """The gradients of some of the rows."""
        return Formed(self.values[:, part], self.shape)

    def columns(self, part: slice) -> "Formed":
        """The gradients for some of the columns."""
        return Formed(self.values[:, :, part], self.shape)

    def matrices(self) -> Tensor:
        """``(M, N, K, d_out, d_in)``."""
        return self.values.clone()

    def turned(self, outputs: Tensor | None, inputs: Tensor | None) -> "Formed":
        """``U^T gradient V``."""
        values = self.values
        if inputs is not None:
            values = product(values, inputs[:, None, None])
        if outputs is not None:
            values = product(outputs.mT[:, None, None], values)
        return Formed(values, self.shape)

    def weighed(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """``(M, N, K, P)``."""
        return _weighed(self.values, variance)


@dataclass(frozen=True)
class Looked(RowGradients):
    """Gradients of an embedding: rows of the table that were looked up, each with a gradient of its own.

    Attributes:
        tokens: Which rows, ``(M, N, T)``; one may occur several times in a row of data: see :func:`once`.
        gradients: ``(K, M, N, T, d_in)``.
        shape: Shape of the table.
        padding: A row of the table that has no gradients wherever it is looked up, if there is one.
    """

    tokens: Tensor
    gradients: Tensor
    shape: torch.Size
    padding: int | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """``M, N, K``."""
        return self.gradients.shape[1], self.gradients.shape[2], self.gradients.shape[0]

    def is_finite(self) -> bool:
        """Whether all are finite."""
        return bool(self.gradients.isfinite().all())

    def rows(self, part: slice) -> "Looked":
        """The gradients of some of the rows."""
        return Looked(self.tokens[:, part], self.gradients[:, :, part], self.shape, self.padding)

    def columns(self, part: slice) -> "Looked":
        """The gradients for some of the columns."""
        return Looked(self.tokens, self.gradients[part], self.shape, self.padding)

    def matrices(self) -> Tensor:
        """``(M, N, K, d_out, d_in)``."""
        members, num_rows, columns = self.counts
        values = self.gradients.movedim(0, 2)  # (M, N, K, T, D)
        places = self.tokens[:, :, None, :, None].expand(values.shape)
        table = values.new_zeros(members, num_rows, columns, *self.shape)
        return table.scatter_add_(3, places, values)

    def sum_of_squares(self, nbytes: int = BLOCK_BYTES) -> Tensor:
        """``(M, d_out, d_in)``."""
        values = once(self.tokens, self.gradients).square().sum(0).flatten(1, 2)  # (M, N T, D)
        table = values.new_zeros(values.shape[0], *self.shape)
        return table.scatter_add_(1, self.tokens.flatten(1)[..., None].expand(values.shape), values)

    def turned(self, outputs: Tensor | None, inputs: Tensor | None) -> RowGradients:
        """``U^T gradient V``."""
        if outputs is not None:
            return Formed(self.matrices(), self.shape).turned(outputs, inputs)
        gradients = self.gradients if inputs is None else product(self.gradients, inputs[:, None])
        return Looked(self.tokens, gradients, self.shape, self.padding)

    def weighed(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """``(M, N, K, T d_in)``."""
        members = torch.arange(len(variance), device=variance.device)[:, None, None]
        gradients = once(self.tokens, self.gradients)
        looked = variance[members, self.tokens]  # (M, N, T, D)
        return (gradients * looked).movedim(0, 2).flatten(3), gradients.movedim(0, 2).flatten(3)


def once(tokens: Tensor, gradients: Tensor) -> Tensor:
    """Gradients ``(K, M, N, T, D)`` of tokens that occur several times, added up at the first of them."""
    same = tokens.unsqueeze(-1) == tokens.unsqueeze(-2)  # (M, N, T, T)
    is_first = same.to(torch.uint8).argmax(-1) == torch.arange(tokens.shape[-1], device=tokens.device)
    return same.to(gradients.dtype) @ gradients * is_first.unsqueeze(-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, in the wider dtype of both."""
    a, b = in_one_dtype(a, b)
    return a @ b


def in_one_dtype(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _columns_inside(side: Tensor) -> Tensor:
    """``(K, M, N, G, T, w) -> (M, N, G, T, K w)``, in memory with positions where they are."""
    if positions_are_last(side):
        return side.movedim(0, 3).mT.flatten(3, 4).mT
    return side.movedim(0, -2).flatten(4)


def positions_are_last(side: Tensor) -> bool:
    """Whether the positions of ``(..., T, w)`` lie side by side in memory, as pixels do."""
    return side.shape[-2] > 1 and side.stride(-2) == 1


def _once_for_rows(side: Tensor) -> Tensor:
    """``(K, M, N, ...) -> (K, M, 1, ...)`` of what is the same in all rows, as units of the outputs are."""
    return side[:, :, :1] if side.stride(2) == 0 else side


def _in_basis(side: Tensor, basis: Tensor) -> Tensor:
    """``(K, M, N, G, T, w) @ (M, w, w)``."""
    if positions_are_last(side):
        return product(basis.mT[None, :, None, None], side.mT).mT
    if len(basis) == 1:
        side, basis = in_one_dtype(side, basis)
        return F.linear(side, basis[0].mT)
    values = side.movedim(1, 0)
    return product(values.flatten(1, 4), basis).unflatten(1, values.shape[1:5]).movedim(0, 1)


def _weighed(matrices: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    return (matrices * variance[:, None, None]).flatten(3), matrices.flatten(3)
