"""Laplace priors, which favour parameters at their location."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .._tree import pytree_dataclass
from ._interface import Prior, Values
from ._numbers import FINITE, POSITIVE, Numbers, Range

_FAR = 40.0  # standard deviations; the density of a normal there, exp(-800), is zero in double precision


@pytree_dataclass
class LaplacePrior(Prior):
    """Independent Laplace densities, ``log p = -|theta - location| / scale - log(2 scale)`` each.

    ``E log p`` for ``theta ~ N(m, v)`` has the mean of a folded normal for the distance: see
    :func:`folded_mean`.

    Attributes:
        scale: In units of the parameter; the standard deviation is ``sqrt(2) scale``. A number, or a tree
            with a number or a tensor for each leaf.
        location: In units of the parameter, likewise.

    Raises:
        TypeError: If one of them is neither a number nor a tree of numbers.
        ValueError: If a scale is not positive and finite, or a location not finite.

    Example:
        >>> import torch
        >>> from funcbayes import priors
        >>> prior = priors.Laplace(scale=0.5)
        >>> prior.log_prob({"w": torch.tensor([0.0, 1.0])})
        tensor(-2.)
        >>> prior.expected_log_prob({"w": torch.zeros(2)}, {"w": torch.ones(2)})
        tensor(-3.1915)
    """

    scale: Numbers = 1.0
    location: Numbers = 0.0

    ranges: ClassVar[Mapping[str, Range]] = {"scale": POSITIVE, "location": FINITE}

    def _log_density(self, theta: Tensor, numbers: Values) -> Tensor:
        return _log_laplace((theta - numbers["location"]).abs(), numbers["scale"])

    def _expected_log_density(self, mean: Tensor, variance: Tensor, numbers: Values) -> Tensor:
        return _log_laplace(folded_mean(mean - numbers["location"], variance), numbers["scale"])


def folded_mean(shift: Tensor, variance: Tensor) -> Tensor:
    """``E|d|`` for ``d ~ N(shift, variance)``, Leone, Nelson & Nottingham (1961).

    ``sqrt(2 v / pi) exp(-d^2 / 2 v) + d erf(d / sqrt(2 v))``. Its derivative in the variance is
    ``exp(-d^2 / 2 v) / sqrt(2 pi v)``, infinite for a point at zero; below the smallest normal number of the
    dtype a variance counts as that number, and has no gradient.
    """
    std = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
    # Far away E|d| is |d|; there d / std may overflow, and its gradient would be 0 * inf.
    is_near = shift.abs() < _FAR * std
    close = torch.where(is_near, shift, 0.0)
    ratio = close / (math.sqrt(2) * std)
    near = math.sqrt(2 / math.pi) * std * (-ratio.square()).exp() + close * torch.erf(ratio)
    return torch.where(is_near, near, shift.abs())


def _log_laplace(distance: Tensor, scale: Tensor) -> Tensor:
    return -distance / scale - scale.log() - math.log(2)
