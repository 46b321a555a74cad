"""Mixtures of a wide and a narrow normal."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tree import pytree_dataclass
from ._interface import Prior, Values
from ._numbers import POSITIVE, PROBABILITY, Numbers, Range

_FAR = 1e18  # standard deviations; its square is finite in single precision


@pytree_dataclass
class ScaleMixturePrior(Prior):
    """Independent mixtures of two normals of mean zero, Blundell et al. (2015), eq. 7.

    ``p = weight N(theta; 0, std_1^2) + (1 - weight) N(theta; 0, std_2^2)`` each. ``E log p`` has no closed
    form.

    Attributes:
        weight: Probability of the first, above 0 and below 1: a number, or a tree with a number or a tensor
            for each leaf.
        std_1: Standard deviation (not variance) of the first, in units of the parameter, likewise.
        std_2: That of the second, likewise.

    Raises:
        TypeError: If one of them is neither a number nor a tree of numbers.
        ValueError: If a weight is not between 0 and 1, or a standard deviation not positive and finite.

    Example:
        >>> import torch
        >>> from funcbayes import priors
        >>> priors.ScaleMixture(weight=0.25, std_1=1.0, std_2=0.1).log_prob({"w": torch.zeros(1)})
        tensor(1.1288)
    """

    weight: Numbers = 0.5
    std_1: Numbers = 1.0
    std_2: Numbers = math.exp(-6)

    ranges: ClassVar[Mapping[str, Range]] = {"weight": PROBABILITY, "std_1": POSITIVE, "std_2": POSITIVE}

    def _log_density(self, theta: Tensor, numbers: Values) -> Tensor:
        first, second = numbers["std_1"], numbers["std_2"]
        log_first, log_second = numbers["weight"].log(), torch.log1p(-numbers["weight"])
        first_is_wide = first >= second
        wide, narrow = torch.where(first_is_wide, first, second), torch.where(first_is_wide, second, first)
        log_wide = torch.where(first_is_wide, log_first, log_second)
        log_narrow = torch.where(first_is_wide, log_second, log_first)
        # The wide one plus log(1 + narrow / wide): far from zero the difference of the two logarithms would
        # be inf - inf, but as a product it is finite, once what is far counts as far.
        distance = (theta / narrow).clamp(-_FAR, _FAR).square()
        ratio = wide.log() - narrow.log() - 0.5 * distance * (1 - (narrow / wide).square())
        normal = -0.5 * (theta / wide).square() - wide.log() - 0.5 * math.log(2 * math.pi)
        # softplus(a) would round to a where exp(-a) is below 2e-9.
        return log_wide + normal - F.logsigmoid(-(log_narrow - log_wide + ratio))
