"""What a prediction says: statistics of the outputs over draws, kept or streamed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._functorch import is_concrete
from ._quantiles import mixture_quantile, weighted_quantile
from ._statistics import LogMeanExp, Summary, wide
from .likelihoods import Likelihood


class Prediction:
    """Outputs of a model at ``S`` draws of a posterior, and what they say together.

    Made by :func:`funcbayes.predict`. ``N`` is the number of rows. Statistics are computed when they are
    first asked for, in at least float32, and have the dtype of the outputs.

    Attributes:
        weights: Probability of each draw, ``(S,)``, summing to 1; equal unless the posterior has atoms.
        likelihood: The likelihood given to ``predict``, or ``None``.
        targets: The targets given to ``predict``, or ``None``.
    """

    weights: Tensor
    likelihood: Likelihood | None
    targets: Tensor | None

    def __init__(
        self,
        *,
        weights: Tensor,
        likelihood: Likelihood | None,
        targets: Tensor | None,
        samples: Tensor | None,
        streamed: dict[str, Tensor] | None,
        dtype: torch.dtype,
    ) -> None:
        self.weights, self.likelihood, self.targets = weights, likelihood, targets
        self._samples, self._dtype = samples, dtype
        self._statistics = {} if streamed is None else dict(streamed)

    def __repr__(self) -> str:
        kept = f"samples={tuple(self._samples.shape)}" if self._samples is not None else "streamed"
        return f"Prediction({kept}, likelihood={self.likelihood!r})"

    def under(self, likelihood: Likelihood | None) -> "Prediction":
        """What the same outputs say under another likelihood.

        Args:
            likelihood: What outputs say of ``y``; ``None`` for statistics of the outputs themselves.

        Raises:
            RuntimeError: If samples were not kept.
        """
        samples = self._kept("under")
        if likelihood is not None:
            likelihood.check(samples[0], None, call="prediction.under(likelihood)")
        return Prediction(
            weights=self.weights,
            likelihood=likelihood,
            targets=None,
            samples=samples,
            streamed=None,
            dtype=self._dtype,
        )

    @property
    def num_samples(self) -> int:
        """Number of draws ``S``."""
        return self.weights.shape[0]

    @property
    def num_rows(self) -> int:
        """Number of rows ``N``."""
        return self._statistics["moments"].shape[1] if self._samples is None else self._samples.shape[1]

    @property
    def samples(self) -> Tensor:
        """Raw outputs of the model at every draw, ``(S, N, ...)``."""
        return self._kept("samples")

    @property
    def mean(self) -> Tensor:
        """Predictive mean, ``(N, ...)``.

        With a likelihood that of ``y`` (class probabilities for ``Categorical``), otherwise of the outputs.
        """
        return self._get("moments")[0].to(self._dtype, copy=True)

    @property
    def variance(self) -> Tensor:
        """Predictive variance, ``(N, ...)``.

        With a likelihood ``epistemic_variance + aleatoric_variance``, by the law of total variance;
        otherwise that of the outputs over draws.
        """
        epistemic = self._get("moments")[1]
        if self.likelihood is None:
            return epistemic.to(self._dtype, copy=True)
        return (epistemic + self._get("aleatoric_variance")).to(self._dtype, copy=True)

    @property
    def std(self) -> Tensor:
        """Square root of :attr:`variance`."""
        return self.variance.sqrt()

    @property
    def epistemic_variance(self) -> Tensor:
        """Variance over draws of each draw's predictive mean, ``(N, ...)``.

        ``sum_s w_s (m_s - m)^2 / (1 - sum_s w_s^2)``, unbiased for independent draws of equal weights; 0 for
        a single atom.
        """
        return self._get("moments")[1].to(self._dtype, copy=True)

    @property
    def aleatoric_variance(self) -> Tensor:
        """Mean over draws of the variance of ``y`` given the outputs, ``(N, ...)``."""
        self._needs_likelihood("aleatoric_variance")
        return self._get("aleatoric_variance").to(self._dtype, copy=True)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the predictive distribution in nats, one number a row (and position)."""
        likelihood = self._needs_classes("entropy")
        return likelihood.entropy_of_log_probs(self._get("log_class_probs")).to(self._dtype, copy=True)

    @property
    def expected_entropy(self) -> Tensor:
        """Mean over draws of the entropy of ``y`` given the outputs, in nats."""
        likelihood = self._needs_likelihood("expected_entropy")
        if not likelihood.has_entropy:
            raise NotImplementedError(
                f"`expected_entropy` has no closed form for {type(likelihood).__name__}. `variance`, "
                "`interval` and `log_prob` have one."
            )
        return self._get("expected_entropy").to(self._dtype, copy=True)

    @property
    def mutual_information(self) -> Tensor:
        """Information that the parameters have on ``y``: ``entropy - expected_entropy``, in nats."""
        likelihood = self._needs_classes("mutual_information")
        entropy = likelihood.entropy_of_log_probs(self._get("log_class_probs"))
        return (entropy - self._get("expected_entropy")).clamp_min(0).to(self._dtype, copy=True)

    def log_prob(self, y: Tensor | None = None) -> Tensor:
        """Log density of ``y`` under the mixture over draws, one number a row: ``(N,)``.

        ``log sum_s w_s p(y | f_s)``, summed over the outputs of a row inside each draw.

        Args:
            y: Targets; ``None`` for those given to ``predict``.

        Raises:
            ValueError: If there are no targets, or no likelihood.
            RuntimeError: If samples were not kept and ``y`` is not what ``predict`` was given.
        """
        likelihood = self._needs_likelihood("log_prob")
        if y is None and self.targets is None:
            raise ValueError("`log_prob()` should be given `y`; `predict` was called without `targets`.")
        if y is None or _is_same(y, self.targets):
            return self._get("log_prob").to(self._dtype, copy=True)
        samples = self._kept("log_prob(y)", ", or give `predict` the `targets`")
        likelihood.check(samples[0], y, call="log_prob(y)")
        accumulator = LogMeanExp()
        values = Summary(likelihood, y).values("log_prob", samples)
        accumulator.update(values, self.weights)
        return accumulator.result().to(self._dtype, copy=True)

    def quantile(self, q: float) -> Tensor:
        """Quantile of the predictive distribution, ``(N, ...)``.

        With a likelihood, of the mixture over draws of ``p(y | f)``, found by bisection; otherwise of the
        outputs over draws.

        Args:
            q: Probability inside ``(0, 1)``.

        Raises:
            ValueError: If ``q`` is not inside ``(0, 1)``.
            NotImplementedError: If ``y`` is a class, which has no order.
            RuntimeError: If samples were not kept.
        """
        if not 0 < q < 1:
            raise ValueError(f"`quantile(q)` should be given a number inside (0, 1), got {q}.")
        if self.likelihood is not None and self.likelihood.is_discrete:
            raise NotImplementedError(
                f"`quantile(q)` is not there for {type(self.likelihood).__name__}: classes have no order. "
                "`mean` has their probabilities."
            )
        samples = wide(self._kept("quantile"))
        weights = self.weights.to(samples)
        if self.likelihood is None:
            return weighted_quantile(samples, weights, q).to(self._dtype, copy=True)
        return mixture_quantile(self.likelihood, samples, weights, q).to(self._dtype, copy=True)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Central predictive interval: lower and upper ends, each ``(N, ...)``.

        Args:
            level: Probability inside, in ``(0, 1)``.
        """
        if not 0 < level < 1:
            raise ValueError(f"`interval(level)` should be given a number inside (0, 1), got {level}.")
        return self.quantile((1 - level) / 2), self.quantile((1 + level) / 2)

    def distribution(self) -> torch.distributions.MixtureSameFamily:
        """The mixture over draws of ``p(y | f)``: batch shape ``(N,)``, the rest is the event."""
        likelihood = self._needs_likelihood("distribution")
        by_row = wide(self._kept("distribution")).movedim(0, 1)  # (N, S, ...)
        components = likelihood.distribution(by_row, batch_ndim=2)
        weights = self.weights.to(by_row).expand(by_row.shape[:2])
        mixing = torch.distributions.Categorical(probs=weights, validate_args=False)
        return torch.distributions.MixtureSameFamily(mixing, components, validate_args=False)

    def _get(self, name: str) -> Tensor:
        known = self._statistics.get(name)
        # What was found without a graph will not do where gradients are wanted now.
        is_cut = torch.is_grad_enabled() and self._samples is not None and self._samples.requires_grad
        if known is None or (is_cut and not known.requires_grad):
            summary = Summary(self.likelihood, self.targets)
            accumulator = summary.accumulator(name)
            values = summary.values(name, self._kept(name))
            accumulator.update(values, self.weights)
            self._statistics[name] = accumulator.result()
        return self._statistics[name]

    def _kept(self, name: str, otherwise: str = "") -> Tensor:
        if self._samples is None:
            raise RuntimeError(
                f"`{name}` needs the samples, which `predict(..., keep_samples=False)` did not keep. "
                f"Call it with `keep_samples=True`{otherwise}."
            )
        return self._samples

    def _needs_likelihood(self, name: str) -> Likelihood:
        if self.likelihood is None:
            raise ValueError(
                f"`{name}` is about `y`, so it needs a likelihood: "
                "`predict(fn, params, posterior, x, likelihood=...)`."
            )
        return self.likelihood

    def _needs_classes(self, name: str) -> Likelihood:
        likelihood = self._needs_likelihood(name)
        if not likelihood.is_discrete:
            raise NotImplementedError(
                f"`{name}` has no closed form for a mixture of {type(likelihood).__name__} distributions. "
                "`variance`, `interval` and `log_prob` have one."
            )
        return likelihood


def _is_same(y: Tensor, targets: Tensor | None) -> bool:
    if y is targets or targets is None:
        return y is targets
    return is_concrete(y) and is_concrete(targets) and y.shape == targets.shape and bool((y == targets).all())


def concatenate_rows(predictions: Sequence[Prediction]) -> Prediction:
    """Join predictions at the same draws for consecutive blocks of rows."""
    first = predictions[0]
    samples = streamed = targets = None
    if first._samples is not None:
        samples = torch.cat([p.samples for p in predictions], dim=1)
    else:
        names = first._statistics
        streamed = {
            n: torch.cat([p._statistics[n] for p in predictions], dim=1 if n == "moments" else 0)
            for n in names
        }
    if first.targets is not None:
        targets = torch.cat([p.targets for p in predictions])  # type: ignore[misc]  # all or none have them
    return Prediction(
        weights=first.weights,
        likelihood=first.likelihood,
        targets=targets,
        samples=samples,
        streamed=streamed,
        dtype=first._dtype,
    )
