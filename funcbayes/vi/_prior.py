"""The two terms of the divergence from a prior: what has a closed form, and what draws are needed for."""

import math
from typing import Any

from torch import Tensor

from .._tree import Params, difference, named_leaves, parameters_of
from ..covariances import Diagonal
from ..covariances._flat import ravel
from ..covariances._operator import trace_of_product
from ..likelihoods._layout import wide
from ..posteriors import Gaussian
from ..priors import Normal, Prior
from ._mean_field import Independent
from ._scale import Scale

AnyPrior = Prior | Gaussian


def checked_prior(prior: Any, prior_precision: Any, leaves: Params, call: str) -> AnyPrior:
    """The prior over some leaves that arguments of a public function mean.

    Args:
        prior: A prior or a Gaussian; ``None`` for a Gaussian of mean zero with ``prior_precision``.
        prior_precision: One number, or a tree with a number or tensor for each leaf.
        leaves: The covered parameters.
        call: How the user called us.
    """
    if prior is None:
        prior = Normal(precision=prior_precision)
        prior.check(leaves, f"{call}(prior_precision=...)")
        return prior
    if isinstance(prior, Prior):
        prior.check(leaves, f"{call}(prior=...)")
        return prior
    if not isinstance(prior, Gaussian):
        raise TypeError(
            f"`{call}(prior=...)` should be one of `funcbayes.priors` or a Gaussian, got "
            f"{type(prior).__name__}."
        )
    location = parameters_of(prior.mean)
    differing = difference(location, named_leaves(leaves))
    if differing:
        raise ValueError(
            f"`{call}(prior=...)` should be over the leaves that the posterior covers; {differing}. "
            "`restrict(prior, where)` leaves leaves out."
        )
    reason = prior.covariance.singular()
    if reason:
        raise ValueError(f"`{call}(prior=...)` should have a density, but {reason}.")
    if isinstance(prior.covariance, Diagonal):  # as numbers for each leaf, which no operator is needed for
        variance = named_leaves(prior.covariance.variance)
        return Normal(precision={name: 1 / variance[name] for name in location}, mean=location)
    return prior


def expected_log_prior(scale: Scale, prior: AnyPrior) -> Tensor | None:
    """``E_q log p(theta)`` in closed form, a scalar; ``None`` where there is none."""
    if isinstance(prior, Prior):
        if isinstance(scale, Independent) and prior.is_the_same_everywhere:
            flat = scale.flat_std.to(scale.dtype).square()
            return prior.expected_log_prob({"all": scale.flat_mean}, {"all": flat})
        mean, variance = named_leaves(scale.mean), named_leaves(scale.variance())
        return prior.expected_log_prob(mean, variance)
    # -1/2 [ tr(S_p^-1 S_q) + (m_q - m_p)^T S_p^-1 (m_q - m_p) + logdet S_p + P log 2 pi ]
    precision, location = prior.covariance.inverse(), parameters_of(prior.mean)
    shift = {name: leaf - location[name] for name, leaf in named_leaves(scale.mean).items()}
    column = ravel(shift, prior.covariance.like).unsqueeze(-1)
    spread = scale.operator()
    try:
        trace = trace_of_product(precision, spread)
    except NotImplementedError:  # the other way round, for what only one of the two knows
        trace = spread.trace_with(precision)
    total = trace + precision.quadratic(column) - precision.logdet()
    return (-0.5 * (total + len(column) * math.log(2 * math.pi))).to(scale.dtype)


def log_prior(prior: AnyPrior, params: Params) -> Tensor:
    """``log p(theta)``, a scalar."""
    return wide(prior.log_prob(named_leaves(params)))
