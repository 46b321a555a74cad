"""Sums over rows and columns of what each structure keeps of the gradients."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .._jacobian import RowGradients
from .._jacobian._gradients import BLOCK_BYTES, Looked, Outer, positions_are_last

Shapes = Mapping[str, torch.Size]
WeightSharing = Literal["expand", "reduce"]
_PANEL = 1024  # rows of a matrix (P, P) that are added to at a time
_ROWS_BYTES = 128 << 20  # bytes of the gradients whose products are added to it at a time


class Sums(ABC):
    """What is added up while the data are gone through; every result has members first.

    Attributes:
        nbytes: Bytes of gradients that may be formed at a time.
    """

    nbytes: int = BLOCK_BYTES

    @abstractmethod
    def add(self, gradients: Mapping[str, RowGradients], is_first: bool) -> None:
        """Take in the gradients of a block of rows for some columns; whether these are its first."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether all sums are finite."""


class DiagSums(Sums):
    """Sums of squares, ``(M, d_out, d_in)`` by leaf."""

    def __init__(self, shapes: Shapes, members: int, like: Mapping[str, Tensor]) -> None:
        self.found = {name: _zeros(like[name], members, *_sides(shape)) for name, shape in shapes.items()}

    def add(self, gradients: Mapping[str, RowGradients], is_first: bool) -> None:
        """Take in a block."""
        del is_first
        for name, gradient in gradients.items():
            self.found[name] += gradient.sum_of_squares(self.nbytes)

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return _all_finite(self.found.values())


class KronSums(Sums):
    """Factors of Kronecker products."""

    def __init__(
        self,
        shapes: Shapes,
        members: int,
        like: Mapping[str, Tensor],
        looked: Sequence[str],
        sharing: WeightSharing,
    ) -> None:
        sides = {name: _sides(shape) for name, shape in shapes.items()}
        self.sharing = sharing
        self.outputs = {
            name: _zeros(like[name], members, d) if name in looked else _zeros(like[name], members, d, d)
            for name, (d, _) in sides.items()
        }
        self.inputs = {name: _zeros(like[name], members, d, d) for name, (_, d) in sides.items()}
        self.counts = {name: _zeros(like[name], members) for name in shapes}

    def add(self, gradients: Mapping[str, RowGradients], is_first: bool) -> None:
        """Take in a block."""
        moments: _Moments = {}
        for name, gradient in gradients.items():
            if isinstance(gradient, Outer):
                self._add_outer(name, gradient, is_first, moments)
            elif isinstance(gradient, Looked):
                self._add_looked(name, gradient, is_first)
            else:
                self._add_formed(name, gradient, is_first)

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return _all_finite([*self.outputs.values(), *self.inputs.values()])

    def _add_outer(self, name: str, gradient: Outer, is_first: bool, moments: "_Moments") -> None:
        """Take in outer products; ``moments`` are those of sides that were seen, by their identity."""
        left, right = gradient.left, gradient.right
        if self.sharing == "reduce":
            # Eschenhagen et al. (2023), eq. 22: inputs averaged over positions, gradients summed.
            left = left.sum(4, keepdim=True) if gradient.is_left_gradient else left.mean(4, keepdim=True)
            if right is not None:
                right = (
                    right.mean(4, keepdim=True) if gradient.is_left_gradient else right.sum(4, keepdim=True)
                )
        if right is None:  # a bias: its input is 1
            if left.shape[3] > 1:
                left = left.movedim(-2, 3).flatten(4).unsqueeze(3)
            self.outputs[name] += _moments_once(left, moments)[:, 0]
            if is_first:
                self._count(name, left.shape[2] * left.shape[4], ones=True)
            return
        # Layers in groups share their weights in no way, but groups are positions, too: a gradient is that of
        # its group and 0 elsewhere, which makes the factor of the first axis block-diagonal.
        if is_first or gradient.is_left_gradient:
            self.outputs[name] += _block_diagonal(_moments_once(left, moments))
        if is_first or not gradient.is_left_gradient:
            self.inputs[name] += _moments(right).sum(1)
        if is_first:
            self._count(name, left.shape[2] * left.shape[3] * left.shape[4])

    def _add_looked(self, name: str, gradient: Looked, is_first: bool) -> None:
        values = gradient.gradients.movedim(0, 1).flatten(1, 3)  # (M, K N T, D)
        self.inputs[name] += values.mT @ values
        if is_first:
            tokens = gradient.tokens.flatten(1)
            inputs = torch.ones_like(tokens, dtype=self.outputs[name].dtype)
            if gradient.padding is not None:  # is no input
                inputs[tokens == gradient.padding] = 0
            self.outputs[name].scatter_add_(1, tokens, inputs)
            self._count(name, inputs.sum(1))

    def _add_formed(self, name: str, gradient: RowGradients, is_first: bool) -> None:
        if len(gradient.shape) < 2:  # the block itself
            for part in gradient.pieces(self.nbytes):
                values = part.matrices().flatten(1, 2).flatten(2)
                self.outputs[name] += values.mT @ values
            if is_first:
                self._count(name, gradient.counts[1], ones=True)
            return
        # A matrix that is used in some other way than a layer's has no inputs to tell apart. The Kronecker
        # product of its partial traces has the right trace, and is exact for a single outer product.
        for part in gradient.pieces(self.nbytes):
            values = part.matrices().flatten(1, 2)  # (M, N K, d_out, d_in)
            if self.outputs[name].ndim == 2:  # of a table that is looked up in other batches
                self.outputs[name] += values.square().sum((1, 3))
            else:
                self.outputs[name] += torch.einsum("mnoi,mnpi->mop", values, values)
            self.inputs[name] += torch.einsum("mnoi,mnoj->mij", values, values)
            self.counts[name] += values.square().sum((1, 2, 3))

    def _count(self, name: str, number: int | Tensor, *, ones: bool = False) -> None:
        self.counts[name] += number
        if ones:
            self.inputs[name] += number


class TurnedSums(Sums):
    """Sums of squares in given bases, ``(M, d_out, d_in)`` by leaf."""

    def __init__(
        self,
        shapes: Shapes,
        members: int,
        like: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
    ) -> None:
        self.found = {name: _zeros(like[name], members, *_sides(shape)) for name, shape in shapes.items()}
        self.outputs, self.inputs = outputs, inputs

    def add(self, gradients: Mapping[str, RowGradients], is_first: bool) -> None:
        """Take in a block."""
        del is_first
        for name, gradient in gradients.items():
            for part in gradient.pieces(self.nbytes):
                turned = part.turned(self.outputs.get(name), self.inputs.get(name))
                self.found[name] += turned.sum_of_squares(self.nbytes)

    def is_finite(self) -> bool:
        """Whether all sums are finite."""
        return _all_finite(self.found.values())


class FullSums(Sums):
    """The whole matrix, ``(M, P, P)``; its lower triangle is filled in at the end."""

    def __init__(self, shapes: Shapes, members: int, like: Mapping[str, Tensor]) -> None:
        self.shapes = shapes
        size = sum(shape.numel() for shape in shapes.values())
        first = next(iter(like.values()))
        self.found = _zeros(first, members, size, size)

    def add(self, gradients: Mapping[str, RowGradients], is_first: bool) -> None:
        """Take in a block."""
        del is_first
        if not gradients:
            return
        members, count, columns = next(iter(gradients.values())).counts
        each = members * columns * self.found.shape[-1] * self.found.element_size()
        size = max(_ROWS_BYTES // max(each, 1), 1)
        for start in range(0, count, size):
            self._add_rows({n: g.rows(slice(start, start + size)) for n, g in gradients.items()})

    def _add_rows(self, gradients: Mapping[str, RowGradients]) -> None:
        members, count, columns = next(iter(gradients.values())).counts
        parts = [
            gradients[name].matrices().flatten(3).flatten(1, 2)
            if name in gradients
            else self.found.new_zeros(members, count * columns, shape.numel())
            for name, shape in self.shapes.items()
        ]
        for matrix, rows in zip(self.found, torch.cat(parts, -1).to(self.found), strict=True):
            for start in range(0, len(matrix), _PANEL):
                matrix[start : start + _PANEL, start:].addmm_(
                    rows[:, start : start + _PANEL].mT, rows[:, start:]
                )

    def is_finite(self) -> bool:
        """Whether the diagonal is finite, beside which no other entry can be larger."""
        return _all_finite([self.found.diagonal(0, 1, 2)])

    def symmetric(self) -> Tensor:
        """The matrix; overwrites what was summed."""
        for matrix in self.found:
            for start in range(0, len(matrix), _PANEL):
                stop = start + _PANEL
                block = matrix[start:stop, start:stop]
                block.copy_((block + block.mT) / 2)
                matrix[stop:, start:stop] = matrix[start:stop, stop:].mT
        return self.found


def _zeros(like: Tensor, *shape: int) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype, device=like.device)


def _sides(shape: torch.Size) -> tuple[int, int]:
    return shape[:1].numel(), shape[1:].numel()


_Moments = dict[int, tuple[Tensor, Tensor]]


def _moments_once(side: Tensor, found: _Moments) -> Tensor:
    """Moments of a side, which a weight and its bias share; that is held, so that its identity is its own."""
    if id(side) not in found:
        found[id(side)] = side, _moments(side)
    return found[id(side)][1]


def _moments(side: Tensor) -> Tensor:
    """``(K, M, N, G, T, w) -> (M, G, w, w)``: sums of products over columns, rows and positions."""
    values = side.movedim((1, 3), (0, 1))  # (M, G, K, N, T, w)
    positions, width = side.shape[-2:]
    if positions_are_last(side) and len(side) > 1 and width <= 2 * positions:
        values = values.flatten(2, 3).mT
        return (values @ values.mT).sum(2)  # a matrix a row costs less than turning all of them round
    if positions_are_last(side):
        values = values.movedim(-1, 2).flatten(3)
        return values @ values.mT
    values = values.flatten(2, 4)
    return values.mT @ values


def _block_diagonal(blocks: Tensor) -> Tensor:
    """``(M, G, w, w) -> (M, G w, G w)``."""
    if blocks.shape[1] == 1:
        return blocks[:, 0]
    return torch.stack([torch.block_diag(*of_member) for of_member in blocks])


def _all_finite(sums: Iterable[Tensor]) -> bool:
    some = [total for total in sums if total.numel()]
    if not some:
        return True
    largest = torch._foreach_norm(some, math.inf)
    return bool(torch.stack([norm.double() for norm in largest]).isfinite().all())
