"""SWAG as a module."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from .. import swag
from .._batch_norm import refresh_batch_norm
from .._functional import FunctionalModule, make_functional
from .._random import Seed
from .._tree import Params, device_of, index, parameters_of
from ..posteriors import Ensemble, Gaussian, Posterior, to, to_ensemble
from ._predicting import Outputs, Predicting, check_module


class SWAG(Predicting):
    """A Gaussian over the weights that a network passes through in training, Maddox et al. (2019).

    Train the model with a loop of your own, and call :meth:`collect_model` after every epoch, say.
    :func:`funcbayes.swag.fit` does both.

    Args:
        model: A module of the architecture; it is held, not copied.
        num_samples: Number of draws ``S``.
        max_models: How many of the last snapshots make the low-rank part of the covariance: the rank.
        var_clamp: Lower bound on the variance of each weight, in squared units of the weight.
        scale: Factor of the covariance: the paper's is 0.5.
        likelihood: What outputs are: see :mod:`funcbayes.modules`.

    Example:
        >>> import torch
        >>> from funcbayes.modules import SWAG
        >>> net = torch.nn.Linear(3, 2)
        >>> posterior = SWAG(net)
        >>> for _ in range(4):
        ...     with torch.no_grad():
        ...         _ = net.weight.add_(0.1 * torch.randn(2, 3))  # a step of training
        ...     posterior.collect_model(net)
        >>> mean, variance = posterior.predict(torch.ones(5, 3))
        >>> posterior.sample_parameters()["weight"].shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int = 20,
        max_models: int = 20,
        var_clamp: float = 1e-6,
        *,
        scale: float = 0.5,
        likelihood: Outputs | None = None,
    ) -> None:
        super().__init__("SWAG", likelihood, num_samples)
        self.model = check_module(model, "SWAG(model)")
        self.max_models, self.var_clamp, self.scale = max_models, var_clamp, scale
        self._fn, params = make_functional(model)
        self._state = swag.init(params, rank=max_models)
        self._draws: Ensemble | None = None  # with BatchNorm statistics of their own

    def forward(self, x: Any) -> Any:
        """Evaluate the model as it is."""
        return self.model(x)

    def collect_model(self, model: nn.Module) -> None:
        """Collect the present weights of ``model`` as a snapshot."""
        values = parameters_of(self._fn.values_of(check_module(model, "SWAG.collect_model(model)")))
        self._state = swag.update(to(self._state, device=device_of(values)), values)
        self._draws = None

    def refresh_batch_norm(self, data: Any, *, seed: Seed | None = None) -> None:
        """Fix the draws, and give each BatchNorm statistics of its own by a pass over ``data``.

        Predictions use these draws until the next snapshot is collected.

        Args:
            data: ``(x, y)`` tensors or re-iterable of such batches.
            seed: Draws are a function of it.
        """
        assert self.num_samples is not None
        draws = to_ensemble(self._gaussian("refresh_batch_norm"), self.num_samples, seed)
        assert isinstance(draws, Ensemble)
        self._draws = refresh_batch_norm(self._fn, self._fn.values_of(self.model), draws, data)

    def sample_parameters(self, *, seed: Seed | None = None) -> dict[str, Tensor]:
        """One draw of the parameters by name."""
        return index(self._gaussian("sample_parameters").sample(1, seed=seed), 0)

    def _gaussian(self, call: str) -> Gaussian:
        if not self._state.num_snapshots:
            raise RuntimeError(f"`SWAG.{call}` needs a snapshot: call `collect_model(model)` before.")
        gaussian = swag.posterior(self._state, scale=self.scale, var_floor=self.var_clamp)
        like = next(self.model.parameters())
        return to(gaussian, device=like.device, dtype=like.dtype)

    def _posterior(self) -> tuple[FunctionalModule, Params, Posterior]:
        posterior = self._gaussian("predict") if self._draws is None else self._draws
        return self._fn, self._fn.values_of(self.model), posterior

    def get_extra_state(self) -> dict[str, Any]:
        """What was collected, as plain containers, for ``state_dict``; fixed draws are not kept."""
        return {f.name: getattr(self._state, f.name) for f in dataclasses.fields(self._state)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what ``get_extra_state`` gave."""
        self._state = swag.State(**state)
        self._draws = None
