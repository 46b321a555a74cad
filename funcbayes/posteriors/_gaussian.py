"""A Gaussian over parameters, whatever method found it."""

import functools
import math

import torch
from torch import Tensor

from .._linearize import Linearization
from .._random import Seed
from .._tree import (
    Fixed,
    Params,
    difference,
    is_parameter,
    map_leaves,
    map_named,
    named_leaves,
    parameters_of,
    pytree_dataclass,
    repeated,
    select,
    static,
)
from ..covariances import Covariance
from ..covariances._flat import dtype_of, ravel
from ..covariances._noise import over
from ._coupled import opposite_deviations, orthogonal_deviations
from ._interface import Draw, Posterior


@pytree_dataclass
class Gaussian(Posterior):
    """A Gaussian over the parameters of a tree.

    Attributes:
        mean: Location, leaves of any shape ``s``; may cover a part of the model's parameters. ``Fixed``
            leaves belong to every draw as they are.
        covariance: One of :mod:`funcbayes.covariances`, over the leaves of ``mean`` that are not
            ``Fixed``.
        linearized: Whether it is over the parameters of the linearised model: a draw ``theta`` is evaluated
            as ``f(mean) + J (theta - mean)``, with the Jacobian of the outputs in the covered parameters. So
            is a Laplace approximation with a generalised Gauss-Newton matrix (Immer et al. 2021, section 3).
        antithetic: Whether draws come in pairs ``2 i`` and ``2 i + 1`` on opposite sides of the mean: see
            :func:`funcbayes.antithetic`.
        orthogonal: Whether deviations from the mean are orthogonal, in groups: see
            :func:`funcbayes.orthogonal`.

    Raises:
        TypeError: If a leaf of ``mean`` is not of floating point, or ``covariance`` is no covariance.
        ValueError: If ``covariance`` has other leaves than ``mean``, another dtype or another device.

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
    linearized: bool = static(default=False)
    antithetic: bool = static(default=False)
    orthogonal: bool = static(default=False)

    def __post_init__(self) -> None:
        if not isinstance(self.covariance, Covariance):
            raise TypeError(
                "`Gaussian(mean, covariance)` should be given one of `funcbayes.covariances`, got "
                f"{type(self.covariance).__name__}. For independent parameters: `Diagonal(variance)`."
            )
        for name in ("linearized", "antithetic", "orthogonal"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"`Gaussian(mean, covariance, {name}=...)` should be True or False, got "
                    f"{type(getattr(self, name)).__name__}."
                )
        for name, leaf in named_leaves(self.mean).items():
            if not is_parameter(leaf) and not isinstance(leaf, Fixed):
                raise TypeError(
                    f"`Gaussian(mean, ...)` should have floating-point leaves; {name!r} is "
                    f"{getattr(leaf, 'dtype', type(leaf).__name__)}. Leave it out, or pass it as "
                    "`fb.Fixed(tensor)`."
                )
        like, covered = named_leaves(self.covariance.like), parameters_of(self.mean)
        differing = difference(like, covered)
        if differing:
            raise ValueError(
                f"`Gaussian(mean, covariance)` should have a covariance over the parameters of `mean`; in it "
                f"{differing}."
            )
        for name, leaf in covered.items():
            here, there = ((t.dtype, str(t.device)) for t in (like[name], leaf))
            if here != there:
                raise ValueError(
                    "`Gaussian(mean, covariance)` should have a covariance in the dtype and on the device of "
                    f"`mean`; in it {name!r} is {here[0]} on {here[1]}, not {there[0]} on {there[1]}. Write "
                    "`funcbayes.to(covariance, dtype=..., device=...)`."
                )

    def forms(self) -> list[Draw]:
        """The mean."""
        return [Draw(self.mean, self._effects(self._center))]

    def draws(self, indices: Tensor, seed: Seed) -> Draw:
        """``mean`` plus a deviation, leaves ``(S, *s)``; linearised around the mean if it is so."""
        find = self.covariance.deviations
        if self.orthogonal:
            find = functools.partial(orthogonal_deviations, self.covariance)
        if self.antithetic:
            find = functools.partial(opposite_deviations, find)
        deviations = named_leaves(find(indices, seed))

        def shifted(name: str, leaf: Tensor | Fixed) -> Tensor | Fixed:
            if isinstance(leaf, Fixed):
                return Fixed(repeated(leaf.tensor, len(indices)))
            return torch.add(deviations[name], leaf, out=over(deviations[name], leaf))

        center = map_leaves(lambda leaf: repeated(leaf, len(indices)), self._center)
        return Draw(map_named(shifted, self.mean), self._effects(center))

    @property
    def _center(self) -> Params:
        """The mean without what is fixed."""
        return select(self.mean, lambda name, leaf: is_parameter(leaf))

    def _effects(self, center: Params) -> tuple[Linearization, ...]:
        return (Linearization(center),) if self.linearized and parameters_of(center) else ()

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
        self._refuse_singular("log_prob(params)", "density")
        location = select(self.mean, lambda name, leaf: name in covered)
        shift = map_named(lambda name, leaf: given[name] - leaf, location)
        deviation = ravel(shift, self.covariance.like)
        precision = self.covariance.inverse()
        quadratic, logdet = precision.quadratic(deviation.unsqueeze(-1)), precision.logdet()
        return (-0.5 * (quadratic - logdet + len(deviation) * math.log(2 * math.pi))).to(self._dtype)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, a scalar: ``1/2 [P (1 + log 2 pi) + logdet covariance]``."""
        self._refuse_singular("entropy()", "entropy")
        num_params = sum(leaf.numel() for leaf in parameters_of(self.mean).values())
        logdet = -self.covariance.inverse().logdet()
        return (0.5 * (num_params * (1 + math.log(2 * math.pi)) + logdet)).to(self._dtype)

    @property
    def variance(self) -> Params:
        """Variance of each parameter, leaves ``s``."""
        return self.covariance.diagonal()

    @property
    def _dtype(self) -> torch.dtype:
        return dtype_of(parameters_of(self.mean))

    def _refuse_singular(self, call: str, what: str) -> None:
        reason = self.covariance.singular()
        if reason:
            raise ValueError(
                f"`{call}` has no {what} to give: {reason}. Leave certain parameters out of the posterior, "
                "or give them a positive variance."
            )
