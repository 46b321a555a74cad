"""Horseshoe priors, which pull small parameters to zero and leave large ones alone."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .._tree import pytree_dataclass
from ._exponential_integral import scaled_exponential_integral
from ._interface import Prior, Values
from ._numbers import POSITIVE, Numbers, Range


@pytree_dataclass
class HorseshoePrior(Prior):
    """Independent horseshoes, ``theta ~ N(0, lambda^2 scale^2)`` each with its own ``lambda ~ C+(0, 1)``.

    Carvalho, Polson & Scott (2010). With ``lambda`` integrated out, as in the proof of their theorem 1,
    ``p = (2 pi^3)^(-1/2) / scale * exp(x) E1(x)``, ``x = theta^2 / (2 scale^2)``, with the exponential
    integral ``E1``. ``E log p`` has no closed form.

    The density is infinite at zero. What has an ``x`` below the smallest normal number of the dtype counts
    as that number (1e-38 in single precision, ``|theta|`` of 1e-19 scales): its density is finite, and its
    gradient is zero.

    Attributes:
        scale: The global scale, in units of the parameter: a number, or a tree with a number or a tensor for
            each leaf.

    Raises:
        TypeError: If it is neither a number nor a tree of numbers.
        ValueError: If it is not positive and finite.

    Example:
        >>> import torch
        >>> from funcbayes import priors
        >>> priors.Horseshoe(scale=0.1).log_prob({"w": torch.tensor([0.001, 1.0])})
        tensor(-1.2207)
    """

    scale: Numbers = 1.0

    ranges: ClassVar[Mapping[str, Range]] = {"scale": POSITIVE}

    def _log_density(self, theta: Tensor, numbers: Values) -> Tensor:
        log_scale, limits = numbers["scale"].log(), torch.finfo(theta.dtype)
        # In log x nothing overflows, however far apart theta and its scale are.
        log_x = 2 * (theta.abs().clamp_min(limits.tiny).log() - log_scale) - math.log(2)
        log_x = log_x.clamp_min(math.log(limits.tiny))
        far = -math.log(limits.eps)  # from there on exp(x) E1(x) is 1 / x to rounding
        near = scaled_exponential_integral(log_x.clamp_max(far)).log()
        return torch.where(log_x < far, near, -log_x) - log_scale - 0.5 * math.log(2 * math.pi**3)
