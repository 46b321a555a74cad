"""The steps that IVON consists of: draws, and what gradients at them make of the state."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import positive_int, positive_number
from .._random import Seed, fold, resolve_seed
from .._tree import Params, difference, named_leaves
from ..covariances._noise import leaf_noise
from ._checks import fraction, positive_or_none
from ._state import IVONState, check_state, like_mean


@dataclass(frozen=True)
class Scale:
    """How curvature is turned into precision.

    Attributes:
        ess: ``lambda``, by which the mean loss counts.
        decay: ``delta``, the precision of the prior for one row.
    """

    ess: float
    decay: float

    @classmethod
    def of(cls, num_data: Any, prior_precision: Any, ess: Any, call: str) -> "Scale":
        """Check the numbers that a user gives."""
        num_data = positive_int(num_data, f"{call}(num_data=...)")
        prior_precision = positive_number(prior_precision, f"{call}(prior_precision=...)")
        ess = positive_or_none(ess, f"{call}(ess=...)")
        return cls(float(num_data) if ess is None else ess, prior_precision / num_data)

    def precision(self, hessian: Tensor) -> Tensor:
        """``1 / sigma^2``."""
        return self.ess * (hessian + self.decay)

    def kl(self, mean: Tensor, hessian: Tensor) -> Tensor:
        """``KL(q || p) / lambda`` of each parameter, for the prior of precision ``lambda delta``."""
        ratio = self.decay / (hessian + self.decay)  # of the variances
        return 0.5 * (self.decay * mean.square() + (ratio - 1 - ratio.log()) / self.ess)


@dataclass(frozen=True)
class Rule:
    """How a state is moved: see :func:`step`."""

    scale: Scale
    learning_rate: float
    beta1: float
    beta2: float
    clip_radius: float | None
    rescale_lr: bool

    @classmethod
    def of(
        cls,
        scale: Scale,
        learning_rate: Any,
        beta1: Any,
        beta2: Any,
        clip_radius: Any,
        rescale_lr: Any,
        call: str,
    ) -> "Rule":
        """Check the numbers that a user gives."""
        if not isinstance(rescale_lr, bool):
            raise TypeError(
                f"`{call}(rescale_lr=...)` should be True or False, got {type(rescale_lr).__name__}."
            )
        return cls(
            scale,
            positive_number(learning_rate, f"{call}(learning_rate=...)"),
            fraction(beta1, f"{call}(beta1=...)"),
            fraction(beta2, f"{call}(beta2=...)"),
            positive_or_none(clip_radius, f"{call}(clip_radius=...)"),
            rescale_lr,
        )


def draws(
    state: IVONState,
    num_samples: int = 1,
    *,
    seed: Seed,
    num_data: int,
    prior_precision: float = 1.0,
    ess: float | None = None,
) -> Params:
    """Draw the parameters at which a step takes its gradients, ``theta = m + sigma eps``.

    Those of :func:`update` with the same arguments. It works under ``vmap`` too.

    Args:
        state: The state.
        num_samples: How many, ``S``.
        seed: Draws are a function of it and of the state's number of steps.
        num_data: Number of rows ``N`` of the whole data.
        prior_precision: Precision (1 / variance) of the prior.
        ess: ``lambda``; ``None`` for ``num_data``.

    Returns:
        The covered parameters with a leading axis, ``(S, *s)`` each, in at least float32.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        See :func:`step`.
    """
    call = "ivon.draws"
    check_state(state, f"{call}(state, ...)")
    num_samples = positive_int(num_samples, f"{call}(num_samples=...)")
    scale = Scale.of(num_data, prior_precision, ess, call)
    with torch.inference_mode(False), torch.no_grad():
        return drawn(state, num_samples, key_of_step(resolve_seed(seed), state.step), scale)


def key_of_step(seed: Seed, step: Tensor) -> Tensor:
    """What the noise of a step is keyed by: on the CPU, wherever the state is."""
    return fold(fold(seed, "ivon"), step.cpu())


def drawn(state: IVONState, num_samples: int, key: Tensor, scale: Scale) -> Params:
    """``m + sigma eps``, leaves ``(S, *s)``."""
    noise = leaf_noise(state.mean, torch.arange(num_samples), key)
    hessian = named_leaves(state.hessian)
    leaves = {
        name: torch.addcmul(mean, noise[name], scale.precision(hessian[name]).rsqrt())
        for name, mean in named_leaves(state.mean).items()
    }
    return like_mean(state, leaves)


def step(
    state: IVONState,
    gradients: Params,
    draws: Params,
    *,
    learning_rate: float,
    num_data: int,
    prior_precision: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.99999,
    clip_radius: float | None = None,
    ess: float | None = None,
    rescale_lr: bool = True,
) -> IVONState:
    """Move a state by gradients at draws: see :mod:`funcbayes.ivon`.

    A pure function, which works under ``vmap`` too.

    Args:
        state: The state that the draws are of.
        gradients: Of the **mean** loss of a batch, without the prior, at each draw; leaves ``(S, *s)`` of any
            dtype.
        draws: What :func:`draws` gave, leaves ``(S, *s)``.
        learning_rate: As in :func:`update`, as are all others.
        num_data: Number of rows ``N`` of the whole data.
        prior_precision: Precision (1 / variance) of the prior.
        beta1: How much of the momentum stays.
        beta2: How much of the Hessian stays.
        clip_radius: Bound of each entry of the step, before the learning rate.
        ess: ``lambda``; ``None`` for ``num_data``.
        rescale_lr: Whether the learning rate is multiplied by ``hess_init + delta``.

    Returns:
        The next state.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or leaves do not fit.

    Example:
        Gradients that are found in one's own way:

        >>> import torch, funcbayes as fb
        >>> state = fb.ivon.init({"w": torch.zeros(3)})
        >>> for _ in range(300):
        ...     draws = fb.ivon.draws(state, 4, seed=0, num_data=100)
        ...     gradients = {"w": draws["w"] - 2.0}  # of |w - 2|^2 / 2
        ...     state = fb.ivon.step(state, gradients, draws, learning_rate=0.1, beta2=0.99, num_data=100)
        >>> bool(((state.mean["w"] - 2.0).abs() < 0.1).all())
        True
    """
    call = "ivon.step"
    check_state(state, f"{call}(state, ...)")
    scale = Scale.of(num_data, prior_precision, ess, call)
    rule = Rule.of(scale, learning_rate, beta1, beta2, clip_radius, rescale_lr, call)
    _check_leaves(state, draws, gradients, call)
    with torch.inference_mode(False), torch.no_grad():
        return moved(state, gradients, draws, rule)


def moved(state: IVONState, gradients: Params, draws: Params, rule: Rule) -> IVONState:
    """The next state, by one step of the algorithm."""
    count = state.step + 1
    correction = 1 - rule.beta1 ** count.double()
    rate = rule.learning_rate * ((state.hess_init + rule.scale.decay) if rule.rescale_lr else 1.0)
    given = [named_leaves(tree) for tree in (state.momentum, state.hessian, gradients, draws)]
    means, momenta, hessians = {}, {}, {}
    for name, mean in named_leaves(state.mean).items():
        momentum, hessian, gradient, draw = (leaves[name] for leaves in given)
        gradient = gradient.to(mean.dtype)
        curved = (gradient * (draw - mean)).mean(0) * rule.scale.precision(hessian)
        momentum = torch.lerp(momentum, gradient.mean(0), 1 - rule.beta1)
        hessian = _new_hessian(hessian, curved, rule)
        towards = momentum / correction.to(mean.device, mean.dtype) + rule.scale.decay * mean
        towards = towards / (hessian + rule.scale.decay)
        if rule.clip_radius is not None:
            towards = towards.clamp(-rule.clip_radius, rule.clip_radius)
        means[name], momenta[name], hessians[name] = mean - rate * towards, momentum, hessian
    mean, momentum, hessian = (like_mean(state, leaves) for leaves in (means, momenta, hessians))
    return replace(state, mean=mean, momentum=momentum, hessian=hessian, step=count)


def _new_hessian(hessian: Tensor, curved: Tensor, rule: Rule) -> Tensor:
    # With u = h + delta and r = (1 - beta2) (hhat - h) / u the line of the algorithm is
    #     h + u (r + r^2 / 2),    so that    new h + delta = u (1 + r + r^2 / 2) = u ((1 + r)^2 + 1) / 2,
    # the first terms of u exp(r), and at least u / 2 whatever hhat is. (A step to beta2 h + (1 - beta2) hhat
    # alone, u (1 + r), would turn negative at r < -1.)
    delta = rule.scale.decay
    u = hessian + delta
    r = (1 - rule.beta2) * (curved - hessian) / u
    new = hessian + u * (r + 0.5 * r.square())
    # h is kept and not u, beside which delta may be large: rounding h is the one way to lose the sign of u.
    return new.clamp_min(-delta * (1 - 8 * torch.finfo(hessian.dtype).eps))


def _check_leaves(state: IVONState, draws: Params, gradients: Params, call: str) -> None:
    """Refuse trees over other leaves than the state's, or of other shapes."""
    given = named_leaves(draws)
    first = next(iter(given.values()), None)
    num_samples = first.shape[0] if isinstance(first, Tensor) and first.ndim else 0
    if not num_samples:
        raise ValueError(
            f"`{call}(draws=...)` should have the leaves of the state with a leading axis of draws, got none."
            " Write `draws = ivon.draws(state, ...)`."
        )
    expected = {
        name: leaf.expand(num_samples, *leaf.shape) for name, leaf in named_leaves(state.mean).items()
    }
    for name, tree in (("draws", draws), ("gradients", gradients)):
        differing = difference(tree, expected)
        if differing:
            raise ValueError(
                f"`{call}({name}=...)` should have the leaves of the state with a leading axis of draws, of "
                f"which there are {num_samples}; in it {differing}."
            )
