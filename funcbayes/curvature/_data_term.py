"""What the data say of themselves at the point where a curvature is found."""

import dataclasses
import math

import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import pytree_dataclass, static
from ..likelihoods import Likelihood, Normal


@pytree_dataclass
class DataTerm:
    """The log likelihood ``log p(D | theta)``, summed over the data, into which other noise can be put.

    Attributes:
        log_likelihood: Where there is no noise to choose: ``log p(D | theta)``, a scalar; else 0.
        squared_residuals: For ``Normal`` with one noise for all: the sum of ``(y - f)^2``; else 0.
        num_terms: How many scalars the likelihood sums (``N C`` for a regression).
        num_data: Number of rows ``N``.
        noise_std: The standard deviation of the noise that was given; 1 where there is none to choose.
        has_noise: Whether there is. The curvature is then that of unit noise.
        noise_power: The curvature of noise ``s`` is that of unit noise times ``s ** -noise_power``: 2, and 4
            for products of gradients, which have ``1 / s^2`` each.
    """

    log_likelihood: Tensor
    squared_residuals: Tensor
    num_terms: Tensor
    num_data: Tensor
    noise_std: Tensor
    has_noise: bool = static(default=False)
    noise_power: int = static(default=2)

    def at(self, noise_std: float | Tensor | None = None) -> Tensor:
        """``log p(D | theta)`` with the noise given, or else that of the likelihood; a float64 scalar."""
        if not self.has_noise:
            return self.log_likelihood
        noise = self.noise(noise_std)
        per_term = noise.log() + 0.5 * math.log(2 * math.pi)
        return -0.5 * self.squared_residuals / noise.square() - self.num_terms * per_term

    def noise(self, noise_std: float | Tensor | None) -> Tensor:
        """The noise to use."""
        if noise_std is None:
            return self.noise_std
        if isinstance(noise_std, Tensor):
            return noise_std.to(self.noise_std)
        return torch.full_like(self.noise_std, float(noise_std))

    def factor(self, noise_std: float | Tensor | None = None) -> Tensor:
        """What the curvature of unit noise is to be multiplied with."""
        noise = self.noise(noise_std)
        return noise ** (-self.noise_power) if self.has_noise else torch.ones_like(noise)

    def __add__(self, other: "DataTerm") -> "DataTerm":
        """Those of two data sets."""
        if self.has_noise != other.has_noise or self.noise_power != other.noise_power:
            raise ValueError(
                "Curvatures that are added should be of one kind and one likelihood; one of these has a "
                "noise to choose, or products of gradients, and the other has not."
            )
        same = self.noise_std, other.noise_std
        if all(map(is_concrete, same)) and bool((same[0] != same[1]).any()):
            raise ValueError(
                "Curvatures that are added should be of likelihoods with one `noise_std`, got "
                f"{same[0].tolist()} and {same[1].tolist()}."
            )
        return dataclasses.replace(
            self,
            **{
                name: getattr(self, name) + getattr(other, name)
                for name in ("log_likelihood", "squared_residuals", "num_terms", "num_data")
            },
        )


def with_unit_noise(likelihood: Likelihood) -> Likelihood:
    """The likelihood that a curvature is found with: one noise for all outputs can be chosen later."""
    return Normal(1.0) if noise_of(likelihood) is not None else likelihood


def noise_of(likelihood: Likelihood) -> Tensor | None:
    """The one noise of a ``Normal`` likelihood; ``None`` for others, and for noise that differs by output."""
    if not isinstance(likelihood, Normal):
        return None
    noise = torch.as_tensor(likelihood.noise_std, dtype=torch.float64).detach()
    return noise.reshape(()) if noise.numel() == 1 else None


def data_term(likelihood: Likelihood, outputs: Tensor, y: Tensor, noise_power: int) -> DataTerm:
    """That of some rows, for outputs ``(M, N, *event)`` of members; fields ``(M,)``."""
    noise = noise_of(likelihood)
    zeros = torch.zeros(len(outputs), dtype=torch.float64, device=outputs.device)
    if noise is None:
        found = torch.stack([likelihood.log_prob(f, y).double().sum() for f in outputs])
        residuals = zeros
    else:
        Normal(1.0).log_prob(outputs[0], y)  # refuses targets of another shape
        found, residuals = zeros, torch.stack([(f.double() - y.double()).square().sum() for f in outputs])
    terms = likelihood.num_terms(outputs[0], y).double()
    return DataTerm(
        found,
        residuals,
        zeros + terms,
        zeros + len(y),
        zeros + (1.0 if noise is None else noise.to(outputs.device)),
        has_noise=noise is not None,
        noise_power=noise_power,
    )
