"""Priors that a potential is given."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._tree import Params, difference, named_leaves, parameters_of
from ..covariances import Diagonal
from ..covariances._flat import at_least_single, dtype_of
from ..posteriors import Gaussian
from ..priors import Normal, Prior
from ..priors._numbers import by_leaf


class HasLogProb(Protocol):
    """Anything with a log density of parameters."""

    def log_prob(self, params: Params) -> Tensor:
        """``log p(theta)``, **summed** over all parameters, a scalar."""
        ...


def checked_prior(prior: Any, prior_precision: Any, leaves: Params, call: str) -> HasLogProb:
    """The prior over some leaves that arguments of a public function mean.

    Args:
        prior: Anything with a ``log_prob``; ``None`` for a Gaussian of mean zero with ``prior_precision``.
        prior_precision: One number, or a tree with a number or tensor for each leaf.
        leaves: The covered parameters of one chain.
        call: How the user called us.
    """
    if prior is None:
        prior = Normal(precision=prior_precision)
        prior.check(leaves, f"{call}(prior_precision=...)")
        return prior
    check_is_prior(prior, f"{call}(prior=...)")
    if isinstance(prior, Prior):
        prior.check(leaves, f"{call}(prior=...)")
    if isinstance(prior, Gaussian):
        return _checked_gaussian(prior, leaves, call)
    return prior


def check_is_prior(prior: Any, call: str) -> None:
    """Refuse what has no log density."""
    if isinstance(prior, type) or not callable(getattr(prior, "log_prob", None)):
        shown = prior.__name__ if isinstance(prior, type) else type(prior).__name__
        raise TypeError(
            f"`{call}` should be one of `funcbayes.priors`, such as `priors.Normal(precision=1.0)`, a "
            f"Gaussian, or another object with a `log_prob(params)`, got {shown}."
        )


def _checked_gaussian(prior: Gaussian, leaves: Params, call: str) -> HasLogProb:
    location = parameters_of(prior.mean)
    differing = difference(location, named_leaves(leaves))
    if differing:
        raise ValueError(
            f"`{call}(prior=...)` should be over the leaves that chains move; {differing}. "
            "`restrict(prior, where)` leaves leaves out."
        )
    reason = prior.covariance.singular()
    if reason:
        raise ValueError(f"`{call}(prior=...)` should have a density, but {reason}.")
    if isinstance(prior.covariance, Diagonal):  # as numbers for each leaf, which no operator is needed for
        variance = named_leaves(prior.covariance.variance)
        return Normal(precision={name: 1 / variance[name] for name in location}, mean=location)
    return prior


@dataclass(frozen=True)
class NormalTerms:
    """What a normal prior adds to the potentials of chains and to their gradients, in closed form.

    It is the prior of most chains, and a graph for it can take longer than a small network.

    Attributes:
        precision: Of each leaf, a scalar or ``s``.
        mean: Likewise; ``None`` for 0.
        constant: Of the potential.
    """

    precision: list[Tensor]
    mean: list[Tensor] | None
    constant: Tensor

    @classmethod
    def of(cls, prior: Normal, params: Params) -> "NormalTerms":
        """The terms for leaves like those of one chain, in their order."""
        leaves = parameters_of(params)
        dtype = at_least_single(dtype_of(leaves))
        with torch.no_grad():
            precision = by_leaf(prior.precision, leaves, dtype, "`priors.Normal(precision=...)`")
            mean = by_leaf(prior.mean, leaves, dtype, "`priors.Normal(mean=...)`")
            constant = -prior.log_prob({k: m.expand(leaves[k].shape) for k, m in mean.items()})
        has_mean = not (isinstance(prior.mean, float | int) and prior.mean == 0)
        return cls([*precision.values()], [*mean.values()] if has_mean else None, constant)

    def added_to(
        self, potentials: Tensor, gradients: list[Tensor], leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Potentials ``(M,)`` and gradients ``(M, *s)`` of all terms, from those of the likelihood.

        Leaves are at ``(M, *s)``.
        """
        found, potentials = [], potentials + self.constant
        for i, (precision, gradient, leaf) in enumerate(zip(self.precision, gradients, leaves, strict=True)):
            shift = leaf.to(precision.dtype)
            shift = shift if self.mean is None else shift - self.mean[i]
            force = precision * shift
            squares = (force * shift).reshape(len(leaf), -1).sum(1)
            potentials = potentials + 0.5 * squares.to(potentials.device)
            found.append(gradient + force.to(gradient.dtype))
        return potentials, found
