"""What is kept of chains."""

from torch import Tensor

from .._tree import Params, map_leaves, pytree_dataclass, tensors
from ..posteriors import Ensemble


@pytree_dataclass
class Chains:
    """States of several chains, chain by chain and in the order in which they were reached.

    Attributes:
        params: Leaves ``(M, T, *s)``: ``T`` kept states of each of ``M`` chains. ``Fixed`` leaves, and leaves
            that chains hold but do not share, are the same all along a chain.
        statistics: What else is known of the chains, by name: see :func:`run` and :func:`hmc`.
    """

    params: Params
    statistics: dict[str, Tensor]

    @property
    def num_chains(self) -> int:
        """``M``."""
        return tensors(self.params)[0].shape[0]

    @property
    def num_draws(self) -> int:
        """Kept states of each chain, ``T``."""
        return tensors(self.params)[0].shape[1]

    def ensemble(self) -> Ensemble:
        """All states, chain by chain, as an ensemble of ``M * T`` members with equal weights."""
        return Ensemble(map_leaves(lambda leaf: leaf.flatten(0, 1), self.params))
