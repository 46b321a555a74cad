"""Laplace priors, which favour parameters near their location."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .._tree import Params, pytree_dataclass
from ._interface import Prior
from ._numbers import Numbers


@pytree_dataclass
class LaplacePrior(Prior):
    """Independent Laplace densities ``exp(-|theta - location| / scale) / (2 scale)``.

    Attributes:
        scale: In units of the parameter; the standard deviation is ``sqrt(2) scale``. One number, or a tree.
        location: Likewise.

    Raises:
        TypeError: If one of them is no number and no tree of numbers.
        ValueError: If a scale is not positive and finite, or a location not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> fb.priors.Laplace(scale=0.5).log_prob({"w": torch.tensor([0.0, 1.0])})
        tensor(-2.)
    """

    scale: Numbers = 1.0
    location: Numbers = 0.0

    def __post_init__(self) -> None:
        self._check(("scale",))

    def expected_log_prob(self, mean: Params, variance: Params) -> Tensor:
        """``-sum [E|theta - location| / scale + log(2 scale)]``, a scalar.

        ``E|d + std z| = sqrt(2 v / pi) exp(-d^2 / 2 v) + d erf(d / sqrt(2 v))`` is the mean of a folded
        normal (Leone, Nelson & Nottingham 1961).
        """
        return self._expected(mean, variance)

    def _log_density(self, theta: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        scale = numbers["scale"]
        return -(theta - numbers["location"]).abs() / scale - (2 * scale).log()

    def _expected_log_density(self, mean: Tensor, variance: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        shift = mean - numbers["location"]
        # Of a point the mean is |d|; a variance that is not zero in no dtype keeps its gradient finite.
        std = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
        ratio = shift / std
        distance = std * math.sqrt(2 / math.pi) * (-0.5 * ratio.square()).exp() + shift * torch.erf(
            ratio / math.sqrt(2)
        )
        return -distance / numbers["scale"] - (2 * numbers["scale"]).log()
