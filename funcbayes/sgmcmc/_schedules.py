"""Step sizes over the course of a chain: functions of the number of the step, from 0 on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import positive_int
from ._scalars import number_from_zero, positive_number


@dataclass(frozen=True)
class Polynomial:
    """Step sizes that fall as a power of the step, made by :func:`polynomial`."""

    a: float
    b: float
    gamma: float

    def __call__(self, step: int | Tensor) -> float | Tensor:
        """The step size at a step, in float64 if it is a tensor."""
        t = step.double() if isinstance(step, Tensor) else step
        return self.a * (self.b + t) ** -self.gamma


def polynomial(a: float, b: float = 1.0, gamma: float = 0.55) -> Polynomial:
    """Let step sizes fall as ``a * (b + t) ** -gamma``, Welling & Teh (2011), section 3.

    With ``gamma`` above 0.5 and at most 1 their sum diverges and the sum of their squares does not, which
    takes the bias of :func:`sgld` to zero in the limit (equation 2 there). Averages over a finite chain
    converge fastest with 1/3 (Teh, Thiery & Vollmer 2016).

    Args:
        a: Factor, positive; the first step size is ``a * b ** -gamma``.
        b: Steps after which they begin to fall, positive.
        gamma: Power, positive and at most 1.

    Returns:
        ``step -> step size``, for an int, or an int64 tensor of any shape.

    Raises:
        TypeError: If an argument is no number.
        ValueError: If one is out of range.

    Example:
        >>> from funcbayes import sgmcmc
        >>> sgmcmc.polynomial(0.1, b=1.0, gamma=0.5)(3)
        0.05
    """
    call = "sgmcmc.polynomial"
    gamma = positive_number(gamma, f"{call}(gamma=...)")
    if gamma > 1:
        raise ValueError(f"`{call}(gamma=...)` should be at most 1, or the chain comes to rest, got {gamma}.")
    return Polynomial(positive_number(a, f"{call}(a=...)"), positive_number(b, f"{call}(b=...)"), gamma)


@dataclass(frozen=True)
class Cyclical:
    """Step sizes that fall along a cosine again and again, made by :func:`cyclical`.

    Attributes:
        peak: The first step size of each cycle.
        num_cycles: ``M``.
        num_steps: ``K``, of all cycles together.
        exploration: Part of each cycle that explores.
        num_samples: How many states are collected at the end of each cycle.
        spacing: How many steps apart.
    """

    peak: float
    num_cycles: int
    num_steps: int
    exploration: float
    num_samples: int
    spacing: int

    @property
    def length(self) -> int:
        """Steps of a cycle; the last one may be shorter."""
        return -(-self.num_steps // self.num_cycles)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        """The step size at a step, in float64 if it is a tensor."""
        if isinstance(step, Tensor):
            return 0.5 * self.peak * (1 + torch.cos(math.pi * self._fraction(step)))
        return 0.5 * self.peak * (1 + math.cos(math.pi * (step % self.length / self.length)))

    def temperature(self, step: int | Tensor) -> float | Tensor:
        """0 while a cycle explores and 1 while it samples, for the ``temperature`` of a sampler."""
        if isinstance(step, Tensor):
            return (self._fraction(step) >= self.exploration).double()
        return 0.0 if self._explores(step) else 1.0

    def collect(self, step: int) -> bool:
        """Whether the state after a step is to be kept, for :func:`fit`."""
        end = min((step // self.length + 1) * self.length, self.num_steps)
        places, rest = divmod(end - 1 - step, self.spacing)
        return rest == 0 and places < self.num_samples and not self._explores(step)

    def _fraction(self, step: Tensor) -> Tensor:
        return torch.remainder(step, self.length).double() / self.length

    def _explores(self, step: int) -> bool:
        return step % self.length / self.length < self.exploration


def cyclical(
    peak: float,
    num_cycles: int,
    num_steps: int,
    *,
    exploration: float = 0.0,
    num_samples: int = 1,
    spacing: int = 1,
) -> Cyclical:
    """Let step sizes fall along a cosine, again and again: large ones find modes, small ones sample them.

    Step ``t``, counted from 0, of ``K`` in ``M`` cycles has the size

        peak / 2 * [cos(pi * mod(t, ceil(K / M)) / ceil(K / M)) + 1],

    Zhang et al. (2020), "Cyclical stochastic gradient MCMC for Bayesian deep learning", equation 1. What
    they call ``alpha`` is half of the step size of :func:`sgld`, and the step size of :func:`sghmc`.

    In the first part of each cycle, the exploration, their algorithm 1 leaves the noise out, and collects
    nothing: give the sampler the ``temperature`` of the schedule, and :func:`fit` its ``collect``.

    Args:
        peak: The first step size of each cycle, positive.
        num_cycles: ``M``.
        num_steps: ``K``, of all cycles together.
        exploration: Part of each cycle that explores, ``beta`` of the paper, at least 0 and below 1.
        num_samples: How many states to collect at the end of each cycle.
        spacing: How many steps apart; those that lie in the exploration are left out.

    Returns:
        ``step -> step size`` for an int, or an int64 tensor of any shape, with methods
        ``temperature(step)`` and ``collect(step)``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range.

    Example:
        >>> from funcbayes import sgmcmc
        >>> schedule = sgmcmc.cyclical(0.1, num_cycles=2, num_steps=8, exploration=0.5)
        >>> [round(schedule(step), 3) for step in range(5)]
        [0.1, 0.085, 0.05, 0.015, 0.1]
        >>> [step for step in range(8) if schedule.collect(step)]
        [3, 7]
        >>> sampler = sgmcmc.sgld(schedule, temperature=schedule.temperature)
    """
    call = "sgmcmc.cyclical"
    num_cycles = positive_int(num_cycles, f"{call}(num_cycles=...)")
    num_steps = positive_int(num_steps, f"{call}(num_steps=...)")
    if num_cycles > num_steps:
        raise ValueError(
            f"`{call}(num_cycles=...)` should be at most `num_steps={num_steps}`, got {num_cycles}."
        )
    exploration = number_from_zero(exploration, f"{call}(exploration=...)")
    if exploration >= 1:
        raise ValueError(f"`{call}(exploration=...)` should be at least 0 and below 1, got {exploration}.")
    return Cyclical(
        positive_number(peak, f"{call}(peak=...)"),
        num_cycles,
        num_steps,
        exploration,
        positive_int(num_samples, f"{call}(num_samples=...)"),
        positive_int(spacing, f"{call}(spacing=...)"),
    )
