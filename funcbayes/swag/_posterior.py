"""The Gaussian that the snapshots give."""

import math
from numbers import Real
from typing import Any

import optree
import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import Params, merge, named_leaves
from ..covariances import Diagonal, LowRankPlusDiagonal
from ..posteriors import Gaussian
from ._moments import moments, scale_of_columns
from ._state import State, block_size


def posterior(state: State, scale: float = 0.5, var_floor: float = 1e-30) -> Gaussian:
    """Fit a Gaussian to the snapshots: see :mod:`funcbayes.swag`.

    BatchNorm statistics belong to no draw in particular: ``to_ensemble``, then
    :func:`funcbayes.refresh_batch_norm`, gives each draw its own.

    Args:
        state: Of one network, or of several, every leaf with a leading axis; under ``vmap`` too.
        scale: Factor of the whole covariance. 0.5 is the paper's SWAG; 1.0 with a rank of 0 is its
            SWAG-diagonal.
        var_floor: Least variance in the diagonal part, before ``scale``, in squared units of the
            parameters. What did not move has no density without one.

    Returns:
        Gaussian over the collected parameters, in their dtype. Its covariance is ``LowRankPlusDiagonal``
        with ``K = min(n - 1, rank)`` columns, or ``Diagonal`` if that is none. Its mean carries the ``Fixed``
        leaves of the latest snapshot.

    Raises:
        ValueError: If ``scale`` is not positive or ``var_floor`` is negative.
        RuntimeError: If there were no snapshots, or one that was not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> state = fb.swag.init({"w": torch.zeros(2)}, rank=5)
        >>> for value in (1.0, 2.0, 6.0):
        ...     state = fb.swag.update(state, {"w": torch.tensor([value, 0.0])})
        >>> q = fb.swag.posterior(state)
        >>> q.mean["w"]
        tensor([3., 0.])
        >>> q.covariance.factors["w"].shape
        torch.Size([2, 2])
    """
    check_scales(scale, var_floor, "swag.posterior")
    n = state.num_snapshots
    if not n:
        raise RuntimeError(
            "`swag.posterior(state)` should be given a state with at least one snapshot, got none: `init` "
            "takes shapes only. Write `state = swag.update(state, params)` for each."
        )
    num_columns = min(n - 1, state.rank)
    trees = (state.origin, state.mean, state.squares, *state.recent)
    by_leaf = zip(*map(optree.tree_leaves, trees), strict=True)
    means, variances, factors = [], [], []
    for name, (origin, mean, squares, *recent) in zip(named_leaves(state.origin), by_leaf, strict=True):
        shift, var, columns = moments(
            *(mean, squares, n - len(recent), recent),
            size=block_size(state.rank),
            origin=origin,
            keep=num_columns,
        )
        mean = (origin.to(shift.dtype) + shift).to(origin.dtype)
        _check_finite(name, mean, var)
        means.append(mean)
        variances.append((var.clamp_min(var_floor) * scale).to(origin.dtype))
        if num_columns:
            # Each column in one piece, as products with draws read them.
            factor = torch.stack(columns).movedim(0, -1) * scale_of_columns(scale, num_columns)
            factors.append(factor.to(origin.dtype))
    structure: Any = optree.tree_structure(state.origin)
    variance: Params = structure.unflatten(variances)
    covariance = (
        LowRankPlusDiagonal(variance, structure.unflatten(factors)) if factors else Diagonal(variance)
    )
    return Gaussian(merge(structure.unflatten(means), state.fixed), covariance)


def check_scales(scale: float, var_floor: float, call: str) -> None:
    """Refuse what would give no covariance."""
    for name, value in (("scale", scale), ("var_floor", var_floor)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"`{call}({name}=...)` should be a number, got {type(value).__name__}.")
    if not 0 < scale < math.inf:
        raise ValueError(f"`{call}(scale=...)` should be positive and finite, got {scale}.")
    if not 0 <= var_floor < math.inf:
        raise ValueError(f"`{call}(var_floor=...)` should be at least 0 and finite, got {var_floor}.")


def _check_finite(name: str, mean: Tensor, var: Tensor) -> None:
    if is_concrete(mean) and not bool((mean.isfinite() & var.isfinite()).all()):
        raise RuntimeError(
            f"`swag.posterior(state)` should be given finite snapshots; some of {name!r} are not, or too far "
            "apart. A lower learning rate usually helps."
        )
