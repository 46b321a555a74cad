"""All mass at one value."""

import torch
from torch import Tensor

from .._random import Seed
from .._tree import Params, map_leaves, named_leaves, parameters_of, pytree_dataclass, repeated, select
from ._interface import Draw, Posterior, check_tensors


@pytree_dataclass
class Point(Posterior):
    """One value of the parameters: a network without uncertainty in its weights.

    Attributes:
        params: Parameters, any pytree of tensors; may cover a part of the model's.

    Example:
        >>> import torch, funcbayes as fb
        >>> fb.Point({"w": torch.ones(2)}).sample(3)["w"].shape
        torch.Size([3, 2])
    """

    params: Params

    def __post_init__(self) -> None:
        if not named_leaves(self.params):
            raise ValueError("`Point(params)` should have at least one leaf, got an empty tree.")
        check_tensors(self.params, "Point(params)")

    def draws(self, indices: Tensor, seed: Seed) -> Draw:
        """The value, repeated without copying."""
        return Draw(map_leaves(lambda leaf: repeated(leaf, len(indices)), self.params))

    def forms(self) -> list[Draw]:
        """The value."""
        return [Draw(self.params)]

    def atoms(self) -> list[tuple[Draw, Tensor]]:
        """The value, with weight 1."""
        value = Draw(map_leaves(lambda leaf: leaf[None], self.params))
        return [(value, torch.ones(1, dtype=torch.float64))]

    @property
    def mean(self) -> Params:
        """The value."""
        return self.params

    @property
    def variance(self) -> Params:
        """Zero for every parameter."""
        covered = parameters_of(self.params)
        return map_leaves(torch.zeros_like, select(self.params, lambda name, leaf: name in covered))
