"""Counts, from log rates."""

from typing import ClassVar

import torch
from torch import Tensor

from .._tree import pytree_dataclass
from ._checks import NO_CLASSES, check_finite, check_num_samples, check_outputs, check_targets, unavailable
from ._layout import count, diagonal_blocks, diagonal_columns, sample_shape, sum_rows, wide
from ._likelihood import Likelihood


@pytree_dataclass
class Poisson(Likelihood):
    """Independent counts; ``outputs`` are log rates, in the shape of ``y``."""

    is_discrete: ClassVar[bool] = False  # not finitely many classes
    has_integer_support: ClassVar[bool] = True
    has_entropy: ClassVar[bool] = False

    def check(self, outputs: Tensor, y: Tensor | None = None, *, call: str = "check(outputs, y)") -> None:
        """Refuse targets that are no counts, or not in the shape of ``outputs``."""
        check_outputs(outputs, call)
        if y is None:
            return
        check_targets(y, outputs.shape, outputs, call)
        check_finite(y, call)
        if bool((y < 0).any()):
            raise ValueError(f"Counts `y` in `{call}` should not be negative, got {y.min():g}.")
        if y.is_floating_point() and bool((y != y.floor()).any()):
            raise ValueError(f"Counts `y` in `{call}` should be whole numbers, got fractions.")

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``y f - exp(f) - log y!``, ``(N,)``: summed over the counts of a row."""
        check_targets(y, outputs.shape, outputs, "Poisson.log_prob(outputs, y)")
        log_rate = wide(outputs)
        y = y.to(log_rate.dtype)
        return sum_rows(y * log_rate - log_rate.exp() - torch.lgamma(y + 1)).to(outputs.dtype)

    def num_terms(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Count the targets, ``N * C``."""
        check_targets(y, outputs.shape, outputs, "Poisson.num_terms(outputs, y)")
        return count(y)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the rates, ``exp(f)``."""
        return outputs.exp()

    def variance(self, outputs: Tensor) -> Tensor:
        """Return the rates, ``exp(f)``."""
        return outputs.exp()

    def entropy(self, outputs: Tensor) -> Tensor:
        """Raise ``NotImplementedError``: there is no closed form."""
        raise unavailable(
            self,
            "entropy",
            "it has no closed form. Estimate it as the mean of `-log_prob(outputs, y)` over sampled `y`.",
        )

    def log_class_probs(self, outputs: Tensor) -> Tensor:
        """Raise ``NotImplementedError``: there are no classes."""
        raise unavailable(self, "log_class_probs", NO_CLASSES)

    def mean_of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Raise ``NotImplementedError``: there are no classes."""
        raise unavailable(self, "mean_of_log_probs", NO_CLASSES)

    def entropy_of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Raise ``NotImplementedError``: there are no classes."""
        raise unavailable(self, "entropy_of_log_probs", NO_CLASSES)

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``P(Y <= y | f)`` in the shape of ``outputs``, a step function of real ``y``."""
        check_targets(y, outputs.shape, outputs, "Poisson.cdf(outputs, y)")
        rate = wide(outputs).exp()
        steps = y.to(rate.dtype).floor()
        # P(Y <= k) = Gamma(k + 1, rate) / Gamma(k + 1), Abramowitz & Stegun 26.4.21.
        below = torch.special.gammaincc(steps.clamp_min(0) + 1, rate)
        return below.masked_fill(steps < 0, 0).to(outputs.dtype)

    def sample(
        self, outputs: Tensor, *, generator: torch.Generator, num_samples: int | None = None
    ) -> Tensor:
        """Draw counts in the dtype of ``outputs``, rounded where it does not hold them exactly."""
        check_num_samples(num_samples, "Poisson.sample")
        rate = wide(outputs).exp().broadcast_to(sample_shape(outputs.shape, num_samples))
        return torch.poisson(rate, generator=generator).to(outputs.dtype)

    def fisher(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``diag(exp(f))``, ``(N, *positions, C, C)``; ``y`` is not used."""
        del y
        return diagonal_blocks(outputs.exp())

    def fisher_sqrt(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``K = C`` columns ``exp(f / 2) e_c``; ``y`` is not used."""
        del y
        return diagonal_columns((0.5 * outputs).exp())

    def hessian(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``diag(exp(f))``: the Fisher, whatever the count."""
        check_targets(y, outputs.shape, outputs, "Poisson.hessian(outputs, y)")
        return self.fisher(outputs)

    def distribution(self, outputs: Tensor, *, batch_ndim: int = 1) -> torch.distributions.Distribution:
        """Return a ``Poisson`` with one event for all counts of a row."""
        counts = torch.distributions.Poisson(outputs.exp(), validate_args=False)
        return torch.distributions.Independent(counts, outputs.ndim - batch_ndim, validate_args=False)
