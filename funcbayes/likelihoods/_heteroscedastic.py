"""Reals with noise whose scale the network predicts."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from .._tree import pytree_dataclass
from ._checks import NO_CLASSES, check_finite, check_num_samples, check_outputs, check_targets, unavailable
from ._layout import count, diagonal_blocks, diagonal_columns, sample_shape, sum_rows, wide
from ._likelihood import Likelihood


@pytree_dataclass
class HeteroscedasticNormal(Likelihood):
    """Independent Gaussians; ``mean, log_variance = outputs.chunk(2, -1)``.

    ``outputs`` have shape ``(N, ..., 2 D)``, ``y`` and all moments ``(N, ..., D)``. The model and its
    loss are those of Nix & Weigend (1994) and Kendall & Gal (2017), https://arxiv.org/abs/1703.04977.
    """

    is_discrete: ClassVar[bool] = False

    def check(self, outputs: Tensor, y: Tensor | None = None, *, call: str = "check(outputs, y)") -> None:
        """Refuse outputs with an odd last axis, and targets that do not have half of it or are not finite."""
        check_outputs(outputs, call)
        mean, _ = _split(outputs)
        if y is not None:
            check_targets(y, mean.shape, outputs, call)
            check_finite(y, call)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``-(y-m)^2 / (2 v) - log(2 pi v) / 2``, ``(N,)``: summed over the targets of a row."""
        mean, log_variance = _split(wide(outputs))
        check_targets(y, mean.shape, outputs, "HeteroscedasticNormal.log_prob(outputs, y)")
        squares = (y.to(mean.dtype) - mean).square() * (-log_variance).exp()
        return sum_rows(-0.5 * (squares + log_variance + math.log(2 * math.pi))).to(outputs.dtype)

    def num_terms(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Count the targets, ``N * D``."""
        check_targets(y, _split(outputs)[0].shape, outputs, "HeteroscedasticNormal.num_terms(outputs, y)")
        return count(y)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the first half of the last axis."""
        return _split(outputs)[0]

    def variance(self, outputs: Tensor) -> Tensor:
        """Return ``exp`` of the second half of the last axis."""
        return _split(outputs)[1].exp()

    def entropy(self, outputs: Tensor) -> Tensor:
        """Return ``log(2 pi e v) / 2`` for each target, ``(N, ..., D)``."""
        return 0.5 * (_split(outputs)[1] + math.log(2 * math.pi * math.e))

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
        """Return ``P(Y <= y | f)``, ``(N, ..., D)``."""
        mean, log_variance = _split(wide(outputs))
        check_targets(y, mean.shape, outputs, "HeteroscedasticNormal.cdf(outputs, y)")
        standard = (y.to(mean.dtype) - mean) * (-0.5 * log_variance).exp()
        return torch.special.ndtr(standard).to(outputs.dtype)

    def sample(
        self, outputs: Tensor, *, generator: torch.Generator, num_samples: int | None = None
    ) -> Tensor:
        """Draw targets, differentiable in ``outputs``."""
        check_num_samples(num_samples, "HeteroscedasticNormal.sample")
        mean, log_variance = _split(outputs)
        noise = torch.randn(
            sample_shape(mean.shape, num_samples),
            generator=generator,
            dtype=mean.dtype,
            device=mean.device,
        )
        return mean + (0.5 * log_variance).exp() * noise

    def fisher(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``diag(1/v, 1/2)`` in the order of the outputs, ``(N, *positions, 2 D, 2 D)``.

        The expectation of :meth:`hessian` with ``E[y - m] = 0`` and ``E[(y - m)^2] = v``. ``y`` is not used.
        """
        del y
        _, log_variance = _split(outputs)
        return diagonal_blocks(torch.cat([(-log_variance).exp(), torch.full_like(log_variance, 0.5)], -1))

    def fisher_sqrt(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``K = 2 D`` columns: ``e_d / sqrt(v_d)``, then ``e_{D+d} / sqrt(2)``; ``y`` is not used."""
        del y
        _, log_variance = _split(outputs)
        halves = [(-0.5 * log_variance).exp(), torch.full_like(log_variance, math.sqrt(0.5))]
        return diagonal_columns(torch.cat(halves, -1))

    def hessian(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the exact Hessian, ``(N, *positions, 2 D, 2 D)``; it is indefinite, unlike the Fisher.

        With the residual ``r = y - m``, the block of one mean and its log variance is
        ``[[1/v, r/v], [r/v, r^2 / (2 v)]]``, of determinant ``-r^2 / (2 v^2)``.
        """
        mean, log_variance = _split(wide(outputs))
        check_targets(y, mean.shape, outputs, "HeteroscedasticNormal.hessian(outputs, y)")
        residual, precision = y.to(mean.dtype) - mean, (-log_variance).exp()
        cross = diagonal_blocks(residual * precision)
        upper = torch.cat([diagonal_blocks(precision), cross], -1)
        lower = torch.cat([cross, diagonal_blocks(0.5 * residual.square() * precision)], -1)
        return torch.cat([upper, lower], -2).to(outputs.dtype)

    def distribution(self, outputs: Tensor, *, batch_ndim: int = 1) -> torch.distributions.Distribution:
        """Return a ``Normal`` with one event for all targets of a row."""
        mean, log_variance = _split(outputs)
        targets = torch.distributions.Normal(mean, (0.5 * log_variance).exp(), validate_args=False)
        return torch.distributions.Independent(targets, outputs.ndim - batch_ndim, validate_args=False)


def _split(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log variances."""
    if outputs.ndim < 2 or outputs.shape[-1] % 2:
        raise ValueError(
            "`outputs` of `HeteroscedasticNormal` should have shape (N, ..., 2 D), means and then log "
            f"variances on the last axis, got {tuple(outputs.shape)}."
        )
    mean, log_variance = outputs.chunk(2, -1)
    return mean, log_variance
