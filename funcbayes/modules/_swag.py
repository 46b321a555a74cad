"""SWAG as a module."""

import dataclasses
import math
from typing import Any

from torch import Tensor, nn

from .. import swag
from .._batch_norm import refresh_batch_norm
from .._functional import FunctionalModule, make_functional, unwrapped
from .._random import Seed
from .._tree import Fixed, Params, device_of, difference, index, parameters_of
from ..posteriors import Ensemble, Gaussian, Posterior, to, to_ensemble
from ._predicting import Outputs, Predicting, check_module


class SWAG(Predicting):
    """A Gaussian over the weights that a network passes through in training, Maddox et al. (2019).

    Train the model with a loop of your own, and call :meth:`collect_model` after every epoch, say.
    :func:`funcbayes.swag.fit` does both. What was collected is in ``state_dict`` too.

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
        likelihood: Outputs = None,
    ) -> None:
        super().__init__("SWAG", likelihood, num_samples)
        for name, value, is_fine in (
            ("max_models", max_models, isinstance(max_models, int) and max_models >= 0),
            ("var_clamp", var_clamp, isinstance(var_clamp, float | int) and 0 <= var_clamp < math.inf),
            ("scale", scale, isinstance(scale, float | int) and 0 < scale < math.inf),
        ):
            if not is_fine:
                least = "positive" if name == "scale" else "at least 0"
                raise ValueError(f"`SWAG({name}=...)` should be a number, {least}, got {value!r}.")
        self.model = check_module(model, "SWAG(model)")
        self.var_clamp, self.scale = var_clamp, scale
        self._fn, params = make_functional(model)
        self._state = swag.init(params, rank=max_models)
        self._found: Gaussian | None = None  # from the present state
        self._draws: Ensemble | None = None  # with BatchNorm statistics of their own

    @property
    def max_models(self) -> int:
        """Rank of the covariance's low-rank part."""
        return self._state.rank

    def forward(self, x: Any) -> Any:
        """Evaluate the model as it is."""
        return self.model(x)

    def collect_model(self, model: nn.Module) -> None:
        """Collect the present weights of ``model`` as a snapshot; its buffers replace earlier ones."""
        model = unwrapped(check_module(model, "SWAG.collect_model(model)"))
        values = self._fn.values_of(model)
        differing = difference(parameters_of(values), self._state.origin)
        if differing:
            raise ValueError(
                "`SWAG.collect_model(model)` should be given a module of the architecture that `SWAG(model)` "
                f"was given; {differing}."
            )
        self._state = swag.update(to(self._state, device=device_of(values)), values)
        self._found = self._draws = None

    def refresh_batch_norm(
        self, data: Any, *, batch_size: int | None = None, seed: Seed | None = None
    ) -> None:
        """Fix the draws, and give each BatchNorm statistics of its own by a pass over ``data``.

        Predictions use these ``num_samples`` draws, whatever their ``seed``, until the next snapshot is
        collected.

        Args:
            data: ``(x, y)`` tensors or re-iterable of such batches.
            batch_size: Rows a batch for data in tensors; ``None`` for one batch of all rows.
            seed: Draws are a function of it.
        """
        assert self.num_samples is not None
        draws = to_ensemble(self._gaussian("refresh_batch_norm"), self.num_samples, seed)
        assert isinstance(draws, Ensemble)
        values = self._fn.values_of(unwrapped(self.model))
        self._draws = refresh_batch_norm(self._fn, values, draws, data, batch_size=batch_size)

    def sample_parameters(self, *, seed: Seed | None = None) -> dict[str, Tensor]:
        """One draw of the parameters by name; a model with buffers loads it with ``strict=False``."""
        return parameters_of(index(self._gaussian("sample_parameters").sample(1, seed=seed), 0))

    def _gaussian(self, call: str) -> Gaussian:
        if not self._state.num_snapshots:
            raise RuntimeError(f"`SWAG.{call}` needs a snapshot: call `collect_model(model)` before.")
        if self._found is None:
            self._found = swag.posterior(self._state, scale=self.scale, var_floor=self.var_clamp)
        return self._where_the_model_is(self._found)

    def _where_the_model_is(self, posterior: Any) -> Any:
        like = next(self.model.parameters())
        return to(posterior, device=like.device, dtype=like.dtype)

    def _posterior(self) -> tuple[FunctionalModule, Params, Posterior, int | None]:
        values = self._fn.values_of(unwrapped(self.model))
        if self._draws is not None:
            return self._fn, values, self._where_the_model_is(self._draws), None
        return self._fn, values, self._gaussian("predict"), self.num_samples

    def get_extra_state(self) -> dict[str, Any]:
        """What was collected, as plain containers, for ``state_dict``."""
        state, draws = self._state, self._draws
        fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        return {
            **fields,
            "fixed": _tensors(state.fixed),
            "draws": None if draws is None else (parameters_of(draws.members), _tensors(draws.members)),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what ``get_extra_state`` gave."""
        differing = difference(state["origin"], self._state.origin)
        if differing:
            raise ValueError(
                "`SWAG.load_state_dict(...)` should be given the state of a SWAG of the same architecture; "
                f"{differing}."
            )
        state, draws = {**state, "fixed": _fixed(state["fixed"])}, state["draws"]
        self._state = swag.State(**{name: value for name, value in state.items() if name != "draws"})
        self._found = None
        self._draws = None if draws is None else Ensemble({**draws[0], **_fixed(draws[1])})


def _fixed(tensors: dict[str, Tensor]) -> dict[str, Fixed]:
    return {name: Fixed(tensor) for name, tensor in tensors.items()}


def _tensors(tree: Params) -> dict[str, Tensor]:
    """The ``Fixed`` leaves of a dict, unpacked."""
    return {name: leaf.tensor for name, leaf in tree.items() if isinstance(leaf, Fixed)}
