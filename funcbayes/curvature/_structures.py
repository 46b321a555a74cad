"""What a curvature is: a matrix over the parameters, of some structure."""

import functools
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tree import Params, difference, index, map_leaves, map_named, named_leaves, pytree_dataclass, stack
from ..covariances._flat import as_columns
from ..covariances._kronecker import eigen, tree_like
from ._data_term import DataTerm


class Curvature(ABC):
    """A second derivative of ``-log p(D | theta)`` in some leaves, **summed** over the data.

    Where the likelihood is ``Normal`` with one noise for all outputs, it is that of unit noise: noise is put
    in when a posterior is made, so that it can be chosen afterwards.

    Attributes:
        data: The log likelihood at the same parameters.
    """

    data: DataTerm

    @property
    @abstractmethod
    def leaves(self) -> dict[str, Tensor]:
        """A tensor for each covered leaf, by path, in the order of paths."""

    @abstractmethod
    def __add__(self, other: Any) -> Self:
        """The curvature of both data sets."""

    def __radd__(self, other: Any) -> Self:
        """Start a sum: ``sum(curvatures)`` is the curvature of all data sets."""
        if isinstance(other, int) and other == 0:
            return self
        return NotImplemented

    def _check_addend(self, other: object) -> None:
        if type(other) is not type(self):
            raise TypeError(
                f"Curvatures that are added should be of one structure, got {type(self).__name__} and "
                f"{type(other).__name__}."
            )
        assert isinstance(other, Curvature)
        differing = difference(other.leaves, self.leaves)
        if differing:
            raise ValueError(f"Curvatures that are added should cover the same leaves; {differing}.")


@pytree_dataclass
class Diag(Curvature):
    """The diagonal.

    Attributes:
        diagonal: Leaves ``s``, in one over squared units of the parameter.
        data: The log likelihood at the same parameters.
    """

    diagonal: Params
    data: DataTerm

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The diagonal by path."""
        return named_leaves(self.diagonal)

    def __add__(self, other: Any) -> "Diag":
        """The curvature of both data sets."""
        self._check_addend(other)
        return Diag(map_leaves(torch.add, self.diagonal, other.diagonal), self.data + other.data)


@pytree_dataclass
class Kron(Curvature):
    """A Kronecker product for each leaf: ``output_sum (x) input_sum / count``, KFAC (Martens & Grosse 2015).

    A leaf ``s`` is a matrix ``(d_out, d_in)``, its first axis and all others. Sums and counts are kept, so
    that curvatures of several data sets add up to that of all: ``grad_cov`` and ``input_cov`` are the factors
    as they are usually written. For layers that have their inputs on the first axis (embeddings, transposed
    convolutions) the two change places.

    Attributes:
        output_sum: Leaves ``(d_out, d_out)``, or ``(d_out,)`` where it is diagonal.
        input_sum: Leaves ``(d_in, d_in)``.
        count: Leaves ``()``.
        data: The log likelihood at the same parameters.
    """

    output_sum: Params
    input_sum: Params
    count: Params
    data: DataTerm

    @property
    def leaves(self) -> dict[str, Tensor]:
        """First factors by path."""
        return named_leaves(self.output_sum)

    @property
    def grad_cov(self) -> Params:
        """``G``, summed over the data: leaves ``(d_out, d_out)``."""
        return self.output_sum

    @property
    def input_cov(self) -> Params:
        """``A``, averaged: leaves ``(d_in, d_in)``."""
        return map_leaves(lambda total, count: total / _not_zero(count), self.input_sum, self.count)

    @functools.cached_property
    @torch.inference_mode(False)  # whoever asks first, it can be differentiated
    def eigen(self) -> "EigenKron":
        """The same in its eigenbasis, found once; eigenvalues that rounding made negative are 0."""
        outputs, inputs, counts = (named_leaves(t) for t in (self.output_sum, self.input_sum, self.count))
        values: dict[str, Tensor] = {}
        output_basis: dict[str, Tensor | None] = {}
        input_basis: dict[str, Tensor | None] = {}
        for name, matrix in outputs.items():
            along_outputs, output_basis[name] = eigen(matrix, matrix.dtype)
            along_inputs, input_basis[name] = eigen(inputs[name], matrix.dtype)
            values[name] = torch.outer(along_outputs, along_inputs) / _not_zero(counts[name])
        trees = (tree_like(self.output_sum, found) for found in (values, output_basis, input_basis))
        return EigenKron(*trees, data=self.data)

    def __add__(self, other: Any) -> "Kron":
        """The curvature of both data sets."""
        self._check_addend(other)
        fields = ("output_sum", "input_sum", "count")
        sums = (map_leaves(torch.add, getattr(self, name), getattr(other, name)) for name in fields)
        return Kron(*sums, data=self.data + other.data)


@pytree_dataclass
class EigenKron(Curvature):
    """For each leaf ``(U (x) V) diag(eigenvalues) (U (x) V)^T``: a Kronecker product in its eigenbasis.

    With eigenvalues corrected to the diagonal of the exact curvature in that basis it is EKFAC (George et al.
    2018, "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", eq. 7), which is
    never farther from the exact matrix, in the Frobenius norm, than the Kronecker product. Those of two data
    sets have different bases, and do not add up.

    Attributes:
        eigenvalues: Leaves ``(d_out, d_in)``.
        output_basis: ``U``, eigenvectors as columns, leaves ``(d_out, d_out)``; one that is not there is the
            identity.
        input_basis: ``V``, leaves ``(d_in, d_in)``, likewise.
        data: The log likelihood at the same parameters.
    """

    eigenvalues: Params
    output_basis: Params
    input_basis: Params
    data: DataTerm

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Eigenvalues by path."""
        return named_leaves(self.eigenvalues)

    def __add__(self, other: Any) -> "EigenKron":
        """Raise ``TypeError``: they do not add up."""
        raise TypeError(
            "Curvatures in eigenbases of their own do not add up. Add those with `structure='kron'`, or find "
            "one over all the data with `eigenvalue_correction=True`."
        )


@pytree_dataclass
class LowRank(Curvature):
    """``U diag(eigenvalues) U^T`` over all leaves together: the largest eigenvalues.

    The sum of two is exact, of rank ``R_1 + R_2``; :meth:`truncated` makes it smaller. What each left out is
    not brought back.

    Attributes:
        eigenvalues: ``(R,)``, largest first.
        eigenvectors: ``U``, orthonormal, leaves ``(*s, R)``.
        data: The log likelihood at the same parameters.
    """

    eigenvalues: Tensor
    eigenvectors: Params
    data: DataTerm

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Eigenvectors by path."""
        return named_leaves(self.eigenvectors)

    @property
    def rank(self) -> int:
        """``R``."""
        return self.eigenvalues.shape[-1]

    @functools.cached_property
    @torch.inference_mode(False)  # whoever asks first, it can be differentiated
    def grams(self) -> dict[str, Tensor]:
        """``U_l^T U_l`` by leaf, ``(R, R)``, found once, in double precision."""
        flat = {name: as_columns(leaf).double() for name, leaf in self.leaves.items()}
        return {name: vectors.mT @ vectors for name, vectors in flat.items()}

    def truncated(self, rank: int) -> "LowRank":
        """The same with the ``rank`` largest eigenvalues."""
        vectors = map_leaves(lambda leaf: leaf[..., :rank], self.eigenvectors)
        return LowRank(self.eigenvalues[..., :rank], vectors, self.data)

    def padded(self, rank: int) -> "LowRank":
        """The same with zeros for the eigenvalues, and vectors, that it lacks of ``rank``."""
        lacking = (0, rank - self.rank)
        vectors = map_leaves(lambda leaf: F.pad(leaf, lacking), self.eigenvectors)
        return LowRank(F.pad(self.eigenvalues, lacking), vectors, self.data)

    def __add__(self, other: Any) -> "LowRank":
        """The curvature of both data sets."""
        if type(other) is type(self):
            other_like = map_leaves(lambda leaf: leaf[..., :1], other.eigenvectors)
            differing = difference(other_like, map_leaves(lambda leaf: leaf[..., :1], self.eigenvectors))
            if differing:
                raise ValueError(f"Curvatures that are added should cover the same leaves; {differing}.")
        else:
            self._check_addend(other)
        if self.eigenvalues.ndim > 1:  # of several networks
            return stack([index(self, k) + index(other, k) for k in range(len(self.eigenvalues))])
        # U_1 l_1 U_1^T + U_2 l_2 U_2^T = Q (R diag(l) R^T) Q^T with [U_1 U_2] = Q R.
        both = map_leaves(lambda a, b: torch.cat([a, b], -1), self.eigenvectors, other.eigenvectors)
        leaves = named_leaves(both)
        sizes = [leaf.shape[:-1].numel() for leaf in leaves.values()]
        rows = [leaf.reshape(size, leaf.shape[-1]) for size, leaf in zip(sizes, leaves.values(), strict=True)]
        q, r = torch.linalg.qr(torch.cat(rows))
        values, turn = torch.linalg.eigh(r * torch.cat([self.eigenvalues, other.eigenvalues]) @ r.mT)
        vectors = (q @ turn.flip(-1)).split(sizes)
        placed = dict(zip(leaves, vectors, strict=True))
        tree = map_named(lambda name, leaf: placed[name].reshape(*leaf.shape[:-1], len(values)), both)
        return LowRank(values.flip(-1), tree, self.data + other.data)


@pytree_dataclass
class Full(Curvature):
    """The whole matrix.

    Attributes:
        matrix: ``(P, P)``, leaves in the order of their sorted paths, each of them row-major.
        like: Leaves ``s`` of the parameters; their numbers mean nothing.
        data: The log likelihood at the same parameters.
    """

    matrix: Tensor
    like: Params
    data: DataTerm

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Leaves of the parameters by path."""
        return named_leaves(self.like)

    @functools.cached_property
    @torch.inference_mode(False)  # whoever asks first, it can be differentiated
    def eigenvalues(self) -> Tensor:
        """In ascending order, found once, in double precision."""
        return torch.linalg.eigvalsh(self.matrix.double())

    def __add__(self, other: Any) -> "Full":
        """The curvature of both data sets."""
        self._check_addend(other)
        return Full(self.matrix + other.matrix, self.like, self.data + other.data)


def _not_zero(count: Tensor) -> Tensor:
    """A count to divide by: sums over nothing are 0."""
    return torch.where(count == 0, torch.ones_like(count), count)
