"""The Laplace approximation as a module."""

from typing import Any, get_args

import torch
from torch import Tensor, nn

from .. import laplace
from .._functional import FunctionalModule, make_functional, unwrapped
from .._linearized_prediction import LinearizedPrediction, Link
from .._predict_linearized import predict_linearized
from .._random import Seed
from .._tree import Params, Where, device_of, difference, index, map_leaves, parameters_of
from ..curvature import Curvature
from ..curvature._curvature import DEFAULT_RANK, Kind, Structure, WeightSharing, found_by
from ..curvature._data_term import noise_of
from ..laplace._posterior import check_positive
from ..laplace._prior import Numbers, Prior, chosen_leaves
from ..laplace._tuning import Per, check_per
from ..likelihoods import Likelihood, Normal
from ..posteriors import Gaussian, Posterior, to
from ..training._data import Data, open_data
from ._plain import from_plain, to_plain
from ._predicting import Outputs, Predicting, check_module


class LaplaceApproximation(Predicting):
    """A Gaussian around the weights of a trained network, as wide as the data leave it.

    Train the model, call :meth:`fit` with the training data, and :meth:`optimize_prior_precision` to choose
    the prior by evidence. Predictions are those of the linearised model, in which the Gaussian is right
    (Immer et al. 2021). What was fitted is in ``state_dict`` too.

    Args:
        model: The trained module; it is held, not copied.
        num_samples: Number of draws ``S`` of :meth:`predict`.
        structure: Of the curvature: ``"diag"``, ``"kron"``, ``"low_rank"`` or ``"full"``.
        where: Which parameters are uncertain, by name: ``"head.*"``; ``None`` for all.
        prior_precision: Precision (1 / variance) of the Gaussian prior, that of training: one number, or one
            for each parameter tensor by name.
        noise_std: Standard deviation of the noise of a regression; ``None`` for that of a ``Normal``
            likelihood, or else 1. :meth:`optimize_prior_precision` chooses it, too.
        temperature: Divides the curvature, and not the prior.
        curvature: Which one: ``"ggn"``, ``"fisher"``, ``"empirical_fisher"`` or ``"hessian"``.
        weight_sharing: As for :func:`funcbayes.curvature.ggn`.
        eigenvalue_correction: For ``"kron"``: whether its eigenvalues are corrected (EKFAC).
        rank: For ``"low_rank"``: how many eigenvalues.
        linearized: Whether draws are evaluated by the linearised model.
        likelihood: What outputs are: see :mod:`funcbayes.modules`.

    Example:
        >>> import torch
        >>> from funcbayes.modules import LaplaceApproximation
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> posterior = LaplaceApproximation(net)
        >>> posterior.fit((torch.randn(20, 2), torch.randint(0, 3, (20,))))
        >>> posterior.optimize_prior_precision()
        >>> mean, variance = posterior.predict(torch.ones(5, 2))
        >>> mean.shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int = 32,
        *,
        structure: Structure = "kron",
        where: Where | None = None,
        prior_precision: Numbers = 1.0,
        noise_std: float | None = None,
        temperature: float = 1.0,
        curvature: Kind = "ggn",
        weight_sharing: WeightSharing = "expand",
        eigenvalue_correction: bool = False,
        rank: int = DEFAULT_RANK,
        linearized: bool = True,
        likelihood: Outputs = None,
    ) -> None:
        super().__init__("LaplaceApproximation", likelihood, num_samples)
        self.model = check_module(model, "LaplaceApproximation(model)")
        self.structure: Structure = structure
        if structure not in get_args(Structure):
            known = ", ".join(map(repr, get_args(Structure)))
            raise ValueError(
                f"`LaplaceApproximation(structure=...)` should be one of {known}, got {structure!r}."
            )
        if curvature not in get_args(Kind):
            known = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(
                f"`LaplaceApproximation(curvature=...)` should be one of {known}, got {curvature!r}."
            )
        self.curvature: Kind = curvature
        self.weight_sharing: WeightSharing = weight_sharing
        check_positive(temperature, "LaplaceApproximation(temperature=...)")
        if isinstance(prior_precision, float | int | Tensor):
            check_positive(prior_precision, "LaplaceApproximation(prior_precision=...)")
        self.where, self.linearized = where, linearized
        self.temperature, self.eigenvalue_correction, self.rank = temperature, eigenvalue_correction, rank
        self.prior_precision: Numbers = prior_precision
        self.noise_std: float = _start_of_noise(likelihood, noise_std)
        self._fn, params = make_functional(model)
        if not isinstance(prior_precision, float | int | Tensor):
            given = Prior.of(chosen_leaves(params, where), prior_precision, 0.0, None, "LaplaceApproximation")
            given.check_goes_with(structure, "LaplaceApproximation")
        self._mode: Params = None
        self._curvature: Curvature | None = None
        self._found: Gaussian | None = None  # from the present curvature and prior

    def forward(self, x: Any) -> Any:
        """Evaluate the model as it is."""
        return self.model(x)

    def fit(
        self,
        data: Data,
        *,
        batch_size: int | None = None,
        max_bytes: int | None = None,
        seed: Seed | None = None,
        progress: bool = False,
    ) -> None:
        """Find the curvature at the present weights of the model.

        Args:
            data: Training data, ``(x, y)`` tensors or a re-iterable of such batches.
            batch_size: Rows a batch, for data in tensors.
            max_bytes: As for :func:`funcbayes.curvature.ggn`.
            seed: Of what is random: a curvature of low rank, the targets of ``"fisher"``.
            progress: Whether to show a bar over the batches.
        """
        values = map_leaves(lambda leaf: leaf.detach().clone(), self._fn.values_of(unwrapped(self.model)))
        likelihood = self._likelihood_for(values, data)
        found = found_by(
            *(self.curvature, self._fn, values, data, likelihood, self.structure, self.where),
            call="LaplaceApproximation.fit",
            weight_sharing=self.weight_sharing,
            eigenvalue_correction=self.eigenvalue_correction,
            rank=self.rank,
            batch_size=batch_size,
            max_bytes=max_bytes,
            seed=seed,
            progress=progress,
        )
        self._curvature, self._mode, self._found = found, values, None

    def optimize_prior_precision(
        self, validation: Data | None = None, *, per: Per = "model", tune_noise: bool | None = None
    ) -> None:
        """Choose the prior precision: by evidence, with the noise of a regression, or by held-out data.

        Args:
            validation: Held-out ``(x, y)``, or a re-iterable of such batches: then the precision is that of a
                grid under which they are most probable: :func:`funcbayes.laplace.minimize_validation_nll`.
            per: One precision for the ``"model"``, for each ``"leaf"`` (parameter tensor), or for each
                ``"parameter"``; by held-out data there is one for the ``"model"``.
            tune_noise: Whether noise is chosen, too; ``None`` for whether it can be, which is by evidence.
        """
        call = "LaplaceApproximation.optimize_prior_precision"
        check_per(per, f"{call}(per=...)", is_kronecker=self.structure == "kron")
        if validation is not None and (per != "model" or tune_noise):
            raise ValueError(
                f"`{call}(validation, per={per!r}, tune_noise={tune_noise})` chooses one precision for the "
                "model, and no noise. Leave `per` and `tune_noise` out, or `validation`, to choose by "
                "evidence."
            )
        mode, c = self._fitted("optimize_prior_precision")
        if validation is not None:
            likelihood = self._likelihood_for(mode, validation)
            options: dict[str, Any] = {"noise_std": self._noise(c), "temperature": self.temperature}
            best = laplace.minimize_validation_nll(self._fn, mode, c, validation, likelihood, **options)
            self.prior_precision, self._found = best.prior_precision, None
            return
        found = laplace.maximize_evidence(
            mode,
            c,
            per=per,
            prior_precision=self.prior_precision,
            noise_std=self._noise(c),
            tune_noise=tune_noise is not False,
            temperature=self.temperature,
        )
        self.prior_precision, self._found = found.prior_precision, None
        if found.noise_std is not None:
            self.noise_std = float(found.noise_std)

    def log_marginal_likelihood(self) -> Tensor:
        """The evidence of the present prior, a scalar, summed over the data."""
        mode, c = self._fitted("log_marginal_likelihood")
        return laplace.log_marginal_likelihood(
            mode, c, self.prior_precision, noise_std=self._noise(c), temperature=self.temperature
        )

    def predict_linearized(
        self, x: Any, *, link: Link = "probit", joint: bool = False
    ) -> LinearizedPrediction:
        """Predict in closed form, without draws: see :func:`funcbayes.predict_linearized`.

        Args:
            x: Inputs, ``N`` rows.
            link: How logits become probabilities.
            joint: Whether the covariance between rows is wanted, too.
        """
        fn, values, posterior, _ = self._posterior()
        prediction = predict_linearized(fn, values, posterior, x, joint=joint)
        likelihood = self._likelihood_of(prediction.output_mean.shape)
        return prediction.under(Normal(self.noise_std) if likelihood is None else likelihood, link)

    def sample_parameters(self, *, seed: Seed | None = None) -> dict[str, Tensor]:
        """One draw of the uncertain parameters by name; a model loads it with ``strict=False``."""
        return parameters_of(index(self._gaussian("sample_parameters").sample(1, seed=seed), 0))

    def _likelihood_for(self, values: Params, data: Data) -> Likelihood:
        if isinstance(self.likelihood, Likelihood):
            return self._with_noise(self.likelihood)
        source = open_data(data, batch_size=None, num_streams=1, call="LaplaceApproximation.fit")
        x, _ = next(iter(source.plain_batches(device_of(values)))).member(0)
        return self._likelihood_at(self._fn, values, x, self.noise_std)

    def _likelihood_of(self, shape: torch.Size) -> Likelihood | None:
        found = super()._likelihood_of(shape)
        return None if found is None else self._with_noise(found)

    def _with_noise(self, likelihood: Likelihood) -> Likelihood:
        """The likelihood with the present noise, if it has one noise."""
        return likelihood if noise_of(likelihood) is None else Normal(self.noise_std)

    def _fitted(self, call: str) -> tuple[Params, Curvature]:
        if self._curvature is None:
            raise RuntimeError(f"`LaplaceApproximation.{call}` needs a curvature: call `fit(data)` before.")
        return self._mode, self._curvature

    def _noise(self, c: Curvature) -> float | None:
        return self.noise_std if c.data.has_noise else None

    def _gaussian(self, call: str) -> Gaussian:
        mode, c = self._fitted(call)
        if self._found is None:
            self._found = laplace.posterior(
                mode,
                c,
                self.prior_precision,
                noise_std=self._noise(c),
                temperature=self.temperature,
                linearized=self.linearized,
            )
        like = next(self.model.parameters())
        return to(self._found, device=like.device, dtype=like.dtype)

    def _posterior(self) -> tuple[FunctionalModule, Params, Posterior, int | None]:
        values = self._fn.values_of(unwrapped(self.model))
        return self._fn, values, self._gaussian("predict"), self.num_samples

    def get_extra_state(self) -> dict[str, Any]:
        """What was fitted, as plain containers, for ``state_dict``."""
        return {
            "curvature": to_plain(self._curvature),
            "mode": to_plain(self._mode),
            "prior_precision": to_plain(self.prior_precision),
            "noise_std": self.noise_std,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what ``get_extra_state`` gave."""
        mode = from_plain(state["mode"])
        if mode is not None:
            own = parameters_of(self._fn.values_of(unwrapped(self.model)))
            differing = difference(parameters_of(mode), own)
            if differing:
                raise ValueError(
                    "`LaplaceApproximation.load_state_dict(...)` should be given the state of one of the "
                    f"same architecture; {differing}."
                )
        self._mode, self._curvature = mode, from_plain(state["curvature"])
        self.prior_precision = from_plain(state["prior_precision"])
        self.noise_std, self._found = state["noise_std"], None


def _start_of_noise(likelihood: Outputs, noise_std: float | None) -> float:
    """The noise at first: what was given, or what the likelihood has."""
    if noise_std is not None:
        check_positive(noise_std, "LaplaceApproximation(noise_std=...)")
    if not isinstance(likelihood, Likelihood):
        return 1.0 if noise_std is None else noise_std
    own = noise_of(likelihood)
    if noise_std is not None and (own is None or float(own) != float(noise_std)):
        raise ValueError(
            f"`LaplaceApproximation(likelihood={likelihood!r}, noise_std={noise_std:g})` should say the "
            "noise once, in the likelihood: leave `noise_std` out."
        )
    return 1.0 if own is None else float(own)
