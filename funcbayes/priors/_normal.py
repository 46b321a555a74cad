"""Normal priors."""

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .._tree import pytree_dataclass
from ._interface import Prior, Values
from ._numbers import FINITE, POSITIVE, Numbers, Range


@pytree_dataclass
class NormalPrior(Prior):
    """Independent normals, ``log p = -1/2 [precision (theta - mean)^2 - log precision + log 2 pi]`` each.

    ``E log p`` for ``theta ~ N(m, v)`` has ``(m - mean)^2 + v`` for the square.

    Attributes:
        precision: One over the variance (not the standard deviation), in one over squared units of the
            parameter: a number, or a tree with a number or a tensor for each leaf.
        mean: In units of the parameter, likewise.

    Raises:
        TypeError: If one of them is neither a number nor a tree of numbers.
        ValueError: If a precision is not positive and finite, or a mean not finite.

    Example:
        >>> import torch
        >>> from funcbayes import priors
        >>> params = {"w": torch.zeros(2), "b": torch.ones(1)}
        >>> priors.Normal(precision={"w": 4.0, "b": 1.0}).log_prob(params)
        tensor(-1.8705)
    """

    precision: Numbers = 1.0
    mean: Numbers = 0.0

    ranges: ClassVar[Mapping[str, Range]] = {"precision": POSITIVE, "mean": FINITE}

    def _log_density(self, theta: Tensor, numbers: Values) -> Tensor:
        return _log_normal((theta - numbers["mean"]).square(), numbers["precision"])

    def _expected_log_density(self, mean: Tensor, variance: Tensor, numbers: Values) -> Tensor:
        return _log_normal((mean - numbers["mean"]).square() + variance, numbers["precision"])


def _log_normal(square: Tensor, precision: Tensor) -> Tensor:
    return -0.5 * (precision * square - precision.log() + math.log(2 * math.pi))
