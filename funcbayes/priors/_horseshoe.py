"""Horseshoe priors, which leave large parameters alone and pull all others to zero."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .._tree import pytree_dataclass
from ._interface import Prior
from ._numbers import Numbers

_EULER = 0.57721566490153286
_SPLIT = 2.0  # the series below, the continued fraction above
_TERMS, _DEPTH = 30, 60


@pytree_dataclass
class HorseshoePrior(Prior):
    """Independent horseshoes: ``theta ~ N(0, lambda^2 scale^2)`` with a half-Cauchy ``lambda``.

    With ``lambda`` integrated out (Carvalho, Polson & Scott 2010, theorem 1 and its proof)
    ``p(theta) = (2 pi^3)^(-1/2) / scale * exp(x) E1(x)`` with ``x = theta^2 / (2 scale^2)`` and the
    exponential integral ``E1``. The density is infinite at zero; there the smallest ``x`` of the dtype stands
    in, and the gradient is zero.

    Attributes:
        scale: In units of the parameter: one number, or a tree.

    Raises:
        TypeError: If it is no number and no tree of numbers.
        ValueError: If it is not positive and finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> fb.priors.Horseshoe(scale=0.1).log_prob({"w": torch.tensor([0.001, 1.0])})
        tensor(-1.2207)
    """

    scale: Numbers = 1.0

    def __post_init__(self) -> None:
        self._check(("scale",))

    def _log_density(self, theta: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        scale = numbers["scale"]
        x = 0.5 * (theta / scale).square()
        return scaled_exponential_integral(x).log() - scale.log() - 0.5 * math.log(2 * math.pi**3)


def scaled_exponential_integral(x: Tensor) -> Tensor:
    """``exp(x) E1(x)`` for ``x >= 0``, Abramowitz & Stegun (1964), eq. 5.1.11 and 5.1.22.

    ``E1(x) = -gamma - log x - sum_k (-x)^k / (k k!)`` where ``x`` is small, and else the continued fraction
    ``exp(x) E1(x) = 1 / (x + 1 - 1 / (x + 3 - 4 / (x + 5 - 9 / ...)))``.
    """
    x = x.clamp_min(torch.finfo(x.dtype).tiny)
    is_small = x < _SPLIT
    low, high = x.clamp_max(_SPLIT), x.clamp_min(_SPLIT)
    # Horner's scheme from the last term on: -(-x)^k / (k k!) = x (-x)^(k-1) / (k k!).
    series = torch.zeros_like(low)
    for k in range(_TERMS, 0, -1):
        series = 1 / (k * math.factorial(k)) - low * series
    small = low.exp() * (low * series - low.log() - _EULER)
    tail = high + (2 * _DEPTH + 1)
    for k in range(_DEPTH, 0, -1):
        tail = high + (2 * k - 1) - k**2 / tail
    return torch.where(is_small, small, 1 / tail)
