"""Reals with noise of one scale."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from .._tree import pytree_dataclass
from ._checks import NO_CLASSES, check_finite, check_num_samples, check_outputs, check_targets, unavailable
from ._layout import count, diagonal_blocks, diagonal_columns, sample_shape, sum_rows, wide
from ._likelihood import Likelihood


@pytree_dataclass
class Normal(Likelihood):
    """Independent Gaussians around the outputs, ``log p = -(y-f)^2 / (2 s^2) - log(s sqrt(2 pi))`` each.

    ``y`` has the shape of ``outputs``. With the Jacobian ``J`` of the outputs, the GGN is ``J^T J / s^2``.

    Attributes:
        noise_std: Standard deviation ``s`` (not variance) of the noise: a number, or a tensor that
            broadcasts to one row of outputs ("vector noise"). A tensor can be differentiated and
            mapped over.

    Raises:
        TypeError: If ``noise_std`` is neither a number nor a tensor.
        ValueError: If ``noise_std`` is not positive and finite.
    """

    noise_std: float | Tensor

    is_discrete: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a scale that is not positive."""
        noise_std = self.noise_std
        if isinstance(noise_std, bool) or not isinstance(noise_std, Tensor | float | int):
            raise TypeError(
                f"`Normal(noise_std=...)` should be a number or a tensor, got {type(noise_std).__name__}."
            )
        if not _is_positive(noise_std):
            shown = (
                f"a tensor of shape {tuple(noise_std.shape)}" if isinstance(noise_std, Tensor) else noise_std
            )
            raise ValueError(f"`Normal(noise_std=...)` should be positive and finite, got {shown}.")

    def check(self, outputs: Tensor, y: Tensor | None = None, *, call: str = "check(outputs, y)") -> None:
        """Refuse targets in another shape than ``outputs``, or not finite, and noise that does not fit."""
        check_outputs(outputs, call)
        self._noise_std(outputs)
        if y is not None:
            check_targets(y, outputs.shape, outputs, call)
            check_finite(y, call)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the log density, ``(N,)``: summed over the outputs of a row."""
        check_targets(y, outputs.shape, outputs, "Normal.log_prob(outputs, y)")
        mean = wide(outputs)
        noise_std = self._noise_std(mean)
        residual = (y.to(mean.dtype) - mean) / noise_std
        terms = -0.5 * residual.square() - noise_std.log() - 0.5 * math.log(2 * math.pi)
        return sum_rows(terms).to(outputs.dtype)

    def num_terms(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Count the targets, ``N * C``."""
        check_targets(y, outputs.shape, outputs, "Normal.num_terms(outputs, y)")
        return count(y)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the outputs."""
        return outputs

    def variance(self, outputs: Tensor) -> Tensor:
        """Return ``noise_std^2`` in the shape of ``outputs``."""
        return self._noise_std(outputs).square().broadcast_to(outputs.shape)

    def entropy(self, outputs: Tensor) -> Tensor:
        """Return ``log(s sqrt(2 pi e))`` for each target, in the shape of ``outputs``."""
        entropy = self._noise_std(wide(outputs)).log() + 0.5 * math.log(2 * math.pi * math.e)
        return entropy.to(outputs.dtype).broadcast_to(outputs.shape)

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
        """Return ``P(Y <= y | f)`` in the shape of ``outputs``."""
        check_targets(y, outputs.shape, outputs, "Normal.cdf(outputs, y)")
        mean = wide(outputs)
        return torch.special.ndtr((y.to(mean.dtype) - mean) / self._noise_std(mean)).to(outputs.dtype)

    def sample(
        self, outputs: Tensor, *, generator: torch.Generator, num_samples: int | None = None
    ) -> Tensor:
        """Draw targets, differentiable in ``outputs`` and ``noise_std``."""
        check_num_samples(num_samples, "Normal.sample")
        noise = torch.randn(
            sample_shape(outputs.shape, num_samples),
            generator=generator,
            dtype=outputs.dtype,
            device=outputs.device,
        )
        return outputs + self._noise_std(outputs) * noise

    def fisher(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``I / s^2``, ``(N, *positions, C, C)``; ``y`` is not used."""
        del y
        precision = self._noise_std(outputs).square().reciprocal()
        return diagonal_blocks(precision.broadcast_to(outputs.shape))

    def fisher_sqrt(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``K = C`` columns ``e_c / s``; ``y`` is not used."""
        del y
        return diagonal_columns(self._noise_std(outputs).reciprocal().broadcast_to(outputs.shape))

    def hessian(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``I / s^2``: the Fisher, whatever the target."""
        check_targets(y, outputs.shape, outputs, "Normal.hessian(outputs, y)")
        return self.fisher(outputs)

    def distribution(self, outputs: Tensor, *, batch_ndim: int = 1) -> torch.distributions.Distribution:
        """Return a ``Normal`` with one event for all outputs of a row."""
        targets = torch.distributions.Normal(outputs, self._noise_std(outputs), validate_args=False)
        return torch.distributions.Independent(targets, outputs.ndim - batch_ndim, validate_args=False)

    def _noise_std(self, outputs: Tensor) -> Tensor:
        """The scale as a tensor in the dtype of ``outputs`` that broadcasts to one row of them."""
        if not isinstance(self.noise_std, Tensor):
            return torch.full((), self.noise_std, dtype=outputs.dtype, device=outputs.device)
        row, noise = outputs.shape[1:], self.noise_std.shape
        # The shape of a row stays what it is if the noise broadcasts to it, not the row to the noise.
        fits = len(noise) <= len(row) and all(
            n in (1, r) for n, r in zip(noise[::-1], row[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"`Normal(noise_std=...)` should be a scalar or broadcast to one row of the outputs, "
                f"of shape {tuple(row)}, got shape {tuple(noise)}."
            )
        return self.noise_std.to(outputs.dtype)


def _is_positive(value: float | Tensor) -> bool:
    """Whether all of ``value`` is positive and finite; unknown values pass."""
    if not isinstance(value, Tensor):
        return 0 < value < math.inf
    if torch.compiler.is_compiling():
        return True
    try:
        return bool(((value > 0) & value.isfinite()).all())
    except RuntimeError:  # a likelihood built inside `vmap`: its tensors have no one value to look at
        return True
