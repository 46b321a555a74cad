"""Quantiles of what is predicted: of outputs over draws, and of mixtures over draws."""

import math

import torch
from torch import Tensor
from torch.func import vmap

from .likelihoods import Likelihood


def weighted_quantile(samples: Tensor, weights: Tensor, q: float) -> Tensor:
    """Quantile over the first axis; for equal weights that of ``torch.quantile``."""
    values, order = samples.sort(0)
    mass = weights[order]
    # Order statistic k stands at the mass before it plus half its own, rescaled to [0, 1]; for equal
    # weights that is k / (S - 1).
    place = mass.cumsum(0) - mass / 2
    first, last = place[:1], place[-1:]
    target = first + q * (last - first)
    upper = (place < target).sum(0, keepdim=True).clamp(0, len(weights) - 1)
    lower = (upper - 1).clamp_min(0)
    below, above = place.gather(0, lower), place.gather(0, upper)
    fraction = torch.where(above > below, (target - below) / (above - below).clamp_min(1e-30), 0.0)
    return torch.lerp(values.gather(0, lower), values.gather(0, upper), fraction)[0]


def mixture_quantile(likelihood: Likelihood, samples: Tensor, weights: Tensor, q: float) -> Tensor:
    """Solve ``sum_s w_s F_s(y) = q`` by bisection, between bounds that hold for any distribution."""
    means, variances = vmap(likelihood.mean)(samples), vmap(likelihood.variance)(samples)
    # Cantelli: a quantile is within sqrt(odds) standard deviations of the mean, and that of a
    # mixture lies between the least and the greatest of its components'.
    reach = math.sqrt(max(q / (1 - q), (1 - q) / q)) * variances.sqrt()
    lower, upper = (means - reach).amin(0) - 1e-6, (means + reach).amax(0) + 1e-6
    cdf = vmap(likelihood.cdf, in_dims=(0, None))
    for _ in range(64 if samples.dtype == torch.float64 else 36):
        middle = (lower + upper) / 2
        is_above = torch.tensordot(weights, cdf(samples, middle), 1) >= q
        lower, upper = torch.where(is_above, lower, middle), torch.where(is_above, middle, upper)
    return upper.round() if likelihood.has_integer_support else upper
