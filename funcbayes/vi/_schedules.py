"""Weights of the KL over the course of a fit: functions of the number of the step, from 0 on."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from .._checks import positive_int

Schedule = Callable[[int], float]


def linear_warmup(num_steps: int, start: float = 0.0) -> Schedule:
    """Rise from ``start`` to 1 over some steps, and stay there: Bowman et al. (2016), section 3.1.

    Args:
        num_steps: Steps after which the weight is 1.
        start: The first weight.

    Returns:
        ``step -> weight``, for ``vi.fit(kl_weight=...)``.

    Raises:
        TypeError: If ``num_steps`` is no int.
        ValueError: If ``num_steps`` is below 1, or ``start`` is not from 0 to 1.

    Example:
        >>> from funcbayes import vi
        >>> [vi.linear_warmup(4)(step) for step in (0, 1, 4, 5)]
        [0.0, 0.25, 1.0, 1.0]
    """
    num_steps = positive_int(num_steps, "vi.linear_warmup(num_steps=...)")
    _check_weight(start, "vi.linear_warmup(start=...)")
    return lambda step: start + (1 - start) * min(step / num_steps, 1.0)


def cyclical(num_steps: int, fraction: float = 0.5) -> Schedule:
    """Rise from 0 to 1 again and again: Fu et al. (2019), eq. 6.

    Args:
        num_steps: Steps of one cycle.
        fraction: Of a cycle during which the weight rises; it is 1 for the rest.

    Returns:
        ``step -> weight``, for ``vi.fit(kl_weight=...)``.

    Raises:
        TypeError: If ``num_steps`` is no int.
        ValueError: If ``num_steps`` is below 1, or ``fraction`` is not positive or above 1.

    Example:
        >>> from funcbayes import vi
        >>> [vi.cyclical(4)(step) for step in range(6)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    """
    num_steps = positive_int(num_steps, "vi.cyclical(num_steps=...)")
    if not 0 < fraction <= 1:
        raise ValueError(f"`vi.cyclical(fraction=...)` should be above 0 and at most 1, got {fraction}.")
    return lambda step: min((step % num_steps) / (fraction * num_steps), 1.0)


def halving(num_batches: int) -> Schedule:
    """Half as much in each batch of an epoch as in the one before: Blundell et al. (2015), section 3.4.

    Weights ``num_batches * 2^(M - i) / (2^M - 1)`` for batch ``i`` of ``M = num_batches``, whose mean over an
    epoch is 1.

    Args:
        num_batches: Batches of an epoch, ``M``.

    Returns:
        ``step -> weight``, for ``vi.fit(kl_weight=...)``.

    Raises:
        TypeError: If ``num_batches`` is no int.
        ValueError: If ``num_batches`` is below 1.

    Example:
        >>> from funcbayes import vi
        >>> [round(vi.halving(2)(step), 3) for step in range(3)]
        [1.333, 0.667, 1.333]
    """
    num_batches = positive_int(num_batches, "vi.halving(num_batches=...)")
    # 2^(M - i) / (2^M - 1) with 1 <= i <= M, without the large powers.
    return lambda step: num_batches * 0.5 ** (step % num_batches + 1) / (1 - 0.5**num_batches)


def checked_weight(value: Any, call: str) -> float:
    """A weight of the KL as a float.

    Args:
        value: A number, of Python, NumPy, or in a tensor.
        call: How the user called us, or what was called for us.
    """
    given = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"`{call}` should be a number, got {type(value).__name__}.")
    number = float(given)
    if not 0 <= number < math.inf:
        raise ValueError(f"`{call}` should be finite and not negative, got {number}.")
    return number


def _check_weight(value: float, call: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"`{call}` should be from 0 to 1, got {value}.")
