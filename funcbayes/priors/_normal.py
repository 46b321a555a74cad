"""Normal priors."""

import math
from collections.abc import Mapping

from torch import Tensor

from .._tree import Params, pytree_dataclass
from ._interface import Prior
from ._numbers import Numbers


@pytree_dataclass
class NormalPrior(Prior):
    """Independent normals ``N(mean, 1 / precision)``.

    Attributes:
        precision: One over the variance (not the standard deviation): one number, or a tree.
        mean: Likewise.

    Raises:
        TypeError: If one of them is no number and no tree of numbers.
        ValueError: If a precision is not positive and finite, or a mean not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> fb.priors.Normal(precision=4.0).log_prob({"w": torch.zeros(2)})
        tensor(-0.4516)
    """

    precision: Numbers = 1.0
    mean: Numbers = 0.0

    def __post_init__(self) -> None:
        self._check(("precision",))

    def expected_log_prob(self, mean: Params, variance: Params) -> Tensor:
        """``-1/2 sum [precision ((m - mean)^2 + v) - log precision + log 2 pi]``, a scalar."""
        return self._expected(mean, variance)

    def _log_density(self, theta: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        precision, shift = numbers["precision"], theta - numbers["mean"]
        return -0.5 * (precision * shift.square() - precision.log() + math.log(2 * math.pi))

    def _expected_log_density(self, mean: Tensor, variance: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        return self._log_density(mean, numbers) - 0.5 * numbers["precision"] * variance
