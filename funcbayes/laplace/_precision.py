"""Curvature and prior together: the precision of a posterior, by structure of the curvature."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import Params, map_named, named_leaves
from ..covariances import Covariance, Dense, Diagonal, Kronecker, LowRankPrecision
from ..covariances._flat import as_columns, as_double
from ..covariances._kronecker import eigen, tree_like
from ..covariances._operator import inverse_transpose
from ..curvature import Diag, EigenKron, Full, Kron, LowRank
from ._prior import Prior

_DOUBLE_SIZE = 1 << 13  # rows of a matrix up to which it is factorised in double precision


@dataclass(frozen=True)
class Precision:
    """The precision ``factor * curvature + prior precision``.

    Attributes:
        covariance: Makes its inverse.
        logdet: Finds its log-determinant, in double precision.
    """

    covariance: Callable[[], Covariance]
    logdet: Callable[[], Tensor]


@functools.singledispatch
def precision_of(curvature: Any, prior: Prior, factor: Tensor, like: Params) -> Precision:
    """Put a prior to a curvature.

    Args:
        curvature: The curvature.
        prior: Over the leaves that it covers; one that goes with the structure.
        factor: What the curvature is multiplied with.
        like: The covered parameters.
    """
    raise TypeError(
        f"A posterior should be made of one of `funcbayes.curvature`, got {type(curvature).__name__}. Find "
        "it with `curvature.ggn(fn, params, data, likelihood)`."
    )


@precision_of.register
def _(curvature: Diag, prior: Prior, factor: Tensor, like: Params) -> Precision:
    diagonal = {name: as_double(leaf) * factor for name, leaf in curvature.leaves.items()}
    if prior.precision is None:
        return _with_low_rank_prior(diagonal, {}, prior, like)
    precision = {name: leaf + prior.precision[name] for name, leaf in diagonal.items()}
    name, least = _least(precision)
    refuse_indefinite(least, f"(its diagonal, in {name!r})")

    def covariance() -> Covariance:
        return Diagonal(map_named(lambda name, leaf: (1 / precision[name]).to(leaf.dtype), like))

    return Precision(covariance, lambda: _sum(leaf.log().sum() for leaf in precision.values()))


@precision_of.register
def _(curvature: Kron, prior: Prior, factor: Tensor, like: Params) -> Precision:
    return precision_of(curvature.eigen, prior, factor, like)


@precision_of.register
def _(curvature: EigenKron, prior: Prior, factor: Tensor, like: Params) -> Precision:
    outputs, inputs = named_leaves(curvature.output_basis), named_leaves(curvature.input_basis)
    values = {name: as_double(leaf) * factor for name, leaf in curvature.leaves.items()}
    bases: dict[str, tuple[Tensor | None, Tensor | None]]
    bases = {name: (outputs.get(name), inputs.get(name)) for name in values}
    if prior.precision is None:
        values, bases = _projected(values, bases, prior)
    else:
        numbers = prior.numbers()
        values = {name: leaf + numbers[name] for name, leaf in values.items()}
    name, least = _least(values)
    refuse_indefinite(least, f"(of {name!r})")

    def covariance() -> Covariance:
        variance = {name: 1 / leaf for name, leaf in values.items()}
        sides = ({name: basis[side] for name, basis in bases.items()} for side in (0, 1))
        return Kronecker(
            map_named(lambda name, leaf: variance[name].reshape(leaf.shape).to(leaf.dtype), like),
            *(tree_like(like, found) for found in sides),
        )

    return Precision(covariance, lambda: _sum(leaf.log().sum() for leaf in values.values()))


@precision_of.register
def _(curvature: LowRank, prior: Prior, factor: Tensor, like: Params) -> Precision:
    # Rounding may make an eigenvalue negative; and of one that is 0 no derivative in the factor is asked.
    roots = as_double(curvature.eigenvalues).clamp_min(0).sqrt() * factor.sqrt()
    vectors = curvature.leaves

    def factors() -> dict[str, Tensor]:
        return {name: vectors[name] * roots.to(vectors[name].dtype) for name in vectors}

    if prior.precision is None:
        return _with_low_rank_prior({}, factors(), prior, like)
    precision = prior.precision

    def covariance() -> Covariance:
        found = factors()
        return LowRankPrecision(
            map_named(lambda name, leaf: precision[name].expand(leaf.shape).to(leaf.dtype).clone(), like),
            map_named(lambda name, leaf: found[name].to(leaf.dtype), like),
        )

    def logdet() -> Tensor:
        # det(D + F F^T) = det(D) det(I + F^T D^-1 F), and F^T D^-1 F is small.
        whole = _sum(
            number.log().sum() * (vectors[name].shape[:-1].numel() // max(number.numel(), 1))
            for name, number in precision.items()
        )
        if all(number.ndim == 0 for number in precision.values()):
            grams = curvature.grams
            inner = _sum(grams[name] / number for name, number in precision.items())
        else:
            inner = _sum(_whitened_gram(vectors[name], number) for name, number in precision.items())
        identity = torch.eye(len(roots), dtype=roots.dtype, device=roots.device)
        return (
            whole
            + torch.linalg.cholesky(identity + roots * inner * roots[:, None]).diagonal().log().sum() * 2
        )

    return Precision(covariance, logdet)


@precision_of.register
def _(curvature: Full, prior: Prior, factor: Tensor, like: Params) -> Precision:
    size = len(curvature.matrix)
    wide = torch.float64 if size <= _DOUBLE_SIZE else curvature.matrix.dtype

    def matrix(of_data: Tensor) -> Tensor:
        scaled = of_data.to(wide) * factor.to(wide)
        if prior.precision is not None:
            return scaled + torch.diag(_as_vector(prior.precision, curvature.leaves).to(wide))
        assert prior.gaussian is not None
        identity = torch.eye(size, dtype=torch.float64, device=scaled.device)
        return scaled + prior.gaussian.covariance.inverse().times(identity).to(wide)

    @functools.cache
    def root() -> Tensor:
        whole = matrix(curvature.matrix)
        lower, failed = torch.linalg.cholesky_ex(whole)
        if is_concrete(failed) and bool(failed):
            lower, failed = torch.linalg.cholesky_ex(matrix(_without_rounding(curvature)))
        if is_concrete(failed) and bool(failed):
            smallest = float(torch.linalg.eigvalsh(whole.detach().double())[0])
            raise RuntimeError(_indefinite("", smallest))
        return lower

    def covariance() -> Covariance:
        columns = inverse_transpose(root())
        sizes = [leaf.numel() for leaf in curvature.leaves.values()]
        parts = dict(zip(curvature.leaves, columns.split(sizes), strict=True))
        return Dense(
            map_named(lambda name, leaf: parts[name].reshape(*leaf.shape, size).to(leaf.dtype), like)
        )

    def logdet() -> Tensor:
        one = _one_number(prior.precision)
        if one is None:
            return 2 * as_double(root().diagonal()).log().sum()
        values = not_negative_by_rounding(curvature.eigenvalues, curvature) * factor + one
        refuse_indefinite(values, "")
        return values.log().sum()

    return Precision(covariance, logdet)


def not_negative_by_rounding(values: Tensor, curvature: Full) -> Tensor:
    """Eigenvalues, with 0 for those that are negative by no more than rounding in the dtype of the matrix."""
    eps = torch.finfo(curvature.matrix.dtype).eps
    margin = eps * math.sqrt(max(len(values), 1)) * values.detach().abs().amax()
    return torch.where((values < 0) & (values > -margin), 0.0, values)


def _without_rounding(curvature: Full) -> Tensor:
    """The matrix with such eigenvalues."""
    values, vectors = torch.linalg.eigh(as_double(curvature.matrix.detach()))
    cleaned = (vectors * not_negative_by_rounding(values, curvature)) @ vectors.mT
    return curvature.matrix + (cleaned - curvature.matrix).detach()


def _with_low_rank_prior(
    diagonal: Mapping[str, Tensor], factors: Mapping[str, Tensor], prior: Prior, like: Params
) -> Precision:
    """A diagonal, or factors, on top of a prior whose precision is a diagonal and factors, too."""
    assert prior.gaussian is not None
    old = prior.gaussian.covariance
    assert isinstance(old, LowRankPrecision)
    precision, columns = named_leaves(old.precision), named_leaves(old.factors)

    def both(name: str) -> Tensor:
        if name not in factors:
            return columns[name]
        return torch.cat([columns[name], factors[name].to(columns[name].dtype)], -1)

    def covariance() -> Covariance:
        return LowRankPrecision(
            map_named(
                lambda name, leaf: (as_double(precision[name]) + diagonal.get(name, 0)).to(leaf.dtype), like
            ),
            map_named(lambda name, leaf: both(name).to(leaf.dtype), like),
        )

    return Precision(covariance, lambda: covariance().inverse().logdet())


def _projected(
    values: Mapping[str, Tensor], bases: Mapping[str, tuple[Tensor | None, Tensor | None]], prior: Prior
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor | None, Tensor | None]]]:
    """The sum of two precisions that are Kronecker products, each in its eigenbasis, as one such.

    A sum of Kronecker products is none. Its eigenvectors are taken from its partial traces, and the
    eigenvalues are its diagonal in that basis, which is closest to it in the Frobenius norm: exact if both
    have one eigenbasis.
    """
    assert prior.gaussian is not None
    old = prior.gaussian.covariance
    assert isinstance(old, Kronecker)
    variance, *old_sides = (named_leaves(t) for t in (old.variance, old.output_basis, old.input_basis))
    found, turned = {}, {}
    for name, new in values.items():
        before = 1 / as_double(variance[name]).reshape(new.shape)
        pieces = [
            (before, tuple(side.get(name) for side in old_sides)),
            (new, bases[name]),
        ]
        basis: list[Tensor | None] = []
        for side in (0, 1):
            pairs = [(piece.sum(1 - side), own[side]) for piece, own in pieces]
            basis.append(_common_basis(pairs))
        found[name] = _sum(
            _overlap(basis[0], own[0], piece.shape[0], piece)
            @ piece
            @ _overlap(basis[1], own[1], piece.shape[1], piece).mT
            for piece, own in pieces
        )
        turned[name] = (basis[0], basis[1])
    return found, turned


def _common_basis(pairs: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Eigenvectors of a sum of ``U diag(values) U^T``; ``None`` if all are in the basis of the identity."""
    if all(basis is None for _, basis in pairs):
        return None
    total = _sum(
        torch.diag(values) if basis is None else (as_double(basis) * values) @ as_double(basis).mT
        for values, basis in pairs
    )
    return eigen(total.detach(), total.dtype)[1]


def _overlap(new: Tensor | None, old: Tensor | None, size: int, like: Tensor) -> Tensor:
    """Squared products of the vectors of two bases."""
    if new is None and old is None:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    if new is None or old is None:
        one = old if new is None else new.mT
        assert one is not None
        return as_double(one).square()
    return (as_double(new).mT @ as_double(old)).square()


def _whitened_gram(vectors: Tensor, precision: Tensor) -> Tensor:
    flat = as_columns(as_double(vectors))
    return flat.mT @ (flat / precision.reshape(-1, 1))


def _as_vector(precision: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([precision[name].expand(leaf.shape).reshape(-1) for name, leaf in leaves.items()])


def _one_number(precision: Mapping[str, Tensor] | None) -> Tensor | None:
    """The one number that all leaves have, as one tensor; ``None`` if there are several."""
    if precision is None:
        return None
    numbers = list(precision.values())
    if any(number.ndim for number in numbers):
        return None
    if all(number is numbers[0] for number in numbers):
        return numbers[0]
    # Equal numbers that are differentiated one by one are not one number.
    is_one = not any(n.requires_grad or not is_concrete(n) for n in numbers)
    return numbers[0] if is_one and all(bool(number == numbers[0]) for number in numbers) else None


def _sum(terms: Any) -> Tensor:
    return functools.reduce(torch.add, terms)


def _least(values: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The leaf with the smallest number, or with one that is no number."""
    given = {name: leaf for name, leaf in values.items() if leaf.numel()}
    if not all(map(is_concrete, given.values())):
        return next(iter(given.items()))
    lows = {name: float(leaf.detach().min()) for name, leaf in given.items()}
    name = min(lows, key=lambda name: (not math.isnan(lows[name]), lows[name]))
    return name, given[name]


def refuse_indefinite(values: Tensor, of_what: str) -> None:
    """Raise if an eigenvalue of a precision is not positive."""
    if not is_concrete(values):
        return
    low = float(values.detach().min())
    if not (low > 0 and math.isfinite(float(values.detach().max()))):
        raise RuntimeError(_indefinite(of_what, low))


def _indefinite(of_what: str, smallest: float) -> str:
    return (
        f"The posterior precision {of_what + ' ' if of_what else ''}is not positive definite (smallest "
        f"eigenvalue {smallest:.3g}). The Hessian of a network is indefinite where training has not ended, "
        "and often where it has: use `curvature.ggn`, or a `prior_precision` that is larger by as much. If "
        "it is one of `curvature.ggn`, float64 helps."
    )
