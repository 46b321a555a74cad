"""Where variational inference starts."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .._checks import positive_int, positive_number
from .._random import Seed, resolve_seed
from .._tree import Params, Where, is_parameter, map_leaves, matcher, named_leaves, select
from ..covariances import Diagonal
from ..covariances._kronecker import sides
from ..posteriors import Gaussian
from ._full_rank import FullRankState
from ._low_rank import LowRankState
from ._matrix_normal import MatrixNormalState
from ._mean_field import MeanFieldState
from ._state import VariationalState, softplus_inverse

Family = Literal["diag", "low_rank", "kron", "full"]
_MOST = 1 << 29  # numbers of one matrix: beyond 2 GiB in single precision nothing of this can be meant


def init(
    params: Params,
    family: Family = "diag",
    init_scale: float = 1e-2,
    where: Where | None = None,
    *,
    rank: int = 10,
    seed: Seed = 0,
) -> VariationalState:
    """Begin with a Gaussian around some parameters.

    Args:
        params: Location, not changed. ``Fixed`` leaves and integers are passed by.
        family: Structure of the covariance: ``"diag"`` (mean field), ``"low_rank"`` beside a diagonal,
            ``"kron"`` (a matrix normal for each leaf) or ``"full"``.
        init_scale: Standard deviation of each parameter; of ``"low_rank"`` on average.
        where: Which leaves are uncertain: a glob on the path, a sequence of globs, or a predicate
            ``(path, leaf)``; ``None`` for all.
        rank: Of ``"low_rank"``: ``R``.
        seed: Of the factors of ``"low_rank"``, which have to begin somewhere.

    Returns:
        A state: new tensors. See :func:`posterior` and :func:`negative_elbo`.

    Raises:
        TypeError: If ``init_scale`` or ``rank`` is no number.
        ValueError: If ``family`` is none of these, ``init_scale`` is not positive, ``where`` chooses no leaf
            of floating point, or a leaf is too large for the family.

    Example:
        >>> import torch, funcbayes as fb
        >>> state = fb.vi.init({"w": torch.zeros(2, 3), "b": torch.zeros(2)}, where="w")
        >>> sorted(state.mean)
        ['w']
    """
    init_scale = positive_number(init_scale, "vi.init(init_scale=...)")
    if family not in get_args(Family):
        known = ", ".join(map(repr, get_args(Family)))
        raise ValueError(f"`vi.init(family=...)` should be one of {known}, got {family!r}.")
    rank = positive_int(rank, "vi.init(rank=...)")
    mean = covered(params, where, "vi.init(params, ...)")
    _check_sizes(named_leaves(mean), family, rank)
    if family == "diag":
        return MeanFieldState.around(mean, init_scale)
    if family == "low_rank":
        return LowRankState.around(mean, init_scale, rank, resolve_seed(seed))
    if family == "kron":
        return MatrixNormalState.around(mean, init_scale)
    return FullRankState.around(mean, init_scale)


def moped(
    params: Params, delta: float = 0.1, where: Where | None = None, *, prior_std: float = 1.0
) -> tuple[VariationalState, Gaussian]:
    """Begin at a trained network, and take it for the mean of the prior.

    MOPED, Krishnan, Subedar & Tickoo (2020), "Specifying weight priors in Bayesian deep neural networks with
    empirical Bayes", section 3: ``q = N(theta, (delta |theta|)^2)`` and the prior ``N(theta, prior_std^2)``.

    Args:
        params: Trained parameters ``theta``.
        delta: Standard deviations as a fraction of the parameters' size. Parameters closer to zero than
            ``1e-4 / delta`` have a standard deviation of ``1e-4``.
        where: Which leaves are uncertain; ``None`` for all.
        prior_std: Standard deviation (not variance) of the prior.

    Returns:
        A mean-field state for ``vi.fit(start=...)``, and the prior for ``vi.fit(prior=...)``.

    Raises:
        ValueError: If a number is not positive, or ``where`` chooses no leaf of floating point.

    Example:
        >>> import torch, funcbayes as fb
        >>> state, prior = fb.vi.moped({"w": torch.tensor([2.0, -1.0])})
        >>> state.scale().std["w"]
        tensor([0.2000, 0.1000])
    """
    delta = positive_number(delta, "vi.moped(delta=...)")
    prior_std = positive_number(prior_std, "vi.moped(prior_std=...)")
    mean = covered(params, where, "vi.moped(params, ...)")
    rho = map_leaves(lambda leaf: softplus_inverse((delta * leaf.abs()).clamp_min(1e-4)), mean)
    variance = map_leaves(lambda leaf: torch.full_like(leaf, prior_std**2), mean)
    return MeanFieldState(mean, rho), Gaussian(map_leaves(torch.clone, mean), Diagonal(variance))


def covered(params: Params, where: Where | None, call: str) -> Params:
    """Copies of the chosen parameters."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"`{call}` should be given a tree of parameters, got an nn.Module, {type(params).__name__}. "
            "Write `fn, params = make_functional(module)`."
        )
    chosen = matcher(where)
    mean = select(params, lambda name, leaf: is_parameter(leaf) and chosen(name, leaf))
    if not named_leaves(mean):
        raise ValueError(
            f"`{call}` should have a leaf of floating point"
            + (", got none." if where is None else f" that `where={where!r}` chooses, got none.")
        )
    with torch.inference_mode(False):
        return map_leaves(lambda leaf: leaf.detach().clone(), mean)


def _check_sizes(leaves: dict[str, Tensor], family: Family, rank: int) -> None:
    """Refuse a family that a leaf cannot have."""
    total = sum(leaf.numel() for leaf in leaves.values())
    if family == "full" and total**2 > _MOST:
        raise ValueError(
            f"`vi.init(family='full')` would have a matrix of {total:,} times {total:,} numbers for these "
            "leaves. Write `where=...` for fewer of them, or 'kron' or 'low_rank'."
        )
    if family == "low_rank" and rank > total:
        raise ValueError(
            f"`vi.init(family='low_rank', rank=...)` should be at most the number of parameters, {total}, "
            f"got {rank}."
        )
    if family != "kron":
        return
    for name, leaf in leaves.items():
        longest = max(sides(leaf))
        if longest**2 > _MOST:
            raise ValueError(
                f"`vi.init(family='kron')` would have a matrix of {longest:,} times {longest:,} numbers for "
                f"{name!r}, of shape {tuple(leaf.shape)}. Leave the leaf out with `where=...`, or write "
                "'diag' or 'low_rank'."
            )
