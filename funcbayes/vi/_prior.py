"""The two terms of the divergence from a prior: what has a closed form, and what draws are needed for."""

import math

from torch import Tensor

from .._tree import Params, named_leaves, parameters_of
from ..covariances._flat import ravel
from ..covariances._operator import trace_of_product
from ..likelihoods._layout import wide
from ..posteriors import Gaussian
from ..priors import Prior
from ..priors._given import HasLogProb
from ._mean_field import Independent
from ._scale import Scale


def expected_log_prior(scale: Scale, prior: HasLogProb) -> Tensor | None:
    """``E_q log p(theta)`` in closed form, a scalar; ``None`` where there is none."""
    if isinstance(prior, Prior):
        if isinstance(scale, Independent) and prior.is_the_same_everywhere:
            flat = scale.flat_std.to(scale.dtype).square()
            return prior.expected_log_prob({"all": scale.flat_mean}, {"all": flat})
        mean, variance = named_leaves(scale.mean), named_leaves(scale.variance())
        return prior.expected_log_prob(mean, variance)
    if not isinstance(prior, Gaussian):
        return None
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


def log_prior(prior: HasLogProb, params: Params) -> Tensor:
    """``log p(theta)``, a scalar."""
    return wide(prior.log_prob(params))
