"""A Gaussian over parameters, whatever method found it."""

import math

from torch import Tensor

from .._functorch import is_concrete
from .._random import Seed
from .._tree import (
    Fixed,
    Params,
    difference,
    is_parameter,
    map_named,
    named_leaves,
    parameters_of,
    pytree_dataclass,
    select,
)
from ..covariances import Covariance
from ._interface import Draw, Posterior


@pytree_dataclass
class Gaussian(Posterior):
    """A Gaussian over the parameters of a tree.

    Attributes:
        mean: Location, leaves of any shape ``s``; may cover a part of the model's parameters. ``Fixed``
            leaves belong to every draw as they are.
        covariance: One of :mod:`funcbayes.covariances`, over the leaves of ``mean`` that are not
            ``Fixed``.

    Raises:
        TypeError: If a leaf of ``mean`` is not of floating point, or ``covariance`` is no covariance.
        ValueError: If ``covariance`` has other leaves than ``mean``.

    Example:
        >>> import torch, funcbayes as fb
        >>> mean = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
        >>> variance = {"w": torch.ones(2, 3), "b": torch.ones(2)}
        >>> q = fb.Gaussian(mean, fb.covariances.Diagonal(variance))
        >>> q.sample(4, seed=0)["w"].shape
        torch.Size([4, 2, 3])
    """

    mean: Params
    covariance: Covariance

    def __post_init__(self) -> None:
        if not isinstance(self.covariance, Covariance):
            raise TypeError(
                "`Gaussian(mean, covariance)` should be given one of `funcbayes.covariances`, got "
                f"{type(self.covariance).__name__}. For independent parameters: `Diagonal(variance)`."
            )
        for name, leaf in named_leaves(self.mean).items():
            if not is_parameter(leaf) and not isinstance(leaf, Fixed):
                raise TypeError(
                    f"`Gaussian(mean, ...)` should have floating-point leaves; {name!r} is "
                    f"{getattr(leaf, 'dtype', type(leaf).__name__)}. Leave it out, or pass it as "
                    "`fb.Fixed(tensor)`."
                )
        differing = difference(self.covariance.diagonal(), parameters_of(self.mean))
        if differing:
            raise ValueError(
                f"`Gaussian(mean, covariance)` should have a covariance over the parameters of `mean`; in it "
                f"{differing}."
            )

    def draws(self, indices: Tensor, seed: Seed) -> Draw:
        """``mean`` plus a deviation, leaves ``(S, *s)``."""
        deviations = named_leaves(self.covariance.deviations(indices, seed))

        def shifted(name: str, leaf: Tensor | Fixed) -> Tensor | Fixed:
            if isinstance(leaf, Fixed):
                return Fixed(leaf.tensor.expand(len(indices), *leaf.tensor.shape))
            return leaf + deviations[name]

        return Draw(map_named(shifted, self.mean))

    def log_prob(self, params: Params) -> Tensor:
        """Log density, a scalar: ``-1/2 [d^T precision d + logdet covariance + P log 2 pi]``.

        Args:
            params: Values of the covered parameters; a tree with more leaves than those is fine.
        """
        given = named_leaves(params)
        covered = parameters_of(self.mean)
        differing = difference({name: leaf for name, leaf in given.items() if name in covered}, covered)
        if differing:
            raise ValueError(f"`log_prob(params)` should have leaves like the mean; {differing}.")
        for name, variance in named_leaves(self.covariance.diagonal()).items():
            if is_concrete(variance) and bool((variance == 0).any()):
                raise ValueError(
                    f"`log_prob(params)` has no density to give: the variance of {name!r} is zero somewhere. "
                    "Leave certain parameters out of the posterior, or give them a positive variance."
                )
        location = select(self.mean, lambda name, leaf: name in covered)
        deviation = map_named(lambda name, leaf: given[name] - leaf, location)
        num_params = sum(leaf.numel() for leaf in covered.values())
        quadratic, logdet = self.covariance.quadratic_form(deviation), self.covariance.logdet()
        return -0.5 * (quadratic + logdet + num_params * math.log(2 * math.pi))

    @property
    def variance(self) -> Params:
        """Variance of each parameter, leaves ``s``."""
        return self.covariance.diagonal()
