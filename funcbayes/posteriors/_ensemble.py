"""Finitely many values, weighted."""

from typing import Any

import torch
from torch import Tensor

from .._random import Seed, fold
from .._tree import (
    Fixed,
    Params,
    index,
    map_leaves,
    named_leaves,
    parameters_of,
    pytree_dataclass,
    select,
    static,
    tensors,
)
from ._allocation import allocate
from ._interface import Draw, Posterior, check_tensors
from ._weights import normalized, probabilities


@pytree_dataclass
class Ensemble(Posterior):
    """A discrete posterior over members: a deep ensemble, kept samples of a chain, fixed draws.

    Attributes:
        members: Parameters with a leading axis over the ``K`` members, leaves ``(K, *s)``; may cover a
            part of the model's.
        weights: Probabilities of the members ``(K,)``; given ones are divided by their sum. ``None``
            makes them equal.
        effects: Changes to how the model is called, one a member: see :class:`funcbayes.Draw`.
        has_equal_weights: Whether all members weigh the same.

    Raises:
        ValueError: If the leaves disagree on ``K``, or the weights are not ``K`` numbers, negative, not
            finite, or all zero.

    Example:
        >>> import torch, funcbayes as fb
        >>> ensemble = fb.Ensemble({"w": torch.tensor([1.0, 2.0, 6.0])}, torch.tensor([1.0, 1.0, 2.0]))
        >>> ensemble.mean["w"]
        tensor(3.7500)
    """

    members: Params
    weights: Tensor = None  # type: ignore[assignment]  # a tensor once it has been made
    effects: tuple[Any, ...] = ()
    has_equal_weights: bool = static(default=False, init=False)

    def __post_init__(self) -> None:
        check_tensors(self.members, "Ensemble(members)")
        sizes = {name: t.shape[0] if t.ndim else None for name, t in _tensors(self.members).items()}
        sizes |= {f"effects.{i}": t.shape[0] for i, t in enumerate(tensors(self.effects))}
        if not sizes:
            raise ValueError("`Ensemble(members)` should have at least one leaf, got an empty tree.")
        first = next(iter(sizes.values()))
        for name, size in sizes.items():
            if size is None or size != first or size == 0:
                raise ValueError(
                    "`Ensemble(members)` should have leaves with one leading axis over the members, at "
                    f"least one; {name!r} has {size} where another has {first}. "
                    "Stack the parameters of the members: `torch.stack` for every leaf."
                )
        device = tensors((self.members, self.effects))[0].device
        weights, is_equal = normalized(
            self.weights, self.num_members, "Ensemble(members, weights)", "members", device
        )
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "has_equal_weights", is_equal)

    @property
    def num_members(self) -> int:
        """``K``."""
        return tensors((self.members, self.effects))[0].shape[0]

    def member(self, i: int) -> Params:
        """Parameters of member ``i``."""
        return index(self.members, i)

    def forms(self) -> list[Draw]:
        """A member."""
        return [index(Draw(self.members, self.effects), 0)]

    def draws(self, indices: Tensor, seed: Seed) -> Draw:
        """Members chosen in proportion to their weights, leaves ``(S, *s)``."""
        names = ",".join(named_leaves(self.members))
        site = fold(fold(seed, "member"), names)
        weights = None if self.has_equal_weights else self._probabilities()
        chosen = allocate(indices, weights, self.num_members, site)
        return index(Draw(self.members, self.effects), chosen)

    def atoms(self) -> list[tuple[Draw, Tensor]]:
        """Each member once, with its weight."""
        return [(Draw(self.members, self.effects), self._probabilities())]

    @property
    def mean(self) -> Params:
        """Weighted mean of the members; ``Fixed`` leaves are averaged too, integers left out."""
        return map_leaves(self._average, self._floating())

    @property
    def variance(self) -> Params:
        """Variance of each parameter over the members, leaves ``s``: ``sum_k w_k (theta_k - mean)^2``."""
        covered = parameters_of(self.members)
        members = select(self.members, lambda name, leaf: name in covered)
        return map_leaves(lambda leaf: self._average((leaf - self._average(leaf)) ** 2), members)

    def _floating(self) -> Params:
        tensors = _tensors(self.members)
        return select(self.members, lambda name, leaf: tensors[name].is_floating_point())

    def _average(self, leaf: Tensor) -> Tensor:
        weights = self._probabilities().to(leaf)
        return torch.tensordot(weights, leaf, dims=1)

    def _probabilities(self) -> Tensor:
        return probabilities(self.weights, self.has_equal_weights)


def _tensors(members: Params) -> dict[str, Tensor]:
    return {k: v.tensor if isinstance(v, Fixed) else v for k, v in named_leaves(members).items()}
