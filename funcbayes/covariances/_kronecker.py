"""Correlations within each tensor: a Kronecker product, up to variances in its eigenbasis."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._random import Seed
from .._tree import Params, map_named, named_leaves, pytree_dataclass, select
from ._checks import check_bases, check_matrices, check_variance, positive_factor, zero_variance
from ._diagonal import scaled_noise
from ._flat import as_double, at_least_single
from ._interface import Covariance, refuse_singular
from ._noise import rotate
from ._operator import Operator
from ._parts import part, times_power


@pytree_dataclass
class Kronecker(Covariance):
    """The covariance ``(U (x) V) diag(variance) (U (x) V)^T`` of each leaf, none between leaves.

    A leaf of shape ``s`` is seen as a matrix ``(d_out, d_in)``: ``d_out`` is the length of its first axis,
    ``d_in`` the product of the others, both 1 where there are none. ``U`` and ``V`` are orthogonal, and
    the variance belongs to their joint eigenbasis, entry by entry: a prior that was added to the
    eigenvalues (:meth:`from_factors`) and corrected eigenvalues (EKFAC; George et al. 2018) fit alike.

    A basis that is not there is the identity. The rows of an embedding, say, are uncorrelated, and the
    identity over 30,000 tokens is not stored.

    Attributes:
        variance: Variance along each pair of eigenvectors, in squared units of the parameter; leaves ``s``.
        output_basis: ``U``, eigenvectors as columns, leaves ``(d_out, d_out)``. Where a leaf is missing
            (absent in a dict, ``MISSING`` in other containers) the identity; ``{}`` if all are.
        input_basis: ``V``, eigenvectors as columns, leaves ``(d_in, d_in)``, or missing likewise.

    Raises:
        TypeError: If a leaf is not a tensor of floating point.
        ValueError: If a variance is negative or not finite, or a basis has another shape.

    Example:
        >>> import torch, funcbayes as fb
        >>> params = {"w": torch.zeros(2, 3)}
        >>> G, A = {"w": torch.eye(2)}, {"w": 3 * torch.eye(3)}
        >>> fb.covariances.Kronecker.from_factors(params, G, A, prior_precision=1.0).diagonal()["w"][0]
        tensor([0.2500, 0.2500, 0.2500])
    """

    variance: Params
    output_basis: Params
    input_basis: Params

    def __post_init__(self) -> None:
        check_variance(self.variance, "Kronecker(variance, ...)")
        for tree, side, call in (
            (self.output_basis, 0, "Kronecker(..., output_basis, ...)"),
            (self.input_basis, 1, "Kronecker(..., input_basis)"),
        ):
            lengths = {name: sides(leaf)[side] for name, leaf in named_leaves(self.variance).items()}
            check_bases(tree, lengths, call)

    @classmethod
    def from_factors(
        cls,
        params: Params,
        grad_cov: Params,
        input_cov: Params,
        prior_precision: float | Tensor | Params,
        temperature: float | Tensor = 1.0,
    ) -> "Kronecker":
        """Invert ``G (x) A / temperature + prior_precision``, exactly in the joint eigenbasis.

        Args:
            params: Shapes and dtypes of the parameters, leaves ``s``; its numbers are not read.
            grad_cov: ``G``, positive semi-definite, leaves ``(d_out, d_out)``, or ``(d_out,)`` for a diagonal
                one, which has no basis. Eigenvalues that rounding made negative count as zero.
            input_cov: ``A``, likewise, leaves ``(d_in, d_in)`` or ``(d_in,)``. Leaves ``s`` with fewer than
                two axes have ``d_in = 1``, or none for a factor of 1.
            prior_precision: In one over squared units of the parameter: one number, or a tree with one
                number a leaf.
            temperature: Divides the curvature and not the prior.

        Raises:
            ValueError: If a factor has another shape or is not finite, or a precision is not positive.
        """
        leaves = named_leaves(params)
        ones = {name: leaf.new_ones(1) for name, leaf in leaves.items() if leaf.ndim < 2}
        outputs, inputs = named_leaves(grad_cov), {**ones, **named_leaves(input_cov)}
        for tree, side, name in ((outputs, 0, "grad_cov"), (inputs, 1, "input_cov")):
            lengths = {path: sides(leaf)[side] for path, leaf in leaves.items()}
            check_matrices(tree, lengths, f"Kronecker.from_factors(..., {name}=...)")
        prior = one_number_a_leaf(prior_precision, leaves, "Kronecker.from_factors(prior_precision=...)")

        variance: dict[str, Tensor] = {}
        output_basis: dict[str, Tensor | None] = {}
        input_basis: dict[str, Tensor | None] = {}
        for name, leaf in leaves.items():
            output_values, output_basis[name] = eigen(outputs[name], leaf.dtype)
            input_values, input_basis[name] = eigen(inputs[name], leaf.dtype)
            precision = torch.outer(output_values, input_values) / temperature + prior[name]
            if is_concrete(precision) and not bool((precision > 0).all() & precision.isfinite().all()):
                raise ValueError(
                    "`Kronecker.from_factors(...)` should have a positive precision `G (x) A / temperature + "
                    f"prior_precision`; that of {name!r} has a smallest eigenvalue of "
                    f"{precision.detach().min():.3g}. Write a larger `prior_precision`."
                )
            variance[name] = (1 / precision).reshape(leaf.shape).to(leaf.dtype)
        return cls(*(tree_like(params, found) for found in (variance, output_basis, input_basis)))

    @property
    def like(self) -> Params:
        """The variances in the eigenbasis."""
        return self.variance

    def deviations(self, indices: Tensor, seed: Seed) -> Params:
        """Draw ``U (sqrt(variance) * z) V^T``, leaves ``(S, *s)``."""
        outputs, inputs = named_leaves(self.output_basis), named_leaves(self.input_basis)

        def deviate(name: str, noise: Tensor) -> Tensor:
            wide = at_least_single(noise.dtype)
            blocks = as_matrix(noise, 1).to(wide)  # (S, d_out, d_in)
            for bases in (inputs, outputs):
                blocks = (rotate(blocks, bases[name].to(wide)) if name in bases else blocks).mT
            return blocks.reshape(noise.shape).to(noise.dtype)

        return map_named(deviate, scaled_noise(self.variance, indices, seed))

    def operator(self) -> Operator:
        """The blocks of the covariance."""
        return self._blocks(lambda variance: variance)

    def inverse(self) -> Operator:
        """The blocks of the precision, which have the same eigenvectors."""
        refuse_singular(self)
        return self._blocks(lambda variance: 1 / variance)

    def singular(self) -> str | None:
        """Where a variance in the eigenbasis is zero."""
        return zero_variance(self.variance)

    def scaled(self, factor: float | Tensor) -> "Kronecker":
        """The covariance times a positive number."""
        variance = times_power(self.variance, positive_factor(factor), 1)
        return Kronecker(variance, self.output_basis, self.input_basis)

    def restricted(self, keep: Callable[[str, Tensor], bool]) -> "Kronecker":
        """The blocks of the leaves with ``keep(path, leaf)``."""
        fields = (self.variance, self.output_basis, self.input_basis)
        return Kronecker(*(part(tree, self.like, keep) for tree in fields))

    def _blocks(self, eigenvalues_of: Callable[[Tensor], Tensor]) -> "Blocks":
        outputs, inputs = (
            {name: as_double(basis) for name, basis in named_leaves(tree).items()}
            for tree in (self.output_basis, self.input_basis)
        )
        return Blocks(
            tuple(
                Block(eigenvalues_of(as_double(as_matrix(leaf))), outputs.get(name), inputs.get(name))
                for name, leaf in named_leaves(self.variance).items()
            )
        )


def sides(leaf: Tensor) -> tuple[int, int]:
    """``d_out, d_in`` of a leaf."""
    return leaf.shape[:1].numel(), leaf.shape[1:].numel()


def as_matrix(leaf: Tensor, leading: int = 0) -> Tensor:
    """A leaf ``s`` as ``(d_out, d_in)``, after ``leading`` axes that stay as they are."""
    shape = leaf.shape[leading:]
    return leaf.reshape(*leaf.shape[:leading], shape[:1].numel(), shape[1:].numel())


def tree_like(params: Params, found: dict[str, Any]) -> Params:
    """The leaves ``found``, by path, in a tree like ``params``; ``None`` for one that is missing."""
    there = select(params, lambda name, leaf: found[name] is not None)
    return map_named(lambda name, leaf: found[name], there)


def eigen(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues, not below zero, and eigenvectors, in the factor's dtype or ``dtype``, the wider one.

    A factor with one axis is a diagonal: its eigenvectors are those of the identity, ``None``.
    """
    factor = factor.to(at_least_single(torch.promote_types(factor.dtype, dtype)))
    values, vectors = (factor, None) if factor.ndim == 1 else torch.linalg.eigh(factor)
    return values.clamp_min(0), vectors


def one_number_a_leaf(value: float | Tensor | Params, leaves: dict[str, Tensor], call: str) -> dict[str, Any]:
    """A number, or a tree of numbers, by path."""
    if isinstance(value, int | float | Tensor):
        numbers = dict.fromkeys(leaves, value)
    else:
        numbers = named_leaves(value)
    for name in leaves:
        if name not in numbers:
            raise ValueError(f"`{call}` should be one number, or one for each leaf; {name!r} is missing.")
        shape = tuple(getattr(numbers[name], "shape", ()))
        if shape:
            raise ValueError(
                f"`{call}` should be one number, or one for each leaf, got shape {shape} for {name!r}. One "
                "number a parameter goes with a diagonal, low-rank or dense structure."
            )
    return numbers


@dataclass(frozen=True)
class Block:
    """``(U (x) V) diag(eigenvalues) (U (x) V)^T``, eigenvalues ``(d_out, d_in)``; ``None``: an identity."""

    eigenvalues: Tensor
    outputs: Tensor | None
    inputs: Tensor | None

    def turned(self, columns: Tensor) -> Tensor:
        """``(U (x) V)^T columns`` as ``(k, d_out, d_in)``, for columns ``(d_out d_in, k)``."""
        rows = columns.mT.reshape(columns.shape[1], *self.eigenvalues.shape)
        return between(transposed(self.outputs), rows, self.inputs)

    def turned_back(self, rows: Tensor) -> Tensor:
        """``(U (x) V) rows`` as columns, for rows ``(k, d_out, d_in)``."""
        return between(self.outputs, rows, transposed(self.inputs)).flatten(1).mT


@dataclass(frozen=True)
class Blocks(Operator):
    """A block-diagonal matrix with one :class:`Block` a leaf."""

    blocks: tuple[Block, ...]

    def times(self, columns: Tensor) -> Tensor:
        """``A columns``, ``(P, k)``."""
        products = [
            block.turned_back(block.eigenvalues * block.turned(rows)) for block, rows in self._rows(columns)
        ]
        return torch.cat(products) if products else columns

    def diagonal(self) -> Tensor:
        """``(P,)``."""
        parts = [
            between(overlaps(None, b.outputs), b.eigenvalues, overlaps(b.inputs, None)).flatten()
            for b in self.blocks
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def quadratic(self, columns: Tensor) -> Tensor:
        """``trace(columns^T A columns)``, a scalar."""
        return total([(b.eigenvalues * b.turned(rows).square()).sum() for b, rows in self._rows(columns)])

    def logdet(self) -> Tensor:
        """Log-determinant, a scalar."""
        return total([block.eigenvalues.log().sum() for block in self.blocks])

    def trace_with(self, other: Operator) -> Tensor:
        """``trace(A other)``: eigenvalues weighted by the squared overlaps of the eigenvectors."""
        if not isinstance(other, Blocks):
            return super().trace_with(other)
        terms = []
        for one, two in zip(self.blocks, other.blocks, strict=True):
            outputs, inputs = overlaps(one.outputs, two.outputs), overlaps(two.inputs, one.inputs)
            terms.append((one.eigenvalues * between(outputs, two.eigenvalues, inputs)).sum())
        return total(terms)

    def _rows(self, columns: Tensor) -> list[tuple[Block, Tensor]]:
        lengths = [block.eigenvalues.numel() for block in self.blocks]
        return list(zip(self.blocks, columns.split(lengths), strict=True))


def between(left: Tensor | None, middle: Tensor, right: Tensor | None) -> Tensor:
    """``left middle right``, where ``None`` is the identity."""
    product = middle if left is None else left @ middle
    return product if right is None else product @ right


def transposed(basis: Tensor | None) -> Tensor | None:
    """``basis^T``."""
    return None if basis is None else basis.mT


def overlaps(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    """Entries of ``one^T two``, squared."""
    if one is None or two is None:
        product = two if one is None else one.mT
        return None if product is None else product.square()
    return (one.mT @ two).square()


def total(terms: list[Tensor]) -> Tensor:
    """Sum of scalars, 0 if there are none."""
    return torch.stack(terms).sum() if terms else torch.zeros(())
