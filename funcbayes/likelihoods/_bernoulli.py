"""Zero or one, from a logit for each."""

from typing import ClassVar

import torch
from torch import Tensor

from .._tree import pytree_dataclass
from ._checks import NO_ORDER, check_num_samples, check_outputs, check_targets, unavailable
from ._layout import count, diagonal_blocks, diagonal_columns, entropy_along, sample_shape, sum_rows, wide
from ._likelihood import Likelihood


@pytree_dataclass
class Bernoulli(Likelihood):
    """Independent labels 0 or 1; ``outputs`` are the logits of ``y = 1``, in the shape of ``y``.

    ``y`` may be of any dtype. A row with several outputs has several labels (multi-label).
    """

    is_discrete: ClassVar[bool] = True

    def check(self, outputs: Tensor, y: Tensor | None = None, *, call: str = "check(outputs, y)") -> None:
        """Refuse labels that are not 0 or 1, or not in the shape of ``outputs``."""
        check_outputs(outputs, call)
        if y is None:
            return
        check_targets(y, outputs.shape, outputs, call)
        if not bool(((y == 0) | (y == 1)).all()):
            raise ValueError(
                f"Labels `y` in `{call}` should be 0 or 1, got values from {y.min():g} to {y.max():g}."
            )

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``y log p + (1 - y) log(1 - p)``, ``(N,)``: summed over the outputs of a row."""
        check_targets(y, outputs.shape, outputs, "Bernoulli.log_prob(outputs, y)")
        logits = wide(outputs)
        y = y.to(logits.dtype)
        terms = y * _log_sigmoid(logits) + (1 - y) * _log_sigmoid(-logits)
        return sum_rows(terms).to(outputs.dtype)

    def num_terms(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Count the labels."""
        check_targets(y, outputs.shape, outputs, "Bernoulli.num_terms(outputs, y)")
        return count(y)

    def mean(self, outputs: Tensor) -> Tensor:
        """Return ``p(y = 1)`` in the shape of ``outputs``."""
        return outputs.sigmoid()

    def variance(self, outputs: Tensor) -> Tensor:
        """Return ``p (1 - p)`` in the shape of ``outputs``."""
        return outputs.sigmoid() * (-outputs).sigmoid()

    def entropy(self, outputs: Tensor) -> Tensor:
        """Return the entropy of each label in the shape of ``outputs``."""
        return self.entropy_of_log_probs(self.log_class_probs(wide(outputs))).to(outputs.dtype)

    def log_class_probs(self, outputs: Tensor) -> Tensor:
        """Return ``[log p(0), log p(1)]`` on a new last axis."""
        return torch.stack([_log_sigmoid(-outputs), _log_sigmoid(outputs)], -1)

    def mean_of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Return ``p(y = 1)``, without the last axis."""
        return log_probs[..., 1].exp()

    def entropy_of_log_probs(self, log_probs: Tensor) -> Tensor:
        """Return entropies, without the last axis."""
        return entropy_along(log_probs, -1)

    def cdf(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Raise ``NotImplementedError``: labels are classes."""
        raise unavailable(self, "cdf", NO_ORDER)

    def sample(
        self, outputs: Tensor, *, generator: torch.Generator, num_samples: int | None = None
    ) -> Tensor:
        """Draw labels 0 or 1 in the dtype of ``outputs``."""
        check_num_samples(num_samples, "Bernoulli.sample")
        probs = wide(outputs).sigmoid()
        uniform = torch.rand(
            sample_shape(outputs.shape, num_samples),
            generator=generator,
            dtype=probs.dtype,
            device=probs.device,
        )
        return (uniform < probs).to(outputs.dtype)

    def fisher(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``diag(p (1 - p))``, ``(N, *positions, C, C)``; ``y`` is not used."""
        del y
        return diagonal_blocks(self.variance(outputs))

    def fisher_sqrt(self, outputs: Tensor, *, y: Tensor | None = None) -> Tensor:
        """Return ``K = C`` columns ``sqrt(p (1 - p)) e_c``; ``y`` is not used."""
        del y
        # In logs: the square root of an underflowing product would be 0 with an infinite derivative.
        root = (0.5 * (_log_sigmoid(outputs) + _log_sigmoid(-outputs))).exp()
        return diagonal_columns(root)

    def hessian(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return ``diag(p (1 - p))``: the Fisher, whatever the label."""
        check_targets(y, outputs.shape, outputs, "Bernoulli.hessian(outputs, y)")
        return self.fisher(outputs)

    def distribution(self, outputs: Tensor, *, batch_ndim: int = 1) -> torch.distributions.Distribution:
        """Return a ``Bernoulli`` with one event for all outputs of a row."""
        labels = torch.distributions.Bernoulli(logits=outputs, validate_args=False)
        return torch.distributions.Independent(labels, outputs.ndim - batch_ndim, validate_args=False)


def _log_sigmoid(x: Tensor) -> Tensor:
    # Not F.logsigmoid, whose second derivative warns under vmap, nor logaddexp, whose second
    # derivative is NaN at large x. Above its threshold softplus is linear, with a slope of exactly 1:
    # at 40 the difference is below the resolution of float64.
    return -torch.nn.functional.softplus(-x, threshold=40)
