"""What IVON remembers: a Gaussian, the momentum of its mean, and how often it was moved."""

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import positive_int
from .._random import Seed, fold, resolve_seed
from .._tree import (
    Params,
    Where,
    is_parameter,
    map_leaves,
    map_named,
    matcher,
    named_leaves,
    pytree_dataclass,
    select,
    static,
)
from ..covariances import Diagonal
from ..covariances._flat import at_least_single
from ..covariances._noise import leaf_noise
from ..posteriors import Gaussian


@pytree_dataclass
class IVONState:
    """A mean-field Gaussian on its way, in at least single precision.

    The Gaussian is ``N(mean, 1 / (ess (hessian + delta)))`` with the effective number of data ``ess`` and
    ``delta = prior_precision / ess``.

    Attributes:
        mean: Location, leaves ``s``.
        momentum: Moving average of gradients, leaves ``s``.
        hessian: Moving average of the diagonal of the Hessian of the **mean** loss of a datum, leaves ``s``.
        step: How many updates there were, an int64 scalar: noise and the correction of the momentum depend on
            it.
        hess_init: What the Hessian began with, by which learning rates are scaled.
    """

    mean: Params
    momentum: Params
    hessian: Params
    step: Tensor
    hess_init: float = static(default=1.0)


def init(params: Params, *, hess_init: float = 1.0, where: Where | None = None) -> IVONState:
    """Begin at some parameters.

    Args:
        params: Location, not changed. ``Fixed`` leaves and integers are passed by.
        hess_init: The Hessian to begin with, of the mean loss of a datum: the larger, the closer are the
            first draws to the mean.
        where: Which leaves are uncertain and moved; ``None`` for all.

    Returns:
        A state: new tensors.

    Raises:
        TypeError: If ``hess_init`` is no number.
        ValueError: If it is not positive, or ``where`` chooses no leaf of floating point.

    Example:
        See :func:`update`.
    """
    check_positive(hess_init, "ivon.init(hess_init=...)")
    chosen = matcher(where)
    covered = select(params, lambda name, leaf: is_parameter(leaf) and chosen(name, leaf))
    if not named_leaves(covered):
        raise ValueError(
            "`ivon.init(params, ...)` should have a leaf of floating point"
            + (", got none." if where is None else f" that `where={where!r}` chooses, got none.")
        )
    with torch.inference_mode(False), torch.no_grad():
        mean = map_leaves(_wide_copy, covered)
        return IVONState(
            mean,
            map_leaves(torch.zeros_like, mean),
            map_leaves(lambda leaf: torch.full_like(leaf, hess_init), mean),
            torch.zeros((), dtype=torch.int64),
            float(hess_init),
        )


def _wide_copy(leaf: Tensor) -> Tensor:
    return leaf.detach().to(at_least_single(leaf.dtype), copy=True)


def posterior(
    state: IVONState, *, num_data: int, prior_precision: float = 1.0, ess: float | None = None
) -> Gaussian:
    """Read the Gaussian off a state.

    Args:
        state: Made by :func:`init` and moved by :func:`update`.
        num_data: Number of rows ``N`` of the data.
        prior_precision: Precision (1 / variance) of the prior, as in :func:`update`.
        ess: Effective number of data ``lambda``, as in :func:`update`; ``None`` for ``num_data``.

    Returns:
        Gaussian with a diagonal covariance over the covered leaves.

    Raises:
        TypeError: If ``state`` is none.
        ValueError: If a number is not positive, or those of the state are not finite.

    Example:
        See :func:`update`.
    """
    check_state(state, "ivon.posterior(state)")
    scale, delta = scales(num_data, prior_precision, ess, "ivon.posterior")
    with torch.inference_mode(False), torch.no_grad():
        mean = map_leaves(torch.clone, state.mean)
        return Gaussian(mean, Diagonal(map_leaves(lambda h: 1 / (scale * (h + delta)), state.hessian)))


def draws(
    state: IVONState,
    num_samples: int,
    seed: Seed | None = None,
    *,
    num_data: int,
    prior_precision: float = 1.0,
    ess: float | None = None,
) -> Params:
    """Draw the parameters at which the next update wants gradients.

    Args:
        state: The state.
        num_samples: Draws ``S``.
        seed: Draws are a function of it and of the state's step.
        num_data: As in :func:`posterior`.
        prior_precision: As in :func:`posterior`.
        ess: As in :func:`posterior`.

    Returns:
        Parameters with a leading axis, leaves ``(S, *s)``.
    """
    check_state(state, "ivon.draws(state, ...)")
    num_samples = positive_int(num_samples, "ivon.draws(num_samples)")
    scale, delta = scales(num_data, prior_precision, ess, "ivon.draws")
    key = fold(resolve_seed(seed), state.step)
    with torch.no_grad():
        noise = leaf_noise(state.mean, torch.arange(num_samples), key)
        hessian = named_leaves(state.hessian)
        return map_named(
            lambda name, mean: mean + noise[name] * (scale * (hessian[name] + delta)).rsqrt(), state.mean
        )


def scales(num_data: Any, prior_precision: Any, ess: Any, call: str) -> tuple[float, float]:
    """``lambda`` and ``delta``, checked."""
    positive_int(num_data, f"{call}(num_data=...)")
    check_positive(prior_precision, f"{call}(prior_precision=...)")
    if ess is not None:
        check_positive(ess, f"{call}(ess=...)")
    scale = float(num_data if ess is None else ess)
    return scale, prior_precision / scale


def check_state(state: Any, call: str) -> None:
    """Refuse what is no state."""
    if not isinstance(state, IVONState):
        raise TypeError(
            f"`{call}` should be given a state, got {type(state).__name__}. Write `ivon.init(params)`."
        )


def check_positive(value: Any, call: str) -> None:
    """Refuse what is no positive number."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"`{call}` should be a number, got {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"`{call}` should be positive and finite, got {value}.")
