"""MC dropout as a module."""

from typing import Any

from torch import Tensor, nn

from .._functional import FunctionalModule, make_functional, unwrapped
from .._random import Seed
from .._tree import Params
from ..posteriors import Dropout, Posterior
from ._predicting import Outputs, Predicting, check_module


class MCDropout(Predicting):
    """A network whose dropout stays on when it predicts, Gal & Ghahramani (2016); see ``fb.Dropout``.

    Args:
        model: Any module with dropout; it is held, not copied, and predictions follow its training.
        num_samples: Number of draws ``S``.
        dropout_rate: Probability of dropping a unit when predicting, in place of the model's own rates;
            ``None`` keeps these.
        likelihood: What outputs are: see :mod:`funcbayes.modules`.

    Example:
        >>> import torch
        >>> from funcbayes.modules import MCDropout
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2))
        >>> mean, variance = MCDropout(net).predict(torch.ones(5, 3), seed=0)
        >>> mean.shape, variance.shape
        (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int = 20,
        dropout_rate: float | None = 0.1,
        *,
        likelihood: Outputs = None,
    ) -> None:
        super().__init__("MCDropout", likelihood, num_samples)
        self.model = check_module(model, "MCDropout(model)")
        self.dropout_rate = dropout_rate
        Dropout(rate=dropout_rate)  # refuses a rate that is none
        self._fn, _ = make_functional(model)

    def forward(self, x: Any) -> Any:
        """Evaluate the model as it is: with its own dropout in training mode, without in evaluation mode."""
        return self.model(x)

    def predict_entropy(self, x: Any, *, seed: Seed | None = None) -> Tensor:
        """Entropy of the averaged class probabilities in nats, ``(N,)``; for classifiers."""
        prediction = self._prediction(x, seed)
        if prediction.likelihood is None or not prediction.likelihood.is_discrete:
            raise ValueError(
                "`MCDropout.predict_entropy(x)` should be asked of a classifier; these outputs are values. "
                "If they are class logits: `MCDropout(model, likelihood='classification')`."
            )
        return prediction.entropy

    def _posterior(self) -> tuple[FunctionalModule, Params, Posterior, int | None]:
        values = self._fn.values_of(unwrapped(self.model))
        return self._fn, values, Dropout(rate=self.dropout_rate), self.num_samples
