"""What the linearised predictive says: Gaussians over outputs, and what a likelihood makes of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from . import _links
from ._checks import positive_int
from ._random import Seed, fold, normal, resolve_seed
from .covariances._flat import at_least_single
from .likelihoods import Bernoulli, Categorical, HeteroscedasticNormal, Likelihood, Normal, Poisson
from .posteriors._allocation import allocate

Link = Literal["probit", "bridge", "bridge_norm", "mc"]


@dataclass(frozen=True)
class Component:
    """A Gaussian over the outputs of ``N`` rows, ``F`` numbers a row.

    Attributes:
        mean: ``(N, *event)``.
        variance: ``(N, F)``.
        make_covariance: Gives the covariance of each row, ``(N, F, F)``.
        joint: Covariance of all rows, ``(N F, N F)``, if it was asked for.
        make_of_positions: Gives those of the outputs along an axis, ``(N, *positions, C, C)``, in less memory
            than the whole; ``None`` if that is there.
    """

    mean: Tensor
    variance: Tensor
    make_covariance: Callable[[], Tensor]
    joint: Tensor | None
    make_of_positions: Callable[[int], Tensor] | None = None

    def of_positions(self, axis: int) -> Tensor:
        """Covariances of the outputs along an axis of ``(N, *event)``: ``(N, *positions, C, C)``."""
        if self.make_of_positions is None or self.mean.ndim == 2:
            return _blocks_of_positions(self.covariance, self.mean.shape, axis)
        return self.make_of_positions(axis)

    @cached_property
    def covariance(self) -> Tensor:
        """``(N, F, F)``, found when it is first asked for."""
        return self.make_covariance()


class LinearizedPrediction:
    """Outputs of a linearised model, which are Gaussian, or a mixture of Gaussians.

    Made by :func:`funcbayes.predict_linearized`. ``N`` is the number of rows and ``F`` that of the outputs of
    a row, all axes of a row flattened.

    Attributes:
        likelihood: The likelihood given, or ``None``.
        link: How logits become probabilities.
        weights: Probabilities of the components of a mixture ``(K,)``; of a single Gaussian ``[1.]``.
    """

    likelihood: Likelihood | None
    link: Link
    weights: Tensor

    def __init__(
        self,
        *,
        components: tuple[Component, ...],
        weights: Tensor,
        likelihood: Likelihood | None,
        link: Link,
        num_samples: int,
        seed: Seed | None,
    ) -> None:
        check_link(link, likelihood, "predict_linearized")
        self.components, self.weights = components, weights
        self.likelihood, self.link = likelihood, link
        self._num_samples, self._seed = num_samples, seed

    def __repr__(self) -> str:
        shape = tuple(self.components[0].mean.shape)
        return (
            f"LinearizedPrediction(output_mean={shape}, likelihood={self.likelihood!r}, link={self.link!r})"
        )

    def under(
        self, likelihood: Likelihood | None, link: Link = "probit", *, seed: Seed | None = None
    ) -> "LinearizedPrediction":
        """What the same outputs say under another likelihood, or link.

        Args:
            likelihood: What outputs say of ``y``; ``None`` for statistics of the outputs themselves.
            link: How logits become probabilities.
            seed: For ``"mc"``: draws are a function of it; ``None`` for the draws of this prediction, or if
                it has none takes one number from torch's global state.
        """
        if likelihood is not None:
            likelihood.check(self.components[0].mean, None, call="prediction.under(likelihood)")
        return LinearizedPrediction(
            components=self.components,
            weights=self.weights,
            likelihood=likelihood,
            link=link,
            num_samples=self._num_samples,
            seed=seed_of(likelihood, link, self._seed if seed is None else seed),
        )

    @property
    def num_rows(self) -> int:
        """Number of rows ``N``."""
        return len(self.components[0].mean)

    @property
    def output_mean(self) -> Tensor:
        """Mean of the outputs, ``(N, *event)``."""
        return self._mixed([component.mean for component in self.components])

    @property
    def output_variance(self) -> Tensor:
        """Variance of each output, without noise, ``(N, *event)``."""
        mean = self.output_mean
        second = [
            component.variance.reshape(mean.shape) + (component.mean - mean).square()
            for component in self.components
        ]
        return self._mixed(second)

    @property
    def output_covariance(self) -> Tensor:
        """Covariance of the outputs of each row, without noise, ``(N, F, F)``."""
        mean = self.output_mean
        found = []
        for component in self.components:
            shift = (component.mean - mean).flatten(1) if mean.ndim > 1 else (component.mean - mean)[:, None]
            found.append(component.covariance + shift.unsqueeze(-1) * shift.unsqueeze(-2))
        return self._mixed(found)

    @property
    def joint_covariance(self) -> Tensor:
        """Covariance of the outputs of all rows, without noise, ``(N F, N F)``: rows outside, outputs inside.

        Raises:
            RuntimeError: If ``predict_linearized`` was not asked for it.
        """
        mean, found = self.output_mean, []
        for component in self.components:
            shift = (component.mean - mean).reshape(-1)
            found.append(self._joint(component, "joint_covariance") + torch.outer(shift, shift))
        return self._mixed(found)

    @property
    def mean(self) -> Tensor:
        """Predictive mean, ``(N, ...)``, of ``y`` (of classes their probabilities) or of the outputs."""
        return self._moments[0]

    @property
    def variance(self) -> Tensor:
        """Predictive variance, ``(N, ...)``.

        With a likelihood ``epistemic_variance + aleatoric_variance``; for classes that of each class
        indicator, ``p (1 - p)``. Without one that of the outputs.
        """
        _, epistemic, aleatoric = self._moments
        return epistemic if aleatoric is None else epistemic + aleatoric

    @property
    def std(self) -> Tensor:
        """Square root of :attr:`variance`."""
        return self.variance.sqrt()

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance of ``E[y | f]``, ``(N, ...)``.

        Raises:
            NotImplementedError: For classes: links give the mean of the probabilities, not their variance.
        """
        if self.likelihood is not None and self.likelihood.is_discrete:
            raise NotImplementedError(
                f"`epistemic_variance` is not given by the link {self.link!r}, which finds the mean of the "
                "probabilities only. Use `predict`, whose draws have it, or `output_variance`, that of the "
                "logits."
            )
        return self._moments[1]

    @property
    def aleatoric_variance(self) -> Tensor:
        """Mean of ``Var[y | f]``, ``(N, ...)``.

        Raises:
            ValueError: Without a likelihood.
            NotImplementedError: For classes.
        """
        likelihood = self._needs_likelihood("aleatoric_variance")
        if likelihood.is_discrete:
            raise NotImplementedError(
                f"`aleatoric_variance` is not given by the link {self.link!r}. Use `predict`, whose draws "
                "have it."
            )
        aleatoric = self._moments[2]
        assert aleatoric is not None
        return aleatoric

    @property
    def entropy(self) -> Tensor:
        """Entropy of the predictive distribution of classes in nats, one number a row (and position)."""
        likelihood = self._needs_likelihood("entropy")
        if not likelihood.is_discrete:
            raise NotImplementedError(
                f"`entropy` is given for classes, got {type(likelihood).__name__}. `variance` and `log_prob` "
                "are given."
            )
        return likelihood.entropy_of_log_probs(self._log_class_probs).to(self.mean.dtype)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of targets, one number a row: ``(N,)``.

        For ``Normal`` outputs of a row are one Gaussian, with their covariance and noise; for classes it is
        the log of the probability that the link gives.

        Args:
            y: Targets.

        Raises:
            ValueError: Without a likelihood, or if targets do not fit.
            NotImplementedError: If there is no closed form (``Poisson``, ``HeteroscedasticNormal``).
        """
        likelihood = self._needs_likelihood("log_prob")
        mean = self.components[0].mean
        likelihood.check(mean, y, call="log_prob(y)")
        if likelihood.is_discrete:
            return self._log_prob_of_classes(likelihood, y).to(mean.dtype)
        if not isinstance(likelihood, Normal):
            raise NotImplementedError(
                f"`log_prob` has no closed form for {type(likelihood).__name__}. Use `predict`, which "
                "averages over draws."
            )
        terms = [self._log_normal(likelihood, component, y) for component in self.components]
        weighted = torch.stack(terms) + self.weights.to(terms[0]).log()[:, None]
        return weighted.logsumexp(0).to(mean.dtype)

    def sample(self, num_samples: int, *, seed: Seed | None = None) -> Tensor:
        """Draw functions: outputs at all rows, which belong together.

        Args:
            num_samples: Number of draws ``S``.
            seed: Draws are a function of it; ``None`` takes one number from torch's global state.

        Returns:
            Outputs without noise, ``(S, N, *event)``.

        Raises:
            RuntimeError: If ``predict_linearized`` was not asked for the covariance between rows.
        """
        count = positive_int(num_samples, "sample(num_samples=...)")
        seed, indices = resolve_seed(seed), torch.arange(count)
        keys = fold(fold(seed, indices), "outputs")
        drawn = [self._drawn(component, keys) for component in self.components]
        if len(drawn) == 1:
            return drawn[0]
        weights = self.weights if bool((self.weights != self.weights[0]).any()) else None
        chosen = allocate(indices, weights, len(drawn), fold(seed, "component"))
        return torch.stack(drawn)[chosen, indices]

    def _drawn(self, component: Component, keys: Tensor) -> Tensor:
        joint = self._joint(component, "sample")
        noise = normal(keys, (len(joint),), dtype=torch.float64, device=joint.device)
        root = _links._root(joint, "sample")
        deviations = (noise @ root.mT).reshape(len(keys), *component.mean.shape)
        return component.mean + deviations.to(component.mean.dtype)

    def _mixed(self, values: list[Tensor]) -> Tensor:
        """The mean over components."""
        if len(values) == 1:
            return values[0]
        return torch.tensordot(self.weights.to(values[0]), torch.stack(values), 1)

    def _joint(self, component: Component, name: str) -> Tensor:
        if component.joint is None:
            raise RuntimeError(
                f"`{name}` needs the covariance between rows: write `predict_linearized(..., joint=True)`."
            )
        return component.joint

    def _needs_likelihood(self, name: str) -> Likelihood:
        if self.likelihood is None:
            raise ValueError(f"`{name}` needs a likelihood: `predict_linearized(..., likelihood=...)`.")
        return self.likelihood

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mean, and the parts of the variance; of classes all of it is in the first part."""
        likelihood = self.likelihood
        if likelihood is None:
            return self.output_mean, self.output_variance, None
        if likelihood.is_discrete:
            probs = likelihood.mean_of_log_probs(self._log_class_probs).to(self.components[0].mean.dtype)
            return probs, probs * (1 - probs), torch.zeros_like(probs)
        found = [_moments_of(likelihood, component) for component in self.components]
        mean = self._mixed([m for m, _, _ in found])
        epistemic = self._mixed([e + (m - mean).square() for m, e, _ in found])
        return mean, epistemic, self._mixed([a for _, _, a in found])

    @cached_property
    def _log_class_probs(self) -> Tensor:
        """In the layout of the likelihood, averaged over components."""
        terms = [self._linked(component) for component in self.components]
        if len(terms) == 1:
            return terms[0]
        stacked = torch.stack(terms)
        weights = self.weights.to(stacked).log()
        return (stacked + weights.reshape(-1, *(1,) * terms[0].ndim)).logsumexp(0)

    def _linked(self, component: Component) -> Tensor:
        mean = component.mean.to(at_least_single(component.mean.dtype))
        variance = component.variance.to(mean.dtype).reshape(mean.shape)
        draws = {"num_samples": self._num_samples, "seed": self._seed}
        if isinstance(self.likelihood, Bernoulli):
            if self.link == "mc":
                return _links.monte_carlo_bernoulli(mean, variance, **draws, log=True)
            return _links.probit_bernoulli(mean, variance, log=True)
        assert isinstance(self.likelihood, Categorical)
        axis = self.likelihood.output_axis(mean)
        logits = mean.movedim(axis, -1)
        if self.link == "probit":
            log_probs = _links.probit(logits, variance.movedim(axis, -1), log=True)
        else:
            log_probs = self._linked_blocks(component, logits, axis)
        return log_probs.movedim(-1, axis)

    def _linked_blocks(self, component: Component, logits: Tensor, axis: int) -> Tensor:
        blocks = component.of_positions(axis).to(logits.dtype)
        if self.link == "mc":
            return _links.monte_carlo(
                logits, blocks, num_samples=self._num_samples, seed=self._seed, log=True
            )
        bridge = _links.laplace_bridge if self.link == "bridge" else _links.laplace_bridge_normalized
        return bridge(logits, blocks.diagonal(dim1=-2, dim2=-1), blocks.sum(-1), log=True)

    def _log_prob_of_classes(self, likelihood: Likelihood, y: Tensor) -> Tensor:
        log_probs = self._log_class_probs
        if isinstance(likelihood, Categorical):
            return likelihood.log_prob(log_probs, y)  # log_softmax leaves log probabilities as they are
        picked = torch.where(y.bool(), log_probs[..., 1], log_probs[..., 0])
        return picked.reshape(len(y), -1).sum(1)

    def _log_normal(self, likelihood: Normal, component: Component, y: Tensor) -> Tensor:
        count, residual = len(y), (y.to(component.mean.dtype) - component.mean).reshape(len(y), -1)
        noise = likelihood.variance(component.mean).reshape(count, -1)
        covariance = component.covariance + torch.diag_embed(noise)
        lower = torch.linalg.cholesky(covariance.to(at_least_single(covariance.dtype)))
        white = torch.linalg.solve_triangular(lower, residual.to(lower.dtype).unsqueeze(-1), upper=False)
        logdet = 2 * lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (white.square().sum((1, 2)) + logdet + residual.shape[1] * math.log(2 * math.pi))


def seed_of(likelihood: Likelihood | None, link: Link, seed: Seed | None) -> Seed | None:
    """The seed of the draws of logits, which ``"mc"`` alone needs."""
    if link == "mc" and likelihood is not None and likelihood.is_discrete:
        return int(resolve_seed(seed))
    return seed


def check_link(link: Link, likelihood: Likelihood | None, call: str) -> None:
    """Refuse a link that there is not, or not for the likelihood."""
    if link not in get_args(Link):
        known = ", ".join(map(repr, get_args(Link)))
        raise ValueError(f"`{call}(link=...)` should be one of {known}, got {link!r}.")
    if likelihood is not None and not likelihood.is_discrete and link != "probit":
        raise ValueError(
            f"`{call}(link={link!r})` is for logits of classes; `{type(likelihood).__name__}` has none: "
            "leave it out."
        )
    if isinstance(likelihood, Bernoulli) and link not in ("probit", "mc"):
        raise ValueError(
            f"`{call}(link={link!r})` is for logits of several classes; `Bernoulli` has one: write 'probit' "
            "or 'mc'."
        )


def _moments_of(likelihood: Likelihood, component: Component) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of ``y``, variance of ``E[y | f]`` and mean of ``Var[y | f]`` for Gaussian outputs."""
    mean, variance = component.mean, component.variance.reshape(component.mean.shape)
    if isinstance(likelihood, Normal):
        return mean, variance, likelihood.variance(mean)
    if isinstance(likelihood, Poisson):  # the rate is log-normal
        rate = (mean + 0.5 * variance).exp()
        return rate, rate.square() * torch.expm1(variance), rate
    if isinstance(likelihood, HeteroscedasticNormal):  # and so is the variance
        (location, log_variance), (spread, of_log) = mean.chunk(2, -1), variance.chunk(2, -1)
        return location, spread, (log_variance + 0.5 * of_log).exp()
    raise NotImplementedError(
        f"The linearised predictive has no closed form for {type(likelihood).__name__}. Use `predict`."
    )


def _blocks_of_positions(covariance: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """``(N, F, F) -> (N, *positions, C, C)``: the outputs of each position."""
    event = shape[1:]
    places = [size for i, size in enumerate(event) if i != axis - 1]
    if not places:
        return covariance
    whole = covariance.reshape(len(covariance), *event, *event)
    # Classes of both sides last, then the diagonal over positions.
    whole = whole.movedim((axis, axis + len(event)), (-2, -1)).flatten(1, len(places))
    whole = whole.flatten(2, 1 + len(places)).diagonal(dim1=1, dim2=2).movedim(-1, 1)
    return whole.unflatten(1, places)
