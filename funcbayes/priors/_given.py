"""Priors that a function is given, in the forms in which users say them."""

from typing import Any, Protocol

from torch import Tensor

from .._tree import Params, difference, named_leaves, parameters_of
from ..covariances import Diagonal
from ..posteriors import Gaussian
from ._interface import Prior
from ._normal import NormalPrior


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
        leaves: The covered parameters of one network.
        call: How the user called us.
    """
    if prior is None:
        prior = NormalPrior(precision=prior_precision)
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
            f"`{call}(prior=...)` should be over the leaves that are covered; {differing}. "
            "`restrict(prior, where)` leaves leaves out."
        )
    reason = prior.covariance.singular()
    if reason:
        raise ValueError(f"`{call}(prior=...)` should have a density, but {reason}.")
    if isinstance(prior.covariance, Diagonal):  # as numbers for each leaf, which no operator is needed for
        variance = named_leaves(prior.covariance.variance)
        return NormalPrior(precision={name: 1 / variance[name] for name in location}, mean=location)
    return prior
