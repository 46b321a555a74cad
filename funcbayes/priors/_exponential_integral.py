"""The exponential integral ``E1``, scaled so that it does not underflow."""

import math

import torch
from torch import Tensor

_EULER = 0.57721566490153286061
# By dtype: up to which x the series is used, its number of terms, and the depth of the continued fraction
# beyond. The sum of the series costs some six times the rounding error at 1 and fifty times at 2, while the
# fraction needs a depth that goes with 1 / x. Relative errors are then below 1e-6 and 1e-13.
_PLANS = {torch.float32: (1.0, 12, 20), torch.float64: (2.0, 26, 40)}


def scaled_exponential_integral(log_x: Tensor) -> Tensor:
    """``exp(x) E1(x) = int_0^inf exp(-t) / (x + t) dt``, from ``log x``, in single or double precision.

    Derivatives in ``log x``, unlike those in ``x``, are of moderate size everywhere, also next to zero.

    Abramowitz & Stegun (1964): for small ``x`` the series of eq. 5.1.11,
    ``E1(x) = -gamma - log x - sum_k (-x)^k / (k k!)``; for large ones the even part of the continued fraction
    of eq. 5.1.22, ``exp(x) E1(x) = 1 / (x + 1 - 1 / (x + 3 - 4 / (x + 5 - ...)))``. Derivatives are those of
    the sum and the fraction: ``exp(x) E1(x) - 1 / x`` would cancel for large ``x``.
    """
    split, num_terms, depth = _PLANS[log_x.dtype]
    # Each branch sees harmless numbers where the other is taken, or gradients there would be 0 * inf.
    low, high = log_x.clamp_max(math.log(split)), log_x.clamp_min(math.log(split)).exp()
    x = low.exp()
    series = torch.zeros_like(x)
    for k in range(num_terms, 0, -1):
        series = 1 / (k * math.factorial(k)) - x * series
    small = x.exp() * (x * series - low - _EULER)
    fraction = high + (2 * depth + 1)
    for k in range(depth, 0, -1):
        fraction = high + (2 * k - 1) - k**2 / fraction
    return torch.where(log_x < math.log(split), small, 1 / fraction)
