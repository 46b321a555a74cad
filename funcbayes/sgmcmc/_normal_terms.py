"""What a normal prior adds to potentials, in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._tree import Params, parameters_of
from ..covariances._flat import at_least_single, dtype_of
from ..priors._normal import NormalPrior
from ..priors._numbers import by_leaf


@dataclass(frozen=True)
class NormalTerms:
    """What a normal prior adds to the potentials of chains and to their gradients, in closed form.

    It is the prior of most chains, and a graph for it can take longer than a small network.

    Attributes:
        precision: Of each leaf, a scalar or ``s``.
        mean: Likewise; ``None`` for 0.
        constant: Of the potential.
    """

    precision: list[Tensor]
    mean: list[Tensor] | None
    constant: Tensor

    @classmethod
    def of(cls, prior: NormalPrior, params: Params) -> "NormalTerms":
        """The terms for leaves like those of one chain, in their order."""
        leaves = parameters_of(params)
        dtype = at_least_single(dtype_of(leaves))
        with torch.no_grad():
            precision = by_leaf(prior.precision, leaves, dtype, "`priors.Normal(precision=...)`")
            mean = by_leaf(prior.mean, leaves, dtype, "`priors.Normal(mean=...)`")
            constant = -prior.log_prob({k: m.expand(leaves[k].shape) for k, m in mean.items()})
        has_mean = not (isinstance(prior.mean, float | int) and prior.mean == 0)
        return cls([*precision.values()], [*mean.values()] if has_mean else None, constant)

    def added_to(
        self, potentials: Tensor, gradients: list[Tensor], leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Potentials ``(M,)`` and gradients ``(M, *s)`` of all terms, from those of the likelihood.

        Leaves are at ``(M, *s)``.
        """
        found, potentials = [], potentials + self.constant
        for i, (precision, gradient, leaf) in enumerate(zip(self.precision, gradients, leaves, strict=True)):
            shift = leaf.to(precision.dtype)
            shift = shift if self.mean is None else shift - self.mean[i]
            force = precision * shift
            squares = (force * shift).reshape(len(leaf), -1).sum(1)
            potentials = potentials + 0.5 * squares.to(potentials.device)
            found.append(gradient + force.to(at_least_single(gradient.dtype)))
        return potentials, found
