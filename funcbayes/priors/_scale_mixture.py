"""Mixtures of a wide and a narrow normal."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .._tree import pytree_dataclass
from ._interface import Prior
from ._numbers import Numbers


@pytree_dataclass
class ScaleMixturePrior(Prior):
    """Independent mixtures of two normals of mean zero, Blundell et al. (2015), eq. 7.

    Attributes:
        weight: Probability of the first, above 0 and below 1: one number, or a tree.
        std_1: Standard deviation (not variance) of the first, likewise.
        std_2: Of the second.

    Raises:
        TypeError: If one of them is no number and no tree of numbers.
        ValueError: If a weight is not between 0 and 1, or a standard deviation not positive and finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> fb.priors.ScaleMixture(0.25, 1.0, 0.1).log_prob({"w": torch.zeros(1)})
        tensor(1.1288)
    """

    weight: Numbers = 0.5
    std_1: Numbers = 1.0
    std_2: Numbers = math.exp(-6)

    def __post_init__(self) -> None:
        self._check(("weight", "std_1", "std_2"))
        if isinstance(self.weight, float | int) and not self.weight < 1:
            raise ValueError(
                f"`priors.ScaleMixture(weight=...)` should be above 0 and below 1, got {self.weight}."
            )

    def _log_density(self, theta: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        weight, stds = numbers["weight"], (numbers["std_1"], numbers["std_2"])
        wide, narrow = (
            -0.5 * (theta / std).square() - std.log() - 0.5 * math.log(2 * math.pi) for std in stds
        )
        return torch.logaddexp(weight.log() + wide, torch.log1p(-weight) + narrow)
