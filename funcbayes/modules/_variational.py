"""Variational inference as a module."""

import inspect
from typing import Any

import optree
import torch
from torch import Tensor, nn

from .. import vi
from .._checks import positive_number
from .._functional import FunctionalModule, make_functional, unwrapped
from .._random import Seed
from .._tree import Fixed, Params, Where, index, map_leaves, named_leaves, parameters_of, tensors
from ..likelihoods import Likelihood
from ..posteriors import Gaussian, Posterior
from ..priors._given import HasLogProb, checked_prior
from ..training._data import Data, open_data
from ..training._options import MakeOptimizer
from ..vi._elbo import Estimator
from ..vi._fit import fit_networks
from ..vi._init import Family
from ..vi._prior import expected_log_prior
from ._predicting import Outputs, Predicting, check_module


class VariationalBayesNN(Predicting):
    """Any network with a Gaussian over its weights, found by variational inference; no special layers.

    The model's own parameters are the means; ``scales`` holds what standard deviations, and correlations, are
    made of. Train with :meth:`fit`, or with a loop of your own over :meth:`negative_elbo` and an optimizer of
    ``parameters()``.

    Args:
        model: Any module; it is held, not copied.
        num_samples: Number of draws ``S`` of :meth:`predict`.
        family: Structure of the covariance: ``"diag"``, ``"low_rank"``, ``"kron"`` or ``"full"``.
        where: Which parameters are uncertain, by name: ``"head.*"``; ``None`` for all.
        rank: Of ``"low_rank"``.
        init_scale: Standard deviation of each weight at the start.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero.
        prior: Another prior: see :func:`funcbayes.vi.fit`.
        noise_std: Standard deviation of the noise of a regression.
        likelihood: What outputs are: see :mod:`funcbayes.modules`.

    Example:
        >>> import functools, torch
        >>> from funcbayes.modules import VariationalBayesNN
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> bayes = VariationalBayesNN(net)
        >>> data = torch.randn(20, 2), torch.randint(0, 3, (20,))
        >>> bayes.fit(data, optimizer=functools.partial(torch.optim.Adam, lr=1e-2), num_epochs=5, seed=0)
        >>> mean, variance = bayes.predict(torch.ones(5, 2))
        >>> mean.shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int = 32,
        *,
        family: Family = "diag",
        where: Where | None = None,
        rank: int = 10,
        init_scale: float = 1e-2,
        prior_precision: Any = 1.0,
        prior: HasLogProb | None = None,
        noise_std: float = 1.0,
        likelihood: Outputs = None,
    ) -> None:
        super().__init__("VariationalBayesNN", likelihood, num_samples)
        self.model = check_module(model, "VariationalBayesNN(model)")
        self.noise_std = positive_number(noise_std, "VariationalBayesNN(noise_std=...)")
        self._fn, params = make_functional(model)
        state = vi.init(params, family, init_scale, where, rank=rank)
        self._prior = checked_prior(prior, prior_precision, state.mean, "VariationalBayesNN")
        self._names = list(named_leaves(state.mean))
        whole: Any = state
        leaves, self._structure = optree.tree_flatten(whole)
        self.scales = nn.ParameterList(leaves[len(self._names) :])

    def forward(self, x: Any) -> Any:
        """Evaluate the model as it is, at the mean."""
        return self.model(x)

    @property
    def state(self) -> vi.VariationalState:
        """The distribution in the numbers that are trained."""
        own = dict(unwrapped(self.model).named_parameters())
        whole: Any = self._structure.unflatten([*(own[name] for name in self._names), *self.scales])
        return whole

    def negative_elbo(
        self,
        x: Any,
        y: Tensor,
        num_data: int,
        *,
        num_samples: int = 1,
        estimator: Estimator = "reparam",
        kl_weight: float = 1.0,
        seed: Seed | None = None,
    ) -> Tensor:
        """Estimate the negative ELBO of all data from a batch: see :func:`funcbayes.vi.negative_elbo`.

        The model is evaluated in evaluation mode, whatever mode it is in.

        Args:
            x: Inputs of the batch, ``B`` rows.
            y: Targets of the batch.
            num_data: Number of rows of the whole data.
            num_samples: Draws.
            estimator: Of the gradient.
            kl_weight: Factor of the KL.
            seed: Draws are a function of it.

        Returns:
            A scalar, differentiable in ``parameters()``.
        """
        return vi.negative_elbo(
            *(self._fn, self._held(), self.state, (x, y), self._likelihood_for(x)),
            prior=self._prior,
            num_data=num_data,
            num_samples=num_samples,
            estimator=estimator,
            kl_weight=kl_weight,
            seed=seed,
        )

    def kl_divergence(self) -> Tensor:
        """``KL(q || prior)`` in closed form, summed over parameters, a scalar."""
        state = self.state
        expected = expected_log_prior(state.scale(), self._prior)
        if expected is None:
            raise NotImplementedError(
                "`VariationalBayesNN.kl_divergence()` has no closed form for a "
                f"{type(self._prior).__name__}. `negative_elbo` finds it from draws."
            )
        return -state.entropy() - expected

    def fit(self, data: Data, *, optimizer: MakeOptimizer, num_epochs: int, **options: Any) -> None:
        """Move the mean and the scales to where the ELBO is largest, from where they are.

        Args:
            data: Training data, ``(x, y)`` tensors or a re-iterable of such batches.
            optimizer: ``leaves -> torch.optim.Optimizer``, of the means and the scales.
            num_epochs: Passes through the data.
            **options: Others of :func:`funcbayes.vi.fit`: ``batch_size``, ``num_samples``, ``estimator``,
                ``seed`` and so on; but for the family, the prior and the start.
        """
        decided = {"start", "family", "where", "rank", "init_scale", "prior", "prior_precision", "stacked"}
        for name in options.keys() & decided:
            raise TypeError(
                f"`VariationalBayesNN.fit({name}=...)` is no option here: the distribution and its prior are "
                "those that the class was made with. Write `VariationalBayesNN(model, ...)`, or `vi.fit`."
            )
        for name in options.keys() - inspect.signature(vi.fit).parameters.keys():
            raise TypeError(f"`VariationalBayesNN.fit({name}=...)` is no option: see those of `vi.fit`.")
        source = open_data(data, batch_size=None, num_streams=1, call="VariationalBayesNN.fit")
        x, _ = next(iter(source.plain_batches(None))).member(0)
        (network,) = fit_networks(
            *(self._fn, self._values(), data, self._likelihood_for(x)),
            start=self.state.detached(),
            prior=self._prior,
            optimizer=optimizer,
            num_epochs=num_epochs,
            **options,
        )
        model, values = unwrapped(self.model), named_leaves(network["params"])
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if isinstance(fixed := values.get(name), Fixed):
                    buffer.copy_(fixed.tensor)
            for own, found in zip(tensors(self.state), tensors(network["state"]), strict=True):
                own.copy_(found)

    def sample_parameters(self, *, seed: Seed | None = None) -> dict[str, Tensor]:
        """One draw of the uncertain parameters by name; a model loads it with ``strict=False``."""
        return parameters_of(index(self.posterior().sample(1, seed=seed), 0))

    def posterior(self) -> Gaussian:
        """The distribution as a Gaussian, without a graph."""
        return vi.posterior(self.state)

    def _values(self) -> Params:
        return map_leaves(torch.detach, self._fn.values_of(unwrapped(self.model)))

    def _held(self) -> Params:
        """Live values of what the state does not cover."""
        model, covered = unwrapped(self.model), set(self._names)
        buffers = {name: Fixed(b.detach()) for name, b in model.named_buffers()}
        own = {name: p for name, p in model.named_parameters() if name not in covered}
        return {**own, **buffers}

    def _likelihood_for(self, x: Any) -> Likelihood:
        return self._likelihood_at(self._fn, self._values(), x, self.noise_std)

    def _posterior(self) -> tuple[FunctionalModule, Params, Posterior, int | None]:
        return self._fn, self._values(), self.posterior(), self.num_samples
