"""Learning rates over the course of a fit: functions of the number of the step, from 0 on."""

import math
from collections.abc import Callable

from .._checks import positive_int, positive_number

Schedule = Callable[[int], float]


def cosine(peak: float, num_steps: int, warmup: int = 0) -> Schedule:
    """Rise linearly to ``peak``, then fall to zero along half a cosine, as Shen et al. (2024) train.

    Args:
        peak: The largest learning rate.
        num_steps: Steps of the whole run; later ones have the rate of the last. It is never zero.
        warmup: Steps of the rise, less than ``num_steps``; 0 for none.

    Returns:
        ``step -> learning rate``, for ``ivon.fit(learning_rate=...)``.

    Raises:
        TypeError: If ``num_steps`` or ``warmup`` is no int.
        ValueError: If ``peak`` or ``num_steps`` is not positive, or ``warmup`` is not below ``num_steps``.

    Example:
        >>> from funcbayes import ivon
        >>> [round(ivon.cosine(1.0, 6, warmup=2)(step), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    peak = positive_number(peak, "ivon.cosine(peak=...)")
    num_steps = positive_int(num_steps, "ivon.cosine(num_steps=...)")
    if isinstance(warmup, bool) or not hasattr(warmup, "__index__"):
        raise TypeError(f"`ivon.cosine(warmup=...)` should be an int, got {type(warmup).__name__}.")
    if not 0 <= warmup < num_steps:
        raise ValueError(
            f"`ivon.cosine(warmup=...)` should be from 0 to below `num_steps={num_steps}`, got {warmup}."
        )

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (min(step, num_steps - 1) - warmup) / (num_steps - warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * done))

    return rate
