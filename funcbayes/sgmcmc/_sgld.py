"""Stochastic gradient Langevin dynamics."""

import functools

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, pytree_dataclass
from ._sampler import Moving, Sampler, start
from ._scalars import Schedule, plus, step_size_at, step_size_of, temperature_at, temperature_of

_CALL = "sgmcmc.sgld"


@pytree_dataclass
class SGLDState:
    """A chain of :func:`sgld`.

    Attributes:
        params: Where it is.
        step: How many steps it has taken, an int64 scalar.
        seed: Of its noise, an int64 scalar.
    """

    params: Params
    step: Tensor
    seed: Tensor


def sgld(step_size: float | Schedule, *, temperature: float | Schedule = 1.0) -> Sampler[SGLDState]:
    """Stochastic gradient Langevin dynamics: gradient descent with noise.

    A step is, with the step size ``eps``, the temperature ``T`` and standard normal ``z``,

        theta <- theta - eps / 2 * grad U(theta) + sqrt(eps * T) * z,

    Welling & Teh (2011), "Bayesian learning via stochastic gradient Langevin dynamics", equation 4. It is the
    Euler discretisation of a diffusion that has ``exp(-U / T)`` as its stationary density. Its bias is of
    first order in ``eps``: on a Gaussian target of precision ``lambda`` and with exact gradients the variance
    is ``T / lambda / (1 - eps lambda / 4)``, and there is none from ``eps lambda >= 4`` on. A gradient from a
    batch adds ``eps^2 / 4`` times its covariance in every step, which is of first order likewise.

    Args:
        step_size: ``eps``, a number or a function of the number of the step, from 0 on, such as
            :func:`polynomial` or :func:`cyclical`. It is given an int64 scalar, for chains at several steps
            one after another. As ``U`` is summed over data, a fitting size is about the inverse of the number
            of rows.
        temperature: ``T``, likewise; 1 for the posterior, 0 for descent without noise.

    Returns:
        ``init`` and ``update``: see :class:`Sampler`.

    Raises:
        TypeError: If an argument is neither a number nor a function.
        ValueError: If ``step_size`` is not positive or ``temperature`` is negative. What functions give is
            looked at in every step, unless it is inside a transform or on an accelerator.

    Example:
        >>> import torch
        >>> from funcbayes import sgmcmc
        >>> sampler = sgmcmc.sgld(0.1)
        >>> state = sampler.init({"w": torch.zeros(3)}, seed=0)
        >>> for _ in range(10):
        ...     state = sampler.update(state, {"w": state.params["w"] - 2.0})  # N(2, 1)
        >>> state.step
        tensor(10)
    """
    update = functools.partial(
        _update,
        step_size=step_size_of(step_size, _CALL),
        temperature=temperature_of(temperature, _CALL),
    )
    return Sampler(_init, update)


def _init(params: Params, seed: Seed) -> SGLDState:
    with torch.inference_mode(False), torch.no_grad():
        return SGLDState(*start(params, seed, _CALL))


def _update(
    state: SGLDState,
    gradients: Params,
    *,
    step_size: float | Schedule,
    temperature: float | Schedule,
) -> SGLDState:
    with torch.inference_mode(False), torch.no_grad():
        moving = Moving.of(state.params, gradients, _CALL)
        size = step_size_at(step_size, state.step, _CALL)
        variance = size * temperature_at(temperature, state.step, _CALL)
        leaves = [plus(leaf, -size / 2, g) for leaf, g in zip(moving.leaves, moving.gradients, strict=True)]
        leaves = moving.with_noise(leaves, variance, state)
        return SGLDState(moving.placed(state.params, leaves), state.step + 1, state.seed.clone())
