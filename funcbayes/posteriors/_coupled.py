"""Deviations of draws that are coupled: each one is what it would be alone, but together they are not."""

from collections.abc import Callable

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._random import Seed
from .._tree import Params, map_leaves, named_leaves
from ..covariances import Covariance
from ..covariances._flat import at_least_single, ravel_columns
from ..covariances._operator import Operator

_MOST = 32  # draws of a group: finding one of them takes all of them

Deviations = Callable[[Tensor, Seed], Params]


def opposite_deviations(find: Deviations, indices: Tensor, seed: Seed) -> Params:
    """What ``find`` gives for ``i`` as deviation ``2 i``, and its opposite as ``2 i + 1``."""
    pairs, of_each = _once(indices // 2)
    signs = 1 - 2 * (indices % 2)

    def signed(leaf: Tensor) -> Tensor:
        own = leaf[of_each.to(leaf.device)]
        return own * signs.to(leaf).view(-1, *(1 for _ in leaf.shape[1:]))

    return map_leaves(signed, find(pairs, seed))


def orthogonal_deviations(covariance: Covariance, indices: Tensor, seed: Seed) -> Params:
    """Deviations that are orthogonal in groups of ``G``, as the inverse covariance measures angles.

    Independent ones of a group are the columns of ``D = A Z``, with ``A A^T`` the covariance. If ``Z = Q R``,
    the orthogonal ones are ``A Q diag(|z|) = D R^-1 diag(|z|)``, where ``R`` is the Cholesky factor of
    ``Z^T Z = D^T covariance^-1 D``, whose diagonal has the squares of the norms ``|z|`` of the columns of
    ``Z``. ``Q`` is uniform and independent of ``R``, so that each is still drawn from the Gaussian (Yu et al.
    2016, "Orthogonal random features", section 3).

    ``G`` is 32, or the number of parameters where there are fewer.
    """
    num_params = sum(leaf.numel() for leaf in named_leaves(covariance.like).values())
    size = min(_MOST, num_params)
    if size < 2 or not len(indices):
        return covariance.deviations(indices, seed)
    precision = covariance.inverse()
    groups, of_each = _once(indices // size)
    # One after another: a product rounds by its shape, and a draw should not depend on its company.
    found = [_orthogonal(covariance, precision, group, size, seed) for group in groups]
    rows = of_each * size + indices % size

    def chosen(*leaves: Tensor) -> Tensor:
        return torch.cat(leaves)[rows.to(leaves[0].device)]

    return map_leaves(chosen, *found)


def _orthogonal(covariance: Covariance, precision: Operator, group: Tensor, size: int, seed: Seed) -> Params:
    """Those of one group, leaves ``(G, *s)``."""
    drawn = covariance.deviations(group * size + torch.arange(size), seed)
    columns = ravel_columns(map_leaves(lambda leaf: leaf.movedim(0, -1), drawn), covariance.like)
    gram = columns.mT @ precision.times(columns)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    mixing = torch.linalg.solve_triangular(torch.linalg.cholesky(gram).mT, norms.diag(), upper=True)

    def mixed(leaf: Tensor) -> Tensor:
        rows = leaf.reshape(size, -1).to(at_least_single(leaf.dtype))
        return (mixing.mT.to(rows.dtype) @ rows).reshape(leaf.shape).to(leaf.dtype)

    return map_leaves(mixed, drawn)


def _once(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Each number once, where they can be looked at, and the places of all in these."""
    if is_concrete(numbers):
        return torch.unique(numbers, return_inverse=True)
    return numbers, torch.arange(len(numbers))
