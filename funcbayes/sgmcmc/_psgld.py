"""Langevin dynamics preconditioned by the squares of gradients."""

import functools

import torch
from torch import Tensor

from .._checks import positive_int
from .._random import Seed
from .._tree import Params, is_parameter, map_leaves, pytree_dataclass, select
from ._sampler import Moving, Sampler, start
from ._scalars import (
    Schedule,
    number_from_zero,
    over,
    plus,
    positive_number,
    step_size_at,
    step_size_of,
    temperature_at,
    temperature_of,
)

_CALL = "sgmcmc.psgld"


@pytree_dataclass
class PSGLDState:
    """A chain of :func:`psgld`.

    Attributes:
        params: Where it is.
        second_moment: Running mean of the squares of mean gradients of the parameters that can move, started
            at 0.
        step: How many steps it has taken, an int64 scalar.
        seed: Of its noise, an int64 scalar.
    """

    params: Params
    second_moment: Params
    step: Tensor
    seed: Tensor


def psgld(
    step_size: float | Schedule,
    *,
    num_data: int,
    decay: float = 0.99,
    damping: float = 1e-5,
    temperature: float | Schedule = 1.0,
) -> Sampler[PSGLDState]:
    """Stochastic gradient Langevin dynamics with the preconditioner of RMSprop.

    A step with gradient ``g`` of the potential of ``N`` rows, number ``t`` counted from 1, is

        V     <- decay * V + (1 - decay) * (g / N)^2
        G     =  1 / (damping + sqrt(V / (1 - decay^t) + decay^t))
        theta <- theta - eps / 2 * G * g + sqrt(eps * T * G) * z,

    entry by entry, Li et al. (2016), "Preconditioned stochastic gradient Langevin dynamics for deep neural
    networks", algorithm 1: parameters move along the gradient that is **summed** over data, and ``V`` is of
    its mean over rows, here with the prior. It differs in how ``V`` begins. It is divided by ``1 - decay^t``
    as in Adam (Kingma & Ba 2015), or the first steps would be up to ``1 / sqrt(1 - decay)`` times too long;
    and ``decay^t`` is added, or a parameter whose first gradients vanish would be thrown as far as
    ``sqrt(eps / damping)``.

    The paper's term ``Gamma = dG / dtheta`` is left out, as the paper proposes: it needs
    second derivatives. It carries the factor ``1 - decay``, and so does the bias that leaving it out adds to
    that of the step size, which is as for :func:`sgld` with ``eps G`` for ``eps``: variances of a Gaussian
    were 14 percent too large with the default and 3 percent with 0.999. Where ``V`` no longer changes,
    ``exp(-U / T)`` is stationary but for the step size.

    Args:
        step_size: ``eps``, a number or a function of the number of the step: see :func:`sgld`. It is that of
            the paper, about the learning rate of RMSprop divided by ``N``.
        num_data: ``N``, the number of rows of the whole data.
        decay: Of the running mean, at least 0 and below 1.
        damping: ``lambda`` of the paper, positive, in units of the mean gradient.
        temperature: ``T``, a number or a function of the number of the step.

    Returns:
        ``init`` and ``update``: see :class:`Sampler`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``step_size`` or ``damping`` is not positive, ``num_data`` is below 1, ``temperature``
            is negative, or ``decay`` is out of range.

    Example:
        >>> import torch
        >>> from funcbayes import sgmcmc
        >>> sampler = sgmcmc.psgld(0.01, num_data=10)
        >>> state = sampler.init({"w": torch.zeros(2)}, seed=0)
        >>> state = sampler.update(state, {"w": torch.tensor([1.0, 100.0])})
        >>> state.second_moment["w"]
        tensor([1.0000e-04, 1.0000e+00])
    """
    decay = number_from_zero(decay, f"{_CALL}(decay=...)")
    if decay >= 1:
        raise ValueError(f"`{_CALL}(decay=...)` should be at least 0 and below 1, got {decay}.")
    update = functools.partial(
        _update,
        step_size=step_size_of(step_size, _CALL),
        num_data=positive_int(num_data, f"{_CALL}(num_data=...)"),
        decay=decay,
        damping=positive_number(damping, f"{_CALL}(damping=...)"),
        temperature=temperature_of(temperature, _CALL),
    )
    return Sampler(_init, update)


def _init(params: Params, seed: Seed) -> PSGLDState:
    with torch.inference_mode(False), torch.no_grad():
        params, step, key = start(params, seed, _CALL)
        zeros = map_leaves(torch.zeros_like, select(params, lambda _, leaf: is_parameter(leaf)))
        return PSGLDState(params, zeros, step, key)


def _update(
    state: PSGLDState,
    gradients: Params,
    *,
    step_size: float | Schedule,
    num_data: int,
    decay: float,
    damping: float,
    temperature: float | Schedule,
) -> PSGLDState:
    with torch.inference_mode(False), torch.no_grad():
        moving = Moving.of(state.params, gradients, _CALL)
        size = step_size_at(step_size, state.step, _CALL)
        variance = size * temperature_at(temperature, state.step, _CALL)
        start = decay ** (state.step + 1).double()  # what is left of it
        moments, roots, leaves = [], [], []
        for leaf, g, v in zip(moving.leaves, moving.gradients, moving.like(state.second_moment), strict=True):
            v = torch.addcmul(decay * v, g, g, value=(1 - decay) / num_data**2)
            preconditioner = 1 / (damping + (v / over(1 - start, v) + over(start, v)).sqrt())
            moments.append(v)
            roots.append(preconditioner.sqrt())
            leaves.append(plus(leaf, -size / 2, preconditioner * g))
        leaves = moving.with_noise(leaves, variance, state, roots)
        return PSGLDState(
            moving.placed(state.params, leaves),
            moving.placed(state.second_moment, moments),
            state.step + 1,
            state.seed.clone(),
        )
