"""The Gaussian that a state stands for."""

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import map_leaves, merge, named_leaves
from ..covariances import Diagonal
from ..posteriors import Gaussian
from ._state import IVONState, check_state, in_dtypes_of_the_model
from ._step import Scale


def posterior(
    state: IVONState, *, num_data: int, prior_precision: float = 1.0, ess: float | None = None
) -> Gaussian:
    """Read the Gaussian off a state, ``N(m, 1 / (lambda (h + delta)))``.

    Args:
        state: Of one network, or of several, every tensor with a leading axis; under ``vmap`` too.
        num_data: Number of rows ``N`` of the whole data, as in the updates.
        prior_precision: Precision (1 / variance) of the prior, as in the updates.
        ess: ``lambda``; ``None`` for ``num_data``.

    Returns:
        Gaussian over the covered parameters, in their dtypes, without a graph. Its mean carries the ``Fixed``
        leaves of the state.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or gives no positive variances.
        RuntimeError: If the state is not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> state = fb.ivon.init({"w": torch.ones(2)}, hess_init=0.4)
        >>> fb.ivon.posterior(state, num_data=10, prior_precision=1.0).variance["w"]
        tensor([0.2000, 0.2000])
    """
    call = "ivon.posterior"
    check_state(state, f"{call}(state, ...)")
    scale = Scale.of(num_data, prior_precision, ess, call)
    with torch.inference_mode(False), torch.no_grad():
        precision = map_leaves(scale.precision, state.hessian)
        hessians = named_leaves(precision)
        for name, mean in named_leaves(state.mean).items():
            _check(name, mean, hessians[name])
        variance = map_leaves(torch.reciprocal, precision)
        mean, fixed = (map_leaves(torch.clone, tree) for tree in (state.mean, state.fixed))
        mean = merge(in_dtypes_of_the_model(state, mean), fixed)
        return Gaussian(mean, Diagonal(in_dtypes_of_the_model(state, variance)))


def _check(name: str, mean: Tensor, precision: Tensor) -> None:
    if not is_concrete(mean) or not is_concrete(precision):
        return
    if not bool((mean.isfinite() & precision.isfinite()).all()):
        raise RuntimeError(
            f"`ivon.posterior(state, ...)` should be given a finite state; some of {name!r} are not. A lower "
            "learning rate, a larger `hess_init`, or a `clip_radius`, usually helps."
        )
    if not bool((precision > 0).all()):
        raise ValueError(
            f"`ivon.posterior(prior_precision=..., num_data=...)` should be those of the updates: with these "
            f"`h + delta` of {name!r} is not positive everywhere."
        )
