"""Priors that a function is given, in the forms in which users say them."""

from numbers import Real
from typing import Any, Protocol

from torch import Tensor
from torch.distributions import Distribution

from .._tree import Params, difference, named_leaves, parameters_of
from ..covariances import Diagonal
from ..covariances._flat import at_least_single, dtype_of
from ..posteriors import Gaussian
from ._interface import Prior
from ._normal import NormalPrior
from ._numbers import POSITIVE, by_leaf, check_numbers, check_rounded


class HasLogProb(Protocol):
    """Anything with a log density of parameters."""

    def log_prob(self, params: Params) -> Tensor:
        """``log p(theta)``, **summed** over all parameters, a scalar."""
        ...


def checked_prior(prior: Any, prior_precision: Any, leaves: Params, call: str) -> HasLogProb:
    """The prior over some leaves that arguments of a public function mean.

    Args:
        prior: Anything with a ``log_prob``; ``None`` for a Gaussian of mean zero with ``prior_precision``.
        prior_precision: One number, or a tree with a number or tensor for each leaf; beside a ``prior`` only
            the default, 1.
        leaves: The covered parameters of one network.
        call: How the user called us.
    """
    if prior is None:
        named, leaves = f"`{call}(prior_precision=...)`", parameters_of(leaves)
        check_numbers(prior_precision, POSITIVE, named)
        dtype = at_least_single(dtype_of(leaves))
        check_rounded(by_leaf(prior_precision, leaves, dtype, named), POSITIVE, named)
        return NormalPrior(precision=prior_precision)
    check_is_prior(prior, f"{call}(prior=...)")
    if not isinstance(prior_precision, Real) or prior_precision != 1:
        raise ValueError(
            f"`{call}(prior=...)` stands in the place of `prior_precision`, got both. Leave one of them out."
        )
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
    if isinstance(prior, Distribution):
        raise TypeError(
            f"`{call}` should have a `log_prob(params)` of a tree, got torch.distributions."
            f"{type(prior).__name__}, which has one of a tensor. Write `priors.Normal(precision=1.0)`, say."
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
