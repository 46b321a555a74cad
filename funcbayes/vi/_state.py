"""What variational inference moves: a Gaussian in numbers that may take any value."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .._random import Seed
from .._tree import Params, map_leaves
from ..covariances._flat import at_least_single
from ..posteriors import Gaussian
from ._scale import Scale


class VariationalState(ABC):
    """A Gaussian ``q`` over some parameters, in unconstrained numbers: a pytree that any optimizer can move.

    Standard deviations, and the diagonals of triangular roots, are ``softplus(rho)``.

    Attributes:
        mean: Location, leaves of any shape ``s``.
    """

    mean: Params

    @abstractmethod
    def scale(self) -> Scale:
        """What its numbers mean, differentiable in them."""

    def draws(self, indices: Tensor, seed: Seed) -> Params:
        """Draw parameters, differentiable in the state, leaves ``(S, *s)``.

        Args:
            indices: Draw numbers, int64 ``(S,)``; draw ``i`` depends on the state, ``seed`` and ``i`` alone.
            seed: Int, or int64 scalar tensor.
        """
        return self.scale().draws(indices, seed)

    def log_prob(self, params: Params) -> Tensor:
        """Log density of one value of the parameters, leaves ``s``, a scalar."""
        return self.scale().log_prob(params)

    def entropy(self) -> Tensor:
        """Differential entropy in nats, a scalar."""
        return self.scale().entropy()

    def variance(self) -> Params:
        """Variance of each parameter, leaves ``s``."""
        return self.scale().variance()

    def detached(self) -> Self:
        """The same numbers as constants."""
        return map_leaves(torch.detach, self)


def posterior(state: VariationalState) -> Gaussian:
    """Read the Gaussian off a state.

    Args:
        state: Made by :func:`init`, or moved since.

    Returns:
        Gaussian over the covered leaves, without a graph.

    Raises:
        TypeError: If it is no state.
        ValueError: If its numbers are not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> state = fb.vi.init({"w": torch.zeros(2, 3)}, init_scale=0.1)
        >>> print(round(fb.vi.posterior(state).variance["w"][0, 0].item(), 3))
        0.01
    """
    check_state(state, "vi.posterior(state)")
    with torch.inference_mode(False), torch.no_grad():
        mean = map_leaves(lambda leaf: leaf.detach().clone(), state.mean)
        return Gaussian(mean, state.scale().covariance())


def check_state(state: Any, call: str) -> None:
    """Refuse what is no state."""
    if not isinstance(state, VariationalState):
        raise TypeError(
            f"`{call}` should be given a state, got {type(state).__name__}. Write `vi.init(params)`."
        )


def softplus_inverse(scale: Tensor) -> Tensor:
    """``rho`` with ``softplus(rho) = scale``, also where the scale is small."""
    return scale + torch.log(-torch.expm1(-scale))


def triangular(raw: Tensor) -> Tensor:
    """A lower triangular matrix with a positive diagonal, of a matrix of any numbers."""
    return raw.tril(-1) + torch.diag_embed(F.softplus(raw.diagonal(dim1=-2, dim2=-1)))


def raw_of_identity(size: int, scale: float, like: Tensor) -> Tensor:
    """What :func:`triangular` makes ``scale`` times the identity of."""
    dtype = at_least_single(like.dtype)
    diagonal = softplus_inverse(torch.full((size,), scale, dtype=dtype, device=like.device))
    return torch.diag(diagonal)
