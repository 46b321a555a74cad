"""Stochastic gradient Hamiltonian Monte Carlo."""

import functools

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, is_parameter, map_leaves, pytree_dataclass, select
from ._sampler import Moving, Sampler, start
from ._scalars import (
    Schedule,
    number_from_zero,
    plus,
    positive_number,
    refuse_negative,
    step_size_at,
    step_size_of,
    temperature_at,
    temperature_of,
)

_CALL = "sgmcmc.sghmc"


@pytree_dataclass
class SGHMCState:
    """A chain of :func:`sghmc`.

    Attributes:
        params: Where it is.
        momentum: Of the parameters that can move, for unit masses. It starts at 0; its stationary variance
            is ``T / (1 - alpha / 2)`` for small step sizes, see :func:`sghmc`.
        step: How many steps it has taken, an int64 scalar.
        seed: Of its noise, an int64 scalar.
    """

    params: Params
    momentum: Params
    step: Tensor
    seed: Tensor


def sghmc(
    step_size: float | Schedule,
    *,
    friction: float = 0.1,
    noise_estimate: float = 0.0,
    temperature: float | Schedule = 1.0,
) -> Sampler[SGHMCState]:
    """Stochastic gradient Hamiltonian Monte Carlo: gradient descent with momentum and noise.

    A step is, with the step size ``eta``, the friction ``alpha``, the noise estimate ``beta``, the
    temperature ``T`` and standard normal ``z``,

        r     <- (1 - alpha) * r - sqrt(eta) * grad U(theta) + sqrt(2 (alpha T - beta)) * z
        theta <- theta + sqrt(eta) * r,

    Chen, Fox & Guestrin (2014), "Stochastic gradient Hamiltonian Monte Carlo", equation 15, written for
    the momentum ``r`` of equation 13 instead of ``v = sqrt(eta) r``, so that it stays what it is while the
    step size changes. In the terms of equation 13, with unit masses, ``eta = epsilon^2`` and
    ``alpha = epsilon C``.

    ``eta`` is the learning rate of SGD with momentum ``1 - alpha`` on ``U``. A friction of 1 makes it
    :func:`sgld` with twice the step size; little friction goes further before it turns, but forgets
    more slowly: in about ``1 / alpha`` steps.

    It is the symplectic Euler discretisation of Langevin dynamics, with the position moved last. On a
    Gaussian target of precision ``lambda``, with exact gradients and ``beta = 0``, the variance of a
    parameter is ``T / lambda / (1 - eta lambda / (4 - 2 alpha))``: the bias is of first order in ``eta``,
    which is of second order in ``epsilon``, whatever the friction, and the chain is stable while
    ``eta lambda < 4 - 2 alpha``. The variance of ``r`` is ``T / (1 - alpha / 2 - eta lambda / 4)``.
    Gradients from a batch, with covariance ``V``, act as if the temperature were higher by
    ``eta V / (2 alpha)``; ``beta = eta V / 2`` takes that much noise off.

    Args:
        step_size: ``eta``, a number or a function of the number of the step: see :func:`sgld`.
        friction: ``alpha``, the part of the momentum that is lost in a step: positive, at most 1.
        noise_estimate: ``beta``, an estimate of the noise that gradients bring; at most ``alpha T``.
        temperature: ``T``, a number or a function of the number of the step.

    Returns:
        ``init`` and ``update``: see :class:`Sampler`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``step_size`` is not positive, ``friction`` is out of range, ``noise_estimate`` or
            ``temperature`` is negative, or ``noise_estimate`` is above ``friction * temperature``, which
            would ask for noise of negative variance: of a function it is looked at for step 0 here.

    Example:
        >>> import torch
        >>> from funcbayes import sgmcmc
        >>> sampler = sgmcmc.sghmc(0.05, friction=0.2)
        >>> state = sampler.init({"w": torch.zeros(3)}, seed=0)
        >>> for _ in range(10):
        ...     state = sampler.update(state, {"w": state.params["w"] - 2.0})  # N(2, 1)
        >>> state.momentum["w"].shape
        torch.Size([3])
    """
    friction, heat = positive_number(friction, f"{_CALL}(friction=...)"), temperature_of(temperature, _CALL)
    if friction > 1:
        raise ValueError(f"`{_CALL}(friction=...)` should be positive and at most 1, got {friction}.")
    noise_estimate = number_from_zero(noise_estimate, f"{_CALL}(noise_estimate=...)")
    # A schedule is looked at where it starts, which is without heat if it explores first.
    _noise_variance(friction, noise_estimate, temperature_at(heat, torch.tensor(0), _CALL))
    update = functools.partial(
        _update,
        step_size=step_size_of(step_size, _CALL),
        friction=friction,
        noise_estimate=noise_estimate,
        temperature=heat,
    )
    return Sampler(_init, update)


def _noise_variance(friction: float, noise_estimate: float, temperature: float | Tensor) -> float | Tensor:
    """What ``z`` is multiplied by, squared."""
    left = friction * temperature - noise_estimate
    refuse_negative(left, f"`{_CALL}` should have a `friction * temperature - noise_estimate` of at least 0")
    return 2 * left


def _init(params: Params, seed: Seed) -> SGHMCState:
    with torch.inference_mode(False), torch.no_grad():
        params, step, key = start(params, seed, _CALL)
        zeros = map_leaves(torch.zeros_like, select(params, lambda _, leaf: is_parameter(leaf)))
        return SGHMCState(params, zeros, step, key)


def _update(
    state: SGHMCState,
    gradients: Params,
    *,
    step_size: float | Schedule,
    friction: float,
    noise_estimate: float,
    temperature: float | Schedule,
) -> SGHMCState:
    with torch.inference_mode(False), torch.no_grad():
        moving = Moving.of(state.params, gradients, _CALL)
        root = step_size_at(step_size, state.step, _CALL) ** 0.5
        heat = temperature_at(temperature, state.step, _CALL)
        variance = _noise_variance(friction, noise_estimate, heat)
        momenta = [
            plus((1 - friction) * r, -root, g)
            for r, g in zip(moving.like(state.momentum), moving.gradients, strict=True)
        ]
        momenta = moving.with_noise(momenta, variance, state)
        leaves = [plus(leaf, root, r) for leaf, r in zip(moving.leaves, momenta, strict=True)]
        return SGHMCState(
            moving.placed(state.params, leaves),
            moving.placed(state.momentum, momenta),
            state.step + 1,
            state.seed.clone(),
        )
