"""What the classes have in common: how they predict."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._checks import positive_int
from .._functional import FunctionalModule
from .._predict import predict
from .._prediction import Prediction
from .._random import Seed
from .._tree import Params
from ..likelihoods import Categorical
from ..posteriors import Posterior

Outputs = Literal["classification", "regression"]
Summary = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]  # mean, variance, and perhaps draws


def check_module(module: Any, call: str) -> nn.Module:
    """Refuse what is no module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"`{call}` should be given an nn.Module, got {type(module).__name__}.")
    return module


class Predicting(nn.Module):
    """A module that predicts with draws of a posterior; a class says which, in ``_predict_with``."""

    def __init__(self, call: str, likelihood: Outputs | None, num_samples: int | None) -> None:
        super().__init__()
        if likelihood not in ("classification", "regression", None):
            raise ValueError(
                f"`{call}(likelihood=...)` should be 'classification', 'regression' or None, got "
                f"{likelihood!r}."
            )
        if num_samples is not None:
            positive_int(num_samples, f"{call}(num_samples=...)")
        self.likelihood = likelihood
        self.num_samples = num_samples

    def _posterior(self) -> tuple[FunctionalModule, Params, Posterior]:
        """The arguments of ``predict``."""
        raise NotImplementedError

    def predict(
        self, x: Any, return_samples: bool = False, *, return_all: bool = False, seed: Seed | None = None
    ) -> Summary:
        """Predict with all draws in one vectorised pass, without a graph.

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
            samples = prediction.likelihood.mean(samples)
        return mean, variance, samples

    def _prediction(self, x: Any, seed: Seed | None) -> Prediction:
        fn, params, posterior = self._posterior()
        with torch.no_grad():
            prediction = predict(fn, params, posterior, x, num_samples=self.num_samples, seed=seed)
        return prediction.under(Categorical()) if self._is_classifier(prediction) else prediction

    def _is_classifier(self, prediction: Prediction) -> bool:
        if self.likelihood is not None:
            return self.likelihood == "classification"
        shape = prediction.samples.shape[1:]
        return len(shape) == 2 and shape[1] > 1
