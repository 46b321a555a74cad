"""The potential energy: the negative log of what a posterior is proportional to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_model, check_num_data, positive_int
from .._functional import Model
from .._tree import Params, as_tree, parameters_of
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..likelihoods._layout import wide
from ..priors import Prior
from ..priors._given import HasLogProb, check_is_prior


@dataclass(frozen=True)
class Potential:
    """``U(params, batch)``, made by :func:`potential`.

    Attributes:
        fn: Pure model.
        likelihood: ``p(y|f)``.
        prior: Of the parameters.
        num_data: Number of rows ``N`` of the whole data.
    """

    fn: Model
    likelihood: Likelihood
    prior: HasLogProb
    num_data: int

    def __call__(self, params: Params, batch: tuple[Any, Tensor]) -> Tensor:
        """Estimate the potential energy from a batch, a scalar."""
        call = "sgmcmc.potential(...)(params, batch)"
        if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise TypeError(
                f"`batch` in `{call}` should be `(x, y)` with tensors, got {type(batch).__name__}."
            )
        x, y = as_tree(batch[0]), batch[1]
        check_num_data(self.num_data, y.shape[0] if y.ndim else 0, "sgmcmc.potential")
        return self.nll(self.fn(params, x), y) - self.log_prior(params)

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """``-log p(D|theta)``, as estimated from what the model gives for a batch."""
        return -self.num_data * wide(self.likelihood.log_prob(outputs, y)).mean()

    def log_prior(self, params: Params) -> Tensor:
        """``log p(theta)``."""
        if isinstance(self.prior, Prior) and self.prior.is_the_same_everywhere:
            leaves = [*parameters_of(params).values()]
            if len({(leaf.dtype, leaf.device) for leaf in leaves}) == 1:
                # As one vector: a density leaf by leaf can take longer than a small network.
                return wide(self.prior.log_prob({"all": torch.cat([leaf.reshape(-1) for leaf in leaves])}))
        value = self.prior.log_prob(params)
        if value.shape:
            raise ValueError(
                f"`log_prob(params)` of the prior should be a scalar, summed over parameters, got shape "
                f"{tuple(value.shape)}."
            )
        return wide(value)


def potential(fn: Model, likelihood: Likelihood, prior: HasLogProb, num_data: int) -> Potential:
    """Make the potential energy ``U = -log p(D|theta) - log p(theta)``, **summed** over the data.

    It is estimated from the ``B`` rows of a batch, without bias if they are drawn at random:

        U(theta, batch) = N / B * sum over the batch of -log p(y|f) - log p(theta),

    Welling & Teh (2011), equation 4. Differentiable, and fit for ``torch.func`` transforms; its gradient
    is what the samplers of :mod:`funcbayes.sgmcmc` ask for.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``, evaluated as it is: without dropout, and with the
            running statistics of BatchNorm.
        likelihood: ``p(y|f)``.
        prior: One of :mod:`funcbayes.priors`, a Gaussian over the parameters, or anything else with a
            ``log_prob(params)`` that is a scalar.
        num_data: Number of rows ``N`` of the whole data.

    Returns:
        ``U(params, batch)``, a scalar in nats, with ``batch = (x, y)``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``num_data`` is below 1; or, when it is called, below the number of rows of the batch.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes import sgmcmc
        >>> fn, params = fb.make_functional(torch.nn.Linear(3, 1))
        >>> energy = sgmcmc.potential(fn, fb.likelihoods.Normal(1.0), fb.priors.Normal(), num_data=100)
        >>> sampler = sgmcmc.sgld(1e-3)
        >>> state = sampler.init(params, seed=0)
        >>> batch = torch.ones(4, 3), torch.zeros(4, 1)
        >>> state = sampler.update(state, torch.func.grad(energy)(state.params, batch))
    """
    call = "sgmcmc.potential"
    check_model(fn, call)
    check_is_likelihood(likelihood, f"{call}(likelihood=...)")
    check_is_prior(prior, f"{call}(prior=...)")
    return Potential(fn, likelihood, prior, positive_int(num_data, f"{call}(num_data=...)"))
