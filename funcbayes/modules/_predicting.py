"""What the classes have in common: how they predict."""

from typing import Any, Literal

import optree
import torch
from torch import Tensor, nn

from .._checks import positive_int
from .._functional import FunctionalModule
from .._predict import predict
from .._prediction import Prediction
from .._random import Seed
from .._tree import Params
from ..likelihoods import Bernoulli, Categorical, Likelihood, Normal
from ..posteriors import Posterior

Outputs = Literal["classification", "regression"] | Likelihood | None
Summary = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]  # mean, variance, and perhaps draws


def check_module(module: Any, call: str) -> nn.Module:
    """Refuse what is no module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"`{call}` should be given an nn.Module, got {type(module).__name__}.")
    return module


class Predicting(nn.Module):
    """A module that predicts with draws of a posterior; a class says which, in ``_posterior``."""

    def __init__(self, call: str, likelihood: Outputs, num_samples: int | None) -> None:
        super().__init__()
        is_known = isinstance(likelihood, str | None) and likelihood in ("classification", "regression", None)
        if not is_known and not isinstance(likelihood, Likelihood):
            raise ValueError(
                f"`{call}(likelihood=...)` should be 'classification', 'regression', None or a likelihood, "
                f"got {likelihood!r}."
            )
        if num_samples is not None:
            positive_int(num_samples, f"{call}(num_samples=...)")
        self.likelihood = likelihood
        self.num_samples = num_samples

    def _posterior(self) -> tuple[FunctionalModule, Params, Posterior, int | None]:
        """The arguments of ``predict``: model, parameters, posterior, number of draws."""
        raise NotImplementedError

    def predict(
        self, x: Any, return_samples: bool = False, *, return_all: bool = False, seed: Seed | None = None
    ) -> Summary:
        """Predict with all draws, evaluated together, without a graph.

        Args:
            x: Inputs, ``N`` rows.
            return_samples: Whether to return the draws too.
            return_all: Another name of ``return_samples``.
            seed: Draws are a function of it; ``None`` takes one number from torch's global state.

        Returns:
            ``mean`` and ``variance`` over draws, ``(N, ...)``, of class probabilities for a classifier and
            of outputs otherwise; the variance is the unbiased one. With ``return_samples`` also the draws of
            what they are moments of, ``(S, N, ...)``.
        """
        prediction = self._prediction(x, seed)
        mean, variance = prediction.mean, prediction.epistemic_variance
        if not (return_samples or return_all):
            return mean, variance
        samples = prediction.samples
        if prediction.likelihood is not None:
            samples = torch.func.vmap(prediction.likelihood.mean)(samples)  # axes are counted from the rows
        return mean, variance, samples

    def _prediction(self, x: Any, seed: Seed | None) -> Prediction:
        fn, params, posterior, num_samples = self._posterior()
        with torch.no_grad():
            prediction = predict(fn, params, posterior, x, num_samples=num_samples, seed=seed)
        likelihood = self._likelihood_of(prediction.samples.shape[1:])
        return prediction if likelihood is None else prediction.under(likelihood)

    def _likelihood_of(self, shape: torch.Size) -> Likelihood | None:
        """What outputs ``(N, ...)`` are; ``None`` for values."""
        if isinstance(self.likelihood, Likelihood):
            return self.likelihood
        is_classifier = self.likelihood == "classification"
        if self.likelihood is None:
            is_classifier = len(shape) == 2 and shape[1] > 1
        if not is_classifier:
            return None
        if len(shape) > 2:
            raise ValueError(
                "`predict(x)` should know which axis of the outputs holds the classes, where there are more "
                f"than two; these are {tuple(shape)}. Write `likelihood=Categorical(class_axis=1)`, say."
            )
        # One logit is that of the second of two classes.
        return Categorical() if len(shape) == 2 and shape[1] > 1 else Bernoulli()

    def _likelihood_at(self, fn: FunctionalModule, values: Params, x: Any, noise_std: float) -> Likelihood:
        """What outputs for ``x`` are; values have normal noise."""
        if isinstance(self.likelihood, Likelihood):
            return self.likelihood
        with torch.no_grad():
            shape = fn(values, optree.tree_map(_first_row, x)).shape
        found = self._likelihood_of(shape)
        return Normal(noise_std) if found is None else found


def _first_row(leaf: Any) -> Any:
    return leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim else leaf
